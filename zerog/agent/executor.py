"""One job's run inside a child: build it, call it, and say what the attempt came to.

The answer is the message that the agent reads as an outcome: ``{"t": "outcome", "kind": …}``.
"""

from __future__ import annotations

import inspect
import json
import os
import resource
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from zerog import failpoints
from zerog.agent.pipe import BrokenPipe, ChildPipe, Message
from zerog.exceptions import Fail, InvalidParameters, Retry, SoftTimeLimit, UnknownType
from zerog.job import Context, Job, checked_state, to_json
from zerog.outcome import INLINE, Requeued, Succeeded
from zerog.registry import Registry

if TYPE_CHECKING:
    import asyncio

#: Characters of one message of an event or a traceback; what is longer is cut and marked.
MAX_MESSAGE = 16 * 1024
#: Bytes of address space that an attempt may take beside its memory limit: what is mapped is not all used.
_ADDRESS_SPARE = 256 * 1024 * 1024

#: Name of the thread that sends the last progress before a long silence.
FLUSHER = "zerog-flusher"

_CHUNK = 256 * 1024
#: Seconds for which a checkpoint holds the pipe against other threads that want to hear whether they are cancelled.
_CHECKPOINT_LOOK = 0.05
_FLUSH_SECONDS = 0.1
_KEPT_FIRST = 2000
_KEPT_LAST = 800
_EVENTS_A_FRAME = 100


def _nothing() -> None:
    """Have nobody to tell."""


class PipeReporter:
    """Sends what the job says to the agent, at most about ten times a second.

    A value is sent at once when the last one is older than that; otherwise a small thread sends it, so that the last
    value before a long silence arrives.
    """

    def __init__(self, pipe: ChildPipe) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._progress: tuple[float | None, str | None] = (None, None)
        self._events: list[list[Any]] = []
        self._last: dict[str, deque[list[Any]]] = {}
        self._dropped = {"events": 0, "bytes": 0}
        self._dirty = threading.Event()
        self._sent_at = 0.0
        self._flusher: threading.Thread | None = None
        self._told: set[str] = set()
        self._stored = 0
        self._checkpoints = 0
        self._questions = 0
        self._answer: Message | None = None
        self._keeping = threading.Lock()
        #: Called, in whatever thread, when a cancel or the soft limit has been heard of.
        self.on_told: Callable[[], object] = _nothing
        self._session = 0

    def session(self) -> Session:
        """Begin the next job: forget the last one, and everything that its threads may still say."""
        with self._lock:
            self._session += 1
            self._progress, self._events, self._last = (None, None), [], {}
            self._dropped = {"events": 0, "bytes": 0}
            self._told = set()
            return Session(self, self._session)

    def end_session(self) -> None:
        """End the job: what comes later is heard by nobody."""
        with self._lock:
            self._session += 1

    def progress(self, session: int, completeness: float | None, message: str | None) -> None:
        """Keep the newest value for the next report."""
        with self._lock:
            if session != self._session:
                return
            old_value, old_message = self._progress
            self._progress = (
                completeness if completeness is not None else old_value,
                message[:MAX_MESSAGE] if message is not None else old_message,
            )
        self._report()

    def event(self, session: int, level: str, message: str, code: int | None) -> None:
        """Keep an event for the next report; a flood keeps its first and its last ones."""
        code = code if isinstance(code, int) else None
        entry = [time.time(), level, shorten(message), code]
        with self._lock:
            if session != self._session:
                return
            if len(self._events) < _KEPT_FIRST:
                self._events.append(entry)
            else:
                self._keep_last(level, entry)
        self._report()

    def _keep_last(self, level: str, entry: list[Any]) -> None:
        kept = self._last.setdefault(level, deque())
        kept.append(entry)
        if len(kept) > _KEPT_LAST:
            gone = kept.popleft()
            self._dropped["events"] += 1
            self._dropped["bytes"] += len(gone[2])

    def told(self, session: int, what: str) -> bool:
        """Return whether the agent has said something: ``cancel`` or ``expire``."""
        if session != self._session:
            return False
        if what not in self._told:
            self.hear()
        return what in self._told

    def hear(self) -> None:
        """Take all that the agent has said."""
        with suppress(BrokenPipe, OSError):  # the agent is gone, and this process with it in a moment
            while (message := self._pipe.poll()) is not None:
                self._take(message)

    def _take(self, message: Any) -> None:
        if isinstance(message, bytes) or (isinstance(message, dict) and message.get("t") == "answer"):
            self._answer = message
        elif not isinstance(message, dict):
            return
        elif message.get("t") == "stored":
            self._stored = message["number"]
        elif message.get("t") in ("cancel", "expire"):
            self._told.add(message["t"])
            self.on_told()

    def checkpoint(self, session: int, state: bytes) -> None:
        """Send the job's state and wait until the agent says that it is stored."""
        self._check(session)
        with self._keeping:  # one at a time: the agent keeps the last one that it got
            self._checkpoints += 1
            self._pipe.send({"t": "checkpoint", "number": self._checkpoints, "state": state.decode()})
            while self._stored < self._checkpoints:
                self._take(self._pipe.receive(_CHECKPOINT_LOOK))

    def ask(self, session: int, question: Message) -> Message:
        """Ask the agent something and wait for its answer, which may be bytes."""
        self._check(session)
        assert isinstance(question, dict)
        with self._keeping:
            self._questions += 1
            self._answer = None
            self._pipe.send({**question, "number": self._questions})
            while (answer := self._answer) is None:
                self._take(self._pipe.receive(_CHECKPOINT_LOOK))
            self._answer = None
            return answer

    def open_output(self, session: int, media_type: str) -> None:
        """Begin the output."""
        self._check(session)
        self._pipe.send({"t": "output", "mediaType": media_type})

    def _check(self, session: int) -> None:
        if session != self._session:
            raise ValueError("the job has ended")

    def write_output(self, session: int, data: bytes) -> None:
        """Send bytes of the output; waits while the agent has enough of them."""
        self._check(session)
        for start in range(0, len(data), _CHUNK):
            self._pipe.send(data[start : start + _CHUNK])

    def _report(self) -> None:
        if time.monotonic() - self._sent_at >= _FLUSH_SECONDS:
            self.flush()
        elif not self._dirty.is_set():
            self._dirty.set()
            if self._flusher is None:
                self._flusher = threading.Thread(target=self._flush_later, name=FLUSHER, daemon=True)
                self._flusher.start()

    def _flush_later(self) -> None:
        while True:
            self._dirty.wait()
            time.sleep(_FLUSH_SECONDS)
            try:
                self.flush()
            except (BrokenPipe, OSError):
                return  # the agent is gone

    def flush(self) -> None:
        """Send what is there now."""
        with self._lock:
            self._dirty.clear()
            self._sent_at = time.monotonic()
            (completeness, message), self._progress = self._progress, (None, None)
            events, self._events = self._events, []
            for kept in self._last.values():
                events.extend(kept)
            self._last = {}
            dropped, self._dropped = self._dropped, {"events": 0, "bytes": 0}
            # Sent under the lock, so that what is older never arrives after what is newer.
            self._send(completeness, message, events, dropped)

    def _send(
        self, completeness: float | None, message: str | None, events: list[list[Any]], dropped: dict[str, int]
    ) -> None:
        for start in range(0, max(1, len(events)), _EVENTS_A_FRAME):
            part = events[start : start + _EVENTS_A_FRAME]
            report: dict[str, Any] = {"t": "report", "events": part}
            if start == 0:
                report.update(completeness=completeness, message=message, dropped=dropped)
            if part or completeness is not None or message is not None:
                self._pipe.send(report)


class Session:
    """What one job's context reports through: good until the job ends, whatever threads it leaves behind."""

    def __init__(self, reporter: PipeReporter, number: int) -> None:
        self._reporter = reporter
        self._number = number
        self._process = os.getpid()

    @property
    def _mine(self) -> bool:
        """A copy of the process that the job forked has no voice of its own on the pipe."""
        return os.getpid() == self._process

    def progress(self, completeness: float | None, message: str | None) -> None:
        """Report how far the job is."""
        if self._mine:
            self._reporter.progress(self._number, completeness, message)

    def event(self, level: str, message: str, code: int | None) -> None:
        """Report an event."""
        if self._mine:
            self._reporter.event(self._number, level, message, code)

    def cancelled(self) -> bool:
        """Return whether a cancel has arrived."""
        return self._mine and self._reporter.told(self._number, "cancel")

    def expiring(self) -> bool:
        """Return whether the soft time limit has passed."""
        return self._mine and self._reporter.told(self._number, "expire")

    def checkpoint(self, state: bytes) -> None:
        """Store the state of the job."""
        if not self._mine:
            raise ValueError("only the process of the job itself can keep its state")
        self._reporter.checkpoint(self._number, state)

    def ask(self, question: dict[str, Any]) -> dict[str, Any] | bytes:
        """Ask the agent something."""
        if not self._mine:
            raise ValueError("only the process of the job itself can ask for its parents")
        return self._reporter.ask(self._number, question)

    def open_output(self, media_type: str) -> None:
        """Begin the output."""
        self._reporter.open_output(self._number, media_type)

    def write_output(self, data: bytes) -> None:
        """Send bytes of the output."""
        if not self._mine:
            raise ValueError("only the process of the job itself can write its output")
        self._reporter.write_output(self._number, data)


def shorten(message: str, limit: int = MAX_MESSAGE) -> str:
    """Return a message cut at ``limit`` characters and marked if it was, with half surrogates replaced."""
    safe = message.encode("utf-8", "replace").decode()
    return safe if len(safe) <= limit else safe[:limit] + f"… [cut, {len(safe)} characters]"


@dataclass(slots=True)
class Executor:
    """Runs the attempts that the agent sends; one at a time, in the child's main thread."""

    registry: Registry
    pipe: ChildPipe
    reporter: PipeReporter
    max_result: int

    def execute(self, message: dict[str, Any]) -> dict[str, Any]:
        """Run one attempt and return its outcome."""
        session = self.reporter.session()
        context = Context(
            session,
            message["uuid"],
            message["attempt"],
            message.get("state"),
            message.get("parents", ()),
            self.registry.settings_of(message["jobType"]),
            message.get("jobNumber", 0),
        )
        outcome = self._outcome(message, context, session)
        self.reporter.end_session()
        self.reporter.flush()
        outcome["told"] = context.told
        outcome["attempt"], outcome["uuid"] = context.attempt, context.uuid
        return outcome

    def _outcome(self, message: dict[str, Any], context: Context, session: Session) -> dict[str, Any]:
        try:
            job = self.registry.build(message["jobType"], message["parameters"])
        except InvalidParameters as error:
            return _failed(str(error), reason="invalid_parameters", final=True, free=True)
        except UnknownType as error:
            return _failed(str(error), reason="unknown_type", final=True, free=True)
        process = os.getpid()
        try:
            with _memory_limit(job.memory_limit):
                value = self._call(job, context)
        except BaseException as error:  # also SystemExit and KeyboardInterrupt: user code does not end the child
            _end_if_forked(process, error)
            return self._raised(error, job, context)
        _end_if_forked(process, None)
        if context.opened is not None:
            context.opened.close()
        return self._returned(value, context, session)

    def _call(self, job: Job, context: Context) -> Any:
        failpoints.hit("child.mid")
        value = job.run(context)
        if not inspect.isawaitable(value):
            return value
        import asyncio  # here, since it costs every start of a child a tenth, and most jobs do not need it

        return asyncio.run(self._await(value, context))

    async def _await(self, value: Any, context: Context) -> Any:
        """Await an asynchronous job; a cancel becomes ``CancelledError`` in it, the soft limit ``SoftTimeLimit``."""
        import asyncio

        interrupted = Interruptible(value)
        task = asyncio.ensure_future(interrupted.run())
        loop = asyncio.get_running_loop()

        cancels: list[bool] = []

        def react() -> None:
            if context.cancelled and not cancels:
                cancels.append(task.cancel())
            elif context.expiring and not interrupted.expired:
                interrupted.expire(task)

        # What is heard on another way, while a checkpoint waits or in a thread, makes no descriptor readable.
        self.reporter.on_told = lambda: loop.call_soon_threadsafe(react)
        loop.add_reader(self.pipe.fileno(), self.reporter.hear)
        try:
            return await task
        finally:
            self.reporter.on_told = _nothing
            loop.remove_reader(self.pipe.fileno())

    def _raised(self, error: BaseException, job: Job, context: Context) -> dict[str, Any]:
        if context.told and _is_cancel(error):
            return {"t": "outcome", "kind": "cancelled"}
        if context.second_output:
            return _failed("a job has one output", reason="two_results", final=True)
        if isinstance(error, Retry):
            return _failed(error.detail, reason="retry", after=error.after)
        if isinstance(error, Fail):
            return _failed(error.detail, reason="failed", code=error.result_code, final=True)
        message = f"{type(error).__name__}: {_text(error)}".rstrip(": ")
        if isinstance(error, SoftTimeLimit):
            return _failed(message, trace=_traceback(error), reason="soft_time_limit", code=504)
        if isinstance(error, MemoryError) and job.memory_limit is not None:
            text = f"the attempt needed more memory than its limit of {job.memory_limit} bytes"
            return _failed(text, trace=_traceback(error), reason="memory_limit", code=507)
        return _failed(message, trace=_traceback(error), final=isinstance(error, job.final_errors))

    def _returned(self, value: Any, context: Context, session: Session) -> dict[str, Any]:
        if isinstance(value, Requeued):
            return self._requeued(value)
        code = 200
        if isinstance(value, Succeeded):
            value, code = value.data, value.code
        if context.second_output or (context.opened is not None and value is not None):
            return _failed("a job has one result: its output or its return value", reason="two_results", final=True)
        done: dict[str, Any] = {"t": "outcome", "kind": "succeeded", "code": code}
        if value is None:
            return done
        try:
            text = to_json(value)
        except (TypeError, ValueError, RecursionError) as error:
            return _failed(f"the return value is not JSON: {_text(error)}", reason="result_not_json", final=True)
        return self._with_data(done, text, session)

    def _with_data(self, done: dict[str, Any], text: bytes, session: Session) -> dict[str, Any]:
        if len(text) > self.max_result:
            detail = f"the return value has {len(text)} bytes, more than max_result ({self.max_result})"
            return _failed(f"{detail}; write it to context.output()", reason="result_too_large", final=True)
        if len(text) <= INLINE:
            return {**done, "inline": text.decode()}
        session.open_output("application/json")
        session.write_output(text)
        return done

    def _requeued(self, value: Requeued) -> dict[str, Any]:
        try:
            text = checked_state(value.state)
        except ValueError as error:
            large = "may have" in str(error)
            return _failed(_text(error), "result_too_large" if large else "result_not_json", final=True)
        return {"t": "outcome", "kind": "requeued", "delay": value.delay, "state": json.loads(text)}


class Interruptible:
    """Drives a job's coroutine, so that another exception than ``CancelledError`` can be thrown into it."""

    def __init__(self, awaitable: Awaitable[Any]) -> None:
        self._awaitable = awaitable
        #: Whether the soft time limit has been thrown, or is about to be.
        self.expired = False
        self._due: asyncio.Task[Any] | None = None

    def expire(self, task: asyncio.Task[Any]) -> None:
        """Throw ``SoftTimeLimit`` into the job, by way of a cancel that never reaches it."""
        self.expired, self._due = True, task
        task.cancel()

    async def run(self) -> Any:
        """Return what the job returns."""
        return await self

    def __await__(self) -> Generator[Any, Any, Any]:
        from asyncio import CancelledError

        inner = self._awaitable.__await__()
        step: Callable[[], Any] = partial(inner.send, None)
        while True:
            try:
                waits_for = step()
            except StopIteration as end:
                return end.value
            try:
                step = partial(inner.send, (yield waits_for))
            except CancelledError as error:
                thrown: BaseException = error
                if self._due is not None:
                    self._due.uncancel()
                    self._due = None
                    thrown = SoftTimeLimit()
                step = partial(inner.throw, thrown)


@contextmanager
def _memory_limit(limit: int | None) -> Iterator[None]:
    """Let this process, and what it starts, map no more than ``limit`` bytes beyond what it has, and some spare."""
    if limit is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = _address_space() + limit + _ADDRESS_SPARE
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _is_cancel(error: BaseException) -> bool:
    """Return whether an error is asyncio's way of saying that the job was cancelled."""
    asyncio = sys.modules.get("asyncio")  # who has not imported it cannot have raised it
    return asyncio is not None and isinstance(error, asyncio.CancelledError)


def _end_if_forked(process: int, error: BaseException | None) -> None:
    """End a copy of this process that the job forked and that came back here: only the original has an outcome."""
    if os.getpid() == process:
        return
    status = 0
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        traceback.print_exception(error)
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(status & 255)


def _failed(
    message: str,
    reason: str = "exception",
    code: int = 500,
    trace: str | None = None,
    final: bool = False,
    after: float | None = None,
    free: bool = False,
) -> dict[str, Any]:
    return {
        "t": "outcome",
        "kind": "failed",
        "message": shorten(message),
        "reason": reason,
        "code": code,
        "traceback": trace,
        "final": final,
        "after": after,
        "free": free,
    }


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(the exception cannot be written as text)"


def _traceback(error: BaseException) -> str:
    """Return the traceback from the job's own code on."""
    trace = here = error.__traceback__
    while here is not None:
        if here.tb_frame.f_code.co_filename == __file__ and here.tb_next is not None:
            trace = here.tb_next  # asyncio's own frames stand between ours
        here = here.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, trace))
    except Exception:
        text = f"{type(error).__name__}: (its traceback cannot be written)"
    return shorten(text)
