"""The sweep (R8): whatever the queue forgot is put again, whatever stands still is taken over.

Here it is the plain walk: the whole ``jobs`` log at the start, then only what was open at the last walk and what came
since.  Every server and every agent does it; nothing breaks when several do it at once (R3, R4).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from zerog import codec
from zerog.exceptions import Conflict, DatastoreError, QueueError, StoreUnavailable, ZerogError
from zerog.leases import LeaseWatch
from zerog.manager import Held, Manager
from zerog.record import JobRecord, State

logger = logging.getLogger(__name__)

_SEGMENT = 500

#: Seconds for which a record must have been due before it is missed in the queue: its submit may be under way.
_GRACE = 1.0


@dataclass(slots=True)
class Sweep:
    """One process's walk over the open jobs.  Belongs to one thread, whose queue connection it uses."""

    manager: Manager
    watch: LeaseWatch
    _open: dict[int, str] = field(default_factory=dict)
    _last: int = 0
    _identity: str | None = None

    def walk(self) -> None:
        """Look at every open job once; raises when the store or the queue is away."""
        self._read_log()
        due: dict[str, list[JobRecord]] = {}
        numbers = sorted(self._open)
        for start in range(0, len(numbers), _SEGMENT):
            for record in self._look(numbers[start : start + _SEGMENT]):
                due.setdefault(record.job_type, []).append(record)
        self._put_missing(due)

    def look(self) -> None:
        """Look only at the running jobs whose leases are being watched."""
        watched = self.watch.watched
        if watched:
            self._judge(self.manager.read_many(watched).values())

    def _read_log(self) -> None:
        while True:
            entries = self.manager.store.read("jobs", after=self._last, limit=_SEGMENT)
            for entry in entries:
                self._open[entry.number] = codec.loads(entry.body)["uuid"]
                self._last = entry.number
            if len(entries) < _SEGMENT:
                return

    def _look(self, numbers: list[int]) -> list[JobRecord]:
        """Look at a segment: forget what has ended, take over what has lapsed, return what is due."""
        held = self.manager.read_many([self._open[number] for number in numbers])
        now = self.manager.clock.now()
        for number in numbers:
            found = held.get(self._open[number])
            # An entry without its record may be of a submit that is under way: it stays for now.
            if found is not None and (found.record.terminal or (found.cas and found.record.number != number)):
                del self._open[number]
        self._judge(held.values())
        return [one.record for one in held.values() if _missed(one.record, now)]

    def _judge(self, held: Iterable[Held]) -> None:
        self.watch.heard()
        for one in held:
            if self.watch.lapsed(one.record):
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

    def _put_missing(self, due: dict[str, list[JobRecord]]) -> None:
        """Put the due records of each type whose tube holds fewer ready entries than that."""
        for job_type, records in due.items():
            stats = self.manager.queue_stats(job_type)
            if stats.ready < len(records):
                logger.info("swept type=%s due=%d ready=%d: putting again", job_type, len(records), stats.ready)
                self.manager.enqueue(records)


def _missed(record: JobRecord, now: float) -> bool:
    moment = max(record.updated_at, record.not_before or 0.0)
    return record.due(now) and now - moment >= _GRACE


class Chores(threading.Thread):
    """The housekeeping thread of a server or an agent: the sweep, the look at leases, the probe of the queue.

    ``sweep`` is the seconds between walks.  ``also`` are further chores, called about once a second.
    """

    def __init__(
        self, manager: Manager, sweep: float, also: Iterable[Callable[[], None]] = (), clock_step: float = 0.25
    ) -> None:
        super().__init__(name="chores", daemon=True)
        self._manager = manager
        self._sweep = Sweep(manager, LeaseWatch(manager.clock, manager.lease))
        self._every = sweep
        self._also = tuple(also)
        self._step = min(clock_step, manager.lease / 8)
        self._end = threading.Event()
        self._said: dict[str, str] = {}

    def stop(self) -> None:
        """End the thread soon; may be called twice, and before it was started."""
        self._end.set()

    def run(self) -> None:
        """Do the chores until ``stop``."""
        tasks = [
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
