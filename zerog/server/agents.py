"""The endpoints of agents: how they register and live, what they have, and what became of what they were given."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema

from zerog import codec, views
from zerog.exceptions import AgentAlive, Forbidden, InvalidParameters
from zerog.fleet import LOG_EXCEPTIONS, LOG_FAILURES, LOG_JOBS, STATES, AgentRecord, Assignment, is_id
from zerog.manager import Page
from zerog.manager.needing import limits_of
from zerog.master import Heard, Registration, room_of, unknown
from zerog.needs import LABEL, MAX_LABELS, Limits, is_cpus
from zerog.orders import Wanted
from zerog.server.collection import CURSOR, LIMIT, collection
from zerog.server.endpoint import Answer, Endpoint, Parameter, chosen, ranged
from zerog.server.run import parse_moment

#: Assignments, types and others that one agent may name.
_MANY = 10_000

#: Agents that a page of all assignments looks at.
_AGENTS = 100

_UUID = r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"

#: A line of text: no control characters.
Line = Annotated[str, StringConstraints(max_length=255, pattern=r"^[^\x00-\x1f\x7f]*$")]
JobType = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,99}$")]
Uuid = Annotated[str, StringConstraints(pattern=_UUID)]
Bytes = Annotated[int, Field(ge=0, lt=2**53)]
Cores = Annotated[float, Field(ge=0, le=100_000)]


def _text_moment(text: Any) -> float:
    """Read a time; a number, also as a text, is none."""
    if not isinstance(text, str):
        raise ValueError("a time as in RFC 3339, such as 2026-01-31T12:00:00Z")
    moment = parse_moment(text)
    if not 0 <= moment < 4_102_444_800:
        raise ValueError("a time from 1970 to 2100")
    return moment


#: A time as in RFC 3339, with its zone; read as seconds since 1970.
Moment = Annotated[float, BeforeValidator(_text_moment), WithJsonSchema({"type": "string", "format": "date-time"})]
Seconds = Annotated[float, Field(ge=0, le=31_536_000)]


class Body(BaseModel):
    """Base of the bodies that agents send."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class LimitsBody(Body):
    """How much of the machine may be given to jobs; what is not said is not limited."""

    ram: Bytes | None = None
    cpus: Cores | None = None


class AssignmentBody(Body):
    """An attempt that an agent answers for."""

    uuid: Uuid
    attempt: Annotated[int, Field(ge=1, le=9_999_999_999)]


class DiskBody(Body):
    """The disk of the host, in bytes."""

    total: Bytes
    free: Bytes


class IoBody(Body):
    """What the agent and its children have read and written, in bytes."""

    readBytes: Bytes
    writeBytes: Bytes


class UsageBody(Body):
    """What the agent uses: bytes, cores; ``load`` and ``disk`` are those of the host."""

    ram: Bytes | None = None
    cpu: Annotated[float, Field(ge=0, le=1_000_000)] | None = None
    load: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=3, max_length=3)] | None = None
    disk: DiskBody | None = None
    io: IoBody | None = None


class AgentBody(Body):
    """What an agent says of itself; members that are absent stay as they were."""

    id: Line
    hostname: Line | None = None
    version: Line | None = None
    jobTypes: Annotated[list[JobType], Field(max_length=1000)] | None = None
    labels: Annotated[list[Line], Field(max_length=MAX_LABELS)] | None = None
    cpus: Cores | None = None
    ram: Bytes | None = None
    limits: LimitsBody | None = None
    usage: UsageBody | None = None
    state: Literal["running", "draining", "drained", "retired", "offline"] = "running"
    assignments: Annotated[list[AssignmentBody], Field(max_length=_MANY)] | None = None
    instance: Line | None = None

    def registration(self) -> Registration:
        """Return it as the master takes it; ``InvalidParameters`` for what cannot be."""
        faults = list(self._faults())
        if faults:
            raise InvalidParameters(faults)
        limits = None if self.limits is None else Limits(self.limits.ram, self.limits.cpus)
        return Registration(
            id=self.id,
            instance=self.instance,
            hostname=self.hostname,
            version=self.version,
            job_types=None if self.jobTypes is None else tuple(dict.fromkeys(self.jobTypes)),
            labels=None if self.labels is None else tuple(sorted(set(self.labels))),
            has=Limits(self.ram, self.cpus),
            limits=limits,
            usage=None if self.usage is None else self.usage.model_dump(mode="json"),
            state=self.state,
            assignments=None
            if self.assignments is None
            else tuple(Assignment(one.uuid.lower(), one.attempt, 0.0) for one in self.assignments),
        )

    def _faults(self) -> Any:
        if not is_id(self.id):
            yield fault("/id", "it must match [A-Za-z0-9][A-Za-z0-9._-]{0,99}, and not be commands")
        for place, label in enumerate(self.labels or ()):
            if not LABEL.fullmatch(label):
                yield fault(f"/labels/{place}", f"it must match {LABEL.pattern}")
        cores = {"/cpus": self.cpus, "/limits/cpus": self.limits.cpus if self.limits is not None else None}
        for pointer, value in cores.items():
            if value is not None and not is_cpus(value):
                yield fault(pointer, "cores are given to a thousandth")


def fault(pointer: str, detail: str, code: str = "invalid") -> dict[str, Any]:
    """Return one fault of a body."""
    return {"pointer": pointer, "code": code, "detail": detail}


class OfAgent(Endpoint):
    """Base of what lies below one agent: finds it."""

    record: AgentRecord

    @property
    def id(self) -> str:
        """The id in the path; what can be none is an unknown agent like any other."""
        text = self.request.path["id"]
        if not is_id(text):
            raise unknown(text)
        return text

    async def find(self) -> None:
        """Read the record."""
        found = await self.off_loop(self.manager.fleet.get, self.id)
        if found is None:
            raise unknown(self.id)
        self.record = found

    async def note(self) -> None:
        """Note that the agent itself has spoken."""
        if self.services.master.is_due(self.id):
            await self.off_loop(self.services.master.note, self.id)


def shown_agent(endpoint: Endpoint, record: AgentRecord, state: str, wanted: Wanted | None = None) -> dict[str, Any]:
    """Return an agent as whoever asks may see it.  Reads the store unless ``wanted`` is known."""
    wanted = endpoint.services.master.wanted(record.id) if wanted is None else wanted
    view = views.agent(record, state, limits_of(record, wanted), room_of(record, wanted))
    return {**view, "jobTypes": [name for name in view["jobTypes"] if endpoint.sees(name)]}


class Agents(Endpoint):
    """The agents."""

    name = "agents"
    url = "/agents"
    role: ClassVar = {"POST": "agent"}
    parameters: ClassVar = {
        "GET": (
            Parameter("minRam", ranged("minRam", 0, 2**53 - 1), {"type": "integer", "minimum": 0},
                      "only agents that may give this many bytes"),
            Parameter("jobType", str, {"type": "string"}, "only agents that serve this type"),
            Parameter("state", chosen(*STATES), {"type": "string", "enum": list(STATES)},
                      "only agents in this state"),
            LIMIT,
            CURSOR,
        ),
        "POST": AgentBody,
    }  # fmt: skip
    responses = {
        "GET": {200: ("a page of agents, the newest first", "Agents")},
        "POST": {200: ("it is known", "Registered"), 201: ("it is new", "Registered")},
    }
    problems: ClassVar = {"POST": (AgentAlive,)}

    async def get(self) -> Answer:
        """Show the agents that ever spoke, the newest first."""
        query = self.request.query
        filters = {name: str(query[name]) for name in ("minRam", "jobType", "state") if query[name] is not None}
        scope = f"agents?{sorted(filters.items())}"
        page = await self.off_loop(self._read, scope)
        return await collection(self, page, list(page.items), filters, scope, "agents")

    def _read(self, scope: str) -> Page:
        query, fleet = self.request.query, self.manager.fleet
        cursor = query["cursor"]
        before = None if cursor is None else self.manager.read_cursor(cursor, scope)
        records, following = fleet.page(before, query["limit"])
        wanted = self.services.master.orders.wanted_of([one.id for one in records])
        shown = []
        for one in records:
            state = fleet.state(one)
            if state in ("retired", "offline"):
                one = self.services.master.verified(one)  # what it had may run elsewhere, and it will not say so
            if self._is_asked_for(one, state, limits_of(one, wanted[one.id])):
                shown.append(shown_agent(self, one, state, wanted[one.id]))
        return Page(shown, following)

    def _is_asked_for(self, record: AgentRecord, state: str, limits: Limits) -> bool:
        query = self.request.query
        job_type = query["jobType"]
        fits = job_type is None or (job_type in record.job_types and self.sees(job_type))
        enough = query["minRam"] is None or query["minRam"] <= (limits.ram or 0)
        return fits and enough and query["state"] in (None, state)

    async def post(self, parameters: AgentBody) -> Answer:
        """Register an agent, or hear that it lives: it says what it has and what it answers for."""
        news = parameters.registration()
        if self.limited:
            await self.off_loop(check_speaks_for, self, news.id)
            seen = None if news.job_types is None else tuple(one for one in news.job_types if self.sees(one))
            news = replace(news, job_types=seen)  # it will be given no others
        heard = await self.off_loop(self._hear, news)
        view = await self.off_loop(self._registered, heard)
        return Answer(view, 201 if heard.new else 200, {"Location": views.agent_href(heard.record.id)}, "agent")

    def _hear(self, news: Registration) -> Heard:
        heard = self.services.master.hear(news)
        self.services.reserver.poke(news.id)
        return heard

    def _registered(self, heard: Heard) -> dict[str, Any]:
        record = heard.record
        return {
            **shown_agent(self, record, self.manager.fleet.state(record), heard.wanted),
            "heartbeat": self.services.master.heartbeat,
            "drained": heard.wanted.drained,
            "last": heard.wanted.last,
            "talkback": [views.command(record.id, one) for one in heard.wanted.pending],
            "superseded": [{"uuid": uuid, "attempt": attempt} for uuid, attempt in heard.superseded],
        }


class Agent(OfAgent):
    """One agent."""

    name = "agent"
    url = "/agents/{id}"
    role: ClassVar = {"DELETE": "agent"}
    responses = {
        "GET": {200: ("what it says of itself, and what became of what it was given", "Agent")},
        "DELETE": {204: ("it is forgotten, and what it had goes on elsewhere", None)},
    }

    async def find(self) -> None:
        """Read the record; who is to be forgotten may be forgotten already."""
        if self.request.method != "DELETE":
            await super().find()

    async def get(self) -> Answer:
        """Show the agent."""
        return Answer(await self.off_loop(self._shown), page="agent")

    def _shown(self) -> dict[str, Any]:
        record = self.services.master.verified(self.record)
        return shown_agent(self, record, self.manager.fleet.state(record))

    async def delete(self) -> Answer:
        """Forget the agent: what it had is given back, and goes on elsewhere at once."""
        await self.off_loop(check_speaks_for, self, self.id)
        await self.off_loop(self.services.master.leave, self.id)
        return Answer(status=204)


def check_speaks_for(endpoint: Endpoint, id: str) -> None:
    """Refuse a limited token that would speak for an agent which serves types that do not exist for it."""
    record = endpoint.manager.fleet.get(id) if endpoint.limited else None
    if record is not None:
        check_sees_all(endpoint, record)


def check_sees_all(endpoint: Endpoint, record: AgentRecord) -> None:
    """Refuse a token for which not all types exist that an agent serves."""
    if not all(endpoint.sees(name) for name in record.job_types):
        raise Forbidden("the token does not allow all job types of this agent")


class OfHistory(OfAgent):
    """Base of what an agent keeps a log of."""

    log: ClassVar[str] = ""
    parameters: ClassVar = {"GET": (LIMIT, CURSOR)}

    async def get(self) -> Answer:
        """Page through it, the newest first."""
        scope = f"{self.log}/{self.record.id}"
        page = await self.off_loop(self._read, scope)
        return await collection(self, page, list(page.items), {}, scope, "history")

    def _read(self, scope: str) -> Page:
        cursor = self.request.query["cursor"]
        before = None if cursor is None else self.manager.read_cursor(cursor, scope)
        items, following = self.manager.fleet.kept(self.record.id, self.log, before, self.request.query["limit"])
        return Page(self._seen(items), following)

    def _seen(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [views.ended_attempt(one) for one in self._allowed(items)]

    def _allowed(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return those that are of jobs whose types exist for whoever asks."""
        if not self.limited:
            return items
        found = self.manager.get_many([one["uuid"] for one in items if one.get("uuid")])
        return [one for one in items if one.get("uuid") in found and self.sees(found[one["uuid"]].job_type)]


class AgentJobs(OfHistory):
    """The attempts that have ended on an agent."""

    name = "processed jobs"
    url = "/agents/{id}/jobs"
    log = LOG_JOBS
    responses = {"GET": {200: ("a page of attempts that ended there, the newest first", "EndedAttempts")}}


class AgentFailures(OfHistory):
    """The attempts that have failed on an agent."""

    name = "last failures"
    url = "/agents/{id}/failures"
    log = LOG_FAILURES
    responses = {"GET": {200: ("a page of attempts that failed there, the newest first", "EndedAttempts")}}


class ExceptionBody(Body):
    """An unhandled exception of an agent itself."""

    type: Annotated[str, Field(min_length=1, max_length=255)]
    message: Annotated[str, Field(max_length=16_384)]
    traceback: Annotated[str, Field(max_length=65_536)] | None = None
    uuid: Uuid | None = None


class AgentExceptions(OfHistory):
    """The unhandled exceptions of an agent itself."""

    name = "exceptions"
    url = "/agents/{id}/exceptions"
    log = LOG_EXCEPTIONS
    role: ClassVar = {"POST": "agent"}
    parameters: ClassVar = {"GET": (LIMIT, CURSOR), "POST": ExceptionBody}
    responses = {
        "GET": {200: ("a page of them, the newest first", "AgentExceptions")},
        "POST": {201: ("it is kept", "AgentException")},
    }

    async def post(self, parameters: ExceptionBody) -> Answer:
        """Keep an exception that nobody has foreseen."""
        check_sees_all(self, self.record)
        said = {
            "type": codec.printable(parameters.type, 255),
            "message": parameters.message,
            "traceback": parameters.traceback,
            "uuid": parameters.uuid.lower() if parameters.uuid is not None else None,
        }
        kept = await self.off_loop(self.services.master.complain, self.record.id, said)
        return Answer(kept, 201, page="history")

    def _seen(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [] if self.limited else items


class AgentAssignments(OfAgent):
    """What an agent answers for now, and how it is given more."""

    name = "assignments"
    url = "/agents/{id}/assignments"
    responses = {"GET": {200: ("the attempts that it answers for", "Assignments")}}

    async def get(self) -> Answer:
        """Show the current assignments of the agent."""
        items = await self.off_loop(current_assignments, self, [self.record])
        return Answer({"items": items, "next": None, "href": self.request.uri}, page="assignments")


class Assignments(Endpoint):
    """What all agents answer for now."""

    name = "all assignments"
    url = "/assignments"
    parameters: ClassVar = {"GET": (CURSOR,)}
    responses = {"GET": {200: ("a page of attempts, those of the newest agents first", "Assignments")}}

    async def get(self) -> Answer:
        """Show the current assignments of all agents."""
        page = await self.off_loop(self._read)
        return await collection(self, page, list(page.items), {}, "assignments", "assignments")

    def _read(self) -> Page:
        cursor = self.request.query["cursor"]
        before = None if cursor is None else self.manager.read_cursor(cursor, "assignments")
        records, following = self.manager.fleet.page(before, _AGENTS)
        return Page(current_assignments(self, records), following)


def current_assignments(endpoint: Endpoint, agents: list[AgentRecord]) -> list[dict[str, Any]]:
    """Return what agents answer for, as far as the jobs' records say so too and whoever asks may see it."""
    held = endpoint.manager.get_many([one.uuid for agent in agents for one in agent.assignments])
    shown = []
    for agent in agents:
        for one in agent.assignments:
            record = held.get(one.uuid)
            if record is not None and is_current(record, agent.id, one.attempt) and endpoint.sees(record.job_type):
                shown.append(views.assignment(agent.id, one))
    return shown


def is_current(record: Any, agent: str, attempt: int) -> bool:
    """Return whether a job's record says that an agent runs this attempt of it."""
    return bool(record.state == "running" and record.attempt == attempt and record.agent == agent)
