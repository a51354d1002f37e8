"""Supervisor: the parent of a server's processes.

It holds the listening sockets, which its children inherit, and nothing else: no connection to store or queue exists
before a child starts, or ever in the parent.  A child that dies is replaced; connections that nobody has accepted yet
wait in the socket for the others.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

logger = logging.getLogger(__name__)

#: Seconds between two looks at the children.
_LOOK = 0.05
#: A child that ended sooner than this is replaced only after that long, so that one that cannot live does not take a
#: whole CPU; both in seconds.
_SOON, _REST = 2.0, 0.5
#: Seconds after the first signal until children that are still there are killed.
_PATIENCE = 15.0
#: The status of a process whose settings are wrong: its successor would end in the same way.
_BAD_SETTINGS = 1


@dataclass(slots=True)
class _Child:
    """The process in one place, and when it started; None while the place rests."""

    number: int
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    start_at: float = 0.0
    served: bool = False


class Supervisor:
    """Keeps ``count`` children alive until SIGTERM or SIGINT, which it passes on; ``start`` starts one."""

    def __init__(self, count: int, start: Callable[[], subprocess.Popen[bytes]]) -> None:
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
                child.process, child.started = self._start(), now
            return 0
        ended = child.process.poll()
        if ended is None:
            child.served = child.served or now - child.started > _SOON
            return 0
        if not child.served and ended == _BAD_SETTINGS:
            return ended
        logger.warning("server process %d (pid %d) ended with status %d", child.number, child.process.pid, ended)
        child.start_at = now + (_REST if now - child.started < _SOON else 0.0)
        child.process = None
        return 0

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
