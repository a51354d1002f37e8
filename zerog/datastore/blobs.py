"""Results of any size as chunks of one length, so that a byte range is found without reading what lies before it."""

from __future__ import annotations

from collections.abc import Iterator

from zerog.datastore.base import Datastore

#: Bytes in every chunk of a blob but the last.  Larger ones hold the GIL too long in the Couchbase SDK.
CHUNK = 256 * 1024


class BlobWriter:
    """Cuts what is written into chunks of one length and stores each as soon as it is full."""

    def __init__(self, store: Datastore, blob: str) -> None:
        self.blob = blob
        self.size = 0
        self._store = store
        self._buffer = bytearray()
        self._index = 0

    def write(self, data: bytes) -> None:
        """Add bytes; at most one chunk of them is kept in memory afterwards."""
        self._buffer += data
        self.size += len(data)
        while len(self._buffer) >= CHUNK:
            self._put(CHUNK)

    def mark(self) -> BlobWriter:
        """Return a writer that stands where this one stands: what was written without counting is written again."""
        twin = BlobWriter(self._store, self.blob)
        twin.size, twin._buffer, twin._index = self.size, bytearray(self._buffer), self._index
        return twin

    def close(self) -> None:
        """Store what is left."""
        if self._buffer:
            self._put(len(self._buffer))

    def _put(self, length: int) -> None:
        self._store.put_chunk(self.blob, self._index, bytes(self._buffer[:length]))
        del self._buffer[:length]
        self._index += 1


def read_blob(store: Datastore, blob: str, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes ``start`` to ``stop`` (exclusive) of a blob, a chunk at a time."""
    position = start
    while position < stop:
        index, offset = divmod(position, CHUNK)
        piece = store.get_chunk(blob, index)[offset : offset + stop - position]
        if not piece:
            return
        yield piece
        position += len(piece)
