"""The endpoints of consumers: where each stands, and what is behind."""

from __future__ import annotations

from typing import Any, ClassVar

from zerog import consumers
from zerog.consumer import NAME
from zerog.consumers import ConsumerRecord
from zerog.exceptions import Forbidden, StateConflict, UnknownConsumer
from zerog.server.endpoint import Answer, Endpoint


class Consumers(Endpoint):
    """All consumers of topics that have ever run."""

    name = "consumers"
    url = "/consumers"
    responses = {"GET": {200: ("every consumer, and how far it is", "Consumers")}}

    async def find(self) -> None:
        """Refuse tokens that are limited to types: they see no topics."""
        check_sees_topics(self)

    async def get(self) -> Answer:
        """Show the consumers, and how many messages each is behind."""
        items = await self.off_loop(self._views)
        return Answer({"items": items, "next": None, "href": self.request.uri}, page="consumers")

    def _views(self) -> list[dict[str, Any]]:
        return [shown(self, one) for one in self.manager.consumers.all()]


class Consumer(Endpoint):
    """One consumer of topics."""

    name = "consumer"
    url = "/consumers/{name}"
    responses = {
        "GET": {200: ("where it stands", "Consumer")},
        "DELETE": {204: ("it is forgotten, and begins anew if it ever runs again", None)},
    }
    problems: ClassVar = {"GET": (UnknownConsumer,), "DELETE": (UnknownConsumer, StateConflict)}

    async def find(self) -> None:
        """Refuse names that no consumer can have, and tokens that are limited to types."""
        check_sees_topics(self)
        if not NAME.fullmatch(self.request.path["name"]):
            raise UnknownConsumer("there is no consumer of this name")

    async def get(self) -> Answer:
        """Show where the consumer stands in its topics, who runs it, and what it could not handle last."""
        return Answer(await self.off_loop(self._view), page="general")

    def _view(self) -> dict[str, Any]:
        return shown(self, self.manager.consumers.get(self.request.path["name"]))

    async def delete(self) -> Answer:
        """Forget a consumer that runs no more, so that topics need not be kept for it."""
        await self.off_loop(self.manager.consumers.forget, self.request.path["name"])
        return Answer(status=204)


def check_sees_topics(endpoint: Endpoint) -> None:
    """Refuse a token that is limited to types: messages have none."""
    if endpoint.limited:
        raise Forbidden("a token that is limited to types sees no topics")


def shown(endpoint: Endpoint, record: ConsumerRecord) -> dict[str, Any]:
    """Return a consumer as JSON."""
    return consumers.view(record, {topic: endpoint.topics.newest(topic) for topic in record.topics})
