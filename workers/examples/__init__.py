"""Examples: real work of the kinds that ZeroG is for."""
