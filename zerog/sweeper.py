"""SweeperLease: which one of all servers and agents sweeps.

A document that its holder changes again and again.  It is for economy and not for safety: two who sweep at once do no
harm (R3, R4), so a clock that is wrong or a process that slept may err here.
"""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass, field

from zerog import codec
from zerog.clock import Clock, to_iso
from zerog.datastore.base import Datastore
from zerog.exceptions import AlreadyExists, Conflict, CorruptDocument, NotFound, StoreAmbiguous
from zerog.fleet import Presence
from zerog.record import SCHEMA

_KEY = "sweeper"


@dataclass(frozen=True, slots=True)
class Candidate:
    """Who stands for the lease, and the file that it holds locked while it lives, if it has one."""

    name: str
    presence: Presence | None = None


def someone() -> Candidate:
    """Return a candidate whose end nobody can see."""
    return Candidate(f"process-{secrets.token_hex(8)}")


@dataclass(slots=True)
class SweeperLease:
    """One candidate's view of the lease.  ``patience`` is the seconds for which a holder may be silent.

    Call ``hold`` several times within ``patience``.
    """

    store: Datastore
    clock: Clock
    candidate: Candidate
    patience: float
    _seen: tuple[str, int] = ("", -1)
    _since: float = 0.0
    held: bool = field(default=False, init=False)

    def hold(self) -> bool:
        """Renew the lease, or take it if nobody has it any more; return whether it is ours now."""
        try:
            self.held = self._hold()
        except (Conflict, AlreadyExists, StoreAmbiguous):
            # Somebody else was faster, or it is unknown: the next call will see.
            self.held = False
        return self.held

    def give_up(self) -> None:
        """Let somebody else have it at once."""
        if not self.held:
            return
        self.held = False
        try:
            document = self.store.get(_KEY)
            if codec.loads(document.body)["holder"] == self.candidate.name:
                self.store.replace(_KEY, self._document("", 0, None), document.cas)
        except (NotFound, Conflict):
            return  # somebody has taken it

    def _hold(self) -> bool:
        try:
            document = self.store.get(_KEY)
        except NotFound:
            self.store.insert(_KEY, self._document(self.candidate.name, 0, self.candidate.presence))
            return True
        try:
            members = codec.loads(document.body)
            holder, sequence = str(members["holder"]), int(members["sequence"])
            presence = Presence(**members["presence"]) if members["presence"] else None
            schema = int(members["schema"])
        except (CorruptDocument, KeyError, TypeError, ValueError):
            holder, sequence, presence, schema = "", 0, None, 0
        if holder != self.candidate.name and not self._free(holder, sequence, presence, schema):
            return False
        self.store.replace(
            _KEY, self._document(self.candidate.name, sequence + 1, self.candidate.presence), document.cas
        )
        return True

    def _free(self, holder: str, sequence: int, presence: Presence | None, schema: int) -> bool:
        """Return whether the lease of another is free to be taken."""
        # Who cannot read the newest records must not be the only one that looks at them.
        if not holder or schema < SCHEMA or (presence is not None and presence.ended()):
            return True
        now = self.clock.monotonic()
        if self._seen != (holder, sequence):
            self._seen, self._since = (holder, sequence), now
        return now - self._since > self.patience

    def _document(self, holder: str, sequence: int, presence: Presence | None) -> bytes:
        members = {
            "holder": holder,
            "sequence": sequence,
            "presence": dataclasses.asdict(presence) if presence is not None else None,
            "at": to_iso(self.clock.now()),
            "schema": SCHEMA,
        }
        return codec.dumps(members)
