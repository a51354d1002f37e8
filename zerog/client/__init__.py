"""Client: ZeroG from Python, on the standard library alone.

::

    client = Client("http://127.0.0.1:8888")
    job = client.run("resize", path="a.png", width=320)
    job.wait(progress=lambda job: print(job.completeness, job.message))
    job.data()

Answers are models: their attributes are the members of the JSON in snake_case, and references to other resources are
models too, which are fetched when something of them is touched.  Errors of the server are raised as the class of
``zerog.exceptions`` whose ``code`` it sent, with ``status``, ``code`` and ``errors``.
"""

from __future__ import annotations

from zerog.client.api import Api
from zerog.client.client import Client
from zerog.client.models import Job, Model

__all__ = ["Api", "Client", "Job", "Model"]
