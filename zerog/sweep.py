"""The sweep (R8): whatever the queue forgot is put again, whatever stands still is taken over.

Here it is the plain walk: the whole ``jobs`` log at the start, then only what was open at the last walk and what came
since.  Every server and every agent does it; nothing breaks when several do it at once (R3, R4).
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from zerog import codec
from zerog.exceptions import Conflict, DatastoreError, QueueError, StoreUnavailable, ZerogError
from zerog.leases import LeaseWatch
from zerog.manager import Held, Manager
from zerog.queue.base import Put, TubeStats
from zerog.record import JobRecord, State

logger = logging.getLogger(__name__)

_SEGMENT = 500

#: Seconds for which a record must have been due before it is missed in the queue: its submit may be under way.
_GRACE = 1.0


#: Walks after which a record that is still due is put again, whatever the counts of its tube say, and how many of a
#: type in one walk.
_PATIENCE, _OVERDUE = 10, 20

#: Seconds for which an entry of the log without a record is looked at again: its submit may be under way.
_ORPHAN = 600.0


@dataclass(slots=True)
class _Open:
    """A job that had not ended when it was last looked at, or an entry whose record was not there."""

    uuid: str
    since: float
    due: int = 0  # walks in a row that found it due


@dataclass(slots=True)
class Sweep:
    """One process's walk over the open jobs.  Belongs to one thread, whose queue connection it uses."""

    manager: Manager
    watch: LeaseWatch
    _open: dict[int, _Open] = field(default_factory=dict)
    _last: int = 0
    _counts: dict[str, TubeStats] = field(default_factory=dict)
    _running: Counter[str] = field(default_factory=Counter)
    _types: set[str] = field(default_factory=set)
    _write_at: float = 0.0

    def walk(self) -> None:
        """Look at every open job once; raises when the store or the queue is away."""
        # The counts come before the records: what is claimed in between makes a tube look fuller, never emptier.
        self._types.update(self.manager.registry.names)
        self._counts = {name: self.manager.queue_stats(name) for name in self._types}
        self._running = Counter()
        due: dict[str, list[tuple[int, Put]]] = {}
        numbers = sorted(self._open)
        for start in range(0, len(numbers), _SEGMENT):
            self._look(numbers[start : start + _SEGMENT], due)
        for segment in self._new_segments():
            self._look(segment, due)
        self._put_missing(due)

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

    def _new_segments(self) -> Iterator[list[int]]:
        """Yield what the log has got since the last walk, a segment at a time."""
        now = self.manager.clock.monotonic()
        while entries := self.manager.store.read("jobs", after=self._last, limit=_SEGMENT):
            for entry in entries:
                self._open[entry.number] = _Open(codec.loads(entry.body)["uuid"], now)
            self._last = entries[-1].number
            yield [entry.number for entry in entries]

    def _look(self, numbers: list[int], due: dict[str, list[tuple[int, Put]]]) -> None:
        """Look at a segment: forget what has ended, take over what has lapsed, collect what is due."""
        held = self.manager.read_many([self._open[number].uuid for number in numbers])
        now = self.manager.clock.now()
        self._judge(held.values())
        for number in numbers:
            one = self._open[number]
            found = held.get(one.uuid)
            if self._over(number, one, found):
                del self._open[number]
            elif found is not None and _missed(found.record, now):
                due.setdefault(found.record.job_type, []).append((one.due, self.manager.put_of(found.record)))
                one.due = (one.due + 1) % _PATIENCE
            else:
                one.due = 0
                if found is not None and found.record.state is State.RUNNING:
                    self._running[found.record.job_type] += 1

    def _over(self, number: int, one: _Open, found: Held | None) -> bool:
        """Return whether an entry needs no further look."""
        if found is None:
            return self.manager.clock.monotonic() - one.since > _ORPHAN
        return found.record.terminal or (found.cas != 0 and found.record.number != number)

    def _judge(self, held: Iterable[Held]) -> None:
        self.watch.heard()
        for one in held:
            if self.watch.lapsed(one.record) or self.manager.lost(one.record):
                self._lose(one)

    def _lose(self, held: Held) -> None:
        try:
            after = self.manager.lose(held)
        except Conflict:
            return  # its agent lives, or another sweeper was first
        self.watch.forget(held.record.uuid)
        logger.warning(
            "lost job=%s attempt=%d agent=%s state=%s",
            held.record.uuid, held.record.attempt, held.record.agent, after.record.state,
        )  # fmt: skip
        if after.record.state is State.QUEUED:
            self.manager.enqueue([after.record])

    def _put_missing(self, due: dict[str, list[tuple[int, Put]]]) -> None:
        """Put as many due jobs of each type as its tube lacks entries, those first that have waited for most walks.

        Which entries are missing cannot be known, and putting all of them would double a healthy backlog.  A job that
        was due in ten walks is put again whatever the counts say, unless its tube has plenty of entries already.
        """
        for job_type, found in due.items():
            if job_type not in self._types:
                self._types.add(job_type)  # its tube is counted from the next walk on
                continue
            counts = self._counts[job_type]
            # What is reserved and does not run yet, or any more, is on its way, not missing.
            there = counts.ready + max(0, counts.reserved - self._running[job_type])
            found.sort(key=lambda one: -one[0])
            missing = max(0, len(found) - there)
            if counts.ready < 2 * len(found) + _OVERDUE:
                overdue = sum(walks == _PATIENCE - 1 for walks, _ in found)
                missing = max(missing, min(overdue, _OVERDUE))
            if missing:
                logger.info("swept type=%s due=%d there=%d: putting %d", job_type, len(found), there, missing)
                self.manager.put_all([put for _, put in found[:missing]])


def _missed(record: JobRecord, now: float) -> bool:
    moment = max(record.updated_at, record.not_before or 0.0)
    return record.due(now) and now - moment >= _GRACE


class Chores(threading.Thread):
    """The housekeeping thread of a server or an agent: the sweep, the look at leases, the probe of the queue.

    ``sweep`` is the seconds between walks.  ``also`` are further chores, called about once a second; ``first`` those
    that come before the first walk.
    """

    def __init__(
        self,
        manager: Manager,
        sweep: float,
        also: Iterable[Callable[[], None]] = (),
        clock_step: float = 0.25,
        first: Iterable[Callable[[], None]] = (),
    ) -> None:
        super().__init__(name="chores", daemon=True)
        self._manager = manager
        self._sweep = Sweep(manager, LeaseWatch(manager.clock, manager.lease))
        self._every = sweep
        self._first, self._also = tuple(first), tuple(also)
        self._step = min(clock_step, manager.lease / 8)
        self._end = threading.Event()
        self._said: dict[str, str] = {}

    def stop(self) -> None:
        """End the thread soon; may be called twice, and before it was started."""
        self._end.set()

    def run(self) -> None:
        """Do the chores until ``stop``."""
        tasks = [
            *(_Task(chore.__name__, 1.0, chore) for chore in self._first),
            _Task("sweep", self._every, self._walk),
            _Task("leases", self._manager.lease / 6, self._sweep.look),
            _Task("queue", 1.0, self._probe),
            *(_Task(chore.__name__, 1.0, chore) for chore in self._also),
        ]
        while True:
            for task in tasks:
                if self._end.is_set():
                    self._manager.close_queue()
                    return
                self._do(task)
            self._end.wait(self._step)

    def _walk(self) -> None:
        self._sweep.walk()

    def _probe(self) -> None:
        if self._manager.queue_away and self._manager.probe_queue():
            self._sweep.walk()

    def _do(self, task: _Task) -> None:
        now = self._manager.clock.monotonic()
        if now < task.next:
            return
        try:
            task.call()
            if self._said.pop(task.name, None):
                logger.info("%s works again", task.name)
            task.next = self._manager.clock.monotonic() + task.every
        except ZerogError as error:
            if isinstance(error, StoreUnavailable):
                self._sweep.watch.silence()
            self._say(task, error)
            task.next = self._manager.clock.monotonic() + min(1.0, task.every)
        except Exception:
            # A defect in one chore must not end the others; it is said with its traceback, every time.
            logger.exception("chore %s failed", task.name)
            task.next = self._manager.clock.monotonic() + max(1.0, task.every)

    def _say(self, task: _Task, error: ZerogError) -> None:
        kind = type(error).__name__
        if self._said.get(task.name) != kind:
            self._said[task.name] = kind
            what = "store" if isinstance(error, DatastoreError) else "queue" if isinstance(error, QueueError) else "?"
            logger.warning("%s waits: %s away: %s", task.name, what, error)


@dataclass(slots=True)
class _Task:
    name: str
    every: float
    call: Callable[[], None]
    next: float = 0.0
