"""The endpoint that submits many jobs at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from zerog import codec, views
from zerog.exceptions import (
    IdempotencyKeyReused,
    InvalidParameter,
    InvalidParameters,
    StoreUnavailable,
    UnknownParent,
    ZerogError,
)
from zerog.manager import BatchItem, Options, Submission, Submitted
from zerog.registry import read_body
from zerog.server.endpoint import Answer, Endpoint
from zerog.server.run import KEY, YEAR, checked_moment, hidden, may_submit, parse_moment

_MOST = 1000


class BatchItemBody(BaseModel):
    """One job of a batch; ``delay`` is in seconds."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    parameters: dict[str, Any]
    name: str | None = Field(
        None, pattern=r"^[^\x00-\x1f\x7f]+$", max_length=100, description="what others in the batch call it by"
    )
    parents: list[str] = Field(default_factory=list, max_length=100, description="names in the batch, and UUIDs")
    delay: float | None = Field(None, ge=0, le=YEAR)
    notBefore: str | None = None
    priority: int = Field(1000, ge=0, lt=2**32)


class RunBatch(Endpoint):
    """Submit many jobs of a type."""

    name = "run jobs"
    url = "/run/{jobType}:batch"
    role = "submit"
    takes_json = ("POST",)
    bodies: ClassVar[Mapping[str, type[BaseModel]]] = {"POST": BatchItemBody}
    many = _MOST
    responses = {
        "POST": {
            202: ("some jobs are stored and will run; the verdict on each", "Batch"),
            422: ("none was accepted; why, for each", "Batch"),
        }
    }
    problems: ClassVar = {"POST": (IdempotencyKeyReused,)}
    headers: ClassVar = {"POST": (KEY,)}

    async def find(self) -> None:
        """Refuse a job type that nobody knows, or that the token does not allow."""
        may_submit(self)

    async def post(self) -> Answer:
        """Validate and store the jobs, parents before those that wait for them; a verdict for each, in order."""
        key = self.idempotency_key()
        entries = codec.parse_array(self.request.body)
        if not 1 <= len(entries) <= _MOST:
            detail = f"a batch has 1 to {_MOST:,} items, and not {len(entries):,}"
            raise InvalidParameters([{"pointer": "", "code": "length", "detail": detail}])
        verdicts = await self.off_loop(self._submitted, entries, key)
        accepted = any(isinstance(verdict, Submitted) for verdict in verdicts)
        away = next((verdict for verdict in verdicts if isinstance(verdict, StoreUnavailable)), None)
        if away is not None and not accepted:
            raise away  # what could not be stored now is to be sent again as it is, and not to be corrected
        body = {"items": [_shown(verdict) for verdict in verdicts], "href": self.request.uri}
        return Answer(body, 202 if accepted else 422, page="batch")

    def _submitted(self, entries: Sequence[Any], key: str | None) -> Sequence[Submitted | ZerogError]:
        # No key that a client can send has this character in it.
        keys = [None if key is None else f"{key}\x1f{index}" for index in range(len(entries))]
        items = [self._item(entry, own) for entry, own in zip(entries, keys, strict=True)]
        return self.manager.submit_batch(self._without_hidden(items))

    def _item(self, entry: Any, key: str | None) -> BatchItem:
        """Read one item; what is wrong with it is its own verdict, and its name stays known to the others."""
        name = entry.get("name") if isinstance(entry, dict) else None
        name = name if isinstance(name, str) else None
        try:
            if not isinstance(entry, dict):
                raise InvalidParameters([{"pointer": "", "code": "type", "detail": "an item is an object"}])
            read = read_body(BatchItemBody, codec.canonical(entry))
            submission = Submission(
                self.request.path["jobType"], self._parameters(read), self._options(read), key, self.principal
            )
            return BatchItem(submission, read.name, tuple(read.parents))
        except ZerogError as error:
            return BatchItem(error, name)

    def _parameters(self, read: BatchItemBody) -> Any:
        try:
            return self.services.registry.validate(self.request.path["jobType"], codec.canonical(read.parameters))
        except InvalidParameters as error:
            raise InvalidParameters(
                {**fault, "pointer": f"/parameters{fault['pointer']}"} for fault in error.errors
            ) from error

    def _options(self, read: BatchItemBody) -> Options:
        members = {"delay": read.delay, "notBefore": read.notBefore, "priority": read.priority}
        written = {name: str(value) for name, value in members.items() if value is not None}
        try:
            moment = parse_moment(read.notBefore) if read.notBefore is not None else None
        except ValueError as error:
            detail = f"it must be {error}"
            raise InvalidParameters([{"pointer": "/notBefore", "code": "format", "detail": detail}]) from error
        try:
            not_before = checked_moment(self.services.clock.now(), read.delay, moment)
        except InvalidParameter as error:
            detail = error.errors[0]["detail"]
            raise InvalidParameters([{"pointer": "/notBefore", "code": "limit", "detail": detail}]) from error
        return Options(read.priority, not_before, tuple(sorted(written.items())))

    def _without_hidden(self, items: Sequence[BatchItem]) -> list[BatchItem]:
        """Refuse parents of types that do not exist for whoever asks."""
        named = {item.name for item in items}
        others = {one.lower() for item in items for one in item.parents if one not in named}
        unknown = set(hidden(self, sorted(others)))
        return [
            next((BatchItem(UnknownParent(one), item.name) for one in item.parents if one.lower() in unknown), item)
            for item in items
        ]


def _shown(verdict: Submitted | ZerogError) -> dict[str, Any]:
    if isinstance(verdict, ZerogError):
        return views.problem(verdict)
    return {"status": 202, **views.progress(verdict.record), "replayed": verdict.replayed}
