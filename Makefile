# make check is what CI runs.
.PHONY: check format lint types test
check:
	bin/test
format:
	.venv/bin/ruff format zerog workers tests && .venv/bin/ruff check --fix zerog workers tests
lint:
	.venv/bin/ruff check zerog workers tests
types:
	.venv/bin/mypy
test:
	.venv/bin/python -m pytest
