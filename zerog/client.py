"""Client: ZeroG over HTTP, on the standard library alone.

::

    client = Client("http://127.0.0.1:8888")
    job = client.submit("sleep", {"seconds": 2})
    for view in client.follow(job["uuid"]):
        print(view["completeness"])
    client.data(job["uuid"])

Views are the JSON of the server as dictionaries.  Errors of the server are raised as the class of
``zerog.exceptions`` whose ``code`` it sent, with ``status``, ``code`` and ``errors``.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import uuid as uuids
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode, urlsplit

from zerog.exceptions import BadSetting, InternalError, ServerUnreachable, ZerogError, tree

_TIMEOUT = 75.0
_BLOCK = 256 * 1024
_TERMINAL = ("succeeded", "failed", "cancelled")

#: How often a request that found no server is sent again; submits carry a key, so that they happen once.
_TRIES = 2


class Client:
    """Talks to one server.  ``url`` defaults to ``ZEROG_SERVER``, else to this machine's port 8888.

    ``token`` defaults to ``ZEROG_TOKEN``; ``ca`` is a PEM file with the certificates that are trusted instead of the
    system's.
    """

    def __init__(self, url: str | None = None, token: str | None = None, ca: str | None = None) -> None:
        self.url = (url or os.environ.get("ZEROG_SERVER") or "http://127.0.0.1:8888").rstrip("/")
        self._token = token or os.environ.get("ZEROG_TOKEN")
        self._parts = urlsplit(self.url)
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
        headers = {"Idempotency-Key": key or str(uuids.uuid4())}
        options = {
            "delay": None if delay is None else f"{delay:.3f}",
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

    def retry(self, uuid: str, parameters: Mapping[str, Any] | None = None, key: str | None = None) -> dict[str, Any]:
        """Try a failed or cancelled job again, as a new one; returns the new job's progress view."""
        headers = {"Idempotency-Key": key or str(uuids.uuid4())}
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
            headers = {"Prefer": "wait=30"} if tag is not None else {}
            if tag is not None:
                headers["If-None-Match"] = tag
            status, answer_headers, body = self._request("GET", f"{_job(uuid)}/progress", None, headers)
            tag = answer_headers.get("ETag")
            if status == 304:
                continue
            view = json.loads(body)
            yield view
            if view["state"] in _TERMINAL:
                return

    def data(self, uuid: str) -> bytes:
        """Return the data of a job, all in memory; use ``download`` for large ones."""
        return self._request("GET", f"{_job(uuid)}/data")[2]

    def download(self, uuid: str, target: BinaryIO) -> int:
        """Write the data of a job to a binary file and return how many bytes; memory stays bounded."""
        connection, response = self._send("GET", f"{_job(uuid)}/data", None, {})
        try:
            if response.status >= 400:
                raise _error(response.status, response.read())
            done = 0
            while block := response.read(_BLOCK):
                target.write(block)
                done += len(block)
            return done
        finally:
            connection.close()

    # Collections

    def jobs(self, job_type: str | None = None, state: str | None = None, limit: int = 50) -> Iterator[dict[str, Any]]:
        """Yield up to ``limit`` jobs, newest first."""
        query = {"type": job_type, "state": state, "limit": min(1000, limit)}
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

    def _json(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._request(method, path, body, headers)[2])
        return answer

    def _request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection, response = self._send(method, path, body, headers or {})
        try:
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServerUnreachable(f"{self.url} broke off its answer: {error}") from error
        finally:
            connection.close()
        if response.status >= 400:
            raise _error(response.status, content)
        return response.status, response.headers, content

    def _send(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        for left in reversed(range(_TRIES)):
            connection = self._connection()
            try:
                connection.request(method, self._parts.path + path, body, self._headers(body, headers))
                return connection, connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if not left:
                    raise ServerUnreachable(f"no ZeroG server answers at {self.url}: {error}") from error
        raise AssertionError("not reached")

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


def _job(uuid: str) -> str:
    return f"/jobs/{quote(uuid, safe='')}"


def _type(job_type: str) -> str:
    return f"/types/{quote(job_type, safe='')}"


def _error(status: int, content: bytes) -> ZerogError:
    """Return the error that a problem document describes."""
    try:
        problem = json.loads(content)
        code, detail = problem["code"], problem["detail"]
    except (ValueError, KeyError, TypeError):
        code, detail, problem = InternalError.code, f"the server answered {status}", {}
    kind = next((error for error in tree() if error.code == code), ZerogError)
    error = ZerogError.__new__(kind)
    ZerogError.__init__(error, detail)
    error.status, error.code = status, code
    error.errors = problem.get("errors") or []
    return error
