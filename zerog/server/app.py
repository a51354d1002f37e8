"""The server process: the application, its listening socket, its start and its end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tornado.web
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.routing import URLSpec

from zerog.chores import Chores
from zerog.clock import Clock
from zerog.exceptions import BadSetting, UnknownJob
from zerog.manager import Manager, Submission, Submitted
from zerog.record import JobRecord
from zerog.registry import Registry
from zerog.server.door import Door, log_request
from zerog.server.endpoint import NO_SUCH_JOB, Services
from zerog.server.lanes import Lane
from zerog.server.routes import ENDPOINTS, pattern
from zerog.server.status import Nothing
from zerog.server.watcher import Watcher
from zerog.statistics import Statistics
from zerog.sweeper import Candidate

logger = logging.getLogger(__name__)

#: Threads for what is neither a submit nor a read of records: lists, events, data, figures of the queue.
_POOL = 8
#: Seconds for a complete body after its header.
_BODY_SECONDS = 10
_HEADER_BYTES = 16 * 1024
#: Seconds that requests in flight get when the server stops.
_STOP_SECONDS = 5.0

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


class Server:
    """One HTTP server over a Manager.  ``start`` and ``stop`` are called in the event loop."""

    def __init__(
        self,
        manager: Manager,
        registry: Registry,
        clock: Clock,
        max_body: int = 1024 * 1024,
        idle_timeout: float = 30.0,
        sweep: float = 30.0,
        allowed_hosts: frozenset[str] = frozenset(_LOOPBACK_NAMES),
        candidate: Candidate | None = None,
        statistics: Statistics | None = None,
        configuration: Mapping[str, Any] | None = None,
    ) -> None:
        self._manager = manager
        self._pool = ThreadPoolExecutor(_POOL, thread_name_prefix="pool")
        self._submit: Lane[Submission, Submitted] = Lane("submits", manager.submit_all)
        self._read: Lane[str, JobRecord] = Lane("reads", self._read_all)
        self._statistics = statistics if statistics is not None else Statistics(None, clock, "", "off")
        self._chores = Chores(manager, sweep, candidate, also=[manager.prepare_cursors], statistics=self._statistics)
        self._idle_timeout = idle_timeout
        self.services = Services(
            manager=manager,
            registry=registry,
            clock=clock,
            submit=self._submit,
            read=self._read,
            pool=self._pool,
            watcher=Watcher(self._read_watched),
            statistics=self._statistics,
            max_body=max_body,
            allowed_hosts=allowed_hosts,
            configuration=configuration or {},
            endpoints=ENDPOINTS,
            started=(clock.now(), clock.monotonic()),
        )
        self._http: HTTPServer | None = None

    def application(self) -> tornado.web.Application:
        """Return the Tornado application."""
        routes = [
            URLSpec(pattern(endpoint.url), Door, {"endpoint": endpoint, "services": self.services})
            for endpoint in self.services.endpoints
        ]
        return tornado.web.Application(
            routes,
            default_handler_class=Door,
            default_handler_args={"endpoint": Nothing, "services": self.services},
            log_function=log_request,
        )

    def start(self, sockets: Sequence[socket.socket] = ()) -> tornado.web.Application:
        """Start the lanes and the chores, and listen on ``sockets``."""
        self._submit.start(self._manager.close_queue)
        self._read.start()
        self._chores.start()
        self._statistics.start()
        application = self.application()
        self._http = HTTPServer(
            application,
            idle_connection_timeout=self._idle_timeout,
            max_header_size=_HEADER_BYTES,
            # The door counts; this is only so that Tornado does not answer before it.
            max_body_size=2**62,
        )
        self._http.add_sockets(list(sockets))
        self._reap()
        return application

    def _reap(self) -> None:
        """End the connections whose bodies do not arrive; one look a second costs less than a timer a request."""
        now = self.services.clock.monotonic()
        for door, since in list(self.services.arriving.items()):
            if now - since > _BODY_SECONDS:
                door.close_stream()
        self._reaper = asyncio.get_running_loop().call_later(1.0, self._reap)

    async def stop(self) -> None:
        """Listen no more, let requests in flight end, and give everything back.  May be called twice."""
        http, self._http = self._http, None
        if http is None:
            return
        http.stop()
        self._reaper.cancel()
        try:
            await asyncio.wait_for(http.close_all_connections(), _STOP_SECONDS)
        except TimeoutError:
            logger.warning("requests were still in flight when the server stopped")
        self._chores.stop()
        loop = asyncio.get_running_loop()
        ends = (self._submit.stop, self._read.stop, lambda: self._chores.join(_STOP_SECONDS), self._statistics.stop)
        for end in ends:
            await loop.run_in_executor(None, end)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read_all(self, uuids: Sequence[str]) -> list[JobRecord | Exception]:
        found = self._manager.get_many(list(dict.fromkeys(uuids)))
        return [found.get(uuid) or UnknownJob(NO_SUCH_JOB) for uuid in uuids]

    async def _read_watched(self, uuids: Sequence[str]) -> dict[str, JobRecord]:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._manager.get_many, uuids)


def check_address(address: str, insecure: bool, source: str) -> None:
    """Refuse to be reachable from elsewhere while everyone may do everything."""
    if not insecure and not is_loopback(address):
        raise BadSetting(
            f"address ({source}) is {address!r}, which others can reach, and there is no authentication yet: "
            "whoever reaches the server may run jobs; give --insecure if that is what you want"
        )


def is_loopback(address: str) -> bool:
    """Return whether an address is of this machine alone."""
    if address.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def hosts(address: str, allowed: Sequence[str] | None) -> frozenset[str]:
    """Return the Host names that the server answers for."""
    if allowed is not None:
        return frozenset(name.lower().strip("[]") for name in allowed)
    names = {*_LOOPBACK_NAMES, address.lower()}
    if not is_loopback(address):
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    return frozenset(names)


def bind(address: str, port: int) -> list[socket.socket]:
    """Return listening sockets; ``BadSetting`` if that is not possible."""
    try:
        return bind_sockets(port, address)
    except OSError as error:
        raise BadSetting(f"cannot listen on {address}:{port}: {error.strerror}") from error


async def serve(server: Server, sockets: Sequence[socket.socket]) -> None:
    """Serve until SIGTERM or SIGINT."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    server.start(sockets)
    await ended.wait()
    logger.info("server stops")
    await server.stop()
