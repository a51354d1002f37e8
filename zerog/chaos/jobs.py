"""The jobs that run while processes are injured.  Each execution leaves lines in a ledger that nobody else writes."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from pydantic import Field

import zerog


def note(path: str, what: str, context: zerog.Context) -> None:
    """Append one line: what, whose, which attempt, when, in which process and under which agent."""
    line = f"{what} {context.uuid} {context.attempt} {time.monotonic():.6f} {os.getpid()} {os.getppid()}\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())  # one write to a file opened for appending is never torn
    finally:
        os.close(descriptor)


def noted(path: str, what: str, context: zerog.Context) -> int:
    """Return how often this was noted of a job, in whatever attempt."""
    with open(path, "rb") as ledger:
        return ledger.read().count(f"{what} {context.uuid} ".encode())


class ChaosWork(zerog.Job):
    """Note the start, sleep, note the end; or raise or go on later so many times before, and note that."""

    job_type = "chaos-work"
    example = {"ledger": "/tmp/ledger", "seconds": 0.1}
    max_crashes = 1000
    max_losses = 1000
    backoff = 0.05
    backoff_max = 0.2

    ledger: str
    seconds: float = Field(0.1, ge=0, le=3600)
    raises: int = Field(0, ge=0)
    requeues: int = Field(0, ge=0)
    ballast: str = ""

    def run(self, context: zerog.Context) -> Any:
        note(self.ledger, "start", context)
        end = time.monotonic() + self.seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(0.05, left))
            context.progress(1 - max(0.0, left) / self.seconds)
        # From the ledger and not from what ZeroG keeps: it is ZeroG that is judged.
        if self.raises and self.raises > noted(self.ledger, "raise", context):
            note(self.ledger, "raise", context)
            raise RuntimeError("as was asked")
        if self.requeues and self.requeues > noted(self.ledger, "requeue", context):
            note(self.ledger, "requeue", context)
            return zerog.Requeue()
        note(self.ledger, "end", context)
        return {"uuid": context.uuid, "attempt": context.attempt}


class ChaosKiller(zerog.Job):
    """Always kill the process it runs in."""

    job_type = "chaos-killer"
    example = {"ledger": "/tmp/ledger"}
    backoff = 0.05
    backoff_max = 0.2

    ledger: str

    def run(self, context: zerog.Context) -> None:
        note(self.ledger, "start", context)
        os.kill(os.getpid(), signal.SIGKILL)
