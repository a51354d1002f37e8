"""The endpoints that try jobs again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from zerog import codec, views
from zerog.exceptions import (
    IdempotencyKeyReused,
    NotRetryable,
    UnknownParent,
    UnknownType,
)
from zerog.manager import check_retryable
from zerog.record import State
from zerog.registry import read_body
from zerog.server.collection import OfJob
from zerog.server.endpoint import (
    WAIT,
    Answer,
    Endpoint,
)
from zerog.server.run import KEY, PARENT, check_parents, submit
from zerog.server.types import check_type


class RetryBody(BaseModel):
    """The body that says which jobs are to be tried again."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: str
    state: Literal["failed", "cancelled"] = "failed"
    limit: int = Field(100, ge=1, le=1000)


class Retry(OfJob):
    """Try a job again that failed or was cancelled, as a new one."""

    name = "retry"
    url = "/jobs/{uuid}/retry"
    takes_json = ("POST",)
    body_optional = ("POST",)
    parameters = {"POST": (PARENT,)}
    responses = {
        "POST": {
            200: ("the new job has ended within Prefer: wait", "Progress"),
            202: ("the new job is stored and will run", "Progress"),
        }
    }
    headers: ClassVar = {"POST": (KEY, WAIT)}
    problems: ClassVar = {"POST": (NotRetryable, UnknownParent, UnknownType, IdempotencyKeyReused)}

    async def post(self) -> Answer:
        """Try the job again: without a body with its parameters, else with those in the body.

        A job that had not run waits for its parents again, or for those in the query.
        """
        key = self.idempotency_key()
        registry = self.services.registry
        body = self.request.body or codec.dumps(self.record.parameters)
        check_retryable(self.record)  # before its parameters are looked at
        parameters = registry.validate(self.record.job_type, body)
        parents = self.request.query["parent"]
        await check_parents(self, parents)
        again = await self.off_loop(self.manager.again, self.record, parameters, key, parents)
        return await submit(self, replace(again, principal=self.principal))


class Retries(Endpoint):
    """Try many jobs again."""

    name = "retry many"
    url = "/jobs:retry"
    takes_json = ("POST",)
    bodies: ClassVar[Mapping[str, type[BaseModel]]] = {"POST": RetryBody}
    responses = {
        "POST": {
            200: ("a verdict for each job that was found", "Retries"),
        }
    }
    problems: ClassVar = {"POST": (UnknownType,)}

    async def post(self) -> Answer:
        """Try again the newest jobs of a type that failed, or were cancelled, and have not been tried again so."""
        wanted = read_body(RetryBody, self.request.body)
        check_type(self, wanted.type)
        verdicts = await self.off_loop(self.manager.retry_many, wanted.type, State(wanted.state), wanted.limit)
        return Answer({"items": [views.retried(*verdict) for verdict in verdicts], "href": self.url}, page="retries")
