"""Content negotiation by RFC 9110: which of the offered media types an Accept header wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class _Range:
    kind: str
    subtype: str
    quality: float
    position: int

    @property
    def specificity(self) -> int:
        return (self.kind != "*") + (self.subtype != "*")

    def covers(self, offer: str) -> bool:
        kind, _, subtype = offer.split(";")[0].strip().lower().partition("/")
        return self.kind in ("*", kind) and self.subtype in ("*", subtype)


@lru_cache(maxsize=256)
def choose(accept: str, offers: tuple[str, ...]) -> str | None:
    """Return the best of ``offers`` for an Accept header, or ``None`` when none is acceptable.

    An empty header accepts everything.  The most specific range decides an offer's quality; between equal qualities
    the order of the header decides, then the order of the offers.
    """
    ranges = _parse(accept)
    if not ranges:
        return offers[0]
    best: tuple[float, float, int] | None = None
    chosen: str | None = None
    for place, offer in enumerate(offers):
        fitting = [one for one in ranges if one.covers(offer)]
        if not fitting:
            continue
        decisive = max(fitting, key=lambda one: (one.specificity, -one.position))
        if decisive.quality <= 0:
            continue
        rank = (decisive.quality, -float(decisive.position), -place)
        if best is None or rank > best:
            best, chosen = rank, offer
    return chosen


def _parse(accept: str) -> Sequence[_Range]:
    ranges = []
    for position, part in enumerate(accept.split(",")[:50]):
        media, *parameters = (piece.strip() for piece in part.split(";"))
        kind, slash, subtype = media.lower().partition("/")
        if not slash or not kind or not subtype or (kind == "*" and subtype != "*"):
            continue
        ranges.append(_Range(kind, subtype, _quality(parameters), position))
    return ranges


def _quality(parameters: Sequence[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            try:
                return min(1.0, max(0.0, float(value)))
            except ValueError:
                return 0.0
    return 1.0


def matches(header: str, tag: str) -> bool:
    """Return whether an If-None-Match header names this tag, by the weak comparison."""
    return header.strip() == "*" or tag in {part.strip().removeprefix("W/") for part in header.split(",")}
