"""Real agents: what they say of themselves, and what they are told, directly and over HTTP."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.deployment import Deployment, alive, deployed
from tests.services import Process, wait_until

WAYS = ["direct", "http"]


@pytest.fixture(params=WAYS)
def zerog(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Deployment]:
    """A server, and one agent with a name."""
    made = Deployment(tmp_path, http=request.param == "http", lease="3", sweep="500ms", heartbeat="500ms", drain="20")
    made.start_server()
    made.start_agent(name="one")
    wait_until(lambda: state(made) == "running", 10, f"the agent; its log:\n{made.log()[-2000:]}")
    yield made
    made.close()


def shown(zerog: Deployment, id: str = "one") -> dict[str, Any]:
    answer = zerog.client.get(f"/agents/{id}")
    found: dict[str, Any] = answer.json()
    return found if answer.status_code == 200 else {"state": None, "instance": None, "pid": None}


def state(zerog: Deployment, id: str = "one") -> str | None:
    found: str | None = shown(zerog, id)["state"]
    return found


def tell(zerog: Deployment, command: str, id: str = "one", **members: Any) -> str:
    answer = zerog.client.post(f"/agents/{id}/commands", json={"command": command, **members})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["href"])


def applied(zerog: Deployment, href: str, seconds: float = 10.0) -> dict[str, Any]:
    def over() -> dict[str, Any] | None:
        found: dict[str, Any] = zerog.client.get(href).json()
        return found if found["state"] != "pending" else None

    return wait_until(over, seconds, f"the end of {href}; agent:\n{zerog.log()[-3000:]}")


# What an agent says of itself


@pytest.mark.requirement("M16", "M17")
def test_what_an_agent_says_of_its_use_is_what_it_uses(zerog: Deployment, tmp_path: Path) -> None:
    uuid = zerog.submit("greedy", {"megabytes": 150, "seconds": 40, "spin": True})
    zerog.wait_for(uuid, state="running")
    (agent,) = zerog.agents

    def family() -> list[psutil.Process]:
        whole = psutil.Process(agent.pid)
        return [whole, *whole.children(recursive=True)]

    def near() -> bool:
        began = time.monotonic()
        before = sum(sum(one.cpu_times()[:2]) for one in family())
        time.sleep(1.5)  # while this is measured, so that both speak of about the same time
        usage = shown(zerog)["usage"]
        taken = (sum(sum(one.cpu_times()[:2]) for one in family()) - before) / (time.monotonic() - began)
        held = sum(one.memory_info().rss for one in family())
        right = abs(usage["ram"] - held) <= 0.1 * held and abs(usage["cpu"] - taken) <= max(0.15, 0.1 * taken)
        return bool(right and taken > 0.3)

    wait_until(near, 30, "what it says to be right")
    usage = shown(zerog)["usage"]
    assert usage["ram"] > 150 * 1024 * 1024
    assert usage["load"] == pytest.approx(psutil.getloadavg(), abs=0.5)
    disk = psutil.disk_usage(str(tmp_path))
    assert usage["disk"]["total"] == disk.total
    assert usage["disk"]["free"] == pytest.approx(disk.free, rel=0.05)
    before = usage["io"]["writeBytes"]
    zerog.client.delete(f"/jobs/{uuid}")
    writes = zerog.submit("greedy", {"seconds": 1, "path": str(tmp_path / "big")})
    zerog.wait(writes)
    megabytes = zerog.client.get(f"/jobs/{writes}/data").json()
    wait_until(
        lambda: shown(zerog)["usage"]["io"]["writeBytes"] - before >= 0.9 * megabytes * 1024 * 1024, 5, "its writes"
    )


@pytest.mark.requirement("M18", "M19", "M20", "M28")
def test_what_became_of_a_hundred_jobs_is_counted_and_listed(zerog: Deployment) -> None:
    good = [zerog.submit("noop") for _ in range(90)]
    bad = [zerog.submit("return", {"what": "object"}) for _ in range(10)]
    for uuid in (*good, *bad):
        zerog.wait(uuid)
    wait_until(lambda: shown(zerog)["processedJobs"]["count"] == 100, 5, "the counts")
    found = shown(zerog)
    assert found["lastFailures"]["count"] == 10

    def listed(href: str) -> list[str]:
        uuids: list[str] = []
        following: str | None = f"{href}?limit=7"
        while following:
            page = zerog.client.get(following).json()
            uuids += [one["job"]["href"].rpartition("/")[2] for one in page["items"]]
            following = page["next"]
        return uuids

    assert sorted(listed(found["processedJobs"]["href"])) == sorted([*good, *bad])
    assert sorted(listed(found["lastFailures"]["href"])) == sorted(bad)
    wait_until(lambda: shown(zerog)["tasks"]["count"] == 0, 5, "nothing runs")
    long = zerog.submit("sleep", {"seconds": 20})
    wait_until(lambda: zerog.client.get("/agents/one/assignments").json()["items"], 5, "it to be listed")
    (item,) = zerog.client.get("/assignments").json()["items"]
    assert item["job"] == {"href": f"/jobs/{long}"} and item["attempt"] == 1


@pytest.mark.requirement("M15")
@pytest.mark.parametrize("zerog", ["direct"], indirect=True)
def test_an_agents_own_unhandled_exception_is_kept_and_the_agent_lives(zerog: Deployment) -> None:
    zerog.restart_agent(signal.SIGTERM)
    zerog.agents.pop().terminate()
    zerog.start_agent(name="two", failpoint="run.before_record=raise@1")
    uuid = zerog.submit("noop")
    wait_until(lambda: (shown(zerog, "two").get("exceptions") or {"count": 0})["count"] == 1, 10, "the exception")
    (one,) = zerog.client.get("/agents/two/exceptions").json()["items"]
    assert one["uuid"] == uuid and "run.before_record" in one["traceback"] + one["message"]
    assert zerog.wait(zerog.submit("noop"))["state"] == "succeeded", "the slot recovers"


# What it is told


@pytest.mark.requirement("M25")
def test_a_command_reaches_an_idle_agent_at_once(zerog: Deployment) -> None:
    zerog.agents.pop().terminate()
    zerog.start_agent(name="one", heartbeat="10", lease="60")
    wait_until(lambda: state(zerog) == "running", 10, "an agent whose heart beats slowly")
    for command in ("drain", "resume") * 5:
        began = time.monotonic()
        href = tell(zerog, command)
        done = wait_until(lambda href=href: _not_pending(zerog, href), 5, "the command")  # type: ignore[misc]
        taken = time.monotonic() - began
        assert done["state"] == "applied"
        assert taken < 2, "told at once, and not at the next heartbeat"
    numbers = [one["number"] for one in zerog.client.get("/agents/one/commands").json()["items"]]
    assert numbers == list(range(1, 11))


def _not_pending(zerog: Deployment, href: str) -> dict[str, Any] | None:
    found: dict[str, Any] = zerog.client.get(href).json()
    return found if found["state"] != "pending" else None


@pytest.mark.requirement("M14", "M25")
def test_a_drained_agent_takes_nothing_over_restarts_until_it_is_resumed(zerog: Deployment) -> None:
    running = zerog.submit("sleep", {"seconds": 2})
    zerog.wait_for(running, state="running")
    applied(zerog, tell(zerog, "drain"))
    wait_until(lambda: state(zerog) in ("draining", "drained"), 2, "to say so")
    waits = zerog.submit("noop")
    assert zerog.wait(running)["attempt"] == 1, "what runs goes on"
    wait_until(lambda: state(zerog) == "drained", 5, "drained")
    zerog.restart_agent()  # killed; it comes again under its name
    zerog.agents[0].kill()
    zerog.agents.clear()
    zerog.start_agent(name="one")
    wait_until(lambda: state(zerog) == "drained", 15, "drained again")
    assert zerog.job(waits)["state"] == "queued" or zerog.job(waits)["agent"] != "one"
    applied(zerog, tell(zerog, "resume"))
    wait_until(lambda: state(zerog) == "running", 5, "running")
    assert zerog.wait(zerog.submit("noop"))["agent"] == "one"


@pytest.mark.requirement("M25")
def test_retire_lets_the_job_end_and_the_process_with_status_0(zerog: Deployment) -> None:
    (agent,) = zerog.agents
    uuid = zerog.submit("sleep", {"seconds": 2})
    zerog.wait_for(uuid, state="running")
    applied(zerog, tell(zerog, "retire"))
    assert agent.popen.wait(15) == 0
    assert (zerog.job(uuid)["state"], zerog.job(uuid)["attempt"]) == ("succeeded", 1)
    assert state(zerog) == "retired"


@pytest.mark.requirement("M25")
def test_three_restarts_during_a_long_job_do_not_fail_it(zerog: Deployment, tmp_path: Path) -> None:
    (agent,) = zerog.agents
    pid = agent.pid
    zerog.client.delete("/agents/one")
    agent.terminate()
    zerog.agents.clear()
    agent = zerog.start_agent(name="one", drain="300ms", grace="500ms")
    pid = agent.pid
    ledger = tmp_path / "ledger"
    uuid = zerog.submit("ledger", {"path": str(ledger), "seconds": 2})
    for attempt in (1, 2, 3):
        zerog.wait_for_ledger(ledger, uuid, attempt)
        before = shown(zerog)["instance"]
        assert applied(zerog, tell(zerog, "restart"))["state"] == "applied"
        wait_until(
            lambda before=before: shown(zerog)["instance"] not in (None, before) and state(zerog) == "running",  # type: ignore[misc]
            15,
            f"it to begin anew; its log:\n{zerog.log()[-2000:]}",
        )
        assert alive(pid) and agent.popen.poll() is None, "it is the same process"
    record = zerog.wait(uuid)
    assert (record["state"], record["attempt"]) == ("succeeded", 4)
    assert record["counters"] == {"errors": 0, "crashes": 0, "losses": 0}, "restarts spend nothing"


@pytest.mark.requirement("M25")
@pytest.mark.parametrize("command", ["drain", "resume", "retire", "restart"])
def test_a_command_given_before_its_start_is_done_right_after_it(zerog: Deployment, command: str) -> None:
    zerog.agents.pop().terminate()
    assert state(zerog) == "offline"
    before = shown(zerog)["instance"]
    href = tell(zerog, command)
    agent = zerog.start_agent(name="one")
    assert applied(zerog, href, 15)["state"] == "applied"
    if command == "retire":
        assert agent.popen.wait(15) == 0
    elif command == "drain":
        wait_until(lambda: state(zerog) == "drained", 10, "drained")
    else:
        wait_until(lambda: state(zerog) == "running" and shown(zerog)["instance"] != before, 10, "running")
        assert zerog.wait(zerog.submit("noop"))["agent"] == "one"


@pytest.mark.requirement("M25")
def test_every_command_is_done_at_every_moment(zerog: Deployment) -> None:
    """Idle, with a job that runs, while it drains, and drained; ``retire`` ends it, and so comes last."""
    (agent,) = zerog.agents

    def restarted(href: str, then: str) -> None:
        assert applied(zerog, href)["state"] == "applied"
        wait_until(
            lambda: shown(zerog)["instance"] not in (None, before) and state(zerog) == then, 15,
            f"it to begin anew and be {then}; its log:\n{zerog.log()[-2000:]}",
        )  # fmt: skip
        assert agent.popen.poll() is None

    def runs(seconds: float) -> str:
        uuid = zerog.submit("sleep", {"seconds": seconds})
        zerog.wait_for(uuid, state="running")
        return uuid

    before = shown(zerog)["instance"]
    restarted(tell(zerog, "restart"), "running")  # idle
    assert applied(zerog, tell(zerog, "resume"))["state"] == "applied"
    running = runs(4)
    assert applied(zerog, tell(zerog, "resume"))["state"] == "applied"
    for command in ("drain", "drain"):  # with a job, and while it drains
        assert applied(zerog, tell(zerog, command))["state"] == "applied"
        wait_until(lambda: state(zerog) == "draining", 2, "to say so")
    applied(zerog, tell(zerog, "resume"))
    wait_until(lambda: state(zerog) == "running", 2, "to take jobs again")
    assert zerog.wait(zerog.submit("noop"))["state"] == "succeeded"
    assert zerog.job(running)["state"] == "running", "all that was done beside it"
    applied(zerog, tell(zerog, "drain"))
    before = shown(zerog)["instance"]
    restarted(tell(zerog, "restart"), "drained")  # while it drains: what runs ends first
    record = zerog.job(running)
    assert (record["state"], record["attempt"]) == ("succeeded", 1)
    assert applied(zerog, tell(zerog, "drain"))["state"] == "applied"
    before = shown(zerog)["instance"]
    restarted(tell(zerog, "restart"), "drained")
    waits = zerog.submit("noop")
    applied(zerog, tell(zerog, "resume"))
    assert zerog.wait(waits)["state"] == "succeeded"
    running = runs(1.5)
    applied(zerog, tell(zerog, "drain"))
    for _ in range(2):  # twice is not sooner
        applied(zerog, tell(zerog, "retire"))
    assert agent.popen.wait(15) == 0
    assert (zerog.job(running)["state"], zerog.job(running)["attempt"]) == ("succeeded", 1)
    assert state(zerog) == "retired"


@pytest.mark.requirement("M3", "M25")
def test_commands_are_done_once_and_in_order_while_the_master_is_killed_again_and_again(zerog: Deployment) -> None:
    """Whoever commands repeats under a key; the agent is told by whichever master there is."""
    ended, kills = threading.Event(), 0

    def kill() -> None:
        nonlocal kills
        moments = random.Random(4)
        while not ended.wait(moments.uniform(0.2, 1.5)):
            zerog.restart_server()
            kills += 1

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        numbers: list[int] = []
        while (kills < 4 or len(numbers) < 20) and len(numbers) < 600:
            place = len(numbers)
            for command in ("drain", "resume"):
                numbers.append(_told(zerog, command, f"{command}-{place}"))
            # Some are given before the one before is done, some after.
            if place % 3:
                wait_until(lambda: _is_applied(zerog, numbers[-1]), 30, "the command")
    finally:
        ended.set()
        killer.join(60)
    assert kills >= 4
    assert numbers == list(range(1, len(numbers) + 1))
    wait_until(lambda: all(_is_applied(zerog, number) for number in numbers), 30, f"all; agent:\n{zerog.log()[-3000:]}")
    done = [int(line.split("command ")[1].split(":")[0]) for line in zerog.log().splitlines() if ": applied" in line]
    assert done == numbers, "each once, in order"
    assert zerog.wait(zerog.submit("noop"))["agent"] == "one"


def _told(zerog: Deployment, command: str, key: str) -> int:
    def accepted() -> dict[str, Any] | None:
        with suppress(httpx.TransportError):
            answer = zerog.client.post(
                "/agents/one/commands", json={"command": command}, headers={"Idempotency-Key": key}
            )
            return answer.json() if answer.status_code == 202 else None
        return None

    return int(wait_until(accepted, 30, f"{command} to be accepted")["number"])


def _is_applied(zerog: Deployment, number: int) -> bool:
    with suppress(httpx.TransportError):
        return bool(zerog.client.get(f"/agents/one/commands/{number}").json().get("state") == "applied")
    return False


@pytest.mark.requirement("M11", "M25")
def test_cancel_and_limits_reach_a_running_job_and_its_agent(zerog: Deployment) -> None:
    uuid = zerog.submit("sleep", {"seconds": 30})
    zerog.wait_for(uuid, state="running")
    assert applied(zerog, tell(zerog, "cancel", uuid=uuid))["state"] == "applied"
    assert zerog.wait(uuid, 10)["state"] == "cancelled"
    href = tell(zerog, "cancel", uuid=uuid)
    assert applied(zerog, href)["state"] == "refused", "it does not run there any more"
    applied(zerog, tell(zerog, "setLimits", limits={"cpus": 1.5}))
    assert shown(zerog)["limits"]["cpus"] == 1.5


# What is at hand while short jobs run


@pytest.mark.requirement("M8", "M10")
@pytest.mark.parametrize("zerog", ["http"], indirect=True)
def test_what_was_at_hand_behind_short_jobs_goes_back_when_a_longer_one_runs(zerog: Deployment, tmp_path: Path) -> None:
    """An agent that speaks HTTP has jobs at hand while short ones run; others get them when it is busy for longer."""
    ledger = tmp_path / "ledger"
    zerog.start_agent(name="two", slots="4")
    wait_until(lambda: state(zerog, "two") == "running", 15, "the other agent")
    for agent in ("one", "two"):
        applied(zerog, tell(zerog, "drain", agent))
    short = [zerog.submit("noop") for _ in range(300)]
    long = [zerog.submit("ledger", {"path": str(ledger), "seconds": 3}) for _ in range(8)]
    applied(zerog, tell(zerog, "resume"))
    wait_until(lambda: ledger.exists() and ledger.read_text(), 20, "a long job that runs")
    wait_until(
        lambda: len(zerog.client.get("/agents/one/assignments").json()["items"]) <= 2, 2.5, "the rest to go back"
    )
    assert "not begun" in zerog.log(), "some were at hand"
    applied(zerog, tell(zerog, "resume", "two"))
    for uuid in (*short, *long):
        record = zerog.wait(uuid)
        assert (record["state"], record["counters"]) == ("succeeded", {"errors": 0, "crashes": 0, "losses": 0})
    assert sorted(line.split()[0] for line in ledger.read_text().splitlines()) == sorted(long), "each ran once"
    assert {zerog.job(uuid)["agent"] for uuid in long} == {"one", "two"}
    counts = [shown(zerog, id)["processedJobs"]["count"] for id in ("one", "two")]
    assert sum(counts) == len(short) + len(long), "what was not begun does not count"


# Its name


@pytest.mark.requirement("M13")
def test_a_name_belongs_to_one_living_agent(zerog: Deployment) -> None:
    second = zerog.start_agent(name="one")
    assert second.popen.wait(15) != 0
    assert "another agent of this host has the name 'one'" in zerog.log()
    zerog.start_agent()
    zerog.start_agent()
    wait_until(lambda: len(zerog.client.get("/agents?state=running").json()["items"]) == 3, 15, "three agents")
    ids = sorted(one["id"] for one in zerog.client.get("/agents?state=running").json()["items"])
    assert ids[-1] == "one" or ids[0] == "one"
    assert sorted(one.rpartition("-")[2] for one in ids if one != "one") == ["1", "2"]


@pytest.mark.requirement("M13")
def test_an_agent_elsewhere_waits_for_the_silence_of_the_one_that_has_its_name(tmp_path: Path) -> None:
    with deployed(tmp_path, lease="3", sweep="500ms", heartbeat="500ms") as zerog:
        zerog.agents.pop().terminate()
        first = zerog.start_agent(name="one")
        wait_until(lambda: state(zerog) == "running", 10, "the first")
        before = shown(zerog)["instance"]
        zerog.start_agent(name="one", run_dir=str(tmp_path / "elsewhere"))
        wait_until(lambda: "lives as another process" in zerog.log(), 10, "the second to find out")
        assert shown(zerog)["instance"] == before
        assert zerog.wait(zerog.submit("noop"))["state"] == "succeeded"
        _stop(first)
        wait_until(lambda: shown(zerog)["instance"] != before and state(zerog) == "running", 15, "the second")


@pytest.mark.requirement("M13")
def test_of_two_agents_that_speak_http_under_one_name_the_first_ends(tmp_path: Path) -> None:
    with deployed(tmp_path, lease="3", sweep="500ms", heartbeat="500ms", http=True) as zerog:
        zerog.agents.pop().terminate()
        first = zerog.start_agent(name="one")
        wait_until(lambda: state(zerog) == "running", 10, "the first")
        running = zerog.submit("sleep", {"seconds": 2})
        zerog.wait_for(running, state="running")
        before = shown(zerog)["instance"]
        zerog.start_agent(name="one", run_dir=str(tmp_path / "elsewhere"))
        assert first.popen.wait(20) == 0
        assert "this agent ends: a later process" in zerog.log()
        assert zerog.wait(running)["state"] == "succeeded"
        assert state(zerog) == "running" and shown(zerog)["instance"] != before, "the goodbye was not the second's"
        assert zerog.wait(zerog.submit("noop"))["attempt"] == 1


def _stop(process: Process) -> None:
    process.signal(signal.SIGKILL)
    process.popen.wait(10)


@pytest.mark.requirement("M13", "M25")
def test_who_executes_itself_anew_goes_on_at_once_however_long_the_lease_is(tmp_path: Path) -> None:
    with deployed(tmp_path, lease="60", sweep="30", http=False) as zerog:
        zerog.agents.pop().terminate()
        zerog.start_agent(name="one")
        wait_until(lambda: state(zerog) == "running", 10, "the agent")
        before = shown(zerog)["instance"]
        applied(zerog, tell(zerog, "restart"))
        wait_until(lambda: shown(zerog)["instance"] != before and state(zerog) == "running", 8, "it to begin anew")
        began = time.monotonic()
        assert zerog.wait(zerog.submit("noop"))["agent"] == "one"
        assert time.monotonic() - began < 8, "and not after a lease"


@pytest.mark.requirement("M11", "M14")
@pytest.mark.parametrize("zerog", ["direct"], indirect=True)
def test_a_job_that_is_modified_while_it_runs_is_found_where_it_belongs(zerog: Deployment, tmp_path: Path) -> None:
    zerog.agents.pop().terminate()
    zerog.restart_server(sweep="600")
    zerog.start_agent(name="two")
    uuid = zerog.submit("steps", {"path": str(tmp_path / "steps"), "count": 40, "bad": 39, "how": "raise"})
    zerog.wait_for(uuid, state="running")
    answer = zerog.client.patch(f"/jobs/{uuid}", json={"limits": {"ram": 1000}}, headers={"If-Match": "*"})
    assert answer.status_code == 200
    record = zerog.wait(uuid, 20)
    assert (record["state"], record["attempt"], record["limits"]["ram"]) == ("succeeded", 2, 1000)
