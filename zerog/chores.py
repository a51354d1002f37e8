"""Chores: the housekeeping thread of a server or an agent."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from zerog.exceptions import DatastoreError, QueueError, StoreUnavailable, ZerogError
from zerog.leases import LeaseWatch
from zerog.manager import Manager
from zerog.statistics import Statistics
from zerog.sweep import Sweep
from zerog.sweeper import Candidate, SweeperLease, someone

logger = logging.getLogger(__name__)


#: Seconds between two prunes at most.
_PRUNE_EVERY = 3600.0


class Chores(threading.Thread):
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
        super().__init__(name="chores", daemon=True)
        self._manager = manager
        self._sweep = Sweep(manager, LeaseWatch(manager.clock, manager.lease))
        self._lease = SweeperLease(manager.store, manager.clock, candidate or someone(), manager.lease)
        self._every = sweep
        self._walk_at = 0.0
        self._prune_at = 0.0
        self._pruned_to = self._pruned = 0
        self._tidied_to: int | None = None  # where in the dead letters, once all that is old has gone
        self._renewed = 0.0
        self._statistics = statistics
        self._first, self._also = tuple(first), tuple(also)
        self._step = min(0.25, manager.lease / 8)
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
        tasks = [
            *(_Task(chore.__name__, 1.0, chore) for chore in self._first),
            _Task("pauses", 1.0, self._manager.look_at_pauses),
            _Task("needs", 1.0, self._manager.look_at_needs),
            _Task("release", 0.0, self._manager.release_pending),
            _Task("doubts", 1.0, self._manager.say_doubtful),
            _Task("sweeper", min(1.0, self._every), self._keep_lease),
            _Task("sweep", 0.0, self._walk),
            _Task("prune", 0.0, self._prune),
            _Task("leases", self._manager.lease / 6, self._look),
            _Task("queue", 1.0, self._probe),
            *(_Task(chore.__name__, 1.0, chore) for chore in self._also),
        ]
        while True:
            for task in tasks:
                if self._end.is_set():
                    self._finish()
                    return
                self._do(task)
            self._wake.wait(self._step)
            self._wake.clear()

    def _finish(self) -> None:
        try:
            self._lease.give_up()
        except DatastoreError as error:
            logger.info("the sweeper's lease is left to lapse: %s", error)
        self._manager.close_queue()

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
        if self._tidied_to is None:
            done = self._manager.prune(self._pruned_to)
            self._pruned += done.jobs
            if done.position is not None:
                self._pruned_to = done.position
                return
            self._tidied_to = 0
        self._tidied_to = self._manager.tidy(self._tidied_to)
        if self._tidied_to is not None:
            return
        self._manager.trim()
        if self._pruned:
            logger.info("pruned %d jobs", self._pruned)
        self._pruned_to = self._pruned = 0
        self._prune_at = now + max(self._every, min(_PRUNE_EVERY, self._manager.shortest_retention() / 10))

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

    # Doing them

    def _do(self, task: _Task) -> None:
        now = self._manager.clock.monotonic()
        if task.name in self._hurried:
            self._hurried.discard(task.name)
        elif now < task.next:
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
            task.next = self._manager.clock.monotonic() + min(1.0, task.every or 1.0)
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
