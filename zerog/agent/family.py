"""Processes that descend from others, as the kernel tells: what a job has started, in whatever group or session."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Collection, Iterator
from contextlib import suppress

_PR_SET_CHILD_SUBREAPER = 36

#: Looks for orphans in a row, and seconds between them: what is killed is gone a moment later.
_LOOKS, _PAUSE = 10, 0.002


def adopt_orphans(adopt: bool = True) -> None:
    """Let processes whose parents have ended become children of this one, so that it knows of them; or no longer."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def children_of(pid: int) -> list[int]:
    """Return the children of a process; none if it is gone."""
    found: list[int] = []
    with suppress(OSError, ValueError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += [int(child) for child in file.read().split()]
    return found


def family_of(pid: int) -> Iterator[int]:
    """Yield a process and all that descend from it."""
    found = [pid]
    while found:
        one = found.pop()
        found += children_of(one)
        yield one


def end_orphans(known: Collection[int]) -> None:
    """Kill the children of this process that it has not started itself, with all that descend from them."""
    for look in range(_LOOKS):
        orphans = [pid for pid in children_of(os.getpid()) if pid not in known]
        if not orphans:
            return
        if look:
            time.sleep(_PAUSE)
        for orphan in orphans:
            for pid in list(family_of(orphan)):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(orphan, os.WNOHANG)
