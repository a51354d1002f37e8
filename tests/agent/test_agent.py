"""The agent's hard parts, on a real server and a real agent over the embedded adapters."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.deployment import Deployment, alive, children, deployed
from tests.services import wait_until

FULL = bool(os.environ.get("TESTS_FULL"))


@pytest.fixture(scope="module")
def zerog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """One deployment for the tests that injure no process of it."""
    with deployed(tmp_path_factory.mktemp("agent"), slots="4", max_result="100KiB") as made:
        yield made


def end(zerog: Deployment, job_type: str, **parameters: Any) -> dict[str, Any]:
    return zerog.wait(zerog.submit(job_type, parameters))


# Outcomes


@pytest.mark.requirement("Z12", "Z13")
@pytest.mark.parametrize(
    ("what", "attempts", "code", "reason", "traced"),
    [
        ("plain", 3, 500, "exception", True),
        ("fail", 1, 422, "failed", False),
        ("retry", 3, 500, "retry", False),
        ("exit", 3, 500, "exception", True),
        ("interrupt", 3, 500, "exception", True),
        ("final", 1, 500, "exception", True),
        ("bad-text", 3, 500, "exception", True),
    ],
)
def test_what_a_job_raises_decides_how_often_it_runs(
    zerog: Deployment, what: str, attempts: int, code: int, reason: str, traced: bool
) -> None:
    record = end(zerog, "raise", what=what)
    assert (record["state"], record["resultCode"], record["reason"]) == ("failed", code, reason)
    assert record["attempt"] == attempts
    errors = zerog.info(record["uuid"])["errors"]
    assert [error["attempt"] for error in errors] == list(range(1, attempts + 1))
    assert all((error["traceback"] is not None) == traced for error in errors)
    assert all("executor.py" not in (error["traceback"] or "") for error in errors)


@pytest.mark.requirement("Z18")
@pytest.mark.parametrize(
    ("what", "status", "body"),
    [("none", 204, b""), ("zero", 200, b"0"), ("empty", 200, b'""'), ("list", 200, b"[]"), ("dict", 200, b"{}"), ("false", 200, b"false")],
)  # fmt: skip
def test_only_none_is_no_data(zerog: Deployment, what: str, status: int, body: bytes) -> None:
    record = end(zerog, "return", what=what)
    answer = zerog.client.get(f"/jobs/{record['uuid']}/data")
    assert (answer.status_code, answer.content) == (status, body)


@pytest.mark.parametrize(
    ("what", "reason"),
    [("object", "result_not_json"), ("nan", "result_not_json"), ("circle", "result_not_json"), ("surrogate", "result_not_json")],
)  # fmt: skip
def test_65_what_is_no_json_fails_the_job_and_is_not_retried(zerog: Deployment, what: str, reason: str) -> None:
    record = end(zerog, "return", what=what)
    assert (record["state"], record["reason"], record["attempt"]) == ("failed", reason, 1)
    assert zerog.client.get(f"/jobs/{record['uuid']}/data").json()["code"] == reason


def test_65_a_return_value_over_max_result_fails_the_job(zerog: Deployment) -> None:
    small = end(zerog, "return", what="text", size=50_000)
    assert zerog.client.get(f"/jobs/{small['uuid']}/data").json() == "x" * 50_000
    large = end(zerog, "return", what="text", size=150_000)
    assert (large["state"], large["reason"], large["attempt"]) == ("failed", "result_too_large", 1)


def test_a_job_can_give_its_own_code_of_success(zerog: Deployment) -> None:
    assert end(zerog, "return", what="created")["resultCode"] == 201


@pytest.mark.requirement("Z18", "G21")
def test_an_output_is_the_data_with_its_media_type(zerog: Deployment) -> None:
    record = end(zerog, "write-output")
    answer = zerog.client.get(f"/jobs/{record['uuid']}/data")
    assert answer.headers["Content-Type"] == "text/csv"
    assert answer.headers["Content-Disposition"] == f'attachment; filename="{record["uuid"]}.csv"'
    assert answer.text == "a,b\n1,2\n"
    refused = zerog.client.get(f"/jobs/{record['uuid']}/data", headers={"Accept": "application/json"})
    assert refused.status_code == 406
    empty = zerog.client.get(f"/jobs/{end(zerog, 'write-output', how='empty')['uuid']}/data")
    assert (empty.status_code, empty.content) == (200, b"")


@pytest.mark.parametrize("how", ["two", "beside"])
def test_a_job_has_one_result(zerog: Deployment, how: str) -> None:
    record = end(zerog, "write-output", how=how)
    assert (record["state"], record["reason"], record["attempt"]) == ("failed", "two_results", 1)


@pytest.mark.requirement("Z11")
def test_asynchronous_jobs_run_and_hear_a_cancel(zerog: Deployment) -> None:
    assert end(zerog, "asynchronous")["state"] == "succeeded"
    for stubborn in (False, True):
        uuid = zerog.submit("asynchronous", {"seconds": 60, "stubborn": stubborn})
        zerog.wait_for(uuid, state="running")
        start = time.monotonic()
        zerog.client.post(f"/jobs/{uuid}/cancel")
        record = zerog.wait(uuid)
        # A job that was told is cancelled whatever it returns, within two seconds.
        assert (record["state"], record["resultCode"]) == ("cancelled", 410)
        assert time.monotonic() - start < 2
        assert [event["message"] for event in zerog.info(uuid)["events"]] == ["cancelled inside"]


@pytest.mark.requirement("Z10")
def test_secrets_reach_the_job_and_nobody_else(zerog: Deployment) -> None:
    login = {"user": "u", "password": "hunter2-öß"}
    record = end(zerog, "secret", login=login)
    assert zerog.client.get(f"/jobs/{record['uuid']}/data").json() is True
    failed = end(zerog, "secret", login=login, wrong=True)
    assert "hunter2" not in zerog.client.get(f"/jobs/{failed['uuid']}/info").text
    assert "hunter2" not in zerog.log()


# Progress and events


@pytest.mark.requirement("Z16", "Z17")
def test_63_a_million_progress_calls_cost_a_handful_of_writes(zerog: Deployment) -> None:
    start = time.monotonic()
    uuid = zerog.submit("many-progress")
    seen = []
    while (record := zerog.job(uuid))["state"] not in ("succeeded", "failed"):
        seen.append((record["completeness"], record["updatedAt"]))
        time.sleep(0.02)  # the rate at which a client looks
    assert record["state"] == "succeeded", record
    values = [value for value, _ in seen]
    assert values == sorted(values), "completeness went back"
    assert all(0 <= value <= 1 for value in values)
    # At most one write a second: as many versions as seconds, beside the first, the claim and the end.
    assert len({updated for _, updated in seen}) <= time.monotonic() - start + 3 < len(seen)
    assert zerog.job(uuid)["message"] == "went back"
    warnings = zerog.info(uuid)["warnings"]
    assert len(warnings) == 1


@pytest.mark.requirement("Z17", "M30")
def test_events_carry_time_attempt_message_and_code(zerog: Deployment) -> None:
    record = end(zerog, "speak", count=3, channel="warning")
    warnings = zerog.info(record["uuid"])["warnings"]
    assert [(w["attempt"], w["message"][:2], w["code"]) for w in warnings] == [(1, "0:", 0), (1, "1:", 1), (1, "2:", 2)]
    assert all(w["at"].endswith("Z") and len(w["at"]) == 24 for w in warnings)
    numbers = [w["number"] for w in warnings]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize(("channel", "source"), [("stdout", "stdout"), ("stderr", "stderr"), ("fd", "stdout")])
def test_captured_output_is_one_event_a_line(zerog: Deployment, channel: str, source: str) -> None:
    record = end(zerog, "speak", count=3, channel=channel)
    events = zerog.info(record["uuid"])["events"]
    assert [(event["source"], event["message"]) for event in events] == [(source, f"{n}:xxxxxxxx") for n in range(3)]


def pages(zerog: Deployment, href: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    following: str | None = href
    while following is not None:
        page = zerog.client.get(following).json()
        items += page["items"]
        following = page["next"]
    return items


@pytest.mark.parametrize("channel", ["event", "error"])
def test_64_a_flood_keeps_the_first_200_and_the_last_800(zerog: Deployment, channel: str) -> None:
    record = end(zerog, "speak", count=5000, channel=channel)
    items = pages(zerog, f"/jobs/{record['uuid']}/events?limit=1000&level={channel}")
    assert [item["code"] for item in items] == [*range(200), *range(4200, 5000)]
    dropped = zerog.info(record["uuid"])["dropped"]
    assert dropped == {"events": 4000, "bytes": 40_000}


def test_64_captured_output_has_a_budget_of_its_own(zerog: Deployment) -> None:
    record = end(zerog, "speak", count=30_000, size=100, channel="stdout")
    items = pages(zerog, f"/jobs/{record['uuid']}/events?limit=1000")
    kept = sum(len(item["message"]) for item in items)
    assert 300_000 < kept <= 1024 * 1024
    assert items[0]["message"].startswith("0:")
    assert items[-1]["message"].startswith("29999:")
    assert zerog.info(record["uuid"])["dropped"]["events"] == 30_000 - len(items)


def test_64_a_long_message_is_cut_and_marked(zerog: Deployment) -> None:
    for channel in ("event", "stdout"):
        record = end(zerog, "speak", count=1, size=100_000, channel=channel)
        (event,) = zerog.info(record["uuid"])["events"]
        assert len(event["message"]) < 17_000
        assert "cut" in event["message"]


# Crashes, limits, cancels


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_a_process_without_an_outcome_is_a_crash_and_never_a_success(zerog: Deployment, how: str) -> None:
    record = end(zerog, "crash", how=how)
    assert (record["state"], record["resultCode"], record["reason"]) == ("failed", 500, "crashed")
    assert record["counters"] == {"errors": 0, "crashes": 3, "losses": 0}
    info = zerog.info(record["uuid"])
    assert [error["reason"] for error in info["errors"]] == ["crashed"] * 3
    assert [event["attempt"] for event in info["events"]] == [1, 2, 3], "what came before the crash is kept"


def test_a_job_goes_on_after_a_crash(zerog: Deployment) -> None:
    record = end(zerog, "crash", until=3)
    assert (record["state"], record["attempt"], record["counters"]["crashes"]) == ("succeeded", 3, 2)


def test_rather_not_at_all_than_twice(zerog: Deployment) -> None:
    record = end(zerog, "only-once")
    assert (record["state"], record["reason"], record["attempt"]) == ("failed", "outcome_unknown", 1)


def test_a_job_that_leaves_its_process_group_is_ended_too(zerog: Deployment) -> None:
    record = end(zerog, "leave-group")
    assert (record["state"], record["reason"]) == ("failed", "time_limit")
    assert end(zerog, "surround")["state"] == "succeeded", "the agent goes on"


def test_a_time_limit_ends_an_attempt_with_504(zerog: Deployment) -> None:
    record = end(zerog, "limited")
    assert (record["state"], record["resultCode"], record["reason"]) == ("failed", 504, "time_limit")
    assert (record["attempt"], record["counters"]["errors"]) == (2, 2)


def test_a_deaf_job_is_killed_after_the_grace(zerog: Deployment) -> None:
    uuid = zerog.submit("deaf")
    record = zerog.wait_for(uuid, state="running", completeness=0.1)
    pid = int(record["message"].split()[1])
    answer = zerog.client.post(f"/jobs/{uuid}/cancel")
    assert (answer.status_code, answer.json()["cancelling"]) == (202, True)
    record = zerog.wait(uuid, 10)
    assert (record["state"], record["resultCode"], record["cancelling"]) == ("cancelled", 410, False)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    again = zerog.client.delete(f"/jobs/{uuid}")
    assert (again.status_code, again.json()["state"]) == (200, "cancelled")


@pytest.mark.requirement("G18")
def test_52_a_cancel_of_a_finished_job_is_409_with_its_state(zerog: Deployment) -> None:
    record = end(zerog, "noop")
    answer = zerog.client.post(f"/jobs/{record['uuid']}/cancel")
    assert (answer.status_code, answer.json()["code"], answer.json()["state"]) == (409, "already_finished", "succeeded")


# The process between two jobs


def test_a_reused_child_starts_each_job_as_it_was(tmp_path: Path) -> None:
    with deployed(tmp_path, slots="1") as zerog:
        before, _, after = (
            zerog.client.get(f"/jobs/{end(zerog, 'surround', change=change)['uuid']}/data").json()
            for change in (False, True, False)
        )
        assert after == before, "also the same process"


@pytest.mark.requirement("Z12")
@pytest.mark.parametrize("end", ["crash", "kill", *(["success", "cancel", "memory", "drain"] if FULL else [])])
def test_what_a_job_has_started_ends_with_it(tmp_path: Path, end: str) -> None:
    """In whatever group and session it is, also when the job's process or the agent is killed."""
    path = tmp_path / "pids"
    with deployed(tmp_path, slots="1", lease="20s", sweep="20s", drain="1s") as zerog:
        seconds = 0.2 if end == "success" else 60
        uuid = zerog.submit("detach", {"path": str(path), "seconds": seconds, "fat": end == "memory"})
        text = wait_until(lambda: path.read_text() if path.exists() else "", 15, "its processes")
        pids = [int(pid) for pid in text.split()]
        if end == "cancel":
            zerog.client.delete(f"/jobs/{uuid}")
        elif end == "crash":
            (child,) = children(zerog.agents[0].popen.pid)
            child.kill()
        elif end == "kill":
            zerog.agents.pop().kill()
        elif end == "drain":
            zerog.agents.pop().terminate()
        try:
            wait_until(lambda: not any(alive(pid) for pid in pids), 10, f"the end of {pids}")
        finally:
            for pid in filter(alive, pids):
                os.kill(pid, signal.SIGKILL)
        state = {"success": "succeeded", "cancel": "cancelled", "memory": "failed", "crash": "failed"}.get(end)
        if state is not None:
            assert zerog.wait(uuid)["state"] == state


def test_a_process_left_behind_is_ended_and_the_child_replaced(tmp_path: Path) -> None:
    with deployed(tmp_path, slots="1") as zerog:
        first = zerog.client.get(f"/jobs/{end(zerog, 'leave-process')['uuid']}/data").json()
        second = zerog.client.get(f"/jobs/{end(zerog, 'surround')['uuid']}/data").json()
        assert second["pid"] != first["pid"]
        wait_until(lambda: not alive(first["left"]), 5, "the process left behind is gone")


def pids(zerog: Deployment, job_type: str, count: int, **parameters: Any) -> list[Any]:
    uuids = [end(zerog, job_type, **parameters)["uuid"] for _ in range(count)]
    return [zerog.client.get(f"/jobs/{uuid}/data").json() for uuid in uuids]


def test_children_are_recycled_by_memory_by_jobs_and_when_asked_for(tmp_path: Path) -> None:
    with deployed(tmp_path, slots="1", max_memory="200MiB", max_jobs="1000") as zerog:
        assert len(set(pids(zerog, "hoard", 3, size=1))) == 1
        assert len(set(pids(zerog, "hoard", 2, size=300 * 1024**2))) == 2
        assert len(set(pids(zerog, "fresh", 3))) == 3
    with deployed(tmp_path / "jobs", slots="1", max_jobs="2") as zerog:
        first, second, third = pids(zerog, "hoard", 3, size=1)
        assert first == second != third


# Stored things that no longer fit


def test_parameters_that_no_longer_validate_fail_the_job(tmp_path: Path) -> None:
    import sqlite3

    with deployed(tmp_path) as zerog:
        zerog.agents.pop().terminate()
        stale, damaged, newer = (zerog.submit("sleep", {"seconds": 1}) for _ in range(3))
        fine = zerog.submit("noop")
        with sqlite3.connect(tmp_path / "var" / "zerog.db") as store:
            for uuid, old, new in (
                (stale, b'"seconds":1.0', b'"secs":1.0'),
                (damaged, b'"state":"queued"', b'"state":"???"'),
                (newer, b'"schema":1', b'"schema":99'),
            ):
                key = f"zerog:job:{uuid}"
                (body,) = store.execute("SELECT body FROM documents WHERE key = ?", (key,)).fetchone()
                assert old in body
                store.execute("UPDATE documents SET body = ? WHERE key = ?", (body.replace(old, new), key))
        store.close()
        zerog.start_agent()
        record = zerog.wait(stale)
        assert (record["state"], record["resultCode"], record["reason"]) == ("failed", 500, "invalid_parameters")
        assert record["attempt"] == 1
        assert zerog.wait(fine)["state"] == "succeeded", "the agent lives on"
        assert zerog.job(damaged)["reason"] == "corrupt_document"
        assert zerog.job(newer)["reason"] == "newer_version"
        items = zerog.client.get("/jobs").json()["items"]
        assert {item["uuid"] for item in items} == {stale, damaged, newer, fine}


@pytest.mark.requirement("Z9")
def test_71_an_entry_that_is_no_job_id_is_buried_and_the_agent_lives(tmp_path: Path) -> None:
    from zerog.queue.base import Put
    from zerog.queue.sqlite import SQLiteQueue

    with deployed(tmp_path) as zerog:
        queue = SQLiteQueue(tmp_path / "var" / "queue.db", tmp_path / "var" / "run")
        bodies = [b"not a uuid", b"\0", b"\xff\xfe", b'{"task": 1}', b"x" * 65_535]
        assert queue.put_all([Put("zerog.noop", body) for body in bodies]) == [None] * 5
        queue.put(Put("zerog.noop", b"6f1b7a52-61c5-4f0e-9d3f-7a65726f6721"))
        assert end(zerog, "noop")["state"] == "succeeded"
        wait_until(lambda: zerog.client.get("/types/noop").json()["queue"]["buried"] == 5)
        queue.close()


# What jobs do to their process, found by using it


@pytest.mark.parametrize("how", ["return", "raise", "exit", "leave"])
def test_only_the_original_of_a_forked_process_has_an_outcome(zerog: Deployment, how: str) -> None:
    for _ in range(3):
        record = end(zerog, "fork", how=how)
        assert (record["state"], record["attempt"], record["message"]) == ("succeeded", 1, None)
        assert zerog.client.get(f"/jobs/{record['uuid']}/data").json() == {"who": "original"}


def test_a_thread_left_behind_speaks_in_no_other_job(tmp_path: Path) -> None:
    with deployed(tmp_path, slots="1") as zerog:
        first = end(zerog, "leave-thread")
        second = end(zerog, "sleep", seconds=0.5)
        assert second["message"].startswith("slept")
        assert zerog.info(second["uuid"])["events"] == []
        assert zerog.client.get(f"/jobs/{first['uuid']}/data").status_code == 200


def test_closed_streams_are_open_again_for_the_next_job(tmp_path: Path) -> None:
    with deployed(tmp_path, slots="1") as zerog:
        first = end(zerog, "close-streams")
        for channel in ("stdout", "stderr", "fd"):
            record = end(zerog, "speak", count=1, channel=channel)
            assert record["state"] == "succeeded", record
            assert len(zerog.info(record["uuid"])["events"]) == 1
        same = zerog.client.get(f"/jobs/{end(zerog, 'surround')['uuid']}/data").json()["pid"]
        assert zerog.client.get(f"/jobs/{first['uuid']}/data").json() == same
