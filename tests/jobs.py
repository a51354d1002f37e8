"""Jobs for tests: an application that deployments of tests serve beside the examples."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, SecretStr

import zerog


class Ledger(zerog.Job):
    """Append one line for each execution, wait, and return the attempt."""

    job_type = "ledger"

    path: str
    seconds: float = 0.0

    def run(self, context: zerog.Context) -> int:
        line = f"{context.uuid} {context.attempt}\n".encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line)
        os.close(descriptor)
        end = time.monotonic() + self.seconds
        while time.monotonic() < end and not context.cancelled:
            time.sleep(0.02)
        return context.attempt


class HoldGil(zerog.Job):
    """Hold the GIL in C for about some seconds."""

    job_type = "hold-gil"

    path: str
    seconds: float = 5.0

    def run(self, context: zerog.Context) -> int:
        with Path(self.path).open("a") as file:
            file.write(f"{context.attempt}\n")
        start = time.monotonic()
        sum(range(10**7))
        rate = 10**7 / (time.monotonic() - start)
        sum(range(int(rate * self.seconds)))
        return context.attempt


class Crash(zerog.Job):
    """End its own process, the way that is asked for."""

    job_type = "crash"
    backoff = 0.05

    how: str = "kill"
    until: int = 100

    def run(self, context: zerog.Context) -> int:
        if context.attempt >= self.until:
            return context.attempt
        context.event("before the crash")
        context.progress(0.5, "about to crash")
        time.sleep(0.3)
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)


class Gather(zerog.Job):
    """Return what the parents have come to."""

    job_type = "gather"

    how: str = "data"
    pause: float = 0.0

    def run(self, context: zerog.Context) -> Any:
        found = []
        for parent in context.parents:
            time.sleep(self.pause)
            if self.how == "data":
                value = parent.data()
                found.append([parent.uuid, parent.job_type, value.decode() if isinstance(value, bytes) else value])
            else:
                found.append([parent.uuid, parent.size, self._read(parent)])
        return found

    def _read(self, parent: zerog.Parent) -> Any:
        digest, most = hashlib.sha256(), 0
        with parent.open() as file:
            for block in iter(lambda: file.read(100_000), b""):
                digest.update(block)
                most = max(most, len(block))
            file.seek(-3, 2)
            last = file.read()
            file.seek(5)
            return [digest.hexdigest(), most, last.hex(), file.read(2).hex()]


class Node(zerog.Job):
    """One job of a graph: note the start and the end, or fail."""

    job_type = "node"
    max_losses = 1000

    path: str
    seconds: float = 0.0
    fails: bool = False

    def run(self, context: zerog.Context) -> None:
        self._note(f"start {context.uuid}")
        time.sleep(self.seconds)
        if self.fails:
            raise zerog.Fail("as the graph says")
        self._note(f"end {context.uuid}")

    def _note(self, line: str) -> None:
        with open(self.path, "a") as ledger:
            ledger.write(f"{line}\n")


class Raise(zerog.Job):
    """Raise something."""

    job_type = "raise"
    backoff = 0.05
    final_errors = (KeyError,)

    what: str

    def run(self, context: zerog.Context) -> None:
        match self.what:
            case "fail":
                raise zerog.Fail("not possible", code=422)
            case "retry":
                raise zerog.Retry("once more", after=0.05)
            case "exit":
                sys.exit(3)
            case "interrupt":
                raise KeyboardInterrupt
            case "final":
                raise KeyError("final")
            case "bad-text":
                raise _BadText
        raise ValueError(self.what)


class _BadText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Return(zerog.Job):
    """Return something."""

    job_type = "return"

    what: str
    size: int = 0

    def run(self, context: zerog.Context) -> Any:
        circle: list[Any] = []
        circle.append(circle)
        values: dict[str, Any] = {
            "none": None, "zero": 0, "empty": "", "list": [], "dict": {}, "false": False, "object": object(),
            "nan": float("nan"), "circle": circle, "created": zerog.Succeeded({"a": 1}, code=201),
            "surrogate": "\ud800", "text": "x" * self.size,
        }  # fmt: skip
        return values[self.what]


class WriteOutput(zerog.Job):
    """Write an output."""

    job_type = "write-output"

    how: str = "one"
    media_type: str = "text/csv"

    def run(self, context: zerog.Context) -> Any:
        if self.how == "empty":
            with context.output(self.media_type):
                return None
        with context.output(self.media_type) as output:
            output.write("a,b\n1,2\n")
        if self.how == "two":
            context.output(self.media_type)
        return {"beside": True} if self.how == "beside" else None


class Speak(zerog.Job):
    """Say things on all channels."""

    job_type = "speak"

    count: int = 1
    size: int = 10
    channel: str = "event"
    text: str | None = None

    def run(self, context: zerog.Context) -> None:
        for number in range(self.count):
            text = self.text if self.text is not None else f"{number}:".ljust(self.size, "x")
            match self.channel:
                case "stdout":
                    print(text)
                case "stderr":
                    print(text, file=sys.stderr)
                case "fd":
                    os.write(1, text.encode() + b"\n")
                case "warning":
                    context.warning(text, code=number)
                case "error":
                    context.error(text, code=number)
                case _:
                    context.event(text, code=number)


class ManyProgress(zerog.Job):
    """Report progress very often, also what is no progress."""

    job_type = "many-progress"

    count: int = 1_000_000

    def run(self, context: zerog.Context) -> None:
        for number in range(self.count):
            context.progress(number / self.count)
        for wrong in (float("nan"), 7.0, -1.0, "half", None):
            context.progress(wrong)  # type: ignore[arg-type]
        context.progress(0.25, "went back")
        time.sleep(1.5)


class Asynchronous(zerog.Job):
    """Sleep in asynchronous code."""

    job_type = "asynchronous"

    seconds: float = 0.1
    stubborn: bool = False

    async def run(self, context: zerog.Context) -> str:
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            context.event("cancelled inside")
            if not self.stubborn:
                raise
        return "slept"


class Deaf(zerog.Job):
    """Hear neither a cancel nor SIGTERM."""

    job_type = "deaf"

    seconds: float = 60.0
    ignore_sigterm: bool = True

    def run(self, context: zerog.Context) -> None:
        if self.ignore_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        context.progress(0.1, f"pid {os.getpid()}")
        time.sleep(self.seconds)


class Limited(zerog.Job):
    """Run into its time limit."""

    job_type = "limited"
    time_limit = 0.5
    max_errors = 2
    backoff = 0.05

    def run(self, context: zerog.Context) -> None:
        time.sleep(30)


class Surround(zerog.Job):
    """Change the process, or tell how it is."""

    job_type = "surround"

    change: bool = False

    def run(self, context: zerog.Context) -> dict[str, Any]:
        seen = {
            "pid": os.getpid(),
            "cwd": str(Path.cwd()),
            "umask": os.umask(0o22),
            "variable": os.environ.get("LEFT_BEHIND"),
            "usr1": str(signal.getsignal(signal.SIGUSR1)),
        }
        os.umask(seen["umask"])  # type: ignore[arg-type]
        if self.change:
            os.chdir("/")
            os.umask(0o77)
            os.environ["LEFT_BEHIND"] = "yes"
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        return seen


class LeaveProcess(zerog.Job):
    """Leave a process behind."""

    job_type = "leave-process"

    def run(self, context: zerog.Context) -> dict[str, int]:
        left = subprocess.Popen(["sleep", "300"])
        return {"pid": os.getpid(), "left": left.pid}


class Detach(zerog.Job):
    """Start processes in this group, with an empty environment, in a session of their own and deaf, and orphaned."""

    job_type = "detach"
    max_errors = 1
    max_crashes = 1
    max_losses = 1
    memory_limit = 200_000_000

    path: str
    seconds: float = 60.0
    fat: bool = False

    def run(self, context: zerog.Context) -> None:
        started = [
            subprocess.Popen(["sleep", "300"]),
            subprocess.Popen(["/bin/sleep", "300"], env={}),
            subprocess.Popen(["sh", "-c", "trap '' TERM; while :; do sleep 1; done"], start_new_session=True),
        ]
        orphan = ["sh", "-c", "setsid sleep 300 >/dev/null 2>&1 & echo $!"]
        pids = [one.pid for one in started]
        pids.append(int(subprocess.run(orphan, capture_output=True, check=True).stdout))
        if self.fat:
            code = "import time; held = b'x' * 300_000_000; time.sleep(300)"
            pids.append(subprocess.Popen([sys.executable, "-c", code], start_new_session=True).pid)
        Path(self.path).write_text(" ".join(map(str, pids)))
        time.sleep(self.seconds)


class LeaveGroup(zerog.Job):
    """Leave the process group, and do not end."""

    job_type = "leave-group"
    max_errors = 1
    time_limit = 0.5

    def run(self, context: zerog.Context) -> None:
        os.setpgid(0, os.getpgid(os.getppid()))
        time.sleep(60)


class Fresh(zerog.Job):
    """Run in a process of its own."""

    job_type = "fresh"
    fresh_process = True

    def run(self, context: zerog.Context) -> int:
        return os.getpid()


class Hoard(zerog.Job):
    """Keep memory in the process."""

    job_type = "hoard"

    size: int

    def run(self, context: zerog.Context) -> int:
        _HOARD.append(b"x" * self.size)
        return os.getpid()


_HOARD: list[bytes] = []


class Login(BaseModel):
    """A nested model."""

    user: str
    password: SecretStr


class Secret(zerog.Job):
    """Take secrets; return only whether they arrived."""

    job_type = "secret"

    login: Login
    token: SecretStr = SecretStr("default-secret")
    wrong: bool = False

    def run(self, context: zerog.Context) -> bool:
        if self.wrong:
            raise ValueError(f"cannot log in with {self!r}")
        return self.login.password.get_secret_value() == "hunter2-öß"


class OnlyOnce(zerog.Job):
    """Rather not at all than twice."""

    job_type = "only-once"
    rerun_after_crash = False

    seconds: float = 0.0

    def run(self, context: zerog.Context) -> None:
        context.progress(0.1, "started")
        time.sleep(self.seconds)
        os.kill(os.getpid(), signal.SIGKILL)


class Strict(zerog.Job):
    """Many kinds of parameters."""

    job_type = "strict"
    example = {"number": 1}

    number: int = Field(ge=0, le=2**53 - 1)
    big: int = 0
    real: float = Field(0.5, lt=10)
    flag: bool = False
    text: str = Field("abc", min_length=1, max_length=10, pattern="^[a-z]+$")
    inner: list[Login] = []
    either: Login | int | None = None
    anything: dict[str, Any] = {}

    def run(self, context: zerog.Context) -> dict[str, Any]:
        return {"number": self.number, "big": self.big, "anything": self.anything}


class NoopLater(zerog.Job):
    """Do nothing, where a test wants a job that stays queued."""

    job_type = "noop-later"

    def run(self, context: zerog.Context) -> None:
        return None


class Fork(zerog.Job):
    """Fork, and let the copy come back from run."""

    job_type = "fork"

    how: str = "return"

    def run(self, context: zerog.Context) -> dict[str, str]:
        pid = os.fork()
        if pid == 0:
            context.progress(0.9, "from the copy")
            if self.how == "raise":
                raise ValueError("in the copy")
            if self.how == "exit":
                sys.exit(0)
            return {"who": "copy"}
        if self.how != "leave":
            os.waitpid(pid, 0)
        return {"who": "original"}


class LeaveThread(zerog.Job):
    """Leave a thread behind that goes on talking."""

    job_type = "leave-thread"

    def run(self, context: zerog.Context) -> int:
        def talk() -> None:
            while True:
                context.progress(0.77, "leaked")
                context.event("leaked")
                print("leaked")
                time.sleep(0.01)

        threading.Thread(target=talk, daemon=True).start()
        return os.getpid()


class CloseStreams(zerog.Job):
    """Close what the next job needs."""

    job_type = "close-streams"

    def run(self, context: zerog.Context) -> int:
        sys.path.clear()
        os.close(1)
        sys.stderr.close()
        sys.stdout.close()
        return os.getpid()


class Steps(zerog.Job):
    """Go through steps, keeping each; come to grief at one of them in the first attempt."""

    job_type = "steps"
    backoff = 0.05

    path: str
    count: int = 5
    bad: int = 3
    how: str = "raise"

    def run(self, context: zerog.Context) -> int:
        first = context.state or 0
        for step in range(first, self.count):
            with Path(self.path).open("a") as file:
                file.write(f"{context.attempt} {step}\n")
            if step == self.bad and context.attempt == 1:
                match self.how:
                    case "raise":
                        raise ValueError("a bad step")
                    case "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    case "wait":
                        context.progress(0.5, "at the bad step")
                        time.sleep(60)
            context.checkpoint(step + 1)
            assert context.state == step + 1
        return first


class BadCheckpoint(zerog.Job):
    """Try to keep what cannot be kept."""

    job_type = "bad-checkpoint"

    def run(self, context: zerog.Context) -> list[str]:
        refused = []
        for state in (float("nan"), object(), "x" * 70_000):
            try:
                context.checkpoint(state)
            except ValueError as error:
                refused.append(str(error))
        return refused


class SoftlyLimited(zerog.Job):
    """Run into the soft time limit, and heed it or not."""

    job_type = "softly-limited"
    soft_time_limit = 0.3
    time_limit = 1.2
    max_errors = 1

    heed: bool = True

    def run(self, context: zerog.Context) -> str:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if self.heed and context.expiring:
                return "saved"
            time.sleep(0.02)
        return "not reached"


class SoftlyLimitedAsync(zerog.Job):
    """Meet the soft time limit in asynchronous code."""

    job_type = "softly-limited-async"
    soft_time_limit = 0.3
    max_errors = 1

    heed: bool = True

    async def run(self, context: zerog.Context) -> str:
        try:
            await asyncio.sleep(30)
        except zerog.SoftTimeLimit:
            if not self.heed:
                raise
            await asyncio.sleep(0.05)  # it can still wait for something
            return "saved"
        return "not reached"


class MemoryLimited(zerog.Job):
    """Use memory, by itself or in a process that it starts."""

    job_type = "memory-limited"
    memory_limit = 200 * 1024 * 1024
    max_errors = 1

    size: int
    how: str = "touch"

    def run(self, context: zerog.Context) -> Any:
        import resource

        if self.how == "map":
            bytearray(self.size)
        elif self.how == "touch":
            held = [b"x" * 1_000_000 for _ in range(self.size // 1_000_000)]
            time.sleep(5 if self.size > 150_000_000 else 0)
            return len(held)
        elif self.how == "child":
            code = f"import time; held = [b'x' * 1000000 for _ in range({self.size // 1_000_000})]; time.sleep(5)"
            subprocess.run([sys.executable, "-c", code], check=False)
        return {"limit": resource.getrlimit(resource.RLIMIT_AS)[0], "pid": os.getpid()}


class Unlimited(zerog.Job):
    """Tell how much the process may map."""

    job_type = "unlimited"

    def run(self, context: zerog.Context) -> dict[str, int]:
        import resource

        return {"limit": resource.getrlimit(resource.RLIMIT_AS)[0], "pid": os.getpid()}


class Keeping(zerog.Job):
    """Keep its state again and again, in asynchronous code."""

    job_type = "keeping"

    async def run(self, context: zerog.Context) -> None:
        try:
            for number in range(1_000_000):
                context.checkpoint(number)
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            context.event("cancelled inside")
            raise


class Greedy(zerog.Job):
    """Hold memory, keep a core busy, and write to the disk, for some seconds."""

    job_type = "greedy"

    megabytes: int = 0
    seconds: float = 1.0
    spin: bool = False
    path: str | None = None

    def run(self, context: zerog.Context) -> int:
        held = bytearray(self.megabytes * 1024 * 1024)
        for page in range(0, len(held), 4096):
            held[page] = 1
        end = time.monotonic() + self.seconds
        written = 0
        while time.monotonic() < end and not context.cancelled:
            if self.path is not None:
                with open(self.path, "wb") as file:
                    file.write(b"x" * 1024 * 1024)
                    os.fsync(file.fileno())
                written += 1
            if not self.spin:
                time.sleep(0.02)
        return written


class Holding(zerog.Job):
    """Write down when it began and when it ended, with the agent that ran it: a test adds up what was held."""

    job_type = "holding"

    path: str
    seconds: float = 0.05

    def run(self, context: zerog.Context) -> None:
        def say(word: str) -> None:
            line = f"{time.monotonic():.6f} {word} {context.uuid} {context.attempt} {os.getppid()}\n".encode()
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(descriptor, line)
            os.close(descriptor)

        say("begin")
        time.sleep(self.seconds)
        say("end")


class Counting(zerog.Job):
    """Count up in a document of the application, beside others that do so too."""

    job_type = "counting"

    key: str
    times: int

    def run(self, context: zerog.Context) -> dict[str, Any]:
        documents = context.documents
        conflicts = 0
        with suppress(zerog.AlreadyExists):
            documents.insert(self.key, {"count": 0})
        for _ in range(self.times):
            while True:
                value, cas = documents.get(self.key)
                try:
                    documents.replace(self.key, {"count": value["count"] + 1}, cas)
                    break
                except zerog.Conflict:
                    conflicts += 1
        return {"conflicts": conflicts}


class Asking(zerog.Job):
    """Say what is answered to what cannot be done with documents."""

    job_type = "asking"

    def run(self, context: zerog.Context) -> dict[str, str]:
        documents = context.documents
        cas = documents.insert("there", [1, "é"])
        answers = {"read": repr(documents.get("there")[0])}
        calls: dict[str, Callable[[], object]] = {
            "insert": lambda: documents.insert("there", 2),
            "get": lambda: documents.get("missing"),
            "replace": lambda: documents.replace("there", 2, cas + 1),
            "replace missing": lambda: documents.replace("missing", 2, 1),
            "remove": lambda: documents.remove("there", cas + 1),
            "remove missing": lambda: documents.remove("missing"),
            "key": lambda: documents.get("a/b"),
            "size": lambda: documents.insert("large", "x" * 600_000),
            "value": lambda: documents.insert("odd", float("nan")),
        }
        for name, call in calls.items():
            try:
                call()
                answers[name] = "done"
            except Exception as error:
                answers[name] = type(error).__name__
        documents.remove("there", cas)
        return answers
