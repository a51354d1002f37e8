"""The datastore contract (``base``), results in chunks (``blobs``), and its adapters, which only bootstrap imports."""

from zerog.datastore.base import Datastore, Document, Entry

__all__ = ["Datastore", "Document", "Entry"]
