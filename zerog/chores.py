"""Chores: the housekeeping thread of a server or an agent."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from zerog.clock import Clock
from zerog.exceptions import DatastoreError, QueueError, StoreUnavailable, ZerogError
from zerog.leases import LeaseWatch
from zerog.manager import Manager
from zerog.statistics import Statistics
from zerog.sweep import Sweep
from zerog.sweeper import Candidate, SweeperLease, someone

logger = logging.getLogger(__name__)


#: Seconds between two prunes at most.
_PRUNE_EVERY = 3600.0


@dataclass(slots=True)
class Task:
    """One chore: how often it is called, in seconds, and when it is the next time, on the monotonic clock."""

    name: str
    every: float
    call: Callable[[], None]
    next: float = 0.0


class Rounds(threading.Thread):
    """Calls chores again and again, in a thread of its own; what goes wrong with one does not end the others.

    ``step`` is the seconds between two rounds.
    """

    def __init__(self, clock: Clock, tasks: Sequence[Task], step: float) -> None:
        super().__init__(name="chores", daemon=True)
        self._clock = clock
        self._tasks = list(tasks)
        self._step = step
        self._end = threading.Event()
        self._wake = threading.Event()
        self._hurried: set[str] = set()
        self._said: dict[str, str] = {}

    def stop(self) -> None:
        """End the thread soon; may be called twice, and before it was started."""
        self._end.set()
        self._wake.set()

    def hurry(self, *names: str) -> None:
        """Do some of the chores now, in the thread of the chores."""
        self._hurried.update(names)
        self._wake.set()

    def run(self) -> None:
        """Do the chores until ``stop``."""
        while True:
            for task in self._tasks:
                if self._end.is_set():
                    self._finish()
                    return
                self._do(task)
            self._wake.wait(self._step)
            self._wake.clear()

    def _finish(self) -> None:
        """Give back what the thread has."""

    def _store_silent(self) -> None:
        """Note that the store did not answer."""

    def _do(self, task: Task) -> None:
        now = self._clock.monotonic()
        if task.name in self._hurried:
            self._hurried.discard(task.name)
        elif now < task.next:
            return
        try:
            task.call()
            if self._said.pop(task.name, None):
                logger.info("%s works again", task.name)
            task.next = self._clock.monotonic() + task.every
        except ZerogError as error:
            if isinstance(error, StoreUnavailable):
                self._store_silent()
            self._say(task, error)
            task.next = self._clock.monotonic() + min(1.0, task.every or 1.0)
        except Exception:
            # A defect in one chore must not end the others; it is said with its traceback, every time.
            logger.exception("chore %s failed", task.name)
            task.next = self._clock.monotonic() + max(1.0, task.every)

    def _say(self, task: Task, error: ZerogError) -> None:
        kind = type(error).__name__
        if self._said.get(task.name) != kind:
            self._said[task.name] = kind
            away = isinstance(error, DatastoreError) and "store away: "
            away = away or (isinstance(error, QueueError) and "queue away: ")
            logger.warning("%s waits: %s%s", task.name, away or "", error)


class Chores(Rounds):
    """The sweep where this process is the sweeper, the look at leases, the probe of the queue, and what else comes up.

    ``sweep`` is the seconds between walks; ``candidate`` stands for the sweeper's lease.  ``also`` are further chores,
    called about once a second; ``first`` those that come before all others.  ``statistics`` counts the walks.
    """

    def __init__(
        self,
        manager: Manager,
        sweep: float,
        candidate: Candidate | None = None,
        also: Iterable[Callable[[], None]] = (),
        first: Iterable[Callable[[], None]] = (),
        statistics: Statistics | None = None,
    ) -> None:
        self._manager = manager
        self._sweep = Sweep(manager, LeaseWatch(manager.clock, manager.lease))
        self._lease = SweeperLease(manager.store, manager.clock, candidate or someone(), manager.lease)
        self._every = sweep
        self._walk_at = 0.0
        self._prune_at = 0.0
        self._pages: Iterator[None] | None = None  # of a prune that is under way
        self._renewed = 0.0
        self._statistics = statistics
        tasks = [
            *once_a_second(first),
            Task("pauses", 1.0, manager.look_at_pauses),
            Task("needs", 0.5, manager.look_at_needs),
            Task("release", 0.0, manager.release_pending),
            Task("ends", 0.0, manager.tell_of_ends),
            Task("doubts", 1.0, manager.say_doubtful),
            Task("sweeper", min(1.0, sweep), self._keep_lease),
            Task("sweep", 0.0, self._walk),
            Task("prune", 0.0, self._prune),
            Task("leases", manager.lease / 6, self._look),
            Task("queue", 1.0, self._probe),
            *once_a_second(also),
        ]
        super().__init__(manager.clock, tasks, min(0.25, manager.lease / 8))

    def _finish(self) -> None:
        try:
            self._lease.give_up()
        except DatastoreError as error:
            logger.info("the sweeper's lease is left to lapse: %s", error)
        self._manager.close_queue()

    def _store_silent(self) -> None:
        self._sweep.watch.silence()

    # The sweep

    def _keep_lease(self) -> None:
        """Stand for the sweeper's lease, and renew it a few times while it lasts; who takes it walks at once."""
        now = self._manager.clock.monotonic()
        if self._lease.held and now < self._renewed + min(self._every, self._manager.lease / 3):
            if not self._manager.queue_away and not self._sweep.same_queue():
                logger.info("the queue is another one, or begins anew: all open jobs are looked at")
                self._walk_at = 0.0
            return
        held = self._lease.held
        if self._lease.hold():
            self._renewed = now
            if not held:
                logger.info("sweeps from now on")
                self._sweep.forget()
                self._walk_at = 0.0

    def _walk(self) -> None:
        if self._lease.held and self._manager.clock.monotonic() >= self._walk_at:
            self._sweep.walk(self._go_on)
            if self._statistics is not None:
                self._statistics.add("sweeps")
            self._walk_at = self._manager.clock.monotonic() + self._every

    def _prune(self) -> None:
        """Remove what is old, a page at a time, so that the other chores have their turn."""
        now = self._manager.clock.monotonic()
        if not self._lease.held or now < self._prune_at:
            return
        pages, self._pages = self._pages or self._prune_all(), None
        for _ in pages:
            self._pages = pages
            return
        self._prune_at = now + max(self._every, min(_PRUNE_EVERY, self._manager.shortest_retention() / 10))

    def _prune_all(self) -> Iterator[None]:
        """Remove all that is old; yields after each page.  Begun anew, it goes past what is gone already."""
        jobs, position = 0, 0
        while True:
            done = self._manager.prune(position)
            jobs += done.jobs
            if done.position is None:
                break
            position = done.position
            yield
        walks: list[Callable[[int], int | None]] = [self._manager.tidy, self._manager.forget_agents]
        walks += [partial(self._manager.prune_topic, topic) for topic in self._manager.registry.topics]
        for walk in walks:
            upto = walk(0)
            while upto is not None:
                yield
                upto = walk(upto)
        self._manager.trim()
        if jobs:
            logger.info("pruned %d jobs", jobs)

    def _go_on(self) -> bool:
        """Return whether a walk goes on; a long one renews the lease on the way and looks at running jobs."""
        now = self._manager.clock.monotonic()
        if now >= self._renewed + self._manager.lease / 3:
            if not self._lease.hold():
                return False
            self._renewed = now
        return not self._end.is_set()

    def _look(self) -> None:
        if self._lease.held:
            self._sweep.look()

    def _probe(self) -> None:
        if self._manager.queue_away and self._manager.probe_queue():
            self._walk_at = 0.0


def once_a_second(chores: Iterable[Callable[[], None]]) -> list[Task]:
    """Return chores that are called about once a second, by their own names."""
    return [Task(chore.__name__, 1.0, chore) for chore in chores]
