"""The daemons: what ``zerog up``, ``zerog server`` and ``zerog worker`` start, and how they end."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from zerog import bootstrap, failpoints
from zerog.agent.keeper import Keeper
from zerog.config import Settings
from zerog.exceptions import BadSetting, ZerogError
from zerog.fleet import Name
from zerog.supervisor import Supervisor
from zerog.sweeper import Candidate
from zerog.tokens import Tokens

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1

#: Seconds that a server of ``zerog up`` gets for its end: an application's code can hold the whole process.
_SERVER_PATIENCE = 25.0
#: Seconds after which consumers are started again that ended by themselves.
_AGAIN = 1.0
#: Set for the processes of ``zerog up``: the pid that they must not outlive.
_PARENT = "ZEROG_UP_PARENT"
#: Set for the processes of one server: the descriptors of the sockets that they listen on.
_SOCKETS = "ZEROG_SOCKETS"
#: Set for them too: the descriptor into which one writes when it serves.
_TELLS = "ZEROG_TELLS"
#: Set for all of them but the first: one says for all where store and queue are, and what is unsafe about them.
_QUIET = "ZEROG_QUIET"


def run_server(settings: Settings) -> None:
    """Run the HTTP server until a signal ends it."""
    from zerog.server import address, app

    inherited = _inherited_sockets()
    if settings.processes > 1 and not inherited:
        sys.exit(_supervise(settings))
    _follow_parent()
    _arm()
    made = bootstrap.make_server(settings)
    sockets = inherited or address.bind(settings.address, settings.port)
    if made.unsafe is not None:
        logger.warning("%s", made.unsafe)
    if os.environ.pop(_QUIET, None) is None:
        say_where(settings, made.parts)
    if not inherited:
        _say_address(settings, sockets)
    # What is there now stays: the collector need not look at it again and again.
    gc.freeze()
    sys.setswitchinterval(0.0005)
    asyncio.run(app.serve(made.server, sockets, _tell))
    made.parts.store.close()
    made.lock.close()
    logger.info("server stopped")
    logging.shutdown()
    # Not through the interpreter's own end, which waits for threads in which an application waits, perhaps for ever.
    os._exit(0)


def _supervise(settings: Settings) -> int:
    """Listen, and let as many processes serve as the settings say."""
    from zerog.server import address

    _follow_parent()
    sockets = address.bind(settings.address, settings.port)
    _say_address(settings, sockets)
    supervisor = Supervisor(
        settings.processes,
        lambda number, tells: _start(
            ["server"], settings, ("everything", "server"), [one.fileno() for one in sockets], tells, quiet=number > 1
        ),
    )
    status = supervisor.run()
    logger.info("server stopped")
    return status


def _say_address(settings: Settings, sockets: Sequence[socket.socket]) -> None:
    port = sockets[0].getsockname()[1]
    shown = f"[{settings.address}]" if ":" in settings.address else settings.address
    several = f" in {settings.processes} processes" if settings.processes > 1 else ""
    scheme = "http" if settings.tls_certificate is None else "https"
    logger.info("server listens on %s://%s:%d%s", scheme, shown, port, several)


def _tell() -> None:
    """Tell the supervisor that this process serves."""
    number = os.environ.pop(_TELLS, None)
    if number is not None:
        os.write(int(number), b"1")
        os.close(int(number))


def _inherited_sockets() -> list[socket.socket]:
    """Return the listening sockets of the supervisor that started this process, if one did."""
    text = os.environ.pop(_SOCKETS, "")
    return [socket.socket(fileno=int(number)) for number in text.split(",") if number]


def run_worker(settings: Settings) -> None:
    """Run an agent until a signal has drained it."""
    parent = _follow_parent()
    _arm()
    made = bootstrap.make_agent(settings)
    made.agent.parent = parent
    if made.parts is not None:
        say_where(settings, made.parts)
    else:
        logger.info("masters: %s", ", ".join(settings.master or ()))
    gc.freeze()
    made.agent.run()
    made.statistics.stop()
    anew = made.agent.then == "restart"
    try:
        made.agent.say_goodbye()
    except ZerogError as error:
        logger.info("nobody was told of the end: %s", error)
    if made.parts is not None:
        made.parts.store.close()
    made.lock.close()
    if anew:
        _execute_anew(made.name, made.instance, parent)
    made.name.close()


def run_consumer(settings: Settings, names: Sequence[str]) -> None:
    """Run consumers until a signal ends it: those for which nobody else has the lease."""
    _follow_parent()
    _arm()
    parts = bootstrap.assemble(settings, min(settings.deadline, settings.lease / 10))
    instance = f"consumer-{bootstrap.process_name()}"
    lock = bootstrap.make_lock(settings, parts.clock, instance)
    try:
        hosts = bootstrap.make_hosts(settings, parts, names, Candidate(instance, lock.presence))
        say_where(settings, parts)
        keeper = Keeper()
        hosts.use(keeper.environment)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: hosts.stop())
        logger.info("follows topics: %s", ", ".join(names))
        hosts.run()
        keeper.close()
    finally:
        parts.manager.close_queue()
        parts.store.close()
        lock.close()
    logger.info("consumer stopped")


def _execute_anew(name: Name, instance: str, parent: int | None) -> None:
    """Be this very process once more, with its pid and the agent's name."""
    logger.info("agent %s executes itself anew", name.id)
    logging.shutdown()
    os.set_inheritable(name.descriptor, True)
    environment = {**os.environ, bootstrap.KEPT_NAME: f"{name.descriptor}:{name.id}:{instance}"}
    if parent is not None:
        environment[_PARENT] = str(parent)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _arm() -> None:
    armed = failpoints.arm(os.environ.get(failpoints.VARIABLE))
    if armed:
        logger.warning("fail points are armed: %s", ", ".join(armed))


def say_where(settings: Settings, parts: bootstrap.Parts) -> None:
    """Log where things are, absolute, and what is unsafe about them."""
    for name in ("datastore", "queue"):
        url = getattr(settings, name)
        where = settings.sqlite_path(url) if url.startswith("sqlite:") else url
        logger.info("%s: %s", name, where)
    for warning in (*parts.store.warnings(), *parts.open_queue().warnings()):
        logger.warning("%s", warning)


def run_up(settings: Settings) -> int:
    """Run a server, an agent and the consumers that agents do not run, each as a process; the server stops last."""
    from zerog.server import address

    parts = bootstrap.assemble(settings)
    try:
        address.check_address(
            settings.address, settings.insecure, settings.sources["address"], Tokens(parts.store, parts.clock)
        )
    finally:
        parts.store.close()
    for end in address.bind(settings.address, settings.port):
        end.close()  # free: otherwise the agent would start before the server found out
    server = _start(["server"], settings, ("everything", "server"))
    agent = _start(["worker"], settings, ("everything", "agent"))
    apart = [name for name, one in parts.registry.consumers.items() if not one.consumer.in_agents]
    others = _Others(lambda: _start(["consumer", *apart], settings, ("everything", "agent"))) if apart else None
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: signals.append(received))
    return _attend({"server": server, "agent": agent}, others, signals)


class _Others:
    """The process of the consumers that agents do not run; one that dies is replaced, since the others can wait."""

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self._start = start
        self.process = start()
        self._start_at: float | None = None

    def attend(self) -> None:
        """Start it again, a while after it has died."""
        if self.process.poll() is None:
            return
        now = time.monotonic()
        if self._start_at is None:
            logger.error("the consumers' process ended with status %d, and is started again", self.process.returncode)
            self._start_at = now + _AGAIN
        elif now >= self._start_at:
            self.process, self._start_at = self._start(), None


def _start(
    command: Sequence[str],
    settings: Settings,
    groups: Sequence[str],
    sockets: Sequence[int] = (),
    tells: int | None = None,
    quiet: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a daemon with the same settings, which travel in its environment as they were written.

    It inherits the descriptors ``sockets``, and ``tells``, into which it writes when it serves; ``quiet`` leaves it to
    others to say where store and queue are.
    """
    environment = bootstrap.environment_of(settings, groups) | {_PARENT: str(os.getpid())}
    arguments = [sys.executable, "-m", "zerog", *command]
    if sockets:
        environment[_SOCKETS] = ",".join(map(str, sockets))
    if tells is not None:
        environment[_TELLS] = str(tells)
    if quiet:
        environment[_QUIET] = "1"
    # A group of its own: Ctrl-C reaches the parent alone, which ends them in order.
    inherited = [*sockets, *([tells] if tells is not None else [])]
    return subprocess.Popen(arguments, env=environment, process_group=0, pass_fds=inherited)


def _attend(processes: dict[str, subprocess.Popen[bytes]], others: _Others | None, signals: list[int]) -> int:
    """Pass signals on, and end the others when one of them has ended."""
    server, agent = processes["server"], processes["agent"]
    passed = 0
    unexpected = 0
    while any(one.poll() is None for one in (agent, server, *_running(others))):
        if passed < len(signals):
            passed += 1
            for one in (agent, *_running(others)):
                if one.poll() is None:
                    one.send_signal(signal.SIGTERM)
        if others is not None and not signals:
            others.attend()
        if server.poll() is not None and agent.poll() is None and not signals:
            logger.error("the server ended with status %d, and so does everything else", server.returncode)
            unexpected = server.returncode or 1
            signals.append(signal.SIGTERM)
        if agent.poll() is not None and server.poll() is None:
            if not signals:
                logger.error("the agent ended with status %d, and so does everything else", agent.returncode)
                unexpected = agent.returncode or 1
                signals.append(signal.SIGTERM)
                continue
            if any(one.poll() is None for one in _running(others)):
                time.sleep(0.1)
                continue  # what they publish is to be seen by whoever asks the server last
            server.terminate()
            try:
                server.wait(_SERVER_PATIENCE)
            except subprocess.TimeoutExpired:
                logger.warning("the server did not end within %g s and is killed", _SERVER_PATIENCE)
                server.kill()
        time.sleep(0.1)
    return unexpected


def _running(others: _Others | None) -> list[subprocess.Popen[bytes]]:
    return [] if others is None else [others.process]


def _follow_parent() -> int | None:
    """End with the process of ours that started this one, however that ends; returns its pid if there is one."""
    text = os.environ.pop(_PARENT, None)
    if text is None:
        return None
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(text):
        raise BadSetting("the process that started this one is gone")
    return int(text)
