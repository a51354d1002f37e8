"""Supervisor: the parent of a server's processes.

It holds the listening sockets, which its children inherit, and nothing else: no connection to store or queue exists
before a child starts, or ever in the parent.  A child that dies is replaced; connections that nobody has accepted yet
wait in the socket for the others.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

logger = logging.getLogger(__name__)

#: Seconds between two looks at the children.
_LOOK = 0.05
#: A child that ended sooner than this is replaced only after that long, so that one that cannot live does not take a
#: whole CPU; both in seconds.
_SOON, _REST = 2.0, 0.5
#: Seconds after the first signal until children that are still there are killed.
_PATIENCE = 25.0
#: The status of a process whose settings are wrong: its successor would end in the same way.
_BAD_SETTINGS = 1


@dataclass(slots=True)
class _Child:
    """The process in one place, and when it started; None while the place rests."""

    number: int
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    start_at: float = 0.0
    #: Whether any process in this place has ever served, and where this one says so.
    served: bool = False
    says: int | None = None

    def forget(self) -> None:
        """Let go of a process that has ended."""
        if self.says is not None:
            os.close(self.says)
        self.process = self.says = None


class Supervisor:
    """Keeps ``count`` children alive until SIGTERM or SIGINT, which it passes on.

    ``start`` starts one: by its number, from 1, and with a descriptor into which it writes when it serves.
    """

    def __init__(self, count: int, start: Callable[[int, int], subprocess.Popen[bytes]]) -> None:
        self._start = start
        self._children = [_Child(number) for number in range(1, count + 1)]
        self._signals = 0

    def run(self) -> int:
        """Supervise to the end; return 0, or the status of a first child that could not begin."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)
        status = 0
        while not self._signals and not status:
            for child in self._children:
                status = status or self._attend(child)
            time.sleep(_LOOK)
        self._end()
        return status

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def _attend(self, child: _Child) -> int:
        """Start or replace a child; the status other than 0 of one that has never served anything."""
        now = time.monotonic()
        if child.process is None:
            if now >= child.start_at:
                try:
                    self._begin(child, now)
                except OSError as error:  # too little memory, too many processes: the others serve on
                    logger.error("server process %d cannot be started: %s", child.number, error)
                    child.start_at = now + _REST
            return 0
        ended = child.process.poll()
        if not child.served and child.says is not None:
            with suppress(BlockingIOError):
                child.served = os.read(child.says, 1) != b""
        if ended is None:
            return 0
        if not child.served and ended == _BAD_SETTINGS:
            return ended
        logger.warning("server process %d (pid %d) ended with status %d", child.number, child.process.pid, ended)
        child.start_at = now + (_REST if now - child.started < _SOON else 0.0)
        child.forget()
        return 0

    def _begin(self, child: _Child, now: float) -> None:
        says, tells = os.pipe()
        try:
            os.set_blocking(says, False)
            child.process, child.started, child.says = self._start(child.number, tells), now, says
        except BaseException:
            os.close(says)
            raise
        finally:
            os.close(tells)

    def _end(self) -> None:
        """Pass every signal on and wait until all children are gone."""
        passed = 0
        kill_at = time.monotonic() + _PATIENCE
        while living := [one.process for one in self._children if one.process and one.process.poll() is None]:
            if passed < max(1, self._signals):
                passed += 1
                for process in living:
                    process.terminate()
            if time.monotonic() > kill_at:
                for process in living:
                    process.kill()
            time.sleep(_LOOK)
