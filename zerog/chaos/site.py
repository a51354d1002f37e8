"""A deployment that may be injured: server, agents and beanstalkd as processes, each ended by its pid."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from zerog.chaos.proxy import Proxy
from zerog.client import Api
from zerog.exceptions import MissingDependency, ZerogError

T = TypeVar("T")

#: nginx before several servers: what is safe to repeat goes to the next one, clients repeat the rest themselves.
_NGINX = """daemon off; worker_processes 1; master_process off;
pid {folder}/nginx.pid; error_log {folder}/nginx-error.log;
events {{}}
http {{
    access_log off; {kept}
    upstream zerog {{ {servers} }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://zerog; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_next_upstream error timeout http_502; proxy_connect_timeout 2s; proxy_read_timeout 75s;
            proxy_buffering off; proxy_request_buffering off;
        }}
    }}
}}
"""

_ROOT = str(Path(__file__).resolve().parents[2])

#: Seconds within which a process must answer after its start.
_START = 30.0


#: Ports from which one is taken.
_PORTS = range(15_000, 32_000)


def until(condition: Callable[[], T | None], seconds: float, what: str) -> T:
    """Return the first true value of ``condition``; ``TimeoutError`` after ``seconds``."""
    end, pause = time.monotonic() + seconds, 0.01
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(pause)  # between two looks, which take time from what is waited for
        pause = min(0.05, pause * 1.2)


def free_port() -> int:
    """Return a port of loopback that nobody uses now.

    Not one of those that the kernel gives to connections: one of these may take it before it is used.
    """
    for _ in range(1000):
        port = secrets.choice(_PORTS)
        with socket.socket() as end, suppress(OSError):
            end.bind(("127.0.0.1", port))
            return port
    raise OSError("no port of loopback is free")


class Site:
    """A server, some agents and a queue of their own, in a folder of their own.

    With several ``servers`` nginx stands before them, and clients talk to it: round robin.  ``datastore`` is ``sqlite``
    or a URL; ``queue`` is ``sqlite``, ``beanstalkd`` or ``beanstalkd-durable`` (with a binlog).  The agents ``speak``
    ``direct``, ``http`` or ``both``.  With ``server`` only agents are started; their settings are those of whoever
    calls, from the environment and from the file in the working directory.
    """

    def __init__(
        self,
        datastore: str,
        queue: str,
        lease: float,
        sweep: float,
        agents: int,
        slots: int,
        server: str | None = None,
        servers: int = 1,
        speak: str = "direct",
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="zerog-chaos-"))
        self.ledger = self.folder / "ledger"
        self.store = datastore.partition(":")[0] if server is None else "deployment"
        self.queue = queue if server is None else server
        self.lease, self.sweep = lease, sweep
        #: The ports of the servers, and the one that clients use.
        self.ports = [free_port() for _ in range(servers)]
        self.port = self.ports[0] if servers == 1 else free_port()
        self.url = server or f"http://127.0.0.1:{self.port}"
        self.client = Api(self.url, patience=0)
        self.servers: dict[int, subprocess.Popen[bytes]] = {}
        self.front: subprocess.Popen[bytes] | None = None
        self.agents: list[subprocess.Popen[bytes]] = []
        self.beanstalkd: subprocess.Popen[bytes] | None = None
        self.count = agents
        #: How the agents speak, and which of them do by HTTP alone.
        self.speak = speak
        self._by_http: set[int] = set()
        self.queue_port = free_port()
        self._external = server is not None
        #: What the processes get as their environment, and what is to be undone at the end.
        self.environment = self._settings(datastore, slots)
        self.cleanup = ExitStack()
        self.proxy: Proxy | None = None
        self.hold_agents = False  # whether they are not started with the rest

    def _settings(self, datastore: str, slots: int) -> dict[str, str]:
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join([_ROOT, os.environ.get("PYTHONPATH", "")]))
        values = {"slots": str(slots), "applications": "zerog.chaos", "grace": "1"}
        if not self._external:
            values.update(lease=f"{self.lease:g}", sweep=f"{self.sweep:g}", service=f"chaos{self.port}")
            values["datastore"] = f"sqlite:///{self.folder}/zerog.db" if datastore == "sqlite" else datastore
            values["queue"] = f"sqlite:///{self.folder}/queue.db"
            values["run_dir"] = f"{self.folder}/run"
            if self.queue != "sqlite":
                values["queue"] = f"beanstalk://127.0.0.1:{self.queue_port}"
        environment.update({f"ZEROG_{name.upper()}": value for name, value in values.items()})
        return environment

    # Processes

    def start(self) -> None:
        """Start everything and wait until it is ready."""
        if not self._external:
            self.start_queue()
            self.start_servers()
            self.start_front()
        if not self.hold_agents:
            self.start_agents()

    def start_agents(self) -> None:
        """Start as many agents as there are to be; of both kinds as many as of the other."""
        for number in range(self.count):
            self.start_agent(self.speak == "http" or (self.speak == "both" and number % 2 == 0))

    def start_queue(self) -> None:
        """Start beanstalkd on its port, if the queue is one."""
        if self.queue == "sqlite" or self._external:
            return
        program = shutil.which("beanstalkd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/bin"]))
        if program is None:
            raise MissingDependency("chaos needs the command beanstalkd for this queue: apt install beanstalkd")
        arguments = [program, "-l", "127.0.0.1", "-p", str(self.queue_port)]
        if self.queue == "beanstalkd-durable":
            (self.folder / "binlog").mkdir(exist_ok=True)
            arguments += ["-b", str(self.folder / "binlog"), "-f0"]
        self.beanstalkd = self._spawn(arguments, "beanstalkd")
        until(self._queue_answers, _START, "beanstalkd")

    def _queue_answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.queue_port), 1):
            return True
        return False

    def start_servers(self) -> None:
        """Start those servers that do not run, and wait until they answer."""
        for port in self.ports:
            if port not in self.servers or self.servers[port].poll() is not None:
                arguments = [sys.executable, "-m", "zerog", "server", "--port", str(port)]
                self.servers[port] = self._spawn(arguments, "server")
        for port in self.ports:
            until(partial(self._answers, port), _START, f"the server; see {self.folder}/server.log")

    def _answers(self, port: int) -> bool:
        with suppress(ZerogError):
            return bool(Api(f"http://127.0.0.1:{port}", patience=0).types())
        return False

    def start_front(self) -> None:
        """Start nginx before the servers, if there are several."""
        if len(self.ports) == 1:
            return
        program = shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))
        if program is None:
            raise MissingDependency("chaos needs the command nginx for several servers: apt install nginx")
        servers = " ".join(f"server 127.0.0.1:{port} max_fails=1 fail_timeout=1s;" for port in self.ports)
        kept = " ".join(
            f"{name}_temp_path {self.folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (self.folder / "nginx.conf").write_text(
            _NGINX.format(folder=self.folder, kept=kept, servers=servers, port=self.port)
        )
        self.front = self._spawn([program, "-c", f"{self.folder}/nginx.conf", "-p", str(self.folder)], "nginx")
        until(partial(self._answers, self.port), _START, f"nginx; see {self.folder}/nginx.log")

    def start_agent(self, by_http: bool = False) -> subprocess.Popen[bytes]:
        """Start one more agent, which may speak HTTP alone, to any of the servers."""
        arguments = [sys.executable, "-m", "zerog", "worker"]
        if by_http:
            masters = [self.url] if self._external else [f"http://127.0.0.1:{port}" for port in self.ports]
            arguments += ["--master", ",".join(masters)]
        agent = self._spawn(arguments, "worker")
        self.agents.append(agent)
        if by_http:
            self._by_http.add(agent.pid)
        return agent

    def _spawn(self, arguments: list[str], name: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=None if self._external else self.folder,
                process_group=0,
            )

    def replace_agent(self, agent: subprocess.Popen[bytes]) -> float:
        """Kill an agent, start another of its kind, and return when it was killed, by the monotonic clock."""
        moment = time.monotonic()
        kill(agent)
        self.agents.remove(agent)
        self.start_agent(agent.pid in self._by_http)
        return moment

    def processes(self) -> list[subprocess.Popen[bytes]]:
        """Return what was started and not given up."""
        several = (*self.agents, *self.servers.values(), self.beanstalkd, self.front)
        return [one for one in several if one is not None]

    def kill_all(self) -> None:
        """Kill everything, as a host does that loses its power."""
        for process in self.processes():
            kill(process)
        self.agents.clear()

    def wipe_queue(self) -> None:
        """Make the queue forget everything, and be there again."""
        if self.queue == "sqlite":
            for suffix in ("", "-wal", "-shm"):
                (self.folder / f"queue.db{suffix}").unlink(missing_ok=True)
            return
        assert self.beanstalkd is not None
        kill(self.beanstalkd)
        self.start_queue()

    def superseded(self) -> int:
        """Return how many attempts the agents found superseded, as their log says."""
        log = self.folder / "worker.log"
        return log.read_text(errors="replace").count(" superseded job=") if log.exists() else 0

    def close(self, keep: bool) -> None:
        """End everything; the folder stays if ``keep``."""
        for process in self.processes():
            kill(process)
        self.cleanup.close()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process now, also a stopped one, and reap it."""
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait(10)
