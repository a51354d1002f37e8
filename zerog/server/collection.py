"""What endpoints of jobs share: finding the job, pages of a collection, embedding."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from zerog.exceptions import (
    UnknownJob,
)
from zerog.manager import Page
from zerog.record import JobRecord
from zerog.server.endpoint import (
    NO_SUCH_JOB,
    Answer,
    Endpoint,
    Parameter,
    ranged,
)

_INTEGER = {"type": "integer"}
LIMIT = Parameter("limit", ranged("limit", 1, 1000), {**_INTEGER, "minimum": 1, "maximum": 1000, "default": 50},
                  "how many items a page has", 50)  # fmt: skip
CURSOR = Parameter("cursor", str, {"type": "string"}, "where the page starts, from the last one's next")


def expand_parameter(*names: str) -> Parameter:
    """Return the parameter that says which references are to be embedded."""

    def parse(text: str) -> str:
        if text not in names:
            raise ValueError("one of " + ", ".join(names))
        return text

    schema = {"type": "string", "enum": list(names)}
    what = "reference that is to be embedded; may stand several times"
    return Parameter("expand", parse, schema, what, (), repeated=True)


class OfJob(Endpoint):
    """Base of what lies below one job: finds it."""

    record: JobRecord

    async def find(self) -> None:
        """Read the record."""
        self.record = await self.services.read(self.uuid())
        if not self.sees(self.record.job_type):
            raise UnknownJob(NO_SUCH_JOB)


async def collection(
    endpoint: Endpoint, page: Page, items: list[Any], filters: dict[str, str], scope: str, name: str
) -> Answer:
    """Return a page of a collection, with the reference to the next one in the body and in ``Link``."""
    path = endpoint.request.uri.partition("?")[0]
    following = None
    headers = {}
    if page.next is not None:
        cursor = await endpoint.off_loop(endpoint.manager.sign_cursor, page.next, scope)
        query = urlencode({**filters, "limit": endpoint.request.query["limit"], "cursor": cursor})
        following = f"{path}?{query}"
        headers["Link"] = f'<{following}>; rel="next"'
    return Answer({"items": items, "next": following, "href": endpoint.request.uri}, 200, headers, name)
