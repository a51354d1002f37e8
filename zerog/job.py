"""Job, what a developer writes, and Context, all that a running job may touch."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from types import TracebackType
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from zerog.asked import DOCUMENT_KEY, AskedDocuments, Documents
from zerog.exceptions import BadJobType
from zerog.needs import Needs, are_labels, is_cpus, is_ram
from zerog.parents import Parent, parents
from zerog.retry import Policy

T = TypeVar("T")

#: The class attributes that configure a job type; none of them can be a parameter.
SETTINGS = (
    "job_type",
    "example",
    "max_errors",
    "max_crashes",
    "max_losses",
    "time_limit",
    "soft_time_limit",
    "memory_limit",
    "retention",
    "rerun_after_crash",
    "fresh_process",
    "backoff",
    "backoff_max",
    "final_errors",
    "ram",
    "cpus",
    "labels",
    "own_documents",
)

#: Bytes of JSON that a job's state may have.
MAX_STATE = 64 * 1024

_JOB_TYPE = re.compile(r"[a-z0-9][a-z0-9-]{0,99}")
_RESERVED_TYPES = ("agent", "topic")


class Job(BaseModel):
    """What to do: the fields are the parameters, the class attributes configure the job type, ``run`` does the work.

    Parameters are validated in pydantic's strict JSON mode and unknown ones are refused, in nested models too.  They
    never change: keep working state in local variables or in private attributes (``_name``).
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    #: Name of the job type in URLs and tubes: lower case letters, digits and hyphens.
    job_type: ClassVar[str] = ""
    #: Parameters that run as they stand, for the documentation of the type; made from the schema if not given.
    example: ClassVar[dict[str, Any] | None] = None
    #: How many attempts may raise, how often its process may die, and how often its agent may be lost.
    max_errors: ClassVar[int] = 3
    max_crashes: ClassVar[int] = 3
    max_losses: ClassVar[int] = 10
    #: Limits of one attempt.  After ``time_limit`` seconds its processes are ended; after ``soft_time_limit`` the job
    #: is told (``context.expiring``, ``zerog.SoftTimeLimit`` in asynchronous code).  ``memory_limit`` is in bytes, for
    #: all processes of the attempt together.
    time_limit: ClassVar[float | None] = None
    soft_time_limit: ClassVar[float | None] = None
    memory_limit: ClassVar[int | None] = None
    #: Seconds for which a job of this type is kept after its end; by default the setting ``retention``.
    retention: ClassVar[float | None] = None
    #: False means "rather not at all than twice".
    rerun_after_crash: ClassVar[bool] = True
    #: True runs each attempt in a new process.
    fresh_process: ClassVar[bool] = False
    #: Delay in seconds before the second try; it doubles with each further one, up to ``backoff_max``, with jitter.
    backoff: ClassVar[float] = 1.0
    backoff_max: ClassVar[float] = 60.0
    #: Exception classes after which no further attempt is made.
    final_errors: ClassVar[tuple[type[BaseException], ...]] = ()
    #: What an agent must have for it: bytes of memory and cores that nothing else holds there, and labels.
    ram: ClassVar[int] = 0
    cpus: ClassVar[float] = 0
    labels: ClassVar[tuple[str, ...]] = ()
    #: Keys of documents of the application that go with the job when it is pruned; ``{uuid}`` stands for its UUID.
    own_documents: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name in cls.model_fields:
            if name in SETTINGS:
                raise BadJobType(
                    f"{cls.__name__}.{name} is annotated, which makes it a parameter; write it without a type to set it"
                )
            if hasattr(Job, name):
                raise BadJobType(f"{cls.__name__}.{name}: a parameter cannot have this name, since every Job has it")

    def run(self, context: Context) -> Any:
        """Do the work and return the data of the job: JSON, ``None``, ``Requeue(...)`` or ``Succeeded(...)``.

        May be an ``async def``.  Whatever it raises is a failed attempt.
        """
        raise NotImplementedError(f"{type(self).__name__} has no run method")

    @classmethod
    def policy(cls) -> Policy:
        """Return the retry policy of this job type, and what its jobs need."""
        return Policy(
            cls.max_errors,
            cls.max_crashes,
            cls.max_losses,
            cls.backoff,
            cls.backoff_max,
            cls.rerun_after_crash,
            Needs.of(cls.ram, cls.cpus, cls.labels),
        )

    @classmethod
    def check_settings(cls) -> None:
        """Raise ``BadJobType`` if the class attributes are not possible."""
        if not isinstance(cls.job_type, str) or not _JOB_TYPE.fullmatch(cls.job_type):
            raise BadJobType(
                f"{cls.__name__}.job_type is {cls.job_type!r}; it must match {_JOB_TYPE.pattern} (lower case)"
            )
        if cls.job_type in _RESERVED_TYPES:
            raise BadJobType(f"{cls.__name__}.job_type: {cls.job_type!r} is reserved")
        for name, right, what in _CHECKS:
            if not right(getattr(cls, name)):
                raise BadJobType(f"{cls.__name__}.{name} is {getattr(cls, name)!r}; it must be {what}")
        if cls.soft_time_limit is not None and cls.time_limit is not None and cls.soft_time_limit >= cls.time_limit:
            raise BadJobType(f"{cls.__name__}.soft_time_limit must be less than its time_limit ({cls.time_limit:g} s)")
        if "run" not in {name for base in cls.__mro__[: cls.__mro__.index(Job)] for name in vars(base)}:
            raise BadJobType(f"{cls.__name__} has no run method")
        try:
            inspect.signature(cls.run).bind(None, None)
        except TypeError as error:
            raise BadJobType(f"{cls.__name__}.run must be run(self, context): {error}") from error


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1_000_000


def _seconds(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 31_536_000


def _limit(value: Any) -> bool:
    return value is None or (_seconds(value) and value > 0)


def _bytes(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _exceptions(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(e, type) and issubclass(e, BaseException) for e in value)


def _keys(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(key, str) and "{uuid}" in key and DOCUMENT_KEY.fullmatch(key.replace("{uuid}", "0" * 36))
        for key in value
    )


_CHECKS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("max_errors", _count, "an integer from 1 to 1,000,000"),
    ("max_crashes", _count, "an integer from 1 to 1,000,000"),
    ("max_losses", _count, "an integer from 1 to 1,000,000"),
    ("time_limit", _limit, "None or seconds, more than 0"),
    ("soft_time_limit", _limit, "None or seconds, more than 0"),
    ("retention", _limit, "None or seconds, more than 0"),
    ("memory_limit", _bytes, "None or bytes, more than 0"),
    ("rerun_after_crash", _flag, "True or False"),
    ("fresh_process", _flag, "True or False"),
    ("backoff", _seconds, "seconds"),
    ("backoff_max", _seconds, "seconds"),
    ("final_errors", _exceptions, "a tuple of exception classes"),
    ("ram", is_ram, "bytes, 0 or more"),
    ("cpus", is_cpus, "cores, 0 to 100,000, in steps of a thousandth"),
    ("labels", are_labels, "a tuple of at most 50 labels, such as ('gpu',)"),
    ("own_documents", _keys, "a tuple of keys of documents with {uuid} in each, such as ('step:{uuid}',)"),
)


class Reporter(Protocol):
    """Where a context sends what the job says: the pipe to the agent, or a test."""

    def progress(self, completeness: float | None, message: str | None) -> None:
        """Take note of how far the job is."""

    def event(self, level: str, message: str, code: int | None) -> None:
        """Take note of an event, a warning or an error."""

    def cancelled(self) -> bool:
        """Return whether a cancel has arrived."""

    def expiring(self) -> bool:
        """Return whether the soft time limit has passed."""

    def checkpoint(self, state: bytes) -> None:
        """Store JSON as the job's state; return when it is stored."""

    def ask(self, question: dict[str, Any]) -> dict[str, Any] | bytes:
        """Return what is known of the job's parents."""

    def open_output(self, media_type: str) -> None:
        """Begin the output."""

    def write_output(self, data: bytes) -> None:
        """Add bytes to the output."""


def is_media_type(text: str) -> bool:
    """Return whether a text is a media type, with parameters or without."""
    return bool(_MEDIA_TYPE.fullmatch(text))


def checked_state(state: Any) -> bytes:
    """Return the state of a job as JSON; ``ValueError`` if it is none, or too large."""
    try:
        text = to_json(state)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the state of a job must be JSON: {error}") from error
    if len(text) > MAX_STATE:
        raise ValueError(f"the state of a job may have {MAX_STATE} bytes of JSON, not {len(text)}")
    return text


def to_json(value: Any) -> bytes:
    """Write what a job returned; raises ``TypeError`` or ``ValueError`` for what is no JSON, NaN and circles too."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class Context:
    """All that a running job may touch."""

    def __init__(
        self,
        reporter: Reporter,
        uuid: str,
        attempt: int,
        state: Any = None,
        parents: Sequence[str] = (),
        settings: Any = None,
        number: int = 0,
    ) -> None:
        #: The job's UUID: stable over all attempts.
        self.uuid = uuid
        #: The job's number among all jobs, as in its record.
        self.number = number
        #: Number of this attempt: it only grows, so writes outside can be fenced with it.
        self.attempt = attempt
        #: What ``checkpoint`` or ``Requeue(state=...)`` of this job has kept last, in whatever attempt, or None.
        self.state = state
        #: The settings of the application that the job belongs to, or None if it has none.
        self.settings = settings
        #: True once the job has seen that it is being cancelled.
        self.told = False
        self.opened: Output | None = None
        self.second_output = False
        self._reporter = reporter
        self._warned = False
        self._parent_uuids = tuple(parents)
        self._parents: tuple[Parent, ...] | None = None
        self._published = 0
        self._documents: Documents | None = None

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked to cancel this job; a job that sees it should clean up and return."""
        if not self.told and self._reporter.cancelled():
            self.told = True
        return self.told

    @property
    def expiring(self) -> bool:
        """Whether the soft time limit has passed; a job that sees it should save what it has and return."""
        return self._reporter.expiring()

    @property
    def parents(self) -> tuple[Parent, ...]:
        """The jobs that this one waited for, in the order in which they were named; their data come when asked for."""
        if self._parents is None:
            self._parents = parents(self._parent_uuids, self._reporter.ask)
        return self._parents

    @property
    def documents(self) -> Documents:
        """The documents of the application that this job belongs to."""
        if self._documents is None:
            self._documents = AskedDocuments(self._reporter.ask, f"{self.uuid}:{self.attempt}")
        return self._documents

    def publish(self, topic: str, value: Any) -> int:
        """Add a message (JSON of up to 512 KiB) to a topic of the application, and return its number when it is stored.

        The n-th message of every attempt has the same key, by which readers know what a job that ran again has said
        before.  ``ValueError`` for a bad name of a topic, and for what is no JSON or too large.
        """
        self._published += 1
        question = {
            "t": "publish",
            "topic": topic,
            "key": f"{self.uuid}:{self._published}",
            "value": to_json(value).decode(),
        }
        answer = self._reporter.ask(question)
        assert isinstance(answer, dict)
        if "error" in answer:
            raise ValueError(answer["error"])
        return int(answer["published"])

    def checkpoint(self, state: Any) -> None:
        """Keep ``state`` for whatever attempt comes next, and return when it is stored.

        It survives errors, crashes, losses and drains, and is ``context.state`` from then on.  ``state`` is JSON of up
        to 64 KiB; other things raise ``ValueError``.
        """
        text = checked_state(state)
        self._reporter.checkpoint(text)
        self.state = json.loads(text)

    def progress(self, completeness: float | None = None, message: str | None = None) -> None:
        """Report how far the job is, 0 to 1, and what it is doing.

        It never raises and may be called as often as wanted: the last value wins, at most one write a second.  A
        value outside 0..1 is clamped and one that is no number is ignored, with one warning an attempt.
        """
        value = self._clamp(completeness)
        text = None if message is None else str(message)
        if value is not None or text is not None:
            self._reporter.progress(value, text)

    def track(self, items: Iterable[T], total: float | None = None, message: str | None = None) -> Iterator[T]:
        """Yield ``items`` and report progress as they are consumed; ``total`` defaults to ``len(items)``."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        for count, item in enumerate(items):
            if total:
                self.progress(min(1.0, count / total), message)
            yield item
        self.progress(1.0 if total else None, message)

    def event(self, message: str, code: int | None = None) -> None:
        """Record something worth telling."""
        self._reporter.event("event", str(message), code)

    def warning(self, message: str, code: int | None = None) -> None:
        """Record something that may be wrong."""
        self._reporter.event("warning", str(message), code)

    def error(self, message: str, code: int | None = None) -> None:
        """Record something that is wrong; the job goes on and nothing is spent."""
        self._reporter.event("error", str(message), code)

    def output(self, media_type: str = "application/octet-stream") -> Output:
        """Open the result as a writable binary file of any size, streamed to the datastore.

        It is a context manager; the job returns ``None`` beside it.  A second output, or a value beside it, fails the
        job with ``two_results``.
        """
        if not _MEDIA_TYPE.fullmatch(media_type):
            raise ValueError(f"{media_type!r} is no media type")
        if self.opened is not None:
            self.second_output = True
            raise ValueError("a job has one output")
        self._reporter.open_output(media_type)
        self.opened = Output(self._reporter)
        return self.opened

    def _clamp(self, completeness: float | None) -> float | None:
        if completeness is None:
            return None
        try:
            value = float(completeness)
        except (TypeError, ValueError, OverflowError):
            self._warn_once(f"progress({type(completeness).__name__}) was ignored: not a number")
            return None
        if math.isnan(value):
            self._warn_once("progress(NaN) was ignored")
            return None
        if not 0.0 <= value <= 1.0:
            self._warn_once(f"progress({value:g}) was clamped: completeness is 0 to 1")
        return min(1.0, max(0.0, value))

    def _warn_once(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            self.warning(text)


_MEDIA_TYPE = re.compile(
    r"[A-Za-z0-9!#$&^_.+-]{1,100}/[A-Za-z0-9!#$&^_.+-]{1,100}(; ?[a-z0-9-]{1,40}=[A-Za-z0-9_.+-]{1,60}){0,4}"
)


class Output:
    """The writable binary file behind ``context.output``; closed by the end of the ``with`` block or of the job."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.size = 0
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview | str) -> int:
        """Add bytes, or text as UTF-8; returns how many bytes were added."""
        if self.closed:
            raise ValueError("the output is closed")
        blob = data.encode() if isinstance(data, str) else bytes(data)
        self._reporter.write_output(blob)
        self.size += len(blob)
        return len(blob)

    def writable(self) -> bool:
        """Return True, as writers of tables and archives ask."""
        return True

    def readable(self) -> bool:
        """Return False."""
        return False

    def seekable(self) -> bool:
        """Return False: what is written is already on its way."""
        return False

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self.size

    def flush(self) -> None:
        """Do nothing: every write is sent at once."""

    def close(self) -> None:
        """End the output; further writes raise."""
        self.closed = True

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
