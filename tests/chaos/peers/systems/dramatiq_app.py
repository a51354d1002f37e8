"""Dramatiq on redis.

It holds a message that is in the list of its queue (or of the queue of delayed messages), or in a set of
``__acks__``: fetched by a worker, not acknowledged.  Failed is what is among the dead letters.
"""

from __future__ import annotations

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker

from tests.chaos.peers.systems import work

broker = RedisBroker(url=work.url(), **work.settings())
dramatiq.set_broker(broker)


@dramatiq.actor
def execute(ledger: str, name: str, seconds: float) -> None:
    """Do the work."""
    work.run(ledger, name, seconds)


def submit(names: list[str], ledger: str, seconds: float) -> None:
    """Submit the jobs."""
    for name in names:
        execute.send(ledger, name, seconds)


def ask(names: list[str]) -> dict[str, list[str]]:
    """Return which jobs are held, and which failed."""
    client = redis.Redis.from_url(work.url())
    held = []
    for queue in ("default", "default.DQ"):
        known = set(client.lrange(f"dramatiq:{queue}", 0, -1))
        for fetched in client.scan_iter(match=f"dramatiq:__acks__.*.{queue}"):
            known |= client.smembers(fetched)
        messages = client.hgetall(f"dramatiq:{queue}.msgs")
        held += [_name(message) for identity, message in messages.items() if identity in known]
    return {"held": held, "failed": [_name(message) for message in client.hvals("dramatiq:default.XQ.msgs")]}


def _name(message: bytes) -> str:
    return str(dramatiq.Message.decode(message).args[1])
