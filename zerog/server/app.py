"""The server process: the application, its listening socket, its start and its end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import tornado.web
from tornado.httpserver import HTTPServer
from tornado.routing import URLSpec

from zerog import views
from zerog.attempts import Report, Settlement
from zerog.chores import Chores
from zerog.clock import Clock
from zerog.exceptions import DatastoreError, UnknownJob
from zerog.manager import Manager, Submission, Submitted
from zerog.master import Master
from zerog.orders import Wanted
from zerog.record import JobRecord
from zerog.registry import Registry
from zerog.server.address import LOOPBACK_NAMES
from zerog.server.commands import Bell
from zerog.server.door import Door, log_request
from zerog.server.endpoint import NO_SUCH_JOB, Endpoint, RunParameter, Services
from zerog.server.lanes import Lane
from zerog.server.live import Shared, Streams, queue_items
from zerog.server.pools import Bounded
from zerog.server.rates import Rates
from zerog.server.reserver import Reserver
from zerog.server.routes import ENDPOINTS, pattern
from zerog.server.status import Nothing
from zerog.server.watcher import Watcher
from zerog.statistics import Statistics
from zerog.sweeper import Candidate
from zerog.tokens import Tokens
from zerog.turn import Turn

logger = logging.getLogger(__name__)

#: Threads for what is neither a submit nor a read of records: lists, events, data, figures of the queue.
_POOL = 8
#: Threads for the plain methods of applications' endpoints, calls that may wait for one, and threads for asking whether
#: the store is there.
_APPLICATIONS, _APPLICATIONS_WAITING, _PROBES = 32, 200, 2
#: Seconds for a complete body after its header.
_BODY_SECONDS = 10
_HEADER_BYTES = 16 * 1024
#: Seconds that requests in flight get when the server stops, and between two looks whether there are any.
_STOP_SECONDS, _STOP_LOOK = 5.0, 0.02
#: Seconds between two looks at the tokens.
_LOOK_AT_TOKENS = 1.0
#: Running jobs, and newest ones, that the start page shows.
_RUNNING, _NEWEST = 50, 10


@dataclass(frozen=True)
class Options:
    """What a server is told: sizes in bytes, times in seconds.

    ``candidate`` stands for the sweeper's lease; ``configuration`` is what ``/view_status`` shows of the settings;
    ``endpoints`` and ``run_parameters`` are those of applications.
    """

    max_body: int = 1024 * 1024
    idle_timeout: float = 30.0
    sweep: float = 30.0
    heartbeat: float = 10.0
    rate_limit: int = 0
    allowed_hosts: frozenset[str] = frozenset(LOOPBACK_NAMES)
    allowed_origins: frozenset[str] = frozenset()
    tls: ssl.SSLContext | None = None
    candidate: Candidate | None = None
    statistics: Statistics | None = None
    tokens: Tokens | None = None
    configuration: Mapping[str, Any] = field(default_factory=dict)
    endpoints: Sequence[type[Endpoint]] = ()
    run_parameters: Sequence[RunParameter] = ()


class Server:
    """One HTTP server over a Manager.  ``start`` and ``stop`` are called in the event loop."""

    def __init__(self, manager: Manager, registry: Registry, clock: Clock, options: Options = Options()) -> None:
        self._manager = manager
        self._pool = ThreadPoolExecutor(_POOL, thread_name_prefix="pool")
        self._probes = ThreadPoolExecutor(_PROBES, thread_name_prefix="probes")
        self._applications = Bounded(_APPLICATIONS, _APPLICATIONS_WAITING, "applications")
        self._submit: Lane[Submission, Submitted] = Lane("submits", manager.submit_all)
        self._read: Lane[str, JobRecord] = Lane("reads", self._read_all)
        self._options = options
        self._statistics = options.statistics or Statistics(None, clock, "", "off")
        self._tokens = options.tokens or Tokens(manager.store, clock)
        self._lookout = _Lookout(self._tokens)
        self._master = Master(manager, self._statistics, options.heartbeat)
        self._attempts: Lane[Report | Settlement, JobRecord] = Lane("attempts", self._answer_attempts)
        self._reserver = Reserver(self._master, manager.open_queue)
        manager.on_needs = self._reserver.look_everywhere
        self._chores = Chores(
            manager, options.sweep, options.candidate, also=[manager.prepare_cursors], statistics=self._statistics
        )
        self.services = Services(
            manager=manager,
            master=self._master,
            attempts=self._attempts,
            reserver=self._reserver,
            bell=Bell(self._read_orders),
            hurry=self._chores.hurry,
            registry=registry,
            clock=clock,
            submit=self._submit,
            read=self._read,
            pool=self._pool,
            applications=self._applications,
            probes=self._probes,
            watcher=Watcher(self._read_watched),
            statistics=self._statistics,
            tokens=self._tokens,
            rates=Rates(options.rate_limit, self._statistics, clock),
            max_body=options.max_body,
            allowed_hosts=options.allowed_hosts,
            allowed_origins=options.allowed_origins,
            configuration=options.configuration,
            endpoints=(*ENDPOINTS, *options.endpoints),
            run_parameters=options.run_parameters,
            queue=Shared(self._look_at_queue),
            running=Shared(partial(self._look_at_jobs, "running", _RUNNING)),
            newest=Shared(partial(self._look_at_jobs, None, _NEWEST)),
            streams=Streams(),
            started=(clock.now(), clock.monotonic()),
        )
        self._http: HTTPServer | None = None

    def prepare(self) -> None:
        """Do what waits for the store, before the event loop begins."""
        with suppress(DatastoreError):  # otherwise everybody is refused until it answers
            self._tokens.look()
        for endpoint in self._options.endpoints:
            settings = self.services.registry.settings.get(endpoint.__module__.removesuffix(".endpoints"))
            endpoint.serving(settings)

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
        self._attempts.start(self._manager.close_queue)
        self._reserver.start()
        self._chores.start()
        self._statistics.start()
        self._lookout.start()
        application = self.application()
        self._http = HTTPServer(
            application,
            ssl_options=self._options.tls,
            idle_connection_timeout=self._options.idle_timeout,
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
            if now - since > (door.body_idle or _BODY_SECONDS):
                door.close_stream()
        self._reaper = asyncio.get_running_loop().call_later(1.0, self._reap)

    async def stop(self) -> None:
        """Listen no more, let requests in flight end, and give everything back.  May be called twice."""
        http, self._http = self._http, None
        if http is None:
            return
        http.stop()
        self.services.watcher.end()
        self.services.bell.end()
        self._reserver.stop()
        await self._answer_rest()
        self._reaper.cancel()
        with suppress(TimeoutError):
            await asyncio.wait_for(http.close_all_connections(), _STOP_SECONDS)
        self._chores.stop()
        loop = asyncio.get_running_loop()
        self._lookout.stop()
        ends = (
            self._submit.stop,
            self._read.stop,
            self._attempts.stop,
            lambda: self._reserver.join(_STOP_SECONDS),
            lambda: self._chores.join(_STOP_SECONDS),
            self._statistics.stop,
            lambda: self._lookout.join(_STOP_SECONDS),
        )
        await asyncio.gather(*(loop.run_in_executor(None, end) for end in ends))
        for pool in (self._pool, self._probes, self._applications):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _answer_rest(self) -> None:
        """Let requests in flight be answered; connections on which nothing was asked are closed by who comes next."""
        loop = asyncio.get_running_loop()
        until = loop.time() + _STOP_SECONDS
        while self.services.in_flight and loop.time() < until:
            await asyncio.sleep(_STOP_LOOK)
        if self.services.in_flight:
            logger.warning("%d requests were still in flight when the server stopped", len(self.services.in_flight))

    def _read_all(self, uuids: Sequence[str]) -> list[JobRecord | Exception]:
        found = self._manager.get_many(list(dict.fromkeys(uuids)))
        return [found.get(uuid) or UnknownJob(NO_SUCH_JOB) for uuid in uuids]

    async def _look_at_queue(self) -> list[dict[str, Any]]:
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, queue_items, self._manager, self.services.registry.names
        )

    async def _look_at_jobs(self, state: str | None, limit: int) -> list[dict[str, Any]]:
        page = partial(self._manager.page, None, state, None, limit)
        found = await asyncio.get_running_loop().run_in_executor(self._pool, page)
        return [views.item(record) for record in found.items]

    def _answer_attempts(self, items: Sequence[Report | Settlement]) -> list[JobRecord | Exception]:
        """Write how attempts go and end, all in one commit; for each the job's record, or what is wrong."""
        turn = Turn(self._master)
        with self._manager.store.together():
            results = [turn.answer(item) for item in items]
            turn.write()
        turn.after()
        return results

    async def _read_orders(self, ids: Sequence[str]) -> dict[str, Wanted]:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._master.orders.wanted_of, list(ids))

    async def _read_watched(self, uuids: Sequence[str]) -> dict[str, JobRecord]:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._manager.get_many, uuids)


class _Lookout(threading.Thread):
    """Looks at the tokens once a second, whatever the chores do meanwhile: one that is revoked must not live on."""

    def __init__(self, tokens: Tokens) -> None:
        super().__init__(name="tokens", daemon=True)
        self._tokens = tokens
        self._end = threading.Event()

    def stop(self) -> None:
        """End the thread soon; may be called twice."""
        self._end.set()

    def run(self) -> None:
        """Look until ``stop``."""
        away = False
        while not self._end.wait(_LOOK_AT_TOKENS):
            try:
                self._tokens.look()
                away = False
            except DatastoreError as error:
                if not away:
                    logger.warning("tokens stay as they are known: %s", error)
                away = True


async def serve(server: Server, sockets: Sequence[socket.socket], served: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT; ``served`` is called when it begins."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    server.start(sockets)
    served()
    await ended.wait()
    logger.info("server stops")
    await server.stop()
