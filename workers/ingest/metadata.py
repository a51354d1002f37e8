"""Reads the metadata of a bundle: a JSON list of objects, each for one table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workers.ingest.tar import BadBundle, Names, checked_path, show

#: Name of the metadata in a bundle, and bytes that it may have.
NAME = "metadata.txt"
MAX_METADATA = 64 * 1024 * 1024

DATA = "data/"
FILES, KEY_VALUES = "Files", "TransactionKeyValue"
TRANSACTION = ("Transactions.submitter", "Transactions.project", "Transactions.instrument")

_HASHES = frozenset(hashlib.algorithms_guaranteed - {"shake_128", "shake_256"})


class BadMetadata(Exception):
    """The metadata are not as they must be; the text says where."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A file that the metadata list: its path in the archive, its size, and its digest in lower case.

    ``place`` is that of its entry in the list; ``source`` is where it is to be moved from.
    """

    path: str
    size: int
    hashtype: str
    hashsum: str
    place: int
    source: str | None = None

    def hasher(self) -> Any:
        """Return what its bytes are to be hashed with."""
        return hashlib.new(self.hashtype, usedforsecurity=False)


@dataclass(frozen=True)
class Metadata:
    """The metadata: the list as it was sent, the files in it by path, and what the three ``Transactions`` say."""

    entries: list[dict[str, Any]]
    files: dict[str, Listed]
    transaction: Mapping[str, Any] = field(default_factory=dict)

    @property
    def project(self) -> str:
        """The project that the bundle belongs to."""
        return str(self.transaction["Transactions.project"])


def read(data: bytes, sources: bool = False) -> Metadata:
    """Read metadata; ``BadMetadata`` for the first thing that is not right.  ``sources`` says that it is for a move."""
    entries = _list_of(data)
    transaction: dict[str, Any] = {}
    files: dict[str, Listed] = {}
    names, taken = Names(), set[str | None]()
    for place, entry in enumerate(entries):
        table = entry.get("destinationTable")
        if not isinstance(table, str) or not table:
            raise BadMetadata(f"entry {place} has no destinationTable")
        if table in TRANSACTION:
            if table in transaction:
                raise BadMetadata(f"{table} is there twice")
            if "value" not in entry:
                raise BadMetadata(f"entry {place}: {table} has no value")
            value = entry["value"]
            if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
                raise BadMetadata(f"entry {place}: the value of {table} must be a text or a whole number")
            transaction[table] = value
        elif table == KEY_VALUES:
            for name in ("key", "value"):
                if name not in entry:
                    raise BadMetadata(f"entry {place}: {KEY_VALUES} has no {name}")
        elif table == FILES:
            listed = _file(entry, place, sources)
            try:
                names.enter(DATA + listed.path, False)
            except BadBundle as error:
                raise BadMetadata(f"entry {place}: {error}") from error
            if listed.source is not None and listed.source in taken:
                raise BadMetadata(f"entry {place}: its source is that of another entry too")
            taken.add(listed.source)
            files[listed.path] = listed
    for table in TRANSACTION:
        if table not in transaction:
            raise BadMetadata(f"{table} is missing")
    return Metadata(entries, files, transaction)


def _list_of(data: bytes) -> list[dict[str, Any]]:
    if data.startswith(b"\xef\xbb\xbf"):
        raise BadMetadata("the metadata begin with a byte order mark")
    try:
        entries = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise BadMetadata("the metadata are not UTF-8") from error
    except RecursionError as error:
        raise BadMetadata("the metadata are not JSON that can be read: too much is nested") from error
    except ValueError as error:
        why = "a number has too many digits" if "set_int_max_str_digits" in str(error) else str(error)
        raise BadMetadata(f"the metadata are not JSON: {why}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise BadMetadata("the metadata are no list of objects")
    for place, entry in enumerate(entries):
        try:
            json.dumps(entry, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BadMetadata(f"entry {place}: a text holds half a surrogate pair") from error
    return entries


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON as a dictionary; ``ValueError`` if it has a member twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a member twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _file(entry: Mapping[str, Any], place: int, sources: bool) -> Listed:
    for name in ("name", "subdir", "hashsum", "hashtype", *(("source",) if sources else ())):
        if not isinstance(entry.get(name), str):
            raise BadMetadata(f"entry {place}: {FILES} needs {name}, a text")
    size = entry.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise BadMetadata(f"entry {place}: {FILES} needs size, a whole number, 0 or more")
    subdir, name = entry["subdir"].removesuffix("/"), entry["name"]
    if entry["subdir"].startswith("/"):
        raise BadMetadata(f"entry {place}: subdir must be relative")
    if not name or "/" in name or name in (".", ".."):
        raise BadMetadata(f"entry {place}: {show(name.encode('utf-8', 'replace'))} is no name of a file")
    try:
        path = checked_path(f"{DATA}{subdir}{'/' if subdir else ''}{name}".encode()).removeprefix(DATA)
    except (BadBundle, UnicodeEncodeError) as error:
        raise BadMetadata(f"entry {place}: {error}") from error
    hashtype = entry["hashtype"].lower()
    if hashtype not in _HASHES:
        raise BadMetadata(f"entry {place}: there is no hash type {show(entry['hashtype'].encode('utf-8', 'replace'))}")
    prefix, colon, digest = entry["hashsum"].rpartition(":")
    digest = digest.lower()
    length = 2 * hashlib.new(hashtype, usedforsecurity=False).digest_size
    if (colon and prefix.lower() != hashtype) or len(digest) != length or not _is_hex(digest):
        raise BadMetadata(f"entry {place}: its hashsum is none of {hashtype}")
    return Listed(path, size, hashtype, digest, place, entry["source"] if sources else None)


def _is_hex(text: str) -> bool:
    return all(one in "0123456789abcdef" for one in text)
