"""The keeper of an agent, on machines whose tools are others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services import wait_until
from zerog.agent.keeper import Keeper

#: Says nothing of itself but where it is: it bears a mark or not.
_SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture(params=["xargs and grep -z", "grep without -z", "no xargs"])
def tools(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give the keeper these programs alone."""
    for name in ("grep", "tr", *(["xargs"] if request.param != "no xargs" else [])):
        found = shutil.which(name)
        assert found is not None
        if (name, request.param) == ("grep", "grep without -z"):
            (tmp_path / name).write_text(f'#!/bin/sh\ncase "$1" in *z*) exit 2 ;; esac\nexec {found} "$@"\n')
            (tmp_path / name).chmod(0o755)
        else:
            (tmp_path / name).symlink_to(found)
    monkeypatch.setattr(os, "defpath", str(tmp_path))
    return str(request.param)


@pytest.mark.requirement("R13")
def test_it_ends_the_groups_and_whoever_bears_the_mark_and_nobody_else(tools: str) -> None:
    keeper = Keeper()
    environments = {
        "marked": {**os.environ, **keeper.environment},
        "group": dict(os.environ),
        "removed": dict(os.environ),
        "other": {**os.environ, **{name: value + "0" for name, value in keeper.environment.items()}},
    }
    processes = {
        name: subprocess.Popen(_SLEEP, env=environment, start_new_session=True)
        for name, environment in environments.items()
    }
    try:
        for name in ("group", "removed"):
            keeper.add(processes[name].pid)
        keeper.remove(processes["removed"].pid)
        assert [name for name, process in processes.items() if process.poll() is not None] == []
        keeper.close()
        for name in ("marked", "group"):
            wait_until(lambda name=name: processes[name].poll() is not None, 10, f"the end of {name}")  # type: ignore[misc]
        assert {name: process.poll() for name, process in processes.items()} == {
            "marked": -9, "group": -9, "removed": None, "other": None,
        }  # fmt: skip
    finally:
        for process in processes.values():
            process.kill()
            process.wait(10)
