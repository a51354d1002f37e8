"""The work that every system does, and where it is: the same code, and a ledger that only the jobs write."""

from __future__ import annotations

import itertools
import json
import os
import time
from typing import Any

#: Numbers the executions of a process, so that a job that runs twice in one process leaves two entries.
_numbers = itertools.count(1)


def url() -> str:
    """Return the URL of redis."""
    return os.environ["PEERS_REDIS"]


def settings() -> dict[str, Any]:
    """Return the settings of the row that is measured."""
    found: dict[str, Any] = json.loads(os.environ["PEERS_SETTINGS"])
    return found


def run(ledger: str, name: str, seconds: float) -> None:
    """Note the start, sleep, note the end."""
    number = next(_numbers)
    _note(ledger, "start", name, number)
    time.sleep(seconds)
    _note(ledger, "end", name, number)


def _note(ledger: str, what: str, name: str, number: int) -> None:
    """Append one line as ``zerog.chaos.ledger`` reads it."""
    line = f"{what} {name} {number} {time.monotonic():.6f} {os.getpid()} {os.getppid()}\n"
    descriptor = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())  # one write to a file opened for appending is never torn
    finally:
        os.close(descriptor)
