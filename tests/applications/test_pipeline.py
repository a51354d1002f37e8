"""The pipeline application: entries, histories, counts, jobs that run elsewhere and ZeroG's own."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deployment import Deployment, answers
from tests.services import ROOT, Beanstalkd, CouchbaseServer, free_port, wait_until

pytestmark = pytest.mark.requirement("G1", "G2", "G3", "G9", "G10", "G17")

APPLICATIONS = "workers.examples,workers.pipeline,tests"


@pytest.fixture(scope="module", params=["sqlite", "couchbase"])
def masters(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, couchbase: CouchbaseServer
) -> Iterator[tuple[Deployment, str]]:
    """Two servers and an agent; the address of the second."""
    folder = tmp_path_factory.mktemp("pipeline")
    queue = Beanstalkd(folder / "beanstalkd").start() if request.param == "couchbase" else None
    if queue is not None:
        made = Deployment(
            folder / "zerog",
            "couchbase",
            "beanstalkd",
            beanstalkd=queue,
            couchbase=couchbase,
            applications=APPLICATIONS,
        )
    else:
        made = Deployment(folder / "zerog", applications=APPLICATIONS)
    port = free_port()
    second = None
    try:
        made.start()
        second = made._start("server", port=str(port))
        wait_until(lambda: answers(port), 20)
        yield made, f"http://127.0.0.1:{port}"
    finally:
        if second is not None:
            second.kill()
        made.close()
        if queue is not None:
            queue.stop()


@pytest.fixture
def zerog(masters: tuple[Deployment, str]) -> Deployment:
    return masters[0]


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A pipeline of this test alone."""
    return f"p{time.time_ns()}"


def write(url: str, pipeline: str, job: str, state: str, message: str | None = None, **headers: str) -> httpx.Response:
    body = {"pipeline": pipeline, "job": job, "state": state, **({"message": message} if message else {})}
    return httpx.post(f"{url}/log", json=body, headers=headers)


def test_an_entry_is_201_for_a_new_job_and_200_for_an_update(masters: tuple[Deployment, str], name: str) -> None:
    urls = (masters[0].url, masters[1])
    first = write(urls[0], name, "extract", "running", "began")
    assert first.status_code == 201
    view = first.json()
    assert set(view) == {"href", "number", "pipeline", "job", "state", "message", "at"}
    assert (view["pipeline"], view["job"], view["state"], view["message"]) == (name, "extract", "running", "began")
    assert first.headers["Location"] == view["href"]
    assert httpx.get(urls[1] + view["href"]).json() == view
    assert write(urls[1], name, "extract", "done").status_code == 200
    assert write(urls[1], name, "load", "running").status_code == 201
    assert write(urls[0], name, "load", "failed", "no space").status_code == 200
    for url in urls:
        shown = httpx.get(f"{url}/pipelines/{name}").json()
        assert (shown["href"], shown["name"], shown["counts"]) == (f"/pipelines/{name}", name, {"done": 1, "failed": 1})
        assert [(one["job"], one["state"]) for one in shown["jobs"]] == [("extract", "done"), ("load", "failed")]
        history = httpx.get(f"{url}/log", params={"pipeline": name}).json()["items"]
        assert [(one["job"], one["state"]) for one in history] == [
            ("extract", "running"), ("extract", "done"), ("load", "running"), ("load", "failed"),
        ]  # fmt: skip
        only = httpx.get(url + shown["jobs"][1]["href"]).json()["items"]
        assert [one["state"] for one in only] == ["running", "failed"]


def test_what_is_answered_is_seen_at_once_at_every_server(masters: tuple[Deployment, str], name: str) -> None:
    urls = (masters[0].url, masters[1])
    for number in range(20):
        write(urls[number % 2], name, "job", f"s{number}")
        assert httpx.get(f"{urls[1 - number % 2]}/pipelines/{name}").json()["counts"] == {f"s{number}": 1}


def test_of_many_that_write_of_a_new_job_at_once_one_gets_201(masters: tuple[Deployment, str], name: str) -> None:
    urls = (masters[0].url, masters[1])
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: write(urls[number % 2], name, "same", "running"), range(16)))
    assert sorted(answer.status_code for answer in answers) == [200] * 15 + [201]
    assert len(httpx.get(f"{urls[0]}/log?pipeline={name}").json()["items"]) == 16


def test_lists_come_in_pages(zerog: Deployment, name: str) -> None:
    for number in range(7):
        write(zerog.url, name, f"job {number}", "done")
    for href, key in ((f"/log?pipeline={name}&limit=3", "items"), (f"/pipelines/{name}?limit=3", "jobs")):
        found: list[str] = []
        following: str | None = href
        while following is not None:
            answer = zerog.client.get(following)
            body = answer.json()
            found += [one["job"] for one in body[key]]
            following = body["next"]
            assert ("next" in answer.links) is (following is not None)
        assert found == [f"job {number}" for number in range(7)]
    listed: list[str] = []
    following = "/pipelines?limit=2"
    while following is not None:
        body = zerog.client.get(following).json()
        listed += [one["name"] for one in body["items"]]
        following = body["next"]
    assert listed.count(name) == 1 and len(set(listed)) == len(listed)


def test_what_is_wrong_is_refused(zerog: Deployment, name: str) -> None:
    for body in (
        {}, {"pipeline": "a b", "job": "x", "state": "y"}, {"pipeline": name, "job": "", "state": "y"},
        {"pipeline": name, "job": "x", "state": "y" * 101}, {"pipeline": name, "job": "x", "state": "y", "more": 1},
    ):  # fmt: skip
        assert zerog.client.post("/log", json=body).status_code == 422, body
    assert zerog.client.get("/log").status_code == 400
    assert zerog.client.get(f"/log?pipeline={name}").status_code == 404
    for path in (f"/pipelines/{name}", "/pipelines/a%20b", f"/pipelines/{name}/log/1"):
        assert zerog.client.get(path).status_code == 404, path
    assert zerog.client.delete("/log").status_code == 405
    page = zerog.client.get("/pipelines", headers={"Accept": "text/html"})
    assert page.headers["content-type"].startswith("text/html")


def test_the_asynchronous_form_is_a_job_that_writes_once(zerog: Deployment, name: str) -> None:
    answer = write(zerog.url, name, "later", "running", Prefer="respond-async")
    assert (answer.status_code, answer.headers["Preference-Applied"]) == (202, "respond-async")
    uuid = answer.headers["Location"].rpartition("/")[2]
    assert zerog.wait(uuid)["state"] == "succeeded"
    assert zerog.client.get(f"/pipelines/{name}").json()["counts"] == {"running": 1}


def test_an_entry_whose_agent_was_killed_is_there_once(tmp_path: Path, name: str) -> None:
    """Killed between what the job did and what the record says of it: the job runs again."""
    with_failpoint = Deployment(tmp_path, applications=APPLICATIONS, slots="1")
    try:
        with_failpoint.start_server()
        agent = with_failpoint.start_agent(failpoint="run.before_record=kill@1")
        answer = write(with_failpoint.url, name, "later", "running", Prefer="respond-async")
        uuid = answer.headers["Location"].rpartition("/")[2]
        assert agent.popen.wait(20) == -signal.SIGKILL
        with_failpoint.agents.clear()
        with_failpoint.start_agent()
        record = with_failpoint.wait(uuid)
        assert (record["state"], record["attempt"]) == ("succeeded", 2)
        items = with_failpoint.client.get(f"/log?pipeline={name}").json()["items"]
        assert [(one["job"], one["state"]) for one in items] == [("later", "running")]
        assert with_failpoint.client.get(f"/pipelines/{name}").json()["counts"] == {"running": 1}
    finally:
        with_failpoint.close()


def test_a_job_of_zerog_in_a_pipeline_shows_what_its_record_says(masters: tuple[Deployment, str], name: str) -> None:
    zerog, other = masters
    uuid = zerog.submit("sleep", {"seconds": 1}, params={"pipeline": name})
    shown = httpx.get(f"{other}/pipelines/{name}").json()
    (job,) = shown["jobs"]
    assert (job["job"], job["href"]) == (uuid, f"/jobs/{uuid}")
    assert job["state"] in ("queued", "running")
    write(other, name, "elsewhere", "running")
    zerog.wait(uuid)
    for url in (zerog.url, other):
        assert httpx.get(f"{url}/pipelines/{name}").json()["counts"] == {"running": 1, "succeeded": 1}
    failing = zerog.submit("raise", {"what": "fail"}, params={"pipeline": name})
    zerog.wait(failing)
    jobs = httpx.get(f"{other}/pipelines/{name}").json()["jobs"]
    assert [(one["job"], one["state"]) for one in jobs] == [
        (uuid, "succeeded"), ("elsewhere", "running"), (failing, "failed"),
    ]  # fmt: skip


def test_a_submit_that_is_refused_leaves_nothing_to_be_seen(zerog: Deployment, name: str) -> None:
    assert zerog.client.post(f"/run/sleep?pipeline={name}", json={"seconds": "x"}).status_code == 422
    assert zerog.client.post("/run/noop?pipeline=a%20b", json={}).status_code == 400
    nobody = "00000000-0000-4000-8000-000000000000"
    assert zerog.client.post(f"/run/noop?pipeline={name}&parent={nobody}", json={}).status_code == 400
    key = {"Idempotency-Key": name}
    first = zerog.client.post(f"/run/noop?pipeline={name}", json={}, headers=key)
    assert zerog.client.post(f"/run/noop?pipeline={name}", json={}, headers=key).json()["uuid"] == first.json()["uuid"]
    assert zerog.client.post(f"/run/noop?pipeline={name}x", json={}, headers=key).status_code == 422
    assert [one["job"] for one in zerog.client.get(f"/pipelines/{name}").json()["jobs"]] == [first.json()["uuid"]]
    assert zerog.client.get(f"/pipelines/{name}x").status_code == 404
    assert {one["job"] for one in zerog.client.get(f"/log?pipeline={name}").json()["items"]} == {first.json()["uuid"]}


def test_a_server_killed_before_the_job_is_stored_leaves_nothing_to_be_seen(tmp_path: Path, name: str) -> None:
    made = Deployment(tmp_path, applications=APPLICATIONS)
    try:
        made.start_server(failpoint="submit.after_append=kill@1")
        with pytest.raises(httpx.HTTPError):
            made.client.post(f"/run/noop?pipeline={name}", json={})
        assert made.server is not None
        made.server.popen.wait(10)
        made.start_server()
        assert made.client.get(f"/pipelines/{name}").status_code == 404
        uuid = made.submit("noop", params={"pipeline": name})
        assert [one["job"] for one in made.client.get(f"/pipelines/{name}").json()["jobs"]] == [uuid]
    finally:
        made.close()


def test_a_job_that_was_removed_stays_as_it_ended_at_every_server(masters: tuple[Deployment, str], name: str) -> None:
    zerog, other = masters
    uuid = zerog.submit("noop", params={"pipeline": name})
    zerog.wait(uuid)
    assert zerog.client.get(f"/pipelines/{name}").json()["counts"] == {"succeeded": 1}
    after = 0
    while after is not None:
        after = zerog.client.post("/jobs:prune", json={"olderThan": 0, "type": "noop", "after": after}).json()["next"]
    assert zerog.client.get(f"/jobs/{uuid}").status_code == 404
    for url in (zerog.url, other):
        assert httpx.get(f"{url}/pipelines/{name}").json()["counts"] == {"succeeded": 1}
    history = zerog.client.get("/log", params={"pipeline": name, "job": uuid}).json()["items"]
    assert [one["state"] for one in history] == ["queued", "succeeded"]


def test_entries_about_a_job_of_zerog_do_not_move_it_before_it_has_ended(
    masters: tuple[Deployment, str], name: str
) -> None:
    zerog, other = masters
    uuid = zerog.submit("sleep", {"seconds": 60}, params={"pipeline": name})
    zerog.wait_for(uuid, state="running")
    assert write(zerog.url, name, uuid, "checked").status_code == 200
    for url in (zerog.url, other):
        assert httpx.get(f"{url}/pipelines/{name}").json()["counts"] == {"running": 1}
    zerog.client.delete(f"/jobs/{uuid}")
    zerog.wait(uuid)
    for url in (zerog.url, other):
        assert httpx.get(f"{url}/pipelines/{name}").json()["counts"] == {"cancelled": 1}
    assert write(zerog.url, name, uuid, "cleaned").status_code == 200
    for url in (other, zerog.url):
        assert httpx.get(f"{url}/pipelines/{name}").json()["counts"] == {"cleaned": 1}


def test_names_that_lead_elsewhere_or_cannot_be_seen_are_refused(zerog: Deployment, name: str) -> None:
    for entry in (
        {"pipeline": "..", "job": "a", "state": "b"},
        {"pipeline": ".", "job": "a", "state": "b"},
        {"pipeline": name, "job": "a\u0000", "state": "b"},
        {"pipeline": name, "job": "a", "state": "b\n"},
        {"pipeline": name, "job": "", "state": "b"},
    ):
        assert zerog.client.post("/log", json=entry).status_code == 422, entry
    assert zerog.client.post("/run/noop?pipeline=..", json={}).status_code == 400
    assert zerog.client.get(f"/pipelines/{name}").status_code == 404


def test_an_entry_under_a_key_is_written_once(masters: tuple[Deployment, str], name: str) -> None:
    zerog, other = masters
    key = {"Idempotency-Key": f"the entry {name}".replace(" ", "-")}
    entry = {"pipeline": name, "job": "extract", "state": "running"}
    answers_ = [httpx.post(f"{url}/log", json=entry, headers=key) for url in (zerog.url, other, zerog.url)]
    assert [one.status_code for one in answers_] == [201] * 3
    assert len({one.text for one in answers_}) == 1
    assert len(zerog.client.get(f"/log?pipeline={name}").json()["items"]) == 1
    reused = zerog.client.post("/log", json={**entry, "state": "done"}, headers=key)
    assert (reused.status_code, reused.json()["code"]) == (422, "idempotency_key_reused")
    assert zerog.client.post("/log", json=entry, headers={"Idempotency-Key": "a b"}).status_code == 400


def test_a_server_that_starts_anew_shows_the_same(masters: tuple[Deployment, str], name: str) -> None:
    zerog, other = masters
    for number in range(30):
        write(zerog.url, name, f"job {number % 7}", ("running", "done")[number % 2])
    before: dict[str, Any] = httpx.get(f"{other}/pipelines/{name}").json()
    zerog.restart_server()
    assert zerog.client.get(f"/pipelines/{name}").json() == before


def test_the_session_in_the_documentation_is_what_happens(tmp_path: Path) -> None:
    """Each command is run as it stands there; three dots in what is shown stand for anything."""
    lines = [line.strip() for line in (ROOT / "docs" / "pipeline.rst").read_text().splitlines()]
    made = Deployment(tmp_path, applications=APPLICATIONS)
    try:
        made.start()
        commands = [(line.removeprefix("$ "), lines[at + 1]) for at, line in enumerate(lines) if line.startswith("$ ")]
        assert len(commands) >= 7
        for command, expected in commands:
            pattern = re.escape(expected).replace(re.escape("..."), ".*")
            here = command.replace("localhost:8888", f"127.0.0.1:{made.port}")
            # What a job writes is there a moment after its 202.
            wait_until(partial(shows, here, pattern), 10, f"{command}: {expected}")
    finally:
        made.close()


def shows(command: str, pattern: str) -> bool:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return re.fullmatch(pattern, done.stdout.strip()) is not None
