"""Figures: each beside its limit, measured in the same sitting.  Not part of the tests: ``python -m tests.benchmarks``."""
