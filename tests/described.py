"""Every problem that a server answers in any test is one that ``/openapi.json`` announces for that operation."""

from __future__ import annotations

import re

import httpx

from zerog.server.applications import endpoints
from zerog.server.problems import problems
from zerog.server.routes import ENDPOINTS, pattern

_ALL = (*ENDPOINTS, *endpoints(["tests", "workers.pipeline", "workers.processing", "workers.ingest"]))
_ROUTES = [(re.compile(pattern(endpoint.url)), endpoint) for endpoint in _ALL]


def check_described(response: httpx.Response) -> None:
    """Fail for a problem that nobody would expect who has read the description; a hook of httpx."""
    if not response.headers.get("Content-Type", "").startswith("application/problem+json"):
        return
    path = response.request.url.path
    endpoint = next((endpoint for route, endpoint in _ROUTES if route.match(path)), None)
    method = "GET" if response.request.method == "HEAD" else response.request.method
    if endpoint is None or method not in endpoint.methods() or response.request.method == "HEAD":
        return  # where nothing is
    response.read()
    code = response.json()["code"]
    announced = problems(endpoint, method)
    assert code in announced.get(response.status_code, ()), (
        f"{method} {path} answered {response.status_code} {code}, which is not among {announced}"
    )
