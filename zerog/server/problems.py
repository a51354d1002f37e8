"""Which problems an operation answers: those of the door, those of what it reads, and its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import iscoroutinefunction

from zerog import exceptions
from zerog.exceptions import ZerogError
from zerog.server.endpoint import Endpoint

#: What every operation can answer: a header or a query that is wrong, the store away, a defect.
_ALWAYS = (
    exceptions.InvalidParameter,
    exceptions.Misdirected,
    exceptions.NotAcceptable,
    exceptions.InternalError,
    exceptions.StoreUnavailable,
)
#: What is answered where tokens are on.
_CLOSED = (exceptions.Unauthenticated, exceptions.Forbidden, exceptions.RateLimited)
#: What comes of what a path names.
_NAMED: dict[str, tuple[type[ZerogError], ...]] = {
    "uuid": (exceptions.UnknownJob, exceptions.CorruptDocument, exceptions.NewerVersion),
    "jobType": (exceptions.UnknownType,),
    "id": (exceptions.UnknownAgent,),
}
#: What methods that change something can answer beside.
_UNSAFE = (exceptions.CrossOrigin, exceptions.BodyTooLarge, exceptions.StoreFull)
#: What is wrong with a body of JSON.
_BODY = (
    exceptions.UnsupportedMediaType,
    exceptions.EmptyBody,
    exceptions.InvalidJSON,
    exceptions.DuplicateKey,
    exceptions.InvalidNumber,
    exceptions.NumberOutOfRange,
    exceptions.TooDeep,
    exceptions.InvalidUTF8,
    exceptions.InvalidUnicode,
    exceptions.InvalidParameters,
)


def problems(endpoint: type[Endpoint], method: str) -> dict[int, list[str]]:
    """Return the codes of the problems that an operation answers, by status."""
    found: dict[int, set[str]] = {}
    for one in _problems(endpoint, method):
        status, code = one if isinstance(one, tuple) else (one.status, one.code)
        found.setdefault(status, set()).add(code)
    return {status: sorted(codes) for status, codes in sorted(found.items())}


def _problems(endpoint: type[Endpoint], method: str) -> Iterator[type[ZerogError] | tuple[int, str]]:
    yield from _ALWAYS
    if not endpoint.public:
        yield from _CLOSED
    for name in re.findall(r"\{(\w+)\}", endpoint.url):
        yield from _NAMED.get(name, (exceptions.UnknownResource,))
    if method != "GET":
        yield from _UNSAFE
    if endpoint.reads_json(method):
        yield from _BODY
        yield exceptions.ArrayExpected if endpoint.many else exceptions.ObjectExpected
    if not iscoroutinefunction(getattr(endpoint, method.lower(), None)):
        yield exceptions.TooBusy
    yield from endpoint.problems.get(method, ())
