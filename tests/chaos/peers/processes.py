"""Trees of processes: a process and all that descend from it, killed at once."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import psutil

from tests.services import Process
from zerog.chaos.site import until


def kill_trees(roots: Iterable[Process]) -> None:
    """Kill processes with all their descendants, and wait until none of them runs."""
    roots = list(roots)
    found = _stopped([psutil.Process(root.pid) for root in roots if root.popen.poll() is None])
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for root in roots:
        root.popen.wait(10)
    until(lambda: not any(map(_runs, found)), 10, "the end of what was killed")


def _stopped(roots: list[psutil.Process]) -> set[psutil.Process]:
    """Stop whole trees, so that nothing is started while they are killed; each pass goes one generation deeper."""
    found: set[psutil.Process] = set()
    new = set(roots)
    while new:
        for process in new:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        found |= new
        new = {child for process in found for child in _children(process)} - found
    return found


def _children(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return process.children()
    return []


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
