"""Bundles for tests: good ones, and one for each thing that can be wrong with one."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

HEAD: list[dict[str, Any]] = [
    {"destinationTable": "Transactions.submitter", "value": 34002},
    {"destinationTable": "Transactions.project", "value": "project-1"},
    {"destinationTable": "Transactions.instrument", "value": 54},
    {"destinationTable": "TransactionKeyValue", "key": "tag", "value": "experiment"},
    {"destinationTable": "Unknown.table", "value": {"passed": "on"}},
]


def entry(path: str, data: bytes, **changes: Any) -> dict[str, Any]:
    """Return the entry of a file in the metadata."""
    subdir, _, name = path.rpartition("/")
    return {
        "destinationTable": "Files", "name": name, "subdir": subdir, "size": len(data),
        "hashsum": hashlib.sha1(data).hexdigest(), "hashtype": "sha1", "mimetype": "text/plain",
        "ctime": "2026-01-01T00:00:00Z", "mtime": "2026-01-01T00:00:00Z", **changes,
    }  # fmt: skip


def metadata_of(files: Mapping[str, bytes], head: Iterable[dict[str, Any]] = HEAD) -> bytes:
    """Return the metadata of files."""
    return json.dumps([*head, *(entry(path, data) for path, data in files.items())]).encode()


def member(name: str, data: bytes = b"", **members: Any) -> tuple[tarfile.TarInfo, bytes]:
    """Return a member of a tar file."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(data), 1_700_000_000
    for key, value in members.items():
        setattr(info, key, value)
    return info, data


def tar(members: Iterable[tuple[tarfile.TarInfo, bytes]], format: int = tarfile.GNU_FORMAT) -> bytes:
    """Return a tar file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data) if info.isreg() or data else None)
    return out.getvalue()


def bundle(files: Mapping[str, bytes], metadata: bytes | None = None, format: int = tarfile.GNU_FORMAT) -> bytes:
    """Return a bundle of files; with other metadata than theirs if any are given."""
    members = [member(f"data/{path}", data) for path, data in files.items()]
    return tar([*members, member("metadata.txt", metadata if metadata is not None else metadata_of(files))], format)


FILES = {"mywork/project/project.doc": b"doc" * 1000, "mywork/experiment/results.csv": b"1,2\n", "empty": b""}
GOOD = bundle(FILES)


def _with(*more: tuple[tarfile.TarInfo, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    """Return a bundle with one more member, or some."""
    first = [member("metadata.txt", metadata_of({"a": b"a"})), member("data/a", b"a")]
    return tar([*first, *more], format)


#: The blocks of such a bundle up to where the next member would begin.
_START = _with()[: 512 * (2 + -(-len(metadata_of({"a": b"a"})) // 512) + 1)]


def _raw(change: Callable[[bytearray], None], name: str = "data/x") -> bytes:
    """Return a bundle with a member whose header was changed, and its checksum made right again."""
    header = bytearray(member(name, b"x")[0].tobuf(tarfile.USTAR_FORMAT))
    change(header)
    sign(header)
    return _START + bytes(header) + b"x".ljust(512, b"\0") + bytes(1024)


def sign(header: bytearray) -> None:
    """Make the checksum of a header right."""
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()


def _put(start: int, data: bytes) -> Callable[[bytearray], None]:
    def change(header: bytearray) -> None:
        header[start : start + len(data)] = data

    return change


def _pax(name: str, **records: str) -> bytes:
    return _with(member(name, b"x", pax_headers=records), format=tarfile.PAX_FORMAT)


def _kind(kind: bytes, **members: Any) -> bytes:
    return _with(member("data/x", type=kind, **members))


#: What is wrong → the bundle, and a word that must be in the reason.  All of them fail at "open tar".
BAD_TARS: dict[str, tuple[bytes, str]] = {
    "absolute path": (_with(member("/etc/passwd", b"x")), "etc/passwd"),
    "path upwards": (_with(member("data/../../x", b"x")), "../x"),
    "only dots": (_with(member("..", b"x")), ".."),
    "dot inside": (_with(member("data/./x", b"x")), "data/./x"),
    "empty part": (_with(member("data//x", b"x")), "data//x"),
    "symbolic link": (_kind(tarfile.SYMTYPE, linkname="/etc/passwd"), "symbolic link"),
    "hard link": (_kind(tarfile.LNKTYPE, linkname="data/a"), "hard link"),
    "character device": (_kind(tarfile.CHRTYPE), "character device"),
    "block device": (_kind(tarfile.BLKTYPE), "block device"),
    "FIFO": (_kind(tarfile.FIFOTYPE), "FIFO"),
    "contiguous file": (_kind(tarfile.CONTTYPE), "unknown kind"),
    "set-uid bit": (_with(member("data/x", b"x", mode=0o4755)), "set-uid"),
    "set-gid bit": (_with(member("data/x", b"x", mode=0o2755)), "set-uid"),
    "sparse file of GNU": (_raw(_put(156, b"S")), "sparse"),
    "sparse file of PAX": (_pax("data/x", **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}), "GNU.sparse"),
    "path of PAX": (_pax("data/x", path="data/y"), "another name"),
    "path of PAX upwards": (_pax("data/x", path="../../y"), "another name"),
    "long path of PAX upwards": (_pax("data/x", path="../" * 60 + "y"), "upwards"),
    "empty path of PAX": (_pax("data/x", path=""), "empty name"),
    "size of PAX": (_pax("data/x", size="99"), "another size"),
    "link of PAX": (_pax("data/x", linkpath="/etc/passwd"), "linkpath"),
    "global path of PAX": (
        tarfile.TarInfo.create_pax_global_header({"path": "data/y"}) + _with(), "path",
    ),
    "duplicate member": (_with(member("data/a", b"a")), "there twice"),
    "duplicate metadata": (_with(member("./metadata.txt", b"[]")), "there twice"),
    "file and directory": (_with(member("data/a/b", b"x")), "both a file and a directory"),
    "directory and file": (_with(member("data/d/b", b"x"), member("data/d", b"x")), "both a file and a directory"),
    "case clash": (_with(member("data/A", b"x")), "differ only by the case"),
    "case clash of folders": (_with(member("data/D/b", b"x"), member("data/d/c", b"x")), "differ only by the case"),
    "form clash": (_with(member("data/\u00e9", b"x"), member("data/e\u0301", b"x")), "differ only by the case"),
    "empty name": (_raw(_put(0, bytes(100))), "empty name"),
    "folder's own name": (_raw(_put(0, b".".ljust(100, b"\0"))), "the folder itself"),
    "name of 5,000 characters": (_with(member("data/" + "x" * 5000, b"x")), "at most"),
    "part of 256 bytes": (_with(member("data/" + "x" * 256, b"x")), "at most 255"),
    "65 parts": (_with(member("/".join(["data", *["d"] * 64]), b"x")), "at most 64 parts"),
    "backslashes": (_with(member("data/..\\..\\x", b"x")), "backslashes"),
    "control character": (_with(member("data/x\ny", b"x")), "control characters"),
    "no UTF-8": (_raw(_put(5, b"\xff")), "UTF-8"),
    "directory with content": (_raw(_put(156, b"5")), "directory with content"),
    "unknown kind": (_raw(_put(156, b"Q")), "unknown kind"),
    "size that is none": (_raw(_put(124, b"zzzzzzzzzzz\0")), "size cannot be read"),
    "negative size": (_raw(_put(124, b"\xff" * 12)), "size cannot be read"),
    "size beyond the end": (_raw(_put(124, b"77777777777\0")), "cut short"),
    "mode that is none": (_raw(_put(100, b"rwxr-xr\0")), "should be a number"),
    "wrong checksum": (GOOD[:148] + b"0000000\0" + GOOD[156:], "checksum"),
    "compressed": (gzip.compress(GOOD), "gzip"),
    "compressed twice": (gzip.compress(gzip.compress(GOOD)), "gzip"),
    "concatenated": (GOOD + GOOD, "behind the end"),
    "garbage behind the end": (GOOD + b"x", "behind the end"),
    "one block of zeros": (_START + bytes(512), "cut short"),
    "zeros in the middle": (_START + bytes(512) + _with(), "one block of zeros"),
    "nothing": (b"", "empty"),
    "not a tar file": (b"hello" * 1000, "checksum"),
    "name of a member that does not come": (
        _with(member("data/" + "x" * 120, b""))[: len(_START) + 1024] + bytes(1024), "does not come",
    ),
}  # fmt: skip

#: What is wrong with metadata → them, and a word of the reason.  All of them fail at "load metadata".
BAD_METADATA: dict[str, tuple[bytes, str]] = {
    "cut": (metadata_of(FILES)[:-1], "not JSON"),
    "not UTF-8": (b'["\xff"]', "not UTF-8"),
    "NaN": (b"[NaN]", "not JSON"),
    "a member twice": (b'[{"destinationTable": "x", "destinationTable": "y"}]', "twice"),
    "too deep": (b"[" * 100_000, "nested"),
    "an object": (b"{}", "no list of objects"),
    "a list of numbers": (b"[1]", "no list of objects"),
    "no table": (json.dumps([*HEAD, {"value": 1}]).encode(), "no destinationTable"),
    "no submitter": (metadata_of(FILES, HEAD[1:]), "Transactions.submitter is missing"),
    "two projects": (metadata_of(FILES, [*HEAD, HEAD[1]]), "twice"),
    "half a surrogate pair": (
        metadata_of(FILES, [*HEAD, {"destinationTable": "TransactionKeyValue", "key": "k", "value": "\ud800"}]), "surrogate",
    ),
    "byte order mark": (b"\xef\xbb\xbf" + metadata_of(FILES), "byte order mark"),
    "a number of 5,000 digits": (b"[" + b"1" * 5000 + b"]", "too many digits"),
    "submitter of nothing": (
        metadata_of(FILES, [{"destinationTable": "Transactions.submitter", "value": None}, *HEAD[1:]]), "must be a text",
    ),
    "project without value": (metadata_of(FILES, [HEAD[0], {"destinationTable": "Transactions.project"}]), "no value"),
    "key without value": (
        metadata_of(FILES, [*HEAD, {"destinationTable": "TransactionKeyValue", "key": "k"}]), "no value",
    ),
    **{
        f"file with {name} {value!r}": (json.dumps([*HEAD, entry("empty", b"", **{name: value})]).encode(), word)
        for name, value, word in (
            ("name", None, "needs name"), ("name", "", "no name"), ("name", "a/b", "no name"), ("name", "..", "no name"),
            ("subdir", 5, "needs subdir"), ("subdir", "/abs", "must be relative"), ("subdir", "../up", "upwards"),
            ("size", -1, "needs size"), ("size", "3", "needs size"), ("size", True, "needs size"),
            ("size", 1.5, "needs size"), ("hashtype", "crc32", "no hash type"), ("hashtype", "shake_128", "no hash type"),
            ("hashsum", "xyz", "none of sha1"), ("hashsum", "md5:" + "0" * 40, "none of sha1"),
        )
    },
    "a file twice": (json.dumps([*HEAD, entry("empty", b""), entry("empty", b"")]).encode(), "there twice"),
    "a file twice for who sees no case": (
        json.dumps([*HEAD, entry("empty", b""), entry("EMPTY", b"")]).encode(), "differ only by the case",
    ),
}  # fmt: skip

#: What does not agree → the bundle, and a word of the reason.  All of them fail at "ingest files".
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "listed and missing": (bundle({"a": b"a"}, metadata_of({"a": b"a", "b": b"b"})), "b is listed"),
    "present and not listed": (bundle({"a": b"a", "b": b"b"}, metadata_of({"a": b"a"})), "data/b is in the bundle"),
    "outside data": (_with(member("README", b"x")), "README is in the bundle"),
    "another size": (bundle({"a": b"aa"}, json.dumps([*HEAD, entry("a", b"a")]).encode()), "2 bytes"),
    "another hash": (bundle({"a": b"b"}, json.dumps([*HEAD, entry("a", b"a")]).encode()), "sha1 is"),
}
