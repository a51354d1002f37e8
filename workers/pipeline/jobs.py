"""The asynchronous form of an entry in a pipeline."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

import zerog

NAME = r"^[A-Za-z0-9._-]{1,100}$"


def no_dots(name: str) -> str:
    """Refuse the names that lead elsewhere in a URL."""
    if name in (".", ".."):
        raise ValueError("a name of more than dots")
    return name


#: The name of a pipeline; and of a job or a state, of any language but without control characters.
PipelineName = Annotated[str, Field(pattern=NAME, description="name of the pipeline"), AfterValidator(no_dots)]
PRINTABLE = r"^[^\x00-\x1f\x7f]+$"


class WriteEntry(zerog.Job):
    """Write one entry into a pipeline.  Run again, it writes the same entry."""

    job_type = "pipeline-log"
    example = {"pipeline": "nightly", "job": "extract", "state": "running"}

    pipeline: PipelineName
    job: str = Field(pattern=PRINTABLE, max_length=200, description="name of the job, or the UUID of one of ZeroG's")
    state: str = Field(pattern=PRINTABLE, max_length=100, description="what state it is in now")
    message: str | None = Field(None, max_length=2000, description="what there is to say about it")

    def run(self, context: zerog.Context) -> None:
        entry = {"job": self.job, "state": self.state, "message": self.message}
        context.publish(f"pipeline.{self.pipeline}", entry)
