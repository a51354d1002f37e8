"""Endpoints of an application, as somebody else would write them: public names only."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel, Field

import zerog
import zerog.server
from zerog.server import Answer, Problem


class Range(BaseModel):
    """Two numbers."""

    first: int = Field(0, ge=0, le=1_000_000, description="where it begins")
    last: int = Field(ge=0, le=1_000_000, description="where it ends")


class Sums(zerog.server.Endpoint):
    """Sums of numbers."""

    name = "sums"
    url = "/sums"
    parameters = Range

    def get(self, parameters: Range) -> dict[str, Any]:
        """Return a sum."""
        on_loop = threading.current_thread() is threading.main_thread()
        return {"sum": sum(range(parameters.first, parameters.last)), "onLoop": on_loop, "href": "/sums"}

    def post(self, parameters: Range) -> Answer:
        """Keep a range."""
        return Answer({"range": [parameters.first, parameters.last]}, 201, {"Location": "/sums/kept"})


class Counter(BaseModel):
    """Which document is wanted."""

    key: str = Field(pattern="^[a-z]{1,10}$")


class Count(zerog.server.Endpoint):
    """What jobs have counted."""

    name = "count"
    url = "/counts/{key}"
    parameters = Counter

    def get(self, counter: Counter) -> dict[str, Any]:
        """Show how far they are."""
        try:
            value, _ = self.documents.get(counter.key)
        except zerog.NotFound:
            value = {"count": None}
        return {**value, "href": f"/counts/{counter.key}"}


class Named(BaseModel):
    """What a name in the path stands for."""

    name: str = Field(pattern="^[a-z]{1,10}$")
    loud: bool = False


class Greeting(zerog.server.Endpoint):
    """Greets."""

    name = "greeting"
    url = "/greetings/{name}"
    parameters = Named
    role = "admin"

    def get(self, parameters: Named) -> dict[str, Any]:
        """Greet."""
        text = f"hello {parameters.name}"
        return {"text": text.upper() if parameters.loud else text, "service": self.manager.service}


class Pause(BaseModel):
    """How long to wait."""

    seconds: float = Field(0, ge=0, le=10)


class Slow(zerog.server.Endpoint):
    """Waits, as for a slow store."""

    name = "slow"
    url = "/slow"
    parameters = Pause

    def get(self, parameters: Pause) -> dict[str, Any]:
        """Wait."""
        time.sleep(parameters.seconds)  # what the test asked for
        return {"waited": parameters.seconds}


class Subject(BaseModel):
    """What becomes of what is watched."""

    goes: bool = False


class Ends(zerog.server.Endpoint):
    """A stream whose subject goes away meanwhile."""

    name = "stream that ends"
    url = "/ends"
    offers = ("text/event-stream",)
    parameters = Subject

    async def get(self, subject: Subject) -> Answer:
        """Say something, and find then, perhaps, that there is nothing any more."""
        return Answer(stream=self._pieces(subject.goes), media_type="text/event-stream")

    async def _pieces(self, goes: bool) -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        if goes:
            raise Problem(404, "it is gone", "gone")


class Color(enum.Enum):
    """A colour."""

    RED = "red"
    BLUE = "blue"


class Odd(BaseModel):
    """What a query can hold."""

    color: Color = Color.RED
    tags: list[str] = []
    from_: int = Field(0, alias="from")
    weight: float | None = None


class Query(zerog.server.Endpoint):
    """Shows what it was asked."""

    name = "query"
    url = "/query"
    parameters = Odd

    def get(self, asked: Odd) -> dict[str, Any]:
        """Show it."""
        return asked.model_dump(mode="json")


class What(BaseModel):
    """What a defect does."""

    what: str


class Defects(zerog.server.Endpoint):
    """Answers what cannot be sent."""

    name = "defects"
    url = "/defects"
    parameters = What

    def get(self, asked: What) -> Any:
        """Do it."""
        match asked.what:
            case "exit":
                raise SystemExit(3)
            case "interrupt":
                raise KeyboardInterrupt
            case "bytes":
                return b"abc"
            case "csv":
                return Answer(b"a,b\n", 200, {"Content-Type": "text/csv"})
        answers = {
            "set": {1}, "nan": float("nan"), "surrogate": "\ud800", "status": Answer({}, 9999),
            "header": Answer({}, 200, {"X-A": "a\r\nb"}), "latin": Answer({}, 200, {"X-A": "\u20ac"}),
        }  # fmt: skip
        return answers[asked.what]


class Broken(zerog.server.Endpoint):
    """Has a defect, or refuses."""

    name = "broken endpoint"
    url = "/broken-endpoint"
    problems = {"PUT": ((409, "asked_for"),)}

    def get(self) -> None:
        """Raise what nobody expects."""
        raise RuntimeError("a secret of the defect")

    def put(self) -> None:
        """Refuse."""
        raise Problem(409, "as was asked", "asked_for", detail_of="this")
