"""Real servers for tests: started on free ports of loopback, ended by their pid, also when a test fails."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

from zerog.chaos.site import free_port, until

__all__ = [
    "ROOT",
    "Beanstalkd",
    "CouchbaseServer",
    "Memcached",
    "Process",
    "connects",
    "free_port",
    "missing",
    "wait_until",
]

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
MOCK_JAR = ROOT / ".cache" / "CouchbaseMock-1.5.27.jar"


def wait_until(condition: Callable[[], T | None], seconds: float = 10.0, what: str = "") -> T:
    """Return the first true value of ``condition``; fail after ``seconds``."""
    try:
        return until(condition, seconds, what or str(condition))
    except TimeoutError as error:
        pytest.fail(str(error))


def missing(what: str) -> None:
    """Skip a test whose service is not on this machine; under CI that is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing, and CI=true allows no skip")
    pytest.skip(f"{what} is not installed: bin/test says how to get it")


class Process:
    """A process that a test started."""

    def __init__(self, arguments: list[str], log: Path, **more: Any) -> None:
        self.arguments = arguments
        self.log = log
        with log.open("ab") as file:
            self.popen = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, **more
            )
        self.pid = self.popen.pid

    def signal(self, number: int) -> None:
        """Send a signal, if the process is still there; after ``SIGSTOP`` wait until all its threads have stopped."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
            if number == signal.SIGSTOP:
                wait_until(self._stopped, what=f"process {self.pid} stops")

    def _stopped(self) -> bool:
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with suppress(OSError):  # a thread that ended
                if (task / "stat").read_text().rpartition(")")[2].split()[0] not in "TtZX":
                    return False
        return True

    def kill(self) -> None:
        """End it now."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        self.popen.wait(10)

    def terminate(self, seconds: float = 30.0) -> int:
        """Ask it to end and return its status."""
        self.signal(signal.SIGTERM)
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"{self.arguments} did not end within {seconds} s; its log:\n{self.log.read_text()[-3000:]}")


def program(name: str) -> str:
    """Return the path of a command, which may be one for administrators."""
    found = shutil.which(name) or shutil.which(name, path="/usr/bin:/usr/sbin:/usr/local/bin:/usr/local/sbin")
    if found is None:
        missing(name)
    return str(found)


class Service:
    """A server that a test starts and ends."""

    process: Process | None = None

    def stop(self) -> None:
        """End it now; may be called twice."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.signal(number)


class Beanstalkd(Service):
    """A beanstalkd on a free port; ``durable`` gives it a binlog with a sync for each put."""

    def __init__(self, folder: Path, durable: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.address = ("127.0.0.1", self.port)
        self.url = f"beanstalk://127.0.0.1:{self.port}"
        self._arguments = [program("beanstalkd"), "-l", "127.0.0.1", "-p", str(self.port)]
        self._folder = folder
        if durable:
            (folder / "binlog").mkdir(exist_ok=True)
            self._arguments += ["-b", str(folder / "binlog"), "-f0"]

    def start(self) -> Beanstalkd:
        """Start it and wait until it answers."""
        self.process = Process(self._arguments, self._folder / "beanstalkd.log")
        wait_until(lambda: connects(self.port), what="beanstalkd")
        return self

    def restart(self) -> None:
        """End it now and start it again on the same port."""
        self.stop()
        self.start()


class Memcached(Service):
    """A memcached on a free port."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.address = ("127.0.0.1", self.port)
        self.url = f"memcached://127.0.0.1:{self.port}"
        # As root it wants to be told who to be.
        self._arguments = [
            program("memcached"),
            "-l",
            "127.0.0.1",
            "-p",
            str(self.port),
            "-U",
            "0",
            "-u",
            getpass.getuser(),
        ]
        self._folder = folder

    def start(self) -> Memcached:
        """Start it and wait until it answers."""
        self.process = Process(self._arguments, self._folder / "memcached.log")
        wait_until(lambda: connects(self.port), what="memcached")
        return self


class CouchbaseServer(Service):
    """Couchbase's own test server with one bucket; what it keeps is gone when it stops."""

    bucket = "zerog"

    def __init__(self, folder: Path) -> None:
        java = shutil.which("java")
        if java is None or not MOCK_JAR.exists():
            missing("Couchbase's test server (java and CouchbaseMock)")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._java = str(java)
        self.port = free_port()
        self.kv_port = 0

    def start(self) -> CouchbaseServer:
        """Start it and wait until it answers."""
        arguments = [
            self._java, "-Xmx512m", "-jar", str(MOCK_JAR), "--port", str(self.port),
            "--buckets", f"{self.bucket}:password", "--nodes", "1", "--replicas", "0", "--cccp",
        ]  # fmt: skip
        self.process = Process(arguments, self._folder / "couchbase.log")
        self.kv_port = wait_until(self._find_port, 30, "Couchbase's test server")
        return self

    @property
    def url(self) -> str:
        """The URL for the setting ``datastore``."""
        return f"couchbase://tester@127.0.0.1:{self.kv_port}/{self.bucket}"

    def _find_port(self) -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/pools/default/buckets/{self.bucket}")
        request.add_header("Authorization", "Basic " + b64encode(b"Administrator:password").decode())
        with suppress(OSError, ValueError, KeyError, IndexError):
            with urllib.request.urlopen(request, timeout=2) as answer:
                return int(json.load(answer)["nodesExt"][0]["services"]["kv"])
        return 0


def connects(port: int) -> bool:
    """Return whether something listens on a port of loopback."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class Nginx(Service):
    """An nginx with the configuration of ``conf/nginx.conf``, on a free port, before some servers."""

    def __init__(self, folder: Path, ports: list[int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        text = (ROOT / "conf" / "nginx.conf").read_text()
        servers = [line for line in text.splitlines() if line.strip().startswith("server 127.0.0.1:")]
        assert len(servers) == len(ports)
        for line, port in zip(servers, ports, strict=True):
            text = text.replace(line, re.sub(r":\d+ ", f":{port} ", line))
        text = text.replace("listen 8080", f"listen 127.0.0.1:{self.port}")
        temporary = "".join(
            f"{name}_temp_path {folder}/{name}; " for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        configuration = folder / "nginx.conf"
        configuration.write_text(
            f"daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log; "
            f"events {{}} http {{ access_log off; {temporary}\n{text}\n}}\n"
        )
        self._arguments = [program("nginx"), "-c", str(configuration), "-p", str(folder)]
        self._folder = folder

    def start(self) -> Nginx:
        """Start it and wait until it answers."""
        self.process = Process(self._arguments, self._folder / "nginx.log")
        wait_until(lambda: connects(self.port), what="nginx")
        return self

    def stop(self) -> None:
        """End it, its workers too; may be called twice."""
        process, self.process = self.process, None
        if process is not None:
            process.terminate()
