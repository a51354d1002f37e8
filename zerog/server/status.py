"""The endpoints of the service itself: start page, liveness, readiness, description."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, ClassVar

import zerog
from zerog.exceptions import StoreUnavailable, UnknownResource, ZerogError
from zerog.server import pages
from zerog.server.endpoint import JSON, Answer, Endpoint
from zerog.server.live import Watched

#: Seconds within which the store must answer for the server to be ready.
_READY_WITHIN = 1.0


class Start(Watched):
    """The start page."""

    name = "start"
    url = "/"
    responses = {"GET": {200: ("what this server is and where things are", "Start")}}

    async def get(self) -> Answer:
        """Show what is here, what runs now, and the newest jobs."""
        return await self.shown("start")

    async def view(self) -> dict[str, Any]:
        """Return what whoever asks may see."""
        newest = await self.services.newest.get(self.within)
        body: dict[str, Any] = {
            "service": self.manager.service,
            "version": zerog.__version__,
            "href": "/",
            "jobs": {"href": "/jobs"},
            "types": {"href": "/types"},
            "openapi": {"href": "/openapi.json"},
            "queue": {"href": "/queue"},
            "running": [one for one in await self.services.running.get(self.within) if self.sees(one["jobType"])],
            "newest": [one for one in newest if self.sees(one["jobType"])],
        }
        return body


class Health(Endpoint):
    """Liveness: this process answers.  Touches nothing."""

    name = "healthz"
    public = True
    url = "/healthz"
    offers = (JSON,)
    responses = {"GET": {200: ("the process answers", "Health")}}

    async def get(self) -> Answer:
        """Say that the process answers."""
        return Answer({"status": "ok"})


class Ready(Endpoint):
    """Readiness: the store answers."""

    name = "readyz"
    public = True
    url = "/readyz"
    offers = (JSON,)
    responses = {
        "GET": {200: ("the store answers; the queue may be away", "Ready"), 503: ("the store does not answer", "Ready")}
    }

    async def get(self) -> Answer:
        """Ask store and queue; only the store decides."""
        # In threads that nothing else uses: whether the store is there must not depend on who else waits for what.
        # A server that has not heard yet whether there are tokens refuses everybody: it is not ready either.
        store = await self._asked(self.manager.store.probe, self.services.probes) and self._knows_tokens()
        queue = not self.manager.queue_away and await self._asked(self._queue, self.services.pool)
        body = {
            "status": "ok" if store and queue else "degraded" if store else "unavailable",
            "store": "ok" if store else "unavailable",
            "queue": "ok" if queue else "unavailable",
        }
        if self._stranger():
            body = {"status": body["status"]}
        return Answer(body, 200 if store else 503)

    def _knows_tokens(self) -> bool:
        try:
            return self.services.tokens.on is not None
        except StoreUnavailable:
            return False

    def _stranger(self) -> bool:
        """Return whether tokens are on and whoever asks has none."""
        try:
            return self.request.principal is None and self.services.tokens.on
        except StoreUnavailable:
            return True

    def _queue(self) -> None:
        self.manager.queue.identity()  # looked up here: its connection belongs to the thread that asks

    async def _asked(self, call: Callable[[], object], pool: Executor) -> bool:
        try:
            await asyncio.wait_for(self.off_loop(call, pool=pool), _READY_WITHIN)
        except (ZerogError, TimeoutError):
            return False
        return True


class Asset(Endpoint):
    """Base of what the pages are made of: ``content``, as ``media_type``."""

    content: ClassVar[bytes] = b""
    media_type: ClassVar[str] = ""

    async def get(self) -> Answer:
        """Send the file."""
        return Answer(self.content, headers={"Cache-Control": "max-age=3600"}, media_type=self.media_type)


class Script(Asset):
    """The script of the pages: they can be read without it."""

    name = "script"
    url = "/live.js"
    offers = ("text/javascript",)
    responses = {"GET": {200: ("the script", "Bytes")}}
    content, media_type = pages.SCRIPT, "text/javascript; charset=utf-8"


class Icon(Asset):
    """The icon of the pages."""

    name = "icon"
    url = "/icon.svg"
    offers = ("image/svg+xml",)
    responses = {"GET": {200: ("the icon", "Bytes")}}
    content, media_type = pages.ICON, "image/svg+xml"


class Style(Asset):
    """The style sheet of the pages."""

    name = "style"
    url = "/style.css"
    offers = ("text/css",)
    responses = {"GET": {200: ("the style sheet", "Bytes")}}
    content, media_type = pages.STYLE, "text/css; charset=utf-8"


class Nothing(Endpoint):
    """What is at a URL where nothing is."""

    name = "nothing"
    url = ""

    @classmethod
    def methods(cls) -> tuple[str, ...]:
        """Return every method: a URL where nothing is has none to refuse."""
        return ("GET", "POST", "PUT", "PATCH", "DELETE")

    async def find(self) -> None:
        """Refuse."""
        raise UnknownResource()
