"""What this process, all servers together, the queue and the agents are doing: ``/view_status`` and ``/metrics``."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import zerog
from zerog import views
from zerog.clock import to_iso
from zerog.exceptions import DatastoreError
from zerog.fleet import STATES
from zerog.server.agents import shown_agent
from zerog.server.endpoint import Answer, Endpoint
from zerog.statistics import Totals

#: Seconds that the statistics get: their store may be another one, and what it does must hold up nothing.
_STATISTICS_WITHIN = 1.0
#: Agents that are shown.
_AGENTS = 100

#: As the format's own description has it.
MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Overview(Endpoint):
    """Base of what looks at everything."""

    async def totals(self) -> Totals | None:
        """Return what all processes have counted; None while that cannot be known."""
        try:
            return await asyncio.wait_for(self.off_loop(self.services.statistics.read), _STATISTICS_WITHIN)
        except (DatastoreError, TimeoutError):
            return None

    async def queue_items(self) -> list[dict[str, Any]]:
        """Return what waits by type, as far as whoever asks may see it."""
        return [one for one in await self.services.queue.get() if self.sees(one["jobType"])]

    def agents(self) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """Return the newest agents, and how many there are in which state."""
        shown: list[dict[str, Any]] = []
        states = dict.fromkeys(STATES, 0)
        for record in self.manager.fleet.newest():
            state = self.manager.fleet.state(record)
            states[state] += 1
            if len(shown) < _AGENTS:
                shown.append(shown_agent(self, record, state))
        return shown, states


class ViewStatus(Overview):
    """The state of the service, as seen by one of its processes."""

    name = "view_status"
    url = "/view_status"
    responses = {"GET": {200: ("this process, all servers together, the queue and the agents", "Status")}}

    async def get(self) -> Answer:
        """Show everything that helps whoever operates it."""
        totals = await self.totals()
        queue, (agents, states) = await self._queue(), await self.off_loop(self.agents)
        body = {
            "href": self.url,
            "service": self.manager.service,
            "process": self._process(),
            "configuration": dict(self.services.configuration),
            "endpoints": [described(one) for one in self.services.endpoints],
            "statistics": views.statistics(totals, self.services.statistics.kind),
            "queue": queue,
            "agents": {"items": agents, "states": states},
        }
        return Answer(body, page="view_status")

    def _process(self) -> dict[str, Any]:
        began, since = self.services.started
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "start": to_iso(began),
            "uptime": round(self.services.clock.monotonic() - since, 3),
            "memory": pages * os.sysconf("SC_PAGE_SIZE"),
            "cpu": round(time.process_time(), 3),
            "threads": threading.active_count(),
            "version": zerog.__version__,
        }

    async def _queue(self) -> dict[str, Any]:
        items = [
            {**{name: one[name] for name in ("jobType", "queue", "href")}, "paused": one["paused"] is not None}
            for one in await self.queue_items()
        ]
        return {"available": all(one["queue"] is not None for one in items), "items": items}


def described(endpoint: type[Endpoint]) -> dict[str, Any]:
    """Return what an endpoint says of itself."""
    known = [(one.name, one.required) for method in endpoint.methods() for one in endpoint.query_parameters(method)]
    models = (endpoint.model(method) for method in endpoint.methods())
    for model in filter(None, (*models, *endpoint.bodies.values())):
        known += [(member.alias or name, member.is_required()) for name, member in model.model_fields.items()]
    return {
        "name": endpoint.name,
        "url": endpoint.url,
        "methods": list(endpoint.methods()),
        "required": sorted({name for name, required in known if required}),
        "optional": sorted({name for name, required in known if not required}),
    }


class Metrics(Overview):
    """What Prometheus scrapes: the whole service, all hosts, from any server."""

    name = "metrics"
    url = "/metrics"
    offers = ("text/plain",)
    responses = {"GET": {200: ("the text format of Prometheus, version 0.0.4", "Bytes")}}

    async def get(self) -> Answer:
        """Send the metrics."""
        totals, items = await self.totals(), await self.queue_items()
        return Answer(await self.off_loop(self._text, totals, items), media_type=MEDIA_TYPE)

    def _text(self, totals: Totals | None, items: list[dict[str, Any]]) -> bytes:
        from zerog.server.metrics import exposition

        queues = [(one["jobType"], *_depth_and_age(one)) for one in items]
        return exposition(totals, queues, self.agents()[1], self.sees)


def _depth_and_age(item: dict[str, Any]) -> tuple[int | None, float | None]:
    """Return how many of a type wait in the queue, and for how long the next one has been due."""
    if item["queue"] is None:
        return None, None
    return item["queue"]["ready"] + item["queue"]["delayed"], item["ageSeconds"] or 0.0
