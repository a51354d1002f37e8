"""The whole path as a client sees it, on all four pairs of store and queue, with kills between the steps."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.deployment import Deployment
from tests.services import Beanstalkd, wait_until

PAIRS = [("sqlite", "sqlite"), ("sqlite", "beanstalkd"), ("couchbase", "sqlite"), ("couchbase", "beanstalkd")]


@pytest.fixture(params=PAIRS, ids=["-".join(pair) for pair in PAIRS])
def deployment(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Deployment]:
    """A deployment over one pair; beanstalkd has its binlog."""
    store, queue = request.param
    server = Beanstalkd(tmp_path / "b", durable=True).start() if queue == "beanstalkd" else None
    couchbase = request.getfixturevalue("couchbase") if store == "couchbase" else None
    made = Deployment(tmp_path / "zerog", store, queue, beanstalkd=server, couchbase=couchbase)
    try:
        made.start()
        yield made
    finally:
        made.close()
        if server is not None:
            server.stop()


@pytest.mark.requirement(
    "Z1", "Z2", "Z3", "Z4", "Z5", "Z6", "Z7", "Z8", "Z9", "Z10", "Z11", "Z14", "Z15", "Z16", "Z17", "Z18", "M12"
)
def test_a_job_goes_the_whole_path(deployment: Deployment, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for number in range(20):
        (files / f"{number:02}.txt").write_text(f"file {number}")
    answer = deployment.client.post("/run/inventory", json={"path": str(files)})
    assert answer.status_code == 202
    view = answer.json()
    assert view["resultCode"] == -1
    assert answer.headers["Location"] == f"/jobs/{view['uuid']}" == view["href"]
    record = deployment.wait(view["uuid"])
    assert (record["state"], record["resultCode"], record["completeness"], record["attempt"]) == (
        "succeeded",
        200,
        1,
        1,
    )
    data = deployment.client.get(f"{view['href']}/data")
    assert data.headers["Content-Type"] == "application/json"
    assert data.json()["files"] == 20
    assert [row["name"] for row in data.json()["manifest"]][:2] == ["00.txt", "01.txt"]
    info = deployment.info(view["uuid"])
    assert info["errors"] == info["warnings"] == []
    assert deployment.client.get("/jobs").json()["items"][0]["uuid"] == view["uuid"]


@pytest.mark.requirement("Z12", "Z13", "Z14", "Z17")
def test_failures_and_requeues_go_their_way(deployment: Deployment) -> None:
    failing = deployment.submit("broken", {"message": "as always"})
    patient = deployment.submit("patient", {"rounds": 3, "delay": 0.5})
    cancelled = deployment.submit("sleep", {"seconds": 60})
    deployment.wait_for(cancelled, state="running")
    assert deployment.client.post(f"/jobs/{cancelled}/cancel").status_code == 202
    record = deployment.wait(failing)
    assert (record["state"], record["resultCode"], record["attempt"]) == ("failed", 500, 3)
    assert record["counters"] == {"errors": 3, "crashes": 0, "losses": 0}
    errors = deployment.info(failing)["errors"]
    assert [error["attempt"] for error in errors] == [1, 2, 3]
    assert all("RuntimeError: as always" in error["traceback"] for error in errors)
    record = deployment.wait(patient)
    assert (record["state"], record["attempt"]) == ("succeeded", 3)
    assert deployment.client.get(f"/jobs/{patient}/data").json() == {"asked": 3}
    assert deployment.wait(cancelled)["resultCode"] == 410


@pytest.mark.requirement("Z6", "Z9", "Z14")
def test_kills_and_restarts_between_the_steps_lose_nothing(deployment: Deployment, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    deployment.agents.pop().kill()
    first = deployment.submit("ledger", {"path": str(ledger)})
    deployment.restart_server()
    if deployment.beanstalkd is not None:
        deployment.beanstalkd.restart()
    deployment.start_agent()
    assert deployment.wait(first)["state"] == "succeeded"
    second = deployment.submit("ledger", {"path": str(ledger), "seconds": 2})
    deployment.wait_for_ledger(ledger, second)
    deployment.restart_agent()
    deployment.restart_server()
    record = deployment.wait(second, 60)
    assert (record["state"], record["attempt"]) == ("succeeded", 2)
    assert record["counters"] == {"errors": 0, "crashes": 0, "losses": 1}
    assert ledger.read_text().splitlines() == [f"{first} 1", f"{second} 1", f"{second} 2"]
    assert [error["reason"] for error in deployment.info(second)["errors"]] == ["lost"]


@pytest.mark.requirement("Z7", "Z9")
@pytest.mark.parametrize("store", ["sqlite", "couchbase"])
def test_a_queue_that_forgot_everything_is_filled_again(
    tmp_path: Path, store: str, request: pytest.FixtureRequest
) -> None:
    couchbase = request.getfixturevalue("couchbase") if store == "couchbase" else None
    server = Beanstalkd(tmp_path / "b").start()
    made = Deployment(tmp_path / "zerog", store, "beanstalkd", beanstalkd=server, couchbase=couchbase)
    try:
        made.start_server()
        uuids = [made.submit("noop") for _ in range(20)]
        server.restart()
        made.start_agent()
        assert {made.wait(uuid)["state"] for uuid in uuids} == {"succeeded"}
    finally:
        made.close()
        server.stop()


@pytest.mark.requirement("Z6", "Z8")
@pytest.mark.parametrize("queue", ["sqlite", "beanstalkd"] if os.environ.get("TESTS_FULL") else ["sqlite"])
def test_no_acknowledged_job_is_missing_after_kills_of_the_server(
    tmp_path: Path, queue: str, request: pytest.FixtureRequest
) -> None:
    """Server and agent share one file; the agent works on while the server is killed under many submits."""
    server = request.getfixturevalue("beanstalkd") if queue == "beanstalkd" else None
    made = Deployment(tmp_path, "sqlite", queue, beanstalkd=server)
    try:
        made.start()
        acknowledged: list[str] = []
        enough = threading.Event()
        with ThreadPoolExecutor(16) as pool:
            submitters = [pool.submit(submit_until, made.url, enough, acknowledged) for _ in range(16)]
            try:
                for kill in range(1, 4):
                    # A kill comes while submits are under way, however fast this machine is.
                    wait_until(lambda: len(acknowledged) >= 125 * kill, 60, "acknowledged jobs")  # noqa: B023
                    made.restart_server()
                wait_until(lambda: len(acknowledged) >= 500, 60, "acknowledged jobs")
            finally:
                enough.set()
            for one in submitters:
                one.result()
        assert len(set(acknowledged)) == len(acknowledged)
        states = {uuid: made.wait(uuid, 60)["state"] for uuid in acknowledged}
        assert set(states.values()) == {"succeeded"}
        numbers = [made.job(uuid)["number"] for uuid in acknowledged[:500]]
        assert len(set(numbers)) == len(numbers)
    finally:
        made.close()
    with sqlite3.connect(tmp_path / "var" / "zerog.db") as store:
        assert store.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def submit_until(url: str, enough: threading.Event, acknowledged: list[str]) -> None:
    """Submit no-op jobs one after the other and note the UUIDs that were acknowledged."""
    with httpx.Client(base_url=url) as client:
        while not enough.is_set():
            try:
                answer = client.post("/run/noop", json={})
            except httpx.HTTPError:
                continue  # the server was killed
            if answer.status_code == 202:
                acknowledged.append(answer.json()["uuid"])
            else:
                assert answer.status_code == 503, answer.text


@pytest.mark.requirement("Z12")
def test_three_restarts_of_the_agent_spend_nothing(tmp_path: Path) -> None:
    made = Deployment(tmp_path, drain="100ms")
    try:
        made.start()
        uuid = made.submit("ledger", {"path": str(tmp_path / "ledger"), "seconds": 4})
        for attempt in (1, 2, 3):
            made.wait_for(uuid, state="running", attempt=attempt)
            made.restart_agent(signal.SIGTERM)
        record = made.wait(uuid)
        assert (record["state"], record["attempt"]) == ("succeeded", 4)
        assert record["counters"] == {"errors": 0, "crashes": 0, "losses": 0}
        assert made.info(uuid)["errors"] == []
    finally:
        made.close()
