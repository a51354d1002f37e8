"""The endpoints of jobs as they are stored: they parse, call the Manager, and render."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from zerog import views
from zerog.exceptions import (
    AlreadyFinished,
    Forbidden,
    InvalidParameter,
    InvalidParameters,
    PreconditionFailed,
    PreconditionRequired,
    UnknownType,
)
from zerog.manager import Page
from zerog.needs import LABEL, MAX_LABELS, is_cpus
from zerog.record import JobRecord, State
from zerog.registry import read_body
from zerog.server.agents import Moment
from zerog.server.collection import CURSOR, LIMIT, OfJob, collection, expand_parameter
from zerog.server.endpoint import (
    HTML,
    JSON,
    Answer,
    Endpoint,
    Parameter,
    chosen,
    header,
)
from zerog.server.run import YEAR, hidden
from zerog.server.types import check_type

#: Bytes of a result that the page of its job shows.
_PREVIEW = 4096


class PruneBody(BaseModel):
    """The body that says which jobs are to be removed; ``olderThan`` is in seconds since their end."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    olderThan: float = Field(ge=0, le=100 * YEAR)
    type: str | None = None
    after: int = Field(0, ge=0, lt=2**53)


class Jobs(Endpoint):
    """List jobs, newest first."""

    name = "jobs"
    url = "/jobs"
    parameters = {
        "GET": (
            Parameter("type", str, {"type": "string"}, "only jobs of this type"),
            Parameter("state", chosen(*State), {"type": "string", "enum": [state.value for state in State]},
                      "only jobs in this state"),
            LIMIT,
            CURSOR,
            expand_parameter("items"),
        )
    }  # fmt: skip
    responses = {"GET": {200: ("a page of jobs; with expand=items each whole", "Jobs")}}

    async def get(self) -> Answer:
        """Walk the log of jobs from the cursor on."""
        query = self.request.query
        job_type, state = query["type"], query["state"]
        if job_type is not None and job_type not in self.services.registry:
            raise InvalidParameter("type", "there is no such job type")
        scope = f"jobs?type={job_type}&state={state}"
        page = await self.off_loop(self._read, job_type, state, scope)
        filters = {name: query[name] for name in ("type", "state") if query[name] is not None}
        view = views.item
        if query["expand"]:
            filters["expand"], view = "items", views.whole
        return await collection(self, page, [view(record) for record in page.items], filters, scope, "jobs")

    def _read(self, job_type: str | None, state: str | None, scope: str) -> Page:
        cursor = self.request.query["cursor"]
        before = None if cursor is None else self.manager.read_cursor(cursor, scope)
        if job_type is not None and not self.sees(job_type):
            return Page([], None)
        page = self.manager.page(job_type, state, before, self.request.query["limit"])
        return Page([record for record in page.items if self.sees(record.job_type)], page.next)


class LimitsBody(BaseModel):
    """What a job asks of an agent: bytes, cores, labels; what is not said stays."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    ram: int = Field(default=0, ge=0, lt=2**53)
    cpus: float = Field(default=0.0, ge=0, le=100_000)
    labels: list[str] = Field(default_factory=list, max_length=MAX_LABELS)


class ModifyBody(BaseModel):
    """What is to be different about a job; what is not said stays."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    priority: int = Field(1000, ge=0, le=2**32 - 1)
    notBefore: Moment | None = None
    limits: LimitsBody = Field(default_factory=lambda: LimitsBody())

    def changes(self, now: float) -> dict[str, Any]:
        """Return what is said; ``InvalidParameters`` for what cannot be."""
        limits = {name: getattr(self.limits, name) for name in self.limits.model_fields_set}
        faults = []
        if not is_cpus(self.limits.cpus):
            faults.append(_fault("/limits/cpus", "cores are given to a thousandth"))
        for place, label in enumerate(self.limits.labels):
            if not LABEL.fullmatch(label):
                faults.append(_fault(f"/limits/labels/{place}", f"it must match {LABEL.pattern}"))
        moment = self.notBefore
        if moment is not None and moment > now + YEAR:
            faults.append(_fault("/notBefore", "it must be at most a year ahead"))
        if faults:
            raise InvalidParameters(faults)
        said = dict(limits) if "limits" in self.model_fields_set else {}
        if "priority" in self.model_fields_set:
            said["priority"] = self.priority
        if "notBefore" in self.model_fields_set:
            said["not_before"] = moment if moment is not None and moment > now else None
        return said


def _fault(pointer: str, detail: str) -> dict[str, Any]:
    return {"pointer": pointer, "code": "invalid", "detail": detail}


class Job(OfJob):
    """One job, whole; its modification and its cancellation."""

    name = "job"
    url = "/jobs/{uuid}"
    parameters: ClassVar = {"GET": (expand_parameter("parents", "retriedFrom"),), "PATCH": ModifyBody}
    headers: ClassVar = {"PATCH": (header("If-Match", "the ETag of the revision that is to be changed, or *"),)}
    responses = {
        "GET": {200: ("the whole record", "Job")},
        "PATCH": {200: ("it is changed; the agent of a running job is told", "Job")},
        "DELETE": {
            200: ("it is cancelled", "Progress"),
            202: ("it is being cancelled", "Progress"),
        },
    }
    problems: ClassVar = {
        "DELETE": (AlreadyFinished,),
        "PATCH": (AlreadyFinished, PreconditionFailed, PreconditionRequired),
    }

    async def get(self) -> Answer:
        """Show the whole record."""
        view = views.whole(self.record)
        headers = _revision_headers(self.record)
        if self.limited and self.record.parents:
            unseen = await self.off_loop(hidden, self, self.record.parents)
            view["parents"] = [one for one in view["parents"] if one["href"].rpartition("/")[2] not in unseen]
        aside = await self.off_loop(self._aside) if self.request.offer == HTML else {}
        wanted = self.request.query["expand"]
        if wanted:
            await self.off_loop(self._expand, view, wanted)
        return Answer(view, 200, headers, page="job", aside=aside)

    async def patch(self, parameters: ModifyBody) -> Answer:
        """Change the priority of a job that is not over, when it may run, and what it needs."""
        changes = parameters.changes(self.services.clock.now())
        known = self.request.headers.get("If-Match")
        if known is None:
            raise PreconditionRequired("If-Match must name the ETag of the job's revision, or be *")
        record = self.record
        if record.terminal:
            raise AlreadyFinished(f"the job is {record.state}", state=str(record.state))
        tags = [tag.strip() for tag in known.split(",")]
        if "*" not in tags and f'"{record.revision}"' not in tags:
            raise PreconditionFailed(f"the job's revision is {record.revision}", revision=record.revision)
        revision = None if "*" in tags else record.revision
        record = await self.off_loop(self._modify, changes, revision)
        return Answer(views.whole(record), 200, _revision_headers(record), "job")

    def _modify(self, changes: dict[str, Any], revision: int | None) -> JobRecord:
        record = self.manager.modify(self.record.uuid, changes, revision)
        if record.state is State.RUNNING and record.agent is not None:
            self.services.master.tell_modified(record, changes)
        return record

    def _aside(self) -> dict[str, Any]:
        """Return what the page shows beside the record: why it is not done, what it said, and a small result."""
        record = self.record
        newest, _ = self.manager.newest_events(record.uuid)
        aside: dict[str, Any] = {f"{level}s": [views.entry(one) for one in newest[level]] for level in newest}
        if not record.terminal:
            aside["explanation"] = views.explanation(record, *self.manager.explain(record))
        result = record.result
        if result is not None and result.size <= _PREVIEW and _is_text(result.media_type):
            aside["result"] = b"".join(self.manager.open_data(result, 0, result.size)).decode("utf-8", "replace")
        return aside

    def _expand(self, view: dict[str, Any], wanted: Sequence[str]) -> None:
        """Embed what is referenced beside its reference; what is gone, or hidden, stays a reference."""
        references = [
            one for name in wanted for one in ([view[name]] if isinstance(view[name], dict) else view[name] or ())
        ]
        uuids = [str(one["href"]).rpartition("/")[2] for one in references]
        found = self.manager.get_many(list(dict.fromkeys(uuids)))
        for reference, uuid in zip(references, uuids, strict=True):
            record = found.get(uuid)
            if record is not None and self.sees(record.job_type):
                reference.update(views.item(record))

    async def delete(self) -> Answer:
        """Cancel the job."""
        return await cancel(self)


def _revision_headers(record: JobRecord) -> dict[str, str]:
    """Return what a PATCH needs to know; the record changes more often than its revision, so nobody may keep it."""
    return {"ETag": f'"{record.revision}"', "Cache-Control": "no-store"}


def _is_text(media_type: str) -> bool:
    return media_type.startswith("text/") or media_type.partition(";")[0] == JSON


class Cancel(OfJob):
    """Cancel a job."""

    name = "cancel"
    url = "/jobs/{uuid}/cancel"
    responses = {"POST": Job.responses["DELETE"]}
    problems: ClassVar = {"POST": (AlreadyFinished,)}

    async def post(self) -> Answer:
        """Cancel the job."""
        return await cancel(self)


async def cancel(endpoint: OfJob) -> Answer:
    """Cancel the job of an endpoint: 200 cancelled, 202 cancelling, 409 already finished."""
    held, ended = await endpoint.off_loop(endpoint.manager.cancel, endpoint.record.uuid)
    record = held.record
    if ended and record.state is not State.CANCELLED:
        raise AlreadyFinished(f"the job has {record.state} before", state=record.state.value)
    if endpoint.request.offer == HTML:  # so that the page can be loaded again without cancelling again
        return Answer(status=303, headers={"Location": views.job_href(record.uuid)})
    return Answer(views.progress(record), 200 if record.terminal else 202, page="job")


class Prune(Endpoint):
    """Remove old jobs."""

    name = "prune"
    url = "/jobs:prune"
    takes_json = ("POST",)
    bodies: ClassVar[Mapping[str, type[BaseModel]]] = {"POST": PruneBody}
    responses = {
        "POST": {
            200: ("how many were removed, and where to go on", "Pruned"),
        }
    }
    problems: ClassVar = {"POST": (UnknownType,)}

    async def post(self) -> Answer:
        """Remove jobs that ended longer ago than olderThan seconds, a page at a time: call it until next is null."""
        wanted = read_body(PruneBody, self.request.body)
        if wanted.type is not None:
            check_type(self, wanted.type)
        elif self.limited:
            raise Forbidden("the token is limited to some job types: name one of them")
        done = await self.off_loop(self.manager.prune, wanted.after, wanted.type, wanted.olderThan)
        if done.position is None:
            await self.off_loop(self.manager.tidy)  # a page; the sweeper goes on
            await self.off_loop(self.manager.trim)
        return Answer({"pruned": done.jobs, "next": done.position, "href": self.url}, page="pruned")


class Explain(OfJob):
    """Why a job is not done."""

    name = "explain"
    url = "/jobs/{uuid}/explain"
    responses = {"GET": {200: ("exactly one reason, and its facts", "Explanation")}}

    async def get(self) -> Answer:
        """Say why the job is not done: the first reason that holds."""
        reason, facts = await self.off_loop(self.manager.explain, self.record)
        return Answer(views.explanation(self.record, reason, facts), page="explanation")


class Info(OfJob):
    """Progress and what happened so far."""

    name = "info"
    url = "/jobs/{uuid}/info"
    responses = {"GET": {200: ("progress and the newest events, warnings and errors", "Info")}}

    async def get(self) -> Answer:
        """Show the newest hundred of each level."""
        newest, dropped = await self.off_loop(self.manager.newest_events, self.record.uuid)
        return Answer(views.info(self.record, newest, dropped), page="info")
