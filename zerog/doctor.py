"""``zerog doctor``: checks settings, store and queue, and says what is unsafe."""

from __future__ import annotations

import platform
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import tornado

import zerog
from zerog import bootstrap
from zerog.config import Settings
from zerog.exceptions import ZerogError
from zerog.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was checked: ``level`` is ok, warning or broken."""

    level: str
    what: str
    text: str

    def view(self) -> dict[str, str]:
        """Return it as JSON."""
        return {"level": self.level, "what": self.what, "text": self.text}


def examine(settings: Settings) -> list[Finding]:
    """Check everything that can be checked from here; nothing is changed in the store."""
    return [*_versions(), *_settings(settings), *_parts(settings)]


def _versions() -> Iterator[Finding]:
    versions = f"zerog {zerog.__version__}, Python {platform.python_version()}, Tornado {tornado.version}"
    yield Finding("ok", "versions", f"{versions}, {platform.system()} {platform.release()} on {socket.gethostname()}")


def _settings(settings: Settings) -> Iterator[Finding]:
    for warning in settings.warnings:
        yield Finding("warning", "settings", warning)
    if settings.sweep > 10 * settings.lease:
        yield Finding("warning", "sweep", "it is much longer than the lease, so lost jobs wait long")


def _parts(settings: Settings) -> Iterator[Finding]:
    try:
        parts = bootstrap.assemble(settings)
    except ZerogError as error:
        yield Finding("broken", "settings", str(error))
        return
    yield Finding("ok", "applications", f"{len(parts.registry.names)} job types: {', '.join(parts.registry.names)}")
    try:
        yield from _probe_store(parts)
        yield from _who_may(parts)
        yield from _probe_queue(parts)
    finally:
        parts.store.close()


def _probe_store(parts: bootstrap.Parts) -> Iterator[Finding]:
    try:
        parts.store.probe()
    except ZerogError as error:
        yield Finding("broken", "datastore", str(error))
        return
    yield Finding("ok", "datastore", "it answers")
    for warning in parts.store.warnings():
        yield Finding("warning", "datastore", warning)


def _who_may(parts: bootstrap.Parts) -> Iterator[Finding]:
    from zerog.server.address import is_loopback

    settings = parts.settings
    tokens = Tokens(parts.store, parts.clock)
    try:
        tokens.look()
    except ZerogError:
        return  # the store does not answer, which is said already
    if tokens.on:
        yield Finding("ok", "tokens", "they are on")
        if settings.tls_certificate is None and not is_loopback(settings.address):
            yield Finding("warning", "tokens", "they travel in clear text: tls_certificate and tls_key are not set")
    elif not is_loopback(settings.address):
        level = "warning" if settings.insecure else "broken"
        yield Finding(level, "address", f"{settings.address} can be reached by others, and there are no tokens")


def _probe_queue(parts: bootstrap.Parts) -> Iterator[Finding]:
    queue = parts.open_queue()
    try:
        queue.identity()
        yield Finding("ok", "queue", "it answers")
        for warning in queue.warnings():
            yield Finding("warning", "queue", warning)
    except ZerogError as error:
        yield Finding("broken", "queue", str(error))
    finally:
        queue.close()
