"""The composition root: settings → Manager, Agent, Application.  The only place where adapters meet the rules."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from zerog import __version__
from zerog.clock import Clock
from zerog.config import Settings, shown
from zerog.datastore import faulty
from zerog.datastore.base import Datastore
from zerog.exceptions import BadSetting, MissingDependency
from zerog.fleet import AgentRecord, Lock, heartbeat, remove_old
from zerog.manager import Manager
from zerog.queue.base import Queue
from zerog.registry import Registry
from zerog.statistics import Statistics
from zerog.sweeper import Candidate
from zerog.tokens import Tokens

if TYPE_CHECKING:
    from zerog.agent.agent import Agent
    from zerog.server.app import Server


@dataclass(frozen=True)
class Parts:
    """What a daemon is made of."""

    settings: Settings
    manager: Manager
    registry: Registry
    store: Datastore
    open_queue: Callable[[], Queue]
    clock: Clock


def assemble(settings: Settings, deadline: float | None = None) -> Parts:
    """Make the Manager and what it stands on.  Nothing is connected before it is used."""
    make_importable()
    clock = Clock()
    deadline = deadline if deadline is not None else settings.deadline
    registry = Registry.from_applications(settings.applications)
    if not registry.names:
        raise BadSetting(f"applications ({settings.sources['applications']}): there is no job type in any of them")
    store = open_store(settings, deadline)
    open_queue = queue_opener(settings, deadline, clock)
    manager = Manager(
        store, open_queue, registry, clock, settings.service, settings.lease, retention=settings.retention
    )
    return Parts(settings, manager, registry, store, open_queue, clock)


def make_importable() -> None:
    """Let applications be imported from the current folder, as Python itself does for scripts."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def open_store(settings: Settings, deadline: float) -> Datastore:
    """Return the datastore that the settings name, which fails on request if the environment asks for that."""
    store = _open_store(settings, deadline)
    faults = os.environ.get(faulty.VARIABLE)
    return faulty.FaultyDatastore(store, Path(faults)) if faults else store


def _open_store(settings: Settings, deadline: float) -> Datastore:
    if settings.datastore.startswith("sqlite:"):
        from zerog.datastore.sqlite import SQLiteDatastore

        return SQLiteDatastore(settings.sqlite_path(settings.datastore), settings.service, deadline)
    try:
        from zerog.datastore.couchbase import CouchbaseDatastore
    except ImportError as error:
        raise MissingDependency(
            f"datastore needs the Couchbase SDK: pip install 'zerog[couchbase]' ({error})"
        ) from error
    url = urlsplit(settings.datastore)
    path = [unquote(part) for part in url.path.split("/") if part]
    if len(path) not in (1, 3) or url.hostname is None:
        raise BadSetting(
            f"datastore ({settings.sources['datastore']}) must be couchbase://user@host/bucket, "
            "or couchbase://user@host/bucket/scope/collection"
        )
    return CouchbaseDatastore(
        f"{url.scheme}://{url.netloc.rpartition('@')[2]}",
        unquote(url.username or ""),
        settings.password(),
        path[0],
        (path[1], path[2]) if len(path) == 3 else None,
        service=settings.service,
        deadline=deadline,
        durability=settings.durability,
    )


def queue_opener(settings: Settings, deadline: float, clock: Clock) -> Callable[[], Queue]:
    """Return what makes connections to the queue that the settings name."""
    if settings.queue.startswith("sqlite:"):
        from zerog.queue.sqlite import SQLiteQueue

        path, run_dir = settings.sqlite_path(settings.queue), settings.path(settings.run_dir)
        return lambda: SQLiteQueue(path, run_dir, deadline, clock)
    try:
        from zerog.queue.beanstalkd import BeanstalkdQueue
    except ImportError as error:
        raise MissingDependency(f"queue needs greenstalk: pip install 'zerog[beanstalkd]' ({error})") from error
    url = urlsplit(settings.queue)
    address: tuple[str, int] | str
    if url.hostname is None:
        address = url.path
    else:
        try:
            address = (url.hostname, url.port or 11300)
        except ValueError as error:
            raise BadSetting(f"queue ({settings.sources['queue']}): {error}") from error
    return lambda: BeanstalkdQueue(address, deadline)


def open_statistics(parts: Parts, name: str, lock: Lock) -> Statistics:
    """Return what this process counts, shared where the settings say."""
    stats = parts.settings.stats
    if stats == "off":
        return Statistics(None, parts.clock, name, "off")
    if stats == "datastore":
        return Statistics(parts.store, parts.clock, name, "datastore", lock.presence)
    try:
        from zerog.datastore.memcached import MemcachedDocuments
    except ImportError as error:
        raise MissingDependency(f"stats needs pymemcache: pip install 'zerog[memcached]' ({error})") from error
    url = urlsplit(stats)
    assert url.hostname is not None and url.port is not None
    documents = MemcachedDocuments((url.hostname, url.port), parts.settings.service)
    return Statistics(documents, parts.clock, name, "memcached", lock.presence)


@dataclass(frozen=True)
class ServerParts:
    """What the daemon of a server is made of; ``unsafe`` is what should be said of it, if anything."""

    server: Server
    parts: Parts
    lock: Lock
    unsafe: str | None


def make_server(settings: Settings) -> ServerParts:
    """Return the server that the settings describe; it does not listen yet."""
    from zerog.server import address, applications
    from zerog.server.app import Options, Server

    if settings.rate_limit and settings.stats == "off":
        raise BadSetting(
            f"rate_limit ({settings.sources['rate_limit']}): servers share it through the statistics, and stats "
            f"({settings.sources['stats']}) is off"
        )
    parts = assemble(settings)
    tokens = Tokens(parts.store, parts.clock)
    address.check_address(settings.address, settings.insecure, settings.sources["address"], tokens)
    source = settings.sources["tls_certificate" if settings.tls_certificate is not None else "tls_key"]
    tls = address.read_tls(_path(settings, settings.tls_certificate), _path(settings, settings.tls_key), source)
    name = f"server-{process_name()}"
    lock = make_lock(settings, parts.clock, name)
    options = Options(
        max_body=settings.max_body,
        idle_timeout=settings.idle_timeout,
        sweep=settings.sweep,
        rate_limit=settings.rate_limit,
        allowed_hosts=address.hosts(settings.address, settings.allowed_hosts),
        allowed_origins=frozenset(origin.lower().rstrip("/") for origin in settings.allowed_origins or ()),
        tls=tls,
        candidate=Candidate(name, lock.presence),
        statistics=open_statistics(parts, name, lock),
        tokens=tokens,
        configuration=shown(settings),
        endpoints=applications.endpoints(settings.applications),
        run_parameters=applications.run_parameters(settings.applications),
    )
    server = Server(parts.manager, parts.registry, parts.clock, options)
    server.prepare()
    clear = tls is None and not address.is_loopback(settings.address) and tokens.known_on
    unsafe = "tokens travel in clear text: tls_certificate and tls_key are not set" if clear else None
    return ServerParts(server, parts, lock, unsafe)


def _path(settings: Settings, text: str | None) -> str | None:
    return None if text is None else str(settings.path(text))


def process_name() -> str:
    """Return the name of this process, which no other ever has: pids come again, in containers at once."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


def make_lock(settings: Settings, clock: Clock, name: str) -> Lock:
    """Return the lock that shows that this process lives."""
    directory = settings.path(settings.run_dir) / "agents"
    try:
        lock = Lock(directory, name)
        remove_old(directory, clock.now())
    except OSError as error:
        raise BadSetting(f"run_dir ({settings.sources['run_dir']}): {error}") from error
    return lock


def make_record(settings: Settings, parts: Parts, name: str, job_types: Sequence[str], lock: Lock) -> AgentRecord:
    """Return what an agent says of itself."""
    return AgentRecord(
        name,
        socket.gethostname(),
        os.getpid(),
        __version__,
        tuple(job_types),
        parts.clock.now(),
        lock.presence,
        heartbeat=heartbeat(settings.lease),
    )


@dataclass(frozen=True)
class AgentParts:
    """What the daemon of an agent is made of; ``lock`` shows that it lives, ``register`` says so in the store."""

    agent: Agent
    parts: Parts
    lock: Lock
    register: Callable[..., None]
    statistics: Statistics


def make_agent(settings: Settings) -> AgentParts:
    """Return the agent that the settings describe."""
    from zerog.agent.agent import Agent
    from zerog.agent.attempt import Terms
    from zerog.agent.process import Program

    # An agent must never wait so long for store or queue that its leases suffer.
    parts = assemble(settings, min(settings.deadline, settings.lease / 10))
    names = settings.job_types if settings.job_types is not None else tuple(parts.registry.names)
    for name in names:
        if name not in parts.registry:
            known = ", ".join(parts.registry.names)
            raise BadSetting(f"job_types ({settings.sources['job_types']}): there is no {name!r}, only {known}")
    name = process_name()
    lock = make_lock(settings, parts.clock, name)
    record = make_record(settings, parts, name, names, lock)

    def register(superseded: int, draining: bool = False, stopped: bool = False) -> None:
        now = parts.clock.now()
        parts.manager.fleet.update(
            replace(record, heard_at=now, superseded=superseded, draining=draining, stopped=stopped)
        )

    terms = Terms(
        agent=name,
        tubes=[parts.manager.tube(name) for name in names],
        lease=settings.lease,
        grace=settings.grace,
        time_limit=settings.time_limit,
        max_jobs=settings.max_jobs,
        max_memory=settings.max_memory,
        statistics=open_statistics(parts, name, lock),
    )
    program = Program(settings.applications, settings.max_result)
    slots = settings.slots or os.cpu_count() or 1
    agent = Agent(
        parts.manager,
        parts.open_queue(),
        parts.clock,
        terms,
        program,
        slots,
        settings.drain,
        settings.sweep,
        register,
        Candidate(name, lock.presence),
    )
    return AgentParts(agent, parts, lock, register, terms.statistics)


def root() -> str:
    """Return the folder that holds the package."""
    return str(Path(__file__).resolve().parents[1])


def written_settings(settings: Settings) -> dict[str, str]:
    """Return the settings that came from flags, as they can be written into an environment."""
    written = {}
    for name, source in settings.sources.items():
        if source.startswith("--"):
            value = getattr(settings, name)
            if isinstance(value, tuple):
                written[name] = ",".join(value)
            elif isinstance(value, float):
                written[name] = f"{value:g}"
            else:
                written[name] = str(value)
    return written
