"""Hosts of consumers: each holds the lease of one, and has its child run it.

The host holds the promise, the child handles the messages: code that holds the interpreter for an hour cannot lose its
lease, and what it dies over is counted.  Both share a page of memory in which the child says what it handles.

::

    idle ── lease taken ──► held ── child started ──► running ── child gone ──► held (after a pause that grows)
      ▲                      │                           │
      └── lost, given up ────┴───────────────────────────┘  (the child is ended)
"""

from __future__ import annotations

import logging
import mmap
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from zerog.agent.family import family_of
from zerog.chores import Rounds, Task
from zerog.clock import Clock
from zerog.consumer import Consumer
from zerog.consumers import ConsumerLease
from zerog.exceptions import ZerogError

logger = logging.getLogger(__name__)

#: Bytes of the page in which a child says what it handles.
PAGE = 512

#: Seconds between two looks, and between two tries to get a lease.
_STEP, _TRY = 0.1, 1.0
#: Seconds until a child is started again that ended by itself: at first and at most; and how long one must live so that
#: the pause begins anew.
_PAUSE, _PAUSE_MAX, _LONG = 0.2, 30.0, 10.0

#: Starts the child of a consumer: its name, the token of its lease, the descriptor of the page, more environment.
Start = Callable[[str, str, int, Mapping[str, str]], subprocess.Popen[bytes]]


class Child:
    """The process that handles the messages of one consumer."""

    def __init__(self, name: str, token: str, start: Start, environment: Mapping[str, str]) -> None:
        self._descriptor = os.memfd_create("zerog-consumer", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, PAGE)
        self._page = mmap.mmap(self._descriptor, PAGE)
        try:
            self.process = start(name, token, self._descriptor, environment)
        except BaseException:
            self._let_go()
            raise
        self.pid = self.process.pid

    def handling(self) -> tuple[str, int, float] | None:
        """Return what it handles: topic, number, and since when on the monotonic clock."""
        text = self._page[:].rstrip(b"\0")
        try:
            topic, number, since = text.decode().split()
            return topic, int(number), float(since)
        except ValueError:
            return None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and to all that it has started."""
        family = list(family_of(self.pid)) if self.process.poll() is None else []
        for pid in family:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)

    def close(self) -> None:
        """End it now, and what it has started."""
        self.signal(signal.SIGKILL)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        self._let_go()

    def _let_go(self) -> None:
        self._page.close()
        os.close(self._descriptor)


class Host:
    """Holds the lease of one consumer where nobody else has it, and keeps a child running under it.

    ``lease`` is in seconds, ``grace`` the seconds that a child gets for its end.  All methods are called in one thread,
    ``look`` again and again.
    """

    def __init__(
        self, consumer: type[Consumer], held: ConsumerLease, start: Start, clock: Clock, lease: float, grace: float
    ) -> None:
        self.consumer = consumer
        self.child: Child | None = None
        self.environment: Mapping[str, str] = {}
        self.starting = threading.Lock()
        self._held = held
        self._start = start
        self._clock = clock
        self._lease = lease
        self._grace = grace
        self._look_at = 0.0
        self._start_at = 0.0
        self._started_at = 0.0
        self._pause = _PAUSE
        self._kill_at: float | None = None
        #: What the last child died over, until that is written.
        self._crash: tuple[str, int, str] | None = None

    @property
    def busy(self) -> bool:
        """Whether it has the lease, or a child."""
        return self.child is not None or self._held.token is not None

    def look(self, wanted: bool) -> None:
        """Do what is due; ``wanted`` says whether it is to have the consumer.  Raises what an outage of the store
        raises."""
        now = self._clock.monotonic()
        if self._crash is not None:
            self._held.note_crash(*self._crash)
            self._crash = None
        if self.child is not None:
            self._attend(self.child, now)
        if not wanted:
            self._leave(now)
            return
        if now >= self._look_at:
            had = self._held.token
            self._look_at = now + min(_TRY, self._lease / 6)
            if self._held.hold():
                self._look_at = now + self._lease / 3
            if self._held.token != had:
                self._changed(now)
        if self._held.token is not None and self.child is None and self._crash is None and now >= self._start_at:
            self._begin(self._held.token, now)

    def _changed(self, now: float) -> None:
        """Take note that the lease came, or went."""
        if self._held.token is None:
            logger.warning("consumer %s is somebody else's now", self.consumer.name)
            if self.child is not None:
                self._end()
        else:
            logger.info("runs the consumer %s", self.consumer.name)
            self._start_at, self._pause = now, _PAUSE

    def _begin(self, token: str, now: float) -> None:
        try:
            with self.starting:
                self.child = Child(self.consumer.name, token, self._start, self.environment)
        except OSError as error:
            logger.error("the consumer %s cannot be started: %s", self.consumer.name, error)
            self._wait(now)
            return
        self._started_at, self._kill_at = now, None

    def _attend(self, child: Child, now: float) -> None:
        """See whether the child lives, and does not take too long."""
        handling = child.handling()
        if child.process.poll() is None:
            if self._kill_at is not None and now >= self._kill_at:
                child.signal(signal.SIGKILL)
            if handling is None or now - handling[2] <= self.consumer.time_limit:
                return
            why = f"handling it took longer than {self.consumer.time_limit:g} s"
        else:
            why = f"its process ended with status {child.process.returncode}"
        stopping = self._kill_at is not None
        self._end()
        if now - self._started_at >= _LONG:
            self._pause = _PAUSE
        self._wait(now)
        if stopping:
            return
        logger.error("consumer %s: %s", self.consumer.name, why)
        if handling is not None:
            self._crash = (handling[0], handling[1], why)  # counted before the next one begins, also after an outage

    def _wait(self, now: float) -> None:
        self._start_at = now + self._pause
        self._pause = min(_PAUSE_MAX, self._pause * 2)

    def _leave(self, now: float) -> None:
        """End the child in order, then give up the lease."""
        if self.child is not None:
            if self._kill_at is None:
                self.child.signal(signal.SIGTERM)
                self._kill_at = now + self._grace
            return
        self._look_at = 0.0
        self._held.give_up()

    def _end(self) -> None:
        child, self.child = self.child, None
        self._kill_at = None
        if child is not None:
            child.close()

    def close(self) -> None:
        """End the child now and give up the lease if that is possible."""
        self._end()
        with suppress(ZerogError):
            self._held.give_up()


class Hosts(Rounds):
    """The hosts of some consumers, in a thread of their own, or in ``serve``.

    ``wanted`` says whether this process is to have them.
    """

    def __init__(self, hosts: Sequence[Host], clock: Clock, grace: float) -> None:
        self._hosts = list(hosts)
        self._grace = grace
        self.wanted: Callable[[], bool] = lambda: True
        #: Held while a child is started: until it is known it looks like an orphan.
        self.starting = threading.Lock()
        for host in hosts:
            host.starting = self.starting
        tasks = [Task(f"consumer {one.consumer.name}", 0.0, partial(self._look, one)) for one in hosts]
        super().__init__(clock, tasks, _STEP)
        self.name = "consumers"

    def use(self, environment: Mapping[str, str]) -> None:
        """Give the children some more environment; called before the start."""
        for host in self._hosts:
            host.environment = environment

    @property
    def pids(self) -> set[int]:
        """The processes that handle messages now."""
        return {child.pid for host in self._hosts if (child := host.child) is not None}

    def _look(self, host: Host) -> None:
        host.look(not self._end.is_set() and self.wanted())

    def _finish(self) -> None:
        """Let the children end in order."""
        until = self._clock.monotonic() + self._grace + 1.0
        while self._clock.monotonic() < until:
            for host in self._hosts:
                with suppress(ZerogError):  # what is not given up lapses
                    host.look(False)
            if all(host.child is None for host in self._hosts):
                break
            time.sleep(_STEP / 2)
        for host in self._hosts:
            host.close()
