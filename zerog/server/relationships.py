"""The endpoints of what a job waits for, and of what waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zerog import views
from zerog.manager import Page
from zerog.record import JobRecord
from zerog.server.collection import CURSOR, LIMIT, OfJob, collection, expand_parameter
from zerog.server.endpoint import Answer
from zerog.server.run import hidden

#: Children that are counted; of more it is only said that there are.
_COUNTED = 1000

_EXPAND = expand_parameter("parents", "children")


class Relationships(OfJob):
    """What a job waits for, and what waits for it."""

    name = "relationships"
    url = "/jobs/{uuid}/relationships"
    parameters = {"GET": (_EXPAND,)}
    responses = {"GET": {200: ("parents and children by reference", "Relationships")}}

    async def get(self) -> Answer:
        """Show references to the parents and the children, and how many there are."""
        parents = await self.off_loop(parents_of, self)
        children = await self.off_loop(self._children)
        unseen = await self.off_loop(hidden, self, self.record.parents)
        href = views.job_href(self.record.uuid)
        count = len(children.items) if children.next is None else None
        body: dict[str, Any] = {
            "href": f"{href}/relationships",
            "parents": {"href": f"{href}/parents", "count": len(self.record.parents) - len(unseen)},
            "children": {"href": f"{href}/children", "count": count},
        }
        for name, records in (("parents", parents), ("children", children.items)):
            if name in self.request.query["expand"]:
                body[name]["items"] = [views.item(record) for record in records]
        return Answer(body, page="relationships")

    def _children(self) -> Page:
        page = self.manager.children(self.record.uuid, limit=_COUNTED)
        return Page([record for record in page.items if self.sees(record.job_type)], page.next)


def parents_of(endpoint: OfJob) -> Sequence[JobRecord]:
    """Return those parents of a job that are still there, in the order named, as far as whoever asks may know."""
    found = endpoint.manager.get_many(endpoint.record.parents)
    records = (found.get(parent) for parent in endpoint.record.parents)
    return [record for record in records if record is not None and endpoint.sees(record.job_type)]


class Parents(OfJob):
    """The jobs that one waits for."""

    name = "parents"
    url = "/jobs/{uuid}/parents"
    responses = {"GET": {200: ("the parents that are still there, in the order named", "Jobs")}}

    async def get(self) -> Answer:
        """Show the parents."""
        items = [views.item(record) for record in await self.off_loop(parents_of, self)]
        return Answer({"items": items, "next": None, "href": self.request.uri}, page="jobs")


class Children(OfJob):
    """The jobs that wait for one."""

    name = "children"
    url = "/jobs/{uuid}/children"
    parameters = {"GET": (LIMIT, CURSOR)}
    responses = {"GET": {200: ("a page of the children, in the order of their submits", "Jobs")}}

    async def get(self) -> Answer:
        """Page through the children."""
        scope = f"children/{self.record.uuid}"
        page = await self.off_loop(self._read, scope)
        return await collection(self, page, [views.item(record) for record in page.items], {}, scope, "jobs")

    def _read(self, scope: str) -> Page:
        cursor = self.request.query["cursor"]
        after = 0 if cursor is None else self.manager.read_cursor(cursor, scope)
        page = self.manager.children(self.record.uuid, after, self.request.query["limit"])
        return Page([record for record in page.items if self.sees(record.job_type)], page.next)
