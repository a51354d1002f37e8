"""Reads the headers of a tar file that a stranger has sent: everything is checked before anything is taken from it.

Regular files and directories only, each once, under relative names that lead nowhere else.  Nothing is extracted here:
``walk`` returns where each file's bytes lie.  Formats: ustar, GNU and PAX, uncompressed.

A header that says two things is refused: names and sizes of a PAX header count only where the plain fields have no room
for them, so that no two readers can see different files.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
_ZEROS = bytes(BLOCK)

#: What a bundle may have.
MAX_MEMBERS = 1_000_000
MAX_COMPONENT, MAX_PATH, MAX_DEPTH = 255, 4096, 64
#: Bytes of a PAX header, and of a GNU long name with its end.
_MAX_PAX = 1024 * 1024

#: How compressed files begin.
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}

_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"K": "a link with a long name",
    b"S": "a sparse file",
    b"M": "a part of a file",
    b"V": "a volume label",
    b"D": "a directory of an incremental dump",
    b"N": "a long name of an old form",
}

#: PAX records that change nothing that counts here.
_HARMLESS = ("mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment")
_HARMLESS_PREFIXES = ("SCHILY.dev", "SCHILY.ino", "SCHILY.nlink", "SCHILY.xattr.", "LIBARCHIVE.")

_SET_ID = 0o6000

#: Where mode, user, group, time and the two numbers of a device stand.  Most say nothing here, but readers that cannot
#: read one of them take its header for the end.
_NUMBERS = ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345))


class BadBundle(Exception):
    """The file is no bundle; the text says why, and names the member."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file of a bundle: its name, where its bytes begin, and how many there are."""

    name: str
    offset: int
    size: int


class Walk:
    """One walk over the headers.  ``tell`` is called now and then with the share that was read, 0 to 1."""

    def __init__(self, file: BinaryIO, size: int, tell: Callable[[float], None] = lambda share: None) -> None:
        self._file = file
        self._size = size
        self._tell = tell
        self._position = 0
        self._members: dict[str, Member] = {}
        self._names = Names()
        self._long_name: bytes | None = None
        self._pax: dict[str, str] = {}
        self._count = 0

    def members(self) -> dict[str, Member]:
        """Return all files by name; ``BadBundle`` for the first thing that is not as it must be."""
        self._refuse_compressed()
        while True:
            header = self._block()
            if header == _ZEROS:
                self._check_end()
                return self._members
            self._take(header)
            self._count += 1
            if self._count % 1000 == 0:
                self._tell(self._position / max(1, self._size))

    def _refuse_compressed(self) -> None:
        start = self._file.read(8)
        self._file.seek(0)
        if not start:
            raise BadBundle("the bundle is empty")
        for magic, name in _COMPRESSED.items():
            if start.startswith(magic):
                raise BadBundle(f"the bundle is compressed ({name}); it must be a plain tar file")

    def _block(self) -> bytes:
        block = self._file.read(BLOCK)
        if len(block) < BLOCK:
            here = self._position + len(block)
            raise BadBundle(f"the bundle is cut short at byte {here}: two blocks of zeros are missing at its end")
        self._position += BLOCK
        return block

    def _check_end(self) -> None:
        if self._long_name is not None or self._pax:
            raise BadBundle("the bundle ends after the name of a member that does not come")
        if self._block() != _ZEROS:
            raise BadBundle("the bundle has one block of zeros in the middle")
        while rest := self._file.read(1024 * 1024):
            if rest.strip(b"\0"):
                raise BadBundle(f"there is something behind the end of the bundle, at byte {self._position}")
            self._position += len(rest)

    def _take(self, header: bytes) -> None:
        if not _is_whole(header):
            raise BadBundle(f"the header at byte {self._position - BLOCK} is damaged: its checksum is wrong")
        name = self._plain_name(header)
        shown = show(name)
        for start, end in _NUMBERS:
            if _number(header[start:end]) is None:
                raise BadBundle(f"{shown}: its header is damaged: what is at byte {start} of it should be a number")
        kind = header[156:157]
        size = self._size_of(header, shown)
        if kind in b"xgL" and kind:
            self._take_extension(kind, size, shown)
            return
        self._take_member(header, kind, size, name)

    def _size_of(self, header: bytes, shown: str) -> int:
        field = header[124:136]
        size = _number(field)
        if size is None or size < 0:
            raise BadBundle(f"{shown}: its size cannot be read")
        return size

    def _plain_name(self, header: bytes) -> bytes:
        name = header[:100].split(b"\0", 1)[0]
        prefix = header[345:500].split(b"\0", 1)[0]
        magic = header[257:265]
        if magic == b"ustar\x0000":
            return prefix + b"/" + name if prefix else name
        if magic not in (b"ustar  \0", bytes(8)) or header[345:500].strip(b"\0"):
            raise BadBundle(f"{show(name)}: its header is of a form that readers understand differently")
        return name

    # Headers that say something of the next one

    def _take_extension(self, kind: bytes, size: int, shown: str) -> None:
        if size > _MAX_PAX:
            raise BadBundle(f"{shown}: its header has {size} bytes, more than {_MAX_PAX}")
        data = self._read(size, shown)
        if kind == b"L":
            if self._long_name is not None or self._pax:
                raise BadBundle(f"{shown}: it has two names")
            if not data.endswith(b"\0") or b"\0" in data[:-1]:
                raise BadBundle(f"{shown}: its long name is damaged")
            self._long_name = data[:-1]
            return
        records = _records(data, shown)
        for key, value in records.items():
            allowed = key in _HARMLESS or key.startswith(_HARMLESS_PREFIXES)
            if kind == b"x" and key in ("path", "size"):
                allowed = True
            if not allowed:
                raise BadBundle(f"{shown}: its header says {show(key.encode())}, which is not accepted")
            if key == "path" and not value:
                raise BadBundle("a member has an empty name")
        if kind == b"x":
            if self._pax or self._long_name is not None:
                raise BadBundle(f"{shown}: it has two headers")
            self._pax = records

    def _read(self, size: int, shown: str) -> bytes:
        padded = -(-size // BLOCK) * BLOCK
        if self._position + padded > self._size:
            raise BadBundle(f"the bundle is cut short within {shown}")
        data = self._file.read(padded)
        if len(data) < padded:
            raise BadBundle(f"the bundle is cut short within {shown}")
        self._position += padded
        return data[:size]

    # Members

    def _take_member(self, header: bytes, kind: bytes, size: int, plain: bytes) -> None:
        name, size = self._said(plain, size)
        path = checked_path(name)
        shown = show(path.encode())
        directory = kind == b"5" or (kind in (b"\0", b"0") and name.endswith(b"/"))
        if kind in _KINDS:
            raise BadBundle(f"{shown} is {_KINDS[kind]}; only regular files and directories are accepted")
        if kind not in (b"\0", b"0", b"5"):
            raise BadBundle(f"{shown} is of the unknown kind {kind!r}; only regular files and directories are accepted")
        if name.endswith(b"/") and not directory:
            raise BadBundle(f"{shown} is a file whose name ends with a slash")
        mode = _number(header[100:108])
        if mode is None or mode < 0:
            raise BadBundle(f"{shown}: its mode cannot be read")
        if mode & (_SET_ID if not directory else 0o4000):
            raise BadBundle(f"{shown} has a set-uid or set-gid bit")
        if directory and size:
            raise BadBundle(f"{shown} is a directory with content")
        if path == "." and not directory:
            raise BadBundle("a file has the name of the folder itself")
        self._names.enter(path, directory)
        if directory:
            return
        padded = -(-size // BLOCK) * BLOCK
        if self._position + padded > self._size:
            raise BadBundle(f"the bundle is cut short within {shown}: {size} bytes are said to follow")
        self._members[path] = Member(path, self._position, size)
        self._position += padded
        self._file.seek(self._position)

    def _said(self, plain: bytes, size: int) -> tuple[bytes, int]:
        """Return the name and the size of a member, of which the headers before it may have said more."""
        name, pax = plain, self._pax
        if self._long_name is not None:
            name, self._long_name = self._long_name, None
            if not _extends(name, plain):
                raise BadBundle(f"{show(plain)}: a header before it gives it another name, {show(name)}")
        self._pax = {}
        if "path" in pax:
            name = pax["path"].encode()
            if not _extends(name, plain):
                raise BadBundle(f"{show(plain)}: its PAX header gives it another name, {show(name)}")
        if "size" in pax:
            text = pax["size"]
            if not (text.isascii() and text.isdigit() and len(text) <= 18):
                raise BadBundle(f"{show(name)}: its size cannot be read")
            if size not in (0, int(text)) or (size == 0 and 0 < int(text) < 8**11):
                raise BadBundle(f"{show(name)}: its PAX header gives it another size")
            size = int(text)
        return name, size


class Names:
    """The names that are taken: each once, also for who does not see the case of letters, and none below a file.

    A tree by parts of names, so that long names in deep folders cost no more than their parts.
    """

    def __init__(self) -> None:
        #: (folder, part for who does not see the case) → (number, part as it is written, whether it is a folder).
        self._known: dict[tuple[int, str], tuple[int, str, bool]] = {}
        self._entered: set[int] = set()

    def enter(self, path: str, directory: bool) -> None:
        """Take a name, and those of the directories that it lies in; ``BadBundle`` if that is not possible."""
        here, parts = 0, path.split("/")
        for depth, part in enumerate(parts, 1):
            here = self._see(here, part, directory or depth < len(parts), path)
        if here in self._entered:
            raise BadBundle(f"{show(path.encode())} is there twice")
        self._entered.add(here)

    def _see(self, folder: int, part: str, directory: bool, path: str) -> int:
        key = (folder, unicodedata.normalize("NFC", part).casefold())
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= MAX_MEMBERS:
                raise BadBundle(f"there are more than {MAX_MEMBERS:,} files and folders")
            known = self._known[key] = (len(self._known) + 1, part, directory)
        number, written, is_directory = known
        if written != part:
            raise BadBundle(
                f"{show(path.encode())} and another member differ only by the case, or the form, of letters: "
                f"{show(part.encode())} and {show(written.encode())}"
            )
        if is_directory != directory:
            raise BadBundle(f"{show(part.encode())} is both a file and a directory: {show(path.encode())}")
        return number


def checked_path(name: bytes) -> str:
    """Return a member's name without what means nothing; ``BadBundle`` for one that leads elsewhere or is too long."""
    shown = show(name)
    if b"\0" in name or b"\\" in name or any(byte < 32 or byte == 127 for byte in name):
        raise BadBundle(f"{shown}: a name has neither backslashes nor control characters")
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadBundle(f"{shown}: its name is not UTF-8") from error
    while text.startswith("./") and text != "./":
        text = text[2:]
    text = text[:-1] if text.endswith("/") else text
    if not text:
        raise BadBundle("a member has an empty name")
    if text == ".":
        return text
    if len(text.encode()) > MAX_PATH:
        raise BadBundle(f"{shown}: a name has at most {MAX_PATH:,} bytes")
    parts = text.split("/")
    if text.startswith("/"):
        raise BadBundle(f"{shown}: a name must be relative")
    if ".." in parts:
        raise BadBundle(f"{shown}: a name must not lead upwards")
    if "" in parts or "." in parts:
        raise BadBundle(f"{shown}: a name has no empty parts and no dots alone")
    if len(parts) > MAX_DEPTH:
        raise BadBundle(f"{shown}: a name has at most {MAX_DEPTH} parts")
    if any(len(part.encode()) > MAX_COMPONENT for part in parts):
        raise BadBundle(f"{shown}: each part of a name has at most {MAX_COMPONENT} bytes")
    return text


def show(name: bytes) -> str:
    """Return a name as it can stand in a message."""
    text = name.decode("utf-8", "backslashreplace")
    safe = "".join(one if one.isprintable() else f"\\x{ord(one):02x}" for one in text)
    return f"{safe[:200]}…" if len(safe) > 200 else safe


def _extends(name: bytes, plain: bytes) -> bool:
    """Return whether a name that stands before a header is one for which the header has no room, or the same."""
    if name.rstrip(b"/") == plain.rstrip(b"/"):
        return True
    return len(name) > 100 or not name.isascii()


def _number(field: bytes) -> int | None:
    """Read a number: octal digits, or the base of 256 that GNU has for large ones; None if it is none."""
    if field[:1] in (b"\x80", b"\xff"):
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    text = field.split(b"\0", 1)[0].strip(b" ")
    if not text:
        return 0
    if any(byte not in b"01234567" for byte in text):
        return None
    return int(text, 8)


def _is_whole(header: bytes) -> bool:
    """Return whether the sum of the bytes of a header is as it says; some writers take them for signed."""
    said = _number(header[148:156])
    blank = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(blank)
    return said == unsigned or said == unsigned - 256 * sum(byte > 127 for byte in blank)


def _records(data: bytes, shown: str) -> dict[str, str]:
    """Read the records of a PAX header: ``LENGTH KEY=VALUE\\n`` each."""
    found: dict[str, str] = {}
    position = 0
    while position < len(data):
        digits, space, _ = data[position : position + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = data[position : position + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if length < 5 or len(record) < length or not record.endswith(b"\n") or not equals or not key:
            raise BadBundle(f"{shown}: its PAX header is damaged")
        try:
            name, text = key.decode("utf-8"), value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadBundle(f"{shown}: its PAX header is not UTF-8") from error
        if name in found or "\0" in text:
            raise BadBundle(f"{shown}: its PAX header says {show(key)} twice, or not clearly")
        found[name] = text
        position += length
    return found


def walk(file: BinaryIO, size: int, tell: Callable[[float], None] = lambda share: None) -> dict[str, Member]:
    """Return the files of a bundle of ``size`` bytes, by name; ``BadBundle`` says what is wrong with it."""
    return Walk(file, size, tell).members()
