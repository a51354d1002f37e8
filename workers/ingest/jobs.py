"""The jobs of ingest, and the consumer that tidies up behind them."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import Field

import zerog
from workers.ingest import metadata, tar
from workers.ingest.asking import ServiceError
from workers.ingest.metadata import BadMetadata, Listed, Metadata
from workers.ingest.services import (
    PIECE,
    Archive,
    KeptMetadata,
    Refused,
    archive_of,
    ids_of,
    metadata_of,
    policy_of,
    remove,
    withdraw,
)
from workers.ingest.settings import Settings
from workers.ingest.steps import (
    INGEST,
    INGEST_FILES,
    INGEST_METADATA,
    JOB_TYPES,
    LOAD_METADATA,
    MOVE,
    MOVE_FILES,
    OPEN_TAR,
    POLICY,
    STATE_OF,
    TASK_OF,
    Steps,
    is_set_by_hand,
)
from workers.ingest.tar import BadBundle, Member
from workers.ingest.volume import Exists, Volume

UUID = r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
SHA256 = r"^[0-9a-f]{64}$"

#: Bytes of files between two words of how far it is.
_TELL_EVERY = 16 * 1024 * 1024

#: Seconds for which it is tried to take back what a failed ingest has left in an archive service, and between tries.
_PATIENCE, _AGAIN = 7 * 86_400.0, 30.0


#: Gives the bytes of a file, from the start each time.
Pieces = Callable[[], Iterator[bytes]]


class Bad(Exception):
    """A fault of what was sent: no further attempt would find it otherwise."""


@dataclass
class Work:
    """One attempt of an ingest: what it stands on, and what it has found."""

    context: zerog.Context
    settings: Settings
    steps: Steps
    archive: Archive
    #: What goes into the archive, each with what gives its bytes; and the first of the ids.
    files: dict[str, tuple[Listed, Pieces]] = field(default_factory=dict)
    start: int = 0

    @classmethod
    def of(cls, context: zerog.Context) -> Work:
        """Begin an attempt."""
        if not context.number:
            raise zerog.Retry("the server that gave this job is too old to say its number")
        settings = context.settings
        return cls(context, settings, Steps(context), archive_of(settings, context.uuid, context.attempt))

    def check_policy(self, found: Metadata, user: str) -> None:
        """Ask whether the user may."""
        with self.steps.task(POLICY):
            try:
                policy_of(self.settings).check(found, user)
            except Refused as error:
                raise Bad(str(error)) from error

    def heed(self) -> None:
        """Go no further if somebody has cancelled the job: what is in the archive is taken back."""
        if self.context.cancelled:
            raise zerog.Fail("it was cancelled")

    def heed_hand(self) -> None:
        """Go no further if somebody has set the state by hand, and died before the job was cancelled."""
        self.heed()
        if is_set_by_hand(self.context.documents, self.context.uuid):
            raise zerog.Fail("its state was set by hand")

    def take_ids(self, count: int) -> None:
        """Get an id for each file: the same ones in every attempt."""
        state = self.context.state or {}
        if "start" in state:
            self.start = state["start"]
            return
        self.start = ids_of(self.settings, self.context.documents).take(count) if count else 0
        self.context.checkpoint({"start": self.start, "count": count})

    def put_all(self, take: Callable[[int, Listed, Pieces], None]) -> None:
        """Put every file into the archive, checking size and hash on the way, and let them appear together."""
        total = max(1, sum(listed.size for listed, _ in self.files.values()))
        done = 0
        for place, (listed, pieces) in enumerate(self.files.values()):
            take(self.start + place, listed, partial(self._checked, listed, pieces, done, total))
            done += listed.size
            self.steps.far(done / total)
        # The agent writes it under the guard of this attempt: who is superseded comes no further than this.
        self.context.checkpoint({"start": self.start, "count": len(self.files)})
        zerog.failpoint("ingest.before_commit")
        try:
            self.archive.commit(self.context.number)
        except Exists as error:
            raise Bad(f"the archive has a folder {self.context.number} of another job") from error
        zerog.failpoint("ingest.after_commit")
        self.heed_hand()

    def _checked(self, listed: Listed, pieces: Pieces, done: int, total: int) -> Iterator[bytes]:
        """Yield the bytes of a file; ``Bad`` at their end if they are not those that are listed."""
        digest, size, told = listed.hasher(), 0, 0
        for piece in pieces():
            digest.update(piece)
            size += len(piece)
            if size - told >= _TELL_EVERY:
                told = size
                self.steps.far(min(1.0, (done + size) / total))
            self.heed()
            yield piece
        if size != listed.size:
            raise Bad(f"{listed.path} has {size} bytes, and the metadata say {listed.size}")
        if digest.hexdigest() != listed.hashsum:
            raise Bad(
                f"{listed.path}: its {listed.hashtype} is {digest.hexdigest()}, and the metadata say {listed.hashsum}"
            )

    def put_metadata(self, found: Metadata) -> None:
        """Hand the metadata on, with the ids."""
        ids = {listed.place: self.start + number for number, (listed, _) in enumerate(self.files.values())}
        entries: list[dict[str, Any]] = [
            {**entry, "_id": ids[place]} if place in ids else entry for place, entry in enumerate(found.entries)
        ]
        entries.append({"destinationTable": "Transactions._id", "value": self.context.number})
        with self.steps.task(INGEST_METADATA):
            metadata_of(self.settings, self.context.documents).put(self.context.number, entries)
            zerog.failpoint("ingest.after_metadata")
        self.heed_hand()

    def write_manifest(self) -> None:
        """Make the list of what was ingested the data of the job."""
        with self.context.output("application/json") as output:
            output.write(f'{{"job_id":{self.context.number},"files":[')
            for number, (listed, _) in enumerate(self.files.values()):
                shown = {
                    "_id": self.start + number,
                    "path": listed.path,
                    "size": listed.size,
                    "hashsum": listed.hashsum,
                    "hashtype": listed.hashtype,
                }
                output.write((b"," if number else b"") + json.dumps(shown).encode())
            output.write(b"]}")

    def roll_back(self) -> None:
        """Leave nothing of this attempt in the archive."""
        try:
            # Who is superseded comes no further than this: what is there by now may be another attempt's.
            self.context.checkpoint(self.context.state)
            self.archive.roll_back()
        except (ServiceError, OSError) as error:
            self.context.error(f"what was put into the archive is still there, until it is tidied up: {error}")


@contextmanager
def rolled_back(work: Work) -> Iterator[None]:
    """Do something of which a fault leaves nothing; a fault of what was sent ends the job."""
    try:
        yield
    except (Bad, BadBundle, BadMetadata) as error:
        work.roll_back()
        raise zerog.Fail(str(error), code=422) from error
    except BaseException:
        work.roll_back()
        raise


class Ingest(zerog.Job):
    """Check a bundle and put it into the archive."""

    job_type = INGEST
    own_documents = (TASK_OF, STATE_OF)

    bundle: str = Field(pattern=UUID, description="under what the bundle is kept on the volume")
    user: str = Field(description="who sent it")
    sha256: str = Field(pattern=SHA256, description="of the bundle")
    size: int = Field(ge=0, description="bytes of the bundle")

    def run(self, context: zerog.Context) -> None:
        """Do the tasks one after the other; a fault leaves nothing."""
        work = Work.of(context)
        with rolled_back(work), self._open(work) as file:
            self._ingest(work, file)

    def _open(self, work: Work) -> BinaryIO:
        try:
            return open(Volume(work.settings.volume).bundle(self.bundle), "rb")
        except FileNotFoundError as error:
            raise Bad("the bundle is not on the volume any more") from error

    def _ingest(self, work: Work, file: BinaryIO) -> None:
        with work.steps.task(OPEN_TAR):
            members = tar.walk(file, os.fstat(file.fileno()).st_size, work.steps.far)
        with work.steps.task(LOAD_METADATA):
            found = metadata.read(_metadata_in(members, file))
        work.check_policy(found, self.user)
        with work.steps.task(INGEST_FILES):
            work.files = _matched(members, found, file)
            work.take_ids(len(work.files))
            work.put_all(work.archive.put)
        work.put_metadata(found)
        work.write_manifest()


def _metadata_in(members: dict[str, Member], file: BinaryIO) -> bytes:
    member = members.get(metadata.NAME)
    if member is None:
        raise BadMetadata(f"the bundle has no {metadata.NAME}")
    if member.size > metadata.MAX_METADATA:
        raise BadMetadata(f"{metadata.NAME} has {member.size:,} bytes, more than {metadata.MAX_METADATA:,}")
    return b"".join(_pieces(file, member))


def _pieces(file: BinaryIO, member: Member) -> Iterator[bytes]:
    """Yield the bytes of a member."""
    position, end = member.offset, member.offset + member.size
    while position < end:
        piece = os.pread(file.fileno(), min(PIECE, end - position), position)
        if not piece:
            return  # somebody has cut the file since it was walked: its size will not be right
        position += len(piece)
        yield piece


def _matched(members: dict[str, Member], found: Metadata, file: BinaryIO) -> dict[str, tuple[Listed, Pieces]]:
    """Return the files in the order in which they lie in the bundle; ``Bad`` if bundle and metadata do not agree."""
    for path in found.files:
        if metadata.DATA + path not in members:
            raise Bad(f"{path} is listed, and is not in the bundle")
    matched: dict[str, tuple[Listed, Pieces]] = {}
    for name, member in members.items():
        if name == metadata.NAME:
            continue
        path = name.removeprefix(metadata.DATA)
        listed = found.files.get(path) if name.startswith(metadata.DATA) else None
        if listed is None:
            raise Bad(f"{tar.show(name.encode())} is in the bundle, and is not listed")
        if listed.size != member.size:
            raise Bad(f"{path} has {member.size} bytes, and the metadata say {listed.size}")
        matched[path] = (listed, lambda member=member: _pieces(file, member))  # type: ignore[misc]
    return matched


class Move(zerog.Job):
    """Check files that lie in a source folder, and move them into the archive."""

    job_type = MOVE
    own_documents = (TASK_OF, STATE_OF)

    bundle: str = Field(pattern=UUID, description="under what the metadata are kept on the volume")
    user: str = Field(description="who sent it")
    sha256: str = Field(pattern=SHA256, description="of the metadata")
    size: int = Field(ge=0, description="bytes of the metadata")

    def run(self, context: zerog.Context) -> None:
        """Do the tasks one after the other; a fault leaves every file where it was."""
        work = Work.of(context)
        with rolled_back(work):
            found = self._load(work)
            if not (context.state or {}).get("moved"):
                self._move(work, found)
        work.files = {path: (listed, lambda: iter(())) for path, listed in found.files.items()}
        work.start = (context.state or {}).get("start", work.start)
        self._remove_sources(context, Volume(work.settings.volume))
        work.write_manifest()

    def _remove_sources(self, context: zerog.Context, volume: Volume) -> None:
        """Remove the files that were copied, as far as they are still those: another one in such a place stays."""
        for source, identity in volume.noted_sources(context.uuid).items():
            path = Path(source)
            try:
                folder = open_folder(path.parent)
                try:
                    if identity_of(os.stat(path.name, dir_fd=folder, follow_symlinks=False)) == identity:
                        os.unlink(path.name, dir_fd=folder)
                    else:
                        context.warning(f"{source} is another file by now, and stays")
                finally:
                    os.close(folder)
            except FileNotFoundError:
                continue  # an earlier attempt has removed it
            except OSError as error:
                context.warning(f"{source} is in the archive, and cannot be removed: {error.strerror}")

    def _load(self, work: Work) -> Metadata:
        with work.steps.task(LOAD_METADATA):
            try:
                data = Volume(work.settings.volume).bundle(self.bundle).read_bytes()
            except FileNotFoundError as error:
                raise Bad("the metadata are not on the volume any more") from error
            return metadata.read(data, sources=True)

    def _move(self, work: Work, found: Metadata) -> None:
        work.check_policy(found, self.user)
        with work.steps.task(MOVE_FILES):
            roots = [source.resolve() for source in work.settings.sources]
            sources: dict[str, list[int]] = {}
            for listed in found.files.values():
                descriptor = _open_source(listed, roots)
                try:
                    state = os.fstat(descriptor)
                finally:
                    os.close(descriptor)
                sources[os.path.realpath(str(listed.source))] = identity_of(state)
                if state.st_size != listed.size:
                    raise Bad(f"{listed.source} has {state.st_size} bytes, and the metadata say {listed.size}")
                work.files[listed.path] = (listed, lambda listed=listed: _source_pieces(listed, roots))  # type: ignore[misc]
            Volume(work.settings.volume).note_sources(work.context.uuid, sources)
            work.take_ids(len(work.files))
            work.put_all(work.archive.move if work.settings.archive is None else _checked_move(work.archive))
        work.put_metadata(found)
        # From here on the sources go, and what is in the archive stays.
        work.context.checkpoint({"start": work.start, "count": len(work.files), "moved": True})
        zerog.failpoint("ingest.before_unlink")


def _checked_move(archive: Archive) -> Callable[[int, Listed, Pieces], None]:
    """Return what reads a file once, so that it is checked, before a service is told where it lies."""

    def move(id: int, listed: Listed, pieces: Pieces) -> None:
        for _ in pieces():
            continue
        archive.move(id, listed, pieces)

    return move


def _open_source(listed: Listed, roots: Sequence[Path]) -> int:
    """Open a file that is to be moved: an absolute path inside one of the folders, regular, and no link on the way."""
    assert listed.source is not None
    source = listed.source
    shown = tar.show(source.encode("utf-8", "replace"))
    if "\0" in source or not Path(source).is_absolute():
        raise Bad(f"{shown}: a source must be an absolute path, without a zero byte")
    real = Path(os.path.realpath(source))
    if not any(real.is_relative_to(root) for root in roots):
        raise Bad(f"{shown} is not inside a folder that files may be moved from")
    if str(real) != os.path.normpath(source):
        raise Bad(f"{shown}: there is a link on the way")
    try:
        folder = open_folder(real.parent)
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            descriptor = os.open(real.name, flags, dir_fd=folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise Bad(f"{shown} cannot be read: {error.strerror}") from error
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode) or state.st_nlink != 1:
        os.close(descriptor)
        raise Bad(f"{shown} " + ("has other names too" if stat.S_ISREG(state.st_mode) else "is no regular file"))
    return descriptor


def open_folder(path: Path) -> int:
    """Open a folder by its absolute path, a part at a time, so that no part of it can be a link."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    here = os.open("/", flags)
    for part in path.parts[1:]:
        try:
            below = os.open(part, flags, dir_fd=here)
        finally:
            os.close(here)
        here = below
    return here


def identity_of(state: os.stat_result) -> list[int]:
    """Return what tells a file from another one, and from itself when it was written to."""
    return [state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns]


def _source_pieces(listed: Listed, roots: Sequence[Path]) -> Iterator[bytes]:
    descriptor = _open_source(listed, roots)
    try:
        while piece := os.read(descriptor, PIECE):
            yield piece
    finally:
        os.close(descriptor)


class Cleaner(zerog.Consumer):
    """Removes what ended jobs need no more: bundles that were ingested, and all that failed ones have left."""

    name = "ingest-cleaner"
    topics = ("finished",)
    chore_every = 60.0
    time_limit = 3600.0  # an archive service may have to forget many files

    def handle(self, entry: zerog.Entry) -> None:
        """Tidy up behind a job."""
        if entry.value["jobType"] not in JOB_TYPES:
            return
        record = self.manager.get_many([entry.value["uuid"]]).get(entry.value["uuid"])
        if record is None:
            return
        volume = Volume(self.settings.volume)
        # First: what an attempt that knows nothing of the end has not put into the archive yet, it never will.
        volume.discard(record.uuid)
        volume.forget_sources(record.uuid)
        if str(record.state) == "succeeded":
            volume.forget(str(record.parameters["bundle"]))
            remove(self.documents, TASK_OF.format(uuid=record.uuid))
            return
        state = record.job_state or {}
        if state.get("moved"):
            return  # sources are gone: what is in the archive is all there is
        ids = range(state.get("start", 0), state.get("start", 0) + state.get("count", 0))
        try:
            withdraw(self.settings, record.uuid, record.number, ids)
        except (ServiceError, OSError) as error:
            if self.manager.clock.now() - entry.at < _PATIENCE:
                raise zerog.Retry(str(error), after=_AGAIN) from error
            raise
        if self.settings.metadata is None:
            KeptMetadata(self.documents).remove(record.number)

    def chore(self) -> None:
        """Remove uploads that nobody receives any more, and bundles whose jobs were pruned, or never came to be."""
        volume = Volume(self.settings.volume)
        volume.prepare()
        volume.sweep()
        volume.sweep_gone()
        old = list(volume.old_bundles())
        for start in range(0, len(old), 100):
            part = old[start : start + 100]
            known = self.manager.get_many(part)
            for uuid in part:
                if uuid not in known and not self.manager.tried_again(uuid):
                    volume.forget(uuid)
