"""The volume: the folder that servers and agents share, in which bundles wait and the archive is.

::

    <volume>/spool/*.part         uploads on their way, each locked by the server that receives it
             spool/<uuid>.bundle  whole ones: removed when they are ingested, kept when that failed
             work/<uuid>.<n>.*/   what an attempt has taken out of a bundle and not put into the archive yet
             archive/<job_id>/    what was ingested: a folder appears whole, or not at all
             owners/<job_id>      the UUID of the job that a folder belongs to: numbers come again with a new datastore

Everything is synced to the disk before it appears under its name.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

#: Seconds for which a bundle without a job is kept: its job may be on its way.
_YOUNG = 3600.0

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

#: Of the system call renameat2.
_AT_FDCWD, _EXCHANGE = -100, 2

_BUNDLE = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.bundle")


class Exists(Exception):
    """There is another bundle under this name."""


class Part:
    """An upload on its way.  ``OSError`` when the disk does not take it."""

    def __init__(self, spool: Path) -> None:
        # Whose connection has closed is discarded while a write is under way: the number of a descriptor that is closed
        # may be another file's by then.
        self._lock = threading.Lock()
        self._digest = hashlib.sha256()
        self.size = 0
        while True:
            self.path = spool / f"{secrets.token_hex(16)}.part"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor = os.open(self.path, flags, 0o600)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(self._descriptor).st_nlink:
                    return
            except BlockingIOError:
                pass
            os.close(self._descriptor)  # a sweep came before the lock

    def write(self, data: bytes) -> None:
        """Add bytes; nothing happens after ``discard``."""
        with self._lock:
            view = memoryview(data)
            while view and self._descriptor >= 0:
                view = view[os.write(self._descriptor, view) :]
            self._digest.update(data)
            self.size += len(data)

    def sync(self) -> str:
        """Have all of it on the disk; return its sha256."""
        with self._lock:
            os.fsync(self._descriptor)
            return self._digest.hexdigest()

    def discard(self) -> None:
        """Leave nothing of it.  May be called twice, and after it was kept."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0:
                with suppress(OSError):
                    self.path.unlink()
                os.close(descriptor)


class Volume:
    """One volume.  Safe to use from many threads and processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.spool = root / "spool"
        self.work = root / "work"
        self.archive = root / "archive"
        self.owners = root / "owners"

    def prepare(self) -> None:
        """Make the folders that are missing."""
        for folder in (self.spool, self.work, self.owners):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.archive.mkdir(parents=True, exist_ok=True)

    # Bundles

    def receive(self) -> Part:
        """Begin an upload."""
        self.prepare()
        return Part(self.spool)

    def bundle(self, uuid: str) -> Path:
        """Return where the bundle of a job is, or would be."""
        return self.spool / f"{uuid}.bundle"

    def keep(self, part: Part, uuid: str, sha256: str) -> None:
        """Let a whole upload appear as the bundle of a job; ``Exists`` if there is another one.

        One of the same bytes is the same one: an earlier request came as far as this, and no further.
        """
        target = self.bundle(uuid)
        try:
            os.link(part.path, target)
        except FileExistsError:
            if sha256_of(target) != sha256:
                raise Exists from None
            os.utime(target)  # it is needed again: its job is on its way
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK) or target.exists():
                raise
            part.path.rename(target)  # a file system without hard links
        sync_folder(self.spool)

    def forget(self, uuid: str) -> None:
        """Remove the bundle of a job, if it is there."""
        with suppress(FileNotFoundError):
            self.bundle(uuid).unlink()

    def sweep(self) -> int:
        """Remove what uploads have left that nobody receives any more; return how many there were."""
        removed = 0
        for path in self._listed(self.spool, ".part"):
            with suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.fstat(descriptor).st_nlink:
                        path.unlink()
                        removed += 1
                finally:
                    os.close(descriptor)
        return removed

    def note_sources(self, uuid: str, sources: Mapping[str, Sequence[int]]) -> None:
        """Keep which files were copied: what each path was when it was."""
        making = self.work / f"gone-{secrets.token_hex(8)}"
        with open(making, "w") as file:
            json.dump(sources, file)
            file.flush()
            os.fsync(file.fileno())
        making.replace(self._sources(uuid))
        sync_folder(self.spool)

    def noted_sources(self, uuid: str) -> dict[str, list[int]]:
        """Return what ``note_sources`` has kept."""
        found: dict[str, list[int]] = json.loads(self._sources(uuid).read_text())
        return found

    def forget_sources(self, uuid: str) -> None:
        """Remove that, if it is there."""
        with suppress(FileNotFoundError):
            self._sources(uuid).unlink()

    def _sources(self, uuid: str) -> Path:
        return self.spool / f"{uuid}.sources"

    def old_bundles(self) -> Iterator[str]:
        """Yield the UUIDs of the bundles that are so old that a job must have been made of them."""
        oldest = time.time() - _YOUNG
        for path in self._listed(self.spool, ".bundle"):
            match = _BUNDLE.fullmatch(path.name)
            with suppress(OSError):
                if match is not None and path.stat().st_mtime < oldest:
                    yield match.group(1)

    @staticmethod
    def _listed(folder: Path, ending: str) -> list[Path]:
        with suppress(FileNotFoundError):
            return [Path(entry.path) for entry in os.scandir(folder) if entry.name.endswith(ending)]
        return []

    # The archive

    def stage(self, uuid: str, attempt: int) -> Staged:
        """Make a fresh folder for what an attempt takes out of a bundle."""
        self.prepare()
        path = self.work / f"{uuid}.{attempt}.{secrets.token_hex(4)}"
        path.mkdir(mode=0o700)
        return Staged(self, path, uuid)

    def discard(self, uuid: str) -> None:
        """Take away what attempts of a job have not put into the archive: they cannot do so any more."""
        for path in self._listed(self.work, ""):
            if path.name.startswith(f"{uuid}."):
                self.remove_tree(path)

    def own(self, job_id: int, uuid: str) -> None:
        """Say that a folder of the archive belongs to a job; ``Exists`` if it belongs to another one."""
        owner, making = self.owners / str(job_id), self.work / f"gone-{secrets.token_hex(8)}"
        with open(making, "w") as file:
            file.write(uuid)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(making, owner)
            sync_folder(self.owners)
        except FileExistsError:
            if owner.read_text() != uuid:
                raise Exists from None
        finally:
            making.unlink()

    def withdraw(self, job_id: int, uuid: str) -> None:
        """Take a job's folder out of the archive, in one step; nothing happens if there is none of this job."""
        owner = self.owners / str(job_id)
        with suppress(FileNotFoundError):
            if owner.read_text() == uuid:
                self.remove_tree(self.archive / str(job_id))
                owner.unlink()

    def remove_tree(self, path: Path) -> None:
        """Remove a folder: it vanishes in one step, then what was in it goes."""
        gone = self.work / f"gone-{secrets.token_hex(8)}"
        try:
            path.rename(gone)
        except FileNotFoundError:
            return
        sync_folder(path.parent)
        shutil.rmtree(gone, ignore_errors=True)

    def sweep_gone(self) -> None:
        """Remove what removals have left that were cut short."""
        for path in self._listed(self.work, ""):
            if path.name.startswith("gone-") and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith("gone-"):
                with suppress(OSError):
                    if path.stat().st_mtime < time.time() - _YOUNG:
                        path.unlink()


class Staged:
    """What an attempt has taken out of a bundle: a folder of its own that nobody else sees."""

    def __init__(self, volume: Volume, path: Path, uuid: str) -> None:
        self._volume = volume
        self._path = path
        self._uuid = uuid
        self._identity: tuple[int, int] | None = None
        self._committed: Path | None = None

    @contextmanager
    def create(self, path: str) -> Iterator[int]:
        """Give the descriptor of a new file to be written; synced at the end."""
        *folders, name = path.split("/")
        # Below the very folder that was made: where that was discarded there is nothing more to write to.
        with self._opened(folders) as folder:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(name, flags, 0o666, dir_fd=folder)
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def _opened(self, folders: Sequence[str]) -> Iterator[int]:
        """Give the descriptor of a folder in it, which is made."""
        here = os.open(self._path, _FOLDER)
        try:
            for name in folders:
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=here)
                below = os.open(name, _FOLDER, dir_fd=here)
                os.close(here)
                here = below
            yield here
        finally:
            os.close(here)

    def commit(self, job_id: int) -> None:
        """Let everything appear in the archive as one folder, in one step, also in place of one of an earlier attempt.

        ``Exists`` if the folder belongs to another job.
        """
        for folder, _, _ in os.walk(self._path):
            sync_folder(Path(folder))
        mask = os.umask(0)
        os.umask(mask)
        self._path.chmod(0o777 & ~mask)
        target = self._volume.archive / str(job_id)
        self._volume.own(job_id, self._uuid)
        self._identity = identity_of(self._path)
        try:
            self._path.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            exchange(self._path, target)
        self._committed = target
        sync_folder(self._volume.archive)
        self._volume.remove_tree(self._path)

    def roll_back(self) -> None:
        """Leave nothing of it, in the archive neither; what another attempt has put there stays."""
        self._volume.remove_tree(self._path)
        if self._committed is not None and identity_of(self._committed) == self._identity:
            self._volume.remove_tree(self._committed)


def exchange(path: Path, other: Path) -> None:
    """Let two folders change places in one step; ``OSError`` where the file system cannot."""
    renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    if renameat2(_AT_FDCWD, os.fsencode(path), _AT_FDCWD, os.fsencode(other), _EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))


def identity_of(path: Path) -> tuple[int, int] | None:
    """Return what a folder keeps whatever its name is; None if it is not there."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_dev, state.st_ino


def sync_folder(path: Path) -> None:
    """Have on the disk what a folder lists."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
