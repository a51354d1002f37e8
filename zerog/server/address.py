"""Where a server listens: the address, the names that it answers for, TLS, and the refusal to be open to others."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Sequence

from tornado.netutil import bind_sockets

from zerog.exceptions import BadSetting, StoreUnavailable
from zerog.tokens import Tokens

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def check_address(address: str, insecure: bool, source: str, tokens: Tokens) -> None:
    """Refuse to be reachable from elsewhere while everyone may do everything."""
    if insecure or is_loopback(address):
        return
    try:
        tokens.look()
        closed = tokens.on
    except StoreUnavailable as error:
        raise BadSetting(
            f"address ({source}) is {address!r}, which others can reach, and whether there are tokens is not known: "
            f"{error}"
        ) from error
    if not closed:
        raise BadSetting(
            f"address ({source}) is {address!r}, which others can reach, and there are no tokens: whoever reaches the "
            "server may run jobs; make one with 'zerog token create', or give --insecure if that is what you want"
        )


def read_tls(certificate: str | None, key: str | None, source: str) -> ssl.SSLContext | None:
    """Return what the server shows to its clients; None without ``certificate``; ``BadSetting`` if it is not usable."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise BadSetting(f"tls_certificate and tls_key ({source}) belong together: one of them is missing")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BadSetting(f"tls_certificate, tls_key ({source}): {certificate}, {key}: {why}") from error
    return context


def is_loopback(address: str) -> bool:
    """Return whether an address is of this machine alone."""
    if address.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def hosts(address: str, allowed: Sequence[str] | None) -> frozenset[str]:
    """Return the Host names that the server answers for."""
    if allowed is not None:
        return frozenset(name.lower().strip("[]") for name in allowed)
    names = {*LOOPBACK_NAMES, address.lower()}
    if not is_loopback(address):
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    return frozenset(names)


def bind(address: str, port: int) -> list[socket.socket]:
    """Return listening sockets; ``BadSetting`` if that is not possible."""
    try:
        return bind_sockets(port, address)
    except OSError as error:
        raise BadSetting(f"cannot listen on {address}:{port}: {error.strerror}") from error
