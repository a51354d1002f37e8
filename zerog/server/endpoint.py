"""Endpoint: the base of every handler.  It has no rule about jobs and no rule about HTTP either: those are in ``door``.

An endpoint says what it is (name, URL, parameters, offers, role) and defines the methods that are valid for it:
``get``, ``post``, ``put``, ``patch``, ``delete``.  Each returns an ``Answer``, or the JSON to be shown, or raises a
``Problem``.  A coroutine runs in the event loop; a plain method runs in a thread of the pool, and may wait.

Applications have endpoints too: every subclass with a ``url`` in ``<application>.endpoints`` is served. ::

    class Range(pydantic.BaseModel):
        first: int = 0
        last: int

    class Sums(zerog.server.Endpoint):
        name = "sums"
        url = "/sums"
        parameters = Range      # the query of GET and DELETE, the body of the others; unknown members are refused

        def get(self, parameters: Range) -> dict:
            return {"sum": sum(range(parameters.first, parameters.last))}
"""

from __future__ import annotations

import hashlib
import math
import re
import uuid as uuids
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from zerog import codec
from zerog.asked import Documents
from zerog.attempts import Report, Settlement
from zerog.clock import Clock
from zerog.documents import OwnDocuments
from zerog.exceptions import Forbidden, InvalidParameter, InvalidParameters, UnknownJob, ZerogError
from zerog.manager import Manager, Submission, Submitted, uuid_of
from zerog.master import Master
from zerog.record import JobRecord
from zerog.registry import Registry, read_body
from zerog.server.lanes import Lane
from zerog.server.rates import Rates
from zerog.server.watcher import Watcher
from zerog.statistics import Statistics
from zerog.tokens import Token, Tokens
from zerog.topics import Topics

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from zerog.server.commands import Bell
    from zerog.server.live import Shared, Streams
    from zerog.server.reserver import Reserver

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

JSON = "application/json"
HTML = "text/html"
EVENTS = "text/event-stream"
PROBLEM = "application/problem+json"
BYTES = "application/octet-stream"

#: The same words for malformed and for unknown UUIDs.
NO_SUCH_JOB = "there is no job with this UUID"

#: The offers of an endpoint whose media type is the job's own.
ANY = ("*/*",)

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")

_UUID = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}", re.ASCII)
_KEY = re.compile(r"[\x21-\x7e]{1,255}", re.ASCII)
_PREFERENCE = re.compile(r"wait(?:=([0-9]{1,6}))?", re.ASCII)

#: Seconds that ``Prefer: wait`` can ask for at most.
MAX_WAIT = 60


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter in the query: how it is read (``ValueError`` says what would be right), and how it is described."""

    name: str
    parse: Callable[[str], Any]
    schema: Mapping[str, Any]
    description: str
    default: Any = None
    required: bool = False
    #: Whether it may stand several times: then its value is a tuple, in which nothing is twice.
    repeated: bool = False


class RunParameter:
    """A parameter in the query of ``POST /run/{jobType}`` that an application adds, in its module ``endpoints``."""

    name: ClassVar[str] = ""
    description: ClassVar[str] = ""
    schema: ClassVar[Mapping[str, Any]] = {"type": "string"}

    def parse(self, text: str) -> Any:
        """Read the value; ``ValueError`` says what would be right."""
        return text

    def parameter(self) -> Parameter:
        """Return how it is read and described."""
        return Parameter(self.name, self.parse, self.schema, self.description)

    def before(self, endpoint: Endpoint, value: Any, uuid: str) -> None:
        """Do what belongs to the job before it is stored, in a thread of the pool: the job may never come to be."""


@dataclass(slots=True)
class Answer:
    """What a method returns.

    ``body`` is JSON, shown as the page ``page`` to people, or bytes, which are sent as they are; ``stream`` gives bytes
    a piece at a time.  Bytes have the type ``media_type``, or the header Content-Type, or are of no type in particular.
    """

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    page: str = ""
    media_type: str | None = None
    stream: AsyncIterator[bytes] | None = None
    #: Called in a thread when it could not be sent.
    undelivered: Callable[[], object] | None = None
    #: What only the page shows.
    aside: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Services:
    """What endpoints stand on; one object in each server process."""

    manager: Manager
    master: Master
    registry: Registry
    clock: Clock
    submit: Lane[Submission, Submitted]
    #: How attempts go and end, from agents that speak HTTP alone; who hands out to them; who wakes those that wait for
    #: orders.
    attempts: Lane[Report | Settlement, JobRecord]
    reserver: Reserver
    bell: Bell
    #: Does some of the chores at once.
    hurry: Callable[..., None]
    read: Lane[str, JobRecord]
    pool: Executor
    #: The threads in which plain methods run, and those that ask whether the store is there.
    applications: Executor
    probes: Executor
    watcher: Watcher
    statistics: Statistics
    tokens: Tokens
    rates: Rates
    #: What waits by type, what runs, the newest jobs, and how many watch.
    queue: Shared[list[dict[str, Any]]]
    running: Shared[list[dict[str, Any]]]
    newest: Shared[list[dict[str, Any]]]
    streams: Streams
    max_body: int
    allowed_hosts: frozenset[str]
    #: Other origins whose pages may use the API.
    allowed_origins: frozenset[str] = frozenset()
    #: What ``/view_status`` shows of the settings, and every endpoint that is served.
    configuration: Mapping[str, Any] = field(default_factory=dict)
    endpoints: Sequence[type[Endpoint]] = ()
    #: Parameters of submits that applications have added.
    run_parameters: Sequence[RunParameter] = ()
    #: When this process began, as time and on the monotonic clock.
    started: tuple[float, float] = (0.0, 0.0)
    #: Requests whose bodies are on their way, with the monotonic time of their headers; and all that are not answered.
    arriving: dict[Any, float] = field(default_factory=dict)
    in_flight: set[Any] = field(default_factory=set)


@dataclass(slots=True)
class Request:
    """What a client asked: names from the path, headers, body, the chosen media type.

    ``query`` is what ``parameters`` made of the query, ``written`` the query as it was written; both are read after
    ``find``.
    """

    method: str
    path: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    offer: str
    uri: str
    host: str
    #: Whose token it carries; None where tokens are off, and at public endpoints for who has none.
    principal: Token | None = None
    query: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)
    #: Seconds for which it waited because the client had asked for that.
    waited: float = 0.0
    #: Whether the client has gone, and what is called when it goes.
    gone: bool = False
    when_gone: list[Callable[[], object]] = field(default_factory=list)


class Endpoint:
    """Base of every handler."""

    #: Human-readable name.
    name: ClassVar[str] = ""
    #: URL with the names of its parts in braces: ``/jobs/{uuid}``.
    url: ClassVar[str] = ""
    #: A model: what a method gets as its argument, from the query of GET and DELETE, else from the body, and from the
    #: parts of the URL that it has members for.  Or one for each method; or the parameters in the query, by method.
    parameters: ClassVar[type[BaseModel] | Mapping[str, type[BaseModel] | tuple[Parameter, ...]]] = {}
    #: The headers that a method heeds, for the description.
    headers: ClassVar[Mapping[str, tuple[Parameter, ...]]] = {}
    #: Media types that it offers, the preferred one first.
    offers: ClassVar[tuple[str, ...]] = (JSON, HTML)
    #: Methods whose body is read as JSON.
    takes_json: ClassVar[tuple[str, ...]] = ()
    #: Those of them whose body is any JSON value, and no object in particular.
    any_json: ClassVar[tuple[str, ...]] = ()
    #: The models of those bodies that are no parameters of a job.
    bodies: ClassVar[Mapping[str, type[BaseModel]]] = {}
    #: How many such bodies may come as one array; 0 for one alone.
    many: ClassVar[int] = 0
    #: Those of them that may come without a body.
    body_optional: ClassVar[tuple[str, ...]] = ()
    #: Methods whose bodies come a piece at a time, of any size and media type: ``begin``, ``receive`` for each piece,
    #: then the method; or ``abandon`` when it does not come whole.
    streamed: ClassVar[tuple[str, ...]] = ()
    #: Seconds without a byte after which such a body counts as broken off; may be set in ``begin``.
    body_idle: float | None = None
    #: The role that a token needs, or roles of which it needs one; without, read for GET and operate for the rest.
    role: ClassVar[str | Mapping[str, str | tuple[str, ...]] | None] = None
    #: Whether anybody may ask, also where tokens are on.
    public: ClassVar[bool] = False
    #: What the methods answer, for the description: method → status → (description, schema name).
    responses: ClassVar[Mapping[str, Mapping[int, tuple[str, str | None]]]] = {}
    #: The problems that the methods answer, beside those of every operation: errors, or a status and a code.
    problems: ClassVar[Mapping[str, Sequence[type[ZerogError] | tuple[int, str]]]] = {}

    @classmethod
    def model(cls, method: str) -> type[BaseModel] | None:
        """Return the model of a method's parameters, if they have one."""
        found = cls.parameters.get(method) if isinstance(cls.parameters, Mapping) else cls.parameters
        return found if isinstance(found, type) else None

    @classmethod
    def query_parameters(cls, method: str) -> tuple[Parameter, ...]:
        """Return the parameters in the query of a method, if they are not those of a model."""
        found = cls.parameters.get(method, ()) if isinstance(cls.parameters, Mapping) else ()
        return found if isinstance(found, tuple) else ()

    @classmethod
    def reads_json(cls, method: str) -> bool:
        """Return whether the body of a method is JSON."""
        return method in cls.takes_json or (cls.model(method) is not None and method not in ("GET", "DELETE"))

    def __init__(self, services: Services, request: Request, loop: AbstractEventLoop) -> None:
        self.services = services
        self.manager = services.manager
        self.request = request
        self._loop = loop

    @classmethod
    def methods(cls) -> tuple[str, ...]:
        """Return the methods that this endpoint defines."""
        return tuple(method for method in METHODS if callable(getattr(cls, method.lower(), None)))

    @classmethod
    def needed_roles(cls, method: str) -> tuple[str, ...]:
        """Return the roles of which a token needs one for a method."""
        reads = method in ("GET", "HEAD")
        own = cls.role.get("GET" if reads else method) if isinstance(cls.role, Mapping) else cls.role
        own = own or ("read" if reads else "operate")
        return (own,) if isinstance(own, str) else own

    @classmethod
    def allow(cls) -> str:
        """Return the value of the Allow header."""
        methods = cls.methods()
        return ", ".join([*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"])

    def known_parameters(self, method: str) -> tuple[Parameter, ...]:
        """Return the parameters in the query of a method, those of applications too."""
        return self.query_parameters(method)

    def run(
        self, job_type: str, parameters: Mapping[str, Any], key: str | None = None, uuid: str | None = None
    ) -> JobRecord:
        """Submit a job for whoever asks; returns its record, or that of the job that has the ``uuid`` already.  Waits
        for the store: not for coroutines.

        ``Forbidden`` if the token does not allow jobs of this type.
        """
        self.check_may_run(job_type)
        return self.manager.run(job_type, parameters, key, self.principal, uuid)

    def check_may_run(self, job_type: str) -> None:
        """Raise ``Forbidden`` for a job type that the token does not allow."""
        if not self.sees(job_type):
            raise Forbidden(f"the token does not allow jobs of the type {job_type}")

    @property
    def principal(self) -> str:
        """Whose idempotency keys those of the request are."""
        return self.request.principal.id if self.request.principal is not None else ""

    def idempotency_key(self) -> str | None:
        """Return the Idempotency-Key of the request."""
        key = self.request.headers.get("Idempotency-Key")
        if key is not None and not _KEY.fullmatch(key):
            raise InvalidParameter("Idempotency-Key", "it must be 1 to 255 visible ASCII characters")
        return key

    def keyed_uuid(self, scope: str) -> str:
        """Return the UUID for what a request makes: the same for the same Idempotency-Key of the same principal.

        ``scope`` tells what may have been made with one key in different places.
        """
        key = self.idempotency_key()
        return str(uuids.uuid4()) if key is None else uuid_of(self.principal, f"{self._application}:{scope}:{key}")

    @staticmethod
    def fingerprint(value: Any) -> str:
        """Return a digest of JSON, by which it is known whether a key was used for something else."""
        return hashlib.sha256(codec.canonical(value)).hexdigest()

    @classmethod
    def serving(cls, settings: Any) -> None:
        """Make ready when a server starts; ``settings`` are those of the application.  Called before any request."""

    async def begin(self) -> None:
        """Prepare for a body that comes a piece at a time; called after ``find``, before the first piece."""

    async def receive(self, piece: bytes) -> None:
        """Take a piece of such a body; the next one comes when this has been dealt with."""

    async def abandon(self) -> None:
        """Leave nothing of such a body: it does not come whole, or was refused."""

    async def find(self) -> None:
        """Find what the path names, or raise the 404; called before the query and the body are looked at."""

    @property
    def topics(self) -> Topics:
        """The topics of applications."""
        return self.manager.topics

    @property
    def documents(self) -> Documents:
        """The documents of the application that this endpoint belongs to."""
        return OwnDocuments(self.manager.store, self._application)

    @property
    def settings(self) -> Any:
        """The settings of the application that this endpoint belongs to, or None if it has none."""
        return self.services.registry.settings.get(self._application)

    @property
    def _application(self) -> str:
        return type(self).__module__.removesuffix(".endpoints")

    @property
    def limited(self) -> bool:
        """Whether some job types do not exist for whoever asks."""
        return self.request.principal is not None and bool(self.request.principal.types)

    def sees(self, job_type: str) -> bool:
        """Return whether jobs of a type exist for whoever asks."""
        return self.request.principal is None or self.request.principal.sees(job_type)

    async def off_loop(self, call: Callable[..., T], *arguments: Any, pool: Executor | None = None) -> T:
        """Call something that blocks in a thread of the pool: the one place where that is done."""
        return await self._loop.run_in_executor(pool or self.services.pool, call, *arguments)

    async def as_asked(self, wait: Awaitable[T]) -> T:
        """Wait for something because the client asked to: that time is none of the server's."""
        begun = self._loop.time()
        try:
            return await wait
        finally:
            self.request.waited += self._loop.time() - begun

    def uuid(self) -> str:
        """Return the UUID in the path in lower case; what is none is an unknown job like any other."""
        text = self.request.path["uuid"]
        if not _UUID.fullmatch(text):
            raise UnknownJob(NO_SUCH_JOB)
        return text.lower()

    def preferred_wait(self) -> int | None:
        """Return the seconds of ``Prefer: wait=N``, at most ``MAX_WAIT``, which ``wait`` alone asks for.

        None if it is absent or unreadable.
        """
        for part in re.split(r"[,;]", self.request.headers.get("Prefer", "")):
            match = _PREFERENCE.fullmatch(part.strip())
            if match:
                return min(MAX_WAIT, int(match.group(1) or MAX_WAIT))
        return None


def header(name: str, description: str) -> Parameter:
    """Return a header that a method heeds, for its description."""
    return Parameter(name, str, {"type": "string"}, description)


def invalid(pointer: str, code: str, detail: str) -> InvalidParameters:
    """Return the error for a fault in a body that the model does not find: 422 with its JSON pointer."""
    return InvalidParameters([{"pointer": pointer, "code": code, "detail": detail}])


WAIT = header("Prefer", "wait=N waits up to N seconds, at most 60, before it answers; wait alone for 60")


def ranged(name: str, low: int, high: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from ``low`` to ``high``, in ASCII digits only."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,20}", text, re.ASCII) or not low <= int(text) <= high:
            raise ValueError(f"a whole number from {low:,} to {high:,}")
        return int(text)

    parse.__name__ = name
    return parse


def chosen(*values: str) -> Callable[[str], str]:
    """Return a reader of one of ``values``."""

    def parse(text: str) -> str:
        if text not in values:
            raise ValueError("one of " + ", ".join(values))
        return text

    return parse


def read_query(pairs: list[tuple[str, str]], parameters: tuple[Parameter, ...]) -> dict[str, Any]:
    """Read the query by the endpoint's parameters; ``InvalidParameter`` for the first that is unknown or wrong."""
    known = {parameter.name: parameter for parameter in parameters}
    values = {parameter.name: parameter.default for parameter in parameters}
    seen: set[str] = set()
    for name, text in pairs:
        if name not in known:
            names = ", ".join(known) or "none"
            raise InvalidParameter(name[:100], f"there is no such parameter here; there are: {names}")
        if name in seen and not known[name].repeated:
            raise InvalidParameter(name, "it stands twice in the query")
        seen.add(name)
        try:
            value = known[name].parse(text)
        except ValueError as error:
            raise InvalidParameter(name, f"it must be {error}") from error
        values[name] = tuple(dict.fromkeys((*values[name], value))) if known[name].repeated else value
    return values


def read_model(model: type[M], request: Request, pairs: list[tuple[str, str]]) -> M:
    """Read the parameters of an application's endpoint; ``InvalidParameter`` in the query, else as for a job's body."""
    members = {member.alias or name: member for name, member in model.model_fields.items()}
    path = {name: text for name, text in request.path.items() if name in members}
    if request.method not in ("GET", "DELETE"):
        read_query(pairs, ())
        if not path:
            return read_body(model, request.body)
        return read_body(model, codec.canonical({**codec.parse(request.body), **path}))
    known = tuple(
        Parameter(name, str, {}, "", () if is_list(member) else None, repeated=is_list(member))
        for name, member in members.items()
        if name not in path
    )
    values = {name: given for name, given in read_query(pairs, known).items() if given not in (None, ())}
    try:
        read = model.model_validate({**values, **path}, strict=False)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        name = str(fault["loc"][0]) if fault["loc"] else "query"
        raise InvalidParameter(name[:100], str(fault["msg"])) from None
    for name, value in vars(read).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidParameter(name, "it must be a finite number")
    return read


def is_list(member: FieldInfo) -> bool:
    """Return whether a member of a model takes several values, and may stand several times in a query."""
    kinds = get_args(member.annotation) if get_origin(member.annotation) in (Union, UnionType) else [member.annotation]
    return any((get_origin(kind) or kind) in (list, tuple, set, frozenset) for kind in kinds)
