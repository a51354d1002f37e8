"""Celery on redis.

It holds a job that stands in the list ``celery``, or in the hash ``unacked``: delivered, not acknowledged.  A job that
is in neither is delivered by nobody any more; its state in the result backend then stays ``PENDING``, which Celery also
says of jobs that it never heard of.  Failed is what the result backend calls ``FAILURE``.
"""

from __future__ import annotations

import json

import redis
from celery import Celery

from tests.chaos.peers.systems import work

app = Celery("peers", broker=work.url(), backend=work.url())
app.conf.update(work.settings())


@app.task
def execute(ledger: str, name: str, seconds: float) -> None:
    """Do the work."""
    work.run(ledger, name, seconds)


def submit(names: list[str], ledger: str, seconds: float) -> None:
    """Submit the jobs."""
    for name in names:
        execute.apply_async((ledger, name, seconds), task_id=name)


def ask(names: list[str]) -> dict[str, list[str]]:
    """Return which jobs are held, and which failed."""
    client = redis.Redis.from_url(work.url())
    waiting = [json.loads(message) for message in client.lrange("celery", 0, -1)]
    delivered = [json.loads(entry)[0] for entry in client.hvals("unacked")]
    held = [message["headers"]["id"] for message in (*waiting, *delivered)]
    return {"held": held, "failed": [name for name in names if app.AsyncResult(name).state == "FAILURE"]}
