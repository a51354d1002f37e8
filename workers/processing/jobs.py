"""The processor, the consumer that publishes what it came to, and the results listener."""

from __future__ import annotations

import time
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import zerog
from workers.processing.rules import (
    DEAD_LETTERS,
    EXECUTIONS,
    FAILURES,
    INTENTS,
    JOB_TYPE,
    SUCCESSES,
    Announced,
    Requests,
)

UUID = r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"

#: A month: whoever reads a topic later finds what is kept in the documents.
_MONTH = 30 * 86_400
EXECUTIONS_KEPT = zerog.Topic(EXECUTIONS, _MONTH)
SUCCESSES_KEPT = zerog.Topic(SUCCESSES, _MONTH)
FAILURES_KEPT = zerog.Topic(FAILURES, _MONTH)
DEAD_LETTERS_KEPT = zerog.Topic(DEAD_LETTERS, _MONTH)
INTENTS_KEPT = zerog.Topic(INTENTS, 86_400)

#: Seconds between two looks whether it is cancelled.
_STEP = 0.05


class Execute(zerog.Job):
    """Execute a processing request: simulated, until somebody puts real work here."""

    job_type = JOB_TYPE
    max_errors = 1  # a failed execution is a result; the request can be executed again
    example = {"request": "00000000-0000-4000-8000-000000000000", "force_error": False}

    request: str = Field(pattern=UUID, description="id of the processing request")
    force_error: bool = Field(description="whether to simulate an error")

    def run(self, context: zerog.Context) -> dict[str, Any]:
        """Take the simulated time, then fail if that is wanted, or return the outputs."""
        try:
            request, _ = context.documents.get(f"request:{self.request}")
        except zerog.NotFound as error:
            raise zerog.Fail("there is no such processing request", code=404) from error
        if request["active"] != context.uuid:  # somebody has submitted the job itself: the rules hold for that too
            raise zerog.Fail("this job is not the active execution of the processing request", code=409)
        begun, seconds = time.monotonic(), context.settings.seconds
        while (gone := time.monotonic() - begun) < seconds and not context.cancelled:
            context.progress(gone / seconds)
            time.sleep(min(_STEP, seconds - gone))
        if self.force_error:
            raise zerog.Fail("an error was asked for")
        return outputs(request["payload"])


def outputs(payload: Any) -> dict[str, Any]:
    """Return what comes of a payload."""
    return {"message": "pong"}


class Outcomes(zerog.Consumer):
    """Publishes what became of executions and frees their requests; finishes what a gateway has left half done."""

    name = "processing-outcomes"
    topics = ("finished", INTENTS)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._announced = Announced(self.manager.topics)

    def handle(self, entry: zerog.Entry) -> None:
        """Deal with the end of a job, or with an execution that was to be made."""
        requests = Requests(self)
        if entry.topic == INTENTS:
            try:
                intent = Intent.model_validate(entry.value)
            except ValidationError as error:
                raise zerog.Fail(f"it is no intent: {first_fault(error)}") from error
            age = max(0.0, self.manager.clock.now() - entry.at)
            requests.look_after(intent.model_dump(), age, self._announced)
        elif entry.value["jobType"] == JOB_TYPE:
            record = self.manager.get_many([entry.value["uuid"]]).get(entry.value["uuid"])
            if record is None or not isinstance(request := record.parameters.get("request"), str):
                return
            try:
                requests.settle(request, record)
            except zerog.NotFound:
                return  # a job that somebody has run by hand


class Results(zerog.Consumer):
    """The results listener: the only writer of results."""

    name = "processing-results"
    topics = (SUCCESSES, FAILURES)
    in_agents = False

    def handle(self, entry: zerog.Entry) -> None:
        """Store a result."""
        try:
            result = Result.model_validate(entry.value)
        except ValidationError as error:
            raise zerog.Fail(f"it is no result: {first_fault(error)}") from error
        if result.is_success != (entry.topic == SUCCESSES):
            raise zerog.Fail(f"is_success is {result.is_success} in the topic {entry.topic}")
        try:
            Requests(self).keep(entry.value)
        except zerog.NotFound as error:
            raise zerog.Fail("there is no such processing request") from error


def first_fault(error: ValidationError) -> str:
    """Return the first thing that is wrong with a message."""
    fault = error.errors(include_input=False, include_url=False, include_context=False)[0]
    where = "/".join(str(part) for part in fault["loc"])
    return f"{where}: {fault['msg']}" if where else str(fault["msg"])


class Intent(BaseModel):
    """That an execution is about to be made."""

    model_config = ConfigDict(strict=True, extra="forbid")

    request: str = Field(pattern=UUID)
    execution: str = Field(pattern=UUID)
    after: int = Field(ge=0)


class _Request(BaseModel):
    model_config = ConfigDict(strict=True)

    id: str = Field(pattern=UUID)
    payload: Any


class _Execution(BaseModel):
    model_config = ConfigDict(strict=True)

    id: str = Field(pattern=UUID)
    force_error: bool
    creation_date: str
    processing_request: _Request


class Result(BaseModel):
    """What came of an execution."""

    model_config = ConfigDict(strict=True)

    id: str = Field(pattern=UUID)
    is_success: bool
    processing_start_time: str
    processing_end_time: str
    processing_total_seconds: float
    outputs: dict[str, Any]
    execution: _Execution
