"""``zerog chaos --server``: scenarios over a deployment that somebody else has started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deployment import deployed

#: Without names those scenarios run that injure nothing but agents.
FULL = bool(os.environ.get("TESTS_FULL"))
NAMES, FAULTS = ([], "5") if FULL else (["K2"], "2")


@pytest.mark.requirement("Z14")
def test_the_users_own_deployment_is_injured_only_in_agents_of_the_run(tmp_path: Path) -> None:
    """The deployment's own server and agent live on, and nothing else comes into its list of jobs."""
    with deployed(tmp_path, applications="zerog.chaos", lease="3", sweep="3") as own:
        arguments = ["chaos", *NAMES, "--server", own.url, "--json", "--jobs", "30", "--faults", FAULTS, "--seed", "7"]
        done = subprocess.run(
            [sys.executable, "-m", "zerog", *arguments, "--lease", "3", "--sweep", "3"],
            cwd=tmp_path, env=own.environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode in (0, 1), done.stderr
        reports = json.loads(done.stdout)
        assert [report["scenario"] for report in reports] == (NAMES or ["K1", "K2", "P1"])
        assert all(report["findings"] == [] for report in reports)
        assert all(report["faults"] == int(FAULTS) and report["queue"] == own.url for report in reports)
        assert own.agents[0].popen.poll() is None and own.server is not None and own.server.popen.poll() is None
        listed = own.client.get("/jobs?limit=1000").json()["items"]
        assert len(listed) == sum(report["acknowledged"] for report in reports) + 1, "and the one that kills its child"
