"""A child process as the agent sees it: its pipe, its captured output, its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zerog.agent.family import family_of
from zerog.agent.pipe import AgentPipe

_ROOT = str(Path(__file__).resolve().parents[2])
_READ = 64 * 1024

#: Seconds in which a killed child is reaped: it takes longer only if it hangs in the kernel.
_REAP = 0.5


@dataclass(frozen=True, slots=True)
class Program:
    """What a child must know: the applications whose jobs it runs, and how large a return value may be, in bytes."""

    applications: Sequence[str]
    max_result: int
    #: What was written for applications, and the folder from which relative paths in it count.
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    base: str = ""


class Child:
    """One child, started by exec.  Make it in the agent's main thread: the parent-death signal follows the thread.

    ``more`` is what its environment has beside that of the agent.
    """

    def __init__(self, program: Program, more: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, **more}
        python_path = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_ROOT, python_path]))
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "zerog.agent.child", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env=environment,
                process_group=0,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.pid = self.process.pid
        self.pipe = AgentPipe(ours)
        self.end = os.pidfd_open(self.pid)
        self.ready = False
        self.closed = False
        self.jobs = 0
        assert self.process.stdout is not None and self.process.stderr is not None
        self.streams = {"stdout": self.process.stdout.fileno(), "stderr": self.process.stderr.fileno()}
        for descriptor in self.streams.values():
            os.set_blocking(descriptor, False)
        self.pipe.send(
            {
                "t": "hello",
                "path": [os.getcwd() if part == "" else part for part in sys.path],
                "pythonPath": python_path,
                "applications": list(program.applications),
                "maxResult": program.max_result,
                "own": program.own,
                "base": program.base,
            }
        )

    def read_stream(self, name: str) -> bytes | None:
        """Return captured bytes that are there now, ``None`` if there are none, empty at the end."""
        try:
            return os.read(self.streams[name], _READ)
        except BlockingIOError:
            return None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the child and to all that its job started, in whatever process group or session."""
        # All that descends from it is found by way of it: processes whose parents have ended are its children.
        family = list(family_of(self.pid)) if self.process.returncode is None else []
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)
        for pid in family:
            with suppress(ProcessLookupError, PermissionError):
                if os.getpgid(pid) != self.pid:
                    os.kill(pid, number)

    def gone(self) -> bool:
        """Return whether the process has ended."""
        return self.process.poll() is not None

    def exit_text(self) -> str:
        """Say how the process ended."""
        status = self.process.poll()
        if status is None:
            return "is still running"
        if status < 0:
            try:
                name = signal.Signals(-status).name
            except ValueError:
                name = "unknown"
            return f"was killed by signal {-status} ({name})"
        return f"exited with status {status}"

    def memory(self) -> int:
        """Return the resident memory of the process in bytes; 0 if it is gone."""
        try:
            with open(f"/proc/{self.pid}/statm", "rb") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError, ValueError):
            return 0

    def group_memory(self) -> int:
        """Return the resident memory of the process and of all that descend from it, in bytes."""
        pages = 0
        for pid in family_of(self.pid):
            with suppress(OSError, IndexError, ValueError):  # it has ended in the meantime
                with open(f"/proc/{pid}/statm", "rb") as file:
                    pages += int(file.read().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        """End the whole group now, reap the child, and close everything that belongs to it."""
        self.closed = True
        self.signal(signal.SIGKILL)
        # One that hangs in the kernel must not hold up the others: ``subprocess`` reaps it later, when another starts.
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_REAP)
        self.pipe.close()
        os.close(self.end)
        assert self.process.stdout is not None and self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()
