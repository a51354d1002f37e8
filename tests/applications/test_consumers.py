"""Consumers of topics, as processes: what they handle, what they cannot, and who runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid as uuids
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.deployment import Deployment, over_pair
from zerog.chaos.site import until

PAIRS = [("sqlite", "sqlite"), ("couchbase", "beanstalkd")]


@contextmanager
def following(
    folder: Path, request: pytest.FixtureRequest, pair: tuple[str, str], **settings: Any
) -> Iterator[Deployment]:
    ledger = folder / "ledger.txt"
    with over_pair(folder, request, pair, "tests.following", following_ledger=ledger, **settings) as made:
        yield made


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "-".join(pair))
def zerog(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with following(tmp_path_factory.mktemp("following"), request, request.param) as made:
        made.start_agent()
        yield made


def publish(zerog: Deployment, topic: str, value: Any) -> int:
    headers = {"Content-Type": "application/json"}
    answer = zerog.client.post(f"/topics/{topic}", content=json.dumps(value), headers=headers)
    assert answer.status_code == 201, answer.text
    return int(answer.json()["number"])


def lines(zerog: Deployment, topic: str = "readings") -> list[str]:
    path = zerog.folder / "ledger.txt"
    return [line for line in path.read_text().splitlines() if line.startswith(f"{topic} ")] if path.exists() else []


def wait_for(zerog: Deployment, what: Callable[[], Any], text: str, seconds: float = 20.0) -> Any:
    try:
        return until(what, seconds, text)
    except TimeoutError as error:
        pytest.fail(f"{error}; agent:\n{zerog.log()[-5000:]}")


def dead(zerog: Deployment, number: int, topic: str = "readings") -> dict[str, Any] | None:
    answer = zerog.client.get("/topics/dead-letters?limit=1000")
    if answer.status_code == 404:
        return None
    found = [one["value"] for one in answer.json()["items"]]
    assert len({(one["topic"], one["number"]) for one in found}) == len(found), "each is there once"
    return next((one for one in found if (one["topic"], one["number"]) == (topic, number)), None)


def consumer(zerog: Deployment, name: str = "ledger") -> dict[str, Any]:
    answer: dict[str, Any] = zerog.client.get(f"/consumers/{name}").json()
    return answer


def position(zerog: Deployment, topic: str = "readings", name: str = "ledger") -> int:
    return next((one["position"] for one in consumer(zerog, name).get("topics", ()) if one["name"] == topic), 0)


@pytest.mark.requirement("S5", "S6")
def test_messages_are_handled_in_order_each_once_and_at_once(zerog: Deployment) -> None:
    first = publish(zerog, "readings", "warm")
    wait_for(zerog, lambda: f"readings {first} warm" in lines(zerog), "the first message")
    wait_for(zerog, lambda: position(zerog) >= first, "the position")
    begun = time.monotonic()
    number = publish(zerog, "readings", "woken")
    wait_for(zerog, lambda: f"readings {number} woken" in lines(zerog), "the second message")
    assert time.monotonic() - begun < 0.9, "it is woken, and does not wait for its next look"
    numbers = [publish(zerog, "readings", f"one of {n}") for n in range(30)]
    wait_for(zerog, lambda: position(zerog) >= numbers[-1], "all messages")
    assert [int(line.split()[1]) for line in lines(zerog)][-30:] == numbers
    shown = consumer(zerog)
    assert shown["application"] == "tests.following" and shown["holder"]
    assert next(one for one in shown["topics"] if one["name"] == "readings")["behind"] == 0
    assert shown["name"] in {one["name"] for one in zerog.client.get("/consumers").json()["items"]}
    page = zerog.client.get("/consumers", headers={"Accept": "text/html"})
    assert page.status_code == 200 and '<a href="/topics/readings">readings</a>' in page.text


@pytest.mark.requirement("S5")
@pytest.mark.parametrize(
    ("value", "tries", "error"),
    [("raise", 3, "RuntimeError: as it was asked for"), ("fail", 1, "never"), ("die", 3, "status -9"),
     ("hang", 3, "longer than 2 s")],
)  # fmt: skip
def test_what_cannot_be_handled_goes_to_the_dead_letters_and_the_consumer_lives(
    zerog: Deployment, value: str, tries: int, error: str
) -> None:
    number = publish(zerog, "readings", value)
    after = publish(zerog, "readings", f"after {value}")
    letter = wait_for(zerog, lambda: dead(zerog, number), f"the dead letter of {value}", 40)
    assert (letter["value"], set(letter)) == (value, {"topic", "number", "value", "error"})
    assert error in letter["error"]
    wait_for(zerog, lambda: f"readings {after} after {value}" in lines(zerog), "the next message")
    assert lines(zerog).count(f"readings {number} {value}") == tries
    assert consumer(zerog)["lastError"] and consumer(zerog)["deadLetters"] >= 1


def test_a_message_that_is_put_aside_comes_later_and_holds_up_nobody(zerog: Deployment) -> None:
    key = uuids.uuid4().hex
    number = publish(zerog, "readings", ["later", key])
    after = publish(zerog, "readings", "not held up")
    wait_for(zerog, lambda: f"readings {after} not held up" in lines(zerog), "the next message")
    wanted = f"readings {number} ['later', '{key}']"
    wait_for(zerog, lambda: lines(zerog).count(wanted) == 2, "the second try")
    assert lines(zerog).index(f"readings {after} not held up") < len(lines(zerog)) - 1 - lines(zerog)[::-1].index(
        wanted
    )


def test_a_consumer_publishes_and_runs_jobs(zerog: Deployment) -> None:
    number, uuid = publish(zerog, "readings", ["copy", {"a": 1}]), str(uuids.uuid4())
    publish(zerog, "readings", ["run", uuid])
    wait_for(zerog, lambda: zerog.client.get("/topics/copies").status_code == 200, "the copy")
    assert {"a": 1} in [one["value"] for one in zerog.client.get("/topics/copies").json()["items"]]
    wait_for(zerog, lambda: zerog.client.get(f"/jobs/{uuid}").status_code == 200, f"the job of message {number + 1}")
    assert zerog.wait(uuid)["state"] == "succeeded"


@pytest.mark.requirement("S6")
def test_the_ends_of_jobs_are_a_topic(zerog: Deployment) -> None:
    good, bad = zerog.submit("told"), zerog.submit("told", {"fails": True})
    cancelled = zerog.submit("told", params={"delay": "500"})
    zerog.client.post(f"/jobs/{cancelled}/cancel")
    wanted = {f"finished {good} told succeeded", f"finished {bad} told failed", f"finished {cancelled} told cancelled"}
    wait_for(zerog, lambda: wanted <= set(lines(zerog, "finished")), "the ends")
    assert all(lines(zerog, "finished").count(line) == 1 for line in wanted)
    items = zerog.client.get("/topics/finished?limit=1000").json()["items"]
    value = next(one["value"] for one in items if one["value"]["uuid"] == good)
    assert set(value) == {"uuid", "jobType", "state", "attempt", "at"}
    answer = zerog.client.post("/topics/finished", json={})
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


@pytest.mark.requirement("S6")
@pytest.mark.parametrize("point", ["consume.before_handle=kill@3", "consume.after_handle=kill@3"])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(pair))
def test_a_consumer_that_is_killed_goes_on_where_it_was(
    request: pytest.FixtureRequest, tmp_path: Path, pair: tuple[str, str], point: str
) -> None:
    """Each child dies at its third message: every message is handled, none is passed over, and a few come twice."""
    with following(tmp_path, request, pair) as zerog:
        zerog.start_agent(failpoint=point)
        numbers = [publish(zerog, "readings", n) for n in range(6)]
        wait_for(zerog, lambda: position(zerog) >= numbers[-1], "all messages", 60)
        handled = [int(line.split()[1]) for line in lines(zerog)]
        assert sorted(set(handled)) == numbers
        firsts = sorted(set(handled), key=handled.index)
        assert firsts == numbers, "in order"
        assert zerog.client.get("/topics/dead-letters").status_code == 404


@pytest.mark.requirement("S6")
def test_one_process_has_a_consumer_and_another_takes_over(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with following(tmp_path, request, PAIRS[0], following_pause="20ms") as zerog:
        zerog.start_agent()
        zerog.start_agent()
        first = publish(zerog, "readings", "first")
        wait_for(zerog, lambda: position(zerog) >= first, "the first message")
        holder = consumer(zerog)["holder"]
        owner = next(
            one for one in zerog.agents
            if any("zerog.consuming ledger" in " ".join(child.cmdline()) for child in psutil.Process(one.pid).children())
        )  # fmt: skip
        numbers = [publish(zerog, "readings", n) for n in range(100)]
        wait_for(zerog, lambda: len(lines(zerog)) > 20, "some of the messages")
        children = psutil.Process(owner.pid).children(recursive=True)
        owner.kill()
        wait_for(zerog, lambda: position(zerog) >= numbers[-1], "all messages")
        assert consumer(zerog)["holder"] != holder
        wait_for(zerog, lambda: not any(child.is_running() for child in children), "the end of the first one's child")
        handled = [int(line.split()[1]) for line in lines(zerog)]
        assert sorted(set(handled)) == [first, *numbers]
        assert len(handled) - len(set(handled)) <= 20, "what was handled since the last write of the position, alone"


@pytest.mark.requirement("S6")
def test_a_consumer_whose_agent_is_stopped_is_taken_over_and_does_not_move_its_position(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    with following(tmp_path, request, PAIRS[0]) as zerog:
        owner = zerog.start_agent()
        first = publish(zerog, "readings", "first")
        wait_for(zerog, lambda: position(zerog) >= first, "the first message")
        (child,) = [
            one for one in psutil.Process(owner.pid).children() if "zerog.consuming ledger" in " ".join(one.cmdline())
        ]
        owner.signal(signal.SIGSTOP)
        child.suspend()
        zerog.start_agent()
        second = publish(zerog, "readings", "second")
        wait_for(zerog, lambda: position(zerog) >= second, "the other agent", 30)
        holder = consumer(zerog)["holder"]
        child.resume()
        owner.signal(signal.SIGCONT)
        wait_for(zerog, lambda: not child.is_running(), "the end of the one that lost it")
        third = publish(zerog, "readings", "third")
        wait_for(zerog, lambda: position(zerog) >= third, "the third message")
        assert consumer(zerog)["holder"] == holder
        assert [line.split()[2] for line in lines(zerog)] == ["first", "second", "third"]


@pytest.mark.requirement("S6", "S12")
def test_a_consumer_apart_is_run_by_its_daemon_alone(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with following(tmp_path, request, PAIRS[0]) as zerog:
        zerog.start_agent()
        number = publish(zerog, "apart", "x")
        other = publish(zerog, "readings", "y")
        wait_for(zerog, lambda: position(zerog) >= other, "the consumer of the agent")
        assert lines(zerog, "apart") == [] and zerog.client.get("/consumers/apart").status_code == 404
        daemon = zerog.start_daemon("consumer", "apart")
        wait_for(zerog, lambda: lines(zerog, "apart") == [f"apart {number} x"], "the daemon")
        assert zerog.client.delete("/consumers/apart").status_code == 409
        assert daemon.terminate() == 0
        later = publish(zerog, "apart", "z")
        again = zerog.start_daemon("consumer", "apart")
        wait_for(zerog, lambda: lines(zerog, "apart")[-1] == f"apart {later} z", "the daemon, once more")
        assert len(lines(zerog, "apart")) == 2
        assert again.terminate() == 0
        assert zerog.client.delete("/consumers/apart").status_code == 204
        assert zerog.client.get("/consumers/apart").status_code == 404
        done = subprocess.run(
            [sys.executable, "-m", "zerog", "consumer", "nobody"], env=zerog.environment, cwd=zerog.folder,
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert done.returncode == 1 and "there is no consumer 'nobody'" in done.stderr


@pytest.mark.requirement("S6")
def test_retention_never_passes_the_slowest_consumer(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with following(tmp_path, request, PAIRS[0], sweep="200ms", retention="1s") as zerog:
        numbers = [publish(zerog, "short", n) for n in range(3)]
        kept = [one["number"] for one in zerog.client.get("/topics/short").json()["items"]]
        assert kept == numbers
        held = zerog.submit("told", params={"delay": "500"})
        assert zerog.client.post(f"/jobs/{held}/cancel").status_code == 200
        time.sleep(3)  # several retentions and prunes: that nothing goes cannot be waited for
        assert [one["number"] for one in zerog.client.get("/topics/short").json()["items"]] == numbers
        assert zerog.client.get(f"/jobs/{held}").status_code == 200, "its end is still to be told"

        zerog.start_agent()

        def gone() -> bool:
            short = zerog.client.get("/topics/short?limit=1000").json()
            return not short["items"] and zerog.client.get(f"/jobs/{held}").status_code == 404

        wait_for(zerog, gone, "retention", 30)
        assert [int(line.split()[1]) for line in lines(zerog, "short")] == numbers
        assert f"finished {held} told cancelled" in lines(zerog, "finished")


def test_settings_of_an_application_reach_jobs_endpoints_and_consumers(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    with following(tmp_path, request, PAIRS[0], following_most="2KiB", following_password="geheim") as zerog:
        zerog.start_agent()
        assert zerog.client.get("/told").json() == {"pause": 0.0, "most": 2048, "href": "/told"}
        data = zerog.client.get(f"/jobs/{zerog.wait(zerog.submit('told'))['uuid']}/data").json()
        assert data == {"ledger": str(tmp_path / "ledger.txt"), "pause": 0.0, "most": 2048}
        shown = zerog.client.get("/view_status").text
        assert "following.most" in shown and "geheim" not in shown and "geheim" not in zerog.log("server")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"ZEROG_FOLLOWING_PAUSE": "soon"}, "following.pause (ZEROG_FOLLOWING_PAUSE): seconds, such as"),
        ({"ZEROG_FOLLOWING_PAWS": "1"}, "there is no setting 'paws' in [following] (ZEROG_FOLLOWING_PAWS)"),
    ],
)
def test_wrong_settings_of_an_application_are_named(tmp_path: Path, written: dict[str, str], said: str) -> None:
    environment = {**os.environ, "ZEROG_APPLICATIONS": "tests.following", **written}
    done = subprocess.run(
        [sys.executable, "-m", "zerog", "server", "--port", "0"], env=environment, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 1 and said in done.stderr
    assert "Traceback" not in done.stderr
