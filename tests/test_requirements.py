"""Every requirement that is due carries a test."""

from __future__ import annotations

import re

from tests.services import ROOT

DUE = {
    *(f"Z{n}" for n in range(1, 19)),
    *(f"G{n}" for n in range(1, 22)),
    *(f"M{n}" for n in range(1, 32)),
    *(f"I{n}" for n in range(1, 16)),
    *(f"S{n}" for n in range(1, 19)),
}


def test_every_requirement_that_is_due_is_proven_by_a_test() -> None:
    proven: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for marks in re.findall(r"mark\.requirement\(([^)]*)\)", path.read_text()):
            proven |= set(re.findall(r'"([A-Z]\d+)"', marks))
    assert sorted(DUE - proven) == []
