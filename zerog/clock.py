"""The only reader of time.

Times in records are seconds since 1970 as floats; on the wire they are ISO 8601 in UTC with milliseconds and ``Z``.
"""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from functools import lru_cache


class Clock:
    """The system's two clocks.  Safety never depends on the first; leases are judged by the second."""

    def now(self) -> float:
        """Return the wall clock in seconds since 1970."""
        return time.time()

    def monotonic(self) -> float:
        """Return a clock of this machine that never jumps, in seconds."""
        return time.monotonic()


def to_iso(moment: float) -> str:
    """Write a moment as ``2026-01-31T12:00:00.000Z``."""
    second = math.floor(moment)
    # By way of whole microseconds, so that what was read from a text is written as that text again.
    millisecond = round((moment - second) * 1e6) // 1000
    if millisecond == 1000:
        second, millisecond = second + 1, 0
    return f"{_to_second(second)}.{millisecond:03d}Z"


@lru_cache(maxsize=256)  # the moments of a record are mostly of the same few seconds
def _to_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).isoformat(timespec="seconds")[:-6]


def from_iso(text: str) -> float:
    """Read what ``to_iso`` wrote, or any ISO 8601 time with a zone; ``ValueError`` otherwise."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"no zone in {text!r}")
    return moment.timestamp()
