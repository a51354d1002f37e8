"""The Python client against running servers; it has nothing but the standard library."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.deployment import Deployment, deployed
from tests.services import ROOT, free_port, wait_until
from zerog import Client
from zerog.client import Job
from zerog.exceptions import (
    BadSetting,
    CyclicParents,
    InvalidParameter,
    InvalidParameters,
    JobCancelled,
    JobFailed,
    NotFinished,
    RateLimited,
    ServerUnreachable,
    UnknownJob,
)

pytestmark = pytest.mark.requirement("M29", "M26")


@pytest.fixture(scope="module")
def zerog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("client")) as made:
        yield made


@pytest.fixture
def client(zerog: Deployment) -> Client:
    return Client(zerog.url, patience=20)


def test_a_job_from_its_submit_to_its_data(client: Client) -> None:
    seen: list[tuple[str, float]] = []
    job = client.run("sleep", seconds=0.5).wait(progress=lambda job: seen.append((job.state, job.completeness)))
    assert (job.state, job.finished, job.succeeded, job.result_code) == ("succeeded", True, True, 200)
    assert seen[-1] == ("succeeded", 1.0) and len(seen) >= 2
    assert job.data()["slept"] >= 0.5
    assert job.job_type == "sleep" and job.parameters == {"seconds": 0.5}
    assert job.counters == {"errors": 0, "crashes": 0, "losses": 0}
    assert client.job(job.uuid) == job and client.job(job.uuid).view["uuid"] == job["uuid"]
    with pytest.raises(AttributeError, match="it has"):
        _ = job.no_such_thing


def test_a_job_that_fails_is_returned_and_its_data_say_why(client: Client) -> None:
    job = client.submit("raise", {"what": "fail"}).wait()
    assert (job.state, job.succeeded, job.result_code, job.message) == ("failed", False, 422, "not possible")
    with pytest.raises(JobFailed) as caught:
        job.data()
    assert (caught.value.status, caught.value.detail) == (409, "not possible")
    again = job.retry({"what": "fail"})
    assert again.retried_from == job
    assert again.retried_from.message == "not possible", "a reference is fetched when it is touched"
    assert again.wait().state == "failed"
    (error,) = list(again.events("error"))
    assert error.message == "not possible"
    assert again.info().errors[0]["message"] == "not possible"


def test_what_is_refused_is_the_error_of_the_server(client: Client) -> None:
    with pytest.raises(InvalidParameters) as caught:
        client.run("sleep", seconds="long")
    error = caught.value
    assert (error.status, error.code, error.errors[0]["pointer"]) == (422, "invalid_parameters", "/seconds")
    with pytest.raises(UnknownJob):
        client.job("00000000-0000-4000-8000-000000000000")


def test_cancel_and_what_is_not_finished(client: Client) -> None:
    job = client.run("sleep", seconds=60)
    with pytest.raises(NotFinished):
        job.data()
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        job.wait(timeout=0.5)
    assert time.monotonic() - begun < 3
    assert job.explain().reason in ("running", "ahead", "no_agent")
    assert job.cancel().wait().state == "cancelled"
    with pytest.raises(JobCancelled):
        job.data()


def test_follow_yields_views_to_the_end(client: Client) -> None:
    views = list(client.run("sleep", seconds=0.3).follow())
    assert views[-1]["state"] == "succeeded" and all(isinstance(view, dict) for view in views)


def test_parents_children_and_collections_resolve(client: Client) -> None:
    parents = [client.run("noop"), client.run("noop")]
    child = client.submit("noop", {}, parents=parents, key="child-of-two").wait()
    assert child.parents == tuple(parents)
    assert [one.state for one in child.parents] == ["succeeded"] * 2
    assert isinstance(child.parents[0], Job)
    assert list(parents[0].children) == [child] and len(parents[0].children) == 1
    assert len(child.relationships.parents) == 2
    assert client.submit("noop", {}, parents=parents, key="child-of-two") == child, "the same key, the same job"
    assert child in list(client.jobs(type="noop", state="succeeded", limit=None))
    assert len(list(client.jobs(limit=2))) == 2
    assert client.type("noop").queue.keys() >= {"ready"}
    assert "noop" in [one.job_type for one in client.types()]
    assert client.status().statistics["store"]["available"]


def test_a_batch_gives_jobs_and_errors(client: Client) -> None:
    first, second, circle = client.batch(
        "noop",
        [{"parameters": {}, "name": "a"}, {"parameters": {}, "parents": ["a"]},
         {"parameters": {}, "name": "c", "parents": ["c"]}],
    )  # fmt: skip
    assert isinstance(circle, CyclicParents) and circle.status == 422
    assert isinstance(first, Job) and isinstance(second, Job)
    assert second.wait().parents == (first,)


def test_data_are_downloaded_whole_or_not_at_all(client: Client, tmp_path: Path) -> None:
    job = client.run("bulk", size=3_000_000).wait()
    path = job.download(tmp_path / "bulk.bin")
    assert path.read_bytes() == job.data()
    assert job.result.size == path.stat().st_size and job.result.media_type == "application/octet-stream"
    with pytest.raises(JobFailed):
        client.submit("raise", {"what": "fail"}).wait().download(tmp_path / "never")
    assert {one.name for one in tmp_path.iterdir()} == {"bulk.bin"}


# Servers that go and come


def test_a_submit_waits_for_a_server_and_happens_once(tmp_path: Path) -> None:
    with deployed(tmp_path) as zerog:
        client = Client(zerog.url)
        assert zerog.server is not None
        job = client.run("sleep", seconds=4)
        zerog.server.kill()
        done: list[Job] = []
        threads = [
            threading.Thread(target=lambda: done.append(job.wait(timeout=60))),
            threading.Thread(target=lambda: done.append(client.submit("noop", {}, key="once").wait(timeout=60))),
        ]
        for thread in threads:
            thread.start()
        time.sleep(1)  # in which there is no server
        zerog.start_server()
        for thread in threads:
            thread.join(60)
        assert [one.state for one in done] == ["succeeded"] * 2
        assert len(list(client.jobs(type="noop"))) == 1


def test_patience_ends(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(ServerUnreachable):
        Client(f"http://127.0.0.1:{free_port()}", patience=1).types()
    assert time.monotonic() - begun < 3


class Stubborn(BaseHTTPRequestHandler):
    """Answers as the test says, then well."""

    answers: list[tuple[int, dict[str, str]]] = []
    keys: list[str | None] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.keys.append(self.headers.get("Idempotency-Key"))
        status, headers = self.answers.pop(0) if self.answers else (202, {})
        if not status:
            self.close_connection = True
            return
        body = json.dumps(
            {"uuid": "u", "href": "/jobs/u", "status": status, "code": "rate_limited", "detail": "x"}
        ).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def stubborn() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stubborn)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Stubborn.keys, Stubborn.answers = [], []
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_what_may_be_answered_soon_is_sent_again_under_one_key(stubborn: str) -> None:
    Stubborn.answers = [(503, {}), (0, {}), (429, {"Retry-After": "1"}), (502, {}), (504, {})]
    begun = time.monotonic()
    client = Client(stubborn, patience=30)
    assert client.run("noop").uuid == "u"
    assert len(Stubborn.keys) == 6 and len(set(Stubborn.keys)) == 1 and Stubborn.keys[0]
    assert time.monotonic() - begun > 1.0, "as long as Retry-After says"
    Stubborn.answers = [(429, {"Retry-After": "60"})]
    with pytest.raises(RateLimited):
        Client(stubborn, patience=2).run("noop")
    Stubborn.keys.clear()
    Stubborn.answers = [(500, {})]
    with pytest.raises(Exception) as caught:
        client.run("noop")
    assert (len(Stubborn.keys), getattr(caught.value, "status", 0)) == (1, 500), "a defect is not tried again"


def test_a_download_that_is_broken_off_goes_on_where_it_was(tmp_path: Path) -> None:
    with deployed(tmp_path / "zerog") as zerog:
        job = Client(zerog.url).run("bulk", size=40_000_000).wait(timeout=60)
        assert zerog.server is not None
        path = tmp_path / "bulk"
        thread = threading.Thread(target=lambda: job.download(path))
        part = tmp_path / "bulk.part"
        zerog.server.signal(signal.SIGCONT)
        thread.start()
        wait_until(lambda: part.exists() and part.stat().st_size > 1_000_000, 20)
        zerog.server.kill()
        zerog.start_server()
        thread.join(60)
        assert path.read_bytes() == job.data()


# Nothing but the standard library


def test_the_client_works_where_nothing_else_is_installed(zerog: Deployment) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from zerog.client import Client
job = Client({zerog.url!r}).run("sleep", seconds=0.1).wait(timeout=30)
assert job.data()["slept"] >= 0.1 and job.parents == ()
foreign = [name for name in sys.modules if name.partition(".")[0] in ("pydantic", "tornado", "ujson", "click", "rich")]
print(job.state, foreign)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=60, cwd="/"
    )
    assert (done.stdout.strip(), done.returncode) == ("succeeded []", 0), done.stderr


def test_the_session_in_the_readme_runs(zerog: Deployment) -> None:
    """As it stands there, but for the address and the folder."""
    text = (ROOT / "README.rst").read_text()
    section = text[text.index("From Python\n-----------") :]
    lines = section[section.index("::\n\n    from zerog import Client") + 4 :].splitlines()
    block = [line[4:] for line in lines[: next(at for at, line in enumerate(lines) if line and line[0] != " ")]]
    program = "\n".join(block).replace("http://127.0.0.1:8888", zerog.url).replace("/usr/share/doc", str(ROOT / "docs"))
    assert 'key="once"' in program and "then.data()" in program
    program = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{program}\nprint(then.parents[0].finished_at)\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=60, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("Z") and "1.0" in done.stdout


def test_what_cannot_be_sent_is_refused_without_saying_a_secret(client: Client) -> None:
    for token in ("zerog_sec\nret", "zerog_sécret"):
        with pytest.raises(BadSetting) as refused:
            Client(client.api.url, token)
        assert "zerog_" not in str(refused.value)
    assert Client(client.api.url, " zerog_x\n").types()  # as a file has it
    for url in ("ftp://127.0.0.1", "127.0.0.1:8888", "http://"):
        with pytest.raises(BadSetting, match="http"):
            Client(url)
    for key in ("", "a b", "a\r\nX: y", "k" * 256):
        with pytest.raises(InvalidParameter):
            client.submit("noop", {}, key=key)
    with pytest.raises(InvalidParameter):
        client.submit("noop", {}, delay="x")  # type: ignore[arg-type]
