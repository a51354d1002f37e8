"""Notes: what masters must know of an attempt beside the job's record, until it has ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zerog import codec
from zerog.datastore.base import Datastore
from zerog.exceptions import CorruptDocument, NotFound
from zerog.outcome import Result


@dataclass(frozen=True, slots=True)
class Notes:
    """Which batches of events were written, how many of them are kept, what was uploaded, and under which names."""

    batches: list[int] = field(default_factory=list)
    recorder: Mapping[str, Any] | None = None
    output: Mapping[str, Any] | None = None
    part: Mapping[str, Any] | None = None
    blobs: list[str] = field(default_factory=list)
    ended: str | None = None

    @classmethod
    def read(cls, store: Datastore, uuid: str, attempt: int) -> tuple[Notes, int | None]:
        """Return the notes and their version; empty ones, and no version, where there are none."""
        try:
            document = store.get(notes_key(uuid, attempt))
        except NotFound:
            return cls(), None
        return cls._read(document.body), document.cas

    @classmethod
    def _read(cls, body: bytes) -> Notes:
        members = codec.loads(body)
        try:
            return cls(**{name: members[name] for name in cls.__dataclass_fields__})
        except (KeyError, TypeError) as error:
            raise CorruptDocument(f"no notes of an attempt: {error}") from error

    @classmethod
    def blobs_of(cls, body: bytes) -> list[str]:
        """Return the names under which something was uploaded; none of notes that cannot be read."""
        try:
            return cls._read(body).blobs
        except CorruptDocument:
            return []

    def document(self) -> bytes:
        """Write them as the JSON that the store keeps."""
        return codec.dumps({name: getattr(self, name) for name in self.__dataclass_fields__})

    def write(self, store: Datastore, uuid: str, attempt: int, cas: int | None) -> None:
        """Write them in place of the version ``cas``; raises what a guarded write raises."""
        if cas is None:
            store.insert(notes_key(uuid, attempt), self.document())
        else:
            store.replace(notes_key(uuid, attempt), self.document(), cas)

    def remove(self, store: Datastore, uuid: str, attempt: int, result: Result | None) -> None:
        """Remove them, and all that was uploaded but the result."""
        kept = result.blob if result is not None else None
        for blob in self.blobs:
            if blob != kept:
                store.remove_blob(blob)
        try:
            store.remove(notes_key(uuid, attempt))
        except NotFound:
            return


def change_notes(store: Datastore, uuid: str, attempt: int, change: Callable[[Notes], Notes]) -> None:
    """Change the notes of an attempt, again while others do."""
    store.change(
        notes_key(uuid, attempt),
        lambda body: change(Notes() if body is None else Notes._read(body)).document(),
    )


def notes_key(uuid: str, attempt: int) -> str:
    """Return the key of the notes of an attempt."""
    return f"attempt:{uuid}.{attempt}"
