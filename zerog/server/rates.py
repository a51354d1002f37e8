"""Rates: how many requests each token may still send in this minute.

Every server counts its own at once, and learns of those of the others when the statistics are shared: for the fraction
of a second in between, several servers may let a few more through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from zerog.clock import Clock
from zerog.exceptions import RateLimited
from zerog.statistics import Statistics

_WINDOW = 60


@dataclass(slots=True)
class Rates:
    """``limit`` requests a minute for each token; 0 for no limit."""

    limit: int
    statistics: Statistics
    clock: Clock

    def spend(self, token: str) -> dict[str, str]:
        """Count one request; returns the headers that say what is left, or raises ``RateLimited`` with them."""
        if not self.limit:
            return {}
        now = self.clock.now()
        spent = self.statistics.spend(token, int(now // _WINDOW))
        reset = max(1, math.ceil(_WINDOW - now % _WINDOW))
        headers = {
            "RateLimit-Policy": f'"token";q={self.limit};w={_WINDOW}',
            "RateLimit": f'"token";r={max(0, self.limit - spent)};t={reset}',
        }
        if spent > self.limit:
            error = RateLimited(f"more than {self.limit} requests in a minute; in {reset} s there are some again")
            error.headers.update(headers)
            error.headers["Retry-After"] = str(reset)
            raise error
        return headers
