"""Registry: job type → Job class.  It builds, validates, and publishes the JSON Schema."""

from __future__ import annotations

import difflib
import importlib
import json
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import pydantic
from pydantic import BaseModel, SecretBytes, SecretStr

from zerog import codec
from zerog.consumer import FINISHED, Consumer, Topic
from zerog.exceptions import BadConsumer, BadJobType, BadSetting, InvalidParameters, UnknownType
from zerog.job import Job
from zerog.retry import Policy

M = TypeVar("M", bound=BaseModel)

#: How many faults of one set of parameters are listed.
MAX_FAULTS = 20

#: What stands where a secret is not shown.
REDACTED = "**********"


@dataclass(frozen=True, slots=True)
class Parameters:
    """Validated parameters with their defaults; ``secrets`` are the JSON pointers of those never to be shown."""

    values: dict[str, Any]
    secrets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Entry:
    job: type[Job]
    policy: Policy
    schema: dict[str, Any]
    has_secrets: bool
    application: str


@dataclass(frozen=True, slots=True)
class Follower:
    """A consumer, and the dotted name of the application that it belongs to."""

    consumer: type[Consumer]
    application: str


class Registry:
    """The job types, the consumers and the topics that this process knows."""

    def __init__(self, jobs: Iterable[type[Job]] = ()) -> None:
        self._entries: dict[str, _Entry] = {}
        #: The consumers by name, and the seconds for which messages of a topic are kept that was declared.
        self.consumers: dict[str, Follower] = {}
        self.topics: dict[str, float] = {}
        #: The settings of applications that have any of their own.
        self.settings: Mapping[str, BaseModel] = {}
        for job in jobs:
            self.register(job)

    @classmethod
    def from_applications(cls, applications: Sequence[str]) -> Registry:
        """Import ``<application>.jobs`` of each and register every job class found there."""
        registry = cls()
        for application in applications:
            module = _import_jobs(application)
            for job in _jobs_of(module):
                registry.register(job, application)
            for value in vars(module).values():
                if isinstance(value, type) and issubclass(value, Consumer) and "name" in vars(value):
                    registry.register_consumer(value, application)
                elif isinstance(value, Topic):
                    registry.declare(value)
        return registry

    def register_consumer(self, consumer: type[Consumer], application: str = "") -> None:
        """Add a consumer of an application; the same one twice is one, two of the same name are an error."""
        consumer.check_settings()
        known = self.consumers.get(consumer.name)
        if known is not None and known.consumer is not consumer:
            raise BadConsumer(
                f"two consumers have the name {consumer.name!r}: {_name(known.consumer)} and {_name(consumer)}"
            )
        self.consumers.setdefault(consumer.name, Follower(consumer, application))

    def declare(self, topic: Topic) -> None:
        """Take note of how long the messages of a topic are kept; said twice, the longer time counts."""
        self.topics[topic.name] = max(topic.retention, self.topics.get(topic.name, 0.0))

    def followers(self, topic: str) -> list[str]:
        """Return the names of the consumers that follow a topic."""
        return [name for name, one in self.consumers.items() if topic in one.consumer.topics]

    @property
    def follows_ends(self) -> bool:
        """Whether any consumer follows the ends of jobs."""
        return bool(self.followers(FINISHED))

    def register(self, job: type[Job], application: str = "") -> None:
        """Add a job class of an application; the same one twice is one, two of the same ``job_type`` are an error."""
        job.check_settings()
        known = self._entries.get(job.job_type)
        if known is not None:
            if known.job is job:
                return
            raise BadJobType(f"two classes have the job_type {job.job_type!r}: {_name(known.job)} and {_name(job)}")
        schema = closed_schema(job)
        self._entries[job.job_type] = _Entry(job, job.policy(), schema, _mentions_password(schema), application)

    @property
    def names(self) -> list[str]:
        """The job types, sorted."""
        return sorted(self._entries)

    def __contains__(self, job_type: str) -> bool:
        return job_type in self._entries

    def get(self, job_type: str) -> type[Job]:
        """Return the class of a job type; ``UnknownType`` if there is none."""
        return self._entry(job_type).job

    def application(self, job_type: str) -> str:
        """Return the dotted name of the application that a job type belongs to; ``UnknownType`` if there is none."""
        return self._entry(job_type).application

    def settings_of(self, job_type: str) -> BaseModel | None:
        """Return the settings of the application that a job type belongs to, if it has any."""
        entry = self._entries.get(job_type)
        return self.settings.get(entry.application) if entry is not None else None

    def policy(self, job_type: str) -> Policy:
        """Return the retry policy of a job type; the default one for a type that nobody knows here."""
        entry = self._entries.get(job_type)
        return entry.policy if entry is not None else Policy()

    def schema(self, job_type: str) -> dict[str, Any]:
        """Return the JSON Schema of the parameters of a job type."""
        return self._entry(job_type).schema

    def validate(self, job_type: str, body: bytes) -> Parameters:
        """Check the bytes that a client sent for a job type; raises ``BadRequest`` or ``InvalidParameters``."""
        entry = self._entry(job_type)
        parsed = codec.parse(body)
        job = _validate(entry.job, body, parsed)
        values = job.model_dump(mode="json", by_alias=True)
        if not entry.has_secrets:
            return Parameters(values)
        pointers = tuple(_reveal(job, values, ""))
        masked = [one for one in pointers if _at(values, one) == REDACTED]
        if masked:
            detail = "this is what a secret is shown as, not the secret"
            raise InvalidParameters({"pointer": one, "code": "invalid", "detail": detail} for one in masked)
        return Parameters(values, pointers)

    def build(self, job_type: str, parameters: Mapping[str, Any]) -> Job:
        """Make the job from stored parameters; ``UnknownType`` or ``InvalidParameters`` if that is not possible."""
        entry = self._entry(job_type)
        return _validate(entry.job, codec.dumps(parameters), parameters)

    def describe(self, job_type: str) -> dict[str, Any]:
        """Return ``{jobType, description, schema, example}`` of a job type."""
        entry = self._entry(job_type)
        doc = (entry.job.__doc__ or "").strip()
        return {
            "jobType": job_type,
            "description": doc if doc and doc != (Job.__doc__ or "").strip() else "",
            "schema": entry.schema,
            "example": self._example(entry),
        }

    def _entry(self, job_type: str) -> _Entry:
        entry = self._entries.get(job_type)
        if entry is None:
            close = difflib.get_close_matches(job_type[:100], self._entries, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UnknownType(f"there is no job type {codec.printable(job_type, 100)!r}{hint}")
        return entry

    def _example(self, entry: _Entry) -> dict[str, Any]:
        if entry.job.example is not None:
            return entry.job.example
        definitions = entry.schema.get("$defs", {})
        return {
            name: _sample(property_, definitions)
            for name, property_ in entry.schema.get("properties", {}).items()
            if name in entry.schema.get("required", ())
        }


def _import_jobs(application: str) -> ModuleType:
    try:
        return importlib.import_module(f"{application}.jobs")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{application}.jobs".startswith(error.name):
            raise
        raise BadSetting(
            f"applications: {application!r} cannot be imported: there is no module {error.name!r}; an application is "
            f"a package with a module jobs, importable from the current folder or installed"
        ) from error
    except (BadJobType, BadConsumer):
        raise
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise BadSetting(
            f"applications: {application}.jobs cannot be imported: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''} ({last.filename}, line {last.lineno})"
        ) from error


def _jobs_of(module: ModuleType) -> Iterator[type[Job]]:
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Job) and "job_type" in vars(value):
            yield value


def _name(one: type) -> str:
    return f"{one.__module__}.{one.__qualname__}"


def read_body(model: type[M], body: bytes) -> M:
    """Check the bytes that a client sent against a model; raises ``BadRequest`` or ``InvalidParameters``."""
    return _validate(model, body, codec.parse(body))


def _validate(job: type[M], body: bytes, parsed: Mapping[str, Any]) -> M:
    try:
        return job.model_validate_json(body, strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        faults = error.errors(include_input=False, include_url=False, include_context=True)
        known = [field.alias or name for name, field in job.model_fields.items()]
        raise InvalidParameters(_fault(fault, parsed, known) for fault in faults[:MAX_FAULTS]) from None


# Faults as clients read them

_CODES = (
    ("missing", ("missing",)),
    ("unknown_field", ("extra_forbidden", "unexpected_keyword")),
    ("range", ("greater_than", "less_than", "multiple_of", "finite_number", "int_parsing_size", "decimal_")),
    ("length", ("too_short", "too_long", "string_too", "bytes_too")),
    ("pattern", ("string_pattern",)),
    ("choice", ("literal_error", "enum", "union_tag", "is_instance")),
    (
        "format",
        ("_parsing", "_from_date", "timezone", "url_", "uuid_", "json_invalid", "invalid_key", "string_unicode"),
    ),
    ("type", ("_type", "int_from_float", "_attributes", "none_required")),
)


def _fault(fault: Mapping[str, Any], parsed: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    code = next((code for code, marks in _CODES if any(mark in fault["type"] for mark in marks)), "invalid")
    path = list(_members(fault["loc"], parsed, fault["type"]))
    detail = str(fault["msg"])
    if code == "unknown_field":
        detail = "there is no such parameter"
        close = difflib.get_close_matches(str(path[-1]), known, n=1) if path else []
        if close:
            detail += f"; did you mean {close[0]!r}?"
    return {"pointer": "".join(f"/{_escape(member)}" for member in path), "code": code, "detail": detail}


def _members(location: Sequence[str | int], parsed: Any, kind: str) -> Iterator[str | int]:
    """Yield what of a pydantic location are members and indexes of the input; the rest are tags of unions."""
    here = parsed
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if isinstance(here, Mapping) and part in here:
            here = here[part]
        elif isinstance(here, (list, tuple)) and isinstance(part, int) and part < len(here):
            here = here[part]
        elif not (last and kind == "missing"):
            continue
        yield part


def _escape(member: str | int) -> str:
    return str(member).replace("~", "~0").replace("/", "~1")


# Secrets


def _mentions_password(schema: Mapping[str, Any]) -> bool:
    return '"writeOnly": true' in json.dumps(schema)


def _reveal(value: Any, dumped: Any, pointer: str) -> Iterator[str]:
    """Put the real values of secrets into ``dumped``, which is what the store keeps, and yield their pointers."""
    for key, item in _items(value):
        here = f"{pointer}/{_escape(key)}"
        if isinstance(item, (SecretStr, SecretBytes)):
            secret = item.get_secret_value()
            dumped[key] = secret.decode() if isinstance(secret, bytes) else secret
            yield here
        elif isinstance(item, (BaseModel, dict, list, tuple)):
            yield from _reveal(item, dumped[key], here)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            yield field.serialization_alias or field.alias or name, getattr(value, name)
    elif isinstance(value, dict):
        yield from value.items()
    else:
        yield from enumerate(value)


def _at(parameters: Any, pointer: str) -> Any:
    """Return what a JSON pointer names."""
    here = parameters
    for part in _path(pointer):
        here = here[int(part)] if isinstance(here, list) else here[part]
    return here


def _path(pointer: str) -> list[str]:
    return [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]


def redact(parameters: dict[str, Any], secrets: Iterable[str]) -> dict[str, Any]:
    """Return parameters with what the JSON pointers ``secrets`` name replaced by ``REDACTED``."""
    secrets = tuple(secrets)
    if not secrets:
        return parameters
    shown: dict[str, Any] = json.loads(json.dumps(parameters))
    for pointer in secrets:
        parent, _, _ = pointer.rpartition("/")
        here, last = _at(shown, parent), _path(pointer)[-1]
        here[int(last) if isinstance(here, list) else last] = REDACTED
    return shown


# Schemas


def closed_schema(job: type[Job]) -> dict[str, Any]:
    """Return the JSON Schema of a job's parameters, with unknown members refused in nested objects too."""
    schema = job.model_json_schema()
    _close(schema)
    schema.pop("description", None)
    schema["title"] = job.job_type
    return schema


def _close(schema: Any) -> None:
    if isinstance(schema, dict):
        if "properties" in schema and isinstance(schema["properties"], dict):
            schema.setdefault("additionalProperties", False)
        for value in schema.values():
            _close(value)
    elif isinstance(schema, list):
        for value in schema:
            _close(value)


def _sample(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Any:
    """Return a value that a simple schema allows."""
    if "$ref" in schema:
        return _sample(definitions.get(schema["$ref"].rsplit("/", 1)[-1], {}), definitions)
    for member in ("examples", "enum"):
        if schema.get(member):
            return schema[member][0]
    if "const" in schema or "default" in schema:
        return schema.get("const", schema.get("default"))
    if schema.get("anyOf"):
        return _sample(schema["anyOf"][0], definitions)
    return _sample_of_type(schema, definitions)


def _sample_of_type(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Any:
    match schema.get("type"):
        case "object":
            properties = schema.get("properties", {})
            return {name: _sample(properties.get(name, {}), definitions) for name in schema.get("required", ())}
        case "array":
            return [_sample(schema.get("items", {}), definitions)] * schema.get("minItems", 0)
        case "integer":
            return max(schema.get("minimum", 1), schema.get("exclusiveMinimum", 0) + 1)
        case "number":
            return float(max(schema.get("minimum", 1), schema.get("exclusiveMinimum", 0) + 1))
        case "boolean":
            return True
        case "null":
            return None
    return "text".ljust(schema.get("minLength", 0), "x")
