"""Huey on redis.

It holds a job that is pending or scheduled: a worker takes a job out of the queue before it runs it, and there is no
acknowledgement.  Failed is a job whose stored result is an error.
"""

from __future__ import annotations

from huey import RedisHuey
from huey.exceptions import TaskException

from tests.chaos.peers.systems import work

huey = RedisHuey("peers", url=work.url())


@huey.task()
def execute(ledger: str, name: str, seconds: float) -> None:
    """Do the work."""
    work.run(ledger, name, seconds)


def submit(names: list[str], ledger: str, seconds: float) -> None:
    """Submit the jobs."""
    for name in names:
        task = execute.s(ledger, name, seconds)
        task.id = name
        huey.enqueue(task)


def ask(names: list[str]) -> dict[str, list[str]]:
    """Return which jobs are held, and which failed."""
    return {"held": [task.id for task in (*huey.pending(), *huey.scheduled())], "failed": list(filter(_failed, names))}


def _failed(name: str) -> bool:
    try:
        huey.result(name, preserve=True)
    except TaskException:
        return True
    return False
