"""Every error of ZeroG, its HTTP status, its code and its meaning.

The first paragraph of a class's docstring is the meaning that users read: in ``docs/errors.rst`` and as the ``title``
of a problem document.  ``code`` is the stable word that programs compare.

::

    ZerogError
    ├── RequestError                     what a client sent, or asked for, cannot be answered
    │   ├── BadRequest                   400
    │   │   ├── InvalidJSON, EmptyBody, DuplicateKey, InvalidNumber, NumberOutOfRange
    │   │   ├── TooDeep, InvalidUTF8, InvalidUnicode, ObjectExpected, ArrayExpected
    │   │   └── InvalidParameter         one name in the query or a header; carries ``parameter``
    │   ├── Unauthenticated 401
    │   ├── Forbidden, CrossOrigin       403
    │   ├── UnknownResource              404: UnknownJob, UnknownType, UnknownAgent, UnknownToken,
    │   │                                UnknownTopic, UnknownConsumer
    │   ├── MethodNotAllowed 405, NotAcceptable 406, RequestTimeout 408
    │   ├── StateConflict                409: NotFinished, AlreadyFinished, JobFailed, JobCancelled, AgentAlive
    │   ├── PreconditionFailed 412, PreconditionRequired 428
    │   ├── BodyTooLarge 413, UnsupportedMediaType 415, RangeNotSatisfiable 416, Misdirected 421
    │   ├── InvalidParameters, IdempotencyKeyReused, DuplicateName, CyclicParents, ParentRefused 422
    │   ├── RateLimited 429, TooManyStreams 503
    │   └── Problem                      what an application refuses, with a status and a code of its own
    ├── InternalError                    500
    ├── DatastoreError
    │   ├── NotFound, AlreadyExists, Conflict
    │   └── StoreUnavailable 503 (nothing happened), StoreAmbiguous 503 (unknown: read again)
    ├── QueueError
    │   └── QueueUnavailable, ReservationLost
    ├── WrongState                       a transition that the table does not have
    │   └── Superseded, NotRetryable     the attempt is not the current one; the job did not fail
    ├── CorruptDocument, NewerVersion    a stored document that cannot be read as a record
    ├── ConfigurationError               BadSetting, BadJobType, BadConsumer, MissingDependency
    ├── ServerUnreachable                the client found no server
    └── JobError                         what a job raises to say how its attempt ends
        └── Retry, Fail
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


class ZerogError(Exception):
    """The request could not be answered because of a defect; what happened is in the log.

    The root of every error that ZeroG raises on purpose.
    """

    status = 500
    code = "internal_error"

    def __init__(self, detail: str = "", **members: Any) -> None:
        super().__init__(detail or type(self).title())
        self.detail = detail or type(self).title()
        self.members = members
        self.errors: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}

    @classmethod
    def title(cls) -> str:
        """Return the meaning of this error: the first paragraph of its docstring, on one line."""
        text = (cls.__doc__ or cls.__name__).strip().split("\n\n")[0]
        return " ".join(text.split())


# What a client sent, or asked for


class RequestError(ZerogError):
    """The request cannot be answered as it is."""

    status = 400
    code = "bad_request"


class BadRequest(RequestError):
    """The request is malformed."""


class InvalidJSON(BadRequest):
    """The body is not JSON."""

    code = "invalid_json"


class EmptyBody(BadRequest):
    """The body is empty; a job without parameters is sent as {}."""

    code = "empty_body"


class DuplicateKey(BadRequest):
    """An object in the body has the same member twice."""

    code = "duplicate_key"


class InvalidNumber(BadRequest):
    """NaN and the infinities are not JSON."""

    code = "invalid_number"


class NumberOutOfRange(BadRequest):
    """A number in the body is too large to be kept exactly."""

    code = "number_out_of_range"


class TooDeep(BadRequest):
    """More than 100 arrays and objects are open at once in the body."""

    code = "too_deep"


class InvalidUTF8(BadRequest):
    """The body is not UTF-8 without a byte order mark."""

    code = "invalid_utf8"


class InvalidUnicode(BadRequest):
    """A string in the body holds half a surrogate pair."""

    code = "invalid_unicode"


class ArrayExpected(BadRequest):
    """The body must be a JSON array."""

    code = "array_expected"


class ObjectExpected(BadRequest):
    """The body must be a JSON object."""

    code = "object_expected"


class InvalidParameter(BadRequest):
    """A name or a value in the query or in a header is not valid."""

    code = "invalid_parameter"

    def __init__(self, parameter: str, detail: str) -> None:
        super().__init__(detail, parameter=parameter)
        self.parameter = parameter
        self.errors = [{"parameter": parameter, "code": "invalid", "detail": detail}]


class UnknownParent(InvalidParameter):
    """There is no job with the UUID that the parameter parent names."""

    code = "unknown_parent"

    def __init__(self, uuid: str) -> None:
        super().__init__("parent", f"there is no job {uuid}")
        self.errors[0]["code"] = self.code


class Unauthenticated(RequestError):
    """The request carries no token that is valid here."""

    status = 401
    code = "unauthenticated"


class Forbidden(RequestError):
    """The token does not allow this."""

    status = 403
    code = "forbidden"


class CrossOrigin(RequestError):
    """An unsafe method was sent from a page of another origin."""

    status = 403
    code = "cross_origin"


class UnknownResource(RequestError):
    """There is nothing at this URL."""

    status = 404
    code = "not_found"


class UnknownJob(UnknownResource):
    """There is no job with this UUID."""

    code = "unknown_job"


class UnknownTopic(UnknownResource):
    """There is no topic of this name, or nothing was ever published in it."""

    code = "unknown_topic"


class UnknownConsumer(UnknownResource):
    """There is no consumer of this name."""

    code = "unknown_consumer"


class UnknownAgent(UnknownResource):
    """There is no agent with this id."""

    code = "unknown_agent"


class UnknownToken(UnknownResource):
    """There is no token with this id."""

    code = "unknown_token"


class UnknownType(UnknownResource):
    """There is no job type of this name."""

    code = "unknown_type"


class MethodNotAllowed(RequestError):
    """The resource does not have this method; Allow lists those that it has."""

    status = 405
    code = "method_not_allowed"


class NotAcceptable(RequestError):
    """None of the media types that the resource offers is acceptable."""

    status = 406
    code = "not_acceptable"


class RequestTimeout(RequestError):
    """The request did not arrive in time."""

    status = 408
    code = "request_timeout"


class StateConflict(RequestError):
    """The state of the job does not allow this."""

    status = 409
    code = "conflict"


class NotFinished(StateConflict):
    """The job has not ended yet."""

    code = "not_finished"


class AlreadyFinished(StateConflict):
    """The job has finished before."""

    code = "already_finished"


class JobFailed(StateConflict):
    """The job failed, so it has no data."""

    code = "job_failed"


class JobCancelled(StateConflict):
    """The job was cancelled, so it has no data."""

    code = "job_cancelled"


class AgentAlive(StateConflict):
    """Another process is this agent, and it lives."""

    code = "agent_alive"


class PreconditionFailed(RequestError):
    """The resource has changed since the version that If-Match names."""

    status = 412
    code = "precondition_failed"


class PreconditionRequired(RequestError):
    """The request must name in If-Match the version of the resource that it is meant for."""

    status = 428
    code = "precondition_required"


class BodyTooLarge(RequestError):
    """The body is larger than the server accepts (the setting max_body)."""

    status = 413
    code = "body_too_large"


class UnsupportedMediaType(RequestError):
    """The body must be application/json in UTF-8, without a content encoding."""

    status = 415
    code = "unsupported_media_type"


class RangeNotSatisfiable(RequestError):
    """The range lies outside the data."""

    status = 416
    code = "range_not_satisfiable"


class Misdirected(RequestError):
    """This server does not answer for the host that the request names."""

    status = 421
    code = "misdirected_request"


class TooManyStreams(RequestError):
    """The server serves as many event streams as it can; Retry-After says when to ask again."""

    status = 503
    code = "too_many_streams"


class TooBusy(RequestError):
    """As many requests to endpoints of applications are under way as a process takes."""

    status = 503
    code = "too_busy"


class Problem(RequestError):
    """The application refuses the request."""

    code = "refused"

    def __init__(self, status: int, detail: str, code: str = "refused", **members: Any) -> None:
        if not 400 <= status <= 599:
            raise ValueError("a problem has a status from 400 to 599")
        super().__init__(detail, **members)
        self.status, self.code = status, code


class DuplicateName(RequestError):
    """Another item of the batch has the same name."""

    status = 422
    code = "duplicate_name"


class CyclicParents(RequestError):
    """The job would wait for itself."""

    status = 422
    code = "cyclic_parents"


class ParentRefused(RequestError):
    """A parent in the same batch was refused, so that this job could never run."""

    status = 422
    code = "parent_refused"


class RateLimited(RequestError):
    """The token has sent more requests than it may; Retry-After says when it may again."""

    status = 429
    code = "rate_limited"


class InvalidParameters(RequestError):
    """The parameters do not match their schema; errors lists each fault with its JSON pointer."""

    status = 422
    code = "invalid_parameters"

    def __init__(self, faults: Iterable[Mapping[str, Any]]) -> None:
        errors = [dict(fault) for fault in faults]
        first = errors[0] if errors else {"pointer": "", "detail": "not valid"}
        where = first["pointer"] or "the parameters"
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        super().__init__(f"{where}: {first['detail']}{more}")
        self.errors = errors


class IdempotencyKeyReused(RequestError):
    """The Idempotency-Key was used before with other content."""

    status = 422
    code = "idempotency_key_reused"


class InternalError(ZerogError):
    """Something unexpected went wrong in the server; its log says what."""


# The datastore and the queue


class DatastoreError(ZerogError):
    """The datastore refused an operation."""


class NotFound(DatastoreError):
    """The document does not exist."""


class AlreadyExists(DatastoreError):
    """A document with this key exists."""


class Conflict(DatastoreError):
    """The document was changed since it was read."""


class StoreUnavailable(DatastoreError):
    """The datastore does not answer, or does not take writes; repeat the request, a submit under its key."""

    status = 503
    code = "store_unavailable"


class StoreAmbiguous(StoreUnavailable):
    """The datastore did not answer in time, so it is unknown whether the write happened."""


class StoreFull(StoreUnavailable):
    """The datastore has no room left; nothing was changed."""

    status = 507
    code = "store_full"


class QueueError(ZerogError):
    """The queue refused an operation."""


class QueueUnavailable(QueueError):
    """The queue does not answer."""

    status = 503
    code = "queue_unavailable"


class ReservationLost(QueueError):
    """The queue entry is no longer reserved by this connection."""


# Records


class WrongState(ZerogError):
    """The record is in a state from which this step is not possible."""

    status = 409
    code = "wrong_state"


class NotRetryable(WrongState):
    """Only a job that failed or was cancelled can be retried."""

    code = "not_retryable"


class Superseded(WrongState):
    """Another attempt of the job exists, or the job has ended; this one may write nothing any more."""

    code = "superseded"


class CorruptDocument(ZerogError):
    """A stored document cannot be read as a record."""

    code = "corrupt_document"


class NewerVersion(ZerogError):
    """A stored document was written by a newer version of ZeroG; it is left as it is."""

    code = "newer_version"


# Settings and applications


class ConfigurationError(ZerogError):
    """The configuration is wrong, so nothing starts."""

    code = "configuration_error"


class BadSetting(ConfigurationError):
    """A setting has a value that is not possible."""


class BadJobType(ConfigurationError):
    """A job class cannot be registered."""


class BadConsumer(ConfigurationError):
    """A consumer or a topic cannot be registered."""


class MissingDependency(ConfigurationError):
    """An optional package is needed for this configuration and is not installed."""


class ServerUnreachable(ZerogError):
    """No ZeroG server answers at this address."""

    status = 503
    code = "server_unreachable"


# What a job raises


def is_delay(value: object) -> bool:
    """Return whether a value is a number of seconds that a job may be put off: up to a year."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 31_536_000


def is_code(value: object, least: int, most: int) -> bool:
    """Return whether a value is a whole number between two others: a result code."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


class JobError(ZerogError):
    """The root of what a job raises to say how its attempt ends."""


class Retry(JobError):
    """This attempt failed and another one should follow.

    ``after`` is the delay in seconds; without it the backoff of the job type decides.  It spends one of
    ``max_errors``; return ``zerog.Requeue`` to go on later without spending anything.
    """

    def __init__(self, message: str = "the job asked for another attempt", after: float | None = None) -> None:
        super().__init__(message)
        if after is not None and not is_delay(after):
            raise ValueError(f"a delay is 0 to 31,536,000 seconds, not {after!r}")
        self.after = after


class Fail(JobError):
    """The job cannot succeed; no further attempt is made.

    ``code`` is the result code, 400 to 599.
    """

    def __init__(self, message: str = "the job failed", code: int = 500) -> None:
        super().__init__(message)
        if not is_code(code, 400, 599):
            raise ValueError(f"the result code of a failure is 400 to 599, not {code!r}")
        self.result_code = code


class SoftTimeLimit(JobError):
    """The soft time limit of the job type has passed; raised inside asynchronous jobs."""

    def __init__(self, message: str = "the soft time limit has passed") -> None:
        super().__init__(message)


#: Reasons of failed jobs that are no error classes of their own, with what they mean: the word that stands in
#: ``reason`` and, while the data is asked for, in ``code``.
REASONS: Mapping[str, str] = {
    "outcome_unknown": "The worker was lost while the job ran, and the job type forbids a second run.",
    "result_too_large": "The return value is larger than max_result; a larger one goes through context.output().",
    "result_not_json": "The return value cannot be written as JSON.",
    "two_results": "The job returned a value beside an output, or opened a second output.",
    "corrupt_document": "The stored document of the job is damaged.",
    "newer_version": "The stored document was written by a newer version of ZeroG.",
    "invalid_parameters": "The stored parameters no longer match the schema of the job type.",
    "unknown_type": "No application of this agent has the job type any more.",
    "soft_time_limit": "The attempt gave up when the soft time limit of its job type had passed.",
    "time_limit": "The attempt ran longer than the time limit of its job type.",
    "memory_limit": "The attempt used more memory than the memory limit of its job type.",
    "crashed": "The process of the attempt ended without an outcome, as often as the job type allows.",
    "lost": "The worker of the attempt was lost, as often as the job type allows.",
    "exception": "The job raised an exception, as often as the job type allows.",
    "retry": "The job asked for another attempt more often than the job type allows.",
    "failed": "The job said that it cannot succeed.",
    "cancelled": "The job was cancelled on request.",
    "parent_failed": "A job that this one waited for failed, was cancelled, or is gone.",
}


def tree(root: type[ZerogError] = ZerogError) -> Iterator[type[ZerogError]]:
    """Yield every error class below and with ``root``, parents first."""
    yield root
    for child in root.__subclasses__():
        yield from tree(child)
