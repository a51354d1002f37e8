"""JobRecord: what happened to a job, as a frozen value; its states, and how it is written down.

The life of a job::

    waiting ──release──▶ queued ──claim──▶ running ──succeed──▶ succeeded
       │                   │  ▲               │ ├─────fail────▶ failed
       │                   │  └─retry, requeue┘ │               (also queued ──refuse──▶ failed)
       │                   │    crash, lose     └─settle_cancel▶ cancelled
       └──────cancel───────┴──────────────────────────────────▶ cancelled

``claim`` of a running record is the take-over of a lapsed lease.  ``cancel`` of a running record only sets a flag,
shown as ``cancelling``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from zerog import codec
from zerog.clock import from_iso, to_iso
from zerog.exceptions import CorruptDocument, NewerVersion, WrongState
from zerog.needs import NOTHING, Needs
from zerog.outcome import Result

#: Version of the stored documents.  A newer one is left alone; the one before is read for one release.
SCHEMA = 1


class State(StrEnum):
    """Where a job is in its life; the last three are terminal and never change."""

    WAITING = "waiting"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})

#: (state, step) → the next state.  A step that is not here raises ``WrongState``.
TRANSITIONS: Mapping[tuple[State, str], State] = {
    (State.WAITING, "release"): State.QUEUED,
    (State.WAITING, "cancel"): State.CANCELLED,
    (State.QUEUED, "claim"): State.RUNNING,
    (State.QUEUED, "refuse"): State.FAILED,
    (State.QUEUED, "cancel"): State.CANCELLED,
    (State.RUNNING, "claim"): State.RUNNING,
    (State.RUNNING, "renew"): State.RUNNING,
    (State.RUNNING, "cancel"): State.RUNNING,
    (State.RUNNING, "succeed"): State.SUCCEEDED,
    (State.RUNNING, "fail"): State.FAILED,
    (State.RUNNING, "refuse"): State.FAILED,
    (State.RUNNING, "retry"): State.QUEUED,
    (State.RUNNING, "requeue"): State.QUEUED,
    (State.RUNNING, "give_back"): State.QUEUED,
    (State.RUNNING, "lose"): State.QUEUED,
    (State.RUNNING, "settle_cancel"): State.CANCELLED,
}


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run an attempt: who has it, until when it is shown, and its growing ``sequence``.

    ``claim`` is a random text made at the claim; after an ambiguous write it tells whose claim it was.
    """

    agent: str
    claim: str
    sequence: int
    until: float


class JobRecord(NamedTuple):
    """What happened to one job.  Changed only by ``evolve`` and ``after``, written only by the Manager.

    A named tuple and no dataclass, because every job makes half a dozen of them and this copies four times as fast.

    Times are seconds since 1970.  ``parameters`` is what was validated, with defaults and with the real values of
    secrets, whose JSON pointers stand in ``secrets``.
    """

    uuid: str
    job_type: str
    number: int
    parameters: dict[str, Any]
    created_at: float
    updated_at: float
    state: State = State.QUEUED
    result_code: int = -1
    completeness: float = 0.0
    message: str | None = None
    reason: str | None = None
    attempt: int = 0
    lease: Lease | None = None
    cancel_requested: bool = False
    errors: int = 0
    crashes: int = 0
    losses: int = 0
    priority: int = 1000
    started_at: float | None = None
    finished_at: float | None = None
    not_before: float | None = None
    agent: str | None = None
    parents: tuple[str, ...] = ()
    retried_from: str | None = None
    job_state: Any = None
    result: Result | None = None
    secrets: tuple[str, ...] = ()
    fingerprint: str | None = None
    #: Whether other jobs wait for this one, and the place of its entry in the log of its type (0: not known).
    children: bool = False
    type_number: int = 0
    #: The claim of the attempt that has written its outcome here: what an ambiguous write came to is known by it.
    settled_by: str | None = None
    #: Whether its type forbids to run it again when it may have run: said by the agent, which knows the type, for a
    #: sweeper that may not.
    once: bool = False
    #: What it asks of an agent, on which agents attempts of it have failed, and how often it was modified.
    needs: Needs = NOTHING
    failed_on: tuple[str, ...] = ()
    revised: int = 0
    #: Of an outcome that came over HTTP: what tells the same one from another.
    settled_as: str | None = None

    @property
    def revision(self) -> int:
        """A number that grows whenever the state changes, or the job is modified, and only then."""
        if self.state is State.RUNNING:
            return 3 * self.attempt + self.revised
        step = {State.WAITING: 0, State.QUEUED: 1}.get(self.state, 2)
        return 3 * self.attempt + step + self.revised

    @property
    def due_since(self) -> float:
        """Since when a queued job could run: its submit or its last change, or when its delay was over."""
        return max(self.updated_at if self.attempt else self.created_at, self.not_before or 0.0)

    @property
    def terminal(self) -> bool:
        """Whether the job has ended."""
        return self.state in TERMINAL

    @property
    def cancelling(self) -> bool:
        """Whether a cancel was asked for and the job has not ended yet."""
        return self.cancel_requested and not self.terminal

    def due(self, now: float) -> bool:
        """Return whether a queued job may run now."""
        return self.state is State.QUEUED and (self.not_before is None or self.not_before <= now)

    def evolve(self, **changes: Any) -> JobRecord:
        """Return the same record with ``changes``."""
        return self._replace(**changes)

    def after(self, step: str, **changes: Any) -> JobRecord:
        """Return the record after ``step`` of ``TRANSITIONS``; ``WrongState`` if it is not possible from here."""
        state = TRANSITIONS.get((self.state, step))
        if state is None:
            raise WrongState(f"{step} is not possible while the job is {self.state}", state=str(self.state))
        return self._replace(state=state, **changes)


_NAMES: Mapping[str, str] = {
    name: "".join(word.title() if place else word for place, word in enumerate(name.split("_")))
    for name in JobRecord._fields
}
_TIMES = ("created_at", "updated_at", "started_at", "finished_at", "not_before")
_TIME_NAMES = tuple(_NAMES[name] for name in _TIMES)
_ROWS = tuple((wire, JobRecord._field_defaults.get(name, ...)) for name, wire in _NAMES.items())


def to_document(record: JobRecord) -> bytes:
    """Write a record as the JSON document that the store keeps; members at their default are left out."""
    document: dict[str, Any] = {
        wire: value
        for (wire, default), value in zip(_ROWS, record, strict=True)
        if value is not default and value != default
    }
    document["schema"] = SCHEMA
    for name in _TIME_NAMES:
        if name in document:
            document[name] = to_iso(document[name])
    document["state"] = record.state.value
    if record.lease is not None:
        document["lease"] = _lease_document(record.lease)
    if record.needs:
        document["needs"] = record.needs.members()
    if record.result is not None:
        result = record.result  # member by member: this is written for every job
        document["result"] = {
            "media_type": result.media_type, "size": result.size, "inline": result.inline, "blob": result.blob
        }  # fmt: skip
    return codec.dumps(document)


def _lease_document(lease: Lease) -> dict[str, Any]:
    return {"agent": lease.agent, "claim": lease.claim, "sequence": lease.sequence, "until": to_iso(lease.until)}


def from_document(body: bytes) -> JobRecord:
    """Read a stored document; ``CorruptDocument`` or ``NewerVersion`` when it is no record of ours."""
    document = codec.loads(body)
    if not isinstance(document, dict):
        raise CorruptDocument("not an object")
    schema = document.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise NewerVersion(f"schema {schema} is newer than {SCHEMA}")
    try:
        return _from_members(document)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CorruptDocument(f"{type(error).__name__}: {error}") from error


def _from_members(document: dict[str, Any]) -> JobRecord:
    values = {name: document[wire] for name, wire in _NAMES.items() if wire in document}
    values["state"] = State(values["state"])
    for name in _TIMES:
        if name in values:
            values[name] = from_iso(values[name])
    if "lease" in values:
        lease = values["lease"]
        values["lease"] = Lease(lease["agent"], lease["claim"], int(lease["sequence"]), from_iso(lease["until"]))
    if "result" in values:
        values["result"] = Result(**values["result"])
    if "needs" in values:
        values["needs"] = Needs.read(values["needs"])
    for name in ("parents", "secrets", "failed_on"):
        if name in values:
            values[name] = tuple(values[name])
    record = JobRecord(**values)
    _check_types(record)
    return record


def _check_types(record: JobRecord) -> None:
    for name, kind in (("uuid", str), ("job_type", str), ("number", int), ("attempt", int), ("parameters", dict)):
        if not isinstance(getattr(record, name), kind):
            raise TypeError(f"{name} is no {kind.__name__}")
    if not isinstance(record.completeness, (int, float)):
        raise TypeError("completeness is no number")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a running job, or ZeroG on its behalf, said: one entry of ``/jobs/{uuid}/events``.

    ``level`` is event, warning or error; ``source`` is stdout or stderr for captured output.
    """

    at: float
    level: str
    message: str
    code: int | None = None
    source: str | None = None
    traceback: str | None = None
    reason: str | None = None

    def size(self) -> int:
        """Return the characters that this entry keeps."""
        return len(self.message) + len(self.traceback or "")
