"""The endpoints of job types: what they take, what waits, and their pauses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from zerog import views
from zerog.exceptions import (
    UnknownType,
)
from zerog.registry import read_body
from zerog.server.endpoint import (
    HTML,
    Answer,
    Endpoint,
)


class PauseBody(BaseModel):
    """The body of a pause."""

    model_config = ConfigDict(strict=True, extra="forbid")

    message: str | None = Field(None, max_length=1000)


class Types(Endpoint):
    """The job types of this service."""

    name = "types"
    url = "/types"
    responses = {"GET": {200: ("every job type with its schema and queue", "Types")}}

    async def get(self) -> Answer:
        """Show every job type."""
        host = self.request.host
        items = [await type_view(self, name, host) for name in filter(self.sees, self.services.registry.names)]
        return Answer({"items": items, "next": None, "href": "/types"}, page="types")


class OfType(Endpoint):
    """Base of what lies below one job type."""

    async def find(self) -> None:
        """Refuse a type that nobody knows."""
        check_type(self, self.request.path["jobType"])

    async def show(self) -> Answer:
        """Return the job type as it is now; after a button on the page of the queue, that page."""
        if self.request.method == "POST" and self.request.offer == HTML:
            return Answer(status=303, headers={"Location": "/queue"})
        return Answer(await type_view(self, self.request.path["jobType"], self.request.host), page="type")


class Type(OfType):
    """One job type."""

    name = "type"
    url = "/types/{jobType}"
    responses = {"GET": {200: ("its schema, an example, the curl that runs it, its pause and its queue", "Type")}}

    async def get(self) -> Answer:
        """Show the job type."""
        return await self.show()


class PauseType(OfType):
    """Hold back the jobs of a type."""

    name = "pause"
    url = "/types/{jobType}/pause"
    takes_json = ("POST",)
    body_optional = ("POST",)
    bodies: ClassVar[Mapping[str, type[BaseModel]]] = {"POST": PauseBody}
    responses = {"POST": {200: ("the type, which is paused now or was before; a new message replaces the old", "Type")}}

    async def post(self) -> Answer:
        """Pause the type: its running jobs go on, its queued ones wait, submits are accepted."""
        wanted = read_body(PauseBody, self.request.body) if self.request.body else PauseBody(message=None)
        by = self.request.principal.name if self.request.principal is not None else "local"
        await self.off_loop(self.manager.pause, self.request.path["jobType"], by, wanted.message)
        return await self.show()


class ResumeType(OfType):
    """Let the jobs of a type run again."""

    name = "resume"
    url = "/types/{jobType}/resume"
    takes_json = ("POST",)
    body_optional = ("POST",)
    bodies: ClassVar[Mapping[str, type[BaseModel]]] = {"POST": PauseBody}
    responses = {"POST": {200: ("the type, which is not paused", "Type")}}

    async def post(self) -> Answer:
        """Resume the type.  It may be told why as a pause is, and keeps nothing of it."""
        if self.request.body:
            read_body(PauseBody, self.request.body)
        await self.off_loop(self.manager.resume, self.request.path["jobType"])
        return await self.show()


def check_type(endpoint: Endpoint, job_type: str) -> None:
    """Refuse a type that does not exist, or not for whoever asks."""
    endpoint.services.registry.get(job_type)
    if not endpoint.sees(job_type):
        raise UnknownType(f"there is no job type {job_type!r}")


async def type_view(endpoint: Endpoint, name: str, host: str) -> dict[str, Any]:
    """Return a job type with its queue; the queue is null while it is away."""
    stats = await endpoint.off_loop(endpoint.manager.queue_stats_or_none, name)
    pause = (await endpoint.off_loop(endpoint.manager.pauses)).get(name)
    shown = asdict(pause) if pause is not None else None
    return views.job_type(endpoint.services.registry.describe(name), host, stats, shown)
