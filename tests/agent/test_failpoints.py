"""Every row of the table of crash points, on real processes that die, stop or doubt exactly there."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.deployment import Deployment
from tests.services import Beanstalkd, Process, wait_until
from zerog import failpoints
from zerog.exceptions import BadSetting

PAIRS = (("sqlite", "sqlite"), ("couchbase", "beanstalkd"))
LEASE = 1.5


#: The default pair alone, but with ``bin/test --full`` all; what the store or the queue decide is tried on all always.
FULL = bool(os.environ.get("TESTS_FULL"))
IDS = ["-".join(pair) for pair in PAIRS]
default = pytest.mark.parametrize("zerog", PAIRS if FULL else PAIRS[:1], ids=IDS if FULL else IDS[:1], indirect=True)
everywhere = pytest.mark.parametrize("zerog", PAIRS, ids=IDS, indirect=True)


@pytest.fixture(scope="module")
def zerog(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A server without agents; each test starts those that it injures."""
    store, queue = request.param
    folder = tmp_path_factory.mktemp("failpoints")
    beanstalkd = Beanstalkd(folder / "b").start() if queue == "beanstalkd" else None
    couchbase = request.getfixturevalue("couchbase") if store == "couchbase" else None
    made = Deployment(
        folder / "zerog", store, queue, beanstalkd=beanstalkd, couchbase=couchbase, lease=LEASE, sweep=1, slots=1
    )
    try:
        made.start_server()
        yield made
    finally:
        made.close()
        if beanstalkd is not None:
            beanstalkd.stop()


@pytest.fixture(autouse=True)
def no_agents(request: pytest.FixtureRequest) -> Iterator[None]:
    """End the agents of a test, so that the next one starts without any."""
    yield
    if "zerog" in request.fixturenames:
        made: Deployment = request.getfixturevalue("zerog")
        while made.agents:
            made.agents.pop().kill()


def armed(zerog: Deployment, text: str) -> Process:
    """Start an agent with fail points."""
    return zerog.start_agent(failpoint=text)


def dies(process: Process) -> None:
    """Wait until a process has killed itself."""
    assert wait_until(lambda: process.popen.poll(), 20, process.log.read_text()[-2000:]) == -signal.SIGKILL


def ledger(zerog: Deployment, tmp_path: Path, seconds: float = 0.0) -> tuple[str, Path]:
    path = tmp_path / "ledger"
    return zerog.submit("ledger", {"path": str(path), "seconds": seconds}), path


def ends(zerog: Deployment, uuid: str, path: Path, attempt: int, executions: int, **counters: int) -> dict[str, Any]:
    """Check how a ledger job ends, what the ledger says of it, and that its entry leaves the queue."""
    record = zerog.wait(uuid)
    assert (record["state"], record["attempt"]) == ("succeeded", attempt)
    assert record["counters"] == {"errors": 0, "crashes": 0, "losses": 0, **counters}
    assert len(path.read_text().splitlines()) == executions
    assert zerog.client.get(f"/jobs/{uuid}/data").json() == attempt, "the result is that of the attempt in the record"
    queue_empties(zerog, "ledger")
    return record


def reached(zerog: Deployment, spec: str, command: str = "worker") -> None:
    """Check that the injury did happen: without it the outcome would be the same."""
    point, _, action = spec.partition("=")
    action = action.partition("@")[0].partition(":")[0]
    assert f"fail point {point}: {action}" in zerog.log(command)


def queue_empties(zerog: Deployment, job_type: str) -> None:
    def empty() -> bool:
        queue = zerog.client.get(f"/types/{job_type}").json()["queue"]
        return queue is not None and sum(queue.values()) == 0

    wait_until(empty, 15, f"an empty queue of {job_type}")


def superseded_counts(zerog: Deployment) -> list[int]:
    """Return what the records of the agents count."""
    with closing(sqlite3.connect(zerog.folder / "var" / "zerog.db")) as connection:
        rows = connection.execute("SELECT body FROM documents WHERE key LIKE 'zerog:agent:%'").fetchall()
    return [json.loads(body).get("superseded", 0) for (body,) in rows]


@default
@pytest.mark.parametrize(
    ("point", "attempt", "executions", "losses"),
    [
        ("run.after_reserve", 1, 1, 0),
        ("run.after_claim", 2, 1, 1),
        ("run.mid", 2, None, 1),
        ("run.before_record", 2, 2, 1),
        ("run.after_record", 1, 1, 0),
    ],
)
def test_an_agent_killed_there_loses_nothing(
    zerog: Deployment, tmp_path: Path, point: str, attempt: int, executions: int | None, losses: int
) -> None:
    agent = armed(zerog, f"{point}=kill@1")
    uuid, path = ledger(zerog, tmp_path, 0.3 if point == "run.mid" else 0.0)
    dies(agent)
    zerog.start_agent()
    if executions is None:  # whether the first child came so far is open
        zerog.wait(uuid)
        executions = len(path.read_text().splitlines())
        assert executions in (1, 2)
    ends(zerog, uuid, path, attempt, executions, losses=losses)


@everywhere
@pytest.mark.parametrize("action", ["applied", "not_applied"])
@pytest.mark.parametrize(
    "point", ["run.claim_ambiguous", "run.record_ambiguous", "run.renew_ambiguous", "run.commit_ambiguous"]
)
def test_an_answer_that_is_lost_is_read_again(zerog: Deployment, tmp_path: Path, point: str, action: str) -> None:
    armed(zerog, f"{point}={action}@1")
    uuid, path = ledger(zerog, tmp_path, 0.7 if "renew" in point else 0.0)
    ends(zerog, uuid, path, 1, 1)
    reached(zerog, f"{point}={action}")


@default
@pytest.mark.parametrize("hit", [2, 3])
def test_a_commit_that_ends_one_job_and_claims_the_next_may_be_in_doubt(
    zerog: Deployment, tmp_path: Path, hit: int
) -> None:
    jobs = []
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        jobs.append(ledger(zerog, folder))
    armed(zerog, f"run.commit_ambiguous=applied@{hit}")
    for uuid, path in jobs:
        ends(zerog, uuid, path, 1, 1)


@everywhere
def test_data_of_an_attempt_that_died_are_nobodys(zerog: Deployment) -> None:
    agent = armed(zerog, "run.after_data=kill@1")
    uuid = zerog.submit("write-output", {})
    dies(agent)
    zerog.start_agent()
    assert zerog.wait(uuid)["attempt"] == 2
    assert zerog.client.get(f"/jobs/{uuid}/data").text == "a,b\n1,2\n"


@default
def test_a_death_between_dead_letter_and_record_leaves_one_end(zerog: Deployment) -> None:
    agent = armed(zerog, "run.after_failed_entry=kill@1")
    uuid = zerog.submit("raise", {"what": "fail"})
    dies(agent)
    zerog.start_agent()
    record = zerog.wait(uuid)
    assert (record["state"], record["resultCode"], record["attempt"]) == ("failed", 422, 2)
    assert record["counters"] == {"errors": 1, "crashes": 0, "losses": 1}
    assert [error["reason"] for error in zerog.info(uuid)["errors"]][-1] == "failed"


@default
@pytest.mark.parametrize("spec", ["retry.after_record=kill@1", "retry.release_fails=raise@1"])
def test_a_retry_whose_entry_stays_behind_comes_all_the_same(zerog: Deployment, spec: str) -> None:
    agent = armed(zerog, spec)
    uuid = zerog.submit("raise", {"what": "retry"})
    if "kill" in spec:
        dies(agent)
        zerog.start_agent()
    record = zerog.wait(uuid)
    assert (record["state"], record["attempt"], record["counters"]["errors"]) == ("failed", 3, 3)
    queue_empties(zerog, "raise")
    reached(zerog, spec)


@default
def test_a_child_that_is_killed_is_recorded_at_once(zerog: Deployment, tmp_path: Path) -> None:
    armed(zerog, "child.mid=kill@2")
    first, path = ledger(zerog, tmp_path)
    ends(zerog, first, path, 1, 1)
    started = time.monotonic()
    second, path = ledger(zerog, tmp_path)
    zerog.wait_for(second, counters={"errors": 0, "crashes": 1, "losses": 0})
    assert time.monotonic() - started < 1.0, "a child's end is recorded within a second"
    ends(zerog, second, path, 2, 2, crashes=1)  # the ledger has a line of the first job
    (error,) = zerog.info(second)["errors"]
    assert (error["reason"], error["attempt"]) == ("crashed", 1)


@default
def test_an_agent_that_sleeps_past_its_lease_writes_nothing_more(zerog: Deployment, tmp_path: Path) -> None:
    armed(zerog, f"run.mid=pause:{LEASE * 3}@1")
    uuid, path = ledger(zerog, tmp_path, 8 * LEASE)
    zerog.wait_for(uuid, state="running")
    zerog.start_agent()
    zerog.wait_for(uuid, attempt=2)
    wait_until(lambda: f"superseded job={uuid} attempt=1" in zerog.log(), 15, "the first agent finds out")
    zerog.client.delete(f"/jobs/{uuid}")
    assert zerog.wait(uuid)["attempt"] == 2
    assert zerog.log().count(f"superseded job={uuid} attempt=1") == 1, "said once, counted once"
    if "ZEROG_DATASTORE" not in zerog.environment:
        wait_until(lambda: 1 in superseded_counts(zerog), 5, "the count in the agent's record")
    assert len(path.read_text().splitlines()) == 2


@default
def test_an_entry_that_is_lost_while_the_lease_lives_changes_nothing(zerog: Deployment, tmp_path: Path) -> None:
    armed(zerog, "run.touch_lost=raise")
    uuid, path = ledger(zerog, tmp_path, 2.5 * LEASE)
    zerog.wait_for(uuid, state="running")
    zerog.start_agent()  # it gets the entry when its time is over, and is told that the job runs
    ends(zerog, uuid, path, 1, 1)
    reached(zerog, "run.touch_lost=raise")


@everywhere
@pytest.mark.parametrize(
    ("spec", "dead"),
    [
        ("submit.after_append=kill@1", True),
        ("submit.after_insert=kill@1", True),
        ("submit.after_put=kill@1", True),
        ("submit.insert_ambiguous=applied@1", False),
        ("submit.insert_ambiguous=not_applied@1", False),
        ("submit.put_fails=raise@1", False),
        ("submit.put_ambiguous=applied@1", False),
        ("submit.put_ambiguous=not_applied@1", False),
    ],
)
def test_a_submit_that_is_injured_makes_one_job(zerog: Deployment, tmp_path: Path, spec: str, dead: bool) -> None:
    zerog.restart_server(failpoint=spec)
    path = tmp_path / "ledger"
    headers = {"Idempotency-Key": str(uuid4())}

    def submit() -> httpx.Response:
        return zerog.client.post("/run/ledger", json={"path": str(path)}, headers=headers)

    if dead:
        with pytest.raises(httpx.HTTPError):
            submit()
        zerog.restart_server()
        answer = submit()
        assert ("Idempotency-Replayed" in answer.headers) == (spec not in ("submit.after_append=kill@1",))
    else:
        answer = submit()
        if spec == "submit.insert_ambiguous=not_applied@1":
            assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
            assert answer.json()["code"] == "store_unavailable"
            answer = submit()
    assert answer.status_code == 202
    zerog.start_agent()
    ends(zerog, answer.json()["uuid"], path, 1, 1)
    reached(zerog, spec, "server")
    listed = zerog.client.get("/jobs?limit=5").json()["items"]
    assert [job["uuid"] for job in listed].count(answer.json()["uuid"]) == 1


@default
def test_a_cancel_holds_although_its_server_died(zerog: Deployment) -> None:
    zerog.restart_server(failpoint="cancel.after_write=kill@1")
    uuid = zerog.submit("noop-later")
    with pytest.raises(httpx.HTTPError):
        zerog.client.delete(f"/jobs/{uuid}")
    zerog.restart_server()
    assert zerog.job(uuid)["state"] == "cancelled"
    assert zerog.client.delete(f"/jobs/{uuid}").status_code == 200, "asking again says the same"
    zerog.start_agent()
    queue_empties(zerog, "noop-later")
    assert zerog.job(uuid)["attempt"] == 0


@pytest.mark.parametrize("zerog", PAIRS[1:], ids=IDS[1:], indirect=True)  # SQLite does both in one write
def test_a_number_without_an_entry_is_a_gap_that_readers_pass(zerog: Deployment) -> None:
    """A submit appends to the log of all jobs and to that of its type; its server dies between number and entry."""
    before = zerog.submit("noop-later")
    zerog.restart_server(failpoint="log.after_number=kill@1")
    with pytest.raises(httpx.HTTPError):
        zerog.submit("noop-later")
    zerog.restart_server()
    after = zerog.submit("noop-later")
    for query in ("", "&type=noop-later"):
        listed = [job["uuid"] for job in zerog.client.get(f"/jobs?limit=2{query}").json()["items"]]
        assert listed == [after, before], "nothing comes after the gap, and nothing in it"
    zerog.start_agent()
    assert zerog.wait(after)["state"] == zerog.wait(before)["state"] == "succeeded"
    reached(zerog, "log.after_number=kill", "server")


@pytest.mark.parametrize(
    "text",
    ["run.mid", "run.mid=kil", "run.mdi=kill", "run.mid=applied", "run.claim_ambiguous=kill", "run.mid=kill@0"],
)
def test_a_fail_point_that_cannot_be_read_starts_nothing(text: str) -> None:
    with pytest.raises(BadSetting, match="ZEROG_FAILPOINT"):
        failpoints.arm(text)
    failpoints.arm("")


# Agents that speak HTTP alone: some points lie in the server, and all of them are survived


@everywhere
@pytest.mark.requirement("M2", "M3")
@pytest.mark.parametrize(("spec", "attempts"), [("run.after_reserve=kill@1", 1), ("run.after_claim=kill@1", 2)])
def test_a_server_killed_while_it_serves_an_agent_loses_nothing(
    zerog: Deployment, tmp_path: Path, spec: str, attempts: int
) -> None:
    zerog.restart_server(failpoint=spec)
    agent = zerog.start_agent(http=True)
    try:
        path = tmp_path / "ledger"
        uuid = str(uuid4())
        answer = zerog.client.post(
            "/run/ledger", json={"path": str(path), "seconds": 0.3}, headers={"Idempotency-Key": uuid}
        )
        assert answer.status_code == 202
        assert zerog.server is not None
        dies(zerog.server)
        zerog.start_server()
        record = zerog.wait(answer.json()["uuid"], 30)
        assert (record["state"], record["attempt"], record["counters"]["errors"]) == ("succeeded", attempts, 0)
        assert len(path.read_text().splitlines()) == 1, "it ran once"
    finally:
        agent.kill()
        zerog.restart_server()


@default
@pytest.mark.requirement("M2")
@pytest.mark.parametrize("point", ["run.after_claim", "run.mid", "run.before_record"])
def test_an_agent_that_speaks_http_killed_there_loses_nothing(zerog: Deployment, tmp_path: Path, point: str) -> None:
    agent = zerog.start_agent(http=True, name="killed", failpoint=f"{point}=kill@1")
    uuid, path = ledger(zerog, tmp_path, 1.5)
    dies(agent)
    zerog.start_agent(http=True, name="killed")
    record = zerog.wait(uuid, 30)
    assert (record["state"], record["counters"]["errors"]) == ("succeeded", 0)
    assert 1 <= len(path.read_text().splitlines()) <= 2
