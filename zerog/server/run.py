"""The endpoint that submits a job, and what is checked of every submit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import ClassVar

from zerog import codec, views
from zerog.exceptions import (
    IdempotencyKeyReused,
    InvalidParameter,
    UnknownParent,
)
from zerog.manager import Options, Submission
from zerog.server.endpoint import (
    WAIT,
    Answer,
    Endpoint,
    Parameter,
    RunParameter,
    header,
    ranged,
)

YEAR = 31_536_000
_INTEGER = {"type": "integer"}


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


PARENT = Parameter(
    "parent", parse_parent, {"type": "string", "format": "uuid"},
    "job that must have succeeded before; may stand several times", (), repeated=True,
)  # fmt: skip


KEY = header("Idempotency-Key", "1 to 255 visible ASCII characters: the same request once more makes nothing new")


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
            PARENT,
        )
    }  # fmt: skip
    responses = {
        "POST": {
            200: ("it has ended within Prefer: wait", "Progress"),
            202: ("the job is stored and will run", "Progress"),
        }
    }
    problems: ClassVar = {"POST": (UnknownParent, IdempotencyKeyReused)}
    headers: ClassVar = {"POST": (KEY, WAIT)}

    async def find(self) -> None:
        """Refuse a job type that nobody knows, or that the token does not allow."""
        may_submit(self)

    async def post(self) -> Answer:
        """Validate, persist, enqueue, and answer the UUID: in this order, all of it in the Manager."""
        job_type = self.request.path["jobType"]
        options = self._options()
        key = self.idempotency_key()
        parameters = self.services.registry.validate(job_type, self.request.body)
        await check_parents(self, options.parents)
        submission = Submission(job_type, parameters, options, key, self.principal)
        wanted = [one for one in self.services.run_parameters if self.request.query[one.name] is not None]
        if wanted:
            submission = replace(submission, fixed=submission.uuid)
            await self.off_loop(self._before, submission, wanted)
        return await submit(self, submission)

    def known_parameters(self, method: str) -> tuple[Parameter, ...]:
        """Return the parameters of a submit, those of applications too."""
        if not self.services.run_parameters:
            return self.query_parameters(method)
        added = (one.parameter() for one in self.services.run_parameters)
        return (*self.query_parameters(method), *added)

    def _before(self, submission: Submission, wanted: Sequence[RunParameter]) -> None:
        """Let applications do what comes before the job, unless it is clear already that there will be none."""
        if not self.manager.check_key(submission):
            self.manager.check_parents(submission.options.parents)
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
    endpoint.check_may_run(job_type)


def checked_moment(now: float, delay: float | None, moment: float | None) -> float | None:
    """Return the moment before which a job may not run, if that is still to come."""
    if delay is not None and moment is not None:
        raise InvalidParameter("notBefore", "it excludes delay")
    if delay is not None:
        moment = now + delay
    if moment is not None and moment > now + YEAR:
        raise InvalidParameter("notBefore", "it must be at most a year ahead")
    return moment if moment is not None and moment > now else None


async def check_parents(endpoint: Endpoint, parents: Sequence[str]) -> None:
    """Refuse parents of types that do not exist for whoever asks; others are checked where the job is stored."""
    if endpoint.limited and parents:
        for uuid in await endpoint.off_loop(hidden, endpoint, parents):
            raise UnknownParent(uuid)


def hidden(endpoint: Endpoint, uuids: Sequence[str]) -> list[str]:
    """Return those of the jobs that are of types which do not exist for whoever asks."""
    found = endpoint.manager.get_many(list(uuids)) if endpoint.limited else {}
    return [uuid for uuid, record in found.items() if not endpoint.sees(record.job_type)]


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
        record = await endpoint.as_asked(endpoint.services.watcher.terminal(record, wait))
    status = 200 if wait is not None and record.terminal else 202
    return Answer(views.progress(record), status, headers, "job")
