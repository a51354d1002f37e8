"""Runs the sessions that stand in the documentation: each command as it is written there, in one shell after the other."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from tests.services import ROOT, wait_until


def sessions(document: str) -> list[tuple[str, str]]:
    """Return the commands of a document (lines that begin with ``$``) with what is shown beneath each, if anything is."""
    lines = [line.strip() for line in (ROOT / "docs" / document).read_text().splitlines()]
    shown = [*lines[1:], ""]
    return [
        (line.removeprefix("$ "), "" if following.startswith("$ ") else following)
        for line, following in zip(lines, shown, strict=True)
        if line.startswith("$ ")
    ]


def run_session(document: str, folder: Path, replaced: Mapping[str, str], environment: Mapping[str, str]) -> int:
    """Run the commands of a document, each until it shows what stands there; return how many there were.

    Three dots in what is shown stand for anything.  ``replaced`` are texts in the commands, such as the port.  What one
    command exports the next one has.
    """
    commands = sessions(document)
    state = folder / "session.sh"
    state.touch()
    for command, expected in commands:
        for text, stands_for in replaced.items():
            command = command.replace(text, stands_for)
        pattern = re.escape(expected).replace(re.escape("..."), ".*")
        script = f"set -a; . {state}; {command}\nstatus=$?; export -p > {state}; exit $status"
        wait_until(partial(_shows, script, pattern, folder, environment), 30, f"{command}: {expected}")
    return len(commands)


def _shows(script: str, pattern: str, folder: Path, environment: Mapping[str, str]) -> bool:
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return re.fullmatch(pattern, done.stdout.strip()) is not None
