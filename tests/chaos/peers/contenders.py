"""The rows of the comparison: each system as it is installed, and with the settings that its documents name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import zerog
from tests.chaos.peers import installation
from tests.chaos.peers.verdict import Answer
from tests.deployment import TERMINAL, Deployment
from tests.services import ROOT, Beanstalkd, Process, connects, free_port, wait_until
from zerog.config import SETTINGS

_CELERY = ("celery", "-A", "tests.chaos.peers.systems.celery_app", "worker", "--pool", "prefork", "--concurrency", "4")
_RQ = ("rq", "worker", "--url", "{redis}")
_DRAMATIQ = ("dramatiq", "tests.chaos.peers.systems.dramatiq_app", "--processes", "4", "--threads", "1")
_HUEY = ("huey_consumer", "tests.chaos.peers.systems.huey_app.huey", "--worker-type", "process", "--workers", "4")

_LATE = {"task_acks_late": True, "task_reject_on_worker_lost": True}
# The documents want all three set.
_VISIBLE = {
    "broker_transport_options": {"visibility_timeout": 20},
    "result_backend_transport_options": {"visibility_timeout": 20},
    "visibility_timeout": 20,
}
_SWEPT = {**_VISIBLE, "broker_transport_options": {"visibility_timeout": 20, "unacked_restore_throttle": 1}}
_MAINTAINED = ("--maintenance-interval", "10", "--worker-ttl", "30", "--job-monitoring-interval", "5")


class System(Protocol):
    """A system that runs: broker or server, and four workers or slots.  ``close`` ends it all, also half a start."""

    @property
    def workers(self) -> list[Process]:
        """The workers' processes, without those that they started."""

    def start(self) -> None:
        """Start the broker or the server."""

    def start_workers(self) -> None:
        """Start the workers; they may become ready later."""

    def submit(self, count: int, ledger: Path, seconds: float) -> list[str]:
        """Submit jobs and return their names in the ledger."""

    def ask(self, names: list[str]) -> Answer:
        """Return what the system says of the jobs."""

    def close(self) -> None:
        """End what is left, without care."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One row.  ``longest`` are the seconds that it is watched if jobs are stuck when the others are judged."""

    system: str
    settings: str
    values: dict[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    times: int = 1
    longest: float = 0.0

    @property
    def title(self) -> str:
        """The name and the version."""
        if self.system == "zerog":
            return f"ZeroG {zerog.__version__}"
        name = "RQ" if self.system == "rq" else self.system.capitalize()
        return f"{name} {installation.version(self.system)}"

    def make(self, folder: Path) -> System:
        """Return the system, not yet started, with its files in a folder."""
        return Zerog(folder, self.values["queue"]) if self.system == "zerog" else Peer(folder, self)


CONTENDERS = (
    Contender("zerog", "as installed: SQLite + SQLite", {"queue": "sqlite"}, longest=150),
    Contender("zerog", "SQLite + beanstalkd", {"queue": "beanstalkd"}, longest=150),
    Contender("celery", "as installed", {}, _CELERY),
    Contender("celery", "worker_disable_prefetch", {"worker_disable_prefetch": True}, _CELERY),
    Contender("celery", "late: task_acks_late, task_reject_on_worker_lost", _LATE, _CELERY),
    Contender("celery", "late, visibility_timeout=20", {**_LATE, **_VISIBLE}, _CELERY, longest=150),
    Contender(
        "celery", "late, visibility_timeout=20, unacked_restore_throttle=1", {**_LATE, **_SWEPT}, _CELERY, longest=150
    ),
    Contender("rq", "as installed", {}, _RQ, 4),
    Contender("rq", "Retry(max=3), " + " ".join(_MAINTAINED), {"retries": 3}, _RQ + _MAINTAINED, 4, longest=150),
    Contender("dramatiq", "as installed", {}, _DRAMATIQ, longest=150),
    Contender(
        "dramatiq", "heartbeat_timeout=10000, maintenance_chance=1000000",
        {"heartbeat_timeout": 10_000, "maintenance_chance": 1_000_000}, _DRAMATIQ, longest=150,
    ),
    Contender("huey", "as installed", {}, _HUEY),
)  # fmt: skip


class Peer:
    """A system on a redis of its own that keeps nothing on disk."""

    def __init__(self, folder: Path, contender: Contender) -> None:
        self._folder = folder
        self._contender = contender
        self._port = free_port()
        self._url = f"redis://127.0.0.1:{self._port}/0"
        self._redis: Process | None = None
        self.workers: list[Process] = []
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PEERS_REDIS": self._url,
            "PEERS_SETTINGS": json.dumps(contender.values),
        }

    def start(self) -> None:
        """Start redis."""
        program = installation.redis_server()
        options = ["--bind", "127.0.0.1", "--port", str(self._port), "--save", "", "--appendonly", "no"]
        self._redis = Process([program, *options, "--dir", str(self._folder)], self._folder / "redis.log")
        wait_until(lambda: connects(self._port), what="redis")

    def start_workers(self) -> None:
        """Start the workers as the system's documents do."""
        program, *options = self._contender.command
        arguments = [str(installation.COMMANDS / program), *(one.format(redis=self._url) for one in options)]
        self.workers = [
            Process(arguments, self._folder / "worker.log", cwd=self._folder, env=self._environment)
            for _ in range(self._contender.times)
        ]

    def submit(self, count: int, ledger: Path, seconds: float) -> list[str]:
        """Submit jobs and return their names."""
        names = [uuid.uuid4().hex for _ in range(count)]
        self._call("submit", names=names, ledger=str(ledger), seconds=seconds)
        return names

    def ask(self, names: list[str]) -> Answer:
        """Return what the system says of the jobs."""
        said = self._call("ask", names=names)
        return Answer(frozenset(said["held"]), frozenset(said["failed"]))

    def _call(self, verb: str, **request: Any) -> Any:
        module = f"{self._contender.system}_app"
        said = subprocess.run(
            [installation.PYTHON, "-m", "tests.chaos.peers.systems", module, verb],
            input=json.dumps(request).encode(), stdout=subprocess.PIPE, cwd=self._folder, env=self._environment,
            check=True, timeout=60,
        )  # fmt: skip
        return json.loads(said.stdout)

    def close(self) -> None:
        """End redis."""
        if self._redis is not None:
            self._redis.kill()


class Zerog:
    """ZeroG with the settings that it has when it is installed: a server, and two agents of two slots."""

    def __init__(self, folder: Path, queue: str) -> None:
        self._beanstalkd = Beanstalkd(folder / "queue") if queue == "beanstalkd" else None
        # Tests use shorter ones: this is what users get.
        defaults: dict[str, Any] = {
            one.name: one.default for one in SETTINGS if one.name in ("lease", "sweep", "grace")
        }
        self._deployment = Deployment(
            folder, queue=queue, beanstalkd=self._beanstalkd, applications="tests.chaos.peers", **defaults
        )

    @property
    def workers(self) -> list[Process]:
        """The agents; their children are found as their descendants."""
        return self._deployment.agents

    def start(self) -> None:
        """Start beanstalkd, if it is the queue, and the server."""
        if self._beanstalkd is not None:
            self._beanstalkd.start()
        self._deployment.start_server()

    def start_workers(self) -> None:
        """Start two agents."""
        self._deployment.agents = [self._deployment.start_agent() for _ in range(2)]

    def submit(self, count: int, ledger: Path, seconds: float) -> list[str]:
        """Submit jobs and return their UUIDs."""
        parameters = {"ledger": str(ledger), "seconds": seconds}
        return [self._deployment.submit("peers-work", parameters) for _ in range(count)]

    def ask(self, names: list[str]) -> Answer:
        """Return what the records say: held is what has not ended, failed what ended without success."""
        states = {name: self._deployment.job(name)["state"] for name in names}
        held = frozenset(name for name, state in states.items() if state not in TERMINAL)
        return Answer(held, frozenset(name for name, state in states.items() if state in TERMINAL[1:]))

    def close(self) -> None:
        """End the server and beanstalkd."""
        self._deployment.close()
        if self._beanstalkd is not None:
            self._beanstalkd.stop()


def chosen(systems: Sequence[str]) -> list[Contender]:
    """Return the rows of some systems, or of all; without beanstalkd, not the row that needs it."""
    unknown = set(systems) - {one.system for one in CONTENDERS}
    if unknown:
        raise SystemExit(f"not among the systems: {', '.join(sorted(unknown))}")
    found = [one for one in CONTENDERS if not systems or one.system in systems]
    if shutil.which("beanstalkd") is None:
        print("no row for beanstalkd: apt install beanstalkd")
        found = [one for one in found if one.values.get("queue") != "beanstalkd"]
    return found
