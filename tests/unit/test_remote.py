"""What an agent that speaks HTTP alone says of its attempts, before any of it is sent."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from workers.examples.jobs import Noop
from zerog.clock import Clock
from zerog.exceptions import StoreUnavailable
from zerog.leases import LeaseWatch
from zerog.manager import Claimant, Held
from zerog.registry import Registry
from zerog.remote import Assigned, Masters, Remote

UUID = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def remote() -> Remote:
    """One whose masters nobody asks."""
    return Remote(Masters(("http://127.0.0.1:9",), None, None), Registry([Noop]), Clock(), "one", 1.0)


def begin(remote: Remote, attempt: int) -> Held:
    view = {
        "uuid": UUID, "attempt": attempt, "jobType": "noop", "parameters": {}, "limits": None, "state": None,
        "lease": 3.0, "parents": [],
    }  # fmt: skip
    entry = Assigned(UUID.encode(), view, lambda _: None)
    return remote.claim(UUID, Claimant("one", "one"), "", LeaseWatch(remote.clock, 3.0), entry).held


def reported(remote: Remote, held: Held, dropped: int) -> dict[str, Any]:
    """Return the report of an attempt that has said something, of which so many entries were dropped so far."""
    attempt = held.record.attempt
    entry = {"level": "event", "message": "m", "at": "2026-01-01T00:00:00.000Z"}
    remote.append_events(
        UUID, {"attempt": attempt, "batch": 1, "entries": [entry], "dropped": {"events": dropped, "bytes": dropped}}
    )
    _, flight = remote.gather(lambda: remote.report(held, attempt))
    assert flight is not None
    (promise,) = flight.reports
    promise.keep({"cancelling": False})
    body: dict[str, Any] = json.loads(promise.body)
    return body


@pytest.mark.requirement("M8")
def test_what_a_lost_attempt_had_dropped_is_not_held_against_the_next_one(remote: Remote) -> None:
    first = begin(remote, 1)
    assert reported(remote, first, 500)["dropped"]["events"] == 500
    assert reported(remote, first, 700)["dropped"]["events"] == 200, "since the last time"
    second = begin(remote, 2)  # nobody was told how the first one ended
    assert reported(remote, second, 3)["dropped"]["events"] == 3


@pytest.mark.requirement("M2")
def test_an_answer_that_no_master_gave_is_taken_for_none() -> None:
    class Portal(BaseHTTPRequestHandler):
        """What some networks put before everything."""

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>please log in</html>")

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Portal) as portal:
        answering = threading.Thread(target=portal.handle_request)
        answering.start()
        masters = Masters((f"http://127.0.0.1:{portal.server_port}",), None, None)
        with pytest.raises(StoreUnavailable):
            Remote(masters, Registry([Noop]), Clock(), "one", 5.0).wanted("one")
        answering.join(10)
