"""The ledger read back: which executions there were, which overlapped, and how long a job waited after an injury."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True)
class Execution:
    """One run of a job's code; ``ended`` is None if it never came to its end, and ``way`` is how it came there: by
    ``end``, ``raise`` or ``requeue``.  Times are those of the monotonic clock of the machine, in seconds, which no
    setting of the clock moves."""

    uuid: str
    attempt: int
    started: float
    pid: int
    agent: int
    ended: float | None = None
    way: str = ""


def read(path: Path) -> list[Execution]:
    """Return the executions that a ledger tells of, in the order of their starts."""
    found: dict[tuple[str, int, int], Execution] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        what, uuid, attempt, moment, pid, agent = line.split()
        name = (uuid, int(attempt), int(pid))
        if what == "start":
            found[name] = Execution(uuid, int(attempt), float(moment), int(pid), int(agent))
        elif name in found:
            found[name].ended, found[name].way = float(moment), what
    return sorted(found.values(), key=lambda one: one.started)


def by_job(executions: Iterable[Execution]) -> dict[str, list[Execution]]:
    """Return the executions of each job."""
    jobs: dict[str, list[Execution]] = {}
    for one in executions:
        jobs.setdefault(one.uuid, []).append(one)
    return jobs


def overlapping(executions: list[Execution]) -> int:
    """Return how often an execution of a job began before an earlier one of it had come to its end."""
    count = 0
    for index, one in enumerate(executions):
        count += any(other.ended is not None and other.ended > one.started for other in executions[:index])
    return count


def interrupted(executions: Iterable[Execution], moment: float, agent: int) -> list[Execution]:
    """Return what ran under an agent at a moment and never came to its end."""
    return [one for one in executions if one.agent == agent and one.ended is None and one.started <= moment]


def recovery(executions: list[Execution], broken: Execution, moment: float) -> float | None:
    """Return the seconds from an injury to the next start of the job that it interrupted."""
    later = [one.started for one in executions if one.attempt > broken.attempt and one.started >= moment]
    return min(later) - moment if later else None
