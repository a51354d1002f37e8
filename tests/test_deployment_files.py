"""The files in ``conf/`` are what they claim to be, as far as that can be seen without a cluster or containers."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import compose_spec
import pytest
import yaml

from tests.services import ROOT, missing
from zerog import config

pytestmark = pytest.mark.requirement("M4")

UNITS = sorted((ROOT / "conf" / "systemd").glob("*.service"))
COMPOSE = ROOT / "conf" / "compose.yaml"


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_units_are_valid(unit: Path, tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        missing("systemd-analyze")
    # What it names must be there to be verified; here it is any program.
    name = unit.name.replace("@", "@1")
    text = unit.read_text().replace("/opt/zerog/bin/zerog", "/bin/true").replace("/usr/bin/beanstalkd", "/bin/true")
    (tmp_path / name).write_text(text)
    done = subprocess.run([str(program), "verify", str(tmp_path / name)], capture_output=True, text=True, timeout=60)
    complaints = [line for line in done.stderr.splitlines() if name in line]
    assert (done.returncode, complaints) == (0, []), done.stderr


def test_the_units_wait_longer_than_what_they_end() -> None:
    drain = config.load(None, {}, {}).drain
    agent = (ROOT / "conf" / "systemd" / "zerog-agent@.service").read_text()
    (patience,) = [int(line.partition("=")[2]) for line in agent.splitlines() if line.startswith("TimeoutStopSec=")]
    assert patience > drain + 15
    assert "KillMode=mixed" in agent, "only the agent gets SIGTERM: it ends its own children"


def test_the_compose_file_is_valid_and_knows_our_settings() -> None:
    text = COMPOSE.read_text()
    merged = yaml.safe_load(text)  # the merge keys of YAML are resolved, as a compose engine does
    compose_spec.PyCompose.from_yaml(yaml.safe_dump(merged, sort_keys=False))
    known = {f"ZEROG_{setting.name.upper()}" for setting in config.SETTINGS} | {"ZEROG_DATASTORE_PASSWORD"}
    for service in merged["services"].values():
        environment = service.get("environment", {})
        assert {name for name in environment if name.startswith("ZEROG_")} <= known
    for name in ("server-1", "server-2", "agent-1", "agent-2"):
        environment = {
            key: str(value).partition(":-")[2].rstrip("}")
            if str(value).startswith("${") and ":-" in str(value)
            else value
            for key, value in merged["services"][name]["environment"].items()
            if key != "ZEROG_DATASTORE_PASSWORD"
        }
        settings = config.load(None, {}, environment)
        assert settings.stats == "memcached://memcached:11211" and settings.queue == "beanstalk://beanstalkd:11300"


@pytest.mark.parametrize("profile", ["zerog.toml", "embedded.toml", "couchbase-beanstalkd.toml"])
def test_the_profiles_are_read(profile: str) -> None:
    assert tomllib.loads((ROOT / "conf" / profile).read_text())
    config.load(str(ROOT / "conf" / profile), {}, {})


@pytest.mark.parametrize("unit", ["zerog-server.service", "zerog-agent@.service"])
@pytest.mark.parametrize("profile", ["embedded.toml", "couchbase-beanstalkd.toml"])
def test_the_units_may_write_where_the_profiles_say(unit: str, profile: str, tmp_path: Path) -> None:
    """The units let nothing but their StateDirectory be written to; the profile lies where they look for it."""
    text = (ROOT / "conf" / "systemd" / unit).read_text()
    lines = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    assert (lines["ProtectSystem"], lines["StateDirectory"]) == ("strict", "zerog")
    environment = dict([lines["Environment"].split("=", 1)])
    settings = config.load(str(ROOT / "conf" / profile), {}, environment)
    places = [settings.path(settings.run_dir)]
    places += [settings.sqlite_path(url) for url in (settings.datastore, settings.queue) if url.startswith("sqlite:")]
    assert all(place.is_relative_to("/var/lib/zerog") for place in places), places


def test_nginx_finds_no_fault_in_its_configuration(tmp_path: Path) -> None:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        missing("nginx")
    whole = tmp_path / "nginx.conf"
    whole.write_text(
        f"pid {tmp_path}/nginx.pid; error_log stderr; events {{}} http {{ access_log off; "
        f"include {ROOT}/conf/nginx.conf; }}\n"
    )
    done = subprocess.run(
        [str(program), "-t", "-c", str(whole), "-p", str(tmp_path)], capture_output=True, text=True, timeout=30,
        env={**os.environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
