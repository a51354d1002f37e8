"""The asynchronous form of an entry in a pipeline."""

from __future__ import annotations

from pydantic import Field

import zerog

NAME = r"^[A-Za-z0-9._-]{1,100}$"


class WriteEntry(zerog.Job):
    """Write one entry into a pipeline.  Run again, it writes the same entry."""

    job_type = "pipeline-log"
    example = {"pipeline": "nightly", "job": "extract", "state": "running"}

    pipeline: str = Field(pattern=NAME, description="name of the pipeline")
    job: str = Field(min_length=1, max_length=200, description="name of the job, or the UUID of one of ZeroG's")
    state: str = Field(min_length=1, max_length=100, description="what state it is in now")
    message: str | None = Field(None, max_length=2000, description="what there is to say about it")

    def run(self, context: zerog.Context) -> None:
        entry = {"job": self.job, "state": self.state, "message": self.message}
        context.publish(f"pipeline.{self.pipeline}", entry)
