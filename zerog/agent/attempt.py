"""Attempt: what a slot knows of the attempt that it answers for, and what all slots of an agent share."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zerog.agent.account import Account
from zerog.agent.executor import MAX_MESSAGE, shorten
from zerog.agent.pipe import Message
from zerog.datastore.blobs import BlobWriter
from zerog.job import Job
from zerog.manager import Claimant, Held
from zerog.needs import Limits
from zerog.outcome import (
    Cancelled,
    Failed,
    Outcome,
    Requeued,
    Result,
    Succeeded,
)
from zerog.record import Event, JobRecord
from zerog.recorder import Lines, Recorder, said_at_end
from zerog.remote import Pieces
from zerog.statistics import Statistics

#: Seconds between two writes of a job's progress, and before the first: short jobs need none.
WRITE_EVERY = 1.0
FIRST_WRITE = 0.25

_MAX_PROGRESS_MESSAGE = 1000


@dataclass(frozen=True, slots=True)
class Terms:
    """What all slots of an agent share: its id and what its leases name, its timings in seconds, what it serves, has
    and wants to give of that, its counts, and what it will say of itself."""

    agent: str
    holder: str
    job_types: Sequence[str]
    labels: Sequence[str]
    has: Limits
    lease: float
    grace: float
    time_limit: float | None
    max_jobs: int
    max_memory: int
    statistics: Statistics
    account: Account
    #: Answers what a running job asks.
    answered: Callable[[JobRecord, dict[str, Any]], Message | Callable[[], Message]]

    @property
    def claimant(self) -> Claimant:
        """Who claims for its slots."""
        return Claimant(self.agent, self.holder)


@dataclass(slots=True)
class Stop:
    """The ending of a child that will not be waited for: what is recorded then, and when it becomes rougher."""

    outcome: Outcome | None
    signals: list[signal.Signals]
    next: float
    told: bool = False


class Attempt:
    """What the slot knows of the attempt that it answers for."""

    def __init__(self, held: Held, job: type[Job], now: float, terms: Terms) -> None:
        self.held = held
        self.number = held.record.attempt
        self.uuid = held.record.uuid
        self.job = job
        #: What it holds of the agent, and since when it does, in seconds since 1970.
        self.needs = held.record.needs
        self.revised = held.record.revised
        self.since = held.record.started_at or 0.0
        self.started = now
        self.recorder = Recorder(self.uuid, self.number)
        self.lines: dict[str, Lines] = {}
        self.completeness: float | None = None
        self.message: str | None = None
        lease = held.record.lease
        #: Seconds of the lease, as whoever gave it says.
        self.lease = terms.lease if lease is None else max(0.01, lease.until - self.since)
        self.renew_at = now + self.lease / 3
        self.touch_at = now + self.lease / 3
        self.write_at = now + FIRST_WRITE
        #: Until when, monotonic, nobody can have taken the job over: its lease was written half a lease ago at most.
        self.sure_until = now + self.lease / 2
        limit = job.time_limit if job.time_limit is not None else terms.time_limit
        self.limit = limit
        self.limit_at = now + limit if limit is not None else None
        soft = job.soft_time_limit
        #: When the child is told that its soft time limit has passed, and when its memory is looked at.
        self.expire_at = now + soft if soft is not None else None
        self.memory_at = now if job.memory_limit is not None else None
        #: The last checkpoint that is not stored yet: its number and the state.
        self.checkpoint: tuple[int, Any] | None = None
        #: What the child wants to know of the job's parents; it waits for the answer.
        self.question: dict[str, Any] | None = None
        self.output: BlobWriter | Pieces | None = None
        self.media_type = ""
        self.waiting_output = bytearray()
        self.outcome: Outcome | None = None
        self.told = False
        self.said_end = False

    @property
    def dirty(self) -> bool:
        """Whether there is something to report."""
        return self.completeness is not None or self.message is not None or self.recorder.pending

    def report_due(self, now: float) -> bool:
        """Return whether the record is to be written now: for a checkpoint, to renew the lease, or once a second."""
        if self.checkpoint is not None:
            return True
        return now >= self.renew_at or (self.dirty and now >= self.write_at)

    def take_report(self, message: dict[str, Any]) -> None:
        """Take what the child says of its job; the last progress wins."""
        if message.get("completeness") is not None:
            self.completeness = message["completeness"]
        if message.get("message") is not None:
            self.message = shorten(message["message"], _MAX_PROGRESS_MESSAGE)
        for at, level, text, code in message["events"]:
            self.recorder.add(Event(at, level, text, code))
        dropped = message.get("dropped")
        if dropped:
            self.recorder.drop(dropped["events"], dropped["bytes"])

    def stored_output(self) -> BlobWriter | Pieces:
        """Store what has come of the output and return the writer as it stands then.

        The attempt goes on from it only when the store has confirmed; otherwise the same bytes are written again.
        """
        assert self.output is not None
        writer = self.output.mark()
        writer.write(bytes(self.waiting_output))
        return writer

    def take_output(self, name: str, data: bytes, at: float) -> None:
        """Take captured output: one event a line."""
        if name not in self.lines:
            self.lines[name] = Lines(MAX_MESSAGE)
        for line in self.lines[name].feed(data):
            self.recorder.add(Event(at, "event", line, source=name))

    def end_output(self, at: float) -> None:
        """Take what is left of the captured output without a line's end."""
        for name, lines in self.lines.items():
            for line in lines.end():
                self.recorder.add(Event(at, "event", line, source=name))

    def say_end(self, at: float) -> None:
        """Leave one entry among the errors for a spent error or crash, and for an end that nobody can know."""
        if self.said_end:
            return
        self.said_end = True
        assert self.outcome is not None
        last = said_at_end(self.outcome, at, once=not self.job.rerun_after_crash)
        if last is not None:
            self.recorder.add(last)


def read_outcome(message: dict[str, Any]) -> Outcome:
    """Return the outcome that a child's message describes."""
    match message["kind"]:
        case "succeeded":
            inline = message.get("inline")
            result = None
            if inline is not None:
                result = Result("application/json", len(inline.encode()), inline=inline)
            return Succeeded(result, message["code"])
        case "requeued":
            return Requeued(message["delay"], message["state"])
        case "cancelled":
            return Cancelled()
    return Failed(
        message["message"],
        message["reason"],
        message["code"],
        message["traceback"],
        message["final"],
        message["after"],
        message["free"],
    )
