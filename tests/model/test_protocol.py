"""The model of the protocol, searched exhaustively: every interleaving of its steps, of crashes, lapses and wipes.

One job, two workers, three attempts, one sweeper, one client that may repeat its request once.  A state is a tuple; a
rule gives its successors.  What the protocol forbids must be in no reachable state, and from each of them the job must
come to its end without further injuries.  Each weakened variant of the protocol must break that: a model that cannot
fail proves nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

ATTEMPTS, ENTRIES = 3, 2
ENDED = ("succeeded", "cancelled", "failed")


class Worker(NamedTuple):
    """What a worker is at: its attempt, the version that it has read, whether the queue still holds its entry for it."""

    at: str = "idle"
    attempt: int = 0
    version: int = 0
    entry: bool = False
    told: bool = False


class World(NamedTuple):
    """One state of everything.  ``results`` counts the writes that ended the job; ``stale`` those by another attempt."""

    client: str = "new"
    repeats: int = 1
    jobs: int = 0
    state: str = ""
    attempt: int = 0
    version: int = 2
    cancelling: bool = False
    results: int = 0
    stale: int = 0
    ready: int = 0
    workers: tuple[Worker, Worker] = (Worker(), Worker())
    sweeper: int = 0  # the version that it has read, 0: none
    canceller: int = 0
    cancels: int = 1
    crashes: int = 2
    wipes: int = 1
    requeues: int = 1
    drains: int = 1


Steps = Iterator[World]


class Protocol:
    """The rules; the weakened variants switch one of them off."""

    def __init__(self, weak: str = "") -> None:
        self.weak = weak

    def progress(self, world: World) -> Steps:
        """Yield the steps that bring things forward."""
        return map(normal, self.steps(world))

    def injuries(self, world: World) -> Steps:
        """Yield crashes, redeliveries and wipes."""
        return map(normal, self.blows(world))

    def steps(self, world: World) -> Steps:
        yield from self.submit(world)
        for index in (0, 1):
            yield from self.work(world, index)
        yield from self.sweep(world)
        yield from self.cancel(world)

    def blows(self, world: World) -> Steps:
        for index, worker in enumerate(world.workers):
            if world.crashes and worker.at != "idle":
                again = min(ENTRIES, world.ready + worker.entry)
                yield put(world._replace(crashes=world.crashes - 1, ready=again), index, Worker())
            if worker.entry and world.ready < ENTRIES:  # its time ran out: another gets the entry
                yield put(world._replace(ready=world.ready + 1), index, worker._replace(entry=False))
        if world.wipes:
            first, second = (worker._replace(entry=False) for worker in world.workers)
            yield world._replace(wipes=0, ready=0, workers=(first, second))
        if world.client == "inserted":  # the server dies; the client has no answer, and repeats
            yield world._replace(client="new" if world.repeats else "gave up", repeats=0)
        if world.client == "put":
            yield world._replace(client="new" if world.repeats else "gave up", repeats=0)

    # R1, R2

    def submit(self, world: World) -> Steps:
        if world.client == "new":
            if world.jobs and self.weak != "no key":
                yield world._replace(client="acknowledged")
            elif world.jobs:
                yield world._replace(client="acknowledged", jobs=2)
            else:
                yield world._replace(client="inserted", jobs=1, state="queued")
        elif world.client == "inserted":
            yield world._replace(client="put", ready=min(ENTRIES, world.ready + 1))
        elif world.client == "put":
            yield world._replace(client="acknowledged")

    # R3, R4, R5

    def work(self, world: World, index: int) -> Steps:
        worker = world.workers[index]
        match worker.at:
            case "idle":
                if world.ready:
                    yield put(world._replace(ready=world.ready - 1), index, Worker("reserved", entry=True))
            case "reserved":
                yield from self.look(world, index, worker)
            case "claiming":
                yield from self.claim(world, index, worker)
            case "running":
                yield from self.run(world, index, worker)
            case "ended" | "requeued" | "drained":
                yield from self.guard(world, index, worker)
            case "deleting":
                yield put(world, index, Worker())
            case _:
                yield from self.record(world, index, worker)

    def look(self, world: World, index: int, worker: Worker) -> Steps:
        if world.state in ENDED:
            yield put(world, index, Worker())  # the entry is deleted
        elif world.state == "queued":
            yield put(world, index, worker._replace(at="claiming", version=world.version))
        else:
            # A live lease: the entry goes back.  Or it has lapsed, for all that this worker can know.
            back = min(ENTRIES, world.ready + worker.entry)
            yield put(world._replace(ready=back), index, Worker())
            yield put(world, index, worker._replace(at="claiming", version=world.version))

    def claim(self, world: World, index: int, worker: Worker) -> Steps:
        if worker.version != world.version:
            yield put(world, index, worker._replace(at="reserved"))
        elif world.cancelling:  # what lapses while it is being cancelled is cancelled
            yield put(end(world, "cancelled"), index, worker._replace(at="deleting"))
        elif world.attempt < ATTEMPTS:
            attempt = world.attempt + 1
            after = world._replace(state="running", attempt=attempt, version=world.version + 1)
            at = "running"
            entry = worker.entry and self.weak != "delete first"
            yield put(after, index, worker._replace(at=at, attempt=attempt, entry=entry))
        else:
            yield put(end(world, "failed"), index, worker._replace(at="deleting"))

    def run(self, world: World, index: int, worker: Worker) -> Steps:
        yield put(world, index, worker._replace(at="ended"))
        if world.cancelling and not worker.told:
            yield put(world, index, worker._replace(told=True))
        if world.requeues:
            yield put(world._replace(requeues=0), index, worker._replace(at="requeued"))
        if world.drains:
            yield put(world._replace(drains=0), index, worker._replace(at="drained"))

    def guard(self, world: World, index: int, worker: Worker) -> Steps:
        mine = world.attempt == worker.attempt or self.weak == "no attempt in the guard"
        if world.state == "running" and mine:
            yield put(world, index, worker._replace(at=f"write {worker.at}", version=world.version))
        else:
            # Superseded: it writes nothing, and its entry may be the only one that the job has.
            yield put(world._replace(ready=min(ENTRIES, world.ready + worker.entry)), index, Worker())

    def record(self, world: World, index: int, worker: Worker) -> Steps:
        outcome = worker.at.removeprefix("write ")
        if worker.version != world.version:
            if self.weak == "applied again":
                yield put(world, index, worker._replace(version=world.version))
            else:
                yield put(world, index, worker._replace(at=outcome))
            return
        stale = world.stale + (worker.attempt != world.attempt)
        if world.cancelling and (worker.told or outcome != "ended"):
            after = end(world, "cancelled")
        elif outcome == "ended":
            after = end(world, "succeeded")
        else:
            back = min(ENTRIES, world.ready + worker.entry)
            after = world._replace(state="queued", version=world.version + 1, ready=back)
            worker = worker._replace(entry=False)
        yield put(after._replace(stale=stale), index, worker._replace(at="deleting"))

    # R8

    def sweep(self, world: World) -> Steps:
        if self.weak in ("no sweep", "delete first"):
            return
        if world.state == "running" and not world.sweeper:
            yield world._replace(sweeper=world.version)
        elif world.sweeper:
            after = world._replace(sweeper=0)
            if world.sweeper == world.version and world.state == "running":
                if world.cancelling:
                    after = end(after, "cancelled")
                elif world.attempt >= ATTEMPTS:
                    after = end(after, "failed")
                else:
                    after = after._replace(state="queued", version=world.version + 1)
            yield after
        if world.state == "queued" and not world.ready and not any(worker.entry for worker in world.workers):
            yield world._replace(ready=1)

    # R11

    def cancel(self, world: World) -> Steps:
        if world.cancels and world.state in ("queued", "running"):
            yield world._replace(cancels=0, canceller=world.version)
        if world.canceller:
            after = world._replace(canceller=0)
            if world.canceller != world.version:
                after = world._replace(canceller=world.version if world.state not in ENDED else 0)
            elif world.state == "queued":
                after = end(after, "cancelled")
            elif world.state == "running":
                after = after._replace(cancelling=True, version=world.version + 1)
            yield after


def put(world: World, index: int, worker: Worker) -> World:
    """Return the world with one worker changed."""
    return world._replace(workers=(worker, world.workers[1]) if index == 0 else (world.workers[0], worker))


#: A version that was read: none, one that has changed since, the one that stands.
NONE, STALE, FRESH = 0, 1, 2


def normal(world: World) -> World:
    """Return the same state in its normal form: of versions only whether they still stand, of workers no order."""

    def known(version: int) -> int:
        return NONE if version == NONE else FRESH if version == world.version else STALE

    first, second = sorted(
        worker._replace(version=known(worker.version) if worker.at.startswith(("claiming", "write")) else NONE)
        for worker in world.workers
    )
    return world._replace(
        workers=(first, second), sweeper=known(world.sweeper), canceller=known(world.canceller), version=FRESH
    )


def end(world: World, state: str) -> World:
    return world._replace(state=state, version=world.version + 1, results=world.results + 1)


def forbidden(world: World) -> str:
    """Return which invariant a state breaks, if it breaks one."""
    if world.jobs > 1:
        return "two jobs for one key"
    if world.results > 1:
        return "two results"
    if world.stale:
        return "a stale result"
    return ""


class Found(Exception):
    """A state that must not be reachable."""


def search(
    start: Any,
    progress: Callable[[Any], Iterator[Any]],
    injuries: Callable[[Any], Iterator[Any]],
    wrong: Callable[[Any], str],
    open_still: Callable[[Any], bool],
) -> int:
    """Visit every state and return how many there are; ``Found`` if one is wrong, or if a promise stays open in it.

    Open: no end can be reached from it any more, whatever happens.
    """
    seen = {start}
    before: dict[Any, list[Any]] = {}
    waiting = [start]
    while waiting:
        state = waiting.pop()
        if found := wrong(state):
            raise Found(f"{found}: {state}")
        forward = list(progress(state))
        for after in (*forward, *injuries(state)):
            if after not in seen:
                seen.add(after)
                waiting.append(after)
        for after in forward:
            before.setdefault(after, []).append(state)
    done = [state for state in seen if not open_still(state)]
    reaches_end = set(done)
    while done:
        for earlier in before.get(done.pop(), ()):
            if earlier not in reaches_end:
                reaches_end.add(earlier)
                done.append(earlier)
    for state in seen - reaches_end:
        raise Found(f"acknowledged and never ended: {state}")
    return len(seen)


def never_ended(world: World) -> bool:
    return world.client not in ("acknowledged", "gave up") or (
        world.client == "acknowledged" and world.state not in ENDED
    )


SMALL = World(crashes=1, wipes=0, cancels=0, requeues=0, drains=0)

#: What may go wrong together.  All of it at once has 3.4 million states and takes minutes: ``bin/test --full``.
WORLDS = {
    "wipe": SMALL._replace(wipes=1),
    "cancel": SMALL._replace(cancels=1, repeats=0, crashes=0),
    "drain": SMALL._replace(drains=1, repeats=0),
    "requeue": SMALL._replace(requeues=1, repeats=0),
    **({"all": World()} if os.environ.get("TESTS_FULL") else {}),
}


@pytest.mark.requirement("Z12", "Z13", "Z14")
@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())
def test_the_protocol_holds_in_every_state(world: World) -> None:
    protocol = Protocol()
    states = search(world, protocol.progress, protocol.injuries, forbidden, never_ended)
    assert states > 10_000, "the model has lost what it was to look at"


@pytest.mark.parametrize(
    ("weak", "found"),
    [
        ("no attempt in the guard", "a stale result"),
        ("applied again", "results|stale"),
        ("no sweep", "never ended"),
        ("no key", "two jobs"),
    ],
)
def test_a_weakened_protocol_does_not(weak: str, found: str) -> None:
    protocol = Protocol(weak)
    with pytest.raises(Found, match=found):
        search(SMALL, protocol.progress, protocol.injuries, forbidden, never_ended)


def test_the_order_of_record_and_entry_ends_every_job_without_a_sweep() -> None:
    """R5 alone: where the client asks once and the queue keeps what it has, nobody need sweep."""
    calm = SMALL._replace(repeats=0)
    protocol, other = Protocol("no sweep"), Protocol("delete first")
    assert search(calm, protocol.progress, protocol.injuries, forbidden, never_ended) > 500
    with pytest.raises(Found, match="never ended"):
        search(calm, other.progress, other.injuries, forbidden, never_ended)


# The log with its mark: an entry whose record comes late, or never


class Log(NamedTuple):
    """A submit whose entry may grow old before its record is there, and a sweeper that passes by."""

    server: str = "new"  # appended, inserted, answered
    old: bool = False  # more than a minute has passed since the append
    again: bool = False  # appended a second time
    number: int = 0  # the entry that the record names
    marks: tuple[bool, bool] = (True, True)  # whether the sweeper still looks at each entry
    stopped: int = 1


class Marks:
    """R1 and the mark of R8."""

    def __init__(self, weak: str = "") -> None:
        self.weak = weak

    def progress(self, log: Log) -> Iterator[Log]:
        match log.server:
            case "new":
                yield log._replace(server="appended")
            case "appended":
                yield log._replace(server="inserted")
            case "inserted" if log.old and not log.again and self.weak != "not appended again":
                yield log._replace(again=True)
            case "inserted" if log.again and log.number == 0:
                yield log._replace(number=1)
            case "inserted":
                yield log._replace(server="answered")
        record = log.server in ("inserted", "answered")
        # An entry is dropped when it has no record although it is old; or, too early, when it has none now.
        if log.server == "appended" and not record and (log.old or self.weak == "dropped at once"):
            yield log._replace(marks=(False, log.marks[1]))
        # An entry that its record does not name: the earlier one is dropped, the later one may be named in a moment.
        if record and log.number == 1:
            yield log._replace(marks=(False, log.marks[1]))
        if record and log.again and log.number == 0 and self.weak == "another number is dropped":
            yield log._replace(marks=(log.marks[0], False))

    def injuries(self, log: Log) -> Iterator[Log]:
        if log.server == "appended" and log.stopped:
            yield log._replace(old=True, stopped=0)

    @staticmethod
    def wrong(log: Log) -> str:
        looked_at = log.marks[log.number]
        return "an acknowledged job that no sweep looks at" if log.server == "answered" and not looked_at else ""


def test_the_mark_passes_no_acknowledged_job() -> None:
    marks = Marks()
    assert search(Log(), marks.progress, marks.injuries, marks.wrong, lambda log: log.server != "answered") > 5


@pytest.mark.parametrize("weak", ["not appended again", "dropped at once", "another number is dropped"])
def test_a_weaker_mark_does(weak: str) -> None:
    marks = Marks(weak)
    with pytest.raises(Found, match="no sweep looks at"):
        search(Log(), marks.progress, marks.injuries, marks.wrong, lambda log: log.server != "answered")


# Two parents


class Family(NamedTuple):
    """Two parents, a child, and two processes that may decide about it."""

    parents: tuple[str, str] = ("running", "running")
    child: str = "none"  # tied, waiting, queued, cancelled
    version: int = 0
    deciders: tuple[tuple[str, int], tuple[str, int]] = (("", 0), ("", 0))
    decisions: int = 0
    told: bool = False  # an end of a parent that its process still has to pass on to the child
    crashes: int = 1


class Parents:
    """R8 for children that wait."""

    def __init__(self, weak: str = "") -> None:
        self.weak = weak

    def progress(self, family: Family) -> Iterator[Family]:
        for index, parent in enumerate(family.parents):
            if parent == "running":
                for outcome in ("succeeded", "failed"):
                    parents = (outcome, family.parents[1]) if index == 0 else (family.parents[0], outcome)
                    yield family._replace(parents=parents, told=True)
        if family.child == "none":
            yield family._replace(child="waiting", version=1, told=self.weak != "not looked at after the insert")
        if family.child == "waiting" and family.told:
            yield from self.read(family._replace(told=False), 0)
        if family.child == "waiting" and self.weak not in ("no sweep", "not looked at after the insert"):
            yield from self.read(family, 1)
        for index in (0, 1):
            yield from self.write(family, index)

    def read(self, family: Family, index: int) -> Iterator[Family]:
        verdict = ""
        if "failed" in family.parents:
            verdict = "cancelled"
        elif family.parents == ("succeeded", "succeeded"):
            verdict = "queued"
        if not family.deciders[index][0] and verdict:
            yield self.with_decider(family, index, (verdict, family.version))
        elif not verdict:
            yield family

    def write(self, family: Family, index: int) -> Iterator[Family]:
        verdict, version = family.deciders[index]
        if not verdict:
            return
        after = self.with_decider(family, index, ("", 0))
        if version == family.version or self.weak == "no compare":
            after = after._replace(child=verdict, version=family.version + 1, decisions=family.decisions + 1)
        yield after

    @staticmethod
    def with_decider(family: Family, index: int, value: tuple[str, int]) -> Family:
        deciders = (value, family.deciders[1]) if index == 0 else (family.deciders[0], value)
        return family._replace(deciders=deciders)

    def injuries(self, family: Family) -> Iterator[Family]:
        if family.crashes:
            yield family._replace(crashes=0, told=False, deciders=(("", 0), family.deciders[1]))

    @staticmethod
    def wrong(family: Family) -> str:
        if family.decisions > 1:
            return "decided twice"
        if family.child == "queued" and family.parents != ("succeeded", "succeeded"):
            return "released too early"
        return ""


def waits_still(family: Family) -> bool:
    return family.child not in ("queued", "cancelled")


def test_a_child_is_decided_once_and_always() -> None:
    parents = Parents()
    assert search(Family(), parents.progress, parents.injuries, parents.wrong, waits_still) > 50


@pytest.mark.parametrize(
    ("weak", "found"),
    [("no compare", "decided twice"), ("no sweep", "never ended"), ("not looked at after the insert", "never ended")],
)
def test_a_weaker_family_is_not(weak: str, found: str) -> None:
    parents = Parents(weak)
    with pytest.raises(Found, match=found):
        search(Family(), parents.progress, parents.injuries, parents.wrong, waits_still)
