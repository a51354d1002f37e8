"""What the comparison needs: an environment of the peers' own in ``.cache/peers``, and redis from Debian."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from pathlib import Path

from tests.services import ROOT

_FOLDER = ROOT / ".cache" / "peers"
_REQUIREMENTS = Path(__file__).with_name("requirements.txt")
#: Where the commands of the peers are.
COMMANDS = _FOLDER / "bin"
PYTHON = COMMANDS / "python"

_VERSIONS = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"


def prepare() -> None:
    """Make the environment, if it is not there or older than its list."""
    mark = _FOLDER / "installed"
    if mark.exists() and mark.stat().st_mtime > _REQUIREMENTS.stat().st_mtime:
        return
    venv.create(_FOLDER, with_pip=True)
    install = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(_REQUIREMENTS)]
    subprocess.run(install, check=True, timeout=600)
    mark.touch()


def version(package: str) -> str:
    """Return the version of a package that the peers run."""
    said = subprocess.run([PYTHON, "-c", _VERSIONS, package], check=True, capture_output=True, timeout=30)
    return str(json.loads(said.stdout)[package])


def redis_server() -> str:
    """Return the path of redis-server; root gets it installed, anybody else is told what to install."""
    found = shutil.which("redis-server")
    if found is None and os.geteuid() == 0:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "redis-server"]
        for arguments in (["apt-get", "update", "-qq"], install):
            subprocess.run(arguments, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=300)
        found = shutil.which("redis-server")
    if found is None:
        raise SystemExit("redis-server is missing: apt install redis-server")
    return found


def redis_version() -> str:
    """Return the version of redis-server."""
    said = subprocess.run([redis_server(), "--version"], check=True, capture_output=True, text=True, timeout=30).stdout
    return said.partition("v=")[2].split()[0]
