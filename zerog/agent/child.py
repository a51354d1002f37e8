"""The child process: runs user code and reports through the pipe.  Started by exec: ``python -m zerog.agent.child``.

It dies with its agent (R13): by the parent-death signal, and at the end of the pipe.  Between two jobs it puts back
what a job may have changed in the process: signal handlers, working directory, umask and environment.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import ctypes
import fcntl
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from zerog import failpoints
from zerog.agent.executor import FLUSHER, Executor, PipeReporter
from zerog.agent.family import adopt_orphans
from zerog.agent.pipe import BrokenPipe, ChildPipe
from zerog.own_settings import read_own
from zerog.registry import Registry

_PR_SET_PDEATHSIG = 1

_SIGNALS = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})

# The module's own function turns each answer into an enumeration member, sixty times after each job.
_handler_of = _signal.getsignal


def main() -> None:
    """Serve the agent that started this process until the pipe ends."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    _die_with(parent)
    os.set_inheritable(descriptor, False)
    pipe = ChildPipe(socket.socket(fileno=descriptor))
    try:
        _serve(pipe)
    except (BrokenPipe, OSError):
        # The agent is gone; nobody would read what an orderly end might say.
        os._exit(0)


def _serve(pipe: ChildPipe) -> None:
    hello = pipe.receive()
    assert isinstance(hello, dict)
    _set_up(hello)
    failpoints.arm(os.environ.get(failpoints.VARIABLE), only=("child.mid",))
    registry = Registry.from_applications(hello["applications"])
    registry.settings = read_own(hello["applications"], hello["own"], Path(hello["base"]), {})
    executor = Executor(registry, pipe, PipeReporter(pipe), hello["maxResult"])
    surroundings = Surroundings.now()
    pipe.send({"t": "ready"})
    while True:
        message = pipe.receive()
        if not isinstance(message, dict) or message.get("t") != "run":
            continue  # a cancel that came after its job had ended
        outcome = executor.execute(message)
        _flush_streams()
        outcome["leftovers"] = _has_processes() or _has_threads()
        outcome["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send(outcome)
        # After the outcome, while the agent writes it down; the next job is read only when this is done.
        surroundings.restore()


def _set_up(hello: dict[str, Any]) -> None:
    sys.path[:] = hello["path"]
    if hello["pythonPath"] is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = hello["pythonPath"]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]


def _die_with(parent: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    adopt_orphans()  # those of the job: it must be known whether all have ended when it has
    if os.getppid() != parent:
        os._exit(0)  # it died before the signal was set


def _has_processes() -> bool:
    """Return whether processes that the job started are still there; those that have ended are reaped."""
    try:
        while True:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return True
    except ChildProcessError:
        return False


def _has_threads() -> bool:
    """Return whether threads that the job started are still there: what they print would look like the next job's."""
    return any(one.name != FLUSHER and one is not threading.main_thread() for one in threading.enumerate())


def _open_stream(descriptor: int) -> TextIO:
    """Return a text stream over a standard descriptor, which it leaves open when it is closed."""
    return open(descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


def _environment() -> Mapping[bytes, bytes]:
    """Return the environment as the interpreter keeps it: decoding it after each job would cost half of a short one."""
    found: Mapping[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]
    return found


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None:
                stream.flush()
        except (ValueError, OSError):
            continue  # the job closed it


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What of the process a job can change and the next one must not see."""

    directory: str
    umask: int
    environment: dict[bytes, bytes]
    handlers: dict[int, Any]
    path: tuple[str, ...]
    descriptors: tuple[int, int]

    @classmethod
    def now(cls) -> Surroundings:
        """Return the surroundings as they are."""
        mask = os.umask(0)
        os.umask(mask)
        handlers: dict[int, Any] = {int(number): _handler_of(number) for number in _SIGNALS}
        # Copies far from the numbers that a job may close by hand.
        kept = (fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 200), fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 200))
        return cls(os.getcwd(), mask, dict(_environment()), handlers, tuple(sys.path), kept)

    def restore(self) -> None:
        """Put everything back that has changed."""
        os.umask(self.umask)
        try:
            os.chdir(self.directory)
        except OSError as error:
            print(f"the working directory cannot be restored: {error}", file=sys.stderr)
        if _environment() != self.environment:
            os.environ.clear()
            os.environb.update(self.environment)
        for number, handler in self.handlers.items():
            if _handler_of(number) is not handler and handler is not None:
                signal.signal(number, handler)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if tuple(sys.path) != self.path:
            sys.path[:] = self.path
        self._restore_streams()

    def _restore_streams(self) -> None:
        for descriptor, kept, name in ((1, self.descriptors[0], "stdout"), (2, self.descriptors[1], "stderr")):
            os.dup2(kept, descriptor)
            stream = getattr(sys, f"__{name}__")
            if stream is None or stream.closed:
                stream = _open_stream(descriptor)
                setattr(sys, f"__{name}__", stream)
            setattr(sys, name, stream)


if __name__ == "__main__":
    main()
