"""What became of the jobs: the ledger says what ran, the system says what it still holds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from zerog.chaos import ledger


@dataclass(frozen=True, slots=True)
class Answer:
    """What a system says of the jobs: which it still holds, waiting or running, and which it says have failed."""

    held: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Counts of jobs.  ``jobs`` = ``done`` + ``failed`` + ``stuck`` + ``lost``.

    ``interrupted`` are those that ran at the kill; ``recoveries`` has for each of them that came back the seconds from
    the kill to its next start, ascending.
    """

    jobs: int
    done: int
    failed: int
    stuck: int
    lost: int
    started_twice: int
    finished_twice: int
    interrupted: int
    recoveries: tuple[float, ...]


def judge(names: Collection[str], executions: Sequence[ledger.Execution], answer: Answer, killed: float) -> Verdict:
    """Return what became of the jobs; ``killed`` is the moment of the kill, by the monotonic clock of the machine.

    Done has come to its end once or more, whatever the system says.  Of the others, stuck is held by the system or has
    been started since the kill; failed is said to have failed; lost is all the rest, of which nobody knows any more.
    """
    ran = ledger.by_job(executions)
    ends = {name: sum(one.ended is not None for one in ran.get(name, ())) for name in names}
    open_jobs = {name for name in names if not ends[name]}
    stuck = open_jobs & (answer.held | {one.uuid for one in executions if one.started > killed})
    failed = open_jobs & answer.failed - stuck
    broken = {one.uuid for one in executions if one.ended is None and one.started <= killed}
    back = {one.uuid: one.started - killed for one in reversed(executions) if one.started > killed}
    return Verdict(
        jobs=len(names),
        done=len(names) - len(open_jobs),
        failed=len(failed),
        stuck=len(stuck),
        lost=len(open_jobs - stuck - failed),
        started_twice=sum(len(ran.get(name, ())) > 1 for name in names),
        finished_twice=sum(count > 1 for count in ends.values()),
        interrupted=len(broken),
        recoveries=tuple(sorted(back[name] for name in broken if name in back)),
    )
