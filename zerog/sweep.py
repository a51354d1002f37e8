"""The sweep (R8): what the queue forgot is put again, what stands still is taken over, what waits is decided.

One process walks (``SweeperLease``); nothing breaks when several do.  It keeps the list of the jobs that have not
ended, and of each what it was when it was looked at last.  A walk looks at what came since the last one, at all that
run, and at a tenth of the others, so that each is looked at within ten walks; at all of them when it is the first, when
the queue may have forgotten its entries, or when a tube holds less than it should.

The list is written down as a *mark*: the number in the log of jobs below which all have ended, the numbers above it
of those that have not, and which queue it was.  A job that waits for weeks pins nothing, and the next sweeper begins
where this one was.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from zerog import codec, failpoints
from zerog.exceptions import AlreadyExists, Conflict, CorruptDocument, NotFound, QueueUnavailable, StoreUnavailable
from zerog.leases import LeaseWatch
from zerog.manager import Held, Manager
from zerog.queue.base import TubeStats
from zerog.record import JobRecord, State

logger = logging.getLogger(__name__)

#: Records that are read in one go, and how many of those that do not run a walk looks at at least.
_SEGMENT, _AT_LEAST = 500, 1000

#: Walks within which every open job is looked at, and after which a record that is still due is put again, whatever
#: the counts of its tube say; and how many of a type in one walk.
_WITHIN, _OVERDUE = 10, 20

#: Seconds for which a record must have been due before it is missed in the queue: its submit may be under way.  Not so
#: when the queue may have forgotten everything: the entries of younger records would stand for those of older ones.
_GRACE = 1.0

#: Seconds for which an entry of the log without a record is looked at again: its submit may be under way.
_ORPHAN = 600.0

_MARK = "sweep-mark"

#: Numbers between two ranges of open jobs that are read along rather than asked for twice.
_NEAR = 100


@dataclass(slots=True)
class _Open:
    """A job that had not ended when it was looked at last, or an entry whose record was not there (no state)."""

    uuid: str
    since: float
    job_type: str = ""
    state: State | None = None
    due_at: float = 0.0
    #: The walk that found it due first; -1 if it is not due.
    due_since: int = -1


@dataclass(slots=True)
class Sweep:
    """One process's walk over the open jobs.  Belongs to one thread, whose queue connection it uses."""

    manager: Manager
    watch: LeaseWatch
    _open: dict[int, _Open] = field(default_factory=dict)
    _running: set[int] = field(default_factory=set)
    _last: int = 0
    _walks: int = 0
    _cursor: int = 0
    _identity: str | None = None
    _counts: dict[str, TubeStats] = field(default_factory=dict)
    _types: set[str] = field(default_factory=set)
    _grace: float = _GRACE
    _write_at: float = 0.0
    _mark: bytes = b""
    _begun: bool = False

    def forget(self) -> None:
        """Begin anew at the next walk: somebody else has swept meanwhile."""
        self._open.clear()
        self._running.clear()
        self._last, self._begun, self._mark, self._identity = 0, False, b"", None

    def walk(self, go_on: Callable[[], bool] = lambda: True) -> None:
        """Look at the open jobs once; raises when the store is away.  While the queue is, it is not filled, and that is
        all: what has lapsed is taken over, and what waits is decided.

        ``go_on`` is asked after each segment; the walk ends when it says no.
        """
        if not self._begun:
            self._read_mark()
        # The counts come before the records: what is claimed in between makes a tube look fuller, never emptier.
        identity = self._ask_queue()
        another = identity is not None and self._identity is not None and identity != self._identity
        whole = another or not self._begun
        self._grace = 0.0 if another else _GRACE
        new = list(self._read_new())
        looked = set(self._choose(whole, new))
        self._walks += 1
        if not self._look_at(sorted(looked), go_on):
            return
        if identity is not None:
            if not self._look_at(self._suspects(looked), go_on):
                return
            self._put_missing()
            self._identity = identity
        self._begun = True
        self._write_mark()

    def _ask_queue(self) -> str | None:
        """Return the identity of the queue and count its entries; None while it is away."""
        self._types.update(self.manager.registry.names)
        # As a probe: what this walk puts would else be left to the sweep, and the queue be taken for filled.
        identity = self.manager.probe_queue()
        if identity is None:
            return None
        try:
            self._counts = {name: self.manager.queue_stats(name) for name in self._types}
        except QueueUnavailable as error:
            self.manager.say_queue_away(error)
            return None
        return identity

    def same_queue(self) -> bool:
        """Return whether the queue is the one that the last walk has seen, entries and all."""
        return self._identity is None or self.manager.queue.identity() == self._identity

    def look(self) -> None:
        """Look only at the running jobs whose leases are being watched."""
        watched = self.watch.watched
        if not watched:
            return
        try:
            self._write_something()
            self._judge(self.manager.read_many(watched).values())
        except StoreUnavailable:
            self.watch.silence()
            raise

    def _write_something(self) -> None:
        """See every third of a lease whether the store takes writes: otherwise nobody can renew."""
        now = self.manager.clock.monotonic()
        if now >= self._write_at:
            self.manager.prove_writable()
            self._write_at = now + self.manager.lease / 3

    # What is looked at

    def _read_new(self) -> Iterator[int]:
        """Take what the log has got since the last walk."""
        now = self.manager.clock.monotonic()
        while entries := self.manager.store.read("jobs", after=self._last, limit=_SEGMENT):
            for entry in entries:
                self._open[entry.number] = _Open(codec.loads(entry.body)["uuid"], now)
                yield entry.number
            self._last = entries[-1].number

    def _choose(self, whole: bool, new: Sequence[int]) -> Iterable[int]:
        """Yield the numbers to look at: all, or the new ones, the running ones, and a share of the others."""
        numbers = list(self._open)  # in the order of their numbers: that is how they came
        if whole:
            return numbers
        share = max(_AT_LEAST, -(-len(numbers) // _WITHIN))
        start = bisect_right(numbers, self._cursor)
        turn = (numbers[start:] + numbers[:start])[:share]
        if turn:
            self._cursor = turn[-1]
        return [*turn, *self._running, *new]

    def _suspects(self, looked: set[int]) -> list[int]:
        """Return the jobs of types of which entries seem to be missing that this walk has not looked at yet.

        They are counted by what they were when they were looked at last, and may have ended since.
        """
        short = {job_type for job_type, due in self._due().items() if self._there(job_type) < len(due)}
        return [
            number
            for number, one in self._open.items()
            if number not in looked and (one.state is None or one.job_type in short)
        ]

    def _look_at(self, numbers: Sequence[int], go_on: Callable[[], bool]) -> bool:
        for start in range(0, len(numbers), _SEGMENT):
            self._look(numbers[start : start + _SEGMENT])
            failpoints.hit("sweep.mid")
            if not go_on():
                return False
        return True

    def _look(self, numbers: Sequence[int]) -> None:
        """Look at a segment: forget what has ended, take over what has lapsed, decide what waits."""
        held = self.manager.read_many([self._open[number].uuid for number in numbers])
        lost = self._judge(held.values())
        for number in numbers:
            one = self._open[number]
            found = held.get(one.uuid)
            record = lost.get(one.uuid) or (found.record if found is not None else None)
            if found is not None and found.record.state is State.WAITING and found.cas:
                record = self.manager.decide(found)
            if self._over(number, one, record, damaged=found is not None and found.cas == 0):
                del self._open[number]
                self._running.discard(number)
            elif record is not None:
                self._note(number, one, record, readable=found is not None and found.cas != 0)

    def _over(self, number: int, one: _Open, record: JobRecord | None, damaged: bool) -> bool:
        """Return whether an entry needs no further look."""
        if record is None:
            return self.manager.clock.monotonic() - one.since > _ORPHAN
        if record.terminal:
            return True
        if damaged or record.number == number:
            return False
        # The job has another number.  A greater one stands further on; a smaller one may just be about to become this
        # one, when its server appends again (R1).
        return record.number > number or self.manager.clock.monotonic() - one.since > _ORPHAN

    def _note(self, number: int, one: _Open, record: JobRecord, readable: bool) -> None:
        one.job_type, one.state = record.job_type, record.state
        (self._running.add if record.state is State.RUNNING else self._running.discard)(number)
        # What a newer version has written is for that version to put.
        one.due_at = max(record.updated_at, record.not_before or 0.0) if readable else float("inf")
        if not self._is_due(one):
            one.due_since = -1
        elif one.due_since < 0:
            one.due_since = self._walks

    def _is_due(self, one: _Open) -> bool:
        return (
            one.state is State.QUEUED
            and one.due_at + self._grace <= self.manager.clock.now()
            and one.job_type not in self.manager.paused
        )

    # What is done about it

    def _judge(self, held: Iterable[Held]) -> dict[str, JobRecord]:
        """Take from their attempts what has lapsed; return those records as they are then."""
        self.watch.heard()
        after = {}
        for one in held:
            if self.watch.lapsed(one.record) or self.manager.lost(one.record):
                record = self._lose(one)
                if record is not None:
                    after[record.uuid] = record
        return after

    def _lose(self, held: Held) -> JobRecord | None:
        try:
            after = self.manager.lose(held).record
        except Conflict:
            return None  # its agent lives, or another sweeper was first
        self.watch.forget(held.record.uuid)
        logger.warning(
            "lost job=%s attempt=%d agent=%s state=%s",
            held.record.uuid, held.record.attempt, held.record.agent, after.state,
        )  # fmt: skip
        if after.state is State.QUEUED and after.job_type not in self.manager.paused:
            self.manager.enqueue([after])
        return after

    def _due(self) -> dict[str, list[_Open]]:
        due: dict[str, list[_Open]] = {}
        for one in self._open.values():
            if self._is_due(one):
                due.setdefault(one.job_type, []).append(one)
        return due

    def _there(self, job_type: str) -> int:
        """Return how many entries of a type stand for jobs that are due."""
        counts = self._counts.get(job_type, TubeStats())
        running = Counter(self._open[number].job_type for number in self._running)
        # What is reserved and does not run yet, or any more, is on its way, not missing.
        return counts.ready + max(0, counts.reserved - running[job_type])

    def _put_missing(self) -> None:
        """Put as many due jobs of each type as its tube lacks entries, those first that have waited for most walks.

        Which entries are missing cannot be known, and putting all of them would double a healthy backlog.  A job that
        was due in ten walks is put again although the counts say that its entry is there, as long as that does not make
        the tube longer by more than a tenth: as it is emptied, the counts tell.
        """
        for job_type, due in self._due().items():
            if job_type not in self._types:
                self._types.add(job_type)  # its tube is counted from the next walk on
                continue
            there = self._there(job_type)
            due.sort(key=lambda one: one.due_since if one.due_since >= 0 else self._walks)
            missing = max(0, len(due) - there)
            if self._counts[job_type].ready < len(due) + max(_OVERDUE, len(due) // 10):
                overdue = sum(0 <= one.due_since <= self._walks - _WITHIN + 1 for one in due)
                missing = max(missing, min(overdue, _OVERDUE))
            if missing:
                logger.info("swept type=%s due=%d there=%d: putting %d", job_type, len(due), there, missing)
                self._put(due[:missing])

    def _put(self, missing: Sequence[_Open]) -> None:
        for start in range(0, len(missing), _SEGMENT):
            part = missing[start : start + _SEGMENT]
            now = self.manager.clock.now()
            held = self.manager.read_many([one.uuid for one in part])
            # Read again: their priority is not kept here, and what has been claimed since needs no entry.
            self.manager.enqueue([one.record for one in held.values() if one.cas and one.record.due(now)])
            for one in part:
                one.due_since = self._walks

    # The mark

    def _read_mark(self) -> None:
        """Take over the list of another sweeper, or of an earlier one; without a mark all jobs are looked at."""
        self._open.clear()
        self._running.clear()
        self._last = 0
        try:
            mark = codec.loads(self.manager.store.get(_MARK).body)
            last, ranges = int(mark["last"]), read_ranges(mark["open"])
            self._identity = mark.get("queue")
        except (NotFound, CorruptDocument, KeyError, TypeError, ValueError):
            return
        now = self.manager.clock.monotonic()
        for first, end, wanted in _spans(ranges):
            position = first - 1
            while position < end:
                entries = self.manager.store.read("jobs", after=position, limit=min(_SEGMENT, end - position))
                for entry in entries:
                    if entry.number in wanted:
                        self._open[entry.number] = _Open(codec.loads(entry.body)["uuid"], now)
                if not entries:
                    break
                position = entries[-1].number
        self._last = last

    def _write_mark(self) -> None:
        members = {"last": self._last, "open": write_ranges(list(self._open)), "queue": self._identity, "schema": 1}
        body = codec.dumps(members)
        if body == self._mark:
            return
        try:
            self.manager.store.replace(_MARK, body, self.manager.store.get(_MARK).cas)
        except NotFound:
            try:
                self.manager.store.insert(_MARK, body)
            except AlreadyExists:
                return
        except Conflict:
            return  # another sweeper: its mark is as good
        self._mark = body


def write_ranges(numbers: Sequence[int]) -> str:
    """Write growing numbers as text: each run as its distance from the last one, and its length if that is not 1."""
    parts: list[str] = []
    last = 0
    index = 0
    while index < len(numbers):
        start = index
        while index + 1 < len(numbers) and numbers[index + 1] == numbers[index] + 1:
            index += 1
        count = index - start + 1
        parts.append(f"{numbers[start] - last}" + (f"+{count}" if count > 1 else ""))
        last = numbers[index]
        index += 1
    return " ".join(parts)


def read_ranges(text: str) -> list[range]:
    """Read what ``write_ranges`` wrote."""
    ranges = []
    last = 0
    for part in text.split():
        distance, _, count = part.partition("+")
        first = last + int(distance)
        ranges.append(range(first, first + int(count or 1)))
        last = ranges[-1][-1]
    return ranges


def _spans(ranges: Sequence[range]) -> Iterator[tuple[int, int, set[int]]]:
    """Yield stretches of a log that are worth reading in one go: first and last number, and those that are wanted."""
    index = 0
    while index < len(ranges):
        start = index
        while (
            index + 1 < len(ranges)
            and ranges[index + 1][0] - ranges[index][-1] <= _NEAR
            and ranges[index][-1] - ranges[start][0] < 10 * _SEGMENT
        ):
            index += 1
        wanted = {number for part in ranges[start : index + 1] for number in part}
        yield ranges[start][0], ranges[index][-1], wanted
        index += 1
