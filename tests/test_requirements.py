"""Every requirement that is due carries a test."""

from __future__ import annotations

import re

from tests.services import ROOT

DUE = {
    *(f"Z{n}" for n in range(1, 19)),
    "G4", "G5", "G6", "G7", "G8", "G16", "G18", "G19", "G20", "G21", "M12", "M30", "M31",
}  # fmt: skip


def test_every_requirement_that_is_due_is_proven_by_a_test() -> None:
    proven: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for marks in re.findall(r"mark\.requirement\(([^)]*)\)", path.read_text()):
            proven |= set(re.findall(r'"([A-Z]\d+)"', marks))
    assert sorted(DUE - proven) == []
