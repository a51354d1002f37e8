"""The systems of the comparison.  These modules run in an environment that has no zerog, and import nothing of it."""
