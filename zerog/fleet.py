"""Fleet: the agents that ever spoke, and which of them are certainly gone (R7).

An agent has an ``id`` that it keeps, and another ``instance`` at each start, which its leases name.  It holds the lock
of a file of its own in ``run_dir`` for as long as it lives; the kernel lets go of it however the agent ends.  Its
record says which file that is: boot, device, inode, and a random text inside it.  Whoever finds that very file
unlocked, on the same boot, knows that the agent is gone.  A missing or another file proves nothing: two containers may
share a name and a store and not a directory.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from zerog import codec
from zerog.clock import Clock, from_iso, to_iso
from zerog.datastore.base import Datastore
from zerog.exceptions import BadSetting, Conflict, CorruptDocument, NotFound
from zerog.needs import NOTHING, UNSAID, Limits, Needs

#: Ending of the files that somebody holds locked.
LOCKED = ".lock"

#: What an agent's id may be: it becomes the name of a tube and a part of a URL.
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)

#: Words that are no ids, since URLs have them in the place of one.
NO_IDS = ("commands",)

#: States of an agent that speaks; the others have said goodbye.
SPEAKING = ("running", "draining", "drained")
STATES = (*SPEAKING, "retired", "offline")

#: Logs of an agent: the attempts that ended there, those that failed, its own unhandled exceptions.
LOG_JOBS, LOG_FAILURES, LOG_EXCEPTIONS = "agent-jobs", "agent-failures", "agent-exceptions"

#: Entries of such a log that are written as one; how many of these are kept, and after how many the older ones go.
_TOGETHER = 100
_KEPT_ENTRIES, _TRIM_EVERY = 5000, 500

#: Agents, and instances that are gone, that are remembered, and for how many seconds a record is taken for what it is.
_REMEMBERED = 10_000
_FRESH = 1.0

#: Agents that are looked at when somebody asks who lives, and those that are read in one go.
_LOOKED_AT, _PAGE = 5000, 100

#: Seconds for which an entry without a record is watched before it goes.
_WATCHED = 600.0

#: Agents of one host that get a name by themselves.
_NAMES = 10_000

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


@dataclass(frozen=True, slots=True)
class Gone:
    """An agent that is to be forgotten: its entry, and the version of its record that was judged, if it has one."""

    id: str
    number: int
    cas: int | None


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


class Name:
    """An agent's id: a file that it holds locked, so that no other agent of this host has the same.

    ``wanted`` is the id; without one it is ``stem`` with the first number that is free.  ``BadSetting`` if another has
    it.  ``descriptor`` is the open file of a process that executed itself anew.
    """

    def __init__(self, directory: Path, wanted: str | None, stem: str, descriptor: int | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.descriptor = -1
        #: The instance that executed itself anew as this process, if one did.
        self.former: str | None = None
        if descriptor is not None and wanted is not None:
            self.id, self.descriptor = wanted, descriptor
            os.set_inheritable(descriptor, False)
            return
        names = [wanted] if wanted is not None else [f"{stem}-{number}" for number in range(1, _NAMES + 1)]
        for name in names:
            if self._take(directory / f"{name}.name"):
                self.id = name
                return
        raise BadSetting(f"another agent of this host has the name {names[0]!r}")

    def _take(self, path: Path) -> bool:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        self.descriptor = descriptor
        return True

    def close(self) -> None:
        """Let others have the name.  The file stays: removing it would let two have it.  May be called twice."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def stem_of(hostname: str) -> str:
    """Return the beginning of an agent's default name: its host's name, as far as an id can have it."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", hostname).lstrip("._-")[:90] or "agent"


def is_id(text: str) -> bool:
    """Return whether a text can be an agent's id."""
    return bool(ID.fullmatch(text)) and text not in NO_IDS


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
class Assignment:
    """An attempt that an agent answers for: since when, and what it holds of the agent."""

    uuid: str
    attempt: int
    since: float
    needs: Needs = NOTHING

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from all others: the job's UUID and the number of the attempt."""
        return self.uuid, self.attempt

    def members(self) -> dict[str, Any]:
        """Return the assignment as JSON."""
        members: dict[str, Any] = {"uuid": self.uuid, "attempt": self.attempt, "since": to_iso(self.since)}
        return {**members, "needs": self.needs.members()} if self.needs else members

    @classmethod
    def read(cls, members: Mapping[str, Any]) -> Assignment:
        """Read what ``members`` gave."""
        needs = Needs.read(members["needs"]) if "needs" in members else Needs()
        return cls(members["uuid"], members["attempt"], from_iso(members["since"]), needs)


@dataclass(frozen=True, slots=True)
class AgentRecord:
    """What an agent last said of itself, and what became of what it was given.

    ``id`` is its name, which it keeps; ``instance`` is another text at each start, and the one that leases name.
    """

    id: str
    instance: str
    hostname: str
    version: str
    job_types: tuple[str, ...]
    started_at: float
    pid: int | None = None
    labels: tuple[str, ...] = ()
    #: What it has, what it wants to give of that, and what it uses.
    has: Limits = UNSAID
    limits: Limits = UNSAID
    usage: Mapping[str, Any] | None = None
    #: running, draining, drained, retired or offline, as it said.
    state: str = "running"
    presence: Presence | None = None
    #: When it spoke last, and the seconds between two times that it does.
    heard_at: float | None = None
    heartbeat: float | None = None
    #: Attempts of which it found out that they were not the current ones any more (R12).
    superseded: int = 0
    assignments: tuple[Assignment, ...] = ()
    #: Attempts that have ended here, those of them that failed or crashed, and its own unhandled exceptions.
    processed: int = 0
    failures: int = 0
    exceptions: int = 0
    #: Whether it speaks to store and queue itself; otherwise a server does for it.
    direct: bool = True
    #: The instances that it was last, the latest at the end: one of them that still speaks is a twin.
    former: tuple[str, ...] = ()

    @property
    def holder(self) -> str:
        """What the leases of its jobs name: the instance, which nobody else can be; over HTTP its id.

        An agent that speaks HTTP says which of its assignments it still has; whatever it does not, is lost by name.
        """
        return self.instance if self.direct else self.id

    @property
    def speaks(self) -> bool:
        """Whether it has not said goodbye."""
        return self.state in SPEAKING

    def silent(self, now: float) -> bool:
        """Return whether nothing was heard of it for three heartbeats; clocks of two machines are compared here."""
        return self.heard_at is not None and self.heartbeat is not None and now - self.heard_at > 3 * self.heartbeat

    def document(self) -> bytes:
        """Write the record as the JSON that the store keeps."""
        members: dict[str, Any] = {
            "schema": 2,
            "id": self.id,
            "instance": self.instance,
            "hostname": self.hostname,
            "version": self.version,
            "jobTypes": list(self.job_types),
            "startedAt": to_iso(self.started_at),
            "pid": self.pid,
            "labels": list(self.labels),
            "has": self.has.members(),
            "limits": self.limits.members(),
            "usage": self.usage,
            "state": self.state,
            "presence": dataclasses.asdict(self.presence) if self.presence is not None else None,
            "heardAt": to_iso(self.heard_at) if self.heard_at is not None else None,
            "heartbeat": self.heartbeat,
            "assignments": [one.members() for one in self.assignments],
            **{name: getattr(self, name) for name in _COUNTS},
            "direct": self.direct,
            "former": list(self.former),
        }
        return codec.dumps(members)

    @classmethod
    def read(cls, body: bytes) -> AgentRecord:
        """Read what ``document`` wrote, in this version or the one before; ``CorruptDocument`` if it is none."""
        members: dict[str, Any] = codec.loads(body)
        try:
            return _former(members) if "name" in members else _read(members)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptDocument(f"no record of an agent: {error}") from error


_COUNTS = ("superseded", "processed", "failures", "exceptions")


def _read(members: dict[str, Any]) -> AgentRecord:
    presence, heard_at = members["presence"], members["heardAt"]
    return AgentRecord(
        id=members["id"],
        instance=members["instance"],
        hostname=members["hostname"],
        version=members["version"],
        job_types=tuple(members["jobTypes"]),
        started_at=from_iso(members["startedAt"]),
        pid=members["pid"],
        labels=tuple(members["labels"]),
        has=Limits.read(members["has"]),
        limits=Limits.read(members["limits"]),
        usage=members["usage"],
        state=members["state"],
        presence=Presence(**presence) if presence is not None else None,
        heard_at=from_iso(heard_at) if heard_at is not None else None,
        heartbeat=members["heartbeat"],
        assignments=tuple(Assignment.read(one) for one in members["assignments"]),
        direct=members["direct"],
        former=tuple(members.get("former", ())),
        **{name: int(members[name]) for name in _COUNTS},
    )


def _former(members: dict[str, Any]) -> AgentRecord:
    """Read what version 0.1 wrote, where each start of an agent had a name of its own."""
    presence, heard_at = members["presence"], members.get("heard_at")
    state = "draining" if members.get("draining") else "running"
    return AgentRecord(
        id=members["name"],
        instance=members["name"],
        hostname=members["hostname"],
        version=members["version"],
        job_types=tuple(members["job_types"]),
        started_at=from_iso(members["started_at"]),
        pid=members["pid"],
        state="offline" if members.get("stopped") else state,
        presence=Presence(**presence) if presence is not None else None,
        heard_at=from_iso(heard_at) if heard_at is not None else None,
        heartbeat=members.get("heartbeat"),
        superseded=int(members.get("superseded", 0)),
    )


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
        #: Records as they were read a moment ago, with that moment on the monotonic clock.
        self._known: dict[str, tuple[AgentRecord | None, float]] = {}
        #: Records as they were written last, by their documents: one that says the same need not be read again.
        self._written: dict[str, tuple[bytes, AgentRecord]] = {}
        #: Instances whose end is certain: nothing brings them back.
        self._gone: set[str] = set()
        #: What ``old`` has come past: each agent's entry, and since when, monotonic, an entry has had no record.
        self._entry_of: dict[str, int] = {}
        self._without: dict[int, float] = {}

    # Records

    def change(self, id: str, change: Callable[[AgentRecord | None], AgentRecord | None]) -> AgentRecord | None:
        """Write what ``change`` makes of an agent's record, or of its absence, and return it as it is then.

        It is called again while somebody else is faster; when it returns ``None`` nothing is written.
        """
        record: AgentRecord | None = None
        is_new = False

        def changed(body: bytes | None) -> bytes | None:
            nonlocal record, is_new
            written, known = self._written.get(id, (b"", None))
            before = known if body is not None and body == written else _readable(body)
            after = change(before)
            record = after if after is not None else before
            if after is None:
                return None
            is_new = body is None
            if is_new:
                # In this order: an entry without a record means nothing, a record without one would never be found.
                self._store.append("agents", codec.dumps({"agent": id}))
            document = after.document()
            if len(self._written) >= _REMEMBERED:
                self._written.clear()
            self._written[id] = (document, after)
            return document

        began = self._clock.monotonic()
        self._store.change(_key(id), changed)
        if is_new and self._clock.monotonic() - began > _WATCHED / 10:
            self._store.append("agents", codec.dumps({"agent": id}))  # the one before may not have been waited for
        self._remember(id, record)
        return record

    def get(self, id: str) -> AgentRecord | None:
        """Return the record of an agent; None if there is none that can be read."""
        try:
            record = _readable(self._store.get(_key(id)).body)
        except NotFound:
            record = None
        self._remember(id, record)
        return record

    def remove(self, id: str) -> None:
        """Forget an agent and all that is kept of it; nothing happens if there is none."""
        self._remove_logs(id)
        with suppress(NotFound):
            self._store.remove(_key(id))
        self._known.pop(id, None)

    def old(self, kept: float, after: int) -> tuple[list[Gone], int | None]:
        """Return what of one page of the agents is to be forgotten: those that have been silent for longer than
        ``kept`` seconds, and entries of those that are gone.

        ``after`` is where an earlier call stopped; where to go on comes along, or None at the end.
        """
        if after == 0:
            self._entry_of.clear()
        entries = self._store.read("agents", after=after, limit=_PAGE)
        ids = {entry.number: str(codec.loads(entry.body)["agent"]) for entry in entries}
        found = self._store.get_many([_key(id) for id in dict.fromkeys(ids.values())])
        now, gone = self._clock.now(), []
        for number, id in ids.items():
            document = found.get(_key(id))
            if document is None:
                # An entry comes before its record: only one that has none for a while means nothing.
                if self._clock.monotonic() - self._without.setdefault(number, self._clock.monotonic()) >= _WATCHED:
                    gone.append(Gone(id, number, None))
                continue
            self._without.pop(number, None)
            if id in self._entry_of:
                self._store.amend("agents", self._entry_of[id], None)
            self._entry_of[id] = number
            record = _readable(document.body)
            if record is not None and now - (record.heard_at or record.started_at) > kept:
                gone.append(Gone(id, number, document.cas))
        return gone, entries[-1].number if len(entries) == _PAGE else None

    def forget(self, gone: Gone, also: Callable[[str], None]) -> None:
        """Forget an agent that is gone, and what is kept of it; not one that has spoken since.

        ``also`` forgets what others keep of it.  The entry goes last: as long as it is there this is done again.
        """
        if gone.cas is not None:
            try:
                self._store.remove(_key(gone.id), gone.cas)
            except Conflict:
                return
            except NotFound:
                pass  # somebody else was faster, and may not have come to the end
        also(gone.id)
        self._remove_logs(gone.id)
        self._store.amend("agents", gone.number, None)
        self._without.pop(gone.number, None)
        self._known.pop(gone.id, None)

    def _remove_logs(self, id: str) -> None:
        for log in (LOG_JOBS, LOG_FAILURES, LOG_EXCEPTIONS):
            self._store.remove_log(f"{log}.{id}")

    def _remember(self, id: str, record: AgentRecord | None) -> None:
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[id] = (record, self._clock.monotonic())

    def _recent(self, id: str) -> AgentRecord | None:
        """Return a record as it was a second ago at most."""
        record, read_at = self._known.get(id, (None, -_FRESH))
        return record if self._clock.monotonic() - read_at < _FRESH else self.get(id)

    # Who lives

    def hears_queue(self, id: str) -> bool:
        """Return whether an agent may hear what is put into its tube: it lives, and it does not speak HTTP alone."""
        record = self._recent(id)
        return record is None or (record.direct and record.speaks and not self.gone(id, record.instance))

    def is_known(self, id: str) -> bool:
        """Return whether an agent was known a moment ago, without asking the store."""
        record, read_at = self._known.get(id, (None, -_FRESH))
        return record is not None and self._clock.monotonic() - read_at < _FRESH

    def speaks_http(self, id: str) -> bool:
        """Return whether an agent speaks HTTP alone."""
        record = self._recent(id)
        return record is not None and not record.direct

    def state(self, record: AgentRecord) -> str:
        """Return what an agent does now, as far as can be known: running, draining, drained, retired or offline."""
        if record.speaks and (record.silent(self._clock.now()) or self.gone(record.id, record.holder)):
            return "offline"
        return record.state

    def living(self) -> Iterator[AgentRecord]:
        """Yield the newest agents that live, as far as that can be known; a bounded number."""
        for one in islice(self.all(), _LOOKED_AT):
            if self.state(one) in SPEAKING:
                yield one

    def newest(self) -> Iterator[AgentRecord]:
        """Yield the records of the newest agents, the newest first; a bounded number."""
        return islice(self.all(), _LOOKED_AT)

    def all(self) -> Iterator[AgentRecord]:
        """Yield the records of all agents, the newest first, a page at a time."""
        before: int | None = None
        while True:
            records, before = self.page(before, _PAGE)
            yield from records
            if before is None:
                return

    def page(self, before: int | None, limit: int) -> tuple[list[AgentRecord], int | None]:
        """Return the agents that were new before a number in their log, and the number for the next page, if any."""
        entries = self._store.read("agents", before=before, limit=limit)
        ids = {codec.loads(entry.body)["agent"]: entry.number for entry in reversed(entries)}
        found = self._store.get_many([_key(id) for id in ids])
        records = [_readable(found[_key(id)].body) for id in reversed(ids) if _key(id) in found]
        following = entries[-1].number if len(entries) == limit else None
        return [one for one in records if one is not None], following

    def gone(self, id: str, instance: str) -> bool:
        """Return whether an instance of an agent is certainly gone; False also when nothing is known of it.

        It is gone when its lock is free (R7), when it said goodbye, and when the agent has registered as another
        instance: an agent registers before it takes anything.
        """
        if instance in self._gone:
            return True
        record = self._recent(id)
        if record is not None and (record.holder != instance or not record.speaks):
            record = self.get(id)  # a moment ago it may not have registered yet
        if record is None:
            return False
        if record.holder != instance or not record.speaks:
            return True
        if record.presence is None or not record.presence.ended():
            return False
        if len(self._gone) >= _REMEMBERED:
            self._gone.clear()
        self._gone.add(instance)
        return True

    # What became of what they were given

    def keep(self, id: str, log: str, entries: Sequence[Mapping[str, Any]]) -> None:
        """Append to one of an agent's logs, the newest last; ``entries`` are JSON."""
        for start in range(0, len(entries), _TOGETHER):
            number = self._store.append(
                f"{log}.{id}", codec.dumps({"entries": list(entries[start : start + _TOGETHER])})
            )
            if number > _KEPT_ENTRIES and number % _TRIM_EVERY == 0:
                self._store.trim(f"{log}.{id}", number - _KEPT_ENTRIES)

    def kept(self, id: str, log: str, before: int | None, limit: int) -> tuple[list[dict[str, Any]], int | None]:
        """Return what was kept in one of an agent's logs, the newest first, and where the next page starts, if any.

        A position is that of an entry times ``_TOGETHER``, and its place in it.
        """
        number, place = divmod(before, _TOGETHER) if before is not None else (None, 0)
        items: list[dict[str, Any]] = []
        upto = None if number is None else number + 1
        while entries := self._store.read(f"{log}.{id}", before=upto, limit=min(limit, _PAGE)):
            for entry in entries:
                kept = codec.loads(entry.body)["entries"]
                places = range(place if entry.number == number else len(kept))
                for at in reversed(places):
                    if len(items) == limit:
                        return items, entry.number * _TOGETHER + at + 1
                    items.append(kept[at])
            upto = entries[-1].number
        return items, None


def _readable(body: bytes | None) -> AgentRecord | None:
    if body is None:
        return None
    try:
        return AgentRecord.read(body)
    except CorruptDocument:
        return None


def _key(id: str) -> str:
    return f"agent:{id}"
