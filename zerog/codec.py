"""JSON in and out.

What ZeroG writes, and its own stored documents, go through ujson.  What strangers send is checked byte by byte
first (``parse``): ujson alone accepts ``NaN``, ``-``, ``01``, duplicate members and lone surrogates.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import ujson

from zerog.exceptions import (
    ArrayExpected,
    BadRequest,
    CorruptDocument,
    DuplicateKey,
    EmptyBody,
    InvalidJSON,
    InvalidNumber,
    InvalidUnicode,
    InvalidUTF8,
    NumberOutOfRange,
    ObjectExpected,
    TooDeep,
)

MAX_DEPTH = 100

# A string, also one that never ends (so that the search stays linear), or a bracket.
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def dumps(value: Any) -> bytes:
    """Write a value of ours as compact UTF-8 JSON; NaN and what is no JSON raise."""
    text: str = ujson.dumps(value, ensure_ascii=False, escape_forward_slashes=False, allow_nan=False)
    return text.encode()


def loads(body: bytes) -> Any:
    """Read a stored document of ours; ``CorruptDocument`` when it is none."""
    try:
        return ujson.loads(body)
    except ValueError as error:
        raise CorruptDocument(f"not JSON: {error}") from error


def plain(value: Any, most: int, what: str) -> Any:
    """Return a value of an application as JSON gives it back; ``ValueError`` for what is no JSON, or has more than
    ``most`` bytes of it: then ``what`` says of what."""
    text = json.dumps(value, allow_nan=False)
    if len(text) > most:
        raise ValueError(f"{what} may have {most} bytes of JSON, not {len(text)}")
    return json.loads(text)


def canonical(value: Any) -> bytes:
    """Write a value with sorted members: equal content gives equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def parse(body: bytes) -> dict[str, Any]:
    """Read the JSON object that a stranger sent.

    Raises the one fitting subclass of ``BadRequest``: the body is UTF-8 without a byte order mark, holds one JSON
    object, no member twice, no NaN, no number that a double or an integer of 4,300 digits cannot hold, no half of a
    surrogate pair, and at most ``MAX_DEPTH`` arrays and objects open at once.
    """
    value = _parse(body)
    if not isinstance(value, dict):
        raise ObjectExpected()
    return value


def parse_array(body: bytes) -> list[Any]:
    """Read the JSON array that a stranger sent, as ``parse`` reads an object."""
    value = _parse(body)
    if not isinstance(value, list):
        raise ArrayExpected()
    return value


def parse_value(body: bytes) -> Any:
    """Read any JSON value that a stranger sent, as ``parse`` reads an object."""
    return _parse(body)


def _parse(body: bytes) -> Any:
    text = _decode(body)
    _check_depth(text)
    value = _parse_text(text)
    if _SURROGATE.search(text):
        _check_surrogates(value)
    return value


def _decode(body: bytes) -> str:
    if not body.strip():
        raise EmptyBody()
    if body.startswith(b"\xef\xbb\xbf"):
        raise InvalidUTF8("the body starts with a byte order mark")
    if b"\x00" in body[:4]:
        raise InvalidUTF8("the body is UTF-16 or UTF-32")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidUTF8(f"the body is not UTF-8 at byte {error.start}") from error


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for token in _TOKENS.finditer(text):
        match token.group():
            case "[" | "{":
                depth += 1
                if depth > MAX_DEPTH:
                    raise TooDeep()
            case "]" | "}":
                depth -= 1


def _parse_text(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _invalid_json(error) from error
    except BadRequest:
        raise
    except ValueError as error:  # an integer with more digits than Python converts
        raise NumberOutOfRange("an integer in the body has too many digits") from error


def _invalid_json(error: json.JSONDecodeError) -> InvalidJSON:
    detail = f"{error.msg} at line {error.lineno}, column {error.colno}"
    return InvalidJSON(detail, line=error.lineno, column=error.colno)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise DuplicateKey(f"the member {printable(name, 100)!r} stands twice")
            seen.add(name)
    return found


def _refuse_constant(name: str) -> Any:
    raise InvalidNumber(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise NumberOutOfRange(f"{text[:40]} is too large for a number")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite_float)


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidUnicode() from error


def printable(text: str, limit: int = 1000) -> str:
    """Return text that is safe in a log line or on a terminal: control characters escaped, cut at ``limit``."""
    if len(text) <= limit and text.isprintable():
        return text
    safe = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text[:limit]
    )
    return safe.encode("utf-8", "backslashreplace").decode() + ("…" if len(text) > limit else "")
