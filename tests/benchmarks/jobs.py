"""The job of the benchmarks: the parameters of the baseline's request."""

from __future__ import annotations

from pydantic import Field

import zerog


class Resize(zerog.Job):
    """Validate what the baseline parses."""

    job_type = "resize"

    path: str
    width: int = Field(640, gt=0)

    def run(self, context: zerog.Context) -> None:
        """Do nothing."""
