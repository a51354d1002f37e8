"""An agent as somebody else would write it: from docs/agents.rst, with an HTTP client and nothing of ZeroG."""

from __future__ import annotations

import secrets
from typing import Any

import httpx


class Speaker:
    """One agent that speaks HTTP; every method is one request, and returns the answer."""

    def __init__(self, client: httpx.Client, id: str, *job_types: str, **members: Any) -> None:
        self.client = client
        self.id = id
        self.instance = secrets.token_hex(8)
        self.members = {"id": id, "jobTypes": list(job_types), **members}

    def hear(self, *assignments: dict[str, Any], **more: Any) -> httpx.Response:
        """Register, or give a sign of life, with what it has of these assignments."""
        listed = [{"uuid": one["uuid"], "attempt": one["attempt"]} for one in assignments]
        body = {**self.members, "instance": self.instance, "assignments": listed, **more}
        return self.client.post("/agents", json=body)

    def begin_anew(self) -> None:
        """Forget everything, as a process that was killed and started again."""
        self.instance = secrets.token_hex(8)

    def take(self, wait: int | None = None) -> dict[str, Any] | None:
        """Ask for an assignment; None if there is none."""
        headers = {} if wait is None else {"Prefer": f"wait={wait}"}
        answer = self.client.post(f"/agents/{self.id}/assignments", json={}, headers=headers)
        assert answer.status_code in (201, 204), answer.text
        return answer.json() if answer.status_code == 201 else None

    def report(self, given: dict[str, Any], **members: Any) -> httpx.Response:
        """Say how an attempt goes."""
        return self.client.post(given["href"], json=members)

    def end(self, given: dict[str, Any], outcome: str = "succeeded", **members: Any) -> httpx.Response:
        """Say what an attempt came to."""
        return self.client.post(f"{given['href']}/outcome", json={"outcome": outcome, **members})

    def commands(self, after: int = 0, prefer: str | None = None) -> list[dict[str, Any]]:
        """Fetch commands."""
        headers = {} if prefer is None else {"Prefer": prefer}
        answer = self.client.get(f"/agents/{self.id}/commands", params={"after": after}, headers=headers)
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["items"]
        return found

    def acknowledge(self, number: int, state: str = "applied", message: str | None = None) -> httpx.Response:
        """Say what became of a command."""
        return self.client.post(f"/agents/{self.id}/commands/{number}", json={"state": state, "message": message})
