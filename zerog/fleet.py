"""Fleet: the agents that ever spoke, and which of them are certainly gone (R7).

An agent holds the lock of a file of its own in ``run_dir`` for as long as it lives; the kernel lets go of it however
the agent ends.  Its record says which file that is: boot, device, inode, and a random text inside it.  Whoever finds
that very file unlocked, on the same boot, knows that the agent is gone.  A missing or another file proves nothing: two
containers may share a name and a store and not a directory.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zerog import codec
from zerog.clock import Clock, from_iso, to_iso
from zerog.datastore.base import Datastore
from zerog.exceptions import CorruptDocument, NotFound

#: Ending of the files that somebody holds locked.
LOCKED = ".lock"

#: Agents whose presence is remembered.
_REMEMBERED = 10_000

#: Agents that are looked at when somebody asks who lives, and those that are read in one go.
_LOOKED_AT, _PAGE = 1000, 100

#: Seconds for which the file of an agent that is gone is kept: it is the proof.
_KEPT = 86_400.0


@dataclass(frozen=True, slots=True)
class Presence:
    """The file that an agent holds locked while it lives, and how to know it again."""

    path: str
    boot: str
    device: int
    inode: int
    text: str

    def ended(self) -> bool:
        """Return whether whoever held the lock is certainly gone."""
        if self.boot != boot_id():
            return False
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            state = os.fstat(descriptor)
            if (state.st_dev, state.st_ino) != (self.device, self.inode):
                return False
            if os.read(descriptor, 100) != self.text.encode():
                return False
            return is_free(descriptor)
        except OSError:
            return False
        finally:
            os.close(descriptor)


class Lock:
    """A file that this process holds locked until ``close``, or until it ends in whatever way."""

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory.resolve() / f"{name}{LOCKED}"
        making = path.with_suffix(".new")
        text = secrets.token_hex(16)
        self._descriptor = os.open(making, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(self._descriptor, text.encode())
        # It appears under its name only when it is locked: nobody can take it for the file of somebody who is gone.
        making.rename(path)
        state = os.fstat(self._descriptor)
        self.presence = Presence(str(path), boot_id(), state.st_dev, state.st_ino, text)

    def close(self) -> None:
        """Remove the file and let go of it.  May be called twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with suppress(OSError):
                Path(self.presence.path).unlink()
            os.close(descriptor)


def is_free(descriptor: int) -> bool:
    """Return whether nobody holds the lock of an open file."""
    try:
        # Shared, so that two who look at once do not take each other for the holder.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def boot_id() -> str:
    """Return what names this boot of this machine; containers share it with their host."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class AgentRecord:
    """What an agent last said of itself."""

    name: str
    hostname: str
    pid: int
    version: str
    job_types: tuple[str, ...]
    started_at: float
    presence: Presence | None = None
    #: When it spoke last, and the seconds between two times that it does; None before version 0.2.
    heard_at: float | None = None
    heartbeat: float | None = None
    stopped: bool = False
    #: Attempts of which it found out that they were not the current ones any more (R12).
    superseded: int = 0
    #: Whether it takes no further jobs.
    draining: bool = False

    def silent(self, now: float) -> bool:
        """Return whether nothing was heard of it for three heartbeats; clocks of two machines are compared here."""
        return self.heard_at is not None and self.heartbeat is not None and now - self.heard_at > 3 * self.heartbeat

    def document(self) -> bytes:
        """Write the record as the JSON that the store keeps."""
        members = {**dataclasses.asdict(self), "started_at": to_iso(self.started_at), "schema": 1}
        if self.heard_at is not None:
            members["heard_at"] = to_iso(self.heard_at)
        return codec.dumps(members)

    @classmethod
    def read(cls, body: bytes) -> AgentRecord:
        """Read what ``document`` wrote; ``CorruptDocument`` if it is none."""
        members: dict[str, Any] = codec.loads(body)
        try:
            presence, heard_at = members["presence"], members.get("heard_at")
            return cls(
                members["name"],
                members["hostname"],
                members["pid"],
                members["version"],
                tuple(members["job_types"]),
                from_iso(members["started_at"]),
                Presence(**presence) if presence is not None else None,
                from_iso(heard_at) if heard_at is not None else None,
                members.get("heartbeat"),
                bool(members.get("stopped", False)),
                int(members.get("superseded", 0)),
                bool(members.get("draining", False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptDocument(f"no record of an agent: {error}") from error


def heartbeat(lease: float) -> float:
    """Return the seconds between two times that an agent says that it lives: three fit into a lease."""
    return max(1.0, lease / 3)


def remove_old(directory: Path, now: float) -> None:
    """Remove what agents left behind that have been gone for a day: by then their leases have lapsed."""
    for path in directory.glob(f"*{LOCKED}"):
        with suppress(OSError):
            if now - path.stat().st_mtime > _KEPT and is_unlocked(path):
                path.unlink()


def is_unlocked(path: Path) -> bool:
    """Return whether a file is there and nobody holds its lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return is_free(descriptor)
    finally:
        os.close(descriptor)


class Fleet:
    """The agents' records in the store.  Safe to use from many threads."""

    def __init__(self, store: Datastore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        #: Presences never change, so they are read once.
        self._presences: dict[str, Presence] = {}
        self._gone: set[str] = set()

    def register(self, record: AgentRecord) -> None:
        """Write down an agent that starts; its name must never have been used before."""
        # In this order: an entry without a record means nothing, a record without an entry would never be found.
        self._store.append("agents", codec.dumps({"agent": record.name}))
        self._store.insert(_key(record.name), record.document())

    def update(self, record: AgentRecord) -> None:
        """Write what an agent says of itself now; it alone writes its record, and the first time it registers."""
        try:
            self._store.replace(_key(record.name), record.document(), self._store.get(_key(record.name)).cas)
        except NotFound:
            self.register(record)

    def serves(self, job_type: str) -> bool:
        """Return whether a living agent takes jobs of a type.  Of the newest agents, as many as are looked at."""
        return any(job_type in one.job_types and not one.draining for one in self.living())

    def state(self, record: AgentRecord) -> str:
        """Return what an agent does now, as far as that can be known: running, draining, stopped or offline."""
        if record.stopped:
            return "stopped"
        if record.silent(self._clock.now()) or self.gone(record.name):
            return "offline"
        return "draining" if record.draining else "running"

    def living(self) -> Iterator[AgentRecord]:
        """Yield those of the newest agents that live, as far as that can be known."""
        for one in self.newest():
            if self.state(one) in ("running", "draining"):
                yield one

    def newest(self) -> Iterator[AgentRecord]:
        """Yield the records of the newest agents, the newest first; a bounded number."""
        before: int | None = None
        for _ in range(_LOOKED_AT // _PAGE):
            entries = self._store.read("agents", before=before, limit=_PAGE)
            if not entries:
                return
            before = entries[-1].number
            keys = [_key(codec.loads(entry.body)["agent"]) for entry in entries]
            found = self._store.get_many(keys)
            for key in dict.fromkeys(keys):
                with suppress(CorruptDocument, KeyError):
                    yield AgentRecord.read(found[key].body)

    def get(self, name: str) -> AgentRecord | None:
        """Return the record of an agent; None if there is none that can be read."""
        try:
            return AgentRecord.read(self._store.get(_key(name)).body)
        except (NotFound, CorruptDocument):
            return None

    def gone(self, name: str) -> bool:
        """Return whether an agent is certainly gone; False also when nothing is known of it."""
        if name in self._gone:
            return True
        presence = self._presence(name)
        if presence is None or not presence.ended():
            return False
        self._gone.add(name)
        return True

    def _presence(self, name: str) -> Presence | None:
        presence = self._presences.get(name)
        if presence is None:
            record = self.get(name)
            if record is None or record.presence is None:
                return None
            if len(self._presences) >= _REMEMBERED:
                self._presences.clear()
                self._gone.clear()
            presence = self._presences[name] = record.presence
        return presence


def _key(name: str) -> str:
    return f"agent:{name}"
