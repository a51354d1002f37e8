"""The endpoints of topics: read by position, and written by whoever operates."""

from __future__ import annotations

from typing import Any, ClassVar
from urllib.parse import urlencode

from zerog import codec
from zerog.clock import to_iso
from zerog.consumer import FINISHED, is_topic
from zerog.exceptions import Forbidden, InvalidParameters, Problem, UnknownTopic
from zerog.server.collection import LIMIT
from zerog.server.consumers import check_sees_topics
from zerog.server.endpoint import Answer, Endpoint, Parameter, ranged
from zerog.topics import Message

#: Bytes of messages after which a page ends.
_PAGE_BYTES = 4 * 1024 * 1024

AFTER = Parameter(
    "after", ranged("after", 0, 2**53 - 1), {"type": "integer", "minimum": 0, "default": 0},
    "only messages with greater numbers", 0,
)  # fmt: skip


class Topic(Endpoint):
    """The messages of a topic."""

    name = "topic"
    url = "/topics/{name}"
    takes_json = ("POST",)
    any_json = ("POST",)
    parameters: ClassVar = {"GET": (AFTER, LIMIT)}
    responses = {
        "GET": {200: ("a page of messages, in order", "Messages")},
        "POST": {201: ("it is in the topic, and has a number there", "Published")},
    }
    problems: ClassVar = {"GET": (UnknownTopic,), "POST": (UnknownTopic,)}

    async def find(self) -> None:
        """Refuse names that no topic can have, and tokens that are limited to types: messages have none."""
        self.topic = self.request.path["name"]
        if not is_topic(self.topic):
            raise UnknownTopic(f"there is no topic {codec.printable(self.topic, 100)}")
        check_sees_topics(self)
        if self.topic == FINISHED and self.request.method == "POST":
            raise Problem(403, f"{FINISHED} is written by ZeroG alone", Forbidden.code)

    async def get(self) -> Answer:
        """Show the messages after a number, the oldest first."""
        after, limit = self.request.query["after"], self.request.query["limit"]
        found, more = await self.off_loop(self._read, after, limit)
        following, headers = None, {}
        if more:
            following = f"{self._href}?{urlencode({'after': found[-1].number, 'limit': limit})}"
            headers["Link"] = f'<{following}>; rel="next"'
        items = [{"number": one.number, "at": to_iso(one.at), "value": one.value} for one in found]
        return Answer({"items": items, "next": following, "href": self.request.uri}, 200, headers, "messages")

    def _read(self, after: int, limit: int) -> tuple[list[Message], bool]:
        """Return a page, which may be short, and whether there is more."""
        found = self.topics.read_within(self.topic, after, limit, _PAGE_BYTES)
        if not found and not self._known and not self.topics.newest(self.topic):
            raise UnknownTopic(f"there is no topic {self.topic}")
        return found, bool(found) and bool(self.topics.entries(self.topic, found[-1].number, 1))

    @property
    def _known(self) -> bool:
        """Whether there is such a topic although nothing may be in it, or nothing any more."""
        registry = self.services.registry
        return self.topic == FINISHED or self.topic in registry.topics or bool(registry.followers(self.topic))

    async def post(self) -> Answer:
        """Publish a message: any JSON value.  A topic is there from its first message on."""
        number = await self.off_loop(self._publish, codec.parse_value(self.request.body))
        href = f"{self._href}?{urlencode({'after': number - 1, 'limit': 1})}"
        return Answer({"number": number, "href": href}, 201, {"Location": href})

    def _publish(self, value: Any) -> int:
        try:
            return self.topics.publish(self.topic, value).number
        except ValueError as error:
            raise InvalidParameters([{"pointer": "", "code": "length", "detail": str(error)}]) from error

    @property
    def _href(self) -> str:
        return f"/topics/{self.topic}"
