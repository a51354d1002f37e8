"""Needs: what a job asks of an agent beside a slot; Limits: what an agent has of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from zerog import codec

#: What a label may be.
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/=-]{0,99}", re.ASCII)

#: How many labels an agent or a job may have.
MAX_LABELS = 50


def is_ram(value: Any) -> bool:
    """Return whether a value is a number of bytes."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def is_cpus(value: Any) -> bool:
    """Return whether a value is a number of cores, exact to a thousandth."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 100_000:
        return False
    return round(value, 3) == value


def are_labels(value: Any) -> bool:
    """Return whether a value is a list of labels."""
    if not isinstance(value, (tuple, list)) or len(value) > MAX_LABELS:
        return False
    return all(isinstance(one, str) and LABEL.fullmatch(one) for one in value)


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of memory, cores, and labels that an agent must have; by default nothing."""

    ram: int = 0
    cpus: float = 0.0
    labels: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.ram or self.cpus or self.labels)

    def with_limits(self, limits: Mapping[str, Any]) -> Needs:
        """Return the needs with some of them changed."""
        changed = {**self.members(), **limits}
        return Needs.of(changed["ram"], changed["cpus"], changed["labels"])

    def digest(self) -> str:
        """Return eight hexadecimal digits that are the same for the same needs."""
        return hashlib.blake2b(codec.dumps(self.members()), digest_size=4).hexdigest()

    def members(self) -> dict[str, Any]:
        """Return the needs as JSON."""
        return {"ram": self.ram, "cpus": self.cpus, "labels": list(self.labels)}

    @classmethod
    def of(cls, ram: int = 0, cpus: float = 0.0, labels: Iterable[str] = ()) -> Needs:
        """Return needs in their one spelling: equal needs are written alike; ``ValueError`` for what cannot be."""
        labels = tuple(labels)
        if not (is_ram(ram) and is_cpus(cpus) and are_labels(labels)):
            raise ValueError(f"no needs: {ram!r}, {cpus!r}, {labels!r}")
        return cls(ram, float(cpus), tuple(sorted(set(labels))))

    @classmethod
    def read(cls, members: Mapping[str, Any]) -> Needs:
        """Read what ``members`` gave."""
        if members == _NONE:
            return NOTHING
        return cls.of(int(members["ram"]), float(members["cpus"]), members["labels"])


#: What a job needs by default, and how that is written.
NOTHING = Needs()
_NONE = NOTHING.members()


@dataclass(frozen=True, slots=True)
class Limits:
    """How many bytes and cores there are; None says nothing."""

    ram: int | None = None
    cpus: float | None = None

    def members(self) -> dict[str, Any]:
        """Return the limits as JSON."""
        return {"ram": self.ram, "cpus": self.cpus}

    @classmethod
    def read(cls, members: Mapping[str, Any] | None) -> Limits:
        """Read what ``members`` gave."""
        return cls() if members is None else cls(members.get("ram"), members.get("cpus"))

    def least(self, *others: Limits) -> Limits:
        """Return the smallest of each."""
        all_of_them = (self, *others)
        rams = [one.ram for one in all_of_them if one.ram is not None]
        cpus = [one.cpus for one in all_of_them if one.cpus is not None]
        return Limits(min(rams, default=None), min(cpus, default=None))

    def less(self, held: Iterable[Needs]) -> Limits:
        """Return what is left when some needs are served."""
        ram, cpus = self.ram, self.cpus
        for one in held:
            ram = None if ram is None else ram - one.ram
            # To a thousandth: cores are written with decimals, whose sums are never quite right.
            cpus = None if cpus is None else round(cpus - one.cpus, 3)
        return Limits(ram, cpus)

    def fit(self, needs: Needs) -> bool:
        """Return whether there is enough; of what nothing is said there is none."""
        enough_ram = not needs.ram or needs.ram <= (self.ram or 0)
        return enough_ram and (not needs.cpus or needs.cpus <= (self.cpus or 0.0))


#: No limits at all: nothing is said of anything.
UNSAID = Limits()
