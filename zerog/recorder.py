"""Recorder: what an attempt says, within its caps, on the way to the log of the job's events.

Of each level the first 200 and the last 800 entries of an attempt are kept; captured output has a budget of its own,
1 MiB by the same rule (the first fifth, the last four).  What lies between is counted as dropped.  Entries of the head
are written in the order in which they came; each kind of tail has batches of its own, so that old ones can be removed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from zerog.clock import to_iso
from zerog.outcome import GIVEN_BACK_UNKNOWN, Crashed, Failed, GivenBack, Outcome
from zerog.record import Event

#: Entries a level, bytes of captured output: how much is kept of the beginning and of the end.
FIRST, LAST = 200, 800
OUTPUT_FIRST, OUTPUT_LAST = 1024 * 1024 // 5, 1024 * 1024 * 4 // 5

#: What one batch may hold.
_BATCH_ENTRIES = 100
_BATCH_BYTES = 256 * 1024

#: Bytes that a line of captured output costs beside its text, so that empty lines are not free.
_LINE = 64


class Events(Protocol):
    """Where the entries of an attempt go: a Manager."""

    @property
    def shares_commits(self) -> bool:
        """Whether what was written in a step that failed is not there."""

    def append_events(self, uuid: str, batch: Mapping[str, Any]) -> int:
        """Append a batch; returns its number."""

    def drop_events(self, uuid: str, number: int, keep: int = 0) -> None:
        """Remove a batch again but for its last ``keep`` entries."""


@dataclass(slots=True)
class _Lane:
    """One kind of entry with its own caps; weights are entries, or bytes for captured output."""

    first: int
    last: int
    pending: deque[tuple[Event, int]] = field(default_factory=deque)
    pending_weight: int = 0
    written: deque[_Written] = field(default_factory=deque)
    written_weight: int = 0


@dataclass(slots=True)
class _Written:
    """A batch of a tail; ``weights`` has (weight, size) of each entry, ``number`` is 0 until it is confirmed."""

    weights: list[tuple[int, int]]
    document: dict[str, Any] | None
    number: int = 0


class Recorder:
    """Collects the entries of one attempt.

    ``flush`` writes them; until ``confirm`` says that the write counts, the next ``flush`` writes the same batches
    again under the same names, so that nothing is lost and readers can drop what came twice.
    """

    def __init__(self, uuid: str, attempt: int, name: str | None = None) -> None:
        #: What stands before the numbers of its batches, where several write for one attempt.
        self.name = name
        self._uuid = uuid
        self._attempt = attempt
        self._head: list[tuple[Event, int]] = []
        self._lanes: dict[str, _Lane] = {}
        self._dropped = {"events": 0, "bytes": 0}
        self._batch = 0
        self._unsaid = False
        self._unconfirmed: list[_Written] = []
        self._cuts: list[tuple[int, int]] = []

    @property
    def pending(self) -> bool:
        """Whether there is something to write."""
        return bool(
            self._head or self._unsaid or self._unconfirmed or any(lane.pending for lane in self._lanes.values())
        )

    def add(self, event: Event) -> None:
        """Take an entry."""
        lane = self._lane("output" if event.source else event.level)
        weight = event.size() + _LINE if event.source else 1
        if lane.first >= weight:
            lane.first -= weight
            self._head.append((event, weight))
            return
        lane.first = 0
        lane.pending.append((event, weight))
        lane.pending_weight += weight
        while lane.pending_weight > lane.last:
            gone, gone_weight = lane.pending.popleft()
            lane.pending_weight -= gone_weight
            self.drop(1, gone.size())

    def _lane(self, name: str) -> _Lane:
        if name not in self._lanes:
            caps = (OUTPUT_FIRST, OUTPUT_LAST) if name == "output" else (FIRST, LAST)
            self._lanes[name] = _Lane(*caps)
        return self._lanes[name]

    def drop(self, events: int, size: int) -> None:
        """Count entries that were dropped on the way here."""
        if events:
            self._dropped["events"] += events
            self._dropped["bytes"] += size
            self._unsaid = True

    def flush(self, manager: Events) -> None:
        """Write what is pending, and what an earlier flush wrote without being confirmed."""
        if not self.pending:
            return
        if not self._unconfirmed:
            self._prepare()
        for number, keep in self._cuts:
            manager.drop_events(self._uuid, number, keep)
        for batch in self._unconfirmed:
            assert batch.document is not None
            if batch.number and not manager.shares_commits:
                continue  # this one was acknowledged before another call of the same step failed
            batch.number = manager.append_events(self._uuid, batch.document)

    def document(self) -> dict[str, Any]:
        """Return what must be known to go on elsewhere, as JSON; when nothing is pending."""
        return {
            "dropped": dict(self._dropped),
            "lanes": {
                name: {"first": lane.first, "written": [[one.number, one.weights] for one in lane.written]}
                for name, lane in self._lanes.items()
            },
        }

    @classmethod
    def read(cls, uuid: str, attempt: int, members: Mapping[str, Any]) -> Recorder:
        """Go on from what ``document`` gave."""
        recorder = cls(uuid, attempt)
        recorder._dropped = dict(members["dropped"])
        for name, kept in members["lanes"].items():
            lane = recorder._lane(name)
            lane.first = kept["first"]
            for number, weights in kept["written"]:
                pairs = [(weight, size) for weight, size in weights]
                lane.written.append(_Written(pairs, None, number))
                lane.written_weight += sum(weight for weight, _ in pairs)
        return recorder

    def confirm(self) -> None:
        """Say that the last flush counts."""
        for batch in self._unconfirmed:
            batch.document = None
        self._unconfirmed, self._cuts = [], []

    def _prepare(self) -> None:
        """Turn what is pending into batches, and make room for them in the tails."""
        for lane in self._lanes.values():
            self._make_room(lane)
        head, self._head = self._head, []
        for part in _batches(head):
            self._unconfirmed.append(self._written(part))
        for lane in self._lanes.values():
            for part in _batches(lane.pending):
                batch = self._written(part)
                self._unconfirmed.append(batch)
                lane.written.append(batch)
            lane.written_weight += lane.pending_weight
            lane.pending.clear()
            lane.pending_weight = 0
        if self._unsaid and not self._unconfirmed:
            self._unconfirmed.append(self._written([]))
        self._unsaid = False

    def _make_room(self, lane: _Lane) -> None:
        excess = lane.written_weight + lane.pending_weight - lane.last
        while lane.written and excess > 0:
            oldest = lane.written[0]
            leading = _leading(oldest.weights, excess)
            for weight, size in oldest.weights[:leading]:
                lane.written_weight -= weight
                excess -= weight
                self.drop(1, size)
            del oldest.weights[:leading]
            self._cuts.append((oldest.number, len(oldest.weights)))
            if not oldest.weights:
                lane.written.popleft()

    def _written(self, part: list[tuple[Event, int]]) -> _Written:
        self._batch += 1
        document = {
            "attempt": self._attempt,
            "batch": self._batch if self.name is None else f"{self.name}.{self._batch}",
            "entries": [_document(event) for event, _ in part],
            "dropped": dict(self._dropped),
        }
        return _Written([(weight, event.size()) for event, weight in part], document)


def said_at_end(outcome: Outcome, at: float, once: bool) -> Event | None:
    """Return the entry among the errors for a spent error or crash, or for an end that nobody can know.

    ``once`` says that the type forbids to run it again when it may have run.
    """
    match outcome:
        case Failed(message=message, traceback=trace, reason=reason, code=code):
            return Event(at, "error", message, code, traceback=trace, reason=reason)
        case Crashed(message=message):
            return Event(at, "error", message, 500, reason="crashed")
        case GivenBack(started=True) if once:
            return Event(at, "error", GIVEN_BACK_UNKNOWN, 500, reason="outcome_unknown")
    return None


def _leading(entries: list[tuple[int, int]], excess: int) -> int:
    """Return how many leading entries must go so that ``excess`` is gone."""
    count = 0
    while excess > 0 and count < len(entries):
        excess -= entries[count][0]
        count += 1
    return count


def _batches(entries: Iterable[tuple[Event, int]]) -> list[list[tuple[Event, int]]]:
    batches: list[list[tuple[Event, int]]] = []
    size = 0
    for entry in entries:
        size += entry[0].size()
        if not batches or len(batches[-1]) >= _BATCH_ENTRIES or size > _BATCH_BYTES:
            batches.append([])
            size = entry[0].size()
        batches[-1].append(entry)
    return batches


def _document(event: Event) -> dict[str, Any]:
    members = {
        "at": to_iso(event.at),
        "level": event.level,
        "message": event.message,
        "code": event.code,
        "source": event.source,
        "traceback": event.traceback,
        "reason": event.reason,
    }
    return {name: value for name, value in members.items() if value is not None}


class Lines:
    """Cuts a captured stream into lines; a line longer than ``limit`` is cut and marked, the rest of it not kept."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._over = 0

    def feed(self, data: bytes) -> list[str]:
        """Take bytes and return the lines that are whole now."""
        *whole, rest = data.split(b"\n")
        lines = []
        for part in whole:
            self._add(part)
            lines.append(self._take())
        self._add(rest)
        return lines

    def end(self) -> list[str]:
        """Return what is left without a line's end."""
        return [self._take()] if self._buffer else []

    def _add(self, part: bytes) -> None:
        room = self._limit - len(self._buffer)
        self._buffer += part[:room]
        self._over += max(0, len(part) - room)

    def _take(self) -> str:
        text = self._buffer.decode("utf-8", "replace").rstrip("\r")
        if self._over:
            text += f"… [cut, {len(self._buffer) + self._over} bytes]"
        self._buffer.clear()
        self._over = 0
        return text
