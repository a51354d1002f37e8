"""``python -m tests.chaos.peers.systems MODULE submit|ask``: its arguments as JSON from stdin, its answer as JSON."""

from __future__ import annotations

import importlib
import json
import sys


def main(system: str, verb: str) -> None:
    """Call a function of a system's module."""
    module = importlib.import_module(f"tests.chaos.peers.systems.{system}")
    json.dump(getattr(module, verb)(**json.load(sys.stdin)), sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
