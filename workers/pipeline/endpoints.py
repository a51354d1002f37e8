"""``/log`` and ``/pipelines``: write where the jobs of a pipeline stand, and read where all of them do."""

from __future__ import annotations

import re
import secrets
from typing import Any
from urllib.parse import quote, urlencode

from pydantic import BaseModel, Field

import zerog.server
from workers.pipeline.jobs import NAME, PRINTABLE, PipelineName, no_dots
from workers.pipeline.states import KEPT, Standing, Standings, topic
from zerog.server import Answer, Problem

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
#: Entries that are looked at for one page of a history.
_LOOKED_AT = 5000

#: What this process has read of pipelines, so that it need not be read again.
_standings = Standings()


class Entry(BaseModel):
    """What is written about a job in a pipeline."""

    pipeline: PipelineName
    job: str = Field(pattern=PRINTABLE, max_length=200, description="name of the job, or the UUID of one of ZeroG's")
    state: str = Field(pattern=PRINTABLE, max_length=100, description="what state it is in now")
    message: str | None = Field(None, max_length=2000, description="what there is to say about it")


class History(BaseModel):
    """Which entries are wanted."""

    pipeline: PipelineName
    job: str | None = Field(None, max_length=200, description="only entries of this job")
    after: int = Field(0, ge=0, description="only entries with greater numbers")
    limit: int = Field(50, ge=1, le=1000, description="how many items a page has")


class Log(zerog.server.Endpoint):
    """The history of a pipeline."""

    name = "log"
    url = "/log"
    parameters = {"POST": Entry, "GET": History}
    responses = {
        "POST": {
            200: ("written; the pipeline knew the job", None),
            201: ("written; the pipeline did not know the job", None),
            202: ("it will be written soon, by a job", None),
        }
    }
    headers = {
        "POST": (
            zerog.server.header("Idempotency-Key", "the same entry once more is written once"),
            zerog.server.header("Prefer", "respond-async lets a job write the entry"),
        )
    }
    role = {"POST": "submit"}
    problems = {
        "POST": ((404, "unknown_job"), (404, "unknown_type"), (422, "idempotency_key_reused")),
        "GET": ((404, "not_found"),),
    }

    def post(self, entry: Entry) -> Answer:
        """Write where a job stands: 201 if the pipeline did not know the job, 200 if it did, 202 if that is to happen
        soon (``Prefer: respond-async``).  Under an Idempotency-Key it is written once."""
        self._refuse_hidden(entry.job)
        key = self.idempotency_key()
        if "respond-async" in self.request.headers.get("Prefer", "").lower().replace(" ", "").split(","):
            return self._later(entry, key)
        _standings.announce(self, entry.pipeline)
        value = {"job": entry.job, "state": entry.state, "message": entry.message}
        number = self._write(entry.pipeline, value, key)
        message = self.topics.read(topic(entry.pipeline), number - 1, 1)[0]
        if message.value != value:
            raise Problem(422, "the Idempotency-Key was used for another entry", "idempotency_key_reused")
        first = _standings.first_of(self, entry.pipeline, entry.job)
        view = entry_view(entry.pipeline, message.number, message.at, value)
        return Answer(view, 200 if first < message.number else 201, {"Location": view["href"]})

    def _write(self, pipeline: str, value: dict[str, Any], key: str | None) -> int:
        """Write an entry once and return its number."""
        written = f"key:{self.principal}:{key}" if key is not None else f"once:{secrets.token_hex(8)}"
        known = _standings.number_of(self, pipeline, written) if key is not None else None
        if known is not None:
            return known
        self.topics.publish(topic(pipeline), value, written)
        number = _standings.number_of(self, pipeline, written)
        assert number is not None
        return number

    def _refuse_hidden(self, job: str) -> None:
        """Refuse to write about a job of ZeroG that does not exist for whoever asks."""
        if self.limited and _UUID.fullmatch(job):
            record = self.manager.get_many([job]).get(job)
            if record is not None and not self.sees(record.job_type):
                raise Problem(404, "there is no job with this UUID", "unknown_job")

    def _later(self, entry: Entry, key: str | None) -> Answer:
        record = self.run("pipeline-log", entry.model_dump(exclude_none=True), key)
        _standings.announce(self, entry.pipeline)
        href = f"/jobs/{record.uuid}"
        body = {"href": href, "job": {"href": href}, "pipeline": {"href": f"/pipelines/{entry.pipeline}"}}
        return Answer(body, 202, {"Location": href, "Preference-Applied": "respond-async"})

    def get(self, wanted: History) -> Answer:
        """Show what was written, in order."""
        if not _standings.read(self, wanted.pipeline).jobs:
            raise Problem(404, f"there is no pipeline {wanted.pipeline}", "not_found")
        items: list[dict[str, Any]] = []
        following, last = None, wanted.after
        for looked_at, message in enumerate(_standings.entries(self, wanted.pipeline, wanted.after)):
            if len(items) == wanted.limit or looked_at == _LOOKED_AT:
                query = {"pipeline": wanted.pipeline, "job": wanted.job, "limit": wanted.limit, "after": last}
                following = "/log?" + urlencode({name: value for name, value in query.items() if value is not None})
                break
            last = message.number
            if wanted.job is None or message.value["job"] == wanted.job:
                items.append(entry_view(wanted.pipeline, message.number, message.at, message.value))
        headers = {"Link": f'<{following}>; rel="next"'} if following else {}
        return Answer({"items": items, "next": following, "href": self.request.uri}, 200, headers)


class OneEntry(BaseModel):
    """The number of an entry."""

    number: int = Field(ge=1)


class LogEntry(zerog.server.Endpoint):
    """One entry."""

    name = "log entry"
    url = "/pipelines/{name}/log/{number}"
    parameters = OneEntry
    problems = {"GET": ((404, "not_found"),)}

    def get(self, wanted: OneEntry) -> dict[str, Any]:
        """Show the entry."""
        name = pipeline_of(self)
        message = next(_standings.entries(self, name, wanted.number - 1), None)
        if message is not None and message.number == wanted.number:
            return entry_view(name, message.number, message.at, message.value)
        raise Problem(404, f"pipeline {name} has no entry {wanted.number}", "not_found")


class Page(BaseModel):
    """Which part of a list is wanted."""

    after: int = Field(0, ge=0, description="where the page starts, from the last one's next")
    limit: int = Field(50, ge=1, le=1000, description="how many items a page has")


class PageOfPipelines(Page):
    """Which part of the list of pipelines is wanted."""

    limit: int = Field(50, ge=1, le=KEPT, description="how many items a page has")


class Pipelines(zerog.server.Endpoint):
    """All pipelines."""

    name = "pipelines"
    url = "/pipelines"
    parameters = PageOfPipelines

    def get(self, page: PageOfPipelines) -> Answer:
        """Show every pipeline with the counts of its jobs by state."""
        wanted = _standings.names(self, page.after, page.limit + 1)
        items = [self._view(name) for name, _ in wanted[: page.limit]]
        following = (
            f"/pipelines?after={wanted[page.limit - 1][1]}&limit={page.limit}" if len(wanted) > page.limit else None
        )
        headers = {"Link": f'<{following}>; rel="next"'} if following else {}
        return Answer({"items": items, "next": following, "href": self.request.uri}, 200, headers)

    def _view(self, name: str) -> dict[str, Any]:
        standing = _standings.read(self, name)
        return {"name": name, "href": f"/pipelines/{name}", "counts": standing.counts(), "jobs": len(standing.jobs)}


class Pipeline(zerog.server.Endpoint):
    """One pipeline."""

    name = "pipeline"
    url = "/pipelines/{name}"
    parameters = Page
    problems = {"GET": ((404, "not_found"),)}

    def get(self, page: Page) -> Answer:
        """Show how many jobs are in which state, and the latest state of each, in the order in which they came."""
        name = pipeline_of(self)
        standing = _standings.read(self, name)
        if not standing.jobs:
            raise Problem(404, f"there is no pipeline {name}", "not_found")
        ordered = [(job, one) for job, one in standing.jobs.items() if one.first > page.after]
        items = [job_view(name, job, one) for job, one in ordered[: page.limit]]
        more = len(ordered) > page.limit
        following = f"/pipelines/{name}?after={ordered[page.limit - 1][1].first}&limit={page.limit}" if more else None
        headers = {"Link": f'<{following}>; rel="next"'} if following else {}
        body = {
            "href": f"/pipelines/{name}",
            "name": name,
            "counts": standing.counts(),
            "jobs": items,
            "next": following,
            "log": {"href": f"/log?pipeline={name}"},
        }
        return Answer(body, 200, headers)


class InPipeline(zerog.server.RunParameter):
    """``POST /run/…?pipeline=NAME``: the pipeline shows the job, and its state follows the record."""

    name = "pipeline"
    description = "pipeline in which the job's state is to be seen"
    schema = {"type": "string", "pattern": NAME}

    def parse(self, text: str) -> str:
        """Read the name of a pipeline."""
        if not re.fullmatch(NAME, text, re.ASCII):
            raise ValueError("the name of a pipeline: 1 to 100 of A-Z a-z 0-9 . _ -")
        return no_dots(text)

    def before(self, endpoint: zerog.server.Endpoint, value: str, uuid: str) -> None:
        """Write the entry before the job is stored: readers pass over one whose job never was."""
        _standings.announce(endpoint, value)
        entry = {"job": uuid, "state": "queued", "message": None, "follows": True}
        endpoint.topics.publish(topic(value), entry, f"follows:{uuid}")


def pipeline_of(endpoint: zerog.server.Endpoint) -> str:
    """Return the name in the path; a name that none can have is not found."""
    name = endpoint.request.path["name"]
    if not re.fullmatch(NAME, name, re.ASCII) or name in (".", ".."):
        raise Problem(404, "there is no such pipeline", "not_found")
    return name


def entry_view(pipeline: str, number: int, at: float, value: dict[str, Any]) -> dict[str, Any]:
    """Return an entry as JSON."""
    return {
        "href": f"/pipelines/{pipeline}/log/{number}",
        "number": number,
        "pipeline": pipeline,
        "job": value["job"],
        "state": value["state"],
        "message": value["message"],
        "at": zerog.server.iso(at),
    }


def job_view(pipeline: str, job: str, standing: Standing) -> dict[str, Any]:
    """Return where a job stands as JSON; one of ZeroG's by reference to it."""
    own = _UUID.fullmatch(job)
    href = f"/jobs/{job}" if own else f"/log?pipeline={pipeline}&job={quote(job, safe='')}"
    return {
        "job": job,
        "state": standing.state,
        "at": zerog.server.iso(standing.at),
        "message": standing.message,
        "href": href,
    }
