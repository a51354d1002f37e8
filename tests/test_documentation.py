"""The documentation says what the code does: settings, errors, commands, routes, and the user's way in."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
import urllib.request
import venv
from pathlib import Path

import docutils.core
import pytest

from tests.services import ROOT, Process, free_port, wait_until
from zerog import config
from zerog.cli import main
from zerog.job import SETTINGS
from zerog.server.routes import ENDPOINTS
from zerog.views import WHY

README = (ROOT / "README.rst").read_text()


def test_the_readme_is_valid_restructured_text() -> None:
    text = README.replace(".. code-block::", ".. code::")
    docutils.core.publish_doctree(text, settings_overrides={"report_level": 2, "halt_level": 2})


def test_conf_has_every_setting_with_its_default() -> None:
    text = (ROOT / "conf" / "zerog.toml").read_text()
    for setting in config.SETTINGS:
        assert setting.help in text, setting.name
        assert re.search(rf"^#?{setting.name} =", text, re.MULTILINE), setting.name
    written = tomllib.loads(text)
    for setting in config.SETTINGS:
        if setting.name in written:
            assert written[setting.name] == setting.default, setting.name


@pytest.mark.parametrize("name", ["zerog.toml", "couchbase-beanstalkd.toml", "embedded.toml"])
def test_every_profile_is_read(name: str) -> None:
    assert config.load(str(ROOT / "conf" / name), environment={}).service == "zerog"


@pytest.mark.requirement("G19")
def test_the_reference_of_errors_is_what_the_code_has() -> None:
    text = runpy.run_path(str(ROOT / "docs" / "errors.py"))["text"]()
    assert (ROOT / "docs" / "errors.rst").read_text() == text, "run: python docs/errors.py"
    assert "``internal_error`` (500)\n    The request could not be answered because of a defect" in text
    assert "``store_unavailable`` (503)\n    The datastore does not answer" in text, "and not that of a case of it"


def test_every_attribute_and_every_reason_is_documented() -> None:
    text = (ROOT / "docs" / "jobs.rst").read_text()
    for name in SETTINGS:
        assert f"``{name}``" in text, name
    for reason in set(WHY) - {"agent_gone"}:
        assert f"``{reason}``" in text, reason


def test_the_reference_is_what_the_tables_have() -> None:
    text = runpy.run_path(str(ROOT / "docs" / "reference.py"))["text"]()
    assert (ROOT / "docs" / "reference.rst").read_text() == text, "run: python docs/reference.py"
    docutils.core.publish_doctree(text, settings_overrides={"report_level": 2, "halt_level": 2})
    for setting in config.SETTINGS:
        assert f"``{setting.name}``" in text
    for command in main.commands:
        assert f"``zerog {command}" in text


def test_the_readme_names_every_route_and_command() -> None:
    for endpoint in ENDPOINTS:
        if endpoint.url not in ("/style.css", "/live.js", "/icon.svg"):
            part = endpoint.url.rsplit("/", 1)[-1] if "{" not in endpoint.url.rsplit("/", 1)[-1] else endpoint.url
            assert part in README, endpoint.url
    text = README + (ROOT / "CHANGELOG.rst").read_text()
    for command in main.commands:
        assert command in text, command


def test_your_own_code_as_the_readme_shows_it_runs_from_a_built_wheel(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(ROOT)]
    subprocess.run(build, check=True, timeout=240)
    (wheel,) = wheels.glob("zerog-*.whl")
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ZEROG_", "PYTHONPATH"))}
    # Only what is imported needs to be compiled, and that happens then.
    install = [*pip, "--python", str(python), "install", "--no-compile", str(wheel)]
    subprocess.run(install, check=True, timeout=240, env=clean)
    folder = tmp_path / "folder"
    (folder / "mywork").mkdir(parents=True)
    (folder / "mywork" / "__init__.py").touch()
    block = README[README.index(".. code-block:: python") :].split("\n\n", 1)[1].split("\nInstall ZeroG where", 1)[0]
    (folder / "mywork" / "jobs.py").write_text("\n".join(line[4:] for line in block.splitlines()))
    port = free_port()
    program = [
        str(environment / "bin" / "zerog"),
        "up",
        "--applications",
        "mywork",
        "--port",
        str(port),
        "--slots",
        "1",
    ]
    up = Process(program, tmp_path / "up.log", cwd=folder, env=clean)
    try:
        wait_until(lambda: "server listens" in up.log.read_text(), 30, "zerog up")
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/run/resize", b'{"path": "a.png"}', {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            href = answer.headers["Location"]

        def data() -> bytes | None:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{href}/data", timeout=10) as reply:
                return reply.read() if reply.status == 200 else None

        assert json.loads(wait_until(data, 20)) == {"path": "a.png", "width": 640, "tiles": 12}
        assert str(folder / "var" / "zerog.db") in up.log.read_text(), "the start logs where things are, absolute"
    finally:
        status = up.terminate()
    assert status == 0
