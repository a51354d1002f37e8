"""Ingest over HTTP and as processes: what is good is in the archive byte for byte, of what is bad nothing is left."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import random
import re
import resource
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import uuid as uuids
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests import bundles
from tests.applications.test_bundles import mutated, walked
from tests.deployment import Deployment, over_pair
from tests.documented import run_session
from tests.services import ROOT, wait_until
from workers.ingest import asking, metadata
from workers.ingest.services import Refused, Rules
from zerog import NotFound
from zerog.chaos.site import until

PAIRS = [("sqlite", "sqlite"), ("couchbase", "beanstalkd")]
EVERY_DAY = PAIRS[1:]
TAR = {"Content-Type": "application/x-tar"}
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
KEYS = ["job_id", "state", "task", "task_percent", "updated", "created", "exception"]


@contextmanager
def ingesting(
    folder: Path, request: pytest.FixtureRequest, pair: tuple[str, str], **settings: Any
) -> Iterator[Deployment]:
    sources = folder / "sources"
    sources.mkdir(parents=True, exist_ok=True)
    wanted = {"ingest_volume": folder / "volume", "ingest_sources": sources, **settings}
    with over_pair(folder, request, pair, "workers.ingest", **wanted) as made:
        yield made


@pytest.fixture(scope="module", params=EVERY_DAY, ids="-".join)
def zerog(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with ingesting(tmp_path_factory.mktemp("ingest"), request, request.param) as made:
        made.start_agent()
        yield made


def send(zerog: Deployment, data: Any, path: str = "/ingest", **headers: str) -> dict[str, Any]:
    answer = zerog.client.post(path, content=data, headers={**TAR, **headers})
    assert answer.status_code == 200, answer.text
    state: dict[str, Any] = answer.json()
    return state


def state_of(zerog: Deployment, job_id: int) -> dict[str, Any]:
    answer = zerog.client.get(f"/get_state?job_id={job_id}")
    assert answer.status_code == 200, answer.text
    state: dict[str, Any] = answer.json()
    assert list(state) == KEYS and TIME.fullmatch(state["updated"]) and TIME.fullmatch(state["created"])
    return state


def over(state: dict[str, Any]) -> bool:
    return state["state"] == "FAILED" or (state["task"], state["task_percent"]) == ("ingest metadata", "100.0")


def wait_for(zerog: Deployment, what: Callable[[], Any], text: str, seconds: float = 30.0) -> Any:
    try:
        return until(what, seconds, text)
    except TimeoutError as error:
        pytest.fail(f"{error}\nserver:\n{zerog.log('server')[-3000:]}\nagent:\n{zerog.log()[-3000:]}")


def ended(zerog: Deployment, job_id: int, seconds: float = 30.0) -> dict[str, Any]:
    wait_for(zerog, lambda: over(state_of(zerog, job_id)), f"the end of {job_id}", seconds)
    return state_of(zerog, job_id)


def wait_for_attempt(zerog: Deployment, job_id: int, attempt: int) -> None:
    wait_for(zerog, lambda: job_of(zerog, job_id)["attempt"] >= attempt, f"attempt {attempt} of {job_id}")


def job_of(zerog: Deployment, job_id: int) -> dict[str, Any]:
    return next(one for one in zerog.client.get("/jobs?limit=1000").json()["items"] if one["number"] == job_id)


def volume(zerog: Deployment) -> Path:
    return zerog.folder / "volume"


def archived(zerog: Deployment, job_id: int) -> dict[str, bytes]:
    folder = volume(zerog) / "archive" / str(job_id)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def left(zerog: Deployment, *folders: str) -> list[str]:
    return sorted(path.name for name in folders for path in (volume(zerog) / name).iterdir())


def failed(zerog: Deployment, job_id: int, task: str, word: str) -> dict[str, Any]:
    """Check that an ingest ends as a failure is shown, and leaves nothing but its bundle."""
    state = ended(zerog, job_id)
    assert (state["state"], state["task"], state["task_percent"]) == ("FAILED", task, "0.0"), state
    assert word in state["exception"], state
    assert not (volume(zerog) / "archive" / str(job_id)).exists()
    wait_for(zerog, lambda: left(zerog, "work") == [], "nothing on the way")
    return state


def command(zerog: Deployment, *arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from workers.ingest.commands import entry; entry()", *arguments],
        env={**zerog.environment, "ZEROG_SERVER": zerog.url}, cwd=zerog.folder, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


# What is good


@pytest.mark.requirement("I5", "I6", "I10", "Z2")
@pytest.mark.parametrize("path", ["/ingest", "/upload"])
def test_a_bundle_is_ingested_and_every_answer_is_as_documented(zerog: Deployment, path: str) -> None:
    first = send(zerog, bundles.GOOD, path)
    assert list(first) == KEYS
    assert {name: first[name] for name in ("state", "task", "task_percent", "exception")} == {
        "state": "OK", "task": "UPLOADING", "task_percent": "0.0", "exception": "",
    }  # fmt: skip
    assert (
        isinstance(first["job_id"], int) and TIME.fullmatch(first["updated"]) and first["updated"] == first["created"]
    )
    last = ended(zerog, first["job_id"])
    assert (last["state"], last["exception"], last["created"]) == ("OK", "", first["created"])
    assert archived(zerog, first["job_id"]) == bundles.FILES
    job = job_of(zerog, first["job_id"])
    assert (job["jobType"], job["state"]) == ("ingest", "succeeded")
    manifest = zerog.client.get(f"/jobs/{job['uuid']}/data").json()
    assert manifest["job_id"] == first["job_id"]
    shown = {one["path"]: one for one in manifest["files"]}
    assert set(shown) == set(bundles.FILES) and len({one["_id"] for one in manifest["files"]}) == 3
    for name, data in bundles.FILES.items():
        wanted = {"path": name, "size": len(data), "hashsum": hashlib.sha1(data).hexdigest(), "hashtype": "sha1"}
        assert {key: value for key, value in shown[name].items() if key != "_id"} == wanted
    wait_for(zerog, lambda: left(zerog, "spool", "work") == [], "the bundle to go")


@pytest.mark.requirement("I6", "I10")
def test_the_tasks_come_in_their_order(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The job stops for a while before each word: what is shown meanwhile are the tasks, in order."""
    with ingesting(tmp_path, request, PAIRS[0]) as zerog:
        data = bundles.bundle({f"{n}": bytes(40 * 1024 * 1024) for n in range(4)})
        job_id = send(zerog, data)["job_id"]
        assert state_of(zerog, job_id)["task"] == "UPLOADING"
        zerog.start_agent()
        seen: list[tuple[str, float]] = []
        while True:
            state = state_of(zerog, job_id)
            assert (state["state"], state["exception"]) == ("OK", "")
            assert re.fullmatch(r"\d{1,3}\.\d", state["task_percent"])
            now = (state["task"], float(state["task_percent"]))
            if not seen or seen[-1] != now:
                seen.append(now)
            if over(state):
                break
        order = ["UPLOADING", "open tar", "load metadata", "Policy Validation", "ingest files", "ingest metadata"]
        places = [order.index(task) for task, _ in seen]
        assert places == sorted(places) and seen[-1] == ("ingest metadata", 100.0)
        assert {"UPLOADING", "ingest files"} <= {task for task, _ in seen}


def real_files() -> dict[str, Path]:
    library = Path(sysconfig.get_path("stdlib"))
    found = {
        path.relative_to(library).as_posix(): path
        for path in sorted(library.rglob("*"))
        if path.is_file()
        and not path.is_symlink()
        and "__pycache__" not in path.parts
        and "site-packages" not in path.parts
    }
    assert len(found) > 1000
    return found


@pytest.mark.requirement("I7", "I1", "I2", "I3", "I4")
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_real_bundle_of_many_files_and_300_mb(
    request: pytest.FixtureRequest, tmp_path: Path, pair: tuple[str, str]
) -> None:
    """The Python library, filled up: byte for byte in the archive; the server's memory and its other answers meanwhile."""
    tree = tmp_path / "tree"
    files = real_files()
    tree.mkdir()
    for name, path in files.items():
        target = tree / "library" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    chance = random.Random(5)
    for number in range(10):
        (tree / f"generated-{number}.bin").write_bytes(chance.randbytes(30 * 1024 * 1024))
    wanted = {path.relative_to(tree).as_posix(): path for path in tree.rglob("*") if path.is_file()}
    assert len(wanted) > 1000 and sum(path.stat().st_size for path in wanted.values()) > 300 * 1000 * 1000
    with ingesting(tmp_path, request, pair) as zerog:
        zerog.start_agent()
        send(zerog, bundles.GOOD)  # what is loaded with the first one is no growth
        assert zerog.server is not None
        server = psutil.Process(zerog.server.pid)
        before, most, delays, stop = server.memory_info().rss, 0, [], threading.Event()

        def look() -> None:
            nonlocal most
            with httpx.Client(base_url=zerog.url) as client:
                while not stop.wait(0.01):
                    most = max(most, server.memory_info().rss)
                    begun = time.monotonic()
                    assert client.get("/healthz").status_code == 200
                    delays.append(time.monotonic() - begun)

        looking = threading.Thread(target=look)
        looking.start()
        try:
            out = command(
                zerog, "bundle", str(tree), "--submitter", "me", "--project", "p", "--instrument", "i", "--key", "a=b",
                "--wait", "--json",
            )  # fmt: skip
        finally:
            stop.set()
            looking.join()
        state = json.loads(out)
        assert (state["state"], state["task"], state["task_percent"]) == ("OK", "ingest metadata", "100.0")
        folder = volume(zerog) / "archive" / str(state["job_id"])
        found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        assert set(found) == set(wanted)
        for name, path in wanted.items():
            assert path.read_bytes() == found[name].read_bytes(), name
        delays.sort()
        print(f"{pair}: growth {(most - before) / 2**20:.1f} MiB; others: median {1000 * delays[len(delays) // 2]:.1f} ms, "
              f"p99 {1000 * delays[int(len(delays) * 0.99)]:.1f} ms, most {1000 * delays[-1]:.1f} ms of {len(delays)}")  # fmt: skip
        assert most - before < 64 * 1024**2
        assert delays[len(delays) // 2] < 0.05, "the figures to the point are the benchmarks'"


# What is bad


@pytest.mark.requirement("I11")
@pytest.mark.parametrize("what", sorted(bundles.BAD_TARS))
def test_a_bad_tar_fails_where_it_is_opened(zerog: Deployment, what: str) -> None:
    data, word = bundles.BAD_TARS[what]
    failed(zerog, send(zerog, data)["job_id"], "open tar", word)


@pytest.mark.requirement("I11")
@pytest.mark.parametrize("what", sorted(bundles.BAD_METADATA)[:: 1 if os.environ.get("TESTS_FULL") else 4])
def test_bad_metadata_fail_where_they_are_loaded(zerog: Deployment, what: str) -> None:
    data, word = bundles.BAD_METADATA[what]
    failed(zerog, send(zerog, bundles.bundle({}, data))["job_id"], "load metadata", word)


@pytest.mark.requirement("I11")
def test_a_bundle_without_metadata_fails_where_they_are_loaded(zerog: Deployment) -> None:
    data = bundles.tar([bundles.member("data/a", b"a")])
    failed(zerog, send(zerog, data)["job_id"], "load metadata", "no metadata.txt")


@pytest.mark.requirement("I11")
@pytest.mark.parametrize("what", sorted(bundles.BAD_FILES))
def test_files_that_are_not_as_listed_fail_where_they_are_ingested(zerog: Deployment, what: str) -> None:
    data, word = bundles.BAD_FILES[what]
    failed(zerog, send(zerog, data)["job_id"], "ingest files", word)


@pytest.mark.requirement("I11", "G18")
def test_bundles_that_are_mutated_or_cut_short_end_with_a_reason(zerog: Deployment) -> None:
    """Over HTTP: never a 5xx, nothing outside the archive, nothing left."""
    chance, outside = random.Random(7), snapshot(zerog.folder)
    sent = [mutated(chance) for _ in range(200 if os.environ.get("TESTS_FULL") else 60)]
    data = bundles.GOOD.rstrip(b"\0")
    data += bytes(-len(data) % 512 + 1024)
    cut = {send(zerog, data[:size])["job_id"] for size in range(0, len(data), 512)}
    changed = {send(zerog, one)["job_id"]: one for one in sent}
    for number in (*cut, *changed):
        state = ended(zerog, number, 60)
        if state["state"] == "OK":  # what was changed says nothing: the time, or the name of the user
            found = {f"data/{path}": content for path, content in archived(zerog, number).items()}
            assert number in changed and {**found, "metadata.txt": found} == {
                **walked(changed[number]),
                "metadata.txt": found,
            }
            continue
        assert state["exception"] and state["task"] in ("open tar", "load metadata", "ingest files"), state
        assert not (volume(zerog) / "archive" / str(number)).exists()
    wait_for(zerog, lambda: left(zerog, "work") == [], "nothing on the way")
    assert snapshot(zerog.folder) == outside


def snapshot(folder: Path) -> set[str]:
    """Return what there is beside the volume and what the services keep."""
    return {path.name for path in folder.iterdir()} | {path.name for path in folder.parent.iterdir()}


@pytest.mark.requirement("I5", "G18")
@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Content-Type": "application/json"}, 415, "unsupported_media_type"),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415, "unsupported_media_type"),
        ({"Content-Type": "application/gzip"}, 415, "unsupported_media_type"),
        ({"Content-Encoding": "gzip"}, 415, "unsupported_media_type"),
        ({"Idempotency-Key": "ä".encode()}, 400, "invalid_parameter"),
    ],
)  # fmt: skip
def test_what_is_no_bundle_is_refused_before_it_is_read(
    zerog: Deployment, headers: dict[str, Any], status: int, code: str
) -> None:
    before = left(zerog, "spool")
    answer = zerog.client.post("/ingest", content=bundles.GOOD, headers={**TAR, **headers})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    if "Content-Type" in headers:
        assert "Content-Type: application/x-tar" in answer.json()["message"]
    assert left(zerog, "spool") == before


@pytest.mark.requirement("I10", "G18")
@pytest.mark.parametrize("query", ["", "?job_id=", "?job_id=x", "?job_id=0", "?job_id=-1", "?job_id=1.5", "?job_id=1&job_id=2",
                                   "?job_id=99999999999999999999", "?id=1"])  # fmt: skip
def test_a_bad_number_is_400(zerog: Deployment, query: str) -> None:
    assert zerog.client.get(f"/get_state{query}").status_code == 400


@pytest.mark.requirement("I10", "G18")
def test_an_unknown_number_is_404(zerog: Deployment) -> None:
    answer = zerog.client.get("/get_state?job_id=99999999")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_job")


# Uploads


def begin_upload(zerog: Deployment, size: int) -> socket.socket:
    """Send the head of an upload and some of its bytes."""
    connection = socket.create_connection(("127.0.0.1", zerog.port))
    head = (
        f"POST /ingest HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/x-tar\r\nContent-Length: {size}\r\n\r\n"
    )
    connection.sendall(head.encode())
    return connection


@pytest.mark.requirement("I7")
def test_an_upload_that_is_broken_off_leaves_nothing(zerog: Deployment) -> None:
    jobs = len(zerog.client.get("/jobs?limit=1000").json()["items"])
    before = left(zerog, "spool")
    connection = begin_upload(zerog, 10_000_000)
    connection.sendall(bytes(3_000_000))
    wait_for(zerog, lambda: any(name.endswith(".part") for name in left(zerog, "spool")), "the upload")
    connection.close()
    wait_for(zerog, lambda: left(zerog, "spool") == before, "nothing of it")
    assert len(zerog.client.get("/jobs?limit=1000").json()["items"]) == jobs


@pytest.mark.requirement("I7")
def test_a_slow_upload_may_take_its_time_and_only_a_gap_ends_it(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with ingesting(tmp_path, request, PAIRS[0], ingest_upload_idle="1s", ingest_user_header="X-Who") as zerog:
        zerog.start_agent()
        connection = begin_upload(zerog, len(bundles.GOOD))
        step = len(bundles.GOOD) // 24
        for start in range(0, len(bundles.GOOD), step):
            connection.sendall(bundles.GOOD[start : start + step])
            time.sleep(0.1)  # slower than a body of JSON may be, on purpose
        answer = connection.recv(65536).decode()
        connection.close()
        assert answer.startswith("HTTP/1.1 200"), answer
        job_id = json.loads(answer.partition("\r\n\r\n")[2])["job_id"]
        assert ended(zerog, job_id)["state"] == "OK"
        silent = begin_upload(zerog, 1000)
        silent.sendall(b"x")
        silent.settimeout(10)
        begun = time.monotonic()
        assert silent.recv(1000) == b"", "the connection is closed"
        assert 0.9 < time.monotonic() - begun < 5
        silent.close()
        wait_for(zerog, lambda: left(zerog, "spool") == [], "nothing of it")


@pytest.mark.requirement("I7")
def test_what_a_killed_server_was_receiving_is_removed_by_the_next_one(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    with ingesting(tmp_path, request, PAIRS[0]) as zerog:
        connection = begin_upload(zerog, 10_000_000)
        connection.sendall(bytes(3_000_000))
        wait_for(zerog, lambda: left(zerog, "spool") != [], "the upload")
        zerog.restart_server()
        connection.close()
        assert left(zerog, "spool") == []


@pytest.mark.requirement("I7", "G18")
def test_a_full_volume_is_507_and_leaves_nothing(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The server may write files of a megabyte: what is larger does not fit, as on a disk that is full."""
    with ingesting(tmp_path, request, EVERY_DAY[0]) as zerog:
        assert zerog.server is not None
        resource.prlimit(zerog.server.pid, resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
        answer = zerog.client.post("/ingest", content=bytes(8_000_000), headers=TAR)
        assert (answer.status_code, answer.json()["code"]) == (507, "volume_full")
        wait_for(zerog, lambda: left(zerog, "spool") == [], "nothing of it")
        assert zerog.client.get("/jobs").json()["items"] == []
        zerog.start_agent()
        assert ended(zerog, send(zerog, bundles.GOOD)["job_id"])["state"] == "OK"


def test_the_same_bundle_with_the_same_key_is_ingested_once(zerog: Deployment) -> None:
    key = uuids.uuid4().hex
    first = send(zerog, bundles.GOOD, **{"Idempotency-Key": key})
    again = zerog.client.post("/ingest", content=bundles.GOOD, headers={**TAR, "Idempotency-Key": key})
    assert again.json()["job_id"] == first["job_id"] and again.headers["Idempotency-Replayed"] == "true"
    ended(zerog, first["job_id"])
    late = zerog.client.post("/upload", content=bundles.GOOD, headers={**TAR, "Idempotency-Key": key})
    assert (late.status_code, late.json()["job_id"], late.json()["task_percent"]) == (200, first["job_id"], "100.0")
    for content, user in ((bundles.GOOD[:-512], {}), (bundles.GOOD, {"X-Http-Authed-User": "another"})):
        headers = {**TAR, "Idempotency-Key": key, **user}
        other = zerog.client.post("/ingest", content=content, headers=headers)
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused"), user
    wait_for(zerog, lambda: not any(name.endswith(".part") for name in left(zerog, "spool")), "nothing of them")


# By hand


@pytest.mark.requirement("I12", "I13", "I14")
def test_the_command_of_the_document_works_literally_and_a_late_worker_cannot_undo_it(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The job has put its files into the archive, and goes on when the command was given."""
    late = tmp_path / "late"
    with ingesting(tmp_path, request, EVERY_DAY[0], grace="30s") as zerog:
        zerog.start_agent(failpoint=f"own.ingest.after_commit=until:{late}")
        job_id = send(zerog, bundles.GOOD)["job_id"]
        wait_for(zerog, lambda: archived(zerog, job_id) == bundles.FILES, "the files in the archive")
        script = (
            f"IngestCMD job --job-id {job_id} --state FAILED --task 'ingest files' --task-percent 0.0 "
            "--exception 'Failed by adminstrator'"
        )
        done = subprocess.run(
            ["bash", "-c", script], env={**zerog.environment, "PATH": f"{ROOT}/bin:{os.environ['PATH']}"},
            cwd=zerog.folder, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

        def by_hand() -> bool:
            state = state_of(zerog, job_id)
            return [state[key] for key in ("state", "task", "task_percent", "exception")] == [
                "FAILED", "ingest files", "0.0", "Failed by adminstrator",
            ]  # fmt: skip

        assert by_hand() and json.loads(done.stdout)["state"] == "FAILED"
        assert job_of(zerog, job_id)["state"] == "running"
        late.touch()
        wait_for(zerog, lambda: job_of(zerog, job_id)["state"] == "cancelled", "the job to be cancelled")
        wait_for(zerog, lambda: not (volume(zerog) / "archive" / str(job_id)).exists(), "the archive to be empty")
        assert by_hand() and left(zerog, "work") == []


@pytest.mark.requirement("I13", "I14")
def test_a_state_whose_command_died_before_it_cancelled_the_job_ends_the_job_all_the_same(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    late = tmp_path / "late"
    by_hand = {"state": "OK", "task": "open tar", "task_percent": "1.0", "exception": "by hand"}
    with ingesting(tmp_path, request, PAIRS[0]) as zerog, zerog.documents("workers.ingest") as documents:
        zerog.start_agent(failpoint=f"own.ingest.after_commit=until:{late}")
        job_id = send(zerog, bundles.GOOD)["job_id"]
        wait_for(zerog, lambda: archived(zerog, job_id) == bundles.FILES, "the files in the archive")
        documents.insert(f"state:{job_of(zerog, job_id)['uuid']}", {**by_hand, "updated": "2026-12-01T00:00:00.000Z"})
        late.touch()
        wait_for(zerog, lambda: job_of(zerog, job_id)["state"] == "failed", "the end of the job")
        info = zerog.info(job_of(zerog, job_id)["uuid"])
        assert [one["message"] for one in info["errors"]] == ["its state was set by hand"]
        wait_for(zerog, lambda: not (volume(zerog) / "archive" / str(job_id)).exists(), "the archive to be empty")
        assert {key: state_of(zerog, job_id)[key] for key in by_hand} == by_hand


@pytest.mark.requirement("I7", "I10")
def test_metadata_stay_when_the_job_was_pruned_and_its_key_is_used_again(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The same key makes the same UUID; the archive and the metadata go by the number."""
    with ingesting(tmp_path, request, PAIRS[0]) as zerog, zerog.documents("workers.ingest") as documents:
        zerog.start_agent()
        key = {"Idempotency-Key": "again"}
        first = send(zerog, bundles.GOOD, **key)["job_id"]
        assert ended(zerog, first)["state"] == "OK"
        uuid = job_of(zerog, first)["uuid"]
        kept = [documents.get(f"metadata:{first}{more}")[0] for more in ("", ":0")]
        assert kept[0] == {"pieces": 1, "complete": True}

        def pruned() -> bool:
            answer = zerog.client.post("/jobs:prune", json={"olderThan": 0})
            return bool(answer.json()["pruned"])

        wait_for(zerog, pruned, "the job to go")
        for gone in (f"task:{uuid}", f"state:{uuid}"):
            with pytest.raises(NotFound):
                documents.get(gone)
        bad, word = bundles.BAD_FILES["listed and missing"]
        other = send(zerog, bad, **key)["job_id"]
        failed(zerog, other, "ingest files", word)
        assert job_of(zerog, other)["uuid"] == uuid and other != first
        wait_for(zerog, pruned, "the other one to go, and what tidies up behind it before")
        assert [documents.get(f"metadata:{first}{more}")[0] for more in ("", ":0")] == kept
        assert archived(zerog, first) == bundles.FILES


@pytest.mark.requirement("I13", "I15")
def test_rules_that_cannot_be_read_are_said_at_the_start_and_by_check_and_allow_nothing(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text('[{"user": "eve", "projct": "p", "allow": true}]')
    why = f"the rules of the policy cannot be read: {rules}: /0/projct: Extra inputs are not permitted"
    with ingesting(tmp_path, request, PAIRS[0], ingest_policy=rules) as zerog:
        assert zerog.log("server").count(f"every ingest fails if agents find the same: {why}") == 1
        assert why in command(zerog, "check", status=1)
        zerog.start_agent()
        rules.write_text('[{"allow": "yes"}]')
        job_id = send(zerog, bundles.GOOD)["job_id"]
        failed(zerog, job_id, "Policy Validation", f"{rules}: /0/allow: Input should be a valid boolean")
        rules.unlink()
        assert f"{rules}: No such file or directory" in command(zerog, "check", status=1)


@pytest.mark.requirement("I12", "I13")
@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (("job", "--job-id", "999999", "--state", "OK", "--task", "open tar", "--task-percent", "1"), 1, "no job 999999"),
        (("job", "--job-id", "1", "--state", "BAD", "--task", "open tar", "--task-percent", "1"), 2, "BAD"),
        (("job", "--job-id", "1", "--state", "OK", "--task", "resting", "--task-percent", "1"), 2, "resting"),
        (("job", "--job-id", "1", "--state", "OK", "--task", "open tar", "--task-percent", "101"), 2, "0 to 100"),
        (("job", "--job-id", "x", "--state", "OK", "--task", "open tar", "--task-percent", "1"), 2, "x"),
        (("job",), 2, "--job-id"),
        (("retry", "--job-id", "999999"), 1, "no job 999999"),
        (("nonsense",), 2, "nonsense"),
    ],
)  # fmt: skip
def test_commands_by_hand_that_cannot_be(zerog: Deployment, arguments: tuple[str, ...], status: int, word: str) -> None:
    assert word in command(zerog, *arguments, status=status)


@pytest.mark.requirement("I12")
def test_a_failed_ingest_is_tried_again_from_the_bundle_that_was_kept(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps([{"user": "eve", "allow": False}, {"project": "project-1", "allow": False}]))
    with ingesting(tmp_path, request, EVERY_DAY[0], ingest_policy=rules) as zerog:
        zerog.start_agent()
        job_id = send(zerog, bundles.GOOD)["job_id"]
        failed(zerog, job_id, "Policy Validation", "do not allow root")
        assert len(left(zerog, "spool")) == 1
        rules.write_text(json.dumps([{"user": "eve", "allow": False}, {"project": "project-1", "allow": True}]))
        made = json.loads(command(zerog, "retry", "--job-id", str(job_id)))
        assert made["job_id"] != job_id and made["state"] == "OK"
        assert ended(zerog, made["job_id"])["state"] == "OK"
        assert state_of(zerog, job_id) == state_of(zerog, made["job_id"]), "the old one answers for its successor"
        assert archived(zerog, made["job_id"]) == bundles.FILES and not archived(zerog, job_id)
        assert f"as job {made['job_id']}" in command(zerog, "retry", "--job-id", str(job_id), status=1)
        by_hand = ("--state", "OK", "--task", "open tar", "--task-percent", "1")
        assert f"as job {made['job_id']}" in command(zerog, "job", "--job-id", str(job_id), *by_hand, status=1)
        assert "succeeded" in command(zerog, "retry", "--job-id", str(made["job_id"]), status=1)
        record = zerog.client.get(f"/jobs/{job_of(zerog, made['job_id'])['uuid']}").json()
        assert record["retriedFrom"]["href"] == f"/jobs/{job_of(zerog, job_id)['uuid']}"
        wait_for(zerog, lambda: left(zerog, "spool") == [], "the bundle to go")
        refused = send(zerog, bundles.GOOD, **{"X-Http-Authed-User": "eve"})["job_id"]
        failed(zerog, refused, "Policy Validation", "do not allow eve")


@pytest.mark.requirement("I12", "I15")
def test_check_says_what_can_be_reached(zerog: Deployment) -> None:
    good = command(zerog, "check")
    for word in ("versions", "datastore: it answers", "queue: it answers", "can be written", "archive: local"):
        assert word in good
    broken = json.loads(
        subprocess.run(
            [sys.executable, "-m", "zerog", "ingest", "check", "--json"], cwd=zerog.folder, capture_output=True, timeout=60,
            env={**zerog.environment, "ZEROG_INGEST_IDS": "http://127.0.0.1:1/", "ZEROG_INGEST_VOLUME": "/proc/nothing"},
            check=False,
        ).stdout
    )  # fmt: skip
    levels = {one["what"]: one["level"] for one in broken["findings"]}
    assert (levels["ids"], levels["volume"], levels["archive"]) == ("broken", "broken", "ok")


# Who is killed where


POINTS = {
    "server": ["own.ingest.before_spool@1", "own.ingest.after_spool@1", "submit.after_append@1", "submit.after_insert@1"],
    "worker": ["run.after_claim@1", "run.before_record@1", "run.after_data@1", "child.mid@2", "own.ingest.before_commit@1",
               "own.ingest.after_commit@1", "own.ingest.after_metadata@1"],
}  # fmt: skip


#: Every third one every day, all with TESTS_FULL.
EVERY_POINT = POINTS if os.environ.get("TESTS_FULL") else {who: points[::3] for who, points in POINTS.items()}


@pytest.mark.requirement("I7", "I11")
@pytest.mark.parametrize("who", sorted(POINTS))
def test_whoever_is_killed_wherever_a_bundle_is_ingested_once(
    request: pytest.FixtureRequest, tmp_path: Path, who: str
) -> None:
    """A child that comes past a point of ingest dies there, as often as the type allows but once; servers and agents
    die once and are started again."""
    with ingesting(tmp_path, request, EVERY_DAY[0], lease="1s", sweep="500ms") as zerog:
        agent = zerog.start_agent()
        for point in EVERY_POINT[who]:
            name, _, hit = point.partition("@")
            if who == "server":
                zerog.restart_server(failpoint=f"{name}=kill@{hit}")
            else:
                agent.kill()
                agent = zerog.start_agent(failpoint=f"{name}=kill@{hit}")
            key = uuids.uuid4().hex

            def sent(key: str = key) -> dict[str, Any] | None:
                assert zerog.server is not None
                if zerog.server.popen.poll() is not None:
                    zerog.start_server()
                try:
                    answer = zerog.client.post("/ingest", content=bundles.GOOD, headers={**TAR, "Idempotency-Key": key})
                except httpx.HTTPError:
                    return None
                return answer.json() if answer.status_code == 200 else None

            job_id = wait_for(zerog, sent, f"an answer after {point}")["job_id"]

            def done(job_id: int = job_id) -> bool:
                nonlocal agent
                if agent.popen.poll() is not None:
                    agent = zerog.start_agent()
                return over(state_of(zerog, job_id))

            if name.startswith("own.ingest") and who == "worker":
                wait_for_attempt(zerog, job_id, 2)
                agent.kill()  # the next one has no such point
            wait_for(zerog, done, f"the end after {point}")
            assert state_of(zerog, job_id)["state"] == "OK", (point, state_of(zerog, job_id))
            assert archived(zerog, job_id) == bundles.FILES, point
        wait_for(zerog, lambda: left(zerog, "spool", "work") == [], "nothing left")
        assert len(left(zerog, "archive")) == len(EVERY_POINT[who])


# Services


class Services(http.server.ThreadingHTTPServer):
    """Policy, archive, metadata and ids over HTTP, which fail as they are told."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Service)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[int, bytes] = {}
        self.moved: dict[int, str] = {}
        self.metadata: list[Any] = []
        self.asked: list[tuple[str, str]] = []
        self.users: list[str | None] = []
        #: Path, or method and whole path → how many requests still fail.
        self.failing: dict[str, int] = {}
        self.refuses: str | None = None
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()


class _Service(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Services

    def _do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        place = "/" + self.path.strip("/").split("/")[0].split("?")[0]
        self.server.asked.append((self.command, self.path))
        for key in (place, f"{self.command} {self.path}"):
            if self.server.failing.get(key, 0):
                self.server.failing[key] -= 1
                self._answer(500, {"message": "as it was asked for"})
                return
        match place, self.command:
            case "/ids", _:
                self._answer(200, {"startIndex": 1000})
            case "/policy", "POST":
                self.server.users.append(self.headers.get("X-Http-Authed-User"))
                json.loads(body)
                refused = self.server.refuses
                self._answer(*((200, {"status": "success"}) if refused is None else (412, {"message": refused})))
            case "/metadata", "PUT":
                self.server.metadata.append(json.loads(body))
                self._answer(200, {})
            case "/archive", "PUT":
                self.server.files[int(self.path.rpartition("/")[2])] = body
                self._answer(200, {})
            case "/archive", "PATCH":
                self.server.moved[int(self.path.rpartition("/")[2])] = json.loads(body)["path"]
                self._answer(200, {})
            case "/archive", "DELETE":
                self.server.files.pop(int(self.path.rpartition("/")[2]), None)
                self._answer(200, {})
            case _:
                self._answer(404, {})

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = _do

    def _answer(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def services() -> Iterator[Services]:
    made = Services()
    yield made
    made.close()


def over_http(services: Services) -> dict[str, str]:
    return {f"ingest_{name}": f"{services.url}/{name}" for name in ("policy", "archive", "metadata", "ids")}


@pytest.mark.requirement("I11")
def test_services_over_http_are_asked_and_tried_again(
    request: pytest.FixtureRequest, tmp_path: Path, services: Services
) -> None:
    with ingesting(tmp_path, request, PAIRS[0], **over_http(services)) as zerog:
        zerog.start_agent()
        services.failing = {"/ids": 2, "/policy": 2, "/archive": 2, "/metadata": 2}
        job_id = send(zerog, bundles.GOOD, **{"X-Http-Authed-User": "dave"})["job_id"]
        assert ended(zerog, job_id)["state"] == "OK"
        manifest = zerog.client.get(f"/jobs/{job_of(zerog, job_id)['uuid']}/data").json()
        ids = {one["_id"]: one["path"] for one in manifest["files"]}
        assert {id: bundles.FILES[path] for id, path in ids.items()} == services.files and min(ids) == 1000
        assert services.users == ["dave"]
        (metadata,) = services.metadata
        assert {"destinationTable": "Transactions._id", "value": job_id} in metadata
        assert {one["_id"] for one in metadata if one["destinationTable"] == "Files"} == set(ids)
        assert ("GET", "/ids?range=3&mode=file") in services.asked


@pytest.mark.requirement("I11")
@pytest.mark.parametrize(
    ("place", "task"),
    [("/policy", "Policy Validation"), ("/ids", "ingest files"), ("PUT /archive/1002", "ingest files"),
     ("/metadata", "ingest metadata")],
)  # fmt: skip
def test_each_task_can_fail_and_nothing_stays(
    request: pytest.FixtureRequest, tmp_path: Path, services: Services, place: str, task: str
) -> None:
    """The last service of three that stays away ends the ingest; with the local archive and with one over HTTP."""
    settings = over_http(services)
    if place == "/metadata":
        del settings["ingest_archive"]
    with ingesting(tmp_path, request, PAIRS[0], **settings) as zerog:
        zerog.start_agent()
        services.failing = {place: 10_000}
        job_id = send(zerog, bundles.GOOD)["job_id"]
        wait_for(zerog, lambda: job_of(zerog, job_id)["attempt"] >= 2, "a second attempt")
        between = state_of(zerog, job_id)
        assert (between["state"], between["exception"]) == ("OK", "")
        state = ended(zerog, job_id, 60)
        failed(zerog, job_id, task, "as it was asked for")
        assert services.files == {} and "Traceback" in state["exception"]
        if place.startswith("PUT"):
            for id in (1000, 1001):  # what each of the three attempts had put was taken back
                methods = [method for method, path in services.asked if path == f"/archive/{id}"]
                assert methods[:6] == ["PUT", "DELETE"] * 3
                assert set(methods[6:]) <= {"DELETE"}, "whoever tidies up comes once more"


@pytest.mark.requirement("I11")
def test_what_the_policy_says_is_what_is_shown(
    request: pytest.FixtureRequest, tmp_path: Path, services: Services
) -> None:
    with ingesting(tmp_path, request, PAIRS[0], **over_http(services)) as zerog:
        zerog.start_agent()
        services.refuses = "no such instrument"
        job_id = send(zerog, bundles.GOOD)["job_id"]
        assert failed(zerog, job_id, "Policy Validation", "no such instrument")["exception"] == "no such instrument"
        assert services.files == {} and services.metadata == []


@pytest.mark.requirement("I11")
@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize(
    ("fault", "why"), [("drips", "its answer took more than"), ("short", "IncompleteRead"), ("large", "larger than")]
)
def test_an_answer_that_does_not_come_whole_and_in_time_is_none(
    monkeypatch: pytest.MonkeyPatch, status: int, fault: str, why: str
) -> None:
    """A byte now and then keeps nobody waiting for ever; what is cut off is not taken for the whole, nor an error's."""
    monkeypatch.setattr(asking, "_LONGEST", 0.2)
    monkeypatch.setattr(asking, "_ANSWER", 1000)
    asked = 0

    def answer() -> None:
        nonlocal asked
        for _ in range(3):
            connection, _ = listener.accept()
            with connection:
                asked += 1
                connection.recv(65536)
                connection.sendall(f"HTTP/1.1 {status} So\r\nContent-Length: 5000\r\n\r\n{{".encode())
                with suppress(OSError):
                    for _ in range(100 if fault == "drips" else 0):
                        connection.sendall(b" ")
                        time.sleep(0.02)
                    if fault == "large":
                        connection.sendall(b" " * 4999)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(asking.ServiceError, match=why):
            asking.asked("GET", f"http://127.0.0.1:{listener.getsockname()[1]}/")
        thread.join(10)
    assert asked == 3


@pytest.mark.requirement("I11")
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[{"user": null, "allow": true}]', "/0/user: Input should be a valid string"),
        ('[{"allow": false, "allow": true}]', "an object has a member twice"),
        ('[{"project": true, "allow": true}]', "/0/project: Value error, must be a text or a whole number"),
        ('[{"a\\u001bb": 1, "allow": true}]', "/0/a\\x1bb: Extra inputs are not permitted"),
        ("[" * 100_000, "maximum recursion depth"), ("", "Expecting value"), ("{}", "valid list"),
        ('[{"allow": 1}]', "/0/allow: Input should be a valid boolean"), ("\ufeff[]", "BOM"),
    ],
)  # fmt: skip
def test_rules_that_are_none_are_refused_with_a_reason(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "rules.json"
    path.write_text(text)
    with pytest.raises(asking.ServiceError) as caught:
        Rules(path).read()
    assert str(path) in str(caught.value) and why in str(caught.value)


@pytest.mark.requirement("I11")
def test_rules_in_what_is_no_file_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b" " * (16 * 1024 * 1024) + b"[]")
    for name, why in (("fifo", "no regular file"), (".", "directory"), ("none", "No such"), ("a\0b", "null"),
                      ("large", "more than 16,777,216 bytes")):  # fmt: skip
        with pytest.raises(asking.ServiceError, match=why):
            Rules(tmp_path / name).read()
    with pytest.raises(asking.ServiceError, match="no regular file"):
        Rules(Path("/dev/zero")).read()


@pytest.mark.requirement("I11")
def test_the_first_rule_that_fits_decides_and_what_it_does_not_name_fits_everything(tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    path.write_text(
        '[{"project": 7, "allow": true}, {"user": "eve", "project": "p", "allow": true}, {"user": "eve", "allow": false}]'
    )
    rules = Rules(path)
    for user, project, may in (("eve", "7", True), ("eve", "p", True), ("eve", "q", False), ("bob", "q", True)):
        found = metadata.Metadata([], {}, {"Transactions.project": project})
        if may:
            rules.check(found, user)
        else:
            with pytest.raises(Refused, match="do not allow eve to ingest for the project q"):
                rules.check(found, user)


# Moves


def source(zerog: Deployment, name: str, data: bytes) -> dict[str, Any]:
    path = zerog.folder / "sources" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return bundles.entry(f"moved/{name}", data, source=str(path))


def move(zerog: Deployment, *entries: dict[str, Any]) -> int:
    answer = zerog.client.post("/move", json=[*bundles.HEAD, *entries])
    assert answer.status_code == 200, answer.text
    assert (list(answer.json()), answer.json()["task"]) == (KEYS, "UPLOADING")
    return int(answer.json()["job_id"])


@pytest.mark.requirement("I8", "I9")
def test_files_are_moved_into_the_archive(zerog: Deployment) -> None:
    name = uuids.uuid4().hex
    entries = [source(zerog, f"{name}/a.bin", b"a" * 3_000_000), source(zerog, f"{name}/b", b"")]
    job_id = move(zerog, *entries)
    assert ended(zerog, job_id)["state"] == "OK"
    assert archived(zerog, job_id) == {f"moved/{name}/a.bin": b"a" * 3_000_000, f"moved/{name}/b": b""}
    assert not any(Path(one["source"]).exists() for one in entries)
    manifest = zerog.client.get(f"/jobs/{job_of(zerog, job_id)['uuid']}/data").json()
    assert {one["path"] for one in manifest["files"]} == set(archived(zerog, job_id))


@pytest.mark.requirement("I8", "I11")
@pytest.mark.parametrize(
    ("fault", "task", "word"),
    [
        ("size", "move files", "bytes"), ("hash", "move files", "sha1 is"), ("missing", "move files", "cannot be read"),
        ("outside", "move files", "not inside"), ("link", "move files", "a link on the way"),
        ("linked folder", "move files", "a link on the way"), ("link out", "move files", "not inside"),
        ("other name", "move files", "other names"), ("FIFO", "move files", "no regular file"),
        ("relative", "move files", "absolute"), ("upwards", "move files", "not inside"),
        ("no source", "load metadata", "needs source"), ("no list", "load metadata", "no list"),
    ],
)  # fmt: skip
def test_a_move_that_fails_leaves_every_source(zerog: Deployment, fault: str, task: str, word: str) -> None:
    name = uuids.uuid4().hex
    folder = zerog.folder / "sources" / name
    good, bad = source(zerog, f"{name}/a", b"aa"), source(zerog, f"{name}/b", b"bb")
    path = Path(bad["source"])
    match fault:
        case "size":
            bad["size"] = 3
        case "hash":
            path.write_bytes(b"cc")
        case "missing":
            path.unlink()
        case "outside":
            bad["source"] = str(zerog.folder / "server.log")
        case "link":
            (folder / "l").symlink_to(path)
            bad["source"] = str(folder / "l")
        case "linked folder":
            (folder / "f").symlink_to(folder)
            bad["source"] = str(folder / "f" / "b")
        case "link out":
            (folder / "l").symlink_to("/etc/hostname")
            bad["source"] = str(folder / "l")
        case "other name":
            os.link(path, folder / "c")
        case "FIFO":
            path.unlink()
            os.mkfifo(path)
        case "relative":
            bad["source"] = "sources/b"
        case "upwards":
            bad["source"] = str(folder / ".." / ".." / "server.log")
        case "no source":
            del bad["source"]
    before = sorted(one.name for one in folder.iterdir())
    if fault == "no list":
        answer = zerog.client.post("/move", json={"a": 1})
        assert answer.status_code == 200
        job_id = answer.json()["job_id"]
    else:
        job_id = move(zerog, good, bad)
    failed(zerog, job_id, task, word)
    assert sorted(one.name for one in folder.iterdir()) == before
    assert Path(good["source"]).read_bytes() == b"aa"


@pytest.mark.requirement("I8", "G18")
@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"", {}, 400, "empty_body"), (b"[", {}, 400, "invalid_json"), (b"\xff", {}, 400, "invalid_json"),
        (b"[" + b" " * 400_000 + b"}", {}, 400, "invalid_json"),
        (b"[]", {"Content-Type": "application/x-tar"}, 415, "unsupported_media_type"),
        (b"[]" + b" " * (64 * 1024 * 1024), {}, 413, "body_too_large"),
    ],
    ids=["empty", "cut", "no UTF-8", "large", "tar", "too large"],
)  # fmt: skip
def test_a_move_of_what_is_no_json_is_refused_and_leaves_nothing(
    zerog: Deployment, body: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    before = left(zerog, "spool")
    answer = zerog.client.post("/move", content=body, headers={"Content-Type": "application/json", **headers})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    wait_for(zerog, lambda: left(zerog, "spool") == before, "nothing of it")


@pytest.mark.requirement("I8")
def test_without_sources_nothing_may_be_moved(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with ingesting(tmp_path, request, PAIRS[0], ingest_sources="") as zerog:
        answer = zerog.client.post("/move", json=bundles.HEAD)
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


@pytest.mark.requirement("I8", "I11")
@pytest.mark.parametrize("point", ["own.ingest.before_unlink", "own.ingest.after_commit", "own.ingest.after_metadata"])
def test_a_move_whose_process_dies_loses_no_file(request: pytest.FixtureRequest, tmp_path: Path, point: str) -> None:
    with ingesting(tmp_path, request, PAIRS[0], lease="1s", sweep="500ms") as zerog:
        agent = zerog.start_agent(failpoint=f"{point}=kill@1")
        entry = source(zerog, "a", b"precious")
        job_id = move(zerog, entry)
        wait_for(zerog, lambda: job_of(zerog, job_id)["attempt"] >= 2, "a second attempt")
        agent.kill()
        assert Path(entry["source"]).exists() or archived(zerog, job_id), "it is in one of the two at any time"
        zerog.start_agent()
        assert ended(zerog, job_id)["state"] == "OK"
        assert archived(zerog, job_id) == {"moved/a": b"precious"} and not Path(entry["source"]).exists()


# The command that makes bundles


@pytest.mark.requirement("I2", "I3", "I4")
def test_a_folder_becomes_a_bundle(zerog: Deployment, tmp_path: Path) -> None:
    folder, files = tmp_path / "folder", {"a b/ü.txt": b"x", "z" * 200: b"long", "empty": b""}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    arguments = ("bundle", str(folder), "--submitter", "s", "--project", "p", "--instrument", "i", "--key", "k=v=w")
    output = tmp_path / "out.tar"
    said = json.loads(command(zerog, *arguments, "--output", str(output), "--json"))
    assert said == {"output": str(output), "files": 3}
    listing = subprocess.run(["tar", "-tf", str(output)], capture_output=True, text=True, check=True).stdout
    assert sorted(listing.splitlines())[-1] == "metadata.txt"
    state = send(zerog, output.read_bytes())
    assert ended(zerog, state["job_id"])["state"] == "OK" and archived(zerog, state["job_id"]) == files
    sent = json.loads(command(zerog, *arguments, "--wait"))
    assert (sent["state"], sent["task_percent"]) == ("OK", "100.0") and archived(zerog, sent["job_id"]) == files


@pytest.mark.parametrize("fault", ["link", "broken link", "linked folder", "FIFO", "nothing", "case", "no folder"])
def test_a_folder_that_cannot_be_a_bundle_is_refused_by_name(zerog: Deployment, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    word = "bad"
    match fault:
        case "link":
            (folder / "bad").symlink_to("/etc/hostname")
        case "broken link":
            (folder / "bad").symlink_to("nowhere")
        case "linked folder":
            (folder / "bad").symlink_to("/etc")
        case "FIFO":
            os.mkfifo(folder / "bad")
        case "case":
            (folder / "bad").write_bytes(b"")
            (folder / "BAD").write_bytes(b"")
        case "nothing":
            word = "no files"
        case "no folder":
            folder, word = folder / "bad", "bad"
    output = tmp_path / "out.tar"
    said = command(
        zerog, "bundle", str(folder), "--submitter", "s", "--project", "p", "--instrument", "i", "--output", str(output),
        status=2,
    )  # fmt: skip
    assert word in said and not output.exists()


def test_a_bundle_is_written_into_no_device(zerog: Deployment, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    device = tmp_path / "device"
    os.mkfifo(device)
    said = command(
        zerog, "bundle", str(tmp_path), "--submitter", "s", "--project", "p", "--instrument", "i", "--output", str(device),
        status=2,
    )  # fmt: skip
    assert "is no regular file" in said and device.is_fifo()


@pytest.mark.requirement("I8", "I11")
def test_a_source_that_is_replaced_after_it_was_copied_stays(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with ingesting(tmp_path, request, PAIRS[0]) as zerog:
        zerog.start_agent(failpoint="own.ingest.before_unlink=pause:2")
        entry = source(zerog, "a", b"old")
        job_id = move(zerog, entry)
        wait_for(zerog, lambda: archived(zerog, job_id) == {"moved/a": b"old"}, "the copy")
        path = Path(entry["source"])
        (path.parent / "new").write_bytes(b"new and not in the archive")
        (path.parent / "new").replace(path)
        assert ended(zerog, job_id)["state"] == "OK"
        assert path.read_bytes() == b"new and not in the archive"


def test_a_bundle_that_is_refused_or_fails_is_exit_status_1(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_bytes(bytes(5_000_000))
    rules = tmp_path / "rules.json"
    rules.write_text('[{"allow": false}]')
    arguments = ("bundle", str(tmp_path / "folder"), "--submitter", "s", "--project", "p", "--instrument", "i")
    with ingesting(tmp_path, request, PAIRS[0], ingest_policy=rules) as zerog:
        zerog.start_agent()
        said = command(zerog, *arguments, "--wait", status=1)
        assert json.loads(said)["task"] == "Policy Validation"
        assert json.loads(command(zerog, *arguments))["state"] == "OK", "accepted, that is all it waits for"
        zerog.environment["ZEROG_TOKEN"] = "wrong"
        done = subprocess.run(
            [sys.executable, "-m", "zerog", "token", "create", "x", "--role", "admin"], env=zerog.environment,
            cwd=zerog.folder, capture_output=True, timeout=60, check=True,
        )  # fmt: skip
        assert done.returncode == 0
        wait_until(lambda: zerog.client.get("/jobs").status_code == 401, 10, "tokens to count")
        assert "token" in command(zerog, *arguments, status=1)


# Documentation


@pytest.mark.requirement("I12", "I15")
def test_the_session_in_the_documentation_is_what_happens(tmp_path: Path) -> None:
    made = Deployment(tmp_path, applications="workers.ingest")
    try:
        made.start()
        (tmp_path / "mydata").mkdir()
        (tmp_path / "mydata" / "results.csv").write_text("1,2\n")
        environment = {**made.environment, "ZEROG_SERVER": made.url, "PATH": f"{ROOT}/bin:{os.environ['PATH']}"}
        assert run_session("ingest.rst", tmp_path, {"localhost:8888": f"127.0.0.1:{made.port}"}, environment) >= 7
    finally:
        made.close()
