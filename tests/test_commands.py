"""The commands as processes: what they print, and their exit statuses."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deployment import Deployment, deployed
from tests.services import ROOT, Process, free_port, wait_until

UNKNOWN = "00000000-0000-0000-0000-000000000000"


@pytest.fixture(scope="module")
def zerog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("commands"), slots="4") as made:
        yield made


def call(zerog: Deployment, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command against the deployment."""
    return subprocess.run(
        [sys.executable, "-m", "zerog", *arguments],
        env={**zerog.environment, "ZEROG_SERVER": zerog.url, **environment},
        cwd=zerog.folder, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def as_json(zerog: Deployment, *arguments: str) -> Any:
    done = call(zerog, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_run_prints_the_uuid_and_with_wait_the_data(zerog: Deployment) -> None:
    done = call(zerog, "run", "sleep", "seconds=0.1")
    assert done.returncode == 0
    assert zerog.wait(done.stdout.strip())["state"] == "succeeded"
    done = call(
        zerog, "run", "sleep", "seconds=0", "--wait"
    )  # what it measures of a real sleep differs by a millisecond
    assert (done.returncode, json.loads(done.stdout)) == (0, {"slept": 0.0})
    assert "succeeded 100%" in done.stderr


def test_run_with_json_prints_one_view_a_line_and_the_last_is_terminal(zerog: Deployment) -> None:
    done = call(zerog, "run", "sleep", "seconds=1.2", "--wait", "--json")
    views = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert views[-1]["state"] == "succeeded"
    assert len(views) >= 2
    assert {view["uuid"] for view in views} == {views[0]["uuid"]}


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("run", "broken", "message=gone wrong", "--wait"), 1, "failed (500)"),
        (("run", "sleep", "seconds=-1"), 2, "/seconds"),
        (("run", "sleep", "secnods=1"), 2, "did you mean 'seconds'"),
        (("run", "sleep", "seconds"), 2, "is not NAME=VALUE"),
        (("run", "sleep", "seconds=1", "seconds=2"), 2, "is given twice"),
        (("run", "slep"), 4, "no job type"),
        (("rnu",), 2, "Did you mean 'run'?"),
        (("job", "show", UNKNOWN), 4, "there is no job"),
        (("jobs", "--limit", "-1"), 2, "limit"),
        (("jobs", "--state", "gone"), 2, "state"),
    ],
)
def test_what_is_refused_has_its_exit_status_and_says_why(
    zerog: Deployment, arguments: tuple[str, ...], status: int, text: str
) -> None:
    done = call(zerog, *arguments)
    assert done.returncode == status, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_server_the_status_is_four(zerog: Deployment) -> None:
    done = call(zerog, "jobs", ZEROG_SERVER=f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 4
    assert "Traceback" not in done.stderr


def test_a_cancelled_job_ends_run_with_three(zerog: Deployment) -> None:
    arguments = [sys.executable, "-m", "zerog", "run", "sleep", "seconds=60", "--wait", "--json"]
    environment = {**zerog.environment, "ZEROG_SERVER": zerog.url}
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        uuid = json.loads(process.stdout.readline())["uuid"]
        assert call(zerog, "job", "cancel", uuid).stdout.strip() in ("cancelled", "cancelling")
        assert process.wait(20) == 3
    done = call(zerog, "job", "data", uuid)
    assert (done.returncode, done.stdout) == (3, "")


def test_ctrl_c_ends_the_command_and_not_the_job(zerog: Deployment) -> None:
    arguments = [sys.executable, "-m", "zerog", "run", "sleep", "seconds=60", "--wait"]
    environment = {**zerog.environment, "ZEROG_SERVER": zerog.url}
    process = Process(arguments, zerog.folder / "ctrl-c.log", env=environment, cwd=zerog.folder)
    wait_until(lambda: "running" in process.log.read_text(), 20)
    process.signal(signal.SIGINT)
    assert process.popen.wait(10) == 130
    uuid = process.log.read_text().rsplit(" ", 1)[-1].strip()
    assert zerog.job(uuid)["state"] == "running"
    assert zerog.client.delete(f"/jobs/{uuid}").status_code == 202


def test_a_terminal_sees_a_progress_bar(zerog: Deployment) -> None:
    ours, theirs = pty.openpty()
    environment = {**zerog.environment, "ZEROG_SERVER": zerog.url, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-m", "zerog", "run", "sleep", "seconds=0.5", "--wait"],
        env=environment, stdout=subprocess.DEVNULL, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    assert process.wait(30) == 0
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed and all is read
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert "━".encode() in shown
    assert b"100%" in shown


def test_every_view_is_there_as_text_and_as_json(zerog: Deployment) -> None:
    uuid = zerog.submit("sleep", {"seconds": 0.1})
    zerog.wait(uuid)
    assert as_json(zerog, "job", "show", uuid)["state"] == "succeeded"
    assert as_json(zerog, "job", "info", uuid)["resultCode"] == 200
    assert uuid in [one["uuid"] for one in as_json(zerog, "jobs", "--type", "sleep", "--state", "succeeded")]
    assert "sleep" in [one["jobType"] for one in as_json(zerog, "types")]
    assert as_json(zerog, "types", "sleep")["schema"]["properties"]["seconds"]
    assert {"ready", "reserved", "delayed", "buried"} == set(as_json(zerog, "queue")[0]["queue"])
    target = zerog.folder / "data.json"
    assert as_json(zerog, "job", "data", uuid, "-o", str(target)) == {
        "file": str(target),
        "size": target.stat().st_size,
    }
    for arguments in (
        ("job", "show", uuid),
        ("job", "info", uuid),
        ("jobs",),
        ("types",),
        ("types", "sleep"),
        ("queue",),
    ):
        done = call(zerog, *arguments)
        assert done.returncode == 0, done.stderr
        assert "sleep" in done.stdout


def test_what_a_job_said_cannot_drive_a_terminal(zerog: Deployment) -> None:
    """Row 62 of the bad inputs: C0 and C1 are stripped but for line ends and tabs."""
    escape = "\x1b]0;owned\x07\x1b[31mred\x9b31m\x00 tab\tend"
    uuid = zerog.submit("speak", {"text": escape})
    zerog.wait(uuid)
    failed = call(zerog, "run", "broken", f"message={escape.replace(chr(0), '')}", "--wait")
    texts = [failed.stderr]
    for arguments in (("job", "events", uuid), ("job", "info", uuid), ("job", "show", uuid), ("jobs",)):
        texts.append(call(zerog, *arguments).stdout)
    assert "red31m" in texts[1]
    assert "tab\tend" in texts[1]
    for text in texts:
        assert not [c for c in text if c not in "\n\t" and (ord(c) < 32 or 127 <= ord(c) < 160)]


def test_the_doctor_finds_what_is_unsafe_and_what_is_broken(zerog: Deployment, tmp_path: Path) -> None:
    done = call(zerog, "doctor", "--json")
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["findings"]
    broken = call(zerog, "doctor", ZEROG_QUEUE=f"beanstalk://127.0.0.1:{free_port()}", ZEROG_DEADLINE="1s")
    assert broken.returncode == 1
    assert "broken" in broken.stdout
    refused = call(zerog, "server", "--lease", "soon")
    assert refused.returncode == 1
    assert "--lease" in refused.stderr


def test_the_quick_start_runs_a_job_and_leaves_nothing_running() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ZEROG_")}
    done = subprocess.run([ROOT / "bin" / "quickstart"], env=clean, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "What to type next" in done.stdout
    assert "the manifest is in var/inventory.json" in done.stdout
    assert json.loads((ROOT / "var" / "inventory.json").read_text())["files"] > 1000
    log = (ROOT / "var" / "quickstart.log").read_text()
    assert log.rstrip().splitlines()[-1].endswith(("stopped", "stops")), log[-500:]


def test_commands_of_applications_are_there_and_one_that_is_broken_says_so(zerog: Deployment, tmp_path: Path) -> None:
    listed = call(zerog, "--help").stdout
    assert "processing" in listed and "ingest" in listed
    misspelt = call(zerog, "procesing")
    assert misspelt.returncode == 2 and "'processing'" in misspelt.stderr
    installed = tmp_path / "broken-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[zerog.commands]\nbroken = nowhere.at_all:main\nnone = json:dumps\n")
    path = os.pathsep.join([zerog.environment["PYTHONPATH"], str(tmp_path)])
    for name, said in (("broken", "No module named 'nowhere'"), ("none", "it is no click command")):
        done = call(zerog, name, PYTHONPATH=path)
        assert done.returncode == 1 and f"the command {name} cannot be loaded: " in done.stderr and said in done.stderr
        assert "Traceback" not in done.stderr
