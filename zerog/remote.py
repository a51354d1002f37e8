"""Remote: what an agent asks of a Manager and a Master, over HTTP alone.

The agent is the same; only its way is another one.  ``Remote`` has the verbs of the Manager that an agent uses and
those of the Master, ``Assignments`` and ``Orders`` stand where its connections to the queue would be: each is a thread
that waits for one answer at a time, since a waiting request must not hold up the others.  Any master does for any
request; they are tried in turn. ::

    reserve, claim      POST /agents/{id}/assignments          one request: the master claims (R16)
    report, renew       POST /jobs/{uuid}/attempts/{n}
    output              PUT  /jobs/{uuid}/attempts/{n}/data    in pieces, each kept when it is answered
    settle              POST /jobs/{uuid}/attempts/{n}/outcome
    all of these        POST /agents/{id}/turns                what one turn of the loop says, and what is next
    hear                POST /agents                           sign of life, talkback
    commands            GET  /agents/{id}/commands?after=N     a waiting request
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast
from urllib.parse import quote, urlsplit

from zerog import codec
from zerog.client.api import error_of
from zerog.clock import Clock, from_iso
from zerog.exceptions import (
    AlreadyFinished,
    BadSetting,
    BodyTooLarge,
    CorruptDocument,
    QueueError,
    RequestError,
    StoreUnavailable,
    Superseded,
    UnknownAgent,
    UnknownResource,
    ZerogError,
)
from zerog.fleet import AgentRecord
from zerog.leases import LeaseWatch
from zerog.manager import Claimant, Claimed, Held
from zerog.master import Heard, Registration
from zerog.needs import NOTHING, UNSAID, Needs
from zerog.orders import Command, Wanted
from zerog.outcome import Cancelled, Crashed, Failed, GivenBack, Outcome, Requeued, Succeeded
from zerog.queue.base import PENDING, Pending, Put, Queue, Reservation, TubeStats
from zerog.record import JobRecord, Lease, State
from zerog.registry import Registry

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds for which a waiting request asks the master to wait, and that its answer may take beyond that.
_WAIT, _BEYOND = 20, 10.0
#: Seconds between two tries: the first pause, and the longest.
_PAUSE, _LONGEST = 0.1, 5.0
#: Bytes of a piece of data; the last one is smaller.
_PIECE = 1024 * 1024
#: Characters of messages that go along with a report, and numbers that the parts of a batch may have.
_WITH_IT, _PARTS = 64 * 1024, 1000
#: Attempts of which it is known what they have said; of those that were lost nobody says that they are over.
_ATTEMPTS = 10_000


class Wire:
    """One connection at a time to one of some masters, kept open.  Belongs to one thread."""

    def __init__(self, masters: Masters, timeout: float) -> None:
        self._masters = masters
        self._timeout = timeout
        self._connection: http.client.HTTPConnection | None = None
        self._master = -1

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> tuple[int, bytes]:
        """Send a request and return status and body; ``StoreUnavailable`` if no answer came.

        A connection that the master closed while it was idle is made anew once.
        """
        for attempt in (1, 2):
            fresh = self._connection is None
            try:
                return self._ask_once(method, path, body, headers or {}, timeout or self._timeout)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.close()
                if fresh or attempt == 2 or isinstance(error, TimeoutError):
                    self._masters.failed(self._master)
                    raise StoreUnavailable(f"no master answers: {type(error).__name__}: {error}") from error
        raise AssertionError("unreachable")

    def _ask_once(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout: float
    ) -> tuple[int, bytes]:
        if self._connection is None or self._master != self._masters.chosen:
            self.close()
            self._master = self._masters.chosen
            self._connection = self._masters.connect(self._master, timeout)
        connection = self._connection
        connection.timeout = timeout
        if connection.sock is not None:
            connection.sock.settimeout(timeout)
        connection.request(
            method, self._masters.prefix(self._master) + path, body, self._masters.headers(body, headers)
        )
        response = connection.getresponse()
        content = response.read()
        if response.will_close:
            self.close()
        return response.status, content

    def close(self) -> None:
        """Close the connection.  May be called twice, and from another thread to end a wait."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(OSError):
                connection.close()


class Masters:
    """The masters of an agent, and which of them it speaks to.  Safe to use from many threads."""

    def __init__(self, urls: Sequence[str], token: str | None, ca: str | None) -> None:
        self._urls = [urlsplit(url.rstrip("/")) for url in urls]
        for url, parts in zip(urls, self._urls, strict=True):
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise BadSetting(f"master is {url!r}; it must be URLs that start with http:// or https://")
        self._token = token
        self._tls: ssl.SSLContext | None = None
        if any(parts.scheme == "https" for parts in self._urls):
            try:
                self._tls = ssl.create_default_context(cafile=ca or os.environ.get("ZEROG_CA"))
            except OSError as error:
                raise BadSetting(f"the certificates in {ca}: {error}") from error
        self.chosen = 0
        self._lock = threading.Lock()

    def failed(self, master: int) -> None:
        """Go on with the next one, unless somebody else has."""
        with self._lock:
            if master == self.chosen:
                self.chosen = (self.chosen + 1) % len(self._urls)

    def prefix(self, master: int) -> str:
        """Return the path that stands before all others of a master."""
        return self._urls[master].path

    def connect(self, master: int, timeout: float) -> http.client.HTTPConnection:
        """Return a connection that is made at its first request."""
        parts = self._urls[master]
        host = parts.hostname or ""
        if parts.scheme == "https":
            assert self._tls is not None
            return http.client.HTTPSConnection(host, parts.port, timeout=timeout, context=self._tls)
        return http.client.HTTPConnection(host, parts.port, timeout=timeout)

    def headers(self, body: bytes | None, more: Mapping[str, str]) -> dict[str, str]:
        """Return the headers of a request."""
        sent = {"Accept": "application/json, */*;q=0.5", **more}
        if body is not None:
            sent.setdefault("Content-Type", "application/json")
        if self._token:
            sent["Authorization"] = f"Bearer {self._token}"
        return sent


@dataclass(slots=True)
class _Talk:
    """What one thread has of the wire."""

    masters: Masters
    timeout: float
    local: threading.local = field(default_factory=threading.local)

    def ask(self, *arguments: Any, **more: Any) -> tuple[int, bytes]:
        wire: Wire | None = getattr(self.local, "wire", None)
        if wire is None:
            wire = self.local.wire = Wire(self.masters, self.timeout)
        return wire.ask(*arguments, **more)


class Promise:
    """What an agent gets from ``report`` and ``settle`` inside a step: its ``record`` is known when the step is over.

    Then it is as good as the ``Held`` of a Manager; or reading it raises what was wrong.
    """

    def __init__(self, body: bytes, known: Callable[[Mapping[str, Any]], JobRecord]) -> None:
        self.body = body
        self._known = known
        self._record: JobRecord | None = None
        self._error: ZerogError | None = None

    @property
    def record(self) -> JobRecord:
        """The job's record, as far as the agent knows it."""
        if self._error is not None:
            raise self._error
        assert self._record is not None, "not before the step is over"
        return self._record

    def keep(self, view: Mapping[str, Any]) -> None:
        """Let it come true."""
        self._record = self._known(view)

    def fail(self, error: ZerogError) -> None:
        """Let it be broken."""
        self._error = error


@dataclass(slots=True)
class Flight:
    """What some steps want to say: requests that come first, how attempts go, and how they ended."""

    first: list[Callable[[], None]] = field(default_factory=list)
    reports: list[Promise] = field(default_factory=list)
    outcomes: list[Promise] = field(default_factory=list)
    #: How many jobs the agent would take that are ready now.
    want: int = 0

    def __bool__(self) -> bool:
        return bool(self.first or self.reports or self.outcomes)

    def add(self, other: Flight) -> None:
        """Take along what another step wants to say."""
        self.first += other.first
        self.reports += other.reports
        self.outcomes += other.outcomes


class Store:
    """What of a datastore an agent asks that has none: whether it is there."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def probe(self) -> None:
        """Return if a master answers now and its store does; else ``StoreUnavailable``."""
        status, _ = self._remote.talk.ask("GET", "/readyz")
        if status != 200:
            raise StoreUnavailable(f"the master is not ready: {status}")


class Remote:
    """The Manager and the Master of an agent that speaks HTTP alone.  Safe to use from many threads."""

    def __init__(self, masters: Masters, registry: Registry, clock: Clock, agent: str, timeout: float) -> None:
        self.masters = masters
        self.registry = registry
        self.clock = clock
        self.agent = agent
        self.talk = _Talk(masters, timeout)
        self.store = Store(self)
        #: Nothing of it is away but the masters: then its store is.
        self.queue_away = False
        self.paused: frozenset[str] = frozenset()
        self.needs_in_use: Mapping[str, tuple[Needs, ...]] = {}
        self.ended_parents: deque[tuple[str, float]] = deque()
        #: Whether the agent takes jobs, and what it was given and no slot has asked for yet.
        self.takes = True
        self.ready: deque[Mapping[str, Any]] = deque()
        #: When the last of it came, on the monotonic clock; and whether there was as much as the agent wanted.
        self.ready_at = 0.0
        self.plenty = False
        self.polls: list[Assignments] = []
        self._flight: Flight | None = None
        #: How often the agent was new to the masters.
        self.anew = 0
        #: What attempts have said, and what of it was dropped, by job and attempt.
        self._said: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
        self._dropped: dict[tuple[str, int], dict[str, int]] = {}
        self._acknowledged = 0

    # Requests

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        content = None if body is None else codec.dumps(body)
        status, answer = self.talk.ask(method, path, content)
        self.check(status, answer)
        return status, _read(answer) if answer else {}

    @staticmethod
    def check(status: int, content: bytes) -> None:
        """Raise what an answer says that went wrong, in the words of a Manager."""
        if status < 400:
            return
        try:
            problem = json.loads(content)
            error = error_of({"status": status, **problem})
        except (ValueError, KeyError, TypeError):
            raise StoreUnavailable(f"the master answered {status}") from None
        if isinstance(error, UnknownAgent):
            raise error
        if isinstance(error, (AlreadyFinished, UnknownResource, Superseded)):
            raise Superseded(error.detail)
        if status >= 500 or status in (401, 403, 429):
            raise StoreUnavailable(f"the master answered {status}: {error.detail}")
        raise error

    def gather(self, step: Callable[[], T]) -> tuple[T, Flight | None]:
        """Do a step; returns what it returned, and what it wants to say, if anything.  No request is sent."""
        flight = self._flight = Flight()
        try:
            return step(), flight if flight else None
        finally:
            self._flight = None

    def send(self, flight: Flight) -> None:
        """Send what some steps want to say, and ask for what is next; waits for a master, and is no part of the loop.

        What the steps got from ``report`` and ``settle`` is known when this returns.  ``StoreUnavailable`` if no master
        takes it: then every step is to be done again.
        """
        for request in flight.first:
            request()
        if not flight.reports and not flight.outcomes:
            return
        body = b'{"reports":[%s],"outcomes":[%s],"want":%d}' % (
            b",".join(one.body for one in flight.reports),
            b",".join(one.body for one in flight.outcomes),
            want := flight.want if self.takes else 0,
        )
        status, content = self.talk.ask("POST", f"/agents/{quote(self.agent, safe='')}/turns", body)
        try:
            self.check(status, content)
        except RequestError as error:
            self._send_apart(flight, error)
            return
        view = _read(content)
        # Before anything can go wrong with what follows: they are the agent's now.
        self.ready.extend(view["assignments"])
        if view["assignments"]:
            self.ready_at = self.clock.monotonic()
        if want:
            self.plenty = len(view["assignments"]) >= want
        for poll in self.polls:
            poll.offer()
        for name, promises in (("reports", flight.reports), ("outcomes", flight.outcomes)):
            for promise, verdict in zip(promises, view[name], strict=True):
                self._keep(promise, verdict)

    def _send_apart(self, flight: Flight, error: ZerogError) -> None:
        """Send each thing that was refused together with others by itself: only what is wrong is to suffer."""
        together = [Flight(reports=[one]) for one in flight.reports] + [
            Flight(outcomes=[one]) for one in flight.outcomes
        ]
        if len(together) == 1:
            for promise in (*flight.reports, *flight.outcomes):
                promise.fail(error)
            return
        for one in together:
            self.send(one)

    def _keep(self, promise: Promise, verdict: Mapping[str, Any]) -> None:
        """Let a promise come true, or say what is wrong with it; raises what concerns all."""
        try:
            if verdict["status"] >= 400:
                self.check(verdict["status"], codec.dumps(verdict))
            promise.keep(verdict)
        except StoreUnavailable:
            raise
        except ZerogError as error:
            promise.fail(error)

    # What a Manager does

    def tube(self, job_type: str) -> str:
        """Return a name for what is reserved: the master knows the tubes."""
        return job_type

    def agent_tube(self, agent: str) -> str:
        """Return a name for where the agent is told things."""
        return agent

    def needs_of(self, job_type: str) -> tuple[Needs, ...]:
        """Return nothing: the master counts what there is room for."""
        return ()

    def tubes_within(self, job_types: Iterable[str], room: Any, labels: Iterable[str]) -> list[str]:
        """Return a name for all that the agent is given."""
        return ["assignments"]

    def read_many(self, uuids: Sequence[str]) -> dict[str, Held]:
        """Return nothing: what others write into records the agent is told."""
        return {}

    def claim(
        self, uuid: str, agent: Claimant, claim: str, watch: LeaseWatch, entry: Reservation | None = None
    ) -> Claimed:
        """Take up what the master has claimed."""
        assert isinstance(entry, Assigned)
        entry.taken = True
        for known in (self._said, self._dropped):
            for lost in [key for key in known if key[0] == uuid] + list(known)[:-_ATTEMPTS]:
                known.pop(lost, None)
        return Claimed(Held(entry.record(agent.id, claim, self.clock.now()), 0))

    def confirm(self, held: Held, attempt: int) -> None:
        """Do nothing: every write is checked by the master."""

    @property
    def shares_commits(self) -> bool:
        """Whether what was said in a request that failed is not there: it is said again under the same number."""
        return True

    def append_events(self, uuid: str, batch: Mapping[str, Any]) -> int:
        """Keep what an attempt says for its next report."""
        self._said.setdefault((uuid, batch["attempt"]), []).append(batch)
        return 0

    def drop_events(self, uuid: str, number: int, keep: int = 0) -> None:
        """Do nothing: the master keeps the caps."""

    def _say(self, uuid: str, attempt: int) -> dict[str, Any]:
        """Let go what an attempt has said, but for the last batch, which is returned as members of a report."""
        batches = self._said.pop((uuid, attempt), [])
        if not batches:
            return {}
        total = batches[-1]["dropped"]
        known = self._dropped.get((uuid, attempt), {"events": 0, "bytes": 0})
        dropped = {name: total[name] - known[name] for name in known}
        flight = self._in_flight
        for batch in batches[:-1]:
            flight.first.append(partial(self._send, uuid, attempt, batch["batch"] * _PARTS, _events(batch)))
        events = _events(batches[-1])
        if sum(len(one["message"]) for one in events) > _WITH_IT:
            flight.first.append(partial(self._send, uuid, attempt, batches[-1]["batch"] * _PARTS, events))
            events = []
        # A number of its own: it may be that those before it were written, and this one was not.
        return {"events": events, "batch": batches[-1]["batch"] * _PARTS + _PARTS - 1, "dropped": dropped}

    def _send(self, uuid: str, attempt: int, number: int, events: Sequence[Mapping[str, Any]]) -> None:
        """Send events under a number; in two parts if they are too much for one request."""
        try:
            if events:
                self._json("POST", _attempt(uuid, attempt), {"events": list(events), "batch": number})
        except BodyTooLarge:
            if len(events) == 1:
                return  # one message that is longer than any request may be
            # As the nodes of a heap are numbered, so that each part has a number of its own within its batch.
            batch, part = divmod(number, _PARTS)
            half = len(events) // 2
            self._send(uuid, attempt, batch * _PARTS + 2 * part + 1, events[:half])
            self._send(uuid, attempt, batch * _PARTS + 2 * part + 2, events[half:])

    def _said_all(self, uuid: str, attempt: int, spoken: Mapping[str, Any]) -> None:
        """Note that what was said has been heard."""
        if spoken:
            known = self._dropped.get((uuid, attempt), {"events": 0, "bytes": 0})
            self._dropped[uuid, attempt] = {name: known[name] + spoken["dropped"][name] for name in known}

    def report(
        self,
        held: Held,
        attempt: int,
        completeness: float | None = None,
        message: str | None = None,
        state: tuple[Any, ...] = (),
    ) -> Held:
        """Report how an attempt goes, which also renews its lease; what it returns is known after the step."""
        record = held.record
        spoken = self._say(record.uuid, attempt)
        body = {"uuid": record.uuid, "attempt": attempt, **_progress(spoken, completeness, message)}
        if state:
            body["checkpoint"] = state[0]

        def known(view: Mapping[str, Any]) -> JobRecord:
            self._said_all(record.uuid, attempt, spoken)
            return record.evolve(cancel_requested=bool(view["cancelling"]))

        return self._promise(codec.dumps(body), known, "reports")

    def settle(
        self,
        held: Held,
        attempt: int,
        outcome: Outcome,
        told: bool = False,
        completeness: float | None = None,
        message: str | None = None,
    ) -> Held:
        """Say what an attempt came to; once more is the same.  What it returns is known after the step."""
        record = held.record
        spoken = self._say(record.uuid, attempt)
        body = {
            "uuid": record.uuid,
            "attempt": attempt,
            **_progress(spoken, completeness, message),
            **_outcome(outcome),
        }
        if told:
            body["told"] = True
        content = codec.dumps(body)
        data = outcome.data if isinstance(outcome, Succeeded) else None
        if data is not None and data.inline is not None:
            inline = data.inline.encode()
            if _fits(inline):
                content = content[:-1] + b',"data":' + inline + b"}"
            else:
                writer = self.open_output(record.uuid, attempt, "application/json")
                writer.write(inline)
                writer.close()

        def known(view: Mapping[str, Any]) -> JobRecord:
            self._dropped.pop((record.uuid, attempt), None)
            return record.evolve(
                state=State(view["state"]), result_code=view["resultCode"], message=view["message"], lease=None
            )

        return self._promise(content, known, "outcomes")

    def _promise(self, body: bytes, known: Callable[[Mapping[str, Any]], JobRecord], among: str) -> Held:
        promise = Promise(body, known)
        getattr(self._in_flight, among).append(promise)
        return cast(Held, promise)

    @property
    def _in_flight(self) -> Flight:
        assert self._flight is not None, "only inside a step"
        return self._flight

    def open_output(self, uuid: str, attempt: int, media_type: str) -> Pieces:
        """Return a writer for the output of an attempt."""
        return Pieces(self, uuid, attempt, media_type)

    def upload(self, path: str, data: bytes, headers: Mapping[str, str]) -> None:
        """Let a piece of data go, before what the step says."""
        self._in_flight.first.append(lambda: self.check(*self.talk.ask("PUT", path, data, headers)))

    def answered(self, record: JobRecord, question: Mapping[str, Any]) -> Callable[[], dict[str, Any] | bytes]:
        """Return what gives, after the step, the answer to what a running job asks."""
        asked = {"question": question["t"]}
        for name in ("uuid", "start", "topic", "key", "verb", "cas", "write"):
            if question.get(name) is not None:
                asked[name] = question[name]
        if question.get("value") is not None:
            asked["value"] = json.loads(question["value"])
        path = f"{_attempt(record.uuid, record.attempt)}/questions"
        found: list[dict[str, Any] | bytes] = []

        def ask() -> None:
            status, content = self.talk.ask("POST", path, codec.dumps(asked))
            self.check(status, content)
            if question["t"] == "read" and not content.startswith(b'{"error"'):
                found.append(content)
            else:
                found.append({"t": "answer", "number": question["number"], **json.loads(content)})

        self._in_flight.first.append(ask)
        return lambda: found[0]

    def return_ready(self) -> None:
        """Give back all that no slot has asked for."""
        views = []
        while self.ready:
            views.append(self.ready.popleft())
        if views:
            self.return_unbegun(views)

    def return_unbegun(self, views: Sequence[Mapping[str, Any]]) -> None:
        """Give back assignments of which nothing was begun.  Waits for no master."""
        outcomes = []
        for view in views:
            logger.info("gives back job=%s attempt=%d, not begun", view["uuid"], view["attempt"])
            said = {"outcome": "givenBack", "started": False}
            outcomes.append(Promise(codec.dumps({"uuid": view["uuid"], "attempt": view["attempt"], **said}), _nobodys))
        flight = Flight(outcomes=outcomes)
        threading.Thread(target=quietly, args=(lambda: self.send(flight),), daemon=True).start()

    def close_queue(self) -> None:
        """Do nothing: there is none."""

    # What a Master does

    def hear(self, news: Registration) -> Heard:
        """Say that the agent lives, what it has and what it answers for."""
        for exception in news.exceptions:
            self._complain(news.id, exception)
        status, view = self._json("POST", "/agents", _registration(news))
        if status == 201:
            self._acknowledged = 0  # its commands are counted from one again
            self.anew += 1
        pending = tuple(_command(one) for one in view["talkback"])
        record = AgentRecord(
            news.id, news.instance or "", "", "", (), self.clock.now(), heartbeat=view["heartbeat"], direct=False
        )
        superseded = tuple((one["uuid"], one["attempt"]) for one in view["superseded"])
        return Heard(record, status == 201, _wanted(view, pending), superseded)

    def _complain(self, id: str, exception: Mapping[str, Any]) -> None:
        said = {name: exception.get(name) for name in ("type", "message", "traceback", "uuid")}
        try:
            self._json("POST", f"/agents/{quote(id, safe='')}/exceptions", said)
        except UnknownAgent:
            return  # it is said before the first registration, or after its end

    def wanted(self, id: str) -> Wanted:
        """Return what is wanted of the agent."""
        status, content = self.talk.ask("GET", f"/agents/{quote(id, safe='')}/commands?after={self._acknowledged}")
        self.check(status, content)
        view = _read(content)
        return _wanted(view, tuple(one for one in map(_command, view["items"]) if one.state == "pending"))

    def acknowledge(self, id: str, number: int, state: str, message: str | None) -> Command:
        """Say what became of a command."""
        body = {"state": state, "message": message}
        _, view = self._json("POST", f"/agents/{quote(id, safe='')}/commands/{number}", body)
        self._acknowledged = max(self._acknowledged, number)
        return _command(view)


def _wanted(view: Mapping[str, Any], pending: tuple[Command, ...]) -> Wanted:
    """Return what is wanted as an answer says it: of two answers the one with the greater number is the newer one."""
    return Wanted(view["last"], pending, view["drained"], UNSAID)


def _read(content: bytes) -> dict[str, Any]:
    """Read the JSON of an answer; what is none did not come from a master."""
    try:
        view: dict[str, Any] = codec.loads(content)
    except CorruptDocument as error:
        raise StoreUnavailable(f"no master answers: {error}") from error
    return view


def quietly(call: Callable[[], None]) -> None:
    """Do something that waits for a master and that the sweep makes good if it fails."""
    try:
        call()
    except ZerogError as error:
        logger.info("what was not wanted is left to lapse: %s", error)


def _nobodys(view: Mapping[str, Any]) -> JobRecord:
    """Return a record of a job that was never begun here."""
    return JobRecord(view["uuid"], view["jobType"], 0, {}, 0.0, 0.0)


def _attempt(uuid: str, attempt: int) -> str:
    return f"/jobs/{uuid}/attempts/{attempt}"


def _fits(inline: bytes) -> bool:
    """Return whether a request can carry JSON as it is: numbers that are kept exactly, and no halves of characters."""
    try:
        codec.parse(b'{"data":' + inline + b"}")
    except ZerogError:
        return False
    return True


def _events(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of a batch as a report has them; the master says how an attempt ended."""
    names = ("level", "message", "code", "at", "source")
    return [{name: one[name] for name in names if name in one} for one in batch["entries"] if "reason" not in one]


def _progress(spoken: Mapping[str, Any], completeness: float | None, message: str | None) -> dict[str, Any]:
    """Return the members of a report."""
    body = dict(spoken)
    if completeness is not None:
        body["completeness"] = completeness
    if message is not None:
        body["message"] = message
    return body


def _command(view: Mapping[str, Any]) -> Command:
    own = ("number", "command", "state", "message", "at", "href")
    members = {name: value for name, value in view.items() if name not in own}
    return Command(view["number"], view["command"], members, from_iso(view["at"]), view["state"], view["message"])


def _registration(news: Registration) -> dict[str, Any]:
    """Return what an agent says of itself as the body of ``POST /agents``."""
    said: dict[str, Any] = {
        "id": news.id,
        "instance": news.instance,
        "hostname": news.hostname,
        "version": news.version,
        "jobTypes": None if news.job_types is None else list(news.job_types),
        "labels": None if news.labels is None else list(news.labels),
        "ram": news.has.ram,
        "cpus": news.has.cpus,
        "limits": None if news.limits is None else news.limits.members(),
        "usage": news.usage,
        "state": news.state,
        "assignments": None
        if news.assignments is None
        else [{"uuid": one.uuid, "attempt": one.attempt} for one in news.assignments],
    }
    return {name: value for name, value in said.items() if value is not None}


def _outcome(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as the members of the body that says it."""
    match outcome:
        case Succeeded(code=code):
            return {"outcome": "succeeded", "code": code}
        case Requeued(delay=delay, state=state):
            return {"outcome": "requeued", "delay": delay, "state": state}
        case Failed():
            said: dict[str, Any] = {
                "outcome": "failed",
                "code": outcome.code,
                "error": {"message": outcome.message, "traceback": outcome.traceback},
                "final": outcome.final,
                "reason": outcome.reason,
            }
            return said if outcome.after is None else {**said, "delay": outcome.after}
        case Cancelled():
            return {"outcome": "cancelled"}
        case Crashed(message=message):
            return {"outcome": "crashed", "error": {"message": message}}
        case GivenBack(started=started):
            return {"outcome": "givenBack", "started": started}
    raise TypeError(f"{outcome!r} is no outcome")


class Pieces:
    """The output of an attempt on its way to a master, a piece at a time; goes on from what was answered."""

    def __init__(self, remote: Remote, uuid: str, attempt: int, media_type: str) -> None:
        self.blob = f"data.{uuid}.{attempt}"
        self.size = 0
        self._remote = remote
        self._uuid, self._attempt, self._media_type = uuid, attempt, media_type
        self._buffer = bytearray()
        self._sent = 0

    def write(self, data: bytes) -> None:
        """Add bytes; what fills a piece is sent, but for the last one, which says that it is."""
        self._buffer += data
        self.size += len(data)
        while len(self._buffer) > _PIECE:
            self._put(bytes(self._buffer[:_PIECE]), "*")
            del self._buffer[:_PIECE]
            self._sent += _PIECE

    def mark(self) -> Pieces:
        """Return a writer that stands where this one stands: what was written without counting is written again."""
        twin = Pieces(self._remote, self._uuid, self._attempt, self._media_type)
        twin.size, twin._buffer, twin._sent = self.size, bytearray(self._buffer), self._sent
        return twin

    def close(self) -> None:
        """Send what is left: then it is whole."""
        self._put(bytes(self._buffer), str(self.size))

    def _put(self, data: bytes, total: str) -> None:
        headers = {"Content-Type": self._media_type}
        if data:
            headers["Content-Range"] = f"bytes {self._sent}-{self._sent + len(data) - 1}/{total}"
        path = f"{_attempt(self._uuid, self._attempt)}/data"
        self._remote.upload(path, data, headers)


@dataclass(eq=False, slots=True)
class Assigned(Reservation):
    """What a master has claimed for the agent: there is no entry any more, only the lease."""

    body: bytes
    view: Mapping[str, Any]
    give_back: Callable[[Mapping[str, Any]], None]
    taken: bool = False

    def record(self, agent: str, claim: str, now: float) -> JobRecord:
        """Return as much of the job's record as an agent needs."""
        view = self.view
        return JobRecord(
            uuid=view["uuid"],
            job_type=view["jobType"],
            number=view.get("number", 0),  # a server of an older version does not say it
            parameters=view["parameters"],
            created_at=now,
            updated_at=now,
            state=State.RUNNING,
            attempt=view["attempt"],
            lease=Lease(agent, claim, 0, now + view["lease"]),
            agent=agent,
            started_at=now,
            job_state=view["state"],
            parents=tuple(one["href"].rpartition("/")[2] for one in view["parents"]),
            needs=Needs.read(view["limits"]) if view["limits"] else NOTHING,
        )

    def touch(self) -> None:
        """Do nothing: the lease is the promise."""

    def release(self, delay: float = 0.0, priority: int | None = None) -> None:
        """Give it back, if nobody has begun it; otherwise its outcome has said so."""
        if not self.taken:
            self.taken = True
            self.give_back(self.view)

    def bury(self) -> None:
        """Do nothing: what a master hands out is a job."""

    def delete(self) -> None:
        """Do nothing: the master has."""

    def where(self) -> tuple[str, int]:
        """Raise: there is no entry any more."""
        raise QueueError("the master has deleted the entry")


class _Told(Reservation):
    """A word to the agent that there are orders."""

    body = b'{"look": "orders"}'

    def touch(self) -> None:
        """Do nothing."""

    def release(self, delay: float = 0.0, priority: int | None = None) -> None:
        """Do nothing."""

    def bury(self) -> None:
        """Do nothing."""

    def delete(self) -> None:
        """Do nothing."""

    def where(self) -> tuple[str, int]:
        """Raise: there is no entry."""
        raise QueueError("this is no entry of a queue")


class _Poll(Queue):
    """Base of what waits for one answer of a master at a time, in a thread of its own."""

    #: A question cannot be asked while a job runs: whatever comes is claimed already.
    asks_ahead = False

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._wire = Wire(remote.masters, _WAIT + _BEYOND)
        self._lock = threading.Condition()
        self._wanted = self._closed = self._under_way = False
        self._answer: Reservation | None = None
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        self._thread: threading.Thread | None = None
        self._pause = _PAUSE

    #: Whether what is on its way must be dealt with before the end.
    must_land = True

    def request(self) -> Reservation | None:
        """Send one request and return what came of it; raises what went wrong."""
        raise NotImplementedError

    def unwanted(self, answer: Reservation) -> None:
        """Deal with an answer that nobody waits for any more."""
        answer.release()

    def at_hand(self) -> Reservation | None:
        """Return what is there already, if something is."""
        return None

    # In the agent's loop

    def ask(self, tubes: Sequence[str], done: Reservation | None = None, wait: bool = True) -> None:
        with self._lock:
            self._wanted = True
            if self._offered():
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=type(self).__name__, daemon=True)
                self._thread.start()
            self._lock.notify_all()

    def take(self) -> Reservation | Pending | None:
        with suppress(BlockingIOError):
            os.read(self._read, 64)
        with self._lock:
            answer, self._answer = self._answer, None
            if answer is None:
                return PENDING
            self._wanted = False
            return answer

    def withdraw(self) -> None:
        with self._lock:
            self._wanted = False
            answer, self._answer = self._answer, None
        if answer is not None:
            self._later(lambda: self.unwanted(answer))

    def fileno(self) -> int:
        return self._read

    def look_within(self) -> float:
        return 3600.0

    def close(self) -> None:
        self.withdraw()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            thread = self._thread
            self._lock.notify_all()
        if thread is not None and self.must_land:
            thread.join(1.0)  # the master lets a draining agent wait for nothing
        self._wire.close()
        for end in (self._read, self._write):
            os.close(end)

    def _later(self, call: Callable[[], None]) -> None:
        """Do something that waits for a master, not in the loop."""
        threading.Thread(target=quietly, args=(call,), daemon=True).start()

    # The three that follow are called with the lock held

    @property
    def _is_waited_for(self) -> bool:
        return self._wanted and self._answer is None and not self._closed

    def _offered(self) -> bool:
        """Take what is there already, if somebody waits for it; returns whether something was."""
        if self._is_waited_for and (answer := self.at_hand()) is not None:
            self._keep(answer)
            return True
        return False

    def _keep(self, answer: Reservation) -> None:
        """Let the loop find an answer."""
        self._answer = answer
        os.write(self._write, b"\0")

    # In its own thread

    def _work(self) -> None:
        while True:
            with self._lock:
                while not (self._wanted and self._answer is None) and not self._closed:
                    self._lock.wait()
                if self._closed:
                    return
            answer = self._request_once()
            if answer is None:
                continue
            with self._lock:
                keep = self._is_waited_for
                if keep:
                    self._keep(answer)
            if not keep:
                quietly(lambda answer=answer: self.unwanted(answer))  # type: ignore[misc]

    def _request_once(self) -> Reservation | None:
        try:
            answer = self.request()
            self._pause = _PAUSE
            return answer
        except Exception as error:
            if not isinstance(error, ZerogError):
                logger.exception("a waiting request failed")
            elif self._pause == _PAUSE and not isinstance(error, UnknownAgent):  # the first heartbeat is under way
                logger.warning("waits for a master: %s", error)
            with self._lock:
                if not self._closed:
                    self._lock.wait(self._pause)
            self._pause = min(_LONGEST, self._pause * 2)
            return None

    # What a queue does besides, and nobody asks of this one

    def put_all(self, puts: Sequence[Put]) -> list[QueueError | None]:
        return [QueueError("an agent that speaks HTTP alone puts nothing into a queue")] * len(puts)

    def kick(self, tube: str, count: int) -> int:
        return 0

    def stats(self, tube: str) -> TubeStats:
        return TubeStats()

    def peek(self, tube: str) -> bytes | None:
        return None

    def identity(self) -> str:
        return "http"


class Assignments(_Poll):
    """Where an agent that speaks HTTP alone gets its jobs, in place of a connection to the queue."""

    def __init__(self, remote: Remote) -> None:
        super().__init__(remote)
        self._path = f"/agents/{quote(remote.agent, safe='')}/assignments"
        remote.polls.append(self)

    def request(self) -> Reservation | None:
        status, content = self._wire.ask("POST", self._path, b"{}", {"Prefer": f"wait={_WAIT}"})
        if status == 204:
            return None
        Remote.check(status, content)
        return self._assigned(_read(content))

    def at_hand(self) -> Reservation | None:
        try:
            return self._assigned(self._remote.ready.popleft())
        except IndexError:
            return None

    def offer(self) -> None:
        """Take what is there, if a slot waits for something."""
        with self._lock:
            self._offered()

    def _assigned(self, view: Mapping[str, Any]) -> Assigned:
        return Assigned(view["uuid"].encode(), view, lambda view: self._remote.return_unbegun([view]))

    def withdraw(self) -> None:
        super().withdraw()
        if not self._remote.takes:
            self._remote.return_ready()

    def another(self) -> Assignments:
        return Assignments(self._remote)


class Orders(_Poll):
    """Where an agent that speaks HTTP alone is told that there are orders, in place of its tube."""

    must_land = False

    def __init__(self, remote: Remote) -> None:
        super().__init__(remote)
        self._path = f"/agents/{quote(remote.agent, safe='')}/commands"
        self._after: int | None = None
        self._anew = remote.anew

    def request(self) -> Reservation | None:
        # The first answer says where to begin: what is there already comes with the heartbeat.
        if self._anew != self._remote.anew:
            self._anew, self._after = self._remote.anew, None
        after = self._after if self._after is not None else 0
        headers = {} if self._after is None else {"Prefer": f"wait={_WAIT}"}
        status, content = self._wire.ask("GET", f"{self._path}?after={after}", None, headers)
        Remote.check(status, content)
        numbers = [one["number"] for one in _read(content)["items"]]
        self._after = max([after, *numbers])
        return _Told() if numbers else None

    def unwanted(self, answer: Reservation) -> None:
        return

    def another(self) -> Orders:
        return Orders(self._remote)
