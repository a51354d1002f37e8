"""The import rows of the design, as data; nothing is imported to check them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services import ROOT

#: Prefix of a module → its row.  The longest prefix that fits decides.
ROWS = {
    "zerog.exceptions": 0, "zerog.clock": 0, "zerog.failpoints": 0,
    "zerog.needs": 1, "zerog.outcome": 1, "zerog.config": 1, "zerog.codec": 1,
    "zerog.record": 2,
    "zerog.registry": 3, "zerog.views": 3, "zerog.leases": 3, "zerog.fleet": 3, "zerog.job": 3, "zerog.parents": 3, "zerog.retry": 3,
    "zerog.datastore": 3, "zerog.queue": 3,
    "zerog.orders": 3, "zerog.notes": 3,
    "zerog.manager": 4, "zerog.statistics": 4, "zerog.tokens": 4, "zerog.topics": 4, "zerog.documents": 4, "zerog.asked": 3, "zerog.consumer": 3, "zerog.own_settings": 3, "zerog.consumers": 4,
    "zerog.master": 5, "zerog.attempts": 5, "zerog.turn": 5, "zerog.recorder": 5, "zerog.entries": 5, "zerog.questions": 5, "zerog.remote": 5,
    "zerog.sweep": 5, "zerog.sweeper": 4, "zerog.chores": 5, "zerog.feed": 5, "zerog.datastore.sqlite": 5, "zerog.datastore.couchbase": 5,
    "zerog.datastore.faulty": 5, "zerog.datastore.memcached": 5, "zerog.queue.sqlite": 5, "zerog.queue.beanstalkd": 5,
    "zerog.server": 6, "zerog.agent": 6,
    "zerog.bootstrap": 7,
    "zerog.cli": 8, "zerog.commands": 8, "zerog.console": 8, "zerog.daemons": 8, "zerog.consuming": 8, "zerog.supervisor": 8, "zerog.doctor": 8, "zerog.chaos": 8, "zerog.__main__": 8,
}  # fmt: skip
#: Modules that stand beside the rows, with what of zerog they may import.
BESIDE = {
    "zerog.client": {"zerog.client.api", "zerog.client.client", "zerog.client.models"},
    "zerog.client.api": {"zerog.exceptions"},
    "zerog.client.models": {"zerog.client.api"},
    "zerog.client.client": {"zerog.client.api", "zerog.client.models", "zerog.exceptions"},
    "zerog": {
        "zerog.client",
        "zerog.consumer",
        "zerog.exceptions",
        "zerog.failpoints",
        "zerog.job",
        "zerog.outcome",
        "zerog.own_settings",
        "zerog.parents",
    },
}
ADAPTERS = ("zerog.datastore.sqlite", "zerog.datastore.couchbase", "zerog.queue.sqlite", "zerog.queue.beanstalkd")
PUBLIC_FOR_WORKERS = ("zerog", "zerog.server")


def modules(top: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / top).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules("zerog"))


def imports(path: Path) -> Iterator[str]:
    """Yield the modules of ours that a file imports, those inside functions too, but not those for types alone."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name == "zerog" or name.startswith("zerog.")}


def row(module: str) -> int | None:
    fitting = [prefix for prefix in ROWS if module == prefix or module.startswith(prefix + ".")]
    return ROWS[max(fitting, key=len)] if fitting else None


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_the_rows(module: str) -> None:
    used = ours(MODULES[module]) - {module}
    if module in BESIDE:
        assert used <= BESIDE[module]
        return
    here = row(module)
    assert here is not None, f"{module} has no row: give it one"
    for other in used - {"zerog"}:
        there = row(other)
        beside = other in BESIDE and (here >= 7 or module == "zerog.remote")
        assert beside or (there is not None and there <= here), f"{module} (row {here}) imports {other} (row {there})"


def test_no_two_modules_import_each_other() -> None:
    graph = {module: ours(path) & MODULES.keys() for module, path in MODULES.items()}

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        if start in seen:
            return False
        seen.add(start)
        return any(one == goal or reaches(one, goal, seen) for one in graph[start])

    # A package's __init__ gathers its own modules, which is no cycle of meaning.
    circles = [
        m
        for m in graph
        if m not in ("zerog", "zerog.server", "zerog.manager") and reaches(m, m, set()) and not _known(m)
    ]
    assert circles == []


def _known(module: str) -> bool:
    """The description of the routes stands in the table of routes, and reads it when it is asked."""
    return module in ("zerog.server.openapi", "zerog.server.routes")


def test_server_and_agent_never_import_each_other() -> None:
    for module, path in MODULES.items():
        other = {"server": "zerog.agent", "agent": "zerog.server"}.get(module.split(".")[1] if "." in module else "")
        if other:
            assert not any(name.startswith(other) for name in ours(path)), module


def test_adapters_are_imported_by_bootstrap_alone() -> None:
    for module, path in MODULES.items():
        if module != "zerog.bootstrap":
            assert not ours(path) & set(ADAPTERS) - {module}, module


def test_workers_use_public_names_only() -> None:
    for module, path in modules("workers"):
        assert ours(path) <= set(PUBLIC_FOR_WORKERS), module


def test_nothing_in_zerog_names_an_application() -> None:
    for module, path in MODULES.items():
        assert not any(name.split(".")[0] == "workers" for name in imports(path)), module


def test_the_client_imports_nothing_but_the_standard_library() -> None:
    import sys

    for module in ("zerog.client", "zerog.exceptions"):
        tops = {name.split(".")[0] for name in imports(MODULES[module])}
        assert tops <= set(sys.stdlib_module_names) | {"zerog"}, module
