"""The gateway: requests, their executions and their results."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, Field

import zerog
import zerog.server
from workers.processing.rules import (
    JOB_TYPE,
    MAX_PAYLOAD,
    Refused,
    Requests,
    brief_of,
    execution_view,
    request_view,
    size_of,
)
from zerog.server import Answer, Problem

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)

KEY = zerog.server.header("Idempotency-Key", "the same once more is made once")
REUSED = (422, "idempotency_key_reused")


class NewRequest(BaseModel):
    """What defines a processing request."""

    payload: Any = Field(description="anything")


class NewExecution(BaseModel):
    """How a request is to be executed."""

    force_error: bool = Field(description="whether to simulate an error")


class _Gateway(zerog.server.Endpoint):
    """Base of all of them."""

    role = {"POST": "submit"}

    @property
    def requests(self) -> Requests:
        """The rules."""
        return Requests(self)

    async def find(self) -> None:
        """Refuse tokens for which executions do not exist."""
        self.check_may_run(JOB_TYPE)

    def wanted(self) -> dict[str, Any]:
        """Return the document of the request in the path, or raise the 404."""
        try:
            return self.requests.get(self._id("id", "unknown_request", "processing request"))
        except zerog.NotFound as error:
            raise Problem(404, "there is no processing request with this id", "unknown_request") from error

    def wanted_execution(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the execution in the path, or raise the 404."""
        found = self.requests.execution(request, self._id("execution", "unknown_execution", "execution"))
        if found is None:
            raise Problem(404, "this processing request has no execution with this id", "unknown_execution")
        return found

    def _id(self, name: str, code: str, what: str) -> str:
        text = self.request.path[name]
        if not _UUID.fullmatch(text):
            raise Problem(404, f"there is no {what} with this id", code)
        return text.lower()

    def made(self, view: dict[str, Any], replayed: bool) -> Answer:
        """Return the answer for what was made, now or by an earlier request with the same key."""
        headers = {"Location": view["href"], **({"Idempotency-Replayed": "true"} if replayed else {})}
        return Answer(view, 201, headers)


class CreateRequest(_Gateway):
    """Processing requests."""

    name = "processing requests"
    url = "/requests"
    parameters = {"POST": NewRequest}
    headers = {"POST": (KEY,)}
    responses = {"POST": {201: ("the request, with its id", None)}}
    problems = {"POST": (REUSED, (403, "forbidden"))}

    def post(self, wanted: NewRequest) -> Answer:
        """Define what can be executed."""
        if size_of(wanted.payload) > MAX_PAYLOAD:
            raise zerog.server.invalid("/payload", "length", f"it may have {MAX_PAYLOAD} bytes of JSON")
        fingerprint = self.fingerprint(wanted.payload)
        document, replayed = self.requests.create(self.keyed_uuid("requests"), wanted.payload, fingerprint)
        if document["fingerprint"] != fingerprint:
            raise Problem(422, "this Idempotency-Key was used for another request", "idempotency_key_reused")
        return self.made(request_view(document), replayed)


class OneRequest(_Gateway):
    """One processing request."""

    name = "processing request"
    url = "/requests/{id}"
    problems = {"GET": ((404, "unknown_request"), (403, "forbidden"))}

    def get(self) -> dict[str, Any]:
        """Show the request."""
        return request_view(self.wanted())


class Executions(_Gateway):
    """The executions of a request."""

    name = "executions"
    url = "/requests/{id}/executions"
    parameters = {"POST": NewExecution}
    headers = {"POST": (KEY,)}
    responses = {"POST": {201: ("the execution, which is active now", None)}}
    problems = {
        "GET": ((404, "unknown_request"), (403, "forbidden")),
        "POST": (
            (404, "unknown_request"),
            (403, "forbidden"),
            REUSED,
            (409, "active_execution"),
            (409, "already_succeeded"),
            (409, "too_many_failures"),
        ),
    }

    def get(self) -> dict[str, Any]:
        """Show all executions of the request, the oldest first."""
        request = self.wanted()
        return {"executions": self.requests.executions(request), "href": f"/requests/{request['id']}/executions"}

    def post(self, wanted: NewExecution) -> Answer:
        """Execute the request: one at a time, none after a success, and no more than may fail."""
        request = self.wanted()
        key, fingerprint = self.idempotency_key(), self.fingerprint(wanted.force_error)
        id = self.keyed_uuid(f"executions:{request['id']}")
        if key is not None and (known := self._known(request, id, fingerprint)) is not None:
            return self.made(known, True)
        document = {
            "id": id,
            "request": request["id"],
            "force_error": wanted.force_error,
            "creation_date": zerog.server.iso(self.services.clock.now()),
            "fingerprint": fingerprint,
        }
        try:
            return self.made(self.requests.execute(request["id"], id, document), False)
        except Refused as refused:
            # Where to look: at the one that is active, or at what came of the others.
            here = f"/requests/{request['id']}"
            if refused.execution is not None:
                extra = {"execution": {"href": f"{here}/executions/{refused.execution}"}}
            else:
                extra = {"results": {"href": f"{here}/results"}}
            raise Problem(409, str(refused), refused.code, **extra) from refused

    def _known(self, request: dict[str, Any], id: str, fingerprint: str) -> dict[str, Any] | None:
        """Return the execution that an earlier request with the same key has made."""
        document = brief_of(request, id)
        if document is None:
            return None
        if document["fingerprint"] != fingerprint:
            raise Problem(422, "this Idempotency-Key was used for another execution", "idempotency_key_reused")
        return execution_view(document, request)


class OneExecution(_Gateway):
    """One execution."""

    name = "execution"
    url = "/requests/{id}/executions/{execution}"
    problems = {"GET": ((404, "unknown_request"), (404, "unknown_execution"), (403, "forbidden"))}

    def get(self) -> dict[str, Any]:
        """Show the execution."""
        return self.wanted_execution(self.wanted())


class ResultsOfRequest(_Gateway):
    """The results of a request."""

    name = "results"
    url = "/requests/{id}/results"
    problems = {"GET": ((404, "unknown_request"), (403, "forbidden"))}

    def get(self) -> dict[str, Any]:
        """Show the results of all executions that have ended, in their order."""
        request = self.wanted()
        href = f"/requests/{request['id']}/results"
        return {"results": self.requests.results(request["executions"]), "href": href}


class ResultsOfExecution(_Gateway):
    """The results of one execution."""

    name = "results of an execution"
    url = "/requests/{id}/executions/{execution}/results"
    problems = {"GET": ((404, "unknown_request"), (404, "unknown_execution"), (403, "forbidden"))}

    def get(self) -> dict[str, Any]:
        """Show the result, in a list that is empty until there is one."""
        execution = self.wanted_execution(self.wanted())
        return {"results": self.requests.results([execution]), "href": f"{execution['href']}/results"}
