"""The agent's hard parts, on a real server and a real agent over the embedded adapters."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.deployment import Deployment, deployed
from tests.services import wait_until


@pytest.fixture(scope="module")
def zerog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """One deployment for the tests that injure no process of it."""
    with deployed(tmp_path_factory.mktemp("agent"), slots="4", max_result="100KiB") as made:
        yield made


def end(zerog: Deployment, job_type: str, **parameters: Any) -> dict[str, Any]:
    return zerog.wait(zerog.submit(job_type, parameters))


def children(agent_pid: int) -> list[psutil.Process]:
    return psutil.Process(agent_pid).children()


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


def test_a_process_left_behind_is_ended_and_the_child_replaced(tmp_path: Path) -> None:
    with deployed(tmp_path, slots="1") as zerog:
        first = zerog.client.get(f"/jobs/{end(zerog, 'leave-process')['uuid']}/data").json()
        second = zerog.client.get(f"/jobs/{end(zerog, 'surround')['uuid']}/data").json()
        assert second["pid"] != first["pid"]
        wait_until(lambda: not alive(first["left"]), 5, "the process left behind is gone")


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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


# Leases and dead agents


def test_a_job_that_holds_the_gil_past_its_lease_is_not_run_twice(tmp_path: Path) -> None:
    with deployed(tmp_path, lease="1s", sweep="300ms") as zerog:
        zerog.start_agent()
        path = tmp_path / "attempts"
        record = end(zerog, "hold-gil", path=str(path), seconds=4.0)
        assert (record["state"], record["attempt"]) == ("succeeded", 1)
        assert path.read_text() == "1\n"


def test_the_children_of_a_killed_agent_are_gone_within_200_ms(tmp_path: Path) -> None:
    with deployed(tmp_path, slots="3") as zerog:
        uuid = zerog.submit("hold-gil", {"path": str(tmp_path / "x"), "seconds": 30.0})
        zerog.wait_for(uuid, state="running")
        agent = zerog.agents.pop()
        wait_until(lambda: len(children(agent.pid)) == 3)
        family = [child.pid for child in children(agent.pid)]
        agent.signal(signal.SIGKILL)
        start = time.monotonic()
        wait_until(lambda: not any(alive(pid) for pid in family), 5)
        assert time.monotonic() - start < 0.2
        agent.popen.wait(5)


def clearly_busiest(found: list[psutil.Process]) -> psutil.Process | None:
    """Return the child that has worked more than the others, beyond what their starts differ by."""
    spent = sorted((sum(child.cpu_times()[:2]), child.pid) for child in found)
    return psutil.Process(spent[-1][1]) if spent[-1][0] - spent[-2][0] > 0.2 else None


def test_a_child_stopped_in_the_middle_delays_no_other_slot(tmp_path: Path) -> None:
    with deployed(tmp_path, slots="2", lease="1500ms") as zerog:
        long = zerog.submit("ledger", {"path": str(tmp_path / "l"), "seconds": 6})
        flood = zerog.submit("bulk", {"size": 1024**4})
        zerog.wait_for(long, state="running")
        zerog.wait_for(flood, state="running")
        agent = zerog.agents[0]
        busiest = wait_until(lambda: clearly_busiest(children(agent.pid)), 20, "the child that writes")
        os.kill(busiest.pid, signal.SIGSTOP)
        record = zerog.wait(long)
        assert (record["state"], record["attempt"]) == ("succeeded", 1)
        assert record["counters"]["losses"] == 0
        os.kill(busiest.pid, signal.SIGCONT)
        assert zerog.client.post(f"/jobs/{flood}/cancel").status_code == 202
        assert zerog.wait(flood)["state"] == "cancelled"


def test_a_second_sigterm_stops_now_and_spends_nothing(tmp_path: Path) -> None:
    with deployed(tmp_path, drain="60") as zerog:
        uuid = zerog.submit("sleep", {"seconds": 60})
        zerog.wait_for(uuid, state="running")
        agent = zerog.agents.pop()
        agent.signal(signal.SIGTERM)
        time.sleep(0.5)  # the agent must still be draining after that long
        assert agent.popen.poll() is None
        start = time.monotonic()
        assert agent.terminate(5) == 0
        assert time.monotonic() - start < 3
        record = zerog.wait_for(uuid, state="queued")
        assert record["counters"] == {"errors": 0, "crashes": 0, "losses": 0}


@pytest.mark.parametrize("queue", ["sqlite", "beanstalkd"])
def test_a_drain_in_the_middle_of_a_backlog_leaves_nothing_reserved(
    tmp_path: Path, queue: str, request: pytest.FixtureRequest
) -> None:
    """An agent asks ahead for its next jobs: what it asked for and did not begin must be ready for others."""
    server = request.getfixturevalue("beanstalkd") if queue == "beanstalkd" else None
    # No sweep and no lapse may repair what the drain forgot.
    with deployed(tmp_path, "sqlite", queue, beanstalkd=server, slots="2", lease="60", sweep="600") as zerog:
        uuids = [zerog.submit("sleep", {"seconds": 0.01}) for _ in range(150)]
        for _ in range(4):
            goal = ended_of(zerog, uuids) + 1
            wait_until(partial(ended_at_least, zerog, goal), 20)
            agent = zerog.agents.pop()
            assert agent.terminate(10) == 0
            stats = zerog.client.get("/types/sleep").json()["queue"]
            assert stats["reserved"] == 0, stats
            assert stats["ready"] == len(uuids) - ended_of(zerog, uuids)
            uuids += [zerog.submit("sleep", {"seconds": 0.01}) for _ in range(50)]
            zerog.start_agent()
        for uuid in uuids:
            record = zerog.wait(uuid)
            assert (record["state"], record["attempt"]) == ("succeeded", 1)


@pytest.mark.parametrize("queue", ["sqlite", "beanstalkd"])
def test_a_drain_gives_back_what_was_asked_for_ahead_at_once_and_idles(
    tmp_path: Path, queue: str, request: pytest.FixtureRequest
) -> None:
    """Very short jobs, so that the agent asks while they run, beside a long one that keeps it draining."""
    server = request.getfixturevalue("beanstalkd") if queue == "beanstalkd" else None
    with deployed(tmp_path, "sqlite", queue, beanstalkd=server, slots="2", lease="60", sweep="600") as zerog:
        zerog.agents.pop().kill()
        long = zerog.submit("sleep", {"seconds": 4}, params={"priority": 1})
        uuids = [zerog.submit("noop") for _ in range(1500)]
        agent = zerog.start_agent()
        zerog.wait_for(long, state="running")
        wait_until(lambda: zerog.job(uuids[50])["state"] == "succeeded", 20)
        agent.signal(signal.SIGTERM)
        # While the long job still runs: nothing else is held, whatever close() would give back later.
        wait_until(lambda: "draining" in zerog.log(), 5)
        wait_until(lambda: zerog.client.get("/types/noop").json()["queue"]["reserved"] == 0, 1)
        process = psutil.Process(agent.pid)
        before = sum(process.cpu_times()[:2])
        time.sleep(1)  # the second whose work is measured
        assert sum(process.cpu_times()[:2]) - before < 0.2
        assert zerog.job(long)["state"] == "running"
        waiting = [uuid for uuid in uuids if zerog.job(uuid)["state"] == "queued"]
        assert len(waiting) > 0, "the backlog was gone before the drain began"
        assert zerog.client.get("/types/noop").json()["queue"]["ready"] == len(waiting)
        assert zerog.wait(long)["attempt"] == 1
        assert agent.popen.wait(10) == 0


def ended_at_least(zerog: Deployment, goal: int) -> bool:
    return ended_of(zerog, [""] * 1000) >= goal


def ended_of(zerog: Deployment, uuids: list[str]) -> int:
    states = [item["state"] for item in zerog.client.get(f"/jobs?limit={len(uuids)}").json()["items"]]
    return states.count("succeeded")


def test_no_job_waits_behind_a_long_one_that_its_agent_runs(tmp_path: Path) -> None:
    with deployed(tmp_path, slots="1") as zerog:
        uuids = [zerog.submit("noop") for _ in range(60)]
        long = zerog.submit("sleep", {"seconds": 60})
        # After the short ones the agent asks ahead, gets this one, and must let it go again.
        short = zerog.submit("noop")
        for uuid in uuids:
            zerog.wait(uuid)
        zerog.wait_for(long, state="running")
        alone = {"ready": 1, "reserved": 0, "delayed": 0, "buried": 0}
        wait_until(lambda: zerog.client.get("/types/noop").json()["queue"] == alone, 5)
        zerog.start_agent()
        assert zerog.wait(short, 10)["state"] == "succeeded"
        assert zerog.client.post(f"/jobs/{long}/cancel").status_code == 202


def test_a_drain_lets_running_jobs_end(tmp_path: Path) -> None:
    with deployed(tmp_path) as zerog:
        uuid = zerog.submit("sleep", {"seconds": 1.5})
        waiting = zerog.submit("sleep", {"seconds": 0.1})
        zerog.wait_for(uuid, state="running")
        zerog.wait(waiting)
        assert zerog.agents.pop().terminate() == 0
        assert zerog.job(uuid)["state"] == "succeeded"
        later = zerog.submit("noop")
        assert zerog.job(later)["state"] == "queued"


# Fast take-over (R7): no test here could pass by a lapse, a sweep or an entry's TTR, which take a minute and more.


@pytest.mark.requirement("Z12", "Z14")
@pytest.mark.parametrize("queue", ["sqlite", "beanstalkd"])
@pytest.mark.parametrize("restarted", [True, False])
def test_the_job_of_a_killed_agent_is_taken_over_at_once(
    tmp_path: Path, queue: str, restarted: bool, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue("beanstalkd") if queue == "beanstalkd" else None
    ledger = tmp_path / "ledger"
    with deployed(tmp_path / "z", "sqlite", queue, beanstalkd=server, slots="1", lease="60", sweep="600") as zerog:
        uuid = zerog.submit("ledger", {"path": str(ledger), "seconds": 4})
        zerog.wait_for(uuid, state="running")
        if not restarted:
            zerog.agents.insert(0, zerog.start_agent())
            zerog.wait(zerog.submit("noop"))  # by the second agent: it is there
            zerog.agents.pop()
        victim = zerog.agents.pop()
        victim.signal(signal.SIGKILL)
        victim.popen.wait(10)
        killed = time.monotonic()
        if restarted:
            zerog.start_agent()
        zerog.wait_for(uuid, 10, state="running", attempt=2)
        assert time.monotonic() - killed < 5
        record = zerog.wait(uuid)
        assert (record["state"], record["counters"]["losses"]) == ("succeeded", 1)
        assert ledger.read_text().splitlines() == [f"{uuid} 1", f"{uuid} 2"]


def test_a_stopped_agent_is_not_taken_for_a_dead_one(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    with deployed(tmp_path / "z", slots="1", lease="60", sweep="500ms") as zerog:
        uuid = zerog.submit("ledger", {"path": str(ledger), "seconds": 1})
        zerog.wait_for(uuid, state="running")
        agent = zerog.agents[0]
        agent.signal(signal.SIGSTOP)
        zerog.start_agent()
        for _ in range(5):  # the second agent works, and sweeps, and looks at the first one's lock meanwhile
            zerog.wait(zerog.submit("sleep", {"seconds": 0.5}))
        assert (zerog.job(uuid)["state"], zerog.job(uuid)["attempt"]) == ("running", 1)
        agent.signal(signal.SIGCONT)
        assert zerog.wait(uuid)["attempt"] == 1
        assert ledger.read_text() == f"{uuid} 1\n"


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


@pytest.mark.requirement("Z12")
def test_a_superseded_job_that_ignores_sigterm_is_killed_and_writes_nothing(tmp_path: Path) -> None:
    with deployed(tmp_path, lease="1s", sweep="300ms", slots="1") as zerog:
        uuid = zerog.submit("deaf", {"seconds": 60})
        record = zerog.wait_for(uuid, state="running", completeness=0.1)
        deaf = int(record["message"].split()[1])
        agent = zerog.agents[0]
        agent.signal(signal.SIGSTOP)
        zerog.wait_for(uuid, state="queued")
        agent.signal(signal.SIGCONT)
        wait_until(lambda: not alive(deaf), 10, "the old attempt is killed")
        zerog.wait_for(uuid, state="running", attempt=2)
        assert zerog.log().count(" superseded job=") == 1
        zerog.client.post(f"/jobs/{uuid}/cancel")
        assert zerog.wait(uuid)["state"] == "cancelled"


def test_an_agent_rests_while_the_store_is_away(tmp_path: Path) -> None:
    import sqlite3

    with deployed(tmp_path, lease="1500ms", deadline="300ms", slots="1") as zerog:
        uuid = zerog.submit("deaf", {"seconds": 30})
        zerog.wait_for(uuid, state="running")
        lock = sqlite3.connect(tmp_path / "var" / "zerog.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        wait_until(lambda: "store away" in zerog.log(), 10)
        agent = psutil.Process(zerog.agents[0].pid)
        before = sum(agent.cpu_times()[:2])
        time.sleep(2)  # long enough to see a loop that spins
        assert sum(agent.cpu_times()[:2]) - before < 0.5
        lock.execute("ROLLBACK")
        lock.close()


def test_nothing_outlives_a_killed_up(tmp_path: Path) -> None:
    import sys

    from tests.services import Process

    made = Deployment(tmp_path)
    up = Process([sys.executable, "-m", "zerog", "up"], tmp_path / "up.log", cwd=tmp_path, env=made.environment)
    try:
        wait_until(lambda: "server listens" in up.log.read_text(), 30)
        uuid = made.submit("sleep", {"seconds": 60})
        made.wait_for(uuid, state="running")
        family = [one.pid for one in psutil.Process(up.pid).children(recursive=True)]
        assert len(family) >= 3
        up.kill()
        wait_until(lambda: not any(alive(pid) for pid in family), 8, "server, agent and children are gone")
    finally:
        up.kill()
        made.close()
