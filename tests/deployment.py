"""A deployment for tests: server and agent as separate processes over any pair of store and queue."""

from __future__ import annotations

import os
import secrets
import signal
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.described import check_described
from tests.services import ROOT, Beanstalkd, CouchbaseServer, Process, free_port, wait_until
from zerog.datastore.sqlite import SQLiteDatastore
from zerog.documents import OwnDocuments

#: Made once: a client of its own kind takes longer to read all certificates than most tests take.
TRUST = ssl.create_default_context()

TERMINAL = ("succeeded", "failed", "cancelled")


class Deployment:
    """One server and any number of agents; all of them end with ``close``."""

    def __init__(
        self,
        folder: Path,
        store: str = "sqlite",
        queue: str = "sqlite",
        *,
        beanstalkd: Beanstalkd | None = None,
        couchbase: CouchbaseServer | None = None,
        applications: str = "workers.examples,tests",
        http: bool = bool(os.environ.get("TESTS_HTTP")),
        **settings: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.beanstalkd = beanstalkd
        self.http = http
        values = {"lease": "3", "sweep": "1", "grace": "1", "slots": "2", "applications": applications, **settings}
        values["port"] = str(self.port)
        if store == "couchbase":
            assert couchbase is not None
            values.update(datastore=couchbase.url, service=f"t{secrets.token_hex(5)}")
        if queue == "beanstalkd":
            assert beanstalkd is not None
            values["queue"] = beanstalkd.url
        python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ZEROG_")},
            **{f"ZEROG_{name.upper()}": str(value) for name, value in values.items()},
            "ZEROG_DATASTORE_PASSWORD": "password",
            "PYTHONPATH": python_path,
        }
        self._started: list[Process] = []
        self.server: Process | None = None
        self.agents: list[Process] = []
        self.client = httpx.Client(
            base_url=self.url, timeout=70, event_hooks={"response": [check_described]}, verify=TRUST
        )

    # Processes

    def start(self) -> Deployment:
        """Start the server and one agent."""
        self.start_server()
        self.start_agent()
        return self

    def start_server(self, **settings: Any) -> Process:
        """Start the server and wait until it is ready."""
        self.server = self._start("server", **settings)
        wait_until(lambda: self._ready() or (self.server and self.server.popen.poll() is not None), 30, "the server")
        assert self.server.popen.poll() is None, f"the server ended:\n{self.server.log.read_text()[-2000:]}"
        return self.server

    def start_agent(self, **settings: Any) -> Process:
        """Start one more agent; with ``http`` it speaks HTTP alone."""
        if settings.pop("http", self.http):
            settings.setdefault("master", self.url)
        agent = self._start("worker", **settings)
        self.agents.append(agent)
        return agent

    def start_daemon(self, command: str, *arguments: str, **settings: Any) -> Process:
        """Start another daemon, whose log has the name of its command."""
        return self._start(command, *arguments, **settings)

    def _start(self, command: str, *more: str, **settings: Any) -> Process:
        environment = {**self.environment, **{f"ZEROG_{k.upper()}": str(v) for k, v in settings.items()}}
        arguments = [sys.executable, "-m", "zerog", command, *more]
        process = Process(arguments, self.folder / f"{command}.log", cwd=self.folder, env=environment)
        self._started.append(process)
        return process

    def _ready(self) -> bool:
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    def restart_agent(self, number: int = signal.SIGKILL) -> None:
        """End the agent with a signal and start another."""
        agent = self.agents.pop()
        agent.signal(number)
        agent.popen.wait(30)
        self.start_agent()

    def restart_server(self, number: int = signal.SIGKILL, **settings: Any) -> None:
        """End the server with a signal and start it again."""
        assert self.server is not None
        self.server.signal(number)
        self.server.popen.wait(30)
        self.start_server(**settings)

    def log(self, command: str = "worker") -> str:
        """Return what the processes of a command have logged."""
        path = self.folder / f"{command}.log"
        return path.read_text() if path.exists() else ""

    def close(self) -> None:
        """End everything."""
        self.client.close()
        for process in reversed(self._started):  # whatever a test has made of them
            process.kill()

    # Jobs

    def submit(self, job_type: str, parameters: dict[str, Any] | None = None, **more: Any) -> str:
        """Submit a job and return its UUID."""
        answer = self.client.post(f"/run/{job_type}", json=parameters or {}, **more)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["uuid"])

    def job(self, uuid: str) -> dict[str, Any]:
        """Return the whole record."""
        answer: dict[str, Any] = self.client.get(f"/jobs/{uuid}").json()
        return answer

    def wait(self, uuid: str, seconds: float = 30.0) -> dict[str, Any]:
        """Wait for the end of a job and return its record."""

        def ended() -> dict[str, Any] | None:
            record = self._seen(uuid)
            return record if record is not None and record["state"] in TERMINAL else None

        return wait_until(ended, seconds, f"the end of job {uuid}; agent:\n{self.log()[-3000:]}")

    def wait_for(self, uuid: str, seconds: float = 30.0, **members: Any) -> dict[str, Any]:
        """Wait until the record has these members."""

        def there() -> dict[str, Any] | None:
            record = self._seen(uuid)
            return record if record is not None and all(record[name] == members[name] for name in members) else None

        return wait_until(there, seconds, f"{members} of job {uuid}; agent:\n{self.log()[-3000:]}")

    def _seen(self, uuid: str) -> dict[str, Any] | None:
        """Return the whole record; None if the store was too slow for its deadline, as any client would look again."""
        record = self.job(uuid)
        return None if record.get("code") == "store_unavailable" else record

    def wait_for_ledger(self, ledger: Path, uuid: str, attempt: int = 1) -> None:
        """Wait until the job has written that it began: "running" is written before, and a kill may come between."""
        wait_until(
            lambda: ledger.exists() and f"{uuid} {attempt}" in ledger.read_text().splitlines(),
            what=f"attempt {attempt} of job {uuid} in its ledger",
        )

    @contextmanager
    def documents(self, application: str) -> Iterator[OwnDocuments]:
        """Give the documents of an application, in a store of SQLite."""
        store = SQLiteDatastore(self.folder / "var" / "zerog.db", "zerog", 5)
        try:
            yield OwnDocuments(store, application)
        finally:
            store.close()

    def info(self, uuid: str) -> dict[str, Any]:
        """Return progress and what happened."""
        answer: dict[str, Any] = self.client.get(f"/jobs/{uuid}/info").json()
        return answer


@contextmanager
def deployed(folder: Path, *arguments: Any, **more: Any) -> Iterator[Deployment]:
    """Give a running deployment and end it afterwards."""
    deployment = Deployment(folder, *arguments, **more)
    try:
        yield deployment.start()
    finally:
        deployment.close()


@contextmanager
def over_pair(
    folder: Path, request: pytest.FixtureRequest, pair: tuple[str, str], applications: str, **settings: Any
) -> Iterator[Deployment]:
    """Give a server over a pair of store and queue, with a beanstalkd of its own, and end all of it afterwards."""
    store, queue = pair
    beanstalkd = Beanstalkd(folder / "beanstalkd").start() if queue == "beanstalkd" else None
    made = Deployment(
        folder, store, queue, applications=applications, beanstalkd=beanstalkd,
        couchbase=request.getfixturevalue("couchbase") if store == "couchbase" else None, http=False, **settings,
    )  # fmt: skip
    try:
        made.start_server()
        yield made
    finally:
        made.close()
        if beanstalkd is not None:
            beanstalkd.stop()


def children(agent_pid: int) -> list[psutil.Process]:
    return psutil.Process(agent_pid).children()


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def answers(port: int) -> bool:
    """Return whether a server on a port of loopback is ready."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", verify=TRUST).status_code == 200
    except httpx.HTTPError:
        return False
