"""The endpoints of agents that speak HTTP alone: assignments, how attempts go, what they make, how they end."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field

from zerog import codec, views
from zerog.attempts import Report, Settlement, Upload
from zerog.exceptions import (
    AlreadyFinished,
    InternalError,
    InvalidParameter,
    InvalidParameters,
    StateConflict,
    Superseded,
    TooBusy,
    UnknownJob,
    UnknownResource,
    UnsupportedMediaType,
    ZerogError,
)
from zerog.job import is_media_type
from zerog.manager import Held
from zerog.outcome import Cancelled, Crashed, Failed, GivenBack, Outcome, Requeued, Succeeded
from zerog.questions import answered
from zerog.record import Event, JobRecord
from zerog.server.agents import AgentAssignments, Body, Moment, OfAgent, Seconds, Uuid, fault
from zerog.server.collection import OfJob
from zerog.server.endpoint import BYTES, JSON, NO_SUCH_JOB, WAIT, Answer, header
from zerog.server.reserver import Delivered, Done, Round, Waiting
from zerog.server.run import hidden
from zerog.turn import item_uuid

_ATTEMPT = re.compile(r"[1-9][0-9]{0,9}", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/(\*|[0-9]{1,18})", re.ASCII)
_REASON = r"^[a-z][a-z0-9_]{0,39}$"

#: What one turn may carry, and how many assignments it may ask for: each needs a connection to the queue.
_ITEMS, _WANT = 1000, 100

AttemptNumber = Annotated[int, Field(ge=1, le=9_999_999_999)]

#: Events that one request may carry, and bytes of a piece of data.
_EVENTS = 1000
_PIECE = 4 * 1024 * 1024
#: Bytes that are gathered before they are written.
_GATHERED = 1024 * 1024
_MAX_TEXT = 16 * 1024
_MAX_MESSAGE = 1000
_MAX_STATE = 64 * 1024

_ENDED = (AlreadyFinished, Superseded, StateConflict, UnknownResource)


class EventBody(Body):
    """Something that an attempt says; ``at`` is when, by default now."""

    level: Literal["event", "warning", "error"] = "event"
    message: Annotated[str, Field(max_length=1_000_000)]
    code: Annotated[int, Field(ge=-(2**53), lt=2**53)] | None = None
    at: Moment | None = None
    source: Literal["stdout", "stderr"] | None = None


class DroppedBody(Body):
    """How much was said and not sent."""

    events: Annotated[int, Field(ge=0, lt=2**53)] = 0
    bytes: Annotated[int, Field(ge=0, lt=2**53)] = 0


class ReportBody(Body):
    """How an attempt goes.  ``batch`` numbers the events: one that was written before is ignored."""

    completeness: float | None = None
    message: str | None = None
    events: Annotated[list[EventBody], Field(max_length=_EVENTS)] = Field(default_factory=list)
    checkpoint: Any = None
    batch: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    dropped: DroppedBody = Field(default_factory=DroppedBody)

    def report(self, uuid: str, attempt: int, now: float) -> Report:
        """Return it as the master takes it; ``InvalidParameters`` for a checkpoint that is too large."""
        kept: tuple[Any, ...] = ()
        if "checkpoint" in self.model_fields_set:
            check_state(self.checkpoint, "/checkpoint")
            kept = (self.checkpoint,)
        return Report(
            uuid,
            attempt,
            None if self.completeness is None else min(1.0, max(0.0, self.completeness)),
            None if self.message is None else _cut(self.message, _MAX_MESSAGE),
            tuple(_event(one, now) for one in self.events),
            kept,
            self.batch,
            (self.dropped.events, self.dropped.bytes),
        )


class ErrorBody(Body):
    """What went wrong with an attempt."""

    message: str
    traceback: str | None = None
    code: Annotated[int, Field(ge=400, le=599)] | None = None


class OutcomeBody(ReportBody):
    """What an attempt came to, with what it had not reported yet.

    ``data`` and ``code`` belong to a success, ``error``, ``final``, ``delay`` (seconds) and ``reason`` to a failure,
    ``delay`` and ``state`` to a requeue, ``started`` (whether its code may have begun) to what is given back; ``told``
    says that its code knew of a cancel.
    """

    outcome: Literal["succeeded", "failed", "requeued", "cancelled", "crashed", "givenBack"]
    data: Any = None
    code: Annotated[int, Field(ge=200, le=599)] | None = None
    error: ErrorBody | None = None
    final: bool = False
    delay: Seconds | None = None
    state: Any = None
    reason: Annotated[str, Field(pattern=_REASON)] | None = None
    told: bool = False
    started: bool = True

    def check(self) -> None:
        """Raise ``InvalidParameters`` for members that do not belong to this outcome, and codes that are not its."""
        allowed = {
            "succeeded": {"data", "code"},
            "failed": {"code", "error", "final", "delay", "reason"},
            "requeued": {"delay", "state"},
            "cancelled": {"reason"},
            "crashed": {"error", "reason"},
            "givenBack": {"started", "reason"},
        }[self.outcome]
        own = {"data", "code", "error", "final", "delay", "state", "reason", "started"}
        strange = sorted((self.model_fields_set & own) - allowed)
        faults = [fault(f"/{name}", f"it does not belong to the outcome {self.outcome}") for name in strange]
        right = range(200, 300) if self.outcome == "succeeded" else range(400, 600)
        if self.code is not None and self.code not in right:
            faults.append(fault("/code", f"the code of {self.outcome} is {right[0]} to {right[-1]}", "range"))
        if faults:
            raise InvalidParameters(faults)
        if self.outcome == "requeued":
            check_state(self.state, "/state")

    def made(self) -> Outcome:
        """Return the outcome."""
        error = self.error
        match self.outcome:
            case "succeeded":
                return Succeeded(None, self.code or 200)
            case "requeued":
                return Requeued(self.delay or 0.0, self.state)
            case "cancelled":
                return Cancelled()
            case "crashed":
                return Crashed(_cut(error.message) if error is not None else "the process of the attempt has ended")
            case "givenBack":
                return GivenBack(self.started)
        code = self.code or (error.code if error is not None else None) or 500
        message = _cut(error.message) if error is not None else "the attempt failed"
        trace = _cut(error.traceback) if error is not None and error.traceback is not None else None
        return Failed(message, self.reason or "exception", code, trace, self.final, self.delay)


def _cut(text: str, limit: int = _MAX_TEXT) -> str:
    """Return a text as far as it is kept."""
    return text if len(text) <= limit else text[:limit] + f"… [cut, {len(text)} characters]"


def _event(one: EventBody, now: float) -> Event:
    return Event(one.at if one.at is not None else now, one.level, _cut(one.message), one.code, source=one.source)


def check_state(state: Any, pointer: str) -> None:
    """Raise ``InvalidParameters`` for a state that is too large to be kept."""
    size = len(codec.canonical(state))
    if size > _MAX_STATE:
        raise InvalidParameters([fault(pointer, f"the state of a job has {_MAX_STATE} bytes at most", "length")])


class AgentWork(AgentAssignments):
    """What an agent answers for now, and how it is given more."""

    role: ClassVar = {"POST": "agent"}
    takes_json = ("POST",)
    responses = {
        **AgentAssignments.responses,
        "POST": {201: ("an attempt is begun", "Assignment"), 204: ("there is nothing for it now", None)},
    }
    headers: ClassVar = {"POST": (WAIT,)}
    problems: ClassVar = {"POST": (TooBusy,)}

    async def find(self) -> None:
        """Read the record; who asks for more is looked at where it is given."""
        if self.request.method == "POST":
            self.agent_id = self.id
        else:
            await super().find()

    async def post(self) -> Answer:
        """Be given the next job that fits, at once or within ``Prefer: wait``."""
        self._check_empty()
        await self.note()
        wait = self.preferred_wait()
        headers = {} if wait is None else {"Preference-Applied": f"wait={wait}"}
        held = await self.as_asked(self._next(wait or 0))
        if held is None:
            return Answer(status=204, headers=headers)
        record = held.record
        headers["Location"] = f"{views.job_href(record.uuid)}/attempts/{record.attempt}"
        answer = Answer(views.given(record, self.manager.lease), 201, headers, "assignment")
        answer.undelivered = lambda: self.services.master.give_back(held)
        return answer

    def _check_empty(self) -> None:
        parsed = codec.parse(self.request.body)
        if parsed:
            raise InvalidParameters(fault(f"/{name}", "there is no such parameter", "unknown_field") for name in parsed)

    async def _next(self, wait: int) -> Held | None:
        """Wait for what the reserver has for this agent."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Delivered] = loop.create_future()

        def take(what: Delivered) -> None:
            if not future.done():
                future.set_result(what)

        def deliver(what: Delivered) -> None:
            loop.call_soon_threadsafe(take, what)

        principal = self.request.principal
        types = principal.types if principal is not None and principal.types else None
        # Without a wait it gets a moment: the queue must be asked.
        until = self.services.clock.monotonic() + max(wait, 0.25)
        waiting = Waiting(self.agent_id, types, until, deliver)
        reserver = self.services.reserver
        reserver.ask(waiting)
        self.request.when_gone.append(lambda: reserver.give_up(waiting))
        what = await future
        if isinstance(what, ZerogError):
            raise what
        if what is not None and self.request.gone:
            await self.off_loop(self.services.master.give_back, what)
            return None
        return what


T = TypeVar("T")


class ReportItem(ReportBody):
    """How one of many attempts goes."""

    uuid: Uuid
    attempt: AttemptNumber


class OutcomeItem(OutcomeBody):
    """What one of many attempts came to."""

    uuid: Uuid
    attempt: AttemptNumber


class TurnBody(Body):
    """How many attempts go and end, and how many more the agent wants of what is ready."""

    reports: Annotated[list[ReportItem], Field(max_length=_ITEMS)] = Field(default_factory=list)
    outcomes: Annotated[list[OutcomeItem], Field(max_length=_ITEMS)] = Field(default_factory=list)
    want: Annotated[int, Field(ge=0, le=_WANT)] = 0


class AgentTurn(OfAgent):
    """Much of what an agent has to say, in one request, and what comes next."""

    name = "turn"
    url = "/agents/{id}/turns"
    role: ClassVar = {"POST": "agent"}
    parameters: ClassVar = {"POST": TurnBody}
    responses = {
        "POST": {200: ("for each item a progress view or a problem, with its status; and assignments", "Turn")}
    }
    problems: ClassVar = {"POST": (TooBusy,)}

    async def find(self) -> None:
        """Take what the path names; that the agent is known is known for a moment."""
        self.agent_id = self.id
        if not self.manager.fleet.is_known(self.agent_id):
            await super().find()

    async def post(self, parameters: TurnBody) -> Answer:
        """Report and end attempts, each as its own request would, and be given up to ``want`` that are ready now."""
        now = self.services.clock.now()
        said: list[ReportItem | OutcomeItem] = [*parameters.reports, *parameters.outcomes]
        uuids = [one.uuid.lower() for one in said]
        unseen = set(await self.off_loop(hidden, self, uuids)) if self.limited else set()
        reports = [
            _located(f"/reports/{place}", partial(one.report, one.uuid.lower(), one.attempt, now))
            for place, one in enumerate(parameters.reports)
        ]
        outcomes = [
            _located(f"/outcomes/{place}", partial(_settlement, one, now))
            for place, one in enumerate(parameters.outcomes)
        ]
        items: list[Report | Settlement] = [*reports, *outcomes]
        seen = [one for one in items if item_uuid(one) not in unseen]
        done = await self._turn(seen, parameters.want)
        if isinstance(done, ZerogError):
            raise done
        if self.manager.ended_parents:
            self.services.hurry("release")
        verdicts = iter(done.results)
        shown = [_verdict(next(verdicts) if item_uuid(one) not in unseen else UnknownJob(NO_SUCH_JOB)) for one in items]
        lease = self.manager.lease
        body = {
            "reports": shown[: len(reports)],
            "outcomes": shown[len(reports) :],
            "assignments": [views.given(held.record, lease) for held in done.given],
            "href": self.request.uri,
        }
        answer = Answer(body, page="turn")
        answer.undelivered = partial(self._take_back, done.given)
        return answer

    def _take_back(self, given: Sequence[Held]) -> None:
        for held in given:
            self.services.master.give_back(held)

    async def _turn(self, items: Sequence[Report | Settlement], want: int) -> Done | ZerogError:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Done | ZerogError] = loop.create_future()

        def take(what: Done | ZerogError) -> None:
            if not future.done():
                future.set_result(what)

        def deliver(what: Done | ZerogError) -> None:
            loop.call_soon_threadsafe(take, what)

        principal = self.request.principal
        types = principal.types if principal is not None and principal.types else None
        round = Round(self.agent_id, types, items, want, deliver)

        def gone() -> None:
            round.gone = True

        self.request.when_gone.append(gone)
        self.services.reserver.turn(round)
        return await future


def _located(pointer: str, call: Callable[[], T]) -> T:
    """Read one of many items; what is wrong with it names its place."""
    try:
        return call()
    except InvalidParameters as error:
        raise InvalidParameters({**one, "pointer": f"{pointer}{one['pointer']}"} for one in error.errors) from error


def _settlement(body: OutcomeBody, now: float) -> Settlement:
    """Return an outcome as it is written; ``InvalidParameters`` for what cannot be."""
    body.check()
    assert isinstance(body, OutcomeItem)
    return settlement(body, body.uuid.lower(), body.attempt, now)


def settlement(body: OutcomeBody, uuid: str, attempt: int, now: float) -> Settlement:
    """Return an outcome as it is written.  The digest is of what was said of this attempt, and of nothing else."""
    data = None
    if body.outcome == "succeeded" and "data" in body.model_fields_set and body.data is not None:
        data = json.dumps(body.data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    said = [(name, getattr(body, name)) for name in sorted(body.model_fields_set - {"data", "uuid", "attempt"})]
    digest = hashlib.blake2b(repr((said, data)).encode("utf-8", "replace"), digest_size=9).hexdigest()
    keeps = body.outcome == "requeued" and "state" not in body.model_fields_set
    return Settlement(body.report(uuid, attempt, now), body.made(), digest, body.told, data, keeps)


def _verdict(done: JobRecord | Exception) -> dict[str, Any]:
    if isinstance(done, JobRecord):
        return {**views.progress(done), "status": 200}
    error = done if isinstance(done, ZerogError) else InternalError()
    return views.problem(error)


class OfAttempt(OfJob):
    """Base of what lies below one attempt: finds it."""

    job: str
    attempt: int
    role: ClassVar = {"POST": "agent", "PUT": "agent"}

    async def find(self) -> None:
        """Take what the path names.  The job is read where the attempt is checked; here only for limited tokens."""
        self.job = self.uuid()
        text = self.request.path["attempt"]
        if not _ATTEMPT.fullmatch(text):
            raise UnknownResource(f"job {self.job} has no such attempt")
        self.attempt = int(text)
        if self.limited:
            await super().find()


class Attempt(OfAttempt):
    """How an attempt goes."""

    name = "attempt"
    url = "/jobs/{uuid}/attempts/{attempt}"
    parameters: ClassVar = {"POST": ReportBody}
    responses = {"POST": {200: ("it is written, and the lease renewed", "Progress")}}
    problems: ClassVar = {"POST": _ENDED}

    async def post(self, parameters: ReportBody) -> Answer:
        """Report progress, events and a checkpoint; that also renews the lease."""
        report = parameters.report(self.job, self.attempt, self.services.clock.now())
        record = await self.services.attempts(report)
        if record.agent is not None and self.services.master.is_due(record.agent):
            await self.off_loop(self.services.master.note, record.agent)
        return Answer(views.progress(record), page="job")


class AttemptOutcome(OfAttempt):
    """How an attempt ends."""

    name = "outcome"
    url = "/jobs/{uuid}/attempts/{attempt}/outcome"
    parameters: ClassVar = {"POST": OutcomeBody}
    responses = {"POST": {200: ("it is written; the same once more changes nothing", "Progress")}}
    problems: ClassVar = {"POST": _ENDED}

    async def post(self, parameters: OutcomeBody) -> Answer:
        """Say what the attempt came to; nothing is written for it afterwards."""
        parameters.check()
        now = self.services.clock.now()
        record = await self.services.attempts(settlement(parameters, self.job, self.attempt, now))
        if record.needs and record.agent is not None:
            self.services.reserver.poke(record.agent)
        if self.manager.ended_parents:
            self.services.hurry("release")
        return Answer(views.progress(record), page="job")


class AttemptData(OfAttempt):
    """What an attempt makes."""

    name = "attempt data"
    url = "/jobs/{uuid}/attempts/{attempt}/data"
    offers = (JSON,)
    streamed: ClassVar = ("PUT",)
    responses = {"PUT": {204: ("it is kept, and seen when the outcome is written; the last one wins", None)}}
    headers: ClassVar = {
        "PUT": (
            header("Content-Type", "the media type of what it made; of any size"),
            header("Content-Range", "bytes FIRST-LAST/TOTAL: one piece of it, * for a total that is not known yet"),
        )
    }
    problems: ClassVar = {"PUT": (*_ENDED, UnsupportedMediaType)}
    upload: Upload | None = None
    piece: tuple[int, int, int | None] | None = None

    async def begin(self) -> None:
        """Find out what comes."""
        self.gathered = bytearray()
        self.media_type = self.request.headers.get("Content-Type", BYTES).strip()
        if not is_media_type(self.media_type):
            raise UnsupportedMediaType("the Content-Type is no media type")
        if self.request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise UnsupportedMediaType("a body with a Content-Encoding is not accepted")
        text = self.request.headers.get("Content-Range")
        if text is None:
            attempts, uuid = self.services.master.attempts, self.job
            self.upload = await self.off_loop(attempts.upload, uuid, self.attempt, self.media_type)
            return
        match = _CONTENT_RANGE.fullmatch(text.strip())
        total = None if match is None or match.group(3) == "*" else int(match.group(3))
        if match is None or (total is not None and int(match.group(2)) + 1 != total):
            raise InvalidParameter("Content-Range", "it must be bytes FIRST-LAST/TOTAL; a TOTAL ends it")
        self.piece = (int(match.group(1)), int(match.group(2)), total)
        await self.off_loop(self.services.master.attempts.check_attempt, self.job, self.attempt)

    async def receive(self, piece: bytes) -> None:
        """Take some bytes."""
        self.gathered += piece
        if self.piece is not None:
            if len(self.gathered) > _PIECE:
                raise InvalidParameter("Content-Range", f"a piece has {_PIECE} bytes at most")
        elif len(self.gathered) >= _GATHERED:
            assert self.upload is not None
            data, self.gathered = bytes(self.gathered), bytearray()
            await self.off_loop(self.upload.write, data)

    async def put(self) -> Answer:
        """Keep what the attempt made; its end makes it seen."""
        if self.upload is not None:
            await self.off_loop(self._close, self.upload, bytes(self.gathered))
            self.upload = None
            return Answer(status=204)
        assert self.piece is not None
        first, last, total = self.piece
        if len(self.gathered) != last + 1 - first:
            raise InvalidParameter("Content-Range", f"{len(self.gathered)} bytes have come")
        put = self.services.master.attempts.put_piece
        await self.off_loop(put, self.job, self.attempt, self.media_type, first, bytes(self.gathered), total)
        return Answer(status=204)

    @staticmethod
    def _close(upload: Upload, rest: bytes) -> None:
        upload.write(rest)
        upload.close()

    async def abandon(self) -> None:
        """Leave nothing of what did not come whole."""
        upload, self.upload = self.upload, None
        if upload is not None:
            await self.off_loop(upload.abandon)


class QuestionBody(Body):
    """What a running job asks: who its parents are, bytes of the data of one, to publish a message, or for a document.

    ``write`` names a write of a document: the same once more is made once.
    """

    question: Literal["parents", "read", "publish", "document"]
    verb: Literal["get", "insert", "replace", "remove"] | None = None
    cas: int | None = None
    write: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    uuid: Uuid | None = None
    start: Annotated[int, Field(ge=0, lt=2**53)] = 0
    topic: str | None = None
    key: str | None = None
    value: Any = None


class AttemptQuestions(OfAttempt):
    """What a running job asks of the service."""

    name = "questions"
    url = "/jobs/{uuid}/attempts/{attempt}/questions"
    offers = (JSON, BYTES)
    parameters: ClassVar = {"POST": QuestionBody}
    responses = {"POST": {200: ("the answer: JSON, or bytes of the data of a parent", "Answer")}}
    problems: ClassVar = {"POST": _ENDED}

    async def post(self, parameters: QuestionBody) -> Answer:
        """Answer a question of the job's code."""
        record = await self.off_loop(self.services.master.attempts.check_attempt, self.job, self.attempt)
        asked = await self.off_loop(self._answered, record, parameters)
        if isinstance(asked, bytes):
            return Answer(asked, media_type=BYTES)
        asked.pop("number", None)
        asked.pop("t", None)
        return Answer(asked, media_type=JSON)

    def _answered(self, record: JobRecord, body: QuestionBody) -> dict[str, Any] | bytes:
        asked: dict[str, Any] = {"t": body.question, "number": 0, "start": body.start, "key": body.key}
        asked["uuid"] = body.uuid.lower() if body.uuid is not None else ""
        if body.question == "publish":
            if body.topic is None:
                raise InvalidParameters([fault("/topic", "it is required", "missing")])
            asked.update(topic=body.topic, value=json.dumps(body.value))
        if body.question == "document":
            missing = [name for name in ("verb", "key") if getattr(body, name) is None]
            missing += ["cas"] if body.verb == "replace" and body.cas is None else []
            if missing:
                raise InvalidParameters([fault(f"/{name}", "it is required", "missing") for name in missing])
            asked.update(verb=body.verb, cas=body.cas, write=body.write, value=json.dumps(body.value))
        return answered(self.manager, record, asked)
