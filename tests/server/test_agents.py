"""Agents that speak HTTP alone, as a test speaks it, from the documentation: every answer of the server."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.deployment import Deployment
from tests.services import Beanstalkd, wait_until
from tests.speaker import Speaker

LEASE = 3.0


#: Every day over one pair: the agents' own tests run over SQLite.
PAIRS = ["couchbase-beanstalkd", *(["sqlite-sqlite"] if os.environ.get("TESTS_FULL") else [])]


@pytest.fixture(scope="module", params=PAIRS)
def zerog(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A server without agents of its own."""
    store, queue = request.param.split("-")
    folder = tmp_path_factory.mktemp("agents")
    server = Beanstalkd(folder / "beanstalkd").start() if queue == "beanstalkd" else None
    made = Deployment(
        folder, store, queue, beanstalkd=server, lease=str(LEASE), sweep="500ms",
        couchbase=request.getfixturevalue("couchbase") if store == "couchbase" else None,
    )  # fmt: skip
    made.start_server()
    yield made
    made.close()
    if server is not None:
        server.stop()


@pytest.fixture
def agent(zerog: Deployment, request: pytest.FixtureRequest) -> Iterator[Speaker]:
    """An agent of its own for each test, and a queue in which nothing is left."""
    one = Speaker(zerog.client, f"a-{abs(hash(request.node.name)) % 10**9}", "noop", "return", hostname="elsewhere")
    assert one.hear().status_code == 201
    yield one
    zerog.client.delete(f"/agents/{one.id}")
    for uuid in [item["uuid"] for item in zerog.client.get("/jobs?limit=200").json()["items"]]:
        zerog.client.delete(f"/jobs/{uuid}")


def view(zerog: Deployment, id: str) -> dict[str, Any]:
    found: dict[str, Any] = zerog.client.get(f"/agents/{id}").json()
    return found


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


# Registration


@pytest.mark.requirement("M1", "M13", "M16", "M17")
def test_an_agent_registers_says_that_it_lives_and_goes(zerog: Deployment) -> None:
    usage = {"ram": 5, "cpu": 0.5, "load": [0.1, 0.2, 0.3], "disk": {"total": 9, "free": 3},
             "io": {"readBytes": 1, "writeBytes": 2}}  # fmt: skip
    one = Speaker(
        zerog.client, "registers", "noop", hostname="h", version="7", cpus=4, ram=1024, labels=["gpu"],
        limits={"ram": 512}, usage=usage,
    )  # fmt: skip
    answer = one.hear()
    assert answer.status_code == 201
    assert answer.headers["Location"] == "/agents/registers"
    assert answer.json()["heartbeat"] == pytest.approx(LEASE / 3)
    assert (answer.json()["talkback"], answer.json()["superseded"]) == ([], [])
    shown = view(zerog, "registers")
    assert (shown["state"], shown["hostname"], shown["version"], shown["labels"]) == ("running", "h", "7", ["gpu"])
    assert (shown["ram"], shown["cpus"], shown["limits"]) == (1024, 4, {"ram": 512, "cpus": 4})
    assert shown["usage"] == usage
    for name in ("tasks", "lastFailures", "processedJobs", "exceptions"):
        assert shown[name]["count"] == 0
        assert zerog.client.get(shown[name]["href"]).json()["items"] == []
    before = shown["lastCommunication"]
    assert one.client.post("/agents", json={"id": "registers"}).status_code == 200
    shown = view(zerog, "registers")
    assert shown["lastCommunication"] > before
    assert (shown["hostname"], shown["jobTypes"]) == ("h", ["noop"]), "what is not said stays"
    for _ in range(2):
        assert zerog.client.delete("/agents/registers").status_code == 204
    assert code(zerog.client.get("/agents/registers")) == (404, "unknown_agent")
    assert one.hear().status_code == 201, "a later heartbeat makes it anew"
    zerog.client.delete("/agents/registers")


@pytest.mark.requirement("M13")
def test_a_name_is_taken_on_its_host_or_from_one_that_is_silent(zerog: Deployment) -> None:
    one = Speaker(zerog.client, "twice", "noop", hostname="here")
    assert one.hear().status_code == 201
    there = Speaker(zerog.client, "twice", "noop", hostname="there")
    there.instance = "there"
    assert code(there.hear()) == (409, "agent_alive")
    assert "on here" in there.hear().json()["detail"]
    again = Speaker(zerog.client, "twice", "noop", hostname="here")
    again.instance = "again"
    assert again.hear().status_code == 200
    assert code(one.hear()) == (409, "agent_alive"), "it may have been on its way when it was killed"
    assert code(one.hear(state="offline")) == (409, "agent_alive")
    assert view(zerog, "twice")["state"] == "running"
    wait_until(lambda: there.hear().status_code == 200, 3 * LEASE, "the name to be free")
    assert view(zerog, "twice")["hostname"] == "there"
    zerog.client.delete("/agents/twice")


@pytest.mark.requirement("M13")
def test_a_silent_agent_is_offline_after_three_heartbeats_and_its_jobs_go_on(zerog: Deployment, agent: Speaker) -> None:
    uuid = zerog.submit("noop")
    assert agent.take(5) is not None
    began = time.monotonic()
    wait_until(lambda: view(zerog, agent.id)["state"] == "offline", 3 * LEASE, "the agent to be offline")
    assert time.monotonic() - began > 0.8 * LEASE
    record = zerog.wait_for(uuid, 3 * LEASE, state="queued")
    assert (record["attempt"], record["counters"]["losses"]) == (1, 1)
    (listed,) = [one for one in zerog.client.get("/agents").json()["items"] if one["id"] == agent.id]
    assert listed["tasks"]["count"] == 0, "it has none any more, and will not say so"


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "/id"),
    ({"id": ""}, "/id"),
    ({"id": "commands"}, "/id"),
    ({"id": "a/b"}, "/id"),
    ({"id": "a\r\nb"}, "/id"),
    ({"id": "-a"}, "/id"),
    ({"id": "x" * 101}, "/id"),
    ({"id": "x", "widht": 1}, "/widht"),
    ({"id": "x", "ram": -1}, "/ram"),
    ({"id": "x", "ram": 1.5}, "/ram"),
    ({"id": "x", "cpus": -0.5}, "/cpus"),
    ({"id": "x", "cpus": 0.12345}, "/cpus"),
    ({"id": "x", "cpus": "4"}, "/cpus"),
    ({"id": "x", "labels": ["a b"]}, "/labels/0"),
    ({"id": "x", "labels": ["a"] * 51}, "/labels"),
    ({"id": "x", "limits": {"disk": 1}}, "/limits/disk"),
    ({"id": "x", "state": "stopped"}, "/state"),
    ({"id": "x", "usage": {"load": [1, 2]}}, "/usage/load"),
    ({"id": "x", "assignments": [{"uuid": "1", "attempt": 1}]}, "/assignments/0/uuid"),
    ({"id": "x", "assignments": [{"uuid": "0" * 8 + "-0000-0000-0000-" + "0" * 12, "attempt": 0}]},
     "/assignments/0/attempt"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "pointer"), BAD)
def test_what_no_agent_can_be_is_refused_and_leaves_nothing(
    zerog: Deployment, body: dict[str, Any], pointer: str
) -> None:
    answer = zerog.client.post("/agents", json=body)
    assert answer.status_code == 422
    assert pointer in [one["pointer"] for one in answer.json()["errors"]]
    assert "x" not in [one["id"] for one in zerog.client.get("/agents").json()["items"]]


@pytest.mark.parametrize("id", ["nobody", "commands", "a%2Fb", "%00", "x" * 101])
def test_an_agent_that_never_spoke_is_unknown(zerog: Deployment, id: str) -> None:
    for path in ("", "/assignments", "/commands", "/commands/1", "/jobs", "/failures", "/exceptions"):
        answer = zerog.client.get(f"/agents/{id}{path}")
        assert answer.status_code in (404, 405), (path, answer.text)


@pytest.mark.requirement("M14", "M18")
def test_agents_are_found_by_what_they_have(zerog: Deployment) -> None:
    small = Speaker(zerog.client, "small", "noop", ram=100)
    large = Speaker(zerog.client, "large", "noop", "return", ram=1000)
    assert {small.hear().status_code, large.hear(state="draining").status_code} == {201}

    def ids(query: str) -> set[str]:
        return {one["id"] for one in zerog.client.get(f"/agents?{query}").json()["items"]}

    assert ids("minRam=500") & {"small", "large"} == {"large"}
    assert ids("jobType=return") & {"small", "large"} == {"large"}
    assert ids("state=draining") & {"small", "large"} == {"large"}
    assert ids("jobType=noop&minRam=50") >= {"small", "large"}
    first = zerog.client.get("/agents?limit=1").json()
    second = zerog.client.get(first["next"]).json()
    assert first["items"][0]["id"] == "large", "the newest first"
    assert second["items"][0]["id"] == "small"
    for query in ("minRam=-1", "minRam=x", "state=gone", "limit=0"):
        assert code(zerog.client.get(f"/agents?{query}")) == (400, "invalid_parameter")
    for one in ("small", "large"):
        zerog.client.delete(f"/agents/{one}")


# Assignments


@pytest.mark.requirement("M8")
def test_twenty_agents_that_ask_at_once_for_ten_jobs_get_ten_distinct_ones(zerog: Deployment) -> None:
    agents = [Speaker(httpx.Client(base_url=zerog.url, timeout=30), f"many-{n}", "noop") for n in range(20)]
    for one in agents:
        assert one.hear().status_code == 201
    uuids = {zerog.submit("noop") for _ in range(10)}
    start = threading.Barrier(20)

    def ask(one: Speaker) -> dict[str, Any] | None:
        start.wait(10)
        return one.take(3)

    with ThreadPoolExecutor(20) as pool:
        given = [one for one in pool.map(ask, agents) if one is not None]
    assert len(given) == 10
    assert {one["uuid"] for one in given} == uuids
    assert {one["attempt"] for one in given} == {1}
    for one in agents:
        zerog.client.delete(f"/agents/{one.id}")
        one.client.close()
    for uuid in uuids:
        zerog.client.delete(f"/jobs/{uuid}")


@pytest.mark.requirement("M2", "M8", "M10")
def test_an_assignment_has_all_that_the_agent_needs_and_is_shown(zerog: Deployment, agent: Speaker) -> None:
    assert agent.take() is None
    uuid = zerog.submit("return", {"what": "text", "size": 3})
    given = agent.take(5)
    assert given is not None
    assert given["job"] == {"href": f"/jobs/{uuid}"}
    assert (given["uuid"], given["attempt"], given["jobType"]) == (uuid, 1, "return")
    assert given["parameters"] == {"what": "text", "size": 3}
    assert given["limits"] == {"ram": 0, "cpus": 0, "labels": []}
    assert (given["state"], given["lease"]) == (None, LEASE)
    expected = {"agent": {"href": f"/agents/{agent.id}"}, "job": {"href": f"/jobs/{uuid}"}, "attempt": 1}
    for href in (f"/agents/{agent.id}/assignments", "/assignments"):
        (item,) = [
            one for one in zerog.client.get(href).json()["items"] if one["agent"]["href"] == f"/agents/{agent.id}"
        ]
        assert {name: item[name] for name in expected} == expected
        assert item["since"].endswith("Z")
    assert view(zerog, agent.id)["tasks"]["count"] == 1
    assert zerog.job(uuid)["agent"] == agent.id
    assert agent.end(given).status_code == 200
    assert zerog.client.get(f"/agents/{agent.id}/assignments").json()["items"] == []


@pytest.mark.requirement("M8")
def test_a_waiting_agent_gets_a_new_job_at_once_and_one_that_went_away_gets_none(
    zerog: Deployment, agent: Speaker
) -> None:
    with httpx.Client(base_url=zerog.url, timeout=0.3) as impatient, pytest.raises(httpx.ReadTimeout):
        impatient.post(f"/agents/{agent.id}/assignments", json={}, headers={"Prefer": "wait=20"})
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(agent.take, 10)
        time.sleep(0.5)  # so that it waits before there is a job
        began = time.monotonic()
        uuid = zerog.submit("noop")
        given = waiting.result(10)
        assert time.monotonic() - began < 1
    assert given is not None and (given["uuid"], given["attempt"]) == (uuid, 1)
    agent.end(given)


@pytest.mark.parametrize("body", [{"x": 1}, {"uuid": "a"}])
def test_an_ask_for_an_assignment_says_nothing_else(zerog: Deployment, agent: Speaker, body: dict[str, Any]) -> None:
    answer = zerog.client.post(f"/agents/{agent.id}/assignments", json=body)
    assert code(answer) == (422, "invalid_parameters")
    answer = zerog.client.post("/agents/nobody/assignments", json={})
    assert code(answer) == (404, "unknown_agent")


# Attempts


@pytest.mark.requirement("M2", "M7")
def test_an_attempt_is_followed_to_its_end(zerog: Deployment, agent: Speaker) -> None:
    uuid = zerog.submit("noop")
    given = agent.take(5)
    assert given is not None
    events = [{"level": "event", "message": "began", "at": "2026-01-02T03:04:05Z"}, {"level": "warning", "message": "w"},
              {"level": "error", "message": "e", "code": 7}]  # fmt: skip
    report = {"completeness": 0.5, "message": "half", "events": events, "batch": 1, "checkpoint": {"at": 3}}
    for _ in range(2):
        answer = agent.report(given, **report)
        assert answer.status_code == 200
        assert (answer.json()["completeness"], answer.json()["message"]) == (0.5, "half")
    assert agent.report(given, completeness=0.2).json()["completeness"] == 0.5, "it never goes back"
    info = zerog.info(uuid)
    assert [one["message"] for one in info["events"]] == ["began"], "a repeated batch is ignored"
    assert info["events"][0]["at"] == "2026-01-02T03:04:05.000Z"
    assert ([one["message"] for one in info["warnings"]], [one["code"] for one in info["errors"]]) == (["w"], [7])
    for _ in range(2):
        answer = agent.end(given, data={"answer": 42}, code=201)
        assert (answer.status_code, answer.json()["state"], answer.json()["resultCode"]) == (200, "succeeded", 201)
    assert zerog.client.get(f"/jobs/{uuid}/data").json() == {"answer": 42}
    assert code(agent.end(given, data={"answer": 43})) == (409, "already_finished")
    assert code(agent.end(given, "failed")) == (409, "already_finished")
    assert code(agent.report(given, completeness=0.9)) == (409, "already_finished")
    assert zerog.job(uuid)["completeness"] == 1.0


@pytest.mark.requirement("M7")
def test_what_an_attempt_makes_is_seen_only_with_its_outcome_and_the_last_one_wins(
    zerog: Deployment, agent: Speaker
) -> None:
    uuid = zerog.submit("noop")
    given = agent.take(5)
    assert given is not None
    href = f"{given['href']}/data"
    large = bytes(range(256)) * 8192
    for content, media_type in ((b"first", "text/plain"), (large, "application/x-tar")):
        assert zerog.client.put(href, content=content, headers={"Content-Type": media_type}).status_code == 204
        assert zerog.client.get(f"/jobs/{uuid}/data").status_code == 202

    def endless() -> Iterator[bytes]:
        yield b"x" * 500_000
        raise ConnectionError("the agent is gone")

    with pytest.raises(ConnectionError):
        zerog.client.put(href, content=endless(), headers={"Content-Type": "text/plain"})
    assert agent.end(given).status_code == 200
    answer = zerog.client.get(f"/jobs/{uuid}/data")
    assert (answer.headers["Content-Type"], answer.content) == ("application/x-tar", large)
    assert zerog.client.put(href, content=b"late").status_code == 409


@pytest.mark.requirement("M7")
def test_data_can_come_in_pieces_each_of_which_may_come_twice(zerog: Deployment, agent: Speaker) -> None:
    uuid = zerog.submit("noop")
    given = agent.take(5)
    assert given is not None
    chunk = 262_144
    whole = b"a" * chunk + b"b" * chunk + b"c" * 10

    def put(first: int, last: int, total: str) -> httpx.Response:
        headers = {"Content-Type": "text/plain", "Content-Range": f"bytes {first}-{last}/{total}"}
        return zerog.client.put(f"{given['href']}/data", content=whole[first : last + 1], headers=headers)

    assert put(0, chunk - 1, "*").status_code == 204
    for _ in range(2):
        assert put(chunk, 2 * chunk - 1, "*").status_code == 204
    assert code(put(3 * chunk, 3 * chunk + 9, "*")) == (400, "invalid_parameter"), "a piece is missing before it"
    assert code(put(0, 99, "*")) == (400, "invalid_parameter"), "only the last one may be of any length"
    assert put(2 * chunk, len(whole) - 1, str(len(whole))).status_code == 204
    agent.end(given)
    answer = zerog.client.get(f"/jobs/{uuid}/data")
    assert (answer.content, answer.headers["Content-Type"]) == (whole, "text/plain")


@pytest.mark.requirement("M7", "M19", "M20", "M28")
def test_every_outcome_leads_where_it_should_and_is_counted(zerog: Deployment, agent: Speaker) -> None:
    def one(outcome: str, **members: Any) -> dict[str, Any]:
        uuid = zerog.submit("noop")
        given = agent.take(5)
        assert given is not None and given["uuid"] == uuid
        assert agent.end(given, outcome, **members).status_code == 200
        record = zerog.job(uuid)
        zerog.client.delete(f"/jobs/{uuid}")  # the next one is not to be given this one again
        return record

    failed = one("failed", error={"message": "no", "traceback": "line 1"}, final=True, code=422, reason="failed")
    assert (failed["state"], failed["resultCode"], failed["reason"]) == ("failed", 422, "failed")
    (error,) = zerog.info(failed["uuid"])["errors"]
    assert (error["message"], error["traceback"], error["code"]) == ("no", "line 1", 422)
    again = one("failed", error={"message": "later"}, delay=30)
    assert (again["state"], again["counters"]["errors"], again["failedOn"]) == ("queued", 1, [agent.id])
    crashed = one("crashed", error={"message": "killed by 9"})
    assert (crashed["state"], crashed["counters"]["crashes"]) == ("queued", 1)
    requeued = one("requeued", delay=30, state={"step": 2})
    assert (requeued["state"], requeued["counters"]) == ("queued", {"errors": 0, "crashes": 0, "losses": 0})
    ended = one("cancelled")
    assert (ended["state"], ended["message"]) == ("cancelled", "cancelled by its agent"), "nobody had asked for it"
    back = one("givenBack", started=False)
    assert (back["state"], back["counters"]["losses"]) == ("queued", 0)
    shown = view(zerog, agent.id)
    assert (shown["processedJobs"]["count"], shown["lastFailures"]["count"]) == (5, 3)
    jobs = zerog.client.get(shown["processedJobs"]["href"]).json()["items"]
    assert [one["outcome"] for one in jobs] == ["cancelled", "requeued", "crashed", "failed", "failed"]
    assert jobs[-1]["job"] == {"href": f"/jobs/{failed['uuid']}"}
    failures = zerog.client.get(shown["lastFailures"]["href"]).json()["items"]
    assert [one["outcome"] for one in failures] == ["crashed", "failed", "failed"]


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("", {"completeness": "half"}, "/completeness"),
    ("", {"widht": 1}, "/widht"),
    ("", {"events": [{"message": 5}]}, "/events/0/message"),
    ("", {"events": [{"level": "fatal", "message": ""}]}, "/events/0/level"),
    ("", {"events": [{"message": "", "at": "yesterday"}]}, "/events/0/at"),
    ("", {"batch": -1}, "/batch"),
    ("", {"checkpoint": "x" * 70_000}, "/checkpoint"),
    ("/outcome", {}, "/outcome"),
    ("/outcome", {"outcome": "done"}, "/outcome"),
    ("/outcome", {"outcome": "succeeded", "code": 404}, "/code"),
    ("/outcome", {"outcome": "failed", "code": 200}, "/code"),
    ("/outcome", {"outcome": "failed", "data": 1}, "/data"),
    ("/outcome", {"outcome": "succeeded", "delay": 1}, "/delay"),
    ("/outcome", {"outcome": "requeued", "delay": -1}, "/delay"),
    ("/outcome", {"outcome": "failed", "reason": "No Reason"}, "/reason"),
]


@pytest.mark.parametrize(("path", "body", "pointer"), WRONG)
def test_what_no_attempt_can_say_is_refused(
    zerog: Deployment, agent: Speaker, path: str, body: dict[str, Any], pointer: str
) -> None:
    zerog.submit("noop")
    given = agent.take(5)
    assert given is not None
    answer = zerog.client.post(f"{given['href']}{path}", json=body)
    assert answer.status_code == 422, answer.text
    assert pointer in [one["pointer"] for one in answer.json()["errors"]]
    assert agent.end(given).status_code == 200, "it is still the agent's"


@pytest.mark.parametrize("attempt", ["2", "0", "-1", "01", "x", "99999999999"])
def test_an_attempt_that_was_never_begun_is_unknown(zerog: Deployment, agent: Speaker, attempt: str) -> None:
    uuid = zerog.submit("noop")
    given = agent.take(5)
    assert given is not None
    for path, body in (("", {}), ("/outcome", {"outcome": "succeeded"})):
        answer = zerog.client.post(f"/jobs/{uuid}/attempts/{attempt}{path}", json=body)
        assert code(answer) == (404, "not_found")
    agent.end(given)


@pytest.mark.requirement("M7", "M10")
def test_who_begins_anew_has_lost_what_it_does_not_list_at_once(zerog: Deployment, agent: Speaker) -> None:
    kept, lost = zerog.submit("noop"), zerog.submit("noop")
    given = {one["uuid"]: one for one in (agent.take(5), agent.take(5)) if one is not None}
    assert set(given) == {kept, lost}
    agent.begin_anew()
    began = time.monotonic()
    answer = agent.hear(given[kept])
    assert (answer.status_code, answer.json()["superseded"]) == (200, [])
    record = zerog.wait_for(lost, 2, state="queued")
    assert time.monotonic() - began < LEASE / 2, "not by a lapse"
    assert (record["attempt"], record["counters"]["losses"]) == (1, 1)
    assert zerog.job(kept)["state"] == "running"
    again = agent.take(5)
    assert again is not None and (again["uuid"], again["attempt"]) == (lost, 2)
    assert code(agent.end(given[lost])) == (409, "superseded")
    assert agent.hear(given[lost]).json()["superseded"] == [{"uuid": lost, "attempt": 1}]
    assert agent.end(given[kept]).status_code == agent.end(again).status_code == 200


@pytest.mark.requirement("M7")
def test_a_heartbeat_renews_what_it_lists_and_what_it_does_not_merely_lapses(zerog: Deployment, agent: Speaker) -> None:
    listed, forgotten = zerog.submit("noop"), zerog.submit("noop")
    given = {one["uuid"]: one for one in (agent.take(5), agent.take(5)) if one is not None}
    end = time.monotonic() + 2 * LEASE
    lapsed_at = None
    while time.monotonic() < end:
        assert agent.hear(given[listed]).json()["superseded"] == []
        if lapsed_at is None and zerog.job(forgotten)["state"] == "queued":
            lapsed_at = time.monotonic()
        time.sleep(LEASE / 6)  # as an agent does
    assert lapsed_at is not None and lapsed_at > end - 1.5 * LEASE
    assert (zerog.job(listed)["state"], zerog.job(listed)["attempt"]) == ("running", 1)
    assert agent.end(given[listed]).status_code == 200


@pytest.mark.requirement("M13")
@pytest.mark.parametrize("how", ["offline", "delete"])
def test_a_goodbye_gives_back_at_once_and_spends_nothing(zerog: Deployment, agent: Speaker, how: str) -> None:
    uuid = zerog.submit("noop")
    assert agent.take(5) is not None
    if how == "offline":
        assert agent.hear(state="offline").json()["state"] == "offline"
    else:
        zerog.client.delete(f"/agents/{agent.id}")
    record = zerog.job(uuid)
    assert (record["state"], record["attempt"], record["counters"]["losses"]) == ("queued", 1, 0)
    assert agent.hear().status_code == (200 if how == "offline" else 201)
    again = agent.take(5)
    assert again is not None and (again["uuid"], again["attempt"]) == (uuid, 2)
    agent.end(again)


def test_events_over_http_are_kept_within_their_caps(zerog: Deployment, agent: Speaker) -> None:
    uuid = zerog.submit("noop")
    given = agent.take(5)
    assert given is not None
    for batch in range(12):
        events = [{"message": f"{100 * batch + number}"} for number in range(100)]
        assert agent.report(given, events=events, batch=batch).status_code == 200
    agent.end(given)
    found = []
    href = f"/jobs/{uuid}/events?limit=1000"
    while href:
        page = zerog.client.get(href).json()
        found += [int(one["message"]) for one in page["items"]]
        href = page["next"]
    assert found == [*range(200), *range(400, 1200)], "the first 200 and the last 800"
    assert zerog.info(uuid)["dropped"]["events"] == 200


# Exceptions and commands


@pytest.mark.requirement("M15")
def test_an_agents_own_exceptions_are_kept_and_shown_newest_first(zerog: Deployment, agent: Speaker) -> None:
    for number in range(3):
        body = {"type": "ValueError", "message": f"no {number}", "traceback": "line 1\nline 2"}
        assert zerog.client.post(f"/agents/{agent.id}/exceptions", json=body).status_code == 201
    shown = view(zerog, agent.id)["exceptions"]
    assert shown["count"] == 3
    items = zerog.client.get(shown["href"]).json()["items"]
    assert [one["message"] for one in items] == ["no 2", "no 1", "no 0"]
    assert items[0]["traceback"] == "line 1\nline 2" and items[0]["at"].endswith("Z")
    bad: list[dict[str, Any]] = [
        {},
        {"type": "", "message": "x"},
        {"type": "E", "message": 5},
        {"type": "E", "message": "", "x": 1},
    ]
    for one in bad:
        body = one
        assert zerog.client.post(f"/agents/{agent.id}/exceptions", json=body).status_code == 422
    assert view(zerog, agent.id)["exceptions"]["count"] == 3


def tell(zerog: Deployment, id: str, command: str, **members: Any) -> httpx.Response:
    return zerog.client.post(f"/agents/{id}/commands", json={"command": command, **members})


@pytest.mark.requirement("M25")
def test_commands_are_numbered_heard_and_acknowledged_once(zerog: Deployment, agent: Speaker) -> None:
    for number, name in enumerate(("drain", "resume", "drain"), 1):
        answer = tell(zerog, agent.id, name)
        assert (answer.status_code, answer.json()["number"], answer.json()["state"]) == (202, number, "pending")
        assert answer.headers["Location"] == answer.json()["href"]
    assert tell(zerog, agent.id, "cancel").status_code == 422, "which takes no number"
    key = {"Idempotency-Key": f"key-{agent.id}"}
    body = {"command": "resume"}
    for _ in range(2):
        answer = zerog.client.post(f"/agents/{agent.id}/commands", json=body, headers=key)
        assert (answer.status_code, answer.json()["number"]) == (202, 4)
    assert [one["number"] for one in agent.commands()] == [1, 2, 3, 4]
    assert [one["number"] for one in agent.commands(after=2)] == [3, 4]
    heard = agent.hear().json()
    assert ([one["number"] for one in heard["talkback"]], heard["last"]) == ([1, 2, 3, 4], 4)
    asked = zerog.client.get(f"/agents/{agent.id}/commands?after=3").json()
    assert (asked["last"], asked["drained"]) == (4, False)
    for _ in range(2):
        answer = agent.acknowledge(1)
        assert (answer.status_code, answer.json()["state"]) == (200, "applied")
    assert code(agent.acknowledge(1, "refused")) == (409, "conflict")
    assert agent.acknowledge(2, "refused", "not now").json()["message"] == "not now"
    assert [one["number"] for one in agent.hear().json()["talkback"]] == [3, 4]
    assert zerog.client.get(f"/agents/{agent.id}/commands/2").json()["state"] == "refused"
    assert code(agent.acknowledge(9)) == (404, "not_found")
    assert agent.hear().json()["drained"] is False


@pytest.mark.requirement("M25")
@pytest.mark.parametrize("wait", ["wait=20", "wait"])
def test_a_waiting_agent_hears_of_a_command_within_half_a_second(zerog: Deployment, agent: Speaker, wait: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(agent.commands, 0, wait)
        time.sleep(0.5)  # so that it waits before there is one
        tell(zerog, agent.id, "drain")
        began = time.monotonic()
        assert [one["command"] for one in waiting.result(10)] == ["drain"]
        assert time.monotonic() - began < 0.5


@pytest.mark.requirement("M14", "M25")
def test_a_drained_agent_gets_nothing_until_it_is_resumed(zerog: Deployment, agent: Speaker) -> None:
    tell(zerog, agent.id, "drain")
    uuid = zerog.submit("noop")
    assert agent.take(1) is None
    agent.begin_anew()
    assert agent.hear().json()["drained"] is True, "over restarts too"
    assert agent.take(1) is None
    tell(zerog, agent.id, "resume")
    given = agent.take(5)
    assert given is not None and given["uuid"] == uuid
    agent.end(given)


@pytest.mark.requirement("M25")
def test_several_agents_are_told_by_host_and_by_label(zerog: Deployment) -> None:
    here = Speaker(zerog.client, "t-1", "noop", hostname="t-host", labels=["t-gpu"])
    there = Speaker(zerog.client, "t-2", "noop", hostname="t-other", labels=["t-gpu"])
    for one in (here, there):
        one.hear()

    def told(**body: Any) -> list[str]:
        answer = zerog.client.post("/agents/commands", json={"command": "drain", **body})
        assert answer.status_code == 202, answer.text
        return sorted(one["href"].split("/")[2] for one in answer.json()["items"])

    assert told(hostname="t-host") == ["t-1"]
    assert told(label="t-gpu") == ["t-1", "t-2"]
    assert told(hostname="nowhere") == []
    assert zerog.client.post("/agents/commands", json={"command": "drain"}).status_code == 422
    assert [len(one.commands()) for one in (here, there)] == [2, 1]
    key = {"Idempotency-Key": "k-many"}
    assert zerog.client.post("/agents/t-1/commands", json={"command": "drain"}, headers=key).status_code == 202
    resume = {"command": "resume", "label": "t-gpu"}
    answer = zerog.client.post("/agents/commands", json=resume, headers=key)
    assert answer.status_code == 202, "one that cannot be told does not keep the others from it"
    assert [one["href"].split("/")[2] for one in answer.json()["items"]] == ["t-2"]
    (refused,) = answer.json()["refused"]
    assert (refused["agent"], refused["status"], refused["code"]) == (
        {"href": "/agents/t-1"}, 422, "idempotency_key_reused"
    )  # fmt: skip
    answer = zerog.client.post("/agents/commands", json={**resume, "hostname": "t-host"}, headers=key)
    assert code(answer) == (422, "idempotency_key_reused"), "nobody was told"
    for one in (here, there):
        zerog.client.delete(f"/agents/{one.id}")


BAD_COMMANDS: list[tuple[dict[str, Any], str]] = [
    ({}, "/command"),
    ({"command": "explode"}, "/command"),
    ({"command": "drain", "uuid": "0" * 8 + "-0000-0000-0000-" + "0" * 12}, "/uuid"),
    ({"command": "cancel"}, "/uuid"),
    ({"command": "cancel", "uuid": "x"}, "/uuid"),
    ({"command": "setLimits"}, "/limits"),
    ({"command": "setLimits", "limits": {"disk": 1}}, "/limits/disk"),
    ({"command": "setLimits", "limits": {"labels": ["a"]}}, "/limits/labels"),
    ({"command": "setLimits", "limits": {"ram": -1}}, "/limits/ram"),
    ({"command": "modify", "uuid": "0" * 8 + "-0000-0000-0000-" + "0" * 12, "priority": -1}, "/priority"),
]


@pytest.mark.parametrize(("body", "pointer"), BAD_COMMANDS)
def test_what_is_no_command_is_refused(zerog: Deployment, agent: Speaker, body: dict[str, Any], pointer: str) -> None:
    answer = zerog.client.post(f"/agents/{agent.id}/commands", json=body)
    assert answer.status_code == 422
    assert pointer in [one["pointer"] for one in answer.json()["errors"]]
    assert agent.commands() == []


@pytest.mark.requirement("M11", "M25")
def test_a_cancel_reaches_the_agent_as_a_command_and_in_its_reports(zerog: Deployment, agent: Speaker) -> None:
    uuid = zerog.submit("noop")
    given = agent.take(5)
    assert given is not None
    assert zerog.client.post(f"/jobs/{uuid}/cancel").status_code == 202
    (command,) = agent.commands()
    assert (command["command"], command["uuid"]) == ("cancel", uuid)
    assert agent.report(given).json()["cancelling"] is True
    answer = agent.end(given, "cancelled")
    assert answer.json()["state"] == "cancelled"
    assert zerog.job(uuid)["resultCode"] == 410


# What jobs need


def patch(zerog: Deployment, uuid: str, body: dict[str, Any], tag: str | None = None) -> httpx.Response:
    tag = tag if tag is not None else zerog.client.get(f"/jobs/{uuid}").headers["ETag"]
    return zerog.client.patch(f"/jobs/{uuid}", json=body, headers={"If-Match": tag})


@pytest.mark.requirement("M11")
def test_a_job_is_modified_only_as_it_was_seen(zerog: Deployment, agent: Speaker) -> None:
    uuid = zerog.submit("noop-later")
    answer = zerog.client.get(f"/jobs/{uuid}")
    tag = answer.headers["ETag"]
    assert (tag, answer.headers["Cache-Control"]) == (f'"{answer.json()["revision"]}"', "no-store")
    again = zerog.client.get(f"/jobs/{uuid}", headers={"If-None-Match": tag})
    assert again.status_code == 200, "it never answers 304"
    body = {"priority": 5, "notBefore": "2099-01-01T00:00:00Z"}
    assert zerog.client.patch(f"/jobs/{uuid}", json={"priority": 5}).status_code == 428
    assert patch(zerog, uuid, {"priority": 5}, '"999"').status_code == 412
    assert patch(zerog, uuid, body).status_code == 422, "more than a year ahead"
    for bad in ({"priority": -1}, {"widht": 1}, {"limits": {"ram": -1}}, {"limits": {"labels": ["a b"]}}):
        assert patch(zerog, uuid, bad).status_code == 422
    changed = patch(zerog, uuid, {"priority": 5, "limits": {"ram": 7}})
    assert changed.status_code == 200
    assert (changed.json()["priority"], changed.json()["limits"]["ram"]) == (5, 7)
    assert changed.headers["ETag"] != tag
    assert patch(zerog, uuid, {"priority": 6}, tag).status_code == 412
    zerog.client.delete(f"/jobs/{uuid}")
    assert code(patch(zerog, uuid, {"priority": 6})) == (409, "already_finished")


@pytest.mark.requirement("M11")
def test_a_queued_job_with_another_priority_comes_in_another_order(zerog: Deployment, agent: Speaker) -> None:
    first, second, third = (zerog.submit("noop") for _ in range(3))
    assert patch(zerog, third, {"priority": 1}).status_code == 200
    assert patch(zerog, first, {"priority": 5000}).status_code == 200
    order = []
    for _ in range(12):
        given = agent.take(1)
        if given is not None:
            assert given["attempt"] == 1
            order.append(given["uuid"])
            agent.end(given)
    assert order == [third, second, first]


@pytest.mark.requirement("M14")
def test_an_agent_is_given_only_what_it_has_room_for(zerog: Deployment, agent: Speaker) -> None:
    one = Speaker(zerog.client, "room", "noop", ram=100, cpus=2, labels=["gpu"])
    one.hear()

    def job(**limits: Any) -> str:
        uuid = zerog.submit("noop", params={"delay": "1"})
        assert patch(zerog, uuid, {"limits": limits, "notBefore": None}).status_code == 200
        return uuid

    large, small, other = job(ram=80), job(ram=30, cpus=0.5), job(labels=["fpga"])
    given = [one.take(2), one.take(2)]
    assert sum(each is not None for each in given) == 1, "the two together are more than it has"
    (first,) = [each for each in given if each is not None]
    assert first["uuid"] in (large, small) and first["limits"]["ram"] in (80, 30)
    room = view(zerog, "room")["room"]
    assert room["ram"] == 100 - first["limits"]["ram"]
    waits = small if first["uuid"] == large else large
    why = zerog.client.get(f"/jobs/{waits}/explain").json()
    assert (why["reason"], why["needs"]["ram"]) == ("no_room", 30 if waits == small else 80)
    never = zerog.client.get(f"/jobs/{other}/explain").json()
    assert (never["reason"], never["unmet"]) == ("no_agent_fits", {"labels": ["fpga"]})
    assert one.end(first).status_code == 200
    second = one.take(5)
    assert second is not None and second["uuid"] == waits
    one.end(second)
    assert one.take(1) is None
    assert tell(zerog, "room", "setLimits", limits={"ram": 10}).status_code == 202
    assert view(zerog, "room")["limits"] == {"ram": 10, "cpus": 2}
    refused = job(ram=30)
    assert one.take(1) is None
    assert zerog.client.get(f"/jobs/{refused}/explain").json()["reason"] == "no_agent_fits"
    assert tell(zerog, "room", "setLimits", limits={"ram": None}).status_code == 202
    third = one.take(5)
    assert third is not None and third["uuid"] == refused
    one.end(third)
    zerog.client.delete("/agents/room")


@pytest.mark.requirement("M11", "M14")
def test_the_agent_of_a_running_job_is_told_that_it_was_modified(zerog: Deployment) -> None:
    one = Speaker(zerog.client, "told", "noop", ram=100)
    one.hear()
    uuid = zerog.submit("noop")
    given = one.take(5)
    assert given is not None
    assert patch(zerog, uuid, {"limits": {"ram": 60}, "priority": 3}).status_code == 200
    (command,) = one.commands()
    assert (command["command"], command["uuid"], command["limits"]) == ("modify", uuid, {"ram": 60})
    assert view(zerog, "told")["room"]["ram"] == 40
    one.end(given)
    assert view(zerog, "told")["room"]["ram"] == 100
    zerog.client.delete("/agents/told")


def test_a_job_does_not_go_back_to_the_agent_where_it_failed_while_another_could_run_it(
    zerog: Deployment, agent: Speaker
) -> None:
    uuid = zerog.submit("noop")
    given = agent.take(5)
    assert given is not None
    other = Speaker(zerog.client, "other", "noop")
    other.hear()
    agent.end(given, "failed", error={"message": "here"}, delay=0)
    assert zerog.job(uuid)["failedOn"] == [agent.id]
    time.sleep(1.1)  # what is known of the agents is a second old at most
    assert agent.take(1) is None
    elsewhere = other.take(5)
    assert elsewhere is not None and elsewhere["uuid"] == uuid
    other.end(elsewhere, "failed", error={"message": "there too"}, delay=0)
    # Now it has failed on both: anybody may have it.
    given = agent.take(5)
    assert given is not None and (given["uuid"], given["attempt"]) == (uuid, 3)
    agent.end(given)
    zerog.client.delete("/agents/other")


# Turns


@pytest.mark.requirement("M5", "M8")
def test_a_turn_says_many_things_and_asks_for_more(zerog: Deployment, agent: Speaker) -> None:
    uuids = [zerog.submit("noop") for _ in range(5)]
    given: list[dict[str, Any]] = []
    for _ in range(20):  # entries of jobs that were cancelled before may come first, and count for nothing
        first = zerog.client.post(f"/agents/{agent.id}/turns", json={"want": 3 - len(given)})
        assert first.status_code == 200
        given += first.json()["assignments"]
    assert len(given) == 3
    items = [{"uuid": one["uuid"], "attempt": one["attempt"]} for one in given]
    body = {
        "reports": [{**items[0], "completeness": 0.5}],
        "outcomes": [
            {**items[1], "outcome": "succeeded", "data": [1, 2]},
            {**items[2], "attempt": 2, "outcome": "succeeded"},
        ],
        "want": 10,
    }
    answer = zerog.client.post(f"/agents/{agent.id}/turns", json=body).json()
    assert [one["status"] for one in answer["reports"]] == [200]
    assert [one["status"] for one in answer["outcomes"]] == [200, 404]
    assert {one["uuid"] for one in (*given, *answer["assignments"])} == set(uuids)
    assert zerog.client.get(f"/jobs/{items[1]['uuid']}/data").json() == [1, 2]
    rest = [one for one in (*given, *answer["assignments"]) if one["uuid"] != items[1]["uuid"]]
    outcomes = [{"uuid": one["uuid"], "attempt": one["attempt"], "outcome": "succeeded"} for one in rest]
    for _ in range(2):
        done = zerog.client.post(f"/agents/{agent.id}/turns", json={"outcomes": outcomes}).json()
        assert [one["state"] for one in done["outcomes"]] == ["succeeded"] * 4
    assert view(zerog, agent.id)["processedJobs"]["count"] == 5, "each counted once"
    assert view(zerog, agent.id)["tasks"]["count"] == 0


@pytest.mark.requirement("M5")
def test_one_odd_item_is_refused_and_the_others_and_other_agents_go_on(zerog: Deployment, agent: Speaker) -> None:
    uuid = zerog.submit("noop")
    given = agent.take(5)
    assert given is not None
    odd = {"events": [{"message": "x", "at": "0001-01-01T00:00:00+14:00"}]}
    answer = agent.report(given, **odd)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/events/0/at")
    body = {"reports": [{"uuid": uuid, "attempt": 1, **odd}]}
    assert zerog.client.post(f"/agents/{agent.id}/turns", json=body).status_code == 422
    wrong = {"uuid": uuid, "attempt": 1, "outcome": "succeeded", "code": 500}
    body = {"outcomes": [{"uuid": uuid, "attempt": 9, "outcome": "succeeded"}, wrong]}
    answer = zerog.client.post(f"/agents/{agent.id}/turns", json=body)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/outcomes/1/code")
    unknown = "0" * 8 + "-0000-4000-8000-" + "0" * 12
    body = {"reports": [{"uuid": unknown, "attempt": 1}, {"uuid": uuid, "attempt": 1, "completeness": 0.5}]}
    answer = zerog.client.post(f"/agents/{agent.id}/turns", json=body)
    assert [one["status"] for one in answer.json()["reports"]] == [404, 200]
    assert agent.end(given).status_code == 200


BAD_CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"limits": {"ram": None}}, "/limits/ram"),
    ({"limits": {"cpus": None}}, "/limits/cpus"),
    ({"limits": {"labels": ["a b"]}}, "/limits/labels/0"),
    ({"limits": None}, "/limits"),
    ({"priority": None}, "/priority"),
    ({"notBefore": "0001-01-01T00:00:00+14:00"}, "/notBefore"),
]


@pytest.mark.requirement("M11")
@pytest.mark.parametrize(("change", "pointer"), BAD_CHANGES)
def test_a_modification_that_cannot_be_leaves_the_job_as_it_was(
    zerog: Deployment, agent: Speaker, change: dict[str, Any], pointer: str
) -> None:
    uuid = zerog.submit("noop")
    given = agent.take(5)
    assert given is not None
    before = zerog.job(uuid)
    answer = tell(zerog, agent.id, "modify", uuid=uuid, **change)
    assert answer.status_code == 422
    assert pointer in [one["pointer"] for one in answer.json()["errors"]]
    assert zerog.job(uuid) == before
    assert agent.end(given).status_code == 200


@pytest.mark.requirement("M7")
def test_the_last_piece_may_come_twice_and_a_new_beginning_spoils_nothing(zerog: Deployment, agent: Speaker) -> None:
    uuid = zerog.submit("noop")
    given = agent.take(5)
    assert given is not None
    chunk = 262_144

    def put(content: bytes, first: int, total: str) -> int:
        headers = {"Content-Range": f"bytes {first}-{first + len(content) - 1}/{total}"}
        return zerog.client.put(f"{given['href']}/data", content=content, headers=headers).status_code

    assert put(b"a" * chunk, 0, "*") == 204
    assert [put(b"b", chunk, str(chunk + 1)) for _ in range(3)] == [204] * 3
    assert put(b"c" * chunk, 0, "*") == 204, "another beginning, which never comes to its end"
    assert agent.end(given).status_code == 200
    assert zerog.client.get(f"/jobs/{uuid}/data").content == b"a" * chunk + b"b"


@pytest.mark.requirement("M7")
def test_what_came_over_http_is_removed_with_its_job(zerog: Deployment, agent: Speaker) -> None:
    uuid = zerog.submit("noop")
    given = agent.take(5)
    assert given is not None
    href = f"{given['href']}/data"
    headers = {"Content-Range": "bytes 0-262143/*"}
    assert zerog.client.put(href, content=b"x" * 262_144, headers=headers).status_code == 204
    agent.begin_anew()
    agent.hear()
    second = agent.take(5)
    assert second is not None and second["attempt"] == 2
    assert zerog.client.put(f"{second['href']}/data", content=b"y" * 600_000).status_code == 204
    agent.end(second)
    assert len(zerog.client.get(f"/jobs/{uuid}/data").content) == 600_000
    answer = zerog.client.post("/jobs:prune", json={"olderThan": 0, "type": "noop"})
    assert answer.json()["pruned"] >= 1
    assert zerog.client.get(f"/jobs/{uuid}").status_code == 404
    if "ZEROG_DATASTORE" not in zerog.environment:
        with sqlite3.connect(zerog.folder / "var" / "zerog.db") as store:
            left = [str(row) for table in ("documents", "chunks") for row in rows_of(store, table) if uuid in str(row)]
        assert left == []


def rows_of(store: sqlite3.Connection, table: str) -> list[Any]:
    """Return the keys of a table of the store."""
    columns = [row[1] for row in store.execute(f"PRAGMA table_info({table})") if row[2].upper() == "TEXT"]
    assert columns, f"the store has no table {table} with names"
    return store.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall()


@pytest.mark.requirement("M13", "M17")
def test_any_request_is_a_sign_of_life(zerog: Deployment, agent: Speaker) -> None:
    zerog.submit("noop")
    given = agent.take(5)
    assert given is not None
    end = time.monotonic() + 1.5 * LEASE
    while time.monotonic() < end:
        assert agent.report(given).status_code == 200
        assert view(zerog, agent.id)["state"] == "running"
        time.sleep(LEASE / 6)  # as an agent does that only reports
    agent.end(given)


# What was once wrong


@pytest.mark.requirement("M25")
def test_a_key_gives_one_command_and_no_other(zerog: Deployment, agent: Speaker) -> None:
    key = {"Idempotency-Key": "the-same"}
    path = f"/agents/{agent.id}/commands"
    first = zerog.client.post(path, json={"command": "resume"}, headers=key)
    again = zerog.client.post(path, json={"command": "resume"}, headers=key)
    assert [first.json()["number"], again.json()["number"]] == [1, 1]
    other = zerog.client.post(path, json={"command": "drain"}, headers=key)
    assert code(other) == (422, "idempotency_key_reused")
    assert [one["command"] for one in agent.commands()] == ["resume"]


@pytest.mark.parametrize(
    "body",
    [{"hostname": ""}, {"label": ""}, {"label": "no such"}, {"hostname": None, "label": None}],
)
def test_a_command_to_nobody_in_particular_is_refused(zerog: Deployment, agent: Speaker, body: dict[str, Any]) -> None:
    answer = zerog.client.post("/agents/commands", json={"command": "retire", **body})
    assert answer.status_code == 422
    assert agent.commands() == []


def test_a_turn_of_an_agent_that_never_spoke_is_refused(zerog: Deployment) -> None:
    for body in ({}, {"want": 1}):
        assert code(zerog.client.post("/agents/ghost/turns", json=body)) == (404, "unknown_agent")


def test_a_success_whose_data_have_not_come_whole_is_refused(zerog: Deployment, agent: Speaker) -> None:
    zerog.submit("noop")
    given = agent.take(5)
    assert given is not None
    headers = {"Content-Range": "bytes 0-262143/*"}
    zerog.client.put(f"{given['href']}/data", content=b"x" * 262_144, headers=headers)
    assert code(agent.end(given)) == (409, "conflict")
    headers = {"Content-Range": "bytes 262144-262144/262145"}
    assert zerog.client.put(f"{given['href']}/data", content=b"y", headers=headers).status_code == 204
    assert agent.end(given).status_code == 200


@pytest.mark.parametrize("moment", ["1796169600", 1796169600, "0001-01-01T00:00:00+14:00", "9999-01-01T00:00:00Z"])
def test_what_is_no_time_is_refused_everywhere(zerog: Deployment, agent: Speaker, moment: Any) -> None:
    uuid = zerog.submit("noop")
    given = agent.take(5)
    assert given is not None
    assert patch(zerog, uuid, {"notBefore": moment}).status_code == 422
    assert agent.report(given, events=[{"message": "", "at": moment}]).status_code == 422
    assert tell(zerog, agent.id, "modify", uuid=uuid, notBefore=moment).status_code == 422
    agent.end(given)
