"""The rules of processing requests: which execution is active, and what becomes of it.

The document of a request says which execution is active; it is changed by compare-and-set alone, and that is why there
is never more than one, on any number of servers.  An execution is made in this order, and each step can be found again:

    intent ──► execution ──► request: active ──► job ──► topic executions
                                   │
    topic finished ──► topic successes or failures ──► request: free

Whoever meets an active execution without a job submits it, and one whose job has ended publishes that; the consumer of
intents meets all of them.
"""

from __future__ import annotations

import json
import uuid as uuids
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import zerog
from zerog.server import iso

EXECUTIONS, SUCCESSES, FAILURES, DEAD_LETTERS = "executions", "successes", "failures", "dead-letters"
INTENTS = "processing-intents"
JOB_TYPE = "processing-execution"

#: Bytes of JSON that a payload may have: the largest message has it twice.
MAX_PAYLOAD = 240 * 1024

#: Seconds after which an execution that was to be made is looked after; after which it is given up if it never became
#: active; and after which whoever makes it says so again.
_SETTLED, _GIVEN_UP, _STALE = 2.0, 120.0, 1.0
#: Executions of which it is remembered that they are in their topic.
_REMEMBERED = 100_000

#: How often a request is tried that others change too.
_TRIES = 50

_NAMESPACE = uuids.UUID("0d3f6d5c-8f35-4a6e-9b57-6c1f5f6a2b11")

#: Reasons of failed jobs that say that the execution itself failed; after all others it broke.
_FAILED = ("failed",)


class Ground(Protocol):
    """What the rules stand on: an endpoint or a consumer of the application."""

    @property
    def documents(self) -> Any:
        """The documents of the application."""

    @property
    def manager(self) -> Any:
        """Every operation on jobs."""

    @property
    def settings(self) -> Any:
        """The settings of the application."""


class Refused(Exception):
    """No execution can be made: ``code`` says why."""

    def __init__(self, code: str, detail: str, execution: str | None = None) -> None:
        super().__init__(detail)
        self.code = code
        #: The execution that is active, if one is.
        self.execution = execution


@dataclass(frozen=True)
class Requests:
    """The processing requests.  All verbs wait for the store."""

    ground: Ground

    # Requests

    def create(self, id: str, payload: Any, fingerprint: str) -> tuple[dict[str, Any], bool]:
        """Store a request; return its document, or that of the one that is there already, and whether there was one."""
        document = {
            "id": id,
            "payload": payload,
            "fingerprint": fingerprint,
            "active": None,
            "succeeded": None,
            "failures": 0,
            "executions": [],
        }
        try:
            self.ground.documents.insert(_request(id), document)
        except zerog.AlreadyExists:
            return self.get(id), True
        return document, False

    def get(self, id: str) -> dict[str, Any]:
        """Return the document of a request; ``NotFound`` if there is none."""
        return self._read(id)[0]

    def _read(self, id: str) -> tuple[dict[str, Any], int]:
        found: tuple[dict[str, Any], int] = self.ground.documents.get(_request(id))
        return found

    # Executions

    def execution(self, request: Mapping[str, Any], id: str) -> dict[str, Any] | None:
        """Return an execution of a request as it is shown; None if it is none."""
        brief = brief_of(request, id)
        return execution_view(brief, request) if brief is not None else None

    def executions(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the executions of a request, the oldest first."""
        return [execution_view(brief, request) for brief in request["executions"]]

    def execute(self, request_id: str, id: str, document: Mapping[str, Any]) -> dict[str, Any]:
        """Make an execution, if the rules allow it, and return it as it is shown; ``Refused`` says why not.

        ``NotFound`` if there is no such request.
        """
        clock = self.ground.manager.clock
        said: float | None = None
        for _ in range(_TRIES):
            request, cas = self._read(request_id)
            if (made := brief_of(request, id)) is not None:  # an earlier try of this very execution
                return self._begun(request, made)
            try:
                self._check(request, document)
            except Refused:
                if said is not None:
                    self._forget(id)
                raise
            if said is None:
                self._intend(request_id, id)
                said = clock.monotonic()
            document = self._put(id, document)
            zerog.failpoint("processing.after_execution")
            if clock.monotonic() - said > _STALE:  # whoever looks after it may have come and gone
                self._intend(request_id, id)
                said = clock.monotonic()
            # All of it stands in the request too: nobody who tidies up can take from an active execution what it is.
            changed = {**request, "active": id, "executions": [*request["executions"], dict(document)]}
            try:
                self.ground.documents.replace(_request(request_id), changed, cas)
            except zerog.Conflict:
                continue
            zerog.failpoint("processing.after_active")
            return self._begun(changed, document)
        raise Refused("active_execution", "too many executions of this request are made at once")

    def _put(self, id: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """Store an execution that is not active yet and return it, or what an earlier try has stored of the same."""
        documents = self.ground.documents
        try:
            documents.insert(_execution(id), document)
        except zerog.AlreadyExists:
            known: dict[str, Any]
            known, cas = documents.get(_execution(id))
            if known["fingerprint"] == document["fingerprint"]:
                return known
            documents.replace(_execution(id), document, cas)
        return document

    def _begun(self, request: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
        self._submit(request["id"], document)
        zerog.failpoint("processing.after_submit")
        shown = execution_view(document, request)
        self.ground.manager.topics.publish(EXECUTIONS, shown, document["id"])
        zerog.failpoint("processing.after_announced")
        return shown

    def _forget(self, id: str) -> None:
        """Remove an execution that never became active."""
        try:
            self.ground.documents.remove(_execution(id))
        except zerog.NotFound:
            return

    def _intend(self, request: str, id: str) -> None:
        """Say that an execution is about to be made, for whoever finds that it was not made to its end."""
        topics = self.ground.manager.topics
        topics.publish(INTENTS, {"request": request, "execution": id, "after": topics.newest(EXECUTIONS)})
        zerog.failpoint("processing.after_intent")

    def _submit(self, request: str, document: Mapping[str, Any]) -> None:
        parameters = {"request": request, "force_error": document["force_error"]}
        self.ground.manager.run(JOB_TYPE, parameters, uuid=document["id"])

    def _check(self, request: dict[str, Any], document: Mapping[str, Any]) -> None:
        """Raise ``Refused`` if the rules allow no execution of a request now."""
        if request["active"] is not None:
            self.advance(request["id"], request["active"])
            request.update(self.get(request["id"]))
        if request["active"] is not None:
            raise Refused(
                "active_execution",
                f"the execution {request['active']} of this request is active; there is one at a time",
                request["active"],
            )
        if request["succeeded"] is not None:
            raise Refused(
                "already_succeeded",
                f"the execution {request['succeeded']} of this request has succeeded; its results are at "
                f"/requests/{request['id']}/results",
            )
        failures, maximum = request["failures"], self.ground.settings.max_failures
        if failures >= maximum:
            letter = self._letter(request, document)
            self.ground.manager.topics.publish(DEAD_LETTERS, letter, f"refused:{document['id']}")
            raise Refused(
                "too_many_failures",
                f"{failures} executions of this request have failed, and {maximum} may; this attempt is among the dead "
                "letters",
            )

    def _letter(self, request: Mapping[str, Any], execution: Mapping[str, Any]) -> dict[str, Any]:
        """Return the dead letter of an execution that was refused, or broke."""
        shown = self.executions(request)
        return {
            "attempt": {key: execution[key] for key in ("force_error", "creation_date")},
            "processing_request": request_view(request),
            "last_execution": shown[-1] if shown else None,
            "failures": request["failures"],
            "maximum": self.ground.settings.max_failures,
        }

    # What becomes of them

    def advance(self, request_id: str, id: str) -> None:
        """Do for an execution what is still to be done: submit its job, or publish its end and free the request."""
        record = self.ground.manager.get_many([id]).get(id)
        if record is None:
            request = self.get(request_id)
            if request["active"] == id and (brief := brief_of(request, id)) is not None:
                self._submit(request_id, brief)
        elif record.terminal:
            self.settle(request_id, record)

    def settle(self, request_id: str, record: Any) -> None:
        """Publish what became of an execution and free its request; nothing happens if it is not the active one."""
        id = record.uuid
        for _ in range(_TRIES):
            request, cas = self._read(request_id)
            if request["active"] != id:
                return
            outputs, broken = self._outputs(record)
            succeeded = outputs is not None
            failures = request["failures"] + (not succeeded)
            changed = {**request, "active": None, "failures": failures, "succeeded": id if succeeded else None}
            self._publish(changed, record, outputs, broken)
            zerog.failpoint("processing.after_published")
            try:
                self.ground.documents.replace(_request(request_id), changed, cas)
            except zerog.Conflict:
                continue
            zerog.failpoint("processing.after_freed")
            return
        raise zerog.Retry(after=1.0)

    def _outputs(self, record: Any) -> tuple[Any | None, bool]:
        """Return what an execution came to, None if it did not succeed, and whether it broke instead of failing."""
        if str(record.state) != "succeeded":
            return None, str(record.state) == "failed" and record.reason not in _FAILED
        try:
            return self.ground.manager.value(record), False
        except (ValueError, zerog.NotFound):
            return None, True  # what it returned cannot be read any more

    def _publish(self, request: Mapping[str, Any], record: Any, outputs: Any | None, broken: bool) -> None:
        topics, execution = self.ground.manager.topics, self.execution(request, record.uuid)
        assert execution is not None
        result = self._result(record, execution, outputs)
        topics.publish(FAILURES if outputs is None else SUCCESSES, result, record.uuid)
        if broken:
            letter = {**self._letter(request, execution), "last_execution": execution}
            topics.publish(DEAD_LETTERS, letter, f"broken:{record.uuid}")

    def _result(self, record: Any, execution: Mapping[str, Any], outputs: Any | None) -> dict[str, Any]:
        end = record.finished_at
        start = min(record.started_at, end) if record.started_at is not None else end
        return {
            "id": str(uuids.uuid5(_NAMESPACE, record.uuid)),
            "is_success": outputs is not None,
            "processing_start_time": iso(start),
            "processing_end_time": iso(end),
            "processing_total_seconds": round(end - start, 6),
            "outputs": outputs if outputs is not None else {},
            "execution": dict(execution),
        }

    def look_after(self, intent: Mapping[str, Any], age: float, announced: Announced) -> None:
        """See to it that an execution that was to be made is made to its end, or never; ``Retry`` while that is open.

        ``age`` is the seconds since it was said.
        """
        id = intent["execution"]
        if age < _SETTLED:
            raise zerog.Retry(after=_SETTLED - age)  # whoever makes it is at it
        try:
            request = self.get(intent["request"])
        except zerog.NotFound:
            return
        if brief_of(request, id) is None:
            if self._is_put(id):
                if age < _GIVEN_UP:
                    raise zerog.Retry(after=5)
                self._forget(id)
            return  # it was refused
        if request["active"] == id:
            self.advance(request["id"], id)
        if not announced.has(id, intent["after"]):
            self.ground.manager.topics.publish(EXECUTIONS, self.execution(request, id), id)

    def _is_put(self, id: str) -> bool:
        try:
            self.ground.documents.get(_execution(id))
        except zerog.NotFound:
            return False
        return True

    # Results

    def keep(self, result: Mapping[str, Any]) -> None:
        """Store a result; one that is there stays."""
        execution, request = result["execution"]["id"], result["execution"]["processing_request"]["id"]
        if brief_of(self.get(request), execution) is None:
            raise zerog.Fail(f"there is no execution {execution} of the request {request}")
        try:
            self.ground.documents.insert(f"result:{execution}", dict(result))
        except zerog.AlreadyExists:
            return

    def results(self, executions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the results of executions, as far as there are any."""
        found = []
        for id in (one["id"] for one in executions):
            try:
                found.append(self.ground.documents.get(f"result:{id}")[0])
            except zerog.NotFound:
                continue
        return found


class Announced:
    """Which executions are in their topic, as far as one process has read it."""

    def __init__(self, topics: Any) -> None:
        self._topics = topics
        self._known: OrderedDict[str, None] = OrderedDict()
        self._from: int | None = None
        self._upto = 0

    def has(self, id: str, after: int) -> bool:
        """Return whether an execution is in the topic, behind the message ``after``."""
        if self._from is None or after < self._from:
            self._from = self._upto = after
            self._known.clear()
        for message in self._topics.read_all(EXECUTIONS, self._upto):
            self._upto = message.number
            self._known[message.key] = None
            if len(self._known) > _REMEMBERED:
                self._from = message.number
                self._known.popitem(last=False)
        return id in self._known


def brief_of(request: Mapping[str, Any], id: str) -> dict[str, Any] | None:
    """Return an execution as its request keeps it; None if it has none with this id."""
    found: dict[str, Any] | None = next((one for one in request["executions"] if one["id"] == id), None)
    return found


def request_view(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request as JSON."""
    return {"id": request["id"], "payload": request["payload"], "href": f"/requests/{request['id']}"}


def execution_view(document: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """Return an execution as JSON, with the request that it is of."""
    return {
        "id": document["id"],
        "force_error": document["force_error"],
        "creation_date": document["creation_date"],
        "processing_request": request_view(request),
        "href": f"/requests/{request['id']}/executions/{document['id']}",
    }


def size_of(payload: Any) -> int:
    """Return the bytes of JSON that a payload has."""
    return len(json.dumps(payload))


def _request(id: str) -> str:
    return f"request:{id}"


def _execution(id: str) -> str:
    return f"execution:{id}"
