"""What users do to jobs: retry."""

from __future__ import annotations

import json
import signal
import statistics
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
    with deployed(tmp_path_factory.mktemp("control"), slots="2") as made:
        yield made


@pytest.fixture(scope="module")
def failed(zerog: Deployment) -> dict[str, Any]:
    """The record of a job that failed, submitted with a priority of its own."""
    uuid = zerog.submit("broken", {"message": "as it was"}, params={"priority": 7})
    return zerog.wait(uuid)


def retried(zerog: Deployment, uuid: str, **more: Any) -> dict[str, Any]:
    answer = zerog.client.post(f"/jobs/{uuid}/retry", **more)
    assert answer.status_code == 202, answer.text
    assert answer.headers["Location"] == f"/jobs/{answer.json()['uuid']}"
    return zerog.job(answer.json()["uuid"])


def test_a_retry_is_a_new_job_with_the_same_parameters_and_priority(zerog: Deployment, failed: dict[str, Any]) -> None:
    again = retried(zerog, failed["uuid"])
    assert again["uuid"] != failed["uuid"]
    assert again["parameters"] == failed["parameters"]
    assert (again["priority"], again["retriedFrom"]) == (7, {"href": f"/jobs/{failed['uuid']}"})
    assert zerog.wait(again["uuid"])["state"] == "failed"
    assert zerog.job(failed["uuid"]) == failed, "what has ended never changes"


def test_a_body_replaces_the_parameters_whole(zerog: Deployment, failed: dict[str, Any]) -> None:
    again = retried(zerog, failed["uuid"], json={"until": 1})
    assert again["parameters"] == {"message": "this job always fails", "until": 1}
    assert zerog.wait(again["uuid"])["state"] == "succeeded"


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b'{"mesage": "x"}', {}, 422, "invalid_parameters"),
        (b"{", {}, 400, "invalid_json"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        (b"", {"Idempotency-Key": ""}, 400, "invalid_parameter"),
    ],
)
def test_a_bad_retry_is_refused_and_leaves_nothing(
    zerog: Deployment, failed: dict[str, Any], body: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    newest = zerog.client.get("/jobs?limit=1").json()["items"][0]["uuid"]
    headers = {"Content-Type": "application/json", **headers}
    answer = zerog.client.post(f"/jobs/{failed['uuid']}/retry", content=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert zerog.client.get("/jobs?limit=1").json()["items"][0]["uuid"] == newest


def test_a_key_retries_once_and_fits_no_other_job(zerog: Deployment, failed: dict[str, Any]) -> None:
    headers = {"Idempotency-Key": "again"}
    first = retried(zerog, failed["uuid"], headers=headers)
    answer = zerog.client.post(f"/jobs/{failed['uuid']}/retry", headers=headers)
    assert answer.headers["Idempotency-Replayed"] == "true"
    assert answer.json()["uuid"] == first["uuid"]
    zerog.wait(first["uuid"])
    other = zerog.client.post(f"/jobs/{first['uuid']}/retry", headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


def test_what_has_not_failed_cannot_be_retried(zerog: Deployment) -> None:
    """Row 53 of the bad inputs, and the other states."""
    later = zerog.submit("noop", params={"delay": "600"})
    running = zerog.submit("sleep", {"seconds": 60})
    done = zerog.submit("noop")
    zerog.wait(done)
    zerog.wait_for(running, state="running")
    for uuid in (later, running, done):
        answer = zerog.client.post(f"/jobs/{uuid}/retry")
        assert (answer.status_code, answer.json()["code"]) == (409, "not_retryable")
    assert zerog.client.post("/jobs/00000000-0000-0000-0000-000000000000/retry").status_code == 404
    for uuid in (running, later):
        zerog.client.delete(f"/jobs/{uuid}")
    assert zerog.wait(running)["state"] == "cancelled"
    again = retried(zerog, running, json={"seconds": 0})
    assert zerog.wait(again["uuid"])["state"] == "succeeded"


def test_secrets_survive_a_retry_and_are_shown_nowhere(zerog: Deployment) -> None:
    login = {"user": "me", "password": "hunter2-öß"}
    uuid = zerog.submit("secret", {"login": login, "wrong": True})
    zerog.client.delete(f"/jobs/{uuid}")
    assert zerog.wait(uuid)["state"] in ("cancelled", "failed")
    again = retried(zerog, uuid)
    assert again["parameters"]["login"]["password"] == "**********"
    shown = zerog.client.post(f"/jobs/{uuid}/retry", json={"login": again["parameters"]["login"]})
    assert (shown.status_code, shown.json()["errors"][0]["pointer"]) == (422, "/login/password"), "no mask is a secret"
    fresh = retried(zerog, uuid, json={"login": login})
    assert zerog.wait(fresh["uuid"])["state"] == "succeeded"
    assert zerog.client.get(f"/jobs/{fresh['uuid']}/data").json() is True, "the real value reached the job"


def test_the_command_retries(zerog: Deployment, failed: dict[str, Any]) -> None:
    arguments = [sys.executable, "-m", "zerog", "job", "retry", failed["uuid"], "until=1", "--json"]
    environment = {**zerog.environment, "ZEROG_SERVER": zerog.url}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert zerog.wait(json.loads(done.stdout)["uuid"])["state"] == "succeeded"
    waited = subprocess.run([*arguments[:-1], "--wait"], env=environment, capture_output=True, text=True, timeout=60)
    assert (waited.returncode, json.loads(waited.stdout)) == (0, "succeeded in attempt 1"), waited.stderr
    refused = subprocess.run(
        [*arguments[:5], zerog.submit("noop"), "--json"], env=environment, capture_output=True, timeout=60
    )
    assert refused.returncode == 4


# Keeping state


@pytest.mark.parametrize(("how", "counter"), [("raise", "errors"), ("kill", "crashes")])
@pytest.mark.requirement("Z12", "Z14")
def test_a_job_goes_on_where_its_last_checkpoint_was(zerog: Deployment, tmp_path: Path, how: str, counter: str) -> None:
    path = tmp_path / "steps"
    uuid = zerog.submit("steps", {"path": str(path), "how": how})
    record = zerog.wait(uuid)
    assert (record["state"], record["attempt"], record["counters"][counter]) == ("succeeded", 2, 1)
    assert zerog.client.get(f"/jobs/{uuid}/data").json() == 3
    assert path.read_text().splitlines() == ["1 0", "1 1", "1 2", "1 3", "2 3", "2 4"]


def test_state_survives_the_loss_of_the_agent_and_a_drain(tmp_path: Path) -> None:
    with deployed(tmp_path, slots="1") as zerog:
        for number in (signal.SIGKILL, signal.SIGTERM):
            path = tmp_path / f"steps{number}"
            uuid = zerog.submit("steps", {"path": str(path), "how": "wait"})
            zerog.wait_for(uuid, message="at the bad step")
            agent = zerog.agents.pop()
            agent.signal(number)
            if number == signal.SIGTERM:
                wait_until(lambda: "draining" in zerog.log(), what="the drain")
                agent.signal(number)  # a second one stops at once
            agent.popen.wait(20)
            zerog.start_agent()
            record = zerog.wait(uuid)
            assert (record["state"], record["attempt"]) == ("succeeded", 2)
            assert path.read_text().splitlines()[-2:] == ["2 3", "2 4"]
            assert record["counters"]["losses"] == (1 if number == signal.SIGKILL else 0)


def test_a_checkpoint_that_cannot_be_kept_is_refused(zerog: Deployment) -> None:
    uuid = zerog.submit("bad-checkpoint")
    zerog.wait(uuid)
    refused = zerog.client.get(f"/jobs/{uuid}/data").json()
    assert len(refused) == 3
    assert "65536 bytes" in refused[2]


# Limits


@pytest.mark.parametrize("job_type", ["softly-limited", "softly-limited-async"])
def test_the_soft_limit_lets_a_job_save_what_it_has(zerog: Deployment, job_type: str) -> None:
    uuid = zerog.submit(job_type)
    assert zerog.wait(uuid)["state"] == "succeeded"
    assert zerog.client.get(f"/jobs/{uuid}/data").json() == "saved"


@pytest.mark.parametrize(
    ("job_type", "reason"), [("softly-limited", "time_limit"), ("softly-limited-async", "soft_time_limit")]
)
def test_who_does_not_heed_the_soft_limit_fails(zerog: Deployment, job_type: str, reason: str) -> None:
    uuid = zerog.submit(job_type, {"heed": False})
    record = zerog.wait(uuid)
    assert (record["state"], record["resultCode"], record["reason"]) == ("failed", 504, reason)
    assert [error["reason"] for error in zerog.info(uuid)["errors"]] == [reason]


@pytest.mark.parametrize("how", ["touch", "child", "map"])
def test_too_much_memory_is_507(zerog: Deployment, how: str) -> None:
    uuid = zerog.submit("memory-limited", {"size": 700_000_000 if how == "map" else 300_000_000, "how": how})
    record = zerog.wait(uuid)
    assert (record["state"], record["resultCode"], record["reason"]) == ("failed", 507, "memory_limit")
    assert [error["reason"] for error in zerog.info(uuid)["errors"]] == ["memory_limit"]


def test_a_memory_limit_is_of_its_job_alone(zerog: Deployment) -> None:
    limited = zerog.submit("memory-limited", {"size": 0, "how": "none"})
    assert zerog.wait(limited)["state"] == "succeeded"
    data = zerog.client.get(f"/jobs/{limited}/data").json()
    assert 0 < data["limit"] < 2**40
    limited_pid = data["pid"]
    for _ in range(10):  # until the very process that was limited has run one
        uuid = zerog.submit("unlimited")
        zerog.wait(uuid)
        data = zerog.client.get(f"/jobs/{uuid}/data").json()
        assert data["limit"] == -1
        if data["pid"] == limited_pid:
            return
    pytest.fail("the process that was limited has run no other job")


def test_what_must_not_run_twice_is_not_given_back(tmp_path: Path) -> None:
    with deployed(tmp_path, slots="1", drain="0.2") as zerog:
        uuid = zerog.submit("only-once", {"seconds": 60})
        zerog.wait_for(uuid, message="started")
        zerog.agents.pop().terminate()
        record = zerog.job(uuid)
        assert (record["state"], record["resultCode"], record["reason"]) == ("failed", 500, "outcome_unknown")
        (error,) = zerog.client.get(f"/jobs/{uuid}/info").json()["errors"]
        assert (error["reason"], error["code"], error["message"]) == ("outcome_unknown", 500, record["message"])
        zerog.start_agent()
        uuid = zerog.submit("only-once")
        record = zerog.wait(uuid)
        assert (record["reason"], record["counters"]["crashes"]) == ("outcome_unknown", 1)


def test_a_cancel_that_comes_while_a_checkpoint_waits_is_heard(tmp_path: Path) -> None:
    with deployed(tmp_path, grace="20", slots="1") as zerog:
        for _ in range(3):
            uuid = zerog.submit("keeping")
            zerog.wait_for(uuid, state="running")
            time.sleep(0.3)  # it keeps its state again and again
            started = time.monotonic()
            zerog.client.delete(f"/jobs/{uuid}")
            assert zerog.wait(uuid)["state"] == "cancelled"
            assert time.monotonic() - started < 10, "by itself, and not by SIGTERM after the grace"
            assert [event["message"] for event in zerog.info(uuid)["events"]] == ["cancelled inside"]


def test_a_cancel_reaches_an_agent_at_once(zerog: Deployment) -> None:
    """Through its tube, and not at its next look, which comes within a second."""
    times = []
    for _ in range(5):
        uuid = zerog.submit("asynchronous", {"seconds": 60})
        zerog.wait_for(uuid, state="running")
        time.sleep(0.05)  # the child starts the job
        started = time.monotonic()
        assert zerog.client.delete(f"/jobs/{uuid}").json()["cancelling"] is True
        zerog.wait_for(uuid, state="cancelled")
        times.append(time.monotonic() - started)
    assert statistics.median(times) < 0.3, times
