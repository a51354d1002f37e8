"""Api: every operation of a server as a method that takes and returns JSON, on the standard library alone.

Views are the JSON of the server as dictionaries.  Errors of the server are raised as the class of
``zerog.exceptions`` whose ``code`` it sent, with ``status``, ``code`` and ``errors``.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import ssl
import time
import uuid as uuids
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode, urlsplit

from zerog.exceptions import (
    BadSetting,
    InternalError,
    InvalidParameter,
    NotFinished,
    NotFound,
    ServerUnreachable,
    ZerogError,
    tree,
)

_TIMEOUT = 75.0
#: Seconds for which the server is asked to wait for a change.
_WAIT = 30
_BLOCK = 256 * 1024
TERMINAL = ("succeeded", "failed", "cancelled")

#: Statuses after which the same request may well be answered soon.
_SOON = (429, 502, 503, 504)
#: Seconds between two tries: the first pause, and the longest.
_PAUSE, _LONGEST_PAUSE = 0.1, 5.0


#: What can stand in a header as it is.
_HEADER = re.compile(r"[\x21-\x7e]{0,255}", re.ASCII)


class Api:
    """Talks to one server.  ``url`` defaults to ``ZEROG_SERVER``, else to this machine's port 8888.

    ``token`` defaults to ``ZEROG_TOKEN``; ``ca`` is a PEM file with the certificates that are trusted instead of the
    system's.  What finds no server, or is answered with 429 or 502 to 504, is sent again for up to ``patience``
    seconds: everything here may be sent twice, since submits carry a key.
    """

    def __init__(
        self, url: str | None = None, token: str | None = None, ca: str | None = None, patience: float = 60.0
    ) -> None:
        self.patience = patience
        self.url = (url or os.environ.get("ZEROG_SERVER") or "http://127.0.0.1:8888").rstrip("/")
        self._token = (token or os.environ.get("ZEROG_TOKEN") or "").strip()
        if not _HEADER.fullmatch(self._token):
            raise BadSetting("the token has characters that no token has")  # and it is not shown
        self._parts = urlsplit(self.url)
        if self._parts.scheme not in ("http", "https") or not self._parts.hostname:
            raise BadSetting(f"the server is {self.url!r}; it must be a URL that starts with http:// or https://")
        self._tls: ssl.SSLContext | None = None
        if self._parts.scheme == "https":
            try:
                self._tls = ssl.create_default_context(cafile=ca or os.environ.get("ZEROG_CA"))
            except OSError as error:
                raise BadSetting(f"the certificates in {ca or os.environ.get('ZEROG_CA')}: {error}") from error

    # Jobs

    def submit(
        self,
        job_type: str,
        parameters: Mapping[str, Any],
        key: str | None = None,
        *,
        delay: float | None = None,
        not_before: str | None = None,
        priority: int | None = None,
        parents: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Submit a job and return its progress view; the same ``key`` submits it once.

        ``delay`` is in seconds, ``not_before`` a time as in RFC 3339; a lower ``priority`` is more urgent; ``parents``
        are the UUIDs of jobs that must have succeeded before.
        """
        headers = {"Idempotency-Key": _key(key)}
        options = {
            "delay": None if delay is None else _decimal(delay),
            "notBefore": not_before,
            "priority": priority,
        }
        pairs = [(name, value) for name, value in options.items() if value is not None]
        query = urlencode([*pairs, *(("parent", parent) for parent in parents)])
        path = f"/run/{quote(job_type, safe='')}" + (f"?{query}" if query else "")
        return self._json("POST", path, json.dumps(parameters).encode(), headers)

    def progress(self, uuid: str) -> dict[str, Any]:
        """Return how far a job is."""
        return self._json("GET", f"{_job(uuid)}/progress")

    def job(self, uuid: str) -> dict[str, Any]:
        """Return the whole record of a job."""
        return self._json("GET", _job(uuid))

    def info(self, uuid: str) -> dict[str, Any]:
        """Return progress and the newest events, warnings and errors."""
        return self._json("GET", f"{_job(uuid)}/info")

    def cancel(self, uuid: str) -> dict[str, Any]:
        """Cancel a job and return its progress view."""
        return self._json("POST", f"{_job(uuid)}/cancel")

    def batch(self, job_type: str, items: Sequence[Mapping[str, Any]], key: str | None = None) -> list[dict[str, Any]]:
        """Submit many jobs, which may name each other as parents; for each its progress view, or a problem."""
        headers = {"Idempotency-Key": _key(key)}
        path = f"/run/{quote(job_type, safe='')}:batch"
        _, _, content = self._request("POST", path, json.dumps(list(items)).encode(), headers, expected=(422,))
        answer = json.loads(content)
        if "items" not in answer:
            raise _error(422, content)
        verdicts: list[dict[str, Any]] = answer["items"]
        return verdicts

    def retry(self, uuid: str, parameters: Mapping[str, Any] | None = None, key: str | None = None) -> dict[str, Any]:
        """Try a failed or cancelled job again, as a new one; returns the new job's progress view."""
        headers = {"Idempotency-Key": _key(key)}
        body = None if parameters is None else json.dumps(parameters).encode()
        return self._json("POST", f"{_job(uuid)}/retry", body, headers)

    def retry_many(self, job_type: str, state: str = "failed", limit: int = 100) -> list[dict[str, Any]]:
        """Try the newest jobs of a type that failed, or were cancelled, again, each once; a verdict for each."""
        body = json.dumps({"type": job_type, "state": state, "limit": limit}).encode()
        items: list[dict[str, Any]] = self._json("POST", "/jobs:retry", body)["items"]
        return items

    def prune(self, older_than: float, job_type: str | None = None) -> int:
        """Remove the jobs that ended more than ``older_than`` seconds ago, of one type or of all; returns how many."""
        removed: int = 0
        after = 0
        while True:
            body = json.dumps({"olderThan": older_than, "type": job_type, "after": after}).encode()
            answer = self._json("POST", "/jobs:prune", body)
            removed += answer["pruned"]
            if answer["next"] is None:
                return removed
            after = answer["next"]

    def explain(self, uuid: str) -> dict[str, Any]:
        """Return why a job is not done."""
        return self._json("GET", f"{_job(uuid)}/explain")

    def pause(self, job_type: str, message: str | None = None) -> dict[str, Any]:
        """Hold back the queued jobs of a type; returns the type."""
        return self._json("POST", f"{_type(job_type)}/pause", json.dumps({"message": message}).encode())

    def resume(self, job_type: str) -> dict[str, Any]:
        """Let the jobs of a type run again; returns the type."""
        return self._json("POST", f"{_type(job_type)}/resume")

    def follow(self, uuid: str) -> Iterator[dict[str, Any]]:
        """Yield the progress view now and at each change, until the job has ended."""
        tag: str | None = None
        while True:
            view, tag = self.progress_after(uuid, tag)
            if view is not None:
                yield view
                if view["state"] in TERMINAL:
                    return

    def progress_after(
        self, uuid: str, tag: str | None, seconds: float | None = None
    ) -> tuple[dict[str, Any] | None, str | None]:
        """Return the progress view and its tag; with the tag of an earlier one it waits until there is another.

        The view is None when nothing has changed for half a minute, or for ``seconds``.
        """
        headers = {}
        if tag is not None:
            wait = _WAIT if seconds is None else max(1, min(_WAIT, math.ceil(seconds)))
            headers = {"Prefer": f"wait={wait}", "If-None-Match": tag}
        status, answered, body = self._request("GET", f"{_job(uuid)}/progress", None, headers)
        return None if status == 304 else json.loads(body), answered.get("ETag")

    def data(self, uuid: str) -> bytes:
        """Return the data of a job, all in memory; use ``download`` for large ones.

        ``NotFinished`` while there are none yet, ``JobFailed`` or ``JobCancelled`` if there will be none.
        """
        return self.data_and_type(uuid)[0]

    def data_and_type(self, uuid: str) -> tuple[bytes, str | None]:
        """Return what ``data`` does, and its media type; None if the job has none."""
        status, headers, content = self._request("GET", f"{_job(uuid)}/data")
        if status == 202:
            raise NotFinished(f"job {uuid} is {json.loads(content)['state']}")
        return content, headers.get("Content-Type") if status != 204 else None

    def download(self, uuid: str, target: BinaryIO) -> int:
        """Write the data of a job to a binary file and return how many bytes; memory stays bounded.

        What was broken off goes on where it was.
        """
        done, tag = 0, ""
        end = time.monotonic() + self.patience
        while True:
            headers = {"Range": f"bytes={done}-", "If-Range": tag} if done else {}
            connection, response = self._send("GET", f"{_job(uuid)}/data", None, headers)
            try:
                if done and response.status != 206:
                    raise ServerUnreachable(f"the data of job {uuid} have changed while they were sent")
                if response.status == 202:
                    raise NotFinished(f"job {uuid} has not finished")
                tag = response.headers.get("ETag") or ""
                while block := response.read(_BLOCK):
                    target.write(block)
                    done += len(block)
                    end = time.monotonic() + self.patience  # what comes shows that it goes on
                if not response.length:  # what of the announced length has not come
                    return done
                raise http.client.IncompleteRead(b"", response.length)
            except (OSError, http.client.HTTPException) as error:
                if not tag or time.monotonic() > end:
                    raise ServerUnreachable(f"{self.url} broke off its answer: {error}") from error
                time.sleep(_PAUSE)
            finally:
                connection.close()

    # Collections

    def jobs(
        self, job_type: str | None = None, state: str | None = None, limit: int | None = 50
    ) -> Iterator[dict[str, Any]]:
        """Yield up to ``limit`` jobs, newest first; None for all."""
        query = {"type": job_type, "state": state, "limit": min(1000, limit or 1000)}
        written = urlencode({name: value for name, value in query.items() if value is not None})
        yield from self._items(f"/jobs?{written}", limit)

    def events(self, uuid: str, level: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield all that a job said, oldest first."""
        query = urlencode({"limit": 1000, **({"level": level} if level else {})})
        yield from self._items(f"{_job(uuid)}/events?{query}", None)

    def types(self) -> list[dict[str, Any]]:
        """Return the job types."""
        return list(self._items("/types", None))

    def type(self, job_type: str) -> dict[str, Any]:
        """Return one job type."""
        return self._json("GET", _type(job_type))

    def agents(self, state: str | None = None, job_type: str | None = None) -> list[dict[str, Any]]:
        """Return the agents, the newest first."""
        query = {"state": state, "jobType": job_type, "limit": 1000}
        written = urlencode({name: value for name, value in query.items() if value is not None})
        return list(self._items(f"/agents?{written}", None))

    def agent(self, id: str) -> dict[str, Any]:
        """Return one agent."""
        return self._json("GET", _agent(id))

    def forget_agent(self, id: str) -> None:
        """Forget an agent; what it runs goes on elsewhere."""
        self._request("DELETE", _agent(id))

    def assignments(self, id: str) -> list[dict[str, Any]]:
        """Return what an agent runs now."""
        return list(self._items(f"{_agent(id)}/assignments", None))

    def command(self, id: str, command: str, key: str | None = None, **members: Any) -> dict[str, Any]:
        """Give an agent a command; the same ``key`` gives it once.  Returns the command."""
        body = json.dumps({"command": command, **members}).encode()
        return self._json("POST", f"{_agent(id)}/commands", body, {"Idempotency-Key": _key(key)})

    def _items(self, href: str | None, limit: int | None) -> Iterator[dict[str, Any]]:
        count = 0
        while href is not None:
            page = self._json("GET", href)
            for item in page["items"]:
                if limit is not None and count == limit:
                    return
                count += 1
                yield item
            href = page["next"]

    # Requests

    def json(self, href: str) -> Any:
        """Return the JSON that is at a reference."""
        _, headers, content = self._request("GET", href)
        if not str(headers.get("Content-Type", "")).startswith("application/json"):
            raise NotFound(f"there is no JSON at {href}")
        return json.loads(content)

    def upload(
        self, path: str, pieces: Callable[[], Iterable[bytes]], size: int, media_type: str, key: str | None = None
    ) -> Any:
        """Send ``size`` bytes, which ``pieces`` gives from the start each time, and return the JSON of the answer.

        The same ``key`` sends them once; what was broken off is sent again from the start.
        """
        headers = {**self._headers(None, {"Idempotency-Key": _key(key)}), "Content-Type": media_type}
        headers["Content-Length"] = str(size)
        patience = _Patience(self.patience)
        while True:
            connection = self._connection()
            try:
                # A server that refuses it answers before it has read everything: what it says is the reason.
                with suppress(BrokenPipeError, ConnectionResetError):
                    connection.request("POST", self._parts.path + path, pieces(), headers)
                response = connection.getresponse()
                content = response.read()
            except (OSError, http.client.HTTPException) as error:
                patience.lost(self.url, error)
                continue
            finally:
                connection.close()
            if response.status < 400:
                return json.loads(content)
            patience.wait(response, _error(response.status, content))

    def _json(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._request(method, path, body, headers)[2])
        return answer

    def _request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        expected: Sequence[int] = (),
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        patience = _Patience(self.patience)
        while True:
            try:
                connection, response = self._send_once(method, path, body, headers or {})
                try:
                    content = response.read()
                finally:
                    connection.close()
            except (OSError, http.client.HTTPException) as error:
                patience.lost(self.url, error)
                continue
            if response.status < 400 or response.status in expected:
                return response.status, response.headers, content
            patience.wait(response, _error(response.status, content))

    def _send(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send a request and return the answer, whose body is still to be read."""
        patience = _Patience(self.patience)
        while True:
            try:
                connection, response = self._send_once(method, path, body, headers)
            except (OSError, http.client.HTTPException) as error:
                patience.lost(self.url, error)
                continue
            if response.status < 400:
                return connection, response
            try:
                content = response.read()
            finally:
                connection.close()
            patience.wait(response, _error(response.status, content))

    def _send_once(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = self._connection()
        try:
            connection.request(method, self._parts.path + path, body, self._headers(body, headers))
            return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def _headers(self, body: bytes | None, headers: Mapping[str, str]) -> dict[str, str]:
        sent = {"Accept": "application/json, */*;q=0.5", **headers}
        if body is not None:
            sent["Content-Type"] = "application/json"
        if self._token:
            sent["Authorization"] = f"Bearer {self._token}"
        return sent

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "127.0.0.1", self._parts.port
        if self._tls is not None:
            return http.client.HTTPSConnection(host, port, timeout=_TIMEOUT, context=self._tls)
        return http.client.HTTPConnection(host, port, timeout=_TIMEOUT)


#: What is wrong with TLS when a connection ended, and not when the two sides do not understand one another.
_CUT_SHORT = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)


class _Patience:
    """How long one request is tried again."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._pause = _PAUSE
        self._first = True

    def lost(self, url: str, error: Exception) -> None:
        """Wait until the request may be tried again after no answer came, or raise ``ServerUnreachable``.

        It is tried once more at once, whatever the patience: a server that closed an idle connection looks like this.
        A certificate that is not trusted is no more so in a minute.
        """
        unreachable = ServerUnreachable(f"no ZeroG server answers at {url}: {error}")
        if isinstance(error, ssl.SSLError) and not isinstance(error, _CUT_SHORT):
            raise unreachable from error
        first, self._first = self._first, False
        if not first:
            self.wait(None, unreachable)

    def wait(self, response: http.client.HTTPResponse | None, error: ZerogError) -> None:
        """Wait until the request may be tried again, or raise the error."""
        if response is not None and response.status not in _SOON:
            raise error
        seconds = max(_asked_for(response), self._pause)
        if time.monotonic() + seconds > self._end:
            raise error
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        time.sleep(seconds)


def _asked_for(response: http.client.HTTPResponse | None) -> float:
    """Return the seconds for which an answer asks to wait."""
    text = response.headers.get("Retry-After", "") if response is not None else ""
    return float(text) if text.isdigit() else 0.0


def _key(key: str | None) -> str:
    """Return a key for a header; one of its own for a request that has none."""
    if key is None:
        return str(uuids.uuid4())
    if not key or not _HEADER.fullmatch(key):
        raise InvalidParameter("key", "it must be 1 to 255 visible ASCII characters")
    return key


def _decimal(delay: float) -> str:
    if isinstance(delay, bool) or not isinstance(delay, (int, float)):
        raise InvalidParameter("delay", "it must be seconds, as a number")
    return f"{delay:.3f}"


def _job(uuid: str) -> str:
    return f"/jobs/{quote(uuid, safe='')}"


def _agent(id: str) -> str:
    return f"/agents/{quote(id, safe='')}"


def _type(job_type: str) -> str:
    return f"/types/{quote(job_type, safe='')}"


def _error(status: int, content: bytes) -> ZerogError:
    """Return the error that the body of an answer describes."""
    try:
        problem = json.loads(content)
        return error_of({"status": status, "code": problem["code"], "detail": problem["detail"], **problem})
    except (ValueError, KeyError, TypeError):
        # What stands before the servers says so, and none of them has: the request may be sent again.
        code = ServerUnreachable.code if status in _SOON else InternalError.code
        return error_of({"status": status, "code": code, "detail": f"the server answered {status}"})


def error_of(problem: Mapping[str, Any]) -> ZerogError:
    """Return the error that a problem document describes."""
    kind = next((error for error in tree() if error.code == problem["code"]), ZerogError)
    error = ZerogError.__new__(kind)
    ZerogError.__init__(error, problem["detail"])
    error.status, error.code = problem["status"], problem["code"]
    error.errors = problem.get("errors") or []
    return error
