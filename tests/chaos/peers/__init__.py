"""The kill test against other systems: ``python -m tests.chaos.peers``."""
