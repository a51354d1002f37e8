"""ZeroG: a job server.  A client POSTs a job and gets a UUID; workers run it; the client polls and fetches the data.

The five-minute tour::

    # mywork/jobs.py
    import zerog
    from pydantic import Field

    class Resize(zerog.Job):
        \"\"\"Resize one image.\"\"\"

        job_type = "resize"

        path: str
        width: int = Field(640, gt=0)

        def run(self, context: zerog.Context) -> dict:
            for tile in context.track(range(12)):
                ...
            return {"tiles": 12}

    $ zerog up --applications mywork
    $ curl -X POST localhost:8888/run/resize -H 'Content-Type: application/json' -d '{"path": "a.png"}'
    $ curl localhost:8888/jobs/<uuid>/progress
    $ curl localhost:8888/jobs/<uuid>/data

Names are loaded when they are touched, so that ``import zerog.client`` needs nothing but the standard library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerog import commands
    from zerog.client import Client
    from zerog.consumer import Consumer, Entry, Topic
    from zerog.exceptions import (
        AlreadyExists,
        Conflict,
        Fail,
        NotFound,
        NotRetryable,
        Retry,
        SoftTimeLimit,
        UnknownJob,
        ZerogError,
    )
    from zerog.failpoints import hit_own as failpoint
    from zerog.job import Context, Job
    from zerog.outcome import Requeued as Requeue
    from zerog.outcome import Succeeded
    from zerog.own_settings import Bytes, Seconds
    from zerog.parents import Parent

__version__ = "0.2.0"

__all__ = [
    "AlreadyExists",
    "Bytes",
    "Client",
    "Conflict",
    "Consumer",
    "Context",
    "Entry",
    "Fail",
    "Job",
    "NotFound",
    "NotRetryable",
    "Parent",
    "Requeue",
    "Retry",
    "Seconds",
    "SoftTimeLimit",
    "Succeeded",
    "Topic",
    "UnknownJob",
    "ZerogError",
    "__version__",
    "commands",
    "failpoint",
]

_PLACES = {
    "AlreadyExists": ("zerog.exceptions", "AlreadyExists"),
    "Bytes": ("zerog.own_settings", "Bytes"),
    "Client": ("zerog.client", "Client"),
    "Conflict": ("zerog.exceptions", "Conflict"),
    "Consumer": ("zerog.consumer", "Consumer"),
    "Context": ("zerog.job", "Context"),
    "Entry": ("zerog.consumer", "Entry"),
    "Fail": ("zerog.exceptions", "Fail"),
    "Job": ("zerog.job", "Job"),
    "NotFound": ("zerog.exceptions", "NotFound"),
    "NotRetryable": ("zerog.exceptions", "NotRetryable"),
    "Parent": ("zerog.parents", "Parent"),
    "Requeue": ("zerog.outcome", "Requeued"),
    "Retry": ("zerog.exceptions", "Retry"),
    "Seconds": ("zerog.own_settings", "Seconds"),
    "SoftTimeLimit": ("zerog.exceptions", "SoftTimeLimit"),
    "Succeeded": ("zerog.outcome", "Succeeded"),
    "failpoint": ("zerog.failpoints", "hit_own"),
    "Topic": ("zerog.consumer", "Topic"),
    "UnknownJob": ("zerog.exceptions", "UnknownJob"),
    "ZerogError": ("zerog.exceptions", "ZerogError"),
}


def __getattr__(name: str) -> Any:
    if name == "commands":
        return importlib.import_module("zerog.commands")
    try:
        module, attribute = _PLACES[name]
    except KeyError:
        raise AttributeError(f"module 'zerog' has no attribute {name!r}") from None
    return getattr(importlib.import_module(module), attribute)
