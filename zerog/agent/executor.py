"""One job's run inside a child: build it, call it, and say what the attempt came to.

The answer is the message that the agent reads as an outcome: ``{"t": "outcome", "kind": …}``.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import threading
import time
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from zerog import failpoints
from zerog.agent.pipe import BrokenPipe, ChildPipe
from zerog.exceptions import Fail, InvalidParameters, Retry, UnknownType
from zerog.job import Context, Job
from zerog.outcome import Requeued, Succeeded
from zerog.registry import Registry

#: Characters of one message of an event or a traceback; what is longer is cut and marked.
MAX_MESSAGE = 16 * 1024
#: Bytes of JSON that travel inside the outcome; more goes as chunks of an output.
INLINE = 8 * 1024
#: Bytes of ``state`` that a Requeue may keep.
MAX_STATE = 64 * 1024

#: Name of the thread that sends the last progress before a long silence.
FLUSHER = "zerog-flusher"

_CHUNK = 256 * 1024
_FLUSH_SECONDS = 0.1
_KEPT_FIRST = 2000
_KEPT_LAST = 800
_EVENTS_A_FRAME = 100


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
        self._cancelled = False
        self._session = 0

    def session(self) -> Session:
        """Begin the next job: forget the last one, and everything that its threads may still say."""
        with self._lock:
            self._session += 1
            self._progress, self._events, self._last = (None, None), [], {}
            self._dropped = {"events": 0, "bytes": 0}
            self._cancelled = False
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

    def cancelled(self, session: int) -> bool:
        """Return whether a cancel has arrived."""
        if session != self._session:
            return False
        if not self._cancelled:
            try:
                message = self._pipe.poll()
            except (BrokenPipe, OSError):
                return False  # the agent is gone, and this process with it in a moment
            self._cancelled = isinstance(message, dict) and message.get("t") == "cancel"
        return self._cancelled

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
        return self._mine and self._reporter.cancelled(self._number)

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
        context = Context(session, message["uuid"], message["attempt"], message.get("state"))
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
        """Await an asynchronous job, throwing ``CancelledError`` into it when a cancel arrives."""
        import asyncio

        task = asyncio.ensure_future(value)
        loop = asyncio.get_running_loop()

        def heard() -> None:
            if context.cancelled:
                loop.remove_reader(self.pipe.fileno())
                task.cancel()

        loop.add_reader(self.pipe.fileno(), heard)
        try:
            return await task
        finally:
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
            text = to_json(value.state)
        except (TypeError, ValueError, RecursionError) as error:
            return _failed(f"the state of a Requeue is not JSON: {_text(error)}", reason="result_not_json", final=True)
        if len(text) > MAX_STATE:
            return _failed(f"the state of a Requeue has more than {MAX_STATE} bytes", "result_too_large", final=True)
        return {"t": "outcome", "kind": "requeued", "delay": value.delay, "state": json.loads(text)}


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


def to_json(value: Any) -> bytes:
    """Write what a job returned; raises ``TypeError`` or ``ValueError`` for what is no JSON, NaN and circles too."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(the exception cannot be written as text)"


def _traceback(error: BaseException) -> str:
    """Return the traceback from the job's own code on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, trace))
    except Exception:
        text = f"{type(error).__name__}: (its traceback cannot be written)"
    return shorten(text)
