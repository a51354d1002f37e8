"""Tokens: who may do what.

They are on once one was created in the store, and stay on, also when all are revoked.  All stand in one document,
which every server looks at once a second; of a token's secret only a digest is kept.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zerog import codec
from zerog.clock import Clock, from_iso, to_iso
from zerog.datastore.base import Documents
from zerog.exceptions import BadSetting, CorruptDocument, NotFound, StoreUnavailable, UnknownToken

logger = logging.getLogger(__name__)

#: Role → what it allows.  No other than admin implies another; a token may have several.
ROLES = {
    "read": "everything that is got with GET",
    "submit": "submit jobs, and write into pipelines",
    "operate": "cancel, retry, pause, change and prune jobs, command agents",
    "agent": "what an agent sends",
    "proxy": "speak for the user that a header names",
    "admin": "everything",
}

_KEY = "tokens"
#: Tokens that can be there: they stand in one document.
_MOST = 1000


@dataclass(frozen=True, slots=True)
class Token:
    """Who holds a token: its roles, and the job types that it is limited to (none: not limited)."""

    id: str
    name: str
    roles: tuple[str, ...]
    types: tuple[str, ...]
    created_at: float

    def may(self, role: str) -> bool:
        """Return whether the token has a role."""
        return role in self.roles or "admin" in self.roles

    def sees(self, job_type: str) -> bool:
        """Return whether jobs of a type exist for it."""
        return not self.types or job_type in self.types

    def view(self) -> dict[str, Any]:
        """Return it as JSON, which has no secret."""
        return {
            "id": self.id,
            "name": self.name,
            "roles": list(self.roles),
            "types": list(self.types),
            "createdAt": to_iso(self.created_at),
        }


class Tokens:
    """The tokens in the store, and what this process last saw of them.  Safe to use from many threads."""

    def __init__(self, documents: Documents, clock: Clock) -> None:
        self._documents = documents
        self._clock = clock
        #: Digest → token; None until the store has said whether there are any.
        self._known: dict[str, Token] | None = None
        self._on = False

    # Who asks

    @property
    def on(self) -> bool:
        """Whether only holders of tokens are served; ``StoreUnavailable`` while that is not known yet."""
        if self._known is None:
            raise StoreUnavailable("the store has not said yet whether there are tokens")
        return self._on

    @property
    def known_on(self) -> bool:
        """Whether tokens are on as far as is known."""
        return self._on

    def holder(self, text: str) -> Token | None:
        """Return whose token this is; None if it is nobody's."""
        return (self._known or {}).get(_digest(text))

    def look(self) -> None:
        """Read what the store has now; what is known stays known while it is away."""
        found = self._read()
        # In this order: another thread must never see them on with the tokens of before, which are none.
        self._known = found or {}
        if found is not None and not self._on:
            self._on = True
            logger.info("tokens are on")

    # Keeping them

    def create(self, name: str, roles: Sequence[str], types: Sequence[str] = ()) -> tuple[Token, str]:
        """Make a token; returns it and its secret, which nothing can tell again."""
        for role in roles:
            if role not in ROLES:
                raise BadSetting(f"there is no role {role!r}, only {', '.join(ROLES)}")
        if not roles:
            raise BadSetting(f"a token needs a role: {', '.join(ROLES)}")
        if not 1 <= len(name) <= 100 or codec.printable(name, 100) != name:
            raise BadSetting("a token needs a name of 1 to 100 printable characters")
        secret = f"zerog_{secrets.token_urlsafe(32)}"
        token = Token(
            secrets.token_hex(6), name, tuple(dict.fromkeys(roles)), tuple(dict.fromkeys(types)), self._clock.now()
        )

        def add(tokens: dict[str, Token]) -> None:
            if len(tokens) >= _MOST:
                raise BadSetting(f"there are {_MOST} tokens already: revoke some")
            tokens[_digest(secret)] = token

        self._change(add)
        return token, secret

    def revoke(self, token_id: str) -> Token:
        """Take a token back; ``UnknownToken`` if there is none with this id."""
        revoked: list[Token] = []

        def remove(tokens: dict[str, Token]) -> None:
            found = next((digest for digest, one in tokens.items() if one.id == token_id), None)
            if found is not None:
                revoked.append(tokens.pop(found))
            elif not revoked:  # else an earlier try of this very call has done it
                raise UnknownToken(f"there is no token with the id {codec.printable(token_id, 100)!r}")

        self._change(remove)
        return revoked[0]

    def all(self) -> list[Token]:
        """Return all tokens, the oldest first."""
        return sorted((self._read() or {}).values(), key=lambda one: one.created_at)

    def _read(self) -> dict[str, Token] | None:
        """Return the tokens by digest; None as long as there were never any."""
        try:
            return _tokens(self._documents.get(_KEY).body)
        except NotFound:
            return None

    def _change(self, change: Callable[[dict[str, Token]], None]) -> None:
        def changed(body: bytes | None) -> bytes:
            tokens = _tokens(body) if body is not None else {}
            change(tokens)
            return codec.dumps({"tokens": {digest: one.view() for digest, one in tokens.items()}})

        self._documents.change(_KEY, changed)


def _tokens(body: bytes) -> dict[str, Token]:
    try:
        return {
            digest: Token(one["id"], one["name"], tuple(one["roles"]), tuple(one["types"]), from_iso(one["createdAt"]))
            for digest, one in codec.loads(body)["tokens"].items()
        }
    except (CorruptDocument, KeyError, TypeError, ValueError) as error:
        raise StoreUnavailable(f"the tokens in the store cannot be read: {error}") from error


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
