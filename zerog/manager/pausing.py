"""Pausing and resuming job types: a document that says who and when, not the queue's own pause, which it forgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from zerog import codec
from zerog.clock import from_iso, to_iso
from zerog.exceptions import CorruptDocument, NotFound
from zerog.manager.needing import Needing

_KEY = "pauses"


@dataclass(frozen=True, slots=True)
class Pause:
    """Who paused a job type, when (seconds since 1970), and why."""

    by: str
    at: float
    message: str | None = None


class Pausing(Needing):
    """The verbs that hold back job types."""

    def pauses(self) -> dict[str, Pause]:
        """Return the paused job types as they are in the store."""
        try:
            return _pauses(self.store.get(_KEY).body)
        except NotFound:
            return {}

    def look_at_pauses(self) -> None:
        """Renew what this process knows of pauses; claims and the sweep go by that."""
        self.paused = frozenset(self.pauses())

    def pause(self, job_type: str, by: str, message: str | None = None) -> Pause:
        """Hold back the queued jobs of a type; running ones go on.

        A pause that is there stays as it is, unless there is another ``message``.
        """
        self.registry.get(job_type)
        mine = Pause(by, self.clock.now(), message)

        def change(pauses: Mapping[str, Pause]) -> dict[str, Pause]:
            there = pauses.get(job_type)
            stays = there is not None and message in (None, there.message)
            return dict(pauses) if stays else {**pauses, job_type: mine}

        return self._change(change)[job_type]

    def resume(self, job_type: str) -> None:
        """Let the jobs of a type run again; nothing happens if it is not paused."""
        self.registry.get(job_type)
        self._change(lambda pauses: {name: one for name, one in pauses.items() if name != job_type})

    def _change(self, change: Callable[[Mapping[str, Pause]], dict[str, Pause]]) -> dict[str, Pause]:
        before: dict[str, Pause] = {}
        after: dict[str, Pause] = {}

        def changed(body: bytes | None) -> bytes | None:
            nonlocal before, after
            before = _pauses(body)
            after = change(before)
            return _document(after) if after != before else None

        self.store.change(_KEY, changed)
        self.paused = frozenset(after)
        if after != before:
            self.tell_agents((one.id for one in self.fleet.living()), "pauses")
        return after


def _pauses(body: bytes | None) -> dict[str, Pause]:
    if body is None:
        return {}
    try:
        types = codec.loads(body)["types"]
        return {name: Pause(one["by"], from_iso(one["at"]), one.get("message")) for name, one in types.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptDocument(f"no document of pauses: {error}") from error


def _document(pauses: Mapping[str, Pause]) -> bytes:
    types: dict[str, Any] = {name: {**asdict(one), "at": to_iso(one.at)} for name, one in pauses.items()}
    return codec.dumps({"types": types, "schema": 1})
