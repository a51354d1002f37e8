"""Why a job is not done: one test a reason; pauses and parents on real processes."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deployment import Deployment, deployed
from tests.services import wait_until


@pytest.fixture(scope="module")
def zerog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("explain"), slots="2") as made:
        yield made


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[Deployment]:
    """A server without an agent."""
    made = Deployment(tmp_path)
    try:
        made.start_server()
        yield made
    finally:
        made.close()


def why(zerog: Deployment, uuid: str) -> dict[str, Any]:
    answer = zerog.client.get(f"/jobs/{uuid}/explain")
    assert answer.status_code == 200, answer.text
    view: dict[str, Any] = answer.json()
    assert view["href"] == f"/jobs/{uuid}/explain"
    assert view["message"]
    return view


def command(zerog: Deployment, *arguments: str) -> str:
    environment = {**zerog.environment, "ZEROG_SERVER": zerog.url}
    done = subprocess.run(
        [sys.executable, "-m", "zerog", *arguments], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Reasons


def test_finished(zerog: Deployment) -> None:
    uuid = zerog.submit("noop")
    zerog.wait(uuid)
    view = why(zerog, uuid)
    assert (view["reason"], view["state"], view["message"]) == ("finished", "succeeded", "it has succeeded")


def test_running_and_cancelling(zerog: Deployment) -> None:
    uuid = zerog.submit("deaf", {"seconds": 60})
    record = zerog.wait_for(uuid, state="running")
    view = why(zerog, uuid)
    assert (view["reason"], view["agent"]) == ("running", record["agent"])
    assert 0 <= view["seconds"] < 1.5
    zerog.client.delete(f"/jobs/{uuid}")
    assert why(zerog, uuid)["reason"] == "cancelling"
    zerog.wait(uuid)


def test_lease_silent(zerog: Deployment) -> None:
    uuid = zerog.submit("sleep", {"seconds": 60})
    record = zerog.wait_for(uuid, state="running")
    zerog.agents[0].signal(signal.SIGSTOP)
    view = wait_until(lambda: v if (v := why(zerog, uuid))["reason"] == "lease_silent" else None, 10, "silence")
    assert view["agent"] == record["agent"]
    assert view["seconds"] >= 1.5
    zerog.agents[0].signal(signal.SIGCONT)
    zerog.client.delete(f"/jobs/{uuid}")
    zerog.wait(uuid)


def test_not_before(zerog: Deployment) -> None:
    uuid = zerog.submit("noop", params={"delay": "600"})
    view = why(zerog, uuid)
    assert (view["reason"], view["notBefore"]) == ("not_before", zerog.job(uuid)["notBefore"])


def test_no_agent_then_ahead(idle: Deployment) -> None:
    uuids = [idle.submit("noop") for _ in range(3)]
    view = why(idle, uuids[0])
    assert (view["reason"], view["jobType"]) == ("no_agent", "noop")
    idle.start_agent(job_types="sleep")
    wait_until(lambda: "serves" in idle.log(), what="an agent of another type")
    time.sleep(0.3)  # it says who it is
    assert why(idle, uuids[0])["reason"] == "no_agent"
    idle.start_agent(job_types="noop", slots="1")
    for uuid in uuids:
        idle.wait(uuid)
    running = idle.submit("noop")
    idle.wait(running)
    agent = idle.agents[-1]
    agent.signal(signal.SIGSTOP)
    waiting = [idle.submit("noop") for _ in range(4)]
    view = why(idle, waiting[2])
    assert view["reason"] == "ahead"
    assert 2 <= view["ahead"] <= 3, "at most: two are ahead, and whether the last one is later is not known"
    agent.signal(signal.SIGCONT)
    idle.wait(waiting[3])
    agent.kill()
    assert why(idle, idle.submit("noop"))["reason"] == "no_agent", "that it is gone is known at once"


def test_an_agent_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    """Neither silent for a while nor lapsed: the lock of a killed agent is free at once."""
    with deployed(tmp_path, lease="20s", sweep="20s") as zerog:
        uuid = zerog.submit("sleep", {"seconds": 60})
        zerog.wait_for(uuid, state="running")
        agent = zerog.agents.pop()
        agent.signal(signal.SIGKILL)
        agent.popen.wait(10)
        view = why(zerog, uuid)
        assert (view["reason"], view["message"]) == (
            "lease_silent",
            f"it ran on agent {view['agent']}, which is gone; it is tried elsewhere, or ends",
        )
        assert sorted(view) == ["agent", "href", "jobType", "message", "reason", "seconds", "state", "uuid"]
        zerog.start_agent()
        zerog.wait_for(uuid, attempt=2)
        (error,) = zerog.info(uuid)["errors"]
        assert (error["reason"], error["message"].partition(":")[0]) == ("lost", "the agent is gone")
        zerog.client.delete(f"/jobs/{uuid}")
        zerog.wait(uuid)


def test_an_agent_that_drains_serves_nothing_any_more(tmp_path: Path) -> None:
    with deployed(tmp_path, slots="1") as zerog:
        running = zerog.submit("ledger", {"path": str(tmp_path / "ledger"), "seconds": 5})
        zerog.wait_for(running, state="running")
        waiting = zerog.submit("ledger", {"path": str(tmp_path / "ledger")})
        assert (
            why(zerog, waiting)["message"] == "none of its type is ahead of it: an agent takes it when a slot is free"
        )
        zerog.agents[0].signal(signal.SIGTERM)
        wait_until(lambda: why(zerog, waiting)["reason"] == "no_agent", 4, "the agent says that it drains")
        assert zerog.job(running)["state"] == "running"
        assert zerog.wait(running)["attempt"] == 1


def test_newer_version(zerog: Deployment) -> None:
    """A record of a newer schema is left untouched, whoever looks at it."""
    uuid = zerog.submit("noop", params={"delay": "1"})
    path = zerog.folder / "var" / "zerog.db"
    with sqlite3.connect(path) as connection:
        (body,) = connection.execute("SELECT body FROM documents WHERE key = ?", (f"zerog:job:{uuid}",)).fetchone()
        newer = json.dumps({**json.loads(body), "schema": 99, "colour": "blue"}).encode()
        connection.execute("UPDATE documents SET body = ? WHERE key = ?", (newer, f"zerog:job:{uuid}"))
    connection.close()
    assert why(zerog, uuid)["reason"] == "newer_version"
    time.sleep(2.5)  # its entry becomes ready, an agent gets it, and the sweep comes past
    assert why(zerog, uuid)["reason"] == "newer_version"
    with sqlite3.connect(path) as connection:
        (body,) = connection.execute("SELECT body FROM documents WHERE key = ?", (f"zerog:job:{uuid}",)).fetchone()
    connection.close()
    assert body == newer
    stats = zerog.client.get("/types/noop").json()["queue"]
    assert stats["buried"] == 0
    assert stats["ready"] + stats["delayed"] + stats["reserved"] >= 1, "its entry is kept for who can read it"


def test_paused(zerog: Deployment) -> None:
    assert zerog.client.get("/types/noop-later").json()["paused"] is None
    running = zerog.submit("ledger", {"path": str(zerog.folder / "ledger"), "seconds": 2})
    zerog.wait_for(running, state="running")
    answer = zerog.client.post("/types/ledger/pause", json={"message": "maintenance"})
    assert answer.status_code == 200
    pause = answer.json()["paused"]
    assert (pause["by"], pause["message"]) == ("local", "maintenance")
    for body in ({}, {"json": {"message": "maintenance"}}):
        again = zerog.client.post("/types/ledger/pause", **body).json()["paused"]  # type: ignore[arg-type]
        assert again == pause, "repeatable: who was first stays"
    told = zerog.client.post("/types/ledger/pause", json={"message": "a disk is broken"}).json()["paused"]
    assert told["message"] == "a disk is broken", "what is said anew counts"
    pause = zerog.client.post("/types/ledger/pause", json={"message": "maintenance"}).json()["paused"]
    time.sleep(1.2)  # agents know of it within a second
    held_back = zerog.submit("ledger", {"path": str(zerog.folder / "ledger")})
    others = zerog.submit("noop")
    assert zerog.wait(others)["state"] == "succeeded"
    view = why(zerog, held_back)
    assert (view["reason"], view["by"], view["at"]) == ("paused", "local", pause["at"])
    assert view["message"] == "maintenance"
    assert zerog.wait(running)["state"] == "succeeded", "what ran goes on"
    assert zerog.job(held_back)["state"] == "queued"
    for _ in range(2):
        assert zerog.client.post("/types/ledger/resume").json()["paused"] is None
    assert zerog.wait(held_back, 5)["state"] == "succeeded"


def test_a_pause_holds_over_restarts_and_wiped_queues(tmp_path: Path) -> None:
    with deployed(tmp_path) as zerog:
        zerog.client.post("/types/noop/pause")
        uuid = zerog.submit("noop", params={"delay": "1"})
        zerog.restart_server()
        zerog.restart_agent()
        time.sleep(2)  # it becomes due, and is looked at
        assert (zerog.job(uuid)["state"], why(zerog, uuid)["reason"]) == ("queued", "paused")
        zerog.client.post("/types/noop/resume")
        assert zerog.wait(uuid)["attempt"] == 1


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/types/nothing/pause", None, 404),
        ("/types/noop/pause", b'{"mesage": "x"}', 422),
        ("/types/noop/pause", b'{"message": 5}', 422),
        ("/types/noop/pause", b"[", 400),
        ("/types/noop/resume", b"{", 400),
        ("/types/noop/resume", b'{"mesage": "x"}', 422),
        ("/jobs:retry", b"{}", 422),
        ("/jobs:retry", b'{"type": "noop", "limit": 0}', 422),
        ("/jobs:retry", b'{"type": "noop", "state": "succeeded"}', 422),
        ("/jobs:retry", b'{"type": "nothing"}', 404),
        ("/run/noop?parent=nonsense", b"{}", 400),
        ("/run/noop?parent=00000000-0000-0000-0000-000000000000", b"{}", 400),
    ],
)
def test_bad_requests_are_refused(zerog: Deployment, path: str, body: bytes | None, status: int) -> None:
    headers = {"Content-Type": "application/json"} if body is not None else {}
    answer = zerog.client.post(path, content=body, headers=headers)
    assert answer.status_code == status, answer.text
    if "parent" in path:
        assert answer.json()["code"] == "unknown_parent"
        assert answer.json()["errors"][0]["parameter"] == "parent"


# Parents


def test_a_child_waits_for_its_parents_and_runs_once(zerog: Deployment, tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    slow = zerog.submit("ledger", {"path": str(path), "seconds": 1})
    quick = zerog.submit("noop")
    child = zerog.submit("ledger", {"path": str(path)}, params={"parent": [slow, quick, slow]})
    record = zerog.job(child)
    assert (record["state"], [one["href"] for one in record["parents"]]) == (
        "waiting",
        [f"/jobs/{slow}", f"/jobs/{quick}"],
    )
    zerog.wait(quick)
    view = why(zerog, child)
    assert (view["reason"], view["parents"]) == ("waiting_for_parent", [{"href": f"/jobs/{slow}"}])
    zerog.wait(slow)
    ended = time.monotonic()
    assert zerog.wait(child)["state"] == "succeeded"
    assert time.monotonic() - ended < 1.5, "released by the agent, not by the sweep"
    assert path.read_text().split() == [slow, "1", child, "1"]


def test_children_of_what_failed_are_cancelled_with_the_reason(zerog: Deployment) -> None:
    parent = zerog.submit("raise", {"what": "fail"}, params={"delay": "0.5"})
    child = zerog.submit("noop", params={"parent": parent})
    grandchild = zerog.submit("noop", params={"parent": child})
    for uuid, culprit in ((child, parent), (grandchild, child)):
        record = zerog.wait(uuid)
        assert (record["state"], record["resultCode"], record["reason"]) == ("cancelled", 410, "parent_failed")
        assert culprit in record["message"]
    late = zerog.client.post("/run/noop", params={"parent": parent}, json={})
    assert (late.status_code, late.json()["state"], late.json()["reason"]) == (202, "cancelled", "parent_failed")


def test_a_retry_of_what_never_ran_waits_for_its_parents_again(zerog: Deployment) -> None:
    failed = zerog.submit("raise", {"what": "fail"})
    zerog.wait(failed)
    child = zerog.submit("noop", params={"parent": failed})
    assert zerog.job(child)["reason"] == "parent_failed"
    again = zerog.client.post(f"/jobs/{child}/retry").json()
    assert (again["state"], again["reason"]) == ("cancelled", "parent_failed"), "nothing runs before its parents"
    good = zerog.submit("noop")
    other = zerog.client.post(f"/jobs/{child}/retry", params={"parent": good})
    assert other.status_code == 202
    record = zerog.wait(other.json()["uuid"])
    assert (record["state"], record["parents"]) == ("succeeded", [{"href": f"/jobs/{good}"}])
    key = {"Idempotency-Key": "this-child-again"}
    for parent, status in ((good, 202), (good, 202), (zerog.submit("noop"), 422)):
        keyed = zerog.client.post(f"/jobs/{child}/retry", params={"parent": parent}, headers=key)
        assert keyed.status_code == status, "the parents belong to what the key stands for"
    unknown = zerog.client.post(f"/jobs/{child}/retry", params={"parent": "nobody"})
    assert (unknown.status_code, unknown.json()["code"]) == (400, "unknown_parent")
    ran = zerog.submit("raise", {"what": "fail"}, params={"parent": good})
    assert zerog.wait(ran)["state"] == "failed"
    assert zerog.client.post(f"/jobs/{ran}/retry").status_code == 202
    assert zerog.job(zerog.client.get("/jobs?limit=1").json()["items"][0]["uuid"])["parents"] == [], (
        "they had succeeded"
    )


def test_a_cancelled_parent_takes_its_children_along(zerog: Deployment) -> None:
    parent = zerog.submit("noop", params={"delay": "600"})
    child = zerog.submit("noop", params={"parent": parent})
    zerog.client.delete(f"/jobs/{parent}")
    assert zerog.wait(child, 5)["reason"] == "parent_failed"


def test_a_waiting_job_can_be_cancelled(zerog: Deployment) -> None:
    parent = zerog.submit("noop", params={"delay": "600"})
    child = zerog.submit("noop", params={"parent": parent})
    answer = zerog.client.delete(f"/jobs/{child}")
    assert (answer.status_code, answer.json()["reason"]) == (200, "cancelled")


@pytest.mark.parametrize("spec", ["release.before_write=kill@1", "release.after_write=kill@1"])
def test_a_release_that_is_injured_happens_once(tmp_path: Path, spec: str) -> None:
    """Whoever releases, agent, server or sweep, may die there: another one does it."""
    with deployed(tmp_path) as zerog:
        zerog.agents.pop().terminate()
        injured = zerog.start_agent(failpoint=spec)
        path = tmp_path / "ledger"
        parent = zerog.submit("ledger", {"path": str(path), "seconds": 0.5})
        child = zerog.submit("ledger", {"path": str(path)}, params={"parent": parent})
        zerog.wait(parent)
        wait_until(lambda: injured.popen.poll() is not None or zerog.job(child)["state"] != "waiting", 5, "the release")
        zerog.start_agent()
        assert zerog.wait(child)["state"] == "succeeded"
        assert path.read_text().split() == [parent, "1", child, "1"]


# Many dead letters


def test_many_dead_letters_are_retried_once_each(zerog: Deployment) -> None:
    failed = []
    for _ in range(4):
        failed.append(zerog.submit("raise", {"what": "fail"}))
        zerog.wait(failed[-1])  # one after the other, so that their order among the dead letters is known
    first = zerog.client.post("/jobs:retry", json={"type": "raise", "limit": 3}).json()["items"]
    assert [item["status"] for item in first] == [202] * 3
    assert [item["job"]["href"] for item in first] == [f"/jobs/{uuid}" for uuid in reversed(failed[1:])]
    again = zerog.job(first[0]["retried"]["href"].rsplit("/", 1)[-1])
    assert again["retriedFrom"] == first[0]["job"]
    zerog.wait(again["uuid"])
    zerog.client.post("/types/raise/pause")
    second = json.loads(command(zerog, "jobs", "retry", "--type", "raise", "--json"))
    hrefs = {item["job"]["href"] for item in second}
    assert f"/jobs/{failed[0]}" in hrefs
    assert not hrefs & {item["job"]["href"] for item in first}, "what was tried again is passed over"
    zerog.client.post("/types/raise/resume")


def test_the_commands_say_why_and_pause(zerog: Deployment) -> None:
    assert "paused by local" in command(zerog, "queue", "pause", "noop", "-m", "for lunch")
    uuid = command(zerog, "run", "noop", "--priority", "5").strip()
    assert command(zerog, "job", "explain", uuid).startswith("paused: for lunch (by local at ")
    assert "by local" in command(zerog, "queue")
    child = command(zerog, "run", "noop", "--parent", uuid, "--delay", "0.1").strip()
    assert json.loads(command(zerog, "job", "explain", child, "--json"))["reason"] == "waiting_for_parent"
    assert "not paused" in command(zerog, "queue", "resume", "noop")
    assert zerog.wait(child)["state"] == "succeeded"


def test_old_jobs_go_by_themselves_and_by_hand(tmp_path: Path) -> None:
    with deployed(tmp_path, retention="2") as zerog:
        first = zerog.submit("noop")
        zerog.wait(first)
        wait_until(lambda: zerog.client.get(f"/jobs/{first}").status_code == 404, 15, "the end of its retention")
        assert zerog.client.get("/jobs").json()["items"] == []
        later = zerog.submit("noop")
        zerog.wait(later)
        waiting = zerog.submit("noop", params={"delay": "600"})
        assert command(zerog, "jobs", "prune", "--type", "noop", "--older-than", "0s") == "1 jobs removed\n"
        assert [job["uuid"] for job in zerog.client.get("/jobs").json()["items"]] == [waiting]
