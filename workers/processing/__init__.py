"""Processing requests: defined once, executed under rules, and what became of every execution."""
