"""The endpoints of jobs: they parse, call the Manager, and render."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any, ClassVar, Literal
from urllib.parse import urlencode

from pydantic import BaseModel, ConfigDict, Field

from zerog import codec, views
from zerog.exceptions import (
    AlreadyFinished,
    Forbidden,
    InvalidParameter,
    JobCancelled,
    JobFailed,
    NotAcceptable,
    NotFound,
    RangeNotSatisfiable,
    UnknownJob,
    UnknownParent,
    UnknownType,
)
from zerog.manager import Options, Page, Submission, check_retryable
from zerog.outcome import Result
from zerog.record import JobRecord, State
from zerog.registry import read_body
from zerog.server.endpoint import (
    ANY,
    EVENTS,
    HTML,
    JSON,
    NO_SUCH_JOB,
    Answer,
    Endpoint,
    Parameter,
    RunParameter,
    chosen,
    ranged,
)
from zerog.server.live import COMMENT, COMMENT_EVERY, EVERY, event, streamed
from zerog.server.negotiation import choose

_KEY = re.compile(r"[\x21-\x7e]{1,255}", re.ASCII)
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII)

#: Seconds after which a client should ask again for data that are not there yet.
_RETRY_AFTER = "1"
YEAR = 31_536_000
#: Bytes of a result that the page of its job shows.
_PREVIEW = 4096

_INTEGER = {"type": "integer"}
LIMIT = Parameter("limit", ranged("limit", 1, 1000), {**_INTEGER, "minimum": 1, "maximum": 1000, "default": 50},
                  "how many items a page has", 50)  # fmt: skip
CURSOR = Parameter("cursor", str, {"type": "string"}, "where the page starts, from the last one's next")


def expand_parameter(*names: str) -> Parameter:
    """Return the parameter that says which references are to be embedded."""

    def parse(text: str) -> str:
        if text not in names:
            raise ValueError("one of " + ", ".join(names))
        return text

    schema = {"type": "string", "enum": list(names)}
    what = "reference that is to be embedded; may stand several times"
    return Parameter("expand", parse, schema, what, (), repeated=True)


class PauseBody(BaseModel):
    """The body of a pause."""

    model_config = ConfigDict(strict=True, extra="forbid")

    message: str | None = Field(None, max_length=1000)


class RetryBody(BaseModel):
    """The body that says which jobs are to be tried again."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: str
    state: Literal["failed", "cancelled"] = "failed"
    limit: int = Field(100, ge=1, le=1000)


class PruneBody(BaseModel):
    """The body that says which jobs are to be removed; ``olderThan`` is in seconds since their end."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    olderThan: float = Field(ge=0, le=100 * YEAR)
    type: str | None = None
    after: int = Field(0, ge=0, lt=2**53)


def parse_delay(text: str) -> float:
    """Read a delay: decimal seconds with at most three places, up to a year."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,3})?", text, re.ASCII) or float(text) > YEAR:
        raise ValueError("seconds from 0 to 31,536,000, with at most three decimal places")
    return float(text)


def parse_moment(text: str) -> float:
    """Read an RFC 3339 time with its zone, at most a year ahead; compared with now by the caller."""
    shape = r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
    right = "a time with its zone as in RFC 3339, such as 2026-01-31T12:00:00Z, at most a year ahead"
    if not re.fullmatch(shape, text, re.ASCII):
        raise ValueError(right)
    try:
        return datetime.fromisoformat(text.upper()).timestamp()
    except ValueError as error:
        raise ValueError(right) from error


def parse_parent(text: str) -> str:
    """Read the UUID of a parent; what is none is an unknown job like any other."""
    if not re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", text, re.ASCII):
        raise UnknownParent(codec.printable(text, 100))
    return text.lower()


_PARENT = Parameter(
    "parent", parse_parent, {"type": "string", "format": "uuid"},
    "job that must have succeeded before; may stand several times", (), repeated=True,
)  # fmt: skip


class Run(Endpoint):
    """Submit a job."""

    name = "run job"
    url = "/run/{jobType}"
    role = "submit"
    takes_json = ("POST",)
    parameters = {
        "POST": (
            Parameter("delay", parse_delay, {"type": "number", "minimum": 0, "maximum": YEAR},
                      "seconds before the job may run"),
            Parameter("notBefore", parse_moment, {"type": "string", "format": "date-time"},
                      "moment before which the job may not run"),
            Parameter("priority", ranged("priority", 0, 2**32 - 1),
                      {**_INTEGER, "minimum": 0, "maximum": 2**32 - 1, "default": 1000},
                      "lower is more urgent", 1000),
            _PARENT,
        )
    }  # fmt: skip
    responses = {
        "POST": {
            200: ("it has ended within Prefer: wait", "Progress"),
            202: ("the job is stored and will run", "Progress"),
            422: ("the parameters do not match the type's schema", "Problem"),
        }
    }

    async def find(self) -> None:
        """Refuse a job type that nobody knows, or that the token does not allow."""
        may_submit(self)

    async def post(self) -> Answer:
        """Validate, persist, enqueue, and answer the UUID: in this order, all of it in the Manager."""
        job_type = self.request.path["jobType"]
        options = self._options()
        key = idempotency_key(self)
        parameters = self.services.registry.validate(job_type, self.request.body)
        await check_parents(self, options.parents)
        submission = Submission(job_type, parameters, options, key, principal(self))
        wanted = [one for one in self.services.run_parameters if self.request.query[one.name] is not None]
        if wanted:
            submission = replace(submission, fixed=submission.uuid)
            await self.off_loop(self._before, submission, wanted)
        return await submit(self, submission)

    def known_parameters(self, method: str) -> tuple[Parameter, ...]:
        """Return the parameters of a submit, those of applications too."""
        if not self.services.run_parameters:
            return self.query_parameters(method)
        added = (Parameter(one.name, one.parse, one.schema, one.description) for one in self.services.run_parameters)
        return (*self.query_parameters(method), *added)

    def _before(self, submission: Submission, wanted: Sequence[RunParameter]) -> None:
        """Let applications do what comes before the job, unless its key was used for another."""
        self.manager.check_key(submission)
        for one in wanted:
            one.before(self, self.request.query[one.name], submission.uuid)

    def _options(self) -> Options:
        query, now = self.request.query, self.services.clock.now()
        not_before = checked_moment(now, query["delay"], query["notBefore"])
        written = tuple(sorted(self.request.written.items()))
        return Options(query["priority"], not_before, written, parents=query["parent"])


def may_submit(endpoint: Endpoint) -> None:
    """Refuse the job type of a path that nobody knows, or that the token does not allow."""
    job_type = endpoint.request.path["jobType"]
    endpoint.services.registry.get(job_type)
    if not endpoint.sees(job_type):
        raise Forbidden(f"the token does not allow jobs of the type {job_type}")


def checked_moment(now: float, delay: float | None, moment: float | None) -> float | None:
    """Return the moment before which a job may not run, if that is still to come."""
    if delay is not None and moment is not None:
        raise InvalidParameter("notBefore", "it excludes delay")
    if delay is not None:
        moment = now + delay
    if moment is not None and moment > now + YEAR:
        raise InvalidParameter("notBefore", "it must be at most a year ahead")
    return moment if moment is not None and moment > now else None


def principal(endpoint: Endpoint) -> str:
    """Return whose idempotency keys those of a request are."""
    return endpoint.request.principal.id if endpoint.request.principal is not None else ""


async def check_parents(endpoint: Endpoint, parents: Sequence[str]) -> None:
    """Refuse parents of types that do not exist for whoever asks; others are checked where the job is stored."""
    if endpoint.limited and parents:
        for uuid in await endpoint.off_loop(hidden, endpoint, parents):
            raise UnknownParent(uuid)


def hidden(endpoint: Endpoint, uuids: Sequence[str]) -> list[str]:
    """Return those of the jobs that are of types which do not exist for whoever asks."""
    found = endpoint.manager.get_many(list(uuids)) if endpoint.limited else {}
    return [uuid for uuid, record in found.items() if not endpoint.sees(record.job_type)]


def idempotency_key(endpoint: Endpoint) -> str | None:
    """Return the Idempotency-Key of a request."""
    key = endpoint.request.headers.get("Idempotency-Key")
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidParameter("Idempotency-Key", "it must be 1 to 255 visible ASCII characters")
    return key


async def submit(endpoint: Endpoint, submission: Submission) -> Answer:
    """Submit a job and answer for it: 202, or 200 when it ended while the client waited."""
    done = await endpoint.services.submit(submission)
    record = done.record
    headers = {"Location": views.job_href(record.uuid)}
    if done.replayed:
        headers["Idempotency-Replayed"] = "true"
        record = await endpoint.services.read(record.uuid)
    wait = endpoint.preferred_wait()
    if wait is not None:
        headers["Preference-Applied"] = f"wait={wait}"
        record = await endpoint.services.watcher.terminal(record, wait)
    status = 200 if wait is not None and record.terminal else 202
    return Answer(views.progress(record), status, headers, "job")


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


async def collection(
    endpoint: Endpoint, page: Page, items: list[Any], filters: dict[str, str], scope: str, name: str
) -> Answer:
    """Return a page of a collection, with the reference to the next one in the body and in ``Link``."""
    path = endpoint.request.uri.partition("?")[0]
    following = None
    headers = {}
    if page.next is not None:
        cursor = await endpoint.off_loop(endpoint.manager.sign_cursor, page.next, scope)
        query = urlencode({**filters, "limit": endpoint.request.query["limit"], "cursor": cursor})
        following = f"{path}?{query}"
        headers["Link"] = f'<{following}>; rel="next"'
    return Answer({"items": items, "next": following, "href": endpoint.request.uri}, 200, headers, name)


class OfJob(Endpoint):
    """Base of what lies below one job: finds it."""

    record: JobRecord

    async def find(self) -> None:
        """Read the record."""
        self.record = await self.services.read(self.uuid())
        if not self.sees(self.record.job_type):
            raise UnknownJob(NO_SUCH_JOB)


class Job(OfJob):
    """One job, whole; and its cancellation."""

    name = "job"
    url = "/jobs/{uuid}"
    parameters = {"GET": (expand_parameter("parents", "retriedFrom"),)}
    responses = {
        "GET": {200: ("the whole record", "Job")},
        "DELETE": {
            200: ("it is cancelled", "Progress"),
            202: ("it is being cancelled", "Progress"),
            409: ("it has ended before", "Problem"),
        },
    }

    async def get(self) -> Answer:
        """Show the whole record."""
        view = views.whole(self.record)
        aside = await self.off_loop(self._aside) if self.request.offer == HTML else {}
        wanted = self.request.query["expand"]
        if wanted:
            await self.off_loop(self._expand, view, wanted)
        return Answer(view, page="job", aside=aside)

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


def _is_text(media_type: str) -> bool:
    return media_type.startswith("text/") or media_type.partition(";")[0] == JSON


class Cancel(OfJob):
    """Cancel a job."""

    name = "cancel"
    url = "/jobs/{uuid}/cancel"
    responses = {"POST": Job.responses["DELETE"]}

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


class Retry(OfJob):
    """Try a job again that failed or was cancelled, as a new one."""

    name = "retry"
    url = "/jobs/{uuid}/retry"
    takes_json = ("POST",)
    body_optional = ("POST",)
    parameters = {"POST": (_PARENT,)}
    responses = {
        "POST": {
            200: ("the new job has ended within Prefer: wait", "Progress"),
            202: ("the new job is stored and will run", "Progress"),
            409: ("the job has neither failed nor been cancelled", "Problem"),
            422: ("the parameters do not match the type's schema", "Problem"),
        }
    }

    async def post(self) -> Answer:
        """Try the job again: without a body with its parameters, else with those in the body.

        A job that had not run waits for its parents again, or for those in the query.
        """
        key = idempotency_key(self)
        registry = self.services.registry
        body = self.request.body or codec.dumps(self.record.parameters)
        check_retryable(self.record)  # before its parameters are looked at
        parameters = registry.validate(self.record.job_type, body)
        parents = self.request.query["parent"]
        await check_parents(self, parents)
        again = await self.off_loop(self.manager.again, self.record, parameters, key, parents)
        return await submit(self, replace(again, principal=principal(self)))


def check_type(endpoint: Endpoint, job_type: str) -> None:
    """Refuse a type that does not exist, or not for whoever asks."""
    endpoint.services.registry.get(job_type)
    if not endpoint.sees(job_type):
        raise UnknownType(f"there is no job type {job_type!r}")


class Retries(Endpoint):
    """Try many jobs again."""

    name = "retry many"
    url = "/jobs:retry"
    takes_json = ("POST",)
    bodies: ClassVar[Mapping[str, type[BaseModel]]] = {"POST": RetryBody}
    responses = {
        "POST": {
            200: ("a verdict for each job that was found", "Retries"),
            404: ("there is no such job type", "Problem"),
            422: ("the body does not say which", "Problem"),
        }
    }

    async def post(self) -> Answer:
        """Try again the newest jobs of a type that failed, or were cancelled, and have not been tried again so."""
        wanted = read_body(RetryBody, self.request.body)
        check_type(self, wanted.type)
        verdicts = await self.off_loop(self.manager.retry_many, wanted.type, State(wanted.state), wanted.limit)
        return Answer({"items": [views.retried(*verdict) for verdict in verdicts], "href": self.url}, page="retries")


class Prune(Endpoint):
    """Remove old jobs."""

    name = "prune"
    url = "/jobs:prune"
    takes_json = ("POST",)
    bodies: ClassVar[Mapping[str, type[BaseModel]]] = {"POST": PruneBody}
    responses = {
        "POST": {
            200: ("how many were removed, and where to go on", "Pruned"),
            404: ("there is no such job type", "Problem"),
            422: ("the body does not say which", "Problem"),
        }
    }

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


class Progress(OfJob):
    """How far a job is."""

    name = "progress"
    url = "/jobs/{uuid}/progress"
    offers = (JSON, HTML, EVENTS)
    responses = {"GET": {200: ("how far it is", "Progress"), 304: ("nothing has changed", None)}}

    async def get(self) -> Answer:
        """Show progress at once, when it changes (``Prefer: wait``), or as a stream of events."""
        if self.request.offer == EVENTS:
            return streamed(self._stream())
        view = views.progress(self.record)
        headers = {}
        known = self.request.headers.get("If-None-Match")
        wait = self.preferred_wait()
        if wait is not None:
            headers["Preference-Applied"] = f"wait={wait}"
            if known is None or _matches(known, views.etag(view)):
                view = views.progress(await self.services.watcher.next(self.record, wait))
        headers["ETag"] = views.etag(view)
        if known is not None and _matches(known, headers["ETag"]):
            return Answer(status=304, headers=headers)
        return Answer(view, 200, headers, "job")

    async def _stream(self) -> AsyncIterator[bytes]:
        record = self.record
        while True:
            view = views.progress(record)
            tag = views.etag(view).strip('"')
            yield event("progress", tag, codec.dumps(view))
            if record.terminal:
                return
            while (after := await self.services.watcher.next(record, COMMENT_EVERY)) is record:
                yield COMMENT
            record = after


def _matches(header: str, tag: str) -> bool:
    """Return whether an If-None-Match header names this tag, by the weak comparison."""
    return header.strip() == "*" or tag in {part.strip().removeprefix("W/") for part in header.split(",")}


class Info(OfJob):
    """Progress and what happened so far."""

    name = "info"
    url = "/jobs/{uuid}/info"
    responses = {"GET": {200: ("progress and the newest events, warnings and errors", "Info")}}

    async def get(self) -> Answer:
        """Show the newest hundred of each level."""
        newest, dropped = await self.off_loop(self.manager.newest_events, self.record.uuid)
        return Answer(views.info(self.record, newest, dropped), page="info")


class Events(OfJob):
    """All that a job said."""

    name = "events"
    url = "/jobs/{uuid}/events"
    offers = (JSON, HTML, EVENTS)
    parameters = {
        "GET": (
            Parameter("level", chosen("event", "warning", "error"),
                      {"type": "string", "enum": ["event", "warning", "error"]}, "only entries of this level"),
            LIMIT,
            CURSOR,
        )
    }  # fmt: skip
    responses = {"GET": {200: ("a page of events, oldest first", "Events")}}

    async def get(self) -> Answer:
        """Page through the log of the job's events."""
        level = self.request.query["level"]
        if self.request.offer == EVENTS:
            return self.services.streams.answer(self._stream(level))
        scope = f"events/{self.record.uuid}?level={level}"
        page = await self.off_loop(self._read, level, scope)
        filters = {} if level is None else {"level": level}
        return await collection(self, page, list(page.items), filters, scope, "events")

    def _read(self, level: str | None, scope: str) -> Page:
        cursor = self.request.query["cursor"]
        after = 0 if cursor is None else self.manager.read_cursor(cursor, scope)
        return self.manager.events(self.record.uuid, level, after, self.request.query["limit"])

    async def _stream(self, level: str | None) -> AsyncIterator[bytes]:
        """Yield what the job says from now on, or after ``Last-Event-ID``, a page at a time, until it has ended."""
        known = self.request.headers.get("Last-Event-ID", "")
        after = int(known) if re.fullmatch("[0-9]{1,15}", known) else await self.off_loop(self._last)
        yield event("change", after, b"[]")
        silent = 0.0
        while True:
            ended = self.record.terminal
            page = await self.off_loop(self.manager.events, self.record.uuid, level, after, 100)
            if page.items:
                after, silent = page.items[-1]["number"], 0.0
                yield event("change", after, codec.dumps(page.items))
                continue
            if ended:
                return
            self.record = await self.services.watcher.next(self.record, EVERY)
            silent += EVERY
            if silent >= COMMENT_EVERY:
                silent = 0.0
                yield COMMENT

    def _last(self) -> int:
        return self.manager.last_event(self.record.uuid)


class Data(OfJob):
    """The output of a job."""

    name = "data"
    url = "/jobs/{uuid}/data"
    offers = ANY
    responses = {
        "GET": {
            200: ("the bytes, with the media type of the output", "Bytes"),
            202: ("it has not finished; Retry-After says when to ask again", "Progress"),
            204: ("it has no data", None),
            206: ("the range of bytes that was asked for", "Bytes"),
            304: ("nothing has changed", None),
            409: ("it failed or was cancelled", "Problem"),
            416: ("the range lies outside the data", "Problem"),
        }
    }

    async def get(self) -> Answer:
        """Send the bytes as they were written, a piece at a time."""
        record = self.record
        match record.state:
            case State.SUCCEEDED:
                return Answer(status=204) if record.result is None else self._bytes(record.result)
            case State.FAILED:
                raise _failed(record)
            case State.CANCELLED:
                raise JobCancelled(record.message or "", resultCode=record.result_code)
        return Answer(views.progress(record), 202, {"Retry-After": _RETRY_AFTER}, "job", self._readable())

    def _readable(self) -> str:
        return HTML if choose(self._accept(), (JSON, HTML)) == HTML else JSON

    def _accept(self) -> str:
        return self.request.headers.get("Accept", "")

    def _bytes(self, result: Result) -> Answer:
        if choose(self._accept(), (result.media_type,)) is None:
            raise NotAcceptable(f"the data are {result.media_type}", offers=[result.media_type])
        tag = f'"{self.record.uuid}-{self.record.attempt}"'
        name = f"{self.record.uuid}.{views.extension(result.media_type)}"
        headers = {
            "ETag": tag,
            "Accept-Ranges": "bytes",
            "Content-Disposition": f'attachment; filename="{name}"',
            "Vary": "Accept",
        }
        known = self.request.headers.get("If-None-Match")
        if known is not None and _matches(known, tag):
            return Answer(status=304, headers=headers)
        start, stop, partial = self._range(result.size, tag)
        headers["Content-Length"] = str(stop - start)
        if partial:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{result.size}"
        pieces = self._pieces(self.manager.open_data(result, start, stop), stop - start)
        return Answer(None, 206 if partial else 200, headers, media_type=result.media_type, stream=pieces)

    def _range(self, size: int, tag: str) -> tuple[int, int, bool]:
        """Return the bytes that are asked for: one range is served, several or unreadable ones are the whole."""
        header = self.request.headers.get("Range")
        condition = self.request.headers.get("If-Range")
        match = _RANGE.fullmatch(header.strip()) if header is not None else None
        if match is None or match.group() == "bytes=-" or (condition is not None and condition.strip() != tag):
            return 0, size, False
        first, last = match.groups()
        if first == "":
            start, stop = max(0, size - int(last)), size
        else:
            start, stop = int(first), min(size, int(last) + 1) if last else size
            if last and int(last) < start:
                return 0, size, False
        if start >= stop:
            error = RangeNotSatisfiable(f"the data have {size} bytes")
            error.headers["Content-Range"] = f"bytes */{size}"
            raise error
        return start, stop, True

    async def _pieces(self, pieces: Iterator[bytes], length: int) -> AsyncIterator[bytes]:
        sent = 0
        while (piece := await self.off_loop(next, pieces, None)) is not None:
            sent += len(piece)
            yield piece
        if sent != length:
            raise NotFound(f"{length - sent} bytes of the data of job {self.record.uuid} are missing")


def _failed(record: JobRecord) -> JobFailed:
    error = JobFailed(record.message or "", resultCode=record.result_code)
    if record.reason and record.reason not in ("exception", "failed", "retry"):
        error.code = record.reason
    return error


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


async def type_view(endpoint: Endpoint, name: str, host: str) -> dict[str, Any]:
    """Return a job type with its queue; the queue is null while it is away."""
    stats = None
    if not endpoint.manager.queue_away:
        stats = await endpoint.off_loop(endpoint.manager.queue_stats_or_none, name)
    pause = (await endpoint.off_loop(endpoint.manager.pauses)).get(name)
    shown = asdict(pause) if pause is not None else None
    return views.job_type(endpoint.services.registry.describe(name), host, stats, shown)
