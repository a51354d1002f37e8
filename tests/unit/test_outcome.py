"""What a job may say of its own end: other values are refused with what is right."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import pytest

import zerog

pytestmark = pytest.mark.requirement("Z13")


@pytest.mark.parametrize("code", [404.5, 399, 600, None, "404", True, float("nan")])
def test_the_code_of_a_failure_is_400_to_599(code: Any) -> None:
    with pytest.raises(ValueError, match="400 to 599"):
        zerog.Fail("no", code=code)


@pytest.mark.parametrize("code", [200.5, 199, 300, None, "200", True])
def test_the_code_of_a_success_is_200_to_299(code: Any) -> None:
    with pytest.raises(ValueError, match="200 to 299"):
        zerog.Succeeded(1, code=code)


@pytest.mark.parametrize("delay", [-1, 31_536_001, "1", True, float("nan"), float("inf"), [1]])
def test_a_delay_is_up_to_a_year(delay: Any) -> None:
    for make in (lambda: zerog.Requeue(delay=delay), lambda: zerog.Retry(after=delay)):
        with pytest.raises(ValueError, match="0 to 31,536,000 seconds"):
            make()


def test_what_is_right_is_taken() -> None:
    assert zerog.Fail("no", code=HTTPStatus.NOT_FOUND).result_code == 404
    assert zerog.Succeeded(1, code=201).code == 201
    assert zerog.Requeue(delay=0.5).delay == 0.5
    assert zerog.Retry(after=31_536_000).after == 31_536_000
    with pytest.raises(ValueError, match="not None"):
        zerog.Requeue(delay=None)  # type: ignore[arg-type]
