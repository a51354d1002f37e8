"""Archive, metadata store, policy and ids: each a small interface with a local form and one over HTTP."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Protocol
from urllib.parse import urlencode

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

import zerog
from workers.ingest.asking import TRIES, ServiceError, asked
from workers.ingest.metadata import Listed, Metadata, once
from workers.ingest.settings import Settings
from workers.ingest.tar import show
from workers.ingest.volume import Staged, Volume

#: Bytes of a file with rules.
_MOST_RULES = 16 * 1024 * 1024
#: Bytes that are handed on in one go, and characters of a piece of metadata in the store.
PIECE, _TEXT = 1024 * 1024, 200_000


#: Gives the bytes of a file, from the start each time.
Pieces = Callable[[], Iterator[bytes]]


class Refused(Exception):
    """The policy refuses the bundle."""


class Ids(Protocol):
    """Who gives ids to files."""

    def take(self, count: int) -> int:
        """Return the first of ``count`` ids that nobody else gets."""


class Policy(Protocol):
    """Who says whether a user may ingest something."""

    def check(self, metadata: Metadata, user: str) -> None:
        """Return if the user may; ``Refused`` says why not."""


class Archive(Protocol):
    """Where files go.  What is not committed never was there."""

    def put(self, id: int, listed: Listed, pieces: Pieces) -> None:
        """Take the bytes of a file; ``pieces`` gives them, from the start each time."""

    def move(self, id: int, listed: Listed, pieces: Pieces) -> None:
        """Take a file that lies elsewhere, and leave it there."""

    def commit(self, job_id: int) -> None:
        """Let everything be there."""

    def roll_back(self) -> None:
        """Take back all that this attempt has put, committed or not."""


class MetadataStore(Protocol):
    """Where metadata go."""

    def put(self, job_id: int, entries: Sequence[Mapping[str, Any]]) -> None:
        """Keep the metadata of a job; the same once more changes nothing."""


# Local forms


class CountedIds:
    """Ids from a counter in the datastore."""

    def __init__(self, documents: Any) -> None:
        self._documents = documents

    def take(self, count: int) -> int:
        """Return the first of ``count`` ids that nobody else gets."""
        while True:
            try:
                value, cas = self._documents.get("ids")
                self._documents.replace("ids", {"next": value["next"] + count}, cas)
                return int(value["next"])
            except zerog.NotFound:
                try:
                    self._documents.insert("ids", {"next": 1})
                except zerog.AlreadyExists:
                    continue
            except zerog.Conflict:
                continue


def _project(value: Any) -> str:
    if type(value) not in (str, int):
        raise ValueError("must be a text or a whole number")
    return str(value)


class Rule(BaseModel):
    """A rule of the policy: a member that it does not have fits everything."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    # None where it is missing, and only there: a null would be no text.
    user: str = Field(None)  # type: ignore[assignment]
    project: Annotated[str, BeforeValidator(_project)] = Field(None)  # type: ignore[assignment]
    allow: bool

    def fits(self, user: str, project: str) -> bool:
        """Return whether it is about this user and this project."""
        return self.user in (None, user) and self.project in (None, project)


_RULES = TypeAdapter(list[Rule])


class Rules:
    """Rules in a file: a JSON list of ``{user, project, allow}``, of which the first that fits decides."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def check(self, metadata: Metadata, user: str) -> None:
        """Return if the user may; where no rule fits everybody may."""
        project = metadata.project
        if not next((rule.allow for rule in self.read() if rule.fits(user, project)), True):
            raise Refused(f"the rules do not allow {user} to ingest for the project {project}")

    def read(self) -> list[Rule]:
        """Read the rules, which can be others each time; ``ServiceError`` if they are none."""
        try:
            # An object that has a member twice could allow what its author does not.
            return _RULES.validate_python(json.loads(self._content().decode(), object_pairs_hook=once))
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            place = "".join(f"/{show(str(part).encode('utf-8', 'backslashreplace'))}" for part in fault["loc"])
            why = f"{place}: {fault['msg']}" if place else fault["msg"]
        except OSError as error:
            why = error.strerror or str(error) or type(error).__name__
        except (ValueError, RecursionError) as error:
            why = str(error)
        raise ServiceError(f"the rules of the policy cannot be read: {self._path}: {why}")

    def _content(self) -> bytes:
        descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError("it is no regular file")
            content = file.read(_MOST_RULES + 1)
        if len(content) > _MOST_RULES:
            raise OSError(f"it has more than {_MOST_RULES:,} bytes")
        return content


class Anybody:
    """The policy where none is set."""

    def check(self, metadata: Metadata, user: str) -> None:
        """Return: everybody may."""


class LocalArchive:
    """The archive on the volume."""

    def __init__(self, volume: Volume, uuid: str, attempt: int) -> None:
        self._volume = volume
        self._staged: Staged | None = None
        self._name = (uuid, attempt)

    def put(self, id: int, listed: Listed, pieces: Pieces) -> None:
        """Write a file into the folder of this attempt."""
        if self._staged is None:
            self._staged = self._volume.stage(*self._name)
        with self._staged.create(listed.path) as descriptor:
            for piece in pieces():
                view = memoryview(piece)
                while view:
                    view = view[os.write(descriptor, view) :]

    move = put

    def commit(self, job_id: int) -> None:
        """Let the folder appear in the archive."""
        self._staged = self._staged or self._volume.stage(*self._name)
        self._staged.commit(job_id)

    def roll_back(self) -> None:
        """Remove the folder of this attempt, wherever it is by now."""
        if self._staged is not None:
            self._staged.roll_back()


class KeptMetadata:
    """Metadata as documents in the datastore, in pieces.

    They go by the number of the job, as the folders of the archive do: when a job was pruned, its key can make another
    one under the same UUID.
    """

    def __init__(self, documents: Any) -> None:
        self._documents = documents

    def put(self, job_id: int, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write the pieces, and the document that says how many there are."""
        text = json.dumps(entries, ensure_ascii=False)
        pieces = [text[start : start + _TEXT] for start in range(0, len(text), _TEXT)]
        count = len(pieces)
        most = max(count, self._count(job_id))
        # First how many there will be, so that all of them can be found again whatever happens.
        write(self._documents, f"metadata:{job_id}", {"pieces": most, "complete": False})
        for number, piece in enumerate(pieces):
            write(self._documents, f"metadata:{job_id}:{number}", piece)
        remove(self._documents, *(f"metadata:{job_id}:{number}" for number in range(count, most)))
        write(self._documents, f"metadata:{job_id}", {"pieces": count, "complete": True})

    def remove(self, job_id: int) -> None:
        """Remove what was written, if anything was."""
        pieces = (f"metadata:{job_id}:{number}" for number in range(self._count(job_id)))
        remove(self._documents, *pieces, f"metadata:{job_id}")

    def _count(self, job_id: int) -> int:
        try:
            return int(self._documents.get(f"metadata:{job_id}")[0]["pieces"])
        except zerog.NotFound:
            return 0


def write(documents: Any, key: str, value: Any) -> None:
    """Write a document whatever stands there."""
    while True:
        try:
            documents.insert(key, value)
            return
        except zerog.AlreadyExists:
            try:
                documents.replace(key, value, documents.get(key)[1])
                return
            except (zerog.Conflict, zerog.NotFound):
                continue


def remove(documents: Any, *keys: str) -> None:
    """Remove documents, one after the other, as far as they are there."""
    for key in keys:
        with suppress(zerog.NotFound):
            documents.remove(key)


# Forms over HTTP


class HTTPIds:
    """A service that gives ids: ``GET ?range=N&mode=file`` answers ``{startIndex}``."""

    def __init__(self, url: str) -> None:
        self._url = url

    def take(self, count: int) -> int:
        """Return the first of ``count`` ids."""
        _, content = asked("GET", f"{self._url}?{urlencode({'range': count, 'mode': 'file'})}")
        try:
            return int(json.loads(content)["startIndex"])
        except (ValueError, KeyError, TypeError) as error:
            raise ServiceError(f"{self._url} gave no startIndex: {error}") from error


class HTTPPolicy:
    """A policy service: ``POST`` of the metadata answers ``{"status": "success"}`` if the user may."""

    def __init__(self, url: str, user_header: str) -> None:
        self._url = url
        self._header = user_header

    def check(self, metadata: Metadata, user: str) -> None:
        """Return if the service allows it."""
        headers = {"Content-Type": "application/json", self._header: user}
        body = json.dumps(metadata.entries).encode()
        status, content = asked("POST", self._url, lambda: iter([body]), len(body), headers, refusals=True)
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if status == 200 and isinstance(answer, dict) and answer.get("status") == "success":
            return
        said = answer.get("message") if isinstance(answer, dict) else None
        raise Refused(str(said) if said else f"the policy service answered {status}")


class HTTPArchive:
    """An archive service: ``PUT``, ``PATCH`` and ``DELETE /{_id}``."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._put: list[int] = []

    def put(self, id: int, listed: Listed, pieces: Pieces) -> None:
        """Send a file."""
        self._put.append(id)
        headers = {"Content-Type": "application/octet-stream"}
        asked("PUT", f"{self._url}/{id}", pieces, listed.size, headers)

    def move(self, id: int, listed: Listed, pieces: Pieces) -> None:
        """Tell the service where the file lies."""
        self._put.append(id)
        body = json.dumps({"path": listed.source}).encode()
        asked("PATCH", f"{self._url}/{id}", lambda: iter([body]), len(body), {"Content-Type": "application/json"})

    def commit(self, job_id: int) -> None:
        """Return: what is sent is there."""

    def roll_back(self) -> None:
        """Remove what was sent, as much of it as is possible."""
        errors = []
        for id in self._put:
            try:
                self.remove(id)
            except ServiceError as error:
                errors.append(error)
                if len(errors) == TRIES:
                    break  # it is away: whoever tidies up tries again
        if errors:
            raise errors[0]

    def remove(self, id: int) -> None:
        """Remove a file, if it is there."""
        asked("DELETE", f"{self._url}/{id}", missing=True)


class HTTPMetadata:
    """A metadata service: ``PUT`` of the list, with the ids."""

    def __init__(self, url: str) -> None:
        self._url = url

    def put(self, job_id: int, entries: Sequence[Mapping[str, Any]]) -> None:
        """Send the metadata."""
        body = json.dumps(entries).encode()
        asked("PUT", self._url, lambda: iter([body]), len(body), {"Content-Type": "application/json"})


def ids_of(settings: Settings, documents: Any) -> Ids:
    """Return who gives ids."""
    return HTTPIds(settings.ids) if settings.ids is not None else CountedIds(documents)


def policy_of(settings: Settings) -> Policy:
    """Return the policy."""
    if settings.policy is None:
        return Anybody()
    if settings.policy.startswith(("http://", "https://")):
        return HTTPPolicy(settings.policy, settings.user_header)
    return Rules(Path(settings.policy))


def archive_of(settings: Settings, uuid: str, attempt: int) -> Archive:
    """Return the archive, as one attempt has it."""
    if settings.archive is not None:
        return HTTPArchive(settings.archive)
    return LocalArchive(Volume(settings.volume), uuid, attempt)


def withdraw(settings: Settings, uuid: str, job_id: int, ids: Sequence[int]) -> None:
    """Take out of the archive what any attempt of a job has put there."""
    if settings.archive is None:
        Volume(settings.volume).withdraw(job_id, uuid)
        return
    archive = HTTPArchive(settings.archive)
    for id in ids:
        archive.remove(id)


def metadata_of(settings: Settings, documents: Any) -> MetadataStore:
    """Return the metadata store."""
    return HTTPMetadata(settings.metadata) if settings.metadata is not None else KeptMetadata(documents)
