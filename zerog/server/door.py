"""Door: the one Tornado handler in front of all endpoints, with every rule about HTTP.

It checks in a fixed order (host, method, origin, size, acceptable type; then what the path names, media type of the
body, query, body), renders answers and errors as JSON or as a page, and never lets a body grow beyond the limit.
"""

from __future__ import annotations

import asyncio
import logging
from base64 import b64decode
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from inspect import iscoroutinefunction
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import tornado.web
from pydantic import BaseModel
from tornado.httputil import HTTPServerRequest
from tornado.iostream import StreamClosedError

from zerog import codec, views
from zerog.exceptions import (
    BodyTooLarge,
    CrossOrigin,
    Forbidden,
    InternalError,
    InvalidParameter,
    MethodNotAllowed,
    Misdirected,
    NotAcceptable,
    RequestError,
    StoreUnavailable,
    Unauthenticated,
    UnknownJob,
    UnknownResource,
    UnsupportedMediaType,
    ZerogError,
)
from zerog.server import pages
from zerog.server.endpoint import (
    ANY,
    BYTES,
    EVENTS,
    HTML,
    JSON,
    NO_SUCH_JOB,
    PROBLEM,
    Answer,
    Endpoint,
    Request,
    Services,
    read_model,
    read_query,
)
from zerog.server.negotiation import choose
from zerog.tokens import Token

logger = logging.getLogger(__name__)

#: Bytes and seconds for which a client may go on sending a body that was refused, so that it can read why.
_LINGER_BYTES = 1024 * 1024
_LINGER_SECONDS = 1.0

_BEARER = 'Bearer realm="ZeroG"'
_BASIC = 'Basic realm="ZeroG: the token is the password", charset="UTF-8"'

#: What pages of allowed origins may send and read beside what every page may.
_SENT = "Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match, Prefer, Range"
_EXPOSED = "ETag, Idempotency-Replayed, Link, Location, Preference-Applied, RateLimit, RateLimit-Policy, Retry-After"

#: The status that is counted for a client that did not wait for its answer; nginx has the same.
_GONE = 499

_UNSAFE = frozenset({"POST", "PUT", "PATCH", "DELETE"})

#: Headers of every answer, and those that say something only with a page.
_ALWAYS = {"X-Content-Type-Options": "nosniff", "Vary": "Accept", "Cache-Control": "no-cache"}
_PAGE = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    # Not "no-referrer": then the forms of our own pages would come from the origin "null".
    "Referrer-Policy": "same-origin",
}


@tornado.web.stream_request_body
class Door(tornado.web.RequestHandler):
    """Answers one request through one endpoint."""

    SUPPORTED_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

    def initialize(self, endpoint: type[Endpoint], services: Services) -> None:
        """Take what the table of routes gives."""
        self._endpoint = endpoint
        self._services = services
        self._refusal: ZerogError | None = None
        self._body = bytearray()
        self._answered = False
        self._received = 0
        self._offer = ""
        self._failed = self._counted = False
        self._principal: Token | None = None
        self._limits: Mapping[str, str] = {}
        self._asked: Request | None = None
        self._dressed: Answer | None = None
        self._call: asyncio.Future[Any] | None = None
        self._found: Endpoint | None = None
        self._abandoning: asyncio.Future[None] | None = None

    # Before the body

    def prepare(self) -> Awaitable[None] | None:
        """Check what can be checked before the body is read; one that is too large, or a stranger's, is not read."""
        self._services.in_flight.add(self)
        try:
            self._check_head()
        except ZerogError as error:
            self._refusal = error
        self._services.arriving[self] = self._services.clock.monotonic()
        length = self._content_length()
        if self._is_streamed():
            return self._begin_stream()
        if length is not None and length > self._services.max_body:
            return self._refuse_unread(self._refusal or self._too_large())
        if isinstance(self._refusal, (Unauthenticated, Misdirected)) and (length or self._is_chunked()):
            return self._refuse_unread(self._refusal)
        return None

    def _check_head(self) -> None:
        self._check_host()
        self._principal = self._authenticate()
        if self._principal is not None:
            self._limits = self._services.rates.spend(self._principal.id)
        method = self.request.method or ""
        if method not in ("OPTIONS", "HEAD") and method not in self._endpoint.methods():
            raise self._not_allowed()
        if method == "HEAD" and "GET" not in self._endpoint.methods():
            raise self._not_allowed()
        self._check_role(method)
        if method in _UNSAFE:
            self._check_origin()
            if len(self.request.headers.get_list("Idempotency-Key")) > 1:
                raise InvalidParameter("Idempotency-Key", "it stands twice among the headers")
        length = self._content_length()
        if length is not None and length > self._services.max_body and not self._is_streamed():
            raise self._too_large()
        self._offer = self._choose_offer()

    def _check_host(self) -> None:
        allowed = self._services.allowed_hosts
        if "*" in allowed or self._endpoint.public:  # whoever probes names an address
            return
        host = self.request.host.lower()
        name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
        if name not in allowed:
            raise Misdirected(f"this server does not answer for the host {codec.printable(name, 100)!r}")

    def _authenticate(self) -> Token | None:
        """Return whose token the request carries; None where tokens are off, or where anybody may ask."""
        if self._is_preflight():
            return None
        tokens = self._services.tokens
        try:
            if not tokens.on:
                return None
        except StoreUnavailable:
            if self._endpoint.public:
                return None
            raise
        holder = tokens.holder(_token_of(self.request.headers.get_list("Authorization")))
        if holder is None and not self._endpoint.public:
            error = Unauthenticated()
            error.headers["WWW-Authenticate"] = _BEARER
            if choose(self._accept(), (PROBLEM, JSON, HTML)) == HTML:
                error.headers["WWW-Authenticate"] += f", {_BASIC}"
            raise error
        return holder

    def _check_role(self, method: str) -> None:
        if self._principal is None or method == "OPTIONS" or not self._endpoint.url:
            return
        roles = self._endpoint.needed_roles(method)
        if not any(self._principal.may(role) for role in roles):
            raise Forbidden(f"this needs a token with the role {' or '.join(roles)}")

    def _check_still_allowed(self) -> None:
        """Refuse the rest of a stream to who may not have it any more: the token is revoked, or tokens are on now."""
        if self._authenticate() != self._principal:
            raise Unauthenticated()

    def _check_origin(self) -> None:
        headers = self.request.headers
        origin = headers.get("Origin")
        if origin is not None and self._is_allowed(origin):
            return
        foreign = origin is not None and urlsplit(origin).netloc.lower() != self.request.host.lower()
        if foreign or headers.get("Sec-Fetch-Site", "").lower() == "cross-site":
            raise CrossOrigin("an unsafe method from a page of another origin is refused")

    def _is_allowed(self, origin: str) -> bool:
        return origin.lower() in self._services.allowed_origins

    def _is_preflight(self) -> bool:
        """Return whether a browser asks what a page of an allowed origin may send, which it does without a token."""
        headers = self.request.headers
        asks = self.request.method == "OPTIONS" and "Access-Control-Request-Method" in headers
        return asks and self._is_allowed(headers.get("Origin", ""))

    def _cors(self) -> dict[str, str]:
        """Return the headers that let a page of an allowed origin read the answer."""
        origin = self.request.headers.get("Origin") if self._services.allowed_origins else None
        if origin is None or not self._is_allowed(origin):
            return {}
        headers = {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": _EXPOSED}
        if self._is_preflight():
            headers["Access-Control-Allow-Methods"] = self._endpoint.allow()
            headers["Access-Control-Allow-Headers"] = _SENT
            headers["Access-Control-Max-Age"] = "600"
        return headers

    def _choose_offer(self) -> str:
        if self._endpoint.offers == ANY:
            return ANY[0]  # what it offers is known only when it is found
        offer = choose(self._accept(), self._endpoint.offers)
        if offer is None:
            offers = ", ".join(self._endpoint.offers)
            raise NotAcceptable(f"this resource offers {offers}", offers=list(self._endpoint.offers))
        return offer

    def _accept(self) -> str:
        return ",".join(self.request.headers.get_list("Accept"))

    def _not_allowed(self) -> MethodNotAllowed:
        error = MethodNotAllowed(f"this resource has the methods {self._endpoint.allow()}")
        error.headers["Allow"] = self._endpoint.allow()
        return error

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is larger than {self._services.max_body} bytes")

    def _content_length(self) -> int | None:
        text = self.request.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdigit() else None

    def _is_chunked(self) -> bool:
        return "Transfer-Encoding" in self.request.headers

    async def _refuse_unread(self, error: ZerogError) -> None:
        """Answer before the body was read, let the client finish within bounds, and close the connection."""
        self._dress(self._problem(error))
        self.set_header("Connection", "close")
        await self._send(finish=False)
        self._count()
        self._services.in_flight.discard(self)
        stream = self.detach()
        try:
            if "100-continue" not in self.request.headers.get("Expect", "").lower():
                await asyncio.wait_for(_discard(stream), _LINGER_SECONDS)
        except (TimeoutError, StreamClosedError):
            pass  # it has had its time
        finally:
            stream.close()

    def _is_streamed(self) -> bool:
        """Return whether the body comes a piece at a time, of any size."""
        return (self.request.method or "") in self._endpoint.streamed

    async def _begin_stream(self) -> None:
        """Let the endpoint prepare for a body that comes a piece at a time; what it refuses is not read."""
        try:
            if self._refusal is not None:
                raise self._refusal
            read_query(self._query_pairs(), ())
            self._found = self._make_endpoint(dict(self.path_kwargs))
            await self._found.find()
            await self._found.begin()
        except ZerogError as error:
            self._refusal = error
            await self._abandon()
            await self._refuse_unread(error)
        except Exception:
            logger.exception("request failed: %s %s", self.request.method, codec.printable(self.request.path, 200))
            self._failed = True
            self._refusal = InternalError()
            await self._abandon()
            await self._refuse_unread(self._refusal)

    async def _receive(self, chunk: bytes) -> None:
        """Hand a piece of the body on; the next one is read when this one has been dealt with."""
        self._services.arriving[self] = self._services.clock.monotonic()
        assert self._found is not None
        try:
            await self._found.receive(chunk)
        except ZerogError as error:
            self._refusal = error
            await self._abandon()
            await self._refuse_half_read(error)
        self._services.arriving[self] = self._services.clock.monotonic()

    @property
    def body_idle(self) -> float | None:
        """Seconds without a byte of the body after which it is given up, if the endpoint says so."""
        return self._found.body_idle if self._found is not None else None

    async def _abandon(self) -> None:
        """Leave nothing of a body that does not come whole."""
        found, self._found = self._found, None
        if found is not None:
            try:
                await found.abandon()
            except ZerogError as error:
                logger.warning("what was half sent is left behind: %s", error)

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        """Take a piece of the body, up to the limit."""
        if self._found is not None and not self._answered:
            return self._receive(chunk)
        self._received += len(chunk)
        if self._answered:
            if self._received > self._services.max_body + _LINGER_BYTES:
                self.close_stream()
        elif self._received > self._services.max_body:
            self._body.clear()
            return self._refuse_half_read(self._refusal or self._too_large())
        elif self._refusal is None:
            self._body += chunk
        return None

    async def _refuse_half_read(self, error: ZerogError) -> None:
        """Answer in the middle of a body of unknown length, and let the client finish within bounds."""
        self._dress(self._problem(error))
        self.set_header("Connection", "close")
        await self._send(finish=False)
        self._count()
        asyncio.get_running_loop().call_later(_LINGER_SECONDS, self.close_stream)

    def on_connection_close(self) -> None:
        """Forget a request whose client has gone, and what waits for a thread to answer it."""
        if self._call is not None:
            self._call.cancel()
        if self._asked is not None:
            self._asked.gone = True
            for call in self._asked.when_gone:
                call()
        if self._found is not None and not self._answered:
            self._abandoning = asyncio.ensure_future(self._abandon())
        self._services.arriving.pop(self, None)
        self._services.in_flight.discard(self)
        super().on_connection_close()

    def on_finish(self) -> None:
        """Forget a request that was answered."""
        self._services.arriving.pop(self, None)

    def close_stream(self) -> None:
        """End the connection."""
        self._services.arriving.pop(self, None)
        self._services.in_flight.discard(self)
        stream: Any = getattr(self.request.connection, "stream", None)
        if stream is not None:
            stream.close()

    # After the body

    async def get(self, **path: str) -> None:
        """Answer the request, whatever its method."""
        if self._answered:
            self.close_stream()
            return
        self._services.arriving.pop(self, None)
        try:
            await self._dress_answer(path)
            await self._send()
        except StreamClosedError:
            await self._say_undelivered()
        finally:
            self._count()
            self._services.in_flight.discard(self)

    async def _say_undelivered(self) -> None:
        """The client has gone: let whoever made the answer take back what was in it."""
        undelivered = self._dressed.undelivered if self._dressed is not None else None
        if undelivered is not None:
            try:
                await asyncio.get_running_loop().run_in_executor(self._services.pool, undelivered)
            except ZerogError as error:
                logger.info("an answer that was not delivered is left as it is: %s", error)

    async def _dress_answer(self, path: Mapping[str, str]) -> None:
        """Have the request answered, and make the answer ready to be sent."""
        try:
            try:
                self._dress(await self._answer(path))
            except ZerogError as error:
                self._dress(self._problem(error))
        except StreamClosedError:
            self.set_status(_GONE, "Client Closed Request")
            raise
        except (Exception, SystemExit, KeyboardInterrupt):  # whatever an application's endpoint does
            logger.exception("request failed: %s %s", self.request.method, codec.printable(self.request.path, 200))
            self._failed = True
            self._dress(self._problem(InternalError()))

    def _count(self) -> None:
        """Count the request among the statistics, once, whatever became of it."""
        if not self._counted:
            self._counted = True
            seconds = self.request.request_time() - (self._asked.waited if self._asked is not None else 0.0)
            self._services.statistics.count_request(self._endpoint.name, self.get_status(), seconds, self._failed)

    head = post = put = patch = delete = options = get

    async def _answer(self, path: Mapping[str, str]) -> Answer:
        if self._refusal is not None:
            raise self._refusal
        method = self.request.method or ""
        if method == "OPTIONS":
            return Answer(status=204, headers={"Allow": self._endpoint.allow()})
        call: Callable[..., Any]
        verb = "GET" if method == "HEAD" else method
        if self._found is not None:
            call = getattr(self._found, verb.lower())
            try:
                done = await call()
            except ZerogError:
                await self._abandon()
                raise
            self._found = None
            return done if isinstance(done, Answer) else Answer(done)
        endpoint = self._make_endpoint(path)
        request = endpoint.request
        await endpoint.find()
        model, reads_json, is_coroutine = _shape(self._endpoint, verb)
        if reads_json and (request.body or verb not in self._endpoint.body_optional):
            self._check_media_type()
        pairs = self._query_pairs()
        call = getattr(endpoint, verb.lower())
        arguments = () if model is None else (read_model(model, request, pairs),)
        if model is None:
            request.query = read_query(pairs, endpoint.known_parameters(verb))
            request.written = _written(pairs)
        if is_coroutine:
            done = await call(*arguments)
        else:
            done = await self._in_thread(call, *arguments)
        return done if isinstance(done, Answer) else Answer(done)

    def _make_endpoint(self, path: Mapping[str, str]) -> Endpoint:
        method = self.request.method or ""
        self._asked = Request(
            "GET" if method == "HEAD" else method,
            path,
            self.request.headers,
            bytes(self._body),
            self._offer,
            self.request.uri or "",
            self.request.host,
            self._principal,
        )
        return self._endpoint(self._services, self._asked, asyncio.get_running_loop())

    async def _in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call a plain method in a thread of its own kind: however long it waits, no other request waits for it."""
        loop = asyncio.get_running_loop()
        self._call = loop.run_in_executor(self._services.applications, call, *arguments)
        try:
            return await self._call
        except asyncio.CancelledError:
            if self._call.cancelled():  # nobody waits for it any more, and it had not begun
                raise StreamClosedError from None
            raise

    def _check_media_type(self) -> None:
        kind, *parameters = (part.strip() for part in self.request.headers.get("Content-Type", "").lower().split(";"))
        if kind != JSON:
            raise UnsupportedMediaType("the body must have the Content-Type application/json")
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "charset" and value.strip(' "') not in ("utf-8", "utf8"):
                raise UnsupportedMediaType("the charset of a JSON body is utf-8")
        if self.request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise UnsupportedMediaType("a body with a Content-Encoding is not accepted")

    def _query_pairs(self) -> list[tuple[str, str]]:
        query = self.request.query
        if not query:
            return []
        try:
            pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=100)
        except ValueError as error:
            raise InvalidParameter("query", "the query is not UTF-8, or has more than 100 fields") from error
        return pairs

    # Answers

    def _problem(self, error: ZerogError) -> Answer:
        body = views.problem(error)
        headers = dict(error.headers)
        if isinstance(error, StoreUnavailable):
            headers.setdefault("Retry-After", "1")
        offer = choose(self._accept(), (PROBLEM, JSON, HTML))
        media_type = HTML if offer == HTML else PROBLEM
        return Answer(body, error.status, headers, "problem", media_type)

    def _dress(self, answer: Answer) -> None:
        """Set status, headers and body, in place of what was set before; raises for what cannot be sent."""
        self.clear()
        if not isinstance(answer.status, int) or not 200 <= answer.status <= 599:
            raise ValueError(f"an answer has a status from 200 to 599, and not {answer.status!r}")
        self.set_status(answer.status)
        for name, value in {**_ALWAYS, **self._cors(), **self._limits, **answer.headers}.items():
            value.encode("latin-1")
            self.set_header(name, value)
        if self._services.allowed_origins:
            self.set_header("Vary", f"{self._headers.get('Vary', 'Accept')}, Origin")
        self._dressed = answer
        if answer.stream is None:
            self._write_body(answer)

    async def _send(self, finish: bool = True) -> None:
        """Send the answer that is ready."""
        if self._answered:
            return
        self._answered = True
        assert self._dressed is not None
        if self._dressed.stream is not None:
            await self._send_stream(self._dressed)
            return
        if finish:
            await self.finish()
        else:
            await self.flush()

    def _write_body(self, answer: Answer) -> None:
        if answer.status in (204, 303, 304):
            self.clear_header("Content-Type")
            return
        media_type = answer.media_type or answer.headers.get("Content-Type") or self._offer
        if isinstance(answer.body, bytes):
            body = answer.body
            media_type = media_type if media_type != self._offer or self._offer not in (JSON, HTML) else BYTES
        elif media_type == HTML:
            body = pages.render(answer.page, answer.body, self.request.path, self.request.host, answer.aside)
            media_type = "text/html; charset=utf-8"
            for name, value in _PAGE.items():
                self.set_header(name, value)
        else:
            body = codec.dumps(answer.body)
            if media_type not in (JSON, PROBLEM) and "Content-Type" not in answer.headers:
                media_type = JSON
        self.set_header("Content-Type", media_type)
        self.set_header("Content-Length", str(len(body)))
        self.write(body)

    async def _send_stream(self, answer: Answer) -> None:
        assert answer.stream is not None
        self.set_header("Content-Type", answer.media_type or self._offer)
        if self.request.method == "HEAD":
            await self.finish()
            return
        if answer.media_type == EVENTS:
            await self.flush()  # so that the client knows at once that it is heard
            # That is the answer; how long somebody watches says nothing of the server, and its end waits for nobody.
            self._count()
            self._services.in_flight.discard(self)
        try:
            async for piece in answer.stream:
                if answer.media_type == EVENTS:
                    self._check_still_allowed()
                self.write(piece)
                await self.flush()
            await self.finish()
        except StreamClosedError:
            return  # the client has gone
        except (RequestError, StoreUnavailable) as error:
            # The token was revoked, the job pruned, or the store has gone: whoever asks again is told.
            logger.info("stream ended: %s: %s", codec.printable(self.request.path, 200), error)
            self.close_stream()
        except Exception:
            # The status has gone out: only a connection cut short can still say that the data are not whole.
            logger.exception("stream failed: %s", codec.printable(self.request.path, 200))
            self._failed = True
            self.close_stream()
        finally:
            await answer.stream.aclose()  # type: ignore[attr-defined]

    # What Tornado would do otherwise

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Answer for what Tornado refuses by itself: methods that it does not know."""
        if status_code == 405:
            error: ZerogError = self._not_allowed()
        elif status_code >= 500:
            error = InternalError()
        elif "{uuid}" in self._endpoint.url:  # a path that is no UTF-8 names no job
            error = UnknownJob(NO_SUCH_JOB)
        else:
            error = UnknownResource()
        self._dress(self._problem(error))
        self._failed = error.status >= 500
        self.finish()
        self._count()
        self._services.in_flight.discard(self)

    def compute_etag(self) -> str | None:
        """Return None: endpoints give their own entity tags."""
        return None

    def set_default_headers(self) -> None:
        """Say nothing about the software."""
        self.clear_header("Server")

    def log_exception(self, *_: Any) -> None:
        """Say nothing: what is unexpected was logged where it was caught."""


#: What ``_shape`` has found.
_SHAPES: dict[tuple[type[Endpoint], str], tuple[type[BaseModel] | None, bool, bool]] = {}


def _shape(endpoint: type[Endpoint], verb: str) -> tuple[type[BaseModel] | None, bool, bool]:
    """Return what never changes of an endpoint's method: its model, whether its body is JSON, and whether it is a
    coroutine."""
    known = _SHAPES.get((endpoint, verb))
    if known is None:
        coroutine = iscoroutinefunction(getattr(endpoint, verb.lower(), None))
        known = _SHAPES[endpoint, verb] = (endpoint.model(verb), endpoint.reads_json(verb), coroutine)
    return known


def log_request(handler: tornado.web.RequestHandler) -> None:
    """Log an answered request at debug level, one line, without query or body."""
    request: HTTPServerRequest = handler.request
    logger.debug("%s %s %d", request.method, codec.printable(request.path, 200), handler.get_status())


def _written(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Return the query by name; the values of a name that stands several times are joined, sorted, each once."""
    values: dict[str, set[str]] = {}
    for name, value in pairs:
        values.setdefault(name, set()).add(value)
    return {name: ",".join(sorted(several)) for name, several in values.items()}


def _token_of(headers: list[str]) -> str:
    """Return the token in an Authorization header, as it is or as the password of HTTP Basic; nothing if it is none."""
    scheme, _, value = (headers[0] if len(headers) == 1 else "").partition(" ")
    match scheme.lower():
        case "bearer":
            return value.strip()
        case "basic":
            with suppress(ValueError):  # neither base64 nor UTF-8
                return b64decode(value.strip(), validate=True).decode().partition(":")[2]
    return ""


async def _discard(stream: Any) -> None:
    left = _LINGER_BYTES
    while left > 0:
        left -= len(await stream.read_bytes(65536, partial=True))
