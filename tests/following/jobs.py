"""Consumers that write down what they handle, and do to themselves what a message says."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import zerog

SHORT = zerog.Topic("short", retention=1)


class Ledger(zerog.Consumer):
    """Writes a line for each message, then does what it says."""

    name = "ledger"
    topics = ("readings", "short")
    time_limit = 2.0

    def handle(self, entry: zerog.Entry) -> None:
        """Write the line and do it."""
        write(self.settings.ledger, f"{entry.topic} {entry.number} {entry.value}")
        time.sleep(self.settings.pause)
        match entry.value:
            case "raise":
                raise RuntimeError("as it was asked for")
            case "fail":
                raise zerog.Fail("never")
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(60)
            case ["later", str(key)]:
                try:
                    self.documents.insert(key, True)
                except zerog.AlreadyExists:
                    return
                raise zerog.Retry(after=0.5)
            case ["copy", value]:
                self.publish("copies", value, key=f"copy:{entry.number}")
            case ["run", str(uuid)]:
                self.run("told", {}, uuid=uuid)


class Ends(zerog.Consumer):
    """Writes a line for each job that has ended."""

    name = "ends"
    topics = ("finished",)

    def handle(self, entry: zerog.Entry) -> None:
        """Write the line."""
        value = entry.value
        write(self.settings.ledger, f"finished {value['uuid']} {value['jobType']} {value['state']}")


class Apart(zerog.Consumer):
    """Is run by a daemon of its own."""

    name = "apart"
    topics = ("apart",)
    in_agents = False

    def handle(self, entry: zerog.Entry) -> None:
        """Write the line."""
        write(self.settings.ledger, f"apart {entry.number} {entry.value}")


class Told(zerog.Job):
    """Returns what it was told by the settings of its application."""

    job_type = "told"
    fails: bool = False

    def run(self, context: zerog.Context) -> dict[str, Any]:
        """Return them."""
        if self.fails:
            raise zerog.Fail("as it was asked for")
        settings = context.settings
        return {"ledger": str(settings.ledger), "pause": settings.pause, "most": settings.most}


def write(path: os.PathLike[str], line: str) -> None:
    """Add a line in one piece."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)
