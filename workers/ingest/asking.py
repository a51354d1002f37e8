"""Asking a service over HTTP: a few times, and for so long; what comes late or is not whole is no answer."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

#: Seconds that a service may be silent, and of its whole answer; how often it is asked.
_TIMEOUT, _LONGEST, TRIES = 10.0, 30.0, 3
#: Bytes of an answer that are read in one go, and of all of it.
_PIECE, _ANSWER = 1024 * 1024, 16 * 1024 * 1024


class ServiceError(Exception):
    """A service did not do what was asked of it, in three tries."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Takes a redirect for what it is: no answer to what was asked."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none."""
        return


#: Asks the very service that the settings name, by no other way.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)


def shown(url: str) -> str:
    """Return a URL without what may be secret in it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def asked(
    method: str,
    url: str,
    body: Callable[[], Iterator[bytes]] | None = None,
    size: int = 0,
    headers: Mapping[str, str] | None = None,
    refusals: bool = False,
    missing: bool = False,
) -> tuple[int, bytes]:
    """Ask a service, three times at most, and return its status and its answer; ``ServiceError`` after that.

    With ``refusals`` a status of 4xx is an answer too, with ``missing`` 404 and 410 are.
    """
    why = ""
    for _ in range(TRIES):
        request = urllib.request.Request(url, method=method, headers=dict(headers or {}))
        if body is not None:
            request.data = body()
            request.add_header("Content-Length", str(size))
        try:
            status, content = _answer(request)
        except (OSError, http.client.HTTPException) as error:
            why = str(error) or type(error).__name__
            continue
        if status < 300 or (refusals and status < 500) or (missing and status in (404, 410)):
            return status, content
        why = f"it answered {status}: {content[:200].decode('utf-8', 'replace')}"
    raise ServiceError(f"{method} {shown(url)}: {why}")


def _answer(request: urllib.request.Request) -> tuple[int, bytes]:
    """Return the status of an answer, whichever it is, and its body, which must come in time and be no larger."""
    try:
        answer = _OPENER.open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        answer = error
    latest = time.monotonic() + _LONGEST
    content = bytearray()
    with answer:
        while piece := answer.read1(_PIECE):
            content += piece
            if len(content) > _ANSWER:
                raise OSError(f"its answer is larger than {_ANSWER} bytes")
            if time.monotonic() > latest:
                raise TimeoutError(f"its answer took more than {_LONGEST:g} seconds")
        if answer.length:
            raise http.client.IncompleteRead(bytes(content), answer.length)
        return answer.status, bytes(content)
