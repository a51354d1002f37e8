"""Two releases at once: servers and agents of the last release and of this one over one store and one queue."""

from __future__ import annotations

import random
import subprocess
import sys
import tarfile
import time
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deployment import Deployment
from tests.services import ROOT, Beanstalkd, CouchbaseServer, Process, wait_until

#: The commit of version 0.1.0.
PREVIOUS = "2940a9c68e0c91fb14a8106d0a37d7ec3de05e59"


class Both(Deployment):
    """A deployment of this release, beside which processes of the last one run."""

    def __init__(self, folder: Path, *adapters: Any, **settings: Any) -> None:
        super().__init__(folder / "data", *adapters, **settings)
        self.previous = folder / "previous"
        archive = subprocess.run(["git", "archive", PREVIOUS], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=BytesIO(archive)) as tar:
            tar.extractall(self.previous, filter="data")

    def start_previous(self, command: str, **settings: Any) -> Process:
        """Start a process of the last release over the same store and queue."""
        environment = {**self.environment, **{f"ZEROG_{name.upper()}": str(value) for name, value in settings.items()}}
        environment["PYTHONPATH"] = str(self.previous)
        log = self.folder / f"previous-{command}.log"
        arguments = [sys.executable, "-m", "zerog", command]
        return Process(arguments, log, cwd=self.folder, env=environment)


#: As many as K1 has.
JOBS, KILLS = 500, 60


@pytest.mark.requirement("Z14")
@pytest.mark.parametrize(("store", "queue"), [("sqlite", "sqlite"), ("couchbase", "beanstalkd")])
def test_two_releases_share_a_store_while_agents_are_killed(
    tmp_path: Path, store: str, queue: str, couchbase: CouchbaseServer, beanstalkd: Beanstalkd
) -> None:
    choices = random.Random(11)
    made = Both(tmp_path, store, queue, beanstalkd=beanstalkd, couchbase=couchbase, lease="3", sweep="1")
    old: list[Process] = []
    old_port = made.port + 1
    server: Process | None = None
    old_client = httpx.Client(base_url=f"http://127.0.0.1:{old_port}", timeout=30)
    try:
        # The last release comes first: it has made the file.
        server = made.start_previous("server", port=old_port)
        wait_until(lambda: _ready(old_client), 20, "the server of the last release")
        made.start_server()
        for _ in range(2):
            old.append(made.start_previous("worker"))
            made.start_agent()
        path = tmp_path / "ledger"
        uuids: list[str] = []
        for number in range(JOBS):
            client = made.client if number % 2 else old_client
            parameters = {"path": str(path), "seconds": choices.uniform(0.01, 0.4)}
            answer = client.post("/run/ledger", json=parameters)
            assert answer.status_code == 202
            uuids.append(answer.json()["uuid"])
            if number * KILLS // JOBS < (number + 1) * KILLS // JOBS:
                victims = old if choices.random() < 0.5 else made.agents
                victim = victims.pop(choices.randrange(len(victims)))
                victim.kill()
                if victims is old:
                    old.append(made.start_previous("worker"))
                else:
                    made.start_agent()
            time.sleep(0.05)  # so that the kills fall among running jobs
        records = [made.wait(uuid, 60) for uuid in uuids]
        assert {record["state"] for record in records} == {"succeeded"}
        seen = [old_client.get(f"/jobs/{uuid}").json() for uuid in uuids]
        assert [one["attempt"] for one in seen] == [one["attempt"] for one in records], "both releases say the same"
        for uuid, record in zip(uuids, records, strict=True):
            assert made.client.get(f"/jobs/{uuid}/data").json() == record["attempt"]
        executions = Counter(line.split()[0] for line in path.read_text().splitlines())
        assert all(executions[record["uuid"]] <= record["attempt"] for record in records)
        assert sum(record["counters"]["losses"] for record in records) > 0, "some were interrupted"
        for log in (made.log(), made.log("server"), made.log("previous-worker"), made.log("previous-server")):
            assert "Traceback" not in log, log[-3000:]
    finally:
        old_client.close()
        made.close()
        for process in (*old, *([server] if server else [])):
            process.kill()


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.HTTPError:
        return False
