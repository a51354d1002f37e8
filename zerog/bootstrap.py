"""The composition root: settings → Manager, Agent, Application.  The only place where adapters meet the rules."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from zerog import __version__
from zerog.chores import Chores, Rounds, once_a_second
from zerog.clock import Clock
from zerog.config import SETTINGS, Settings, shown
from zerog.consumers import ConsumerLease
from zerog.datastore import faulty
from zerog.datastore.base import Datastore
from zerog.exceptions import BadSetting, MissingDependency
from zerog.fleet import Lock, Name, remove_old, stem_of
from zerog.manager import Manager
from zerog.master import Master, Registration
from zerog.needs import Limits
from zerog.own_settings import read_own, shown_own
from zerog.questions import answered
from zerog.queue.base import Queue
from zerog.record import JobRecord
from zerog.registry import Registry
from zerog.remote import Assignments, Masters, Orders, Remote
from zerog.statistics import Statistics
from zerog.sweeper import Candidate
from zerog.tokens import Tokens

if TYPE_CHECKING:
    from zerog.agent.agent import Agent, MakeRounds
    from zerog.agent.consumers import Hosts
    from zerog.agent.heartbeat import Superior
    from zerog.agent.pipe import Message
    from zerog.server.app import Server


#: Set for an agent that executes itself anew: the descriptor of the file that holds its name, the name, the instance.
KEPT_NAME = "_ZEROG_NAME"


#: Seconds between two rounds of the chores of an agent that speaks HTTP alone.
_STEP = 0.25


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
    clock = Clock()
    deadline = deadline if deadline is not None else settings.deadline
    registry = read_registry(settings)
    store = open_store(settings, deadline)
    open_queue = queue_opener(settings, deadline, clock)
    manager = Manager(
        store, open_queue, registry, clock, settings.service, settings.lease, retention=settings.retention
    )
    return Parts(settings, manager, registry, store, open_queue, clock)


def read_registry(settings: Settings) -> Registry:
    """Return the job types of the applications; ``BadSetting`` if there are none."""
    make_importable()
    registry = Registry.from_applications(settings.applications)
    registry.settings = read_own(settings.applications, settings.applications_own, settings.base, settings.sources)
    if not registry.names:
        raise BadSetting(f"applications ({settings.sources['applications']}): there is no job type in any of them")
    return registry


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
        heartbeat=heartbeat_of(settings),
        rate_limit=settings.rate_limit,
        allowed_hosts=address.hosts(settings.address, settings.allowed_hosts),
        allowed_origins=frozenset(origin.lower().rstrip("/") for origin in settings.allowed_origins or ()),
        tls=tls,
        candidate=Candidate(name, lock.presence),
        statistics=open_statistics(parts, name, lock),
        tokens=tokens,
        configuration={**shown(settings), **shown_own(parts.registry.settings, settings.sources)},
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


def heartbeat_of(settings: Settings) -> float:
    """Return the seconds between two signs of life of an agent: three fit into a lease."""
    if settings.heartbeat is None:
        return max(1.0, settings.lease / 3)
    if settings.heartbeat > settings.lease / 3:
        raise BadSetting(
            f"heartbeat ({settings.sources['heartbeat']}) is {settings.heartbeat:g} s: it must be a third of the lease "
            f"({settings.lease:g} s) at most"
        )
    return settings.heartbeat


def take_name(settings: Settings) -> Name:
    """Return the agent's id, held; that of the process that executed itself anew as this one, if it did."""
    directory = settings.path(settings.run_dir) / "agents"
    kept = os.environ.pop(KEPT_NAME, None)
    descriptor: int | None = None
    wanted, former = settings.name, None
    if kept is not None:
        # Of an older version there may be less, of a newer one more: what is not understood is not needed.
        number, wanted, *rest = kept.split(":")
        descriptor, former = int(number), rest[0] if rest else None
    try:
        name = Name(directory, wanted, stem_of(socket.gethostname()), descriptor)
        name.former = former
        return name
    except OSError as error:
        raise BadSetting(f"run_dir ({settings.sources['run_dir']}): {error}") from error
    except BadSetting as error:
        raise BadSetting(f"name ({settings.sources['name']}): {error}") from error


@dataclass(frozen=True)
class AgentParts:
    """What the daemon of an agent is made of; ``lock`` shows that it lives, ``name`` is the id that it holds.

    ``parts`` are those of an agent that reaches store and queue itself.
    """

    agent: Agent
    parts: Parts | None
    lock: Lock
    name: Name
    instance: str
    statistics: Statistics


@dataclass(frozen=True)
class _Way:
    """How an agent reaches those that it works for: its own store and queue, or a master."""

    manager: Manager | Remote
    queue: Queue
    commands: Queue
    superior: Superior
    answered: Callable[[JobRecord, dict[str, Any]], Message | Callable[[], Message]]
    rounds: MakeRounds


def make_agent(settings: Settings) -> AgentParts:
    """Return the agent that the settings describe."""
    from zerog.agent.account import Account
    from zerog.agent.agent import Agent
    from zerog.agent.attempt import Terms
    from zerog.agent.process import Program
    from zerog.agent.usage import Usage, machine

    clock = Clock()
    # An agent must never wait so long for store, queue or master that its leases suffer.
    deadline = min(settings.deadline, settings.lease / 10)
    parts = assemble(settings, deadline) if settings.master is None else None
    registry = parts.registry if parts is not None else read_registry(settings)
    job_types = _served(settings, registry)
    name = take_name(settings)
    instance = process_name()
    lock = make_lock(settings, clock, instance)
    if parts is not None:
        statistics = open_statistics(parts, instance, lock)
        way = _direct(settings, parts, statistics, Candidate(instance, lock.presence))
    else:
        statistics = Statistics(None, clock, instance, "off")  # the master counts
        way = _by_http(settings, registry, clock, name.id, deadline)
    ram, cpus = machine()
    terms = Terms(
        agent=name.id,
        holder=instance,
        job_types=job_types,
        labels=settings.labels or (),
        has=Limits(settings.ram or ram, settings.cpus or cpus),
        lease=settings.lease,
        grace=settings.grace,
        time_limit=settings.time_limit,
        max_jobs=settings.max_jobs,
        max_memory=settings.max_memory,
        statistics=statistics,
        account=Account(clock),
        answered=way.answered,
    )
    registration = Registration(
        id=name.id,
        instance=instance,
        hostname=socket.gethostname(),
        version=__version__,
        job_types=tuple(job_types),
        labels=settings.labels or (),
        has=Limits(ram, cpus),
        limits=Limits(settings.ram, settings.cpus),
        pid=os.getpid(),
        presence=lock.presence,
        direct=parts is not None,
        former=name.former,
    )
    agent = Agent(
        way.manager,
        way.queue,
        way.commands,
        clock,
        terms,
        Program(settings.applications, settings.max_result, settings.applications_own, str(settings.base)),
        settings.slots or os.cpu_count() or 1,
        way.superior,
        registration,
        way.rounds,
        Usage(clock, str(settings.path(settings.run_dir))),
        settings.drain,
        _hosts_of_agent(settings, parts, Candidate(name.id, lock.presence)) if parts is not None else None,
    )
    return AgentParts(agent, parts, lock, name, instance, statistics)


def _hosts_of_agent(settings: Settings, parts: Parts, candidate: Candidate) -> Hosts | None:
    """Return the hosts of the consumers that agents run; None if there are none."""
    names = [name for name, one in parts.registry.consumers.items() if one.consumer.in_agents]
    return make_hosts(settings, parts, names, candidate) if names else None


def _direct(settings: Settings, parts: Parts, statistics: Statistics, candidate: Candidate) -> _Way:
    """Return the way of an agent that reaches store and queue itself."""
    manager = parts.manager
    queue = parts.open_queue()
    return _Way(
        manager,
        queue,
        queue.another(),
        Master(manager, statistics, heartbeat_of(settings)),
        partial(answered, manager),
        lambda first, also: Chores(manager, settings.sweep, candidate, also, first, statistics),
    )


def _by_http(settings: Settings, registry: Registry, clock: Clock, agent: str, deadline: float) -> _Way:
    """Return the way of an agent that speaks HTTP alone."""
    assert settings.master is not None
    masters = Masters(settings.master, settings.token, settings.ca)
    remote = Remote(masters, registry, clock, agent, deadline)
    return _Way(
        remote,
        Assignments(remote),
        Orders(remote),
        remote,
        remote.answered,
        lambda first, also: Rounds(clock, once_a_second([*first, *also]), _STEP),
    )


def make_hosts(settings: Settings, parts: Parts, consumers: Sequence[str], candidate: Candidate) -> Hosts:
    """Return the hosts of consumers, by name; ``BadSetting`` for a name that there is not."""
    from zerog.agent.consumers import Host, Hosts

    hosts = []
    for name in consumers:
        follower = parts.registry.consumers.get(name)
        if follower is None:
            known = ", ".join(sorted(parts.registry.consumers)) or "none"
            raise BadSetting(
                f"applications ({settings.sources['applications']}): there is no consumer {name!r}; there are: {known}"
            )
        held = ConsumerLease(
            parts.manager.consumers, follower.consumer, follower.application, candidate, settings.lease, parts.clock
        )
        start = partial(_start_consumer, settings)
        hosts.append(Host(follower.consumer, held, start, parts.clock, settings.lease, settings.grace))
    return Hosts(hosts, parts.clock, settings.grace)


def _start_consumer(
    settings: Settings, name: str, token: str, descriptor: int, more: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start the child of a consumer, with the same settings."""
    return subprocess.Popen(
        [sys.executable, "-m", "zerog.consuming", name, token, str(descriptor), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        env={**environment_of(settings), **more},
        pass_fds=[descriptor],
        process_group=0,
    )


def environment_of(settings: Settings, groups: Sequence[str] = ("everything", "server", "agent")) -> dict[str, str]:
    """Return the environment of a process of ours that is to have the same settings, of those groups."""
    environment = dict(os.environ)
    written = written_settings(settings)
    for setting in SETTINGS:
        if setting.group in groups and setting.name in written:
            environment[f"ZEROG_{setting.name.upper()}"] = written[setting.name]
    if settings.config is not None:
        environment["ZEROG_CONFIG"] = settings.config
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root(), os.environ.get("PYTHONPATH")]))
    return environment


def _served(settings: Settings, registry: Registry) -> Sequence[str]:
    """Return the job types that an agent serves."""
    names = settings.job_types if settings.job_types is not None else tuple(registry.names)
    if not names:
        raise BadSetting(f"job_types ({settings.sources['job_types']}): an agent must serve one at least")
    for name in names:
        if name not in registry:
            known = ", ".join(registry.names)
            raise BadSetting(f"job_types ({settings.sources['job_types']}): there is no {name!r}, only {known}")
    return names


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
