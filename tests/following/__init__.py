"""An application of the tests with consumers and settings of its own."""
