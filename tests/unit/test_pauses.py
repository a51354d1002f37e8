"""Fail points that wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from zerog import failpoints
from zerog.exceptions import BadSetting


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    """Leave no point armed."""
    yield
    failpoints.arm("")


@pytest.mark.requirement("Z12")
def test_until_waits_for_a_file_and_says_when_none_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "now"
    failpoints.arm(f"own.here=until:{file}")
    passed = threading.Event()

    def come_past() -> None:
        failpoints.hit_own("here")
        passed.set()

    thread = threading.Thread(target=come_past)
    thread.start()
    assert not passed.wait(0.1)
    file.touch()
    thread.join(10)
    assert passed.is_set()
    file.unlink()
    monkeypatch.setattr(failpoints, "_LONGEST_WAIT", 0)
    with pytest.raises(failpoints.FailpointHit, match="did not come"):
        failpoints.hit_own("here")


@pytest.mark.parametrize("text", ["own.here=until:", "own.here=until:a@b", "own.here=until"])
def test_until_needs_a_name_that_can_be_read(text: str) -> None:
    with pytest.raises(BadSetting, match="until:FILE"):
        failpoints.arm(text)
