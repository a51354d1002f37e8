"""Who may do what: tokens, roles, types, limits, TLS and other origins, at running servers."""

from __future__ import annotations

import base64
import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deployment import Deployment
from tests.services import ROOT, CouchbaseServer, connects, free_port, wait_until
from zerog.client import Client
from zerog.exceptions import Forbidden, ServerUnreachable, Unauthenticated, UnknownJob
from zerog.server.applications import endpoints
from zerog.server.routes import ENDPOINTS
from zerog.tokens import ROLES

pytestmark = pytest.mark.requirement("G16", "G18", "M26")

#: Applications whose endpoints are served beside ZeroG's own.
APPLICATIONS = ("workers.examples", "tests", "workers.pipeline")


def command(zerog: Deployment, *arguments: str, status: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "zerog", *arguments],
        env={**zerog.environment, "ZEROG_SERVER": zerog.url, **environment},
        cwd=zerog.folder, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if status == 0 else done.stderr


def create(zerog: Deployment, name: str, *roles: str, types: tuple[str, ...] = ()) -> dict[str, Any]:
    arguments = [part for role in roles for part in ("--role", role)] + [
        part for one in types for part in ("--type", one)
    ]
    made: dict[str, Any] = json.loads(command(zerog, "token", "create", name, *arguments))
    return made


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def zerog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A server and an agent; tokens are on, one for each role and one that has them all."""
    made = Deployment(tmp_path_factory.mktemp("tokens"), applications=",".join(APPLICATIONS))
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def tokens(zerog: Deployment) -> dict[str, str]:
    found = {role: create(zerog, f"the {role}", role)["token"] for role in ROLES}
    found["limited"] = create(zerog, "limited", "read", "submit", "operate", types=("noop",))["token"]
    wait_until(lambda: zerog.client.get("/types").status_code == 401, 5, "tokens are on")
    wait_until(lambda: zerog.client.get("/types", headers=bearer(found["limited"])).status_code == 200, 5)
    return found


def filled(url: str) -> str:
    url = url.replace("{uuid}", "00000000-0000-4000-8000-000000000000").replace("{jobType}", "noop")
    return url.replace("{name}", "name").replace("{number}", "1")


ALL = (*ENDPOINTS, *endpoints(APPLICATIONS))
ROUTES = [(method, endpoint) for endpoint in ALL for method in (*endpoint.methods(), "OPTIONS")]


def test_the_walk_looks_at_every_operation_that_the_server_has(zerog: Deployment, tokens: dict[str, str]) -> None:
    """What a running server describes, and what its router answers, is what the next test walks; and nothing else."""
    described = zerog.client.get("/openapi.json", headers=bearer(tokens["read"])).json()["paths"]
    found = {(method.upper(), path) for path, operations in described.items() for method in operations}
    types = {f"/run/{one['jobType']}" for one in described_types(zerog, tokens)}
    walked = {(method, endpoint.url) for method, endpoint in ROUTES if method != "OPTIONS"}
    assert found == walked | {("POST", path) for path in types}
    shown = zerog.client.get("/view_status", headers=bearer(tokens["read"])).json()["endpoints"]
    assert {one["url"] for one in shown} == {endpoint.url for _, endpoint in ROUTES}
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"):
        assert zerog.client.request(method, "/nowhere").status_code == 401, "nor does it say what is not there"


def described_types(zerog: Deployment, tokens: dict[str, str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = zerog.client.get("/types", headers=bearer(tokens["read"])).json()["items"]
    return found


@pytest.mark.parametrize(("method", "endpoint"), ROUTES, ids=lambda one: one if isinstance(one, str) else one.url)
def test_every_route_is_closed_to_who_has_no_token_or_the_wrong_role(
    zerog: Deployment, tokens: dict[str, str], method: str, endpoint: Any
) -> None:
    url = filled(endpoint.url)
    anonymous = zerog.client.request(method, url)
    if endpoint.public and method == "GET":
        assert (anonymous.status_code, set(anonymous.json())) == (200, {"status"}), "the bare status"
        return
    assert anonymous.status_code == (204 if endpoint.public else 401)
    if method == "OPTIONS":
        return
    needed = endpoint.needed_roles(method)
    for role in ROLES:
        answer = zerog.client.request(method, url, headers=bearer(tokens[role]), timeout=10)
        if role in (*needed, "admin"):
            assert answer.status_code not in (401, 403), (role, answer.text)
        else:
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), role
            assert all(one in answer.json()["detail"] for one in needed)


def test_what_is_no_token_is_refused_in_the_same_words_before_anything_is_looked_at(
    zerog: Deployment, tokens: dict[str, str]
) -> None:
    good = tokens["admin"]
    wrong = [
        {}, bearer("x"), bearer(good + "x"), bearer(good[:-1]), {"Authorization": good}, {"Authorization": "Bearer"},
        {"Authorization": "Basic !!!"}, {"Authorization": f"Digest {good}"}, bearer("x" * 8000), bearer("é"),
        {"Authorization": "Basic " + base64.b64encode(b"\xff:\xff").decode()},
    ]  # fmt: skip
    bodies = set()
    for headers in wrong:
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        for method, url in (("GET", "/types"), ("POST", "/run/noop"), ("GET", "/nowhere")):
            answer = zerog.client.request(method, url, headers=raw)
            assert answer.status_code == 401, (headers, method, url)
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
            bodies.add(answer.text)
    assert len(bodies) == 1
    twice = httpx.Headers([("Authorization", f"Bearer {good}"), ("Authorization", f"Bearer {good}")])
    assert zerog.client.get("/types", headers=twice).status_code == 401
    assert zerog.client.get("/types", headers=bearer(good)).status_code == 200
    with socket.create_connection(("127.0.0.1", zerog.port), 10) as end:
        end.sendall(b"POST /run/noop HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n\r\n")
        assert end.recv(100).startswith(b"HTTP/1.1 401 "), "before the body is read"
    for announced in (b"Content-Length: 100", b"Transfer-Encoding: chunked"):
        with socket.create_connection(("127.0.0.1", zerog.port), 5) as end:
            end.sendall(b"POST /run/noop HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n" % announced)
            assert end.recv(100).startswith(b"HTTP/1.1 401 "), "nor is a small one waited for"


def test_a_browser_gives_the_token_as_its_password(zerog: Deployment, tokens: dict[str, str]) -> None:
    page = zerog.client.get("/", headers={"Accept": "text/html"})
    assert (page.status_code, page.headers["content-type"]) == (401, "text/html; charset=utf-8")
    assert "Basic" in page.headers["WWW-Authenticate"] and "Bearer" in page.headers["WWW-Authenticate"]
    assert "Basic" not in zerog.client.get("/").headers["WWW-Authenticate"]
    page = zerog.client.get("/", headers={"Accept": "text/html"}, auth=("anybody", tokens["read"]))
    assert page.status_code == 200


def test_a_token_limited_to_types_sees_nothing_else(zerog: Deployment, tokens: dict[str, str]) -> None:
    limited, admin = bearer(tokens["limited"]), bearer(tokens["admin"])

    def ask(method: str, url: str, headers: dict[str, str] = limited, **more: Any) -> httpx.Response:
        return zerog.client.request(method, url, headers=headers, **more)

    own = ask("POST", "/run/noop", json={}).json()["uuid"]
    other = ask("POST", "/run/sleep", admin, json={"seconds": 0}).json()["uuid"]
    refused = ask("POST", "/run/sleep", json={"seconds": 0})
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    assert ask("POST", "/run/no-such", json={}).status_code == 404
    unknown = ask("GET", "/jobs/00000000-0000-4000-8000-000000000000")
    for url in ("", "/progress", "/info", "/events", "/data", "/explain"):
        hidden = ask("GET", f"/jobs/{other}{url}")
        assert (hidden.status_code, hidden.json()["code"]) == (404, "unknown_job")
        assert hidden.json()["detail"] == unknown.json()["detail"], "as if it did not exist"
    assert ask("POST", f"/jobs/{other}/cancel").status_code == 404
    assert ask("POST", f"/jobs/{other}/retry").status_code == 404
    listed = {one["uuid"] for one in ask("GET", "/jobs").json()["items"]}
    assert own in listed and other not in listed
    assert ask("GET", "/jobs?type=sleep").json()["items"] == []
    assert {one["jobType"] for one in ask("GET", "/types").json()["items"]} == {"noop"}
    assert ask("GET", "/types/sleep").status_code == 404
    assert ask("POST", "/types/sleep/pause").status_code == 404
    for parent, status in ((own, 202), (other, 400)):
        child = ask("POST", f"/run/noop?parent={parent}", json={})
        assert (child.status_code, status == 202 or child.json()["code"] == "unknown_parent") == (status, True)
    assert {one["jobType"] for one in ask("GET", "/").json()["newest"]} == {"noop"}
    assert ask("POST", "/jobs:retry", json={"type": "sleep"}).status_code == 404
    assert ask("POST", "/jobs:prune", json={"olderThan": 1_000_000}).status_code == 403
    assert ask("POST", "/jobs:prune", json={"olderThan": 1_000_000, "type": "noop"}).status_code == 200
    status = ask("GET", "/view_status").json()
    assert {one["jobType"] for one in status["queue"]["items"]} == {"noop"}
    assert {name for agent in status["agents"]["items"] for name in agent["jobTypes"]} == {"noop"}
    described = ask("GET", "/openapi.json")
    assert "/run/noop" in described.json()["paths"] and "/run/sleep" not in described.text
    assert "Parameters.sleep" not in described.text
    assert ask("POST", "/log", json={"pipeline": "p", "job": other, "state": "x"}).status_code == 404
    later = ask("POST", "/log", headers={**limited, "Prefer": "respond-async"},
                json={"pipeline": "p", "job": "j", "state": "x"})  # fmt: skip
    assert (later.status_code, later.json()["code"]) == (403, "forbidden")
    wait_until(lambda: 'zerog_job_seconds_count{type="sleep"}' in ask("GET", "/metrics", admin).text, 10, "it has run")
    assert 'type="sleep"' not in ask("GET", "/metrics").text


def test_a_limited_token_sees_the_jobs_of_its_types_in_a_pipeline(zerog: Deployment, tokens: dict[str, str]) -> None:
    limited, admin = bearer(tokens["limited"]), bearer(tokens["admin"])
    other = zerog.client.post("/run/sleep?pipeline=mixed", json={"seconds": 0}, headers=admin).json()["uuid"]
    assert zerog.client.get("/pipelines/mixed", headers=admin).json()["jobs"][0]["job"] == other
    assert zerog.client.get("/pipelines/mixed", headers=limited).status_code == 404
    own = zerog.client.post("/run/noop?pipeline=mixed", json={}, headers=limited).json()["uuid"]
    assert [one["job"] for one in zerog.client.get("/pipelines/mixed", headers=limited).json()["jobs"]] == [own]
    shown = zerog.client.get("/log?pipeline=mixed", headers=limited).json()["items"]
    assert {one["job"] for one in shown} == {own}
    assert zerog.client.get("/pipelines/mixed/log/1", headers=admin).json()["job"] == other
    assert zerog.client.get("/pipelines/mixed/log/1", headers=limited).status_code == 404
    assert other not in zerog.client.get("/pipelines", headers=limited).text


def test_keys_are_those_of_a_token(zerog: Deployment, tokens: dict[str, str]) -> None:
    answers = [
        zerog.client.post("/run/noop", json={}, headers={**bearer(tokens[name]), "Idempotency-Key": "the-same"})
        for name in ("submit", "submit", "limited")
    ]
    first, again, other = (answer.json()["uuid"] for answer in answers)
    assert first == again != other


def test_who_paused_is_the_name_of_the_token(zerog: Deployment, tokens: dict[str, str]) -> None:
    paused = zerog.client.post("/types/steps/pause", headers=bearer(tokens["operate"]))
    assert paused.json()["paused"]["by"] == "the operate"
    zerog.client.post("/types/steps/resume", headers=bearer(tokens["operate"]))


def test_a_revoked_token_ends_within_five_seconds_and_tokens_stay_on(zerog: Deployment, tokens: dict[str, str]) -> None:
    made = create(zerog, "short-lived", "read")
    assert set(made) == {"id", "name", "token", "roles", "types"}
    headers = bearer(made["token"])
    wait_until(lambda: zerog.client.get("/types", headers=headers).status_code == 200, 5)
    assert made["id"] in command(zerog, "token", "list") and made["token"] not in command(zerog, "token", "list")
    listed = json.loads(command(zerog, "token", "list", "--json"))
    assert made["token"] not in str(listed) and made["id"] in {one["id"] for one in listed}
    command(zerog, "token", "revoke", made["id"])
    wait_until(lambda: zerog.client.get("/types", headers=headers).status_code == 401, 5, "it is revoked")
    assert "no token" in command(zerog, "token", "revoke", made["id"], status=4)
    assert made["token"] not in zerog.log("server")


def test_a_stream_ends_with_its_token(zerog: Deployment, tokens: dict[str, str]) -> None:
    made = create(zerog, "watcher", "read")
    headers = {**bearer(made["token"]), "Accept": "text/event-stream"}
    wait_until(lambda: zerog.client.get("/types", headers=bearer(made["token"])).status_code == 200, 5)
    with zerog.client.stream("GET", "/queue", headers=headers) as stream:
        lines = stream.iter_lines()
        assert next(line for line in lines if line.startswith("event: change"))
        command(zerog, "token", "revoke", made["id"])
        wait_until(lambda: zerog.client.get("/types", headers=bearer(made["token"])).status_code == 401, 5)
        zerog.client.post("/types/noop/pause", headers=bearer(tokens["operate"]))
        try:
            with pytest.raises(httpx.RemoteProtocolError):
                rest = list(lines)
                pytest.fail(f"the stream went on, or ended as if it were whole: {rest}")
        finally:
            zerog.client.post("/types/noop/resume", headers=bearer(tokens["operate"]))
    assert "stream ended: /queue" in zerog.log("server") and "stream failed" not in zerog.log("server")


@pytest.mark.parametrize(
    "arguments", [("x",), ("x", "--role", "boss"), ("", "--role", "read"), ("a\nb", "--role", "read")]
)
def test_a_token_that_would_make_no_sense_is_refused(zerog: Deployment, arguments: tuple[str, ...]) -> None:
    command(zerog, "token", "create", *arguments, status=1)


def test_the_description_names_the_role_of_every_operation(zerog: Deployment, tokens: dict[str, str]) -> None:
    found = zerog.client.get("/openapi.json", headers=bearer(tokens["read"])).json()["paths"]
    assert found["/run/noop"]["post"]["security"] == [{"bearer": ["submit"]}]
    assert found["/jobs"]["get"]["security"] == [{"bearer": ["read"]}]
    assert found["/jobs/{uuid}"]["delete"]["security"] == [{"bearer": ["operate"]}]
    assert found["/healthz"]["get"]["security"] == [{"bearer": ["read"]}, {}]


def test_the_client_and_the_commands_send_their_token(zerog: Deployment, tokens: dict[str, str]) -> None:
    with pytest.raises(Unauthenticated):
        Client(zerog.url).types()
    client = Client(zerog.url, tokens["submit"])
    uuid = client.submit("noop", {})["uuid"]
    with pytest.raises(Forbidden):
        client.job(uuid)
    with pytest.raises(UnknownJob):
        Client(zerog.url, tokens["limited"]).job("00000000-0000-4000-8000-000000000000")
    assert "needs a token" in command(zerog, "types", status=4, ZEROG_TOKEN=tokens["submit"])
    assert "noop" in command(zerog, "types", "--token", tokens["read"])
    assert "noop" in command(zerog, "types", ZEROG_TOKEN=tokens["read"])


# Servers of their own


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(tmp_path / "alone")
    yield made
    made.close()


def test_the_rate_of_a_token_is_limited_at_all_servers_together(alone: Deployment) -> None:
    other = free_port()
    alone.start_server(rate_limit="30")
    second, second_url = alone._start("server", port=str(other), rate_limit="30"), f"http://127.0.0.1:{other}"
    wait_until(lambda: connects(other), 20, "the second server")
    try:
        made = create(alone, "busy", "read")
        quiet = create(alone, "quiet", "read")
        headers = bearer(made["token"])

        def both_know() -> bool:
            asked = [httpx.get(f"{url}/types", headers=bearer(quiet["token"])) for url in (alone.url, second_url)]
            return all("RateLimit" in answer.headers for answer in asked)

        wait_until(both_know, 10, "both servers know that there are tokens")
        if time.time() % 60 > 45:
            time.sleep(60 - time.time() % 60)  # what follows is to happen within one minute
        answer = alone.client.get("/types", headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["RateLimit-Policy"] == '"token";q=30;w=60'
        assert re.fullmatch(r'"token";r=29;t=\d+', answer.headers["RateLimit"])
        for _ in range(14):
            alone.client.get("/types", headers=headers)
        time.sleep(1.5)  # until the servers have told each other
        statuses = [httpx.get(f"{second_url}/types", headers=headers).status_code for _ in range(20)]
        assert statuses == [200] * 15 + [429] * 5
        refused = httpx.get(f"{second_url}/types", headers=headers)
        assert refused.json()["code"] == "rate_limited"
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        assert '"token";r=0;' in refused.headers["RateLimit"]
        assert alone.client.get("/types", headers=bearer(quiet["token"])).status_code == 200, "each by itself"
    finally:
        second.kill()


def test_a_server_that_others_can_reach_does_not_start_open(alone: Deployment) -> None:
    refused = alone._start("server", address="0.0.0.0")
    assert refused.popen.wait(20) == 1
    assert "there are no tokens" in refused.log.read_text() and "Traceback" not in refused.log.read_text()
    several = alone._start("server", address="0.0.0.0", processes="2")
    assert several.popen.wait(20) == 1
    create(alone, "first", "admin")
    alone.start_server(address="0.0.0.0", allowed_hosts="127.0.0.1")
    assert alone.client.get("/types").status_code == 401
    assert "clear text" in alone.log("server")


def test_without_the_store_nobody_is_let_in(tmp_path: Path) -> None:
    """Whether there are tokens is not known: then there may be."""
    couchbase = CouchbaseServer(tmp_path / "couchbase").start()
    zerog = Deployment(tmp_path / "zerog", "couchbase", couchbase=couchbase, deadline="1")
    try:
        create(zerog, "first", "admin")
        couchbase.signal(signal.SIGSTOP)
        zerog.server = zerog._start("server")
        wait_until(lambda: _status(zerog, "/healthz") == 200, 20, "the server")
        assert zerog.client.get("/healthz").json() == {"status": "ok"}
        assert (_status(zerog, "/types"), _status(zerog, "/nowhere")) == (503, 503)
        couchbase.signal(signal.SIGCONT)
        wait_until(lambda: _status(zerog, "/types") == 401, 20, "the store is back")
    finally:
        zerog.close()
        couchbase.stop()


def _status(zerog: Deployment, url: str) -> int:
    try:
        return zerog.client.get(url).status_code
    except httpx.HTTPError:
        return 0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return certificate, key


@pytest.mark.parametrize("processes", ["1", "2"])
def test_tls(alone: Deployment, certificate: tuple[Path, Path], processes: str) -> None:
    files = {"tls_certificate": certificate[0], "tls_key": certificate[1]}
    context = ssl.create_default_context(cafile=str(certificate[0]))
    url = alone.url.replace("http:", "https:")
    alone.client = httpx.Client(base_url=url, verify=context, timeout=10)
    alone.start_server(**files, processes=processes)
    assert alone.client.get("/healthz").json() == {"status": "ok"}
    assert Client(url, ca=str(certificate[0])).types()
    begun = time.monotonic()
    with pytest.raises(ServerUnreachable, match="certificate"):
        Client(url).types()
    assert time.monotonic() - begun < 30, "it was not tried again for a minute: it is no better then"
    assert "noop" in command(alone, "types", "--server", url, "--ca", str(certificate[0]))
    assert "noop" in command(alone, "types", "--server", url, SSL_CERT_FILE=str(certificate[0]))
    assert "certificate" in command(alone, "types", "--server", url, status=4)


@pytest.mark.parametrize(
    "settings",
    [{"tls_key": "key.pem"}, {"tls_certificate": "nothing.pem", "tls_key": "key.pem"},
     {"tls_certificate": "README.rst", "tls_key": "README.rst"}],
)  # fmt: skip
def test_tls_that_cannot_be_read_is_no_start(alone: Deployment, settings: dict[str, str]) -> None:
    files = {name: str(ROOT / value) for name, value in settings.items()}
    refused = alone._start("server", **files)
    assert refused.popen.wait(20) == 1
    assert "tls_" in refused.log.read_text() and "Traceback" not in refused.log.read_text()


def test_only_named_origins_may_use_the_api(alone: Deployment) -> None:
    alone.start_server(allowed_origins="https://pages.example")
    good, bad = {"Origin": "https://pages.example"}, {"Origin": "https://evil.example"}
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    answer = alone.client.options("/run/noop", headers={**good, **asks})
    assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (204, "https://pages.example")
    assert "POST" in answer.headers["Access-Control-Allow-Methods"] and "Origin" in answer.headers["Vary"]
    assert alone.client.post("/run/noop", json={}, headers={**good, "Sec-Fetch-Site": "cross-site"}).status_code == 202
    assert alone.client.post("/run/noop", json={}, headers=bad).status_code == 403
    for headers in ({**bad, **asks}, bad):
        answer = alone.client.options("/run/noop", headers=headers)
        assert "Access-Control-Allow-Origin" not in answer.headers
    create(alone, "first", "admin")
    wait_until(lambda: alone.client.get("/types").status_code == 401, 5)
    assert alone.client.options("/run/noop", headers={**good, **asks}).status_code == 204, "a preflight has no token"
    assert alone.client.options("/run/noop", headers=good).status_code == 401
    refused = alone.client.get("/types", headers=good)
    assert (refused.status_code, refused.headers["Access-Control-Allow-Origin"]) == (401, "https://pages.example")


@pytest.mark.requirement("M2")
def test_a_token_of_an_agent_that_is_limited_speaks_for_no_other_types(
    zerog: Deployment, tokens: dict[str, str]
) -> None:
    limited = create(zerog, "limited agent", "agent", types=("noop",))["token"]
    admin = bearer(tokens["admin"])
    wait_until(lambda: zerog.client.post("/agents", json={}, headers=bearer(limited)).status_code == 422, 5)

    def register(id: str, token: str, *types: str) -> int:
        body = {"id": id, "jobTypes": list(types), "instance": "1"}
        return zerog.client.post("/agents", json=body, headers=bearer(token)).status_code

    assert register("whole", tokens["admin"], "sleep") == 201
    assert register("whole", limited, "noop") == 403, "it would take the name of an agent of other types"
    assert zerog.client.delete("/agents/whole", headers=bearer(limited)).status_code == 403
    assert register("part", limited, "noop", "sleep") == 201
    assert zerog.client.get("/agents/part", headers=admin).json()["jobTypes"] == ["noop"]
    assert zerog.client.delete("/agents/part", headers=bearer(limited)).status_code == 204
    assert zerog.client.delete("/agents/whole", headers=admin).status_code == 204


@pytest.mark.requirement("M25")
def test_a_limited_token_commands_no_agent_of_other_types_and_no_job_of_them(
    zerog: Deployment, tokens: dict[str, str]
) -> None:
    limited, admin = bearer(tokens["limited"]), bearer(tokens["admin"])
    agent_of_noop = create(zerog, "agent of noop", "agent", types=("noop",))["token"]
    hidden = zerog.client.post("/run/sleep?delay=60", json={"seconds": 0}, headers=admin).json()["uuid"]
    own = zerog.client.post("/run/noop?delay=60", json={}, headers=admin).json()["uuid"]
    for id, types in (("of-noop", ["noop"]), ("of-more", ["noop", "sleep"])):
        body = {"id": id, "jobTypes": types, "instance": "1", "labels": ["mixed"]}
        assert zerog.client.post("/agents", json=body, headers=admin).status_code == 201

    def told(url: str, token: dict[str, str] | None = None, **body: Any) -> tuple[int, str | None]:
        answer = zerog.client.post(url, json=body, headers=token or limited)
        return answer.status_code, answer.json().get("code")

    of_noop, of_more = "/agents/of-noop/commands", "/agents/of-more/commands"
    for command in ("cancel", "modify"):
        more: dict[str, Any] = {"priority": 7} if command == "modify" else {}
        assert told(of_more, command=command, uuid=hidden, **more) == (404, "unknown_job")
        assert told(of_more, command=command, uuid=own, **more) == (202, None)
        assert told(of_more, admin, command=command, uuid=hidden, **more) == (202, None)
    assert told(of_more, command="drain") == (403, "forbidden")
    assert told(of_noop, command="drain") == (202, None)
    answer = zerog.client.post("/agents/commands", json={"command": "resume", "label": "mixed"}, headers=limited)
    assert [one["href"] for one in answer.json()["items"]] == ["/agents/of-noop/commands/2"]
    assert [one["code"] for one in answer.json()["refused"]] == ["forbidden"]
    seen = zerog.client.get(of_more, headers=limited)
    assert hidden not in seen.text and own in seen.text
    number = next(
        one["number"] for one in zerog.client.get(of_more, headers=admin).json()["items"] if one.get("uuid") == hidden
    )
    assert zerog.client.get(f"{of_more}/{number}", headers=limited).status_code == 404
    wait_until(lambda: told("/agents", bearer(agent_of_noop))[0] == 422, 5)
    assert told(f"{of_more}/1", bearer(agent_of_noop), state="applied") == (403, "forbidden")
    assert told("/agents/of-more/exceptions", bearer(agent_of_noop), type="E", message="m") == (403, "forbidden")
    for url in ("/agents/of-noop", "/agents/of-more", f"/jobs/{hidden}", f"/jobs/{own}"):
        assert zerog.client.delete(url, headers=admin).status_code in (200, 204)
