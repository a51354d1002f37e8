"""RQ.

It holds a job that is in its queue, in the intermediate queue (taken, not yet started), in the ``StartedJobRegistry`` or
in the ``ScheduledJobRegistry``.  Failed is what is in the ``FailedJobRegistry``.  None of them is cleaned by asking.
"""

from __future__ import annotations

import redis
from rq import Queue, Retry
from rq.intermediate_queue import IntermediateQueue

from tests.chaos.peers.systems import work


def execute(ledger: str, name: str, seconds: float) -> None:
    """Do the work."""
    work.run(ledger, name, seconds)


def _queue() -> Queue:
    return Queue("default", connection=redis.Redis.from_url(work.url()))


def submit(names: list[str], ledger: str, seconds: float) -> None:
    """Submit the jobs."""
    queue, retries = _queue(), work.settings().get("retries", 0)
    for name in names:
        queue.enqueue(execute, ledger, name, seconds, job_id=name, retry=Retry(max=retries) if retries else None)


def ask(names: list[str]) -> dict[str, list[str]]:
    """Return which jobs are held, and which failed."""
    queue = _queue()
    held = [
        *queue.job_ids,
        *IntermediateQueue(queue.key, connection=queue.connection).get_job_ids(),
        *queue.started_job_registry.get_job_ids(cleanup=False),
        *queue.scheduled_job_registry.get_job_ids(cleanup=False),
    ]
    return {"held": held, "failed": queue.failed_job_registry.get_job_ids(cleanup=False)}
