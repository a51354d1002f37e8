"""``python -m zerog`` is the command line."""

from zerog.cli import entry

entry()
