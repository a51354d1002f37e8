"""Usage: what an agent and its children take of the machine, and how the machine is.

``ram`` in bytes, ``cpu`` in cores since the last look, ``io`` in bytes since their start, of the agent and all that
descends from it; ``load`` and ``disk`` of the host.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import psutil

from zerog.agent.family import family_of
from zerog.clock import Clock

#: Seconds over which the load of the processors is measured at least.
_AT_LEAST = 0.5


class Usage:
    """Measures this process and its family.  ``folder`` is on the disk that is looked at."""

    def __init__(self, clock: Clock, folder: str) -> None:
        self._clock = clock
        self._folder = folder
        self._at = clock.monotonic()
        self._seconds = _seconds(_family())
        self._cpu = 0.0

    def measure(self) -> dict[str, Any]:
        """Return what is used now."""
        family = _family()
        now = self._clock.monotonic()
        if now - self._at >= _AT_LEAST:
            seconds = _seconds(family)
            # What a process had used goes to whoever reaps it, so the sum only grows; a moment lies between the two.
            self._cpu = max(0.0, (seconds - self._seconds) / (now - self._at))
            self._at, self._seconds = now, seconds
        read, written = _io(family)
        disk = psutil.disk_usage(self._folder)
        return {
            "ram": sum(_ram(one) for one in family),
            "cpu": round(self._cpu, 3),
            "load": [round(one, 2) for one in os.getloadavg()],
            "disk": {"total": disk.total, "free": disk.free},
            "io": {"readBytes": read, "writeBytes": written},
        }


def machine() -> tuple[int, float]:
    """Return the memory of this machine in bytes, and the cores that this process may use."""
    return psutil.virtual_memory().total, float(len(os.sched_getaffinity(0)))


def _family() -> list[psutil.Process]:
    found = []
    for pid in family_of(os.getpid()):
        with suppress(psutil.Error):
            found.append(psutil.Process(pid))
    return found


def _seconds(family: list[psutil.Process]) -> float:
    total = 0.0
    for one in family:
        with suppress(psutil.Error):
            total += sum(one.cpu_times()[:4])  # its own, and those of the children that it has reaped
    return total


def _ram(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _io(family: list[psutil.Process]) -> tuple[int, int]:
    read = written = 0
    for one in family:
        with suppress(psutil.Error, OSError):
            counters = one.io_counters()
            read, written = read + counters.read_bytes, written + counters.write_bytes
    return read, written
