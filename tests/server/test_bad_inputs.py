"""The door's law: every bad input that concerns these endpoints, with its status and code, as data."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.deployment import Deployment

pytestmark = pytest.mark.requirement("Z4", "G7", "G16", "G18", "G21")

JSON = {"Content-Type": "application/json"}
NIL = "00000000-0000-0000-0000-000000000000"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A server alone: what it stores nobody runs."""
    made = Deployment(tmp_path_factory.mktemp("door"), idle_timeout="2", max_body="64KiB")
    # No connection is used twice: one that was idle for two seconds is closed just when the next request comes.
    made.client.close()
    limits, hooks = httpx.Limits(max_keepalive_connections=0), made.client.event_hooks
    made.client = httpx.Client(base_url=made.url, timeout=70, limits=limits, event_hooks=hooks)
    try:
        made.start_server()
        yield made
    finally:
        made.close()


def stored(server: Deployment) -> int:
    items = server.client.get("/jobs?limit=1").json()["items"]
    return items[0]["number"] if items else 0


def nested(depth: int) -> bytes:
    return b'{"number":1,"anything":{"a":' + b"[" * (depth - 2) + b"]" * (depth - 2) + b"}}"


# Row of the table, body of POST /run/strict, status, code
BODIES: list[tuple[str, bytes, int, str]] = [
    ("1 cut", b'{"number": 1', 400, "invalid_json"),
    ("1 comment", b'{"number": 1 /* one */}', 400, "invalid_json"),
    ("1 trailing comma", b'{"number": 1,}', 400, "invalid_json"),
    ("1 single quotes", b"{'number': 1}", 400, "invalid_json"),
    ("1 garbage after", b'{"number": 1} x', 400, "invalid_json"),
    ("1 leading zero", b'{"number": 01}', 400, "invalid_json"),
    ("1 lone minus", b'{"number": -}', 400, "invalid_json"),
    ("1 raw control character", b'{"text": "a\nb"}', 400, "invalid_json"),
    ("2 empty", b"", 400, "empty_body"),
    ("2 white space", b" \n\t ", 400, "empty_body"),
    ("3 duplicate key", b'{"number": 1, "number": 2}', 400, "duplicate_key"),
    ("3 duplicate key inside", b'{"number": 1, "anything": {"a": 1, "a": 1}}', 400, "duplicate_key"),
    ("4 NaN", b'{"number": NaN}', 400, "invalid_number"),
    ("4 Infinity", b'{"number": 1, "anything": {"a": -Infinity}}', 400, "invalid_number"),
    ("5 1e400", b'{"number": 1e400}', 400, "number_out_of_range"),
    ("5 -1e400", b'{"number": 1, "anything": {"a": [-1e400]}}', 400, "number_out_of_range"),
    ("6 5,000 digits", b'{"number": ' + b"9" * 5000 + b"}", 400, "number_out_of_range"),
    ("7 2^53 + 1 where less is wanted", b'{"number": 9007199254740993}', 422, "invalid_parameters"),
    ("8 1.0 for an integer", b'{"number": 1.0}', 422, "invalid_parameters"),
    ("8 true for an integer", b'{"number": true}', 422, "invalid_parameters"),
    ('8 "5" for an integer', b'{"number": "5"}', 422, "invalid_parameters"),
    ("9 depth 101", nested(101), 400, "too_deep"),
    ("9 depth 30,000", nested(30_000), 400, "too_deep"),
    ("9 depth 60,000, never closed", b'{"a":' + b"[" * 60_000, 400, "too_deep"),
    ("11 invalid UTF-8", b'{"text": "\xff\xfe"}', 400, "invalid_utf8"),
    ("11 overlong", b'{"text": "\xc0\xaf"}', 400, "invalid_utf8"),
    ("11 CESU", b'{"text": "\xed\xa0\x80\xed\xb0\x80"}', 400, "invalid_utf8"),
    ("12 UTF-16", '{"number": 1}'.encode("utf-16"), 400, "invalid_utf8"),
    ("12 UTF-16 without mark", '{"number": 1}'.encode("utf-16-le"), 400, "invalid_utf8"),
    ("12 UTF-32", '{"number": 1}'.encode("utf-32-be"), 400, "invalid_utf8"),
    ("12 byte order mark", b'\xef\xbb\xbf{"number": 1}', 400, "invalid_utf8"),
    ("13 lone surrogate in a value", b'{"text": "\\ud800"}', 400, "invalid_unicode"),
    ("13 lone surrogate in a key", b'{"\\udfff": 1}', 400, "invalid_unicode"),
    ("14 control character in a name", b'{"text": "a\\u0000b"}', 422, "invalid_parameters"),
    ("15 null", b"null", 400, "object_expected"),
    ("15 list", b"[]", 400, "object_expected"),
    ("15 string", b'"x"', 400, "object_expected"),
    ("15 number", b"5", 400, "object_expected"),
    ("34 unknown field", b'{"number": 1, "nubmer": 2}', 422, "invalid_parameters"),
    ("34 unknown field inside", b'{"number": 1, "either": {"user": "a", "password": "b", "x": 1}}', 422, "invalid_parameters"),
    ("35 names of the record", b'{"number": 1, "uuid": "x", "state": "succeeded", "attempt": 9}', 422, "invalid_parameters"),
    ("36 __proto__", b'{"number": 1, "__class__": {}, "__proto__": {}}', 422, "invalid_parameters"),
    ("38 not matching", b'{"number": -1, "real": "x", "text": "", "flag": 0}', 422, "invalid_parameters"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "code"), [row[1:] for row in BODIES], ids=[row[0] for row in BODIES])
def test_a_bad_body_is_refused_and_leaves_nothing(server: Deployment, body: bytes, status: int, code: str) -> None:
    before = stored(server)
    answer = server.client.post("/run/strict", content=body, headers=JSON)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem = answer.json()
    assert problem["message"] == problem["detail"]
    assert problem["status"] == status
    assert "Traceback" not in answer.text
    assert stored(server) == before


# Row, body, faults as (pointer, code)
FAULTS: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("missing", {}, [("/number", "missing")]),
    ("type", {"number": "5"}, [("/number", "type")]),
    ("range", {"number": -1}, [("/number", "range")]),
    ("length", {"number": 1, "text": ""}, [("/text", "length")]),
    ("pattern", {"number": 1, "text": "ABC"}, [("/text", "pattern")]),
    ("unknown", {"number": 1, "widht": 1}, [("/widht", "unknown_field")]),
    ("escaped", {"number": 1, "a/b~c": 1}, [("/a~1b~0c", "unknown_field")]),
    ("nested", {"number": 1, "inner": [{"user": "a", "password": 5}]}, [("/inner/0/password", "type")]),
    ("nested unknown", {"number": 1, "inner": [{"user": "a", "password": "b", "x": 1}]}, [("/inner/0/x", "unknown_field")]),
    ("several", {"number": -1, "flag": 1}, [("/number", "range"), ("/flag", "type")]),
]  # fmt: skip


@pytest.mark.parametrize(("body", "faults"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_each_fault_has_its_pointer_and_code(
    server: Deployment, body: dict[str, Any], faults: list[tuple[str, str]]
) -> None:
    answer = server.client.post("/run/strict", json=body)
    assert answer.status_code == 422
    assert [(fault["pointer"], fault["code"]) for fault in answer.json()["errors"]] == faults


def test_pointers_of_unions_hold_no_tags(server: Deployment) -> None:
    answer = server.client.post("/run/strict", json={"number": 1, "either": {"user": 5, "password": "b"}})
    assert {fault["pointer"] for fault in answer.json()["errors"]} <= {"/either/user", "/either"}


def test_an_unknown_field_gets_a_suggestion(server: Deployment) -> None:
    answer = server.client.post("/run/strict", json={"number": 1, "nubmer": 2})
    assert "did you mean 'number'?" in answer.json()["errors"][0]["detail"]


def test_at_most_twenty_faults_are_listed(server: Deployment) -> None:
    answer = server.client.post("/run/strict", json={f"x{n}": 1 for n in range(50)})
    assert len(answer.json()["errors"]) == 20


GOOD: list[tuple[str, bytes]] = [
    ("7 2^64 is kept", b'{"number": 9007199254740991, "big": 18446744073709551616}'),
    ("9 depth 100", nested(100)),
    ("9 brackets in strings are not counted", b'{"number": 1, "anything": {"a": "' + b"[" * 1000 + b'"}}'),
    ("13 a whole pair", b'{"number": 1, "anything": {"a": "\\ud83d\\ude00"}}'),
    ("14 control characters in parameters", b'{"number": 1, "anything": {"a": "\\u0000\\u001b"}}'),
    ("36 inert data", b'{"number": 1, "anything": {"__class__": {"$where": 1}}}'),
]


@pytest.mark.parametrize("body", [row[1] for row in GOOD], ids=[row[0] for row in GOOD])
def test_what_is_good_is_stored_as_it_was_sent(server: Deployment, body: bytes) -> None:
    answer = server.client.post("/run/strict", content=body, headers=JSON)
    assert answer.status_code == 202, answer.text
    parameters = server.job(answer.json()["uuid"])["parameters"]
    for name, value in json.loads(body).items():
        assert parameters[name] == value


# Row, method, path, headers, status, code
REQUESTS: list[tuple[str, str, str, dict[str, str], int, str]] = [
    ("19 text/plain", "POST", "/run/noop", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
    ("19 form", "POST", "/run/noop", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
    ("19 multipart", "POST", "/run/noop", {"Content-Type": "multipart/form-data; boundary=x"}, 415, "unsupported_media_type"),
    ("19 none", "POST", "/run/noop", {}, 415, "unsupported_media_type"),
    ("20 latin-1", "POST", "/run/noop", {"Content-Type": "application/json; charset=latin-1"}, 415, "unsupported_media_type"),
    ("21 gzip", "POST", "/run/noop", {**JSON, "Content-Encoding": "gzip"}, 415, "unsupported_media_type"),
    ("22 csv", "GET", "/jobs", {"Accept": "text/csv"}, 406, "not_acceptable"),
    ("22 q=0", "GET", "/jobs", {"Accept": "*/*;q=0"}, 406, "not_acceptable"),
    ("23 POST on a GET route", "POST", "/jobs", JSON, 405, "method_not_allowed"),
    ("23 PUT", "PUT", "/run/noop", JSON, 405, "method_not_allowed"),
    ("23 GET on a POST route", "GET", "/run/noop", {}, 405, "method_not_allowed"),
    ("24 TRACE", "TRACE", "/jobs", {}, 405, "method_not_allowed"),
    ("27 foreign host", "GET", "/jobs", {"Host": "evil.example"}, 421, "misdirected_request"),
    ("28 key with a space", "POST", "/run/noop", {**JSON, "Idempotency-Key": "a b"}, 400, "invalid_parameter"),
    ("48 key empty", "POST", "/run/noop", {**JSON, "Idempotency-Key": ""}, 400, "invalid_parameter"),
    ("48 key too long", "POST", "/run/noop", {**JSON, "Idempotency-Key": "k" * 256}, 400, "invalid_parameter"),
    ("31 braces", "GET", "/jobs/{" + NIL + "}", {}, 404, "unknown_job"),
    ("31 urn", "GET", f"/jobs/urn:uuid:{NIL}", {}, 404, "unknown_job"),
    ("31 no hyphens", "GET", f"/jobs/{NIL.replace('-', '')}", {}, 404, "unknown_job"),
    ("31 newline", "GET", f"/jobs/{NIL}%0a/progress", {}, 404, "unknown_job"),
    ("31 Unicode digits", "GET", "/jobs/" + NIL.replace("0", "%D9%A0"), {}, 404, "unknown_job"),
    ("32 unknown", "GET", "/jobs/6f1b7a52-61c5-4f0e-9d3f-7a65726f6721/data", {}, 404, "unknown_job"),
    ("32 nil", "DELETE", f"/jobs/{NIL}", {}, 404, "unknown_job"),
    ("33 traversal", "GET", "/jobs/..%2f..%2fetc", {}, 404, "unknown_job"),
    ("33 NUL", "GET", "/jobs/%00/info", {}, 404, "unknown_job"),
    ("33 CR LF", "GET", "/jobs/%0d%0aX: y/info", {}, 404, "unknown_job"),
    ("33 unknown URL", "GET", "/nothing/here", {}, 404, "not_found"),
    ("33 bad UTF-8 in the path", "GET", "/jobs/%ff%fe", {}, 404, "unknown_job"),
    ("37 unknown type", "POST", "/run/resise", JSON, 404, "unknown_type"),
    ("37 dots", "POST", "/run/os.system", JSON, 404, "unknown_type"),
    ("37 slash", "POST", "/run/a%2fb", JSON, 404, "unknown_type"),
    ("37 long", "GET", "/types/" + "x" * 8000, {}, 404, "unknown_type"),
    ("42 twice", "GET", "/jobs?limit=1&limit=2", {}, 400, "invalid_parameter"),
    ("42 unknown", "GET", "/jobs?limt=1", {}, 400, "invalid_parameter"),
    ("42 unknown on a submit", "POST", "/run/noop?dealy=1", JSON, 400, "invalid_parameter"),
    ("49 limit 0", "GET", "/jobs?limit=0", {}, 400, "invalid_parameter"),
    ("49 limit -1", "GET", "/jobs?limit=-1", {}, 400, "invalid_parameter"),
    ("49 limit 10^9", "GET", "/jobs?limit=1000000000", {}, 400, "invalid_parameter"),
    ("49 Arabic digits", "GET", "/jobs?limit=%D9%A1%D9%A0", {}, 400, "invalid_parameter"),
    ("49 bad cursor", "GET", "/jobs?cursor=!!", {}, 400, "invalid_parameter"),
    ("49 forged cursor", "GET", "/jobs?cursor=AAAAAAAAAAAAAAAAMTA", {}, 400, "invalid_parameter"),
    ("50 regular expression", "GET", "/jobs?state=(a%2B)%2B%24", {}, 400, "invalid_parameter"),
    ("50 unknown type as a filter", "GET", "/jobs?type=x%27%20OR%201", {}, 400, "invalid_parameter"),
    ("51 sort", "GET", "/jobs?sort=__dict__", {}, 400, "invalid_parameter"),
    ("39 delay -1", "POST", "/run/noop?delay=-1", JSON, 400, "invalid_parameter"),
    ("39 delay 10^12", "POST", "/run/noop?delay=1000000000000", JSON, 400, "invalid_parameter"),
    ("39 delay 1h", "POST", "/run/noop?delay=1h", JSON, 400, "invalid_parameter"),
    ("41 priority -1", "POST", "/run/noop?priority=-1", JSON, 400, "invalid_parameter"),
    ("41 priority 2^32", "POST", "/run/noop?priority=4294967296", JSON, 400, "invalid_parameter"),
    ("41 priority 3.7", "POST", "/run/noop?priority=3.7", JSON, 400, "invalid_parameter"),
    ("41 priority in Arabic", "POST", "/run/noop?priority=%D9%A3", JSON, 400, "invalid_parameter"),
    ("43 year 9999", "POST", "/run/noop?notBefore=9999-01-01T00:00:00Z", JSON, 400, "invalid_parameter"),
    ("43 no zone", "POST", "/run/noop?notBefore=2026-12-01T00:00:00", JSON, 400, "invalid_parameter"),
    ("43 leap second", "POST", "/run/noop?notBefore=2026-12-31T23:59:60Z", JSON, 400, "invalid_parameter"),
    ("43 24:00", "POST", "/run/noop?notBefore=2026-12-01T24:00:00Z", JSON, 400, "invalid_parameter"),
    ("both", "POST", "/run/noop?delay=1&notBefore=2026-12-01T00:00:00Z", JSON, 400, "invalid_parameter"),
    ("foreign origin", "POST", f"/jobs/{NIL}/cancel", {"Origin": "http://evil.example"}, 403, "cross_origin"),
    ("null origin", "DELETE", f"/jobs/{NIL}", {"Origin": "null"}, 403, "cross_origin"),
    ("cross-site", "POST", "/run/noop", {**JSON, "Sec-Fetch-Site": "cross-site"}, 403, "cross_origin"),
    ("57 query is no UTF-8", "GET", "/jobs?type=%ff", {}, 400, "invalid_parameter"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "code"), [row[1:] for row in REQUESTS], ids=[row[0] for row in REQUESTS]
)
def test_a_bad_request_is_refused_and_leaves_nothing(
    server: Deployment, method: str, path: str, headers: dict[str, str], status: int, code: str
) -> None:
    before = stored(server)
    body = b"{}" if method in ("POST", "PUT") else None
    answer = server.client.request(method, path, content=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert "Traceback" not in answer.text
    if status == 405:
        assert "OPTIONS" in answer.headers["Allow"]
    if code == "invalid_parameter":
        assert answer.json()["errors"][0]["parameter"]
    assert stored(server) == before


def test_malformed_and_unknown_uuids_have_the_same_body(server: Deployment) -> None:
    bodies = {server.client.get(f"/jobs/{one}").text for one in (NIL, "nonsense", "{" + NIL + "}", "%00")}
    assert len(bodies) == 1


def test_an_upper_case_uuid_is_the_same_job(server: Deployment) -> None:
    uuid = server.submit("noop")
    answer = server.client.get(f"/jobs/{uuid.upper()}")
    assert answer.json()["uuid"] == uuid


# Framing: what no client library sends


def raw(server: Deployment, request: bytes, seconds: float = 15.0) -> bytes:
    """Send bytes and return everything that comes until the server closes the connection or is silent."""
    with socket.create_connection(("127.0.0.1", server.port), 5) as end:
        with suppress(OSError):
            end.sendall(request)
        end.settimeout(seconds)
        answer = b""
        with suppress(OSError):
            while piece := end.recv(65536):
                answer += piece
        return answer


HOST = b"Host: 127.0.0.1\r\n"
FRAMING: list[tuple[str, bytes, tuple[bytes, ...]]] = [
    ("25 length and chunked", b"POST /run/noop HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", (b"400",)),
    ("25 two lengths", b"POST /run/noop HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}x", (b"400",)),
    ("25 folded header", b"GET /jobs HTTP/1.1\r\n" + HOST + b"X-A: a\r\n b\r\n\r\n", (b"400",)),
    ("26 header of 20 KiB", b"GET /jobs HTTP/1.1\r\n" + HOST + b"X-A: " + b"a" * 20480 + b"\r\n\r\n", (b"400", b"431", b"")),
    ("24 CONNECT", b"CONNECT example.com:80 HTTP/1.1\r\n" + HOST + b"\r\n", (b"405", b"404", b"400")),
    ("25 no HTTP", b"hello\r\n\r\n", (b"400", b"")),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "statuses"), [row[1:] for row in FRAMING], ids=[row[0] for row in FRAMING])
def test_bad_framing_ends_the_connection(server: Deployment, request_: bytes, statuses: tuple[bytes, ...]) -> None:
    before = stored(server)
    answer = raw(server, request_)
    status = answer.split(b" ")[1] if answer else b""
    assert status in statuses, answer[:200]
    assert b"Traceback" not in answer
    assert stored(server) == before


def head(length: bytes, extra: bytes = b"") -> bytes:
    return (
        b"POST /run/strict HTTP/1.1\r\n"
        + HOST
        + b"Content-Type: application/json\r\n"
        + length
        + b"\r\n"
        + extra
        + b"\r\n"
    )


def test_16_a_body_over_the_limit_is_413_and_its_client_can_read_that(server: Deployment) -> None:
    body = b"x" * 400_000
    answer = raw(server, head(b"Content-Length: 400000") + body, 5)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'"body_too_large"' in answer
    assert b"100 Continue" not in answer and b"100 (Continue)" not in answer


def test_16_nothing_is_read_of_a_body_that_is_announced_too_large(server: Deployment) -> None:
    start = time.monotonic()
    answer = raw(server, head(b"Content-Length: 99999999999", b"Expect: 100-continue\r\n"), 5)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"100 (Continue)" not in answer
    assert time.monotonic() - start < 4


def test_16_a_body_of_exactly_the_limit_is_read(server: Deployment) -> None:
    body = b'{"number": 1, "anything": {"a": "' + b"a" * (64 * 1024 - 36) + b'"}}'
    assert len(body) == 64 * 1024
    assert server.client.post("/run/strict", content=body, headers=JSON).status_code == 202
    assert server.client.post("/run/strict", content=body + b" ", headers=JSON).status_code == 413


def test_17_a_chunked_body_over_the_limit_is_413_at_the_limit(server: Deployment) -> None:
    chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    start = time.monotonic()
    answer = raw(server, head(b"Transfer-Encoding: chunked") + chunk * 6, 10)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'"body_too_large"' in answer
    assert time.monotonic() - start < 8


def test_18_a_header_that_does_not_come_ends_the_connection(server: Deployment) -> None:
    start = time.monotonic()
    answer = raw(server, b"GET /jobs HTTP/1.1\r\nHost: 127", 20)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - start < 10


def test_18_a_body_that_drips_ends_the_connection(server: Deployment) -> None:
    before = stored(server)
    start = time.monotonic()
    answer = raw(server, head(b"Content-Length: 100") + b'{"number"', 30)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408")
    assert 8 < time.monotonic() - start < 20
    assert stored(server) == before


def test_23_a_get_with_a_body_is_answered(server: Deployment) -> None:
    assert server.client.request("GET", "/jobs", content=b"ignored").status_code == 200


def test_24_head_answers_as_get_and_options_lists_the_methods(server: Deployment) -> None:
    answer = server.client.head("/jobs")
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["Content-Length"]) > 0
    answer = server.client.options("/run/noop")
    assert (answer.status_code, answer.headers["Allow"]) == (204, "POST, OPTIONS")
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_38_methods_are_refused_before_bodies_are_read(server: Deployment) -> None:
    # The order of errors: 405 before 413 before 406 before 404 of the type before 415 before 400 before 422.
    big = b"x" * 70_000
    client = server.client
    assert client.put("/run/nothing", content=big).status_code == 405
    assert client.post("/run/nothing", content=big, headers={"Accept": "text/csv"}).status_code == 413
    assert client.post("/run/nothing", content=b"{", headers={"Accept": "text/csv"}).status_code == 406
    assert client.post("/run/nothing", content=b"{").status_code == 404
    assert client.post("/run/strict?x=1", content=b"{").status_code == 415
    assert client.post("/run/strict?x=1", content=b"{", headers=JSON).json()["code"] == "invalid_parameter"
    assert client.post("/run/strict", content=b"{", headers=JSON).json()["code"] == "invalid_json"


@pytest.mark.requirement("G20")
def test_errors_are_negotiated_and_fall_back_to_json(server: Deployment) -> None:
    page = server.client.get("/nothing", headers={"Accept": "text/html"})
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "<h1>404" in page.text
    plain = server.client.get("/nothing", headers={"Accept": "image/png"})
    assert plain.headers["Content-Type"] == "application/problem+json"


def test_60_what_jobs_and_clients_say_is_escaped_on_pages(server: Deployment) -> None:
    evil = "<script>alert(1)</script>\"onmouseover='x'"
    uuid = server.submit("strict", {"number": 1, "anything": {evil: evil}})
    page = server.client.get(f"/jobs/{uuid}", headers={"Accept": "text/html"})
    assert "<script>" not in page.text
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert server.client.get(f"/jobs/{uuid}").headers["X-Content-Type-Options"] == "nosniff"


def test_66_secrets_are_never_shown(server: Deployment) -> None:
    secret = "hunter2-öß"
    uuid = server.submit("secret", {"login": {"user": "u", "password": secret}, "token": "tok-" + secret})
    record = server.job(uuid)
    assert record["parameters"] == {"login": {"user": "u", "password": "*" * 10}, "token": "*" * 10, "wrong": False}
    refused = server.client.post("/run/secret", json={"login": {"user": "u", "password": [secret]}})
    assert refused.status_code == 422
    for text in (json.dumps(record), refused.text, server.log("server")):
        assert "hunter2" not in text


@pytest.mark.requirement("G8")
def test_26_two_keys_are_refused_and_leave_nothing(server: Deployment) -> None:
    newest = server.client.get("/jobs?limit=1").json()["items"]
    keys = [("Idempotency-Key", "first"), ("Idempotency-Key", "second")]
    answer = server.client.post("/run/noop", json={}, headers=keys)
    assert (answer.status_code, answer.json()["parameter"]) == (400, "Idempotency-Key")
    assert server.client.get("/jobs?limit=1").json()["items"] == newest


def test_47_a_key_gives_one_job_and_refuses_other_content(server: Deployment) -> None:
    headers = {"Idempotency-Key": "key-1"}
    first = server.client.post("/run/sleep?delay=2", json={"seconds": 1}, headers=headers)
    again = server.client.post("/run/sleep?delay=2", content=b'{ "seconds" : 1.0 }', headers={**headers, **JSON})
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json()["uuid"] == first.json()["uuid"]
    assert again.headers["Location"] == first.headers["Location"]
    assert (first.headers.get("Idempotency-Replayed"), again.headers["Idempotency-Replayed"]) == (None, "true")
    for path, body in (("/run/sleep?delay=2", {"seconds": 2}), ("/run/sleep", {"seconds": 1}), ("/run/noop", {})):
        other = server.client.post(path, json=body, headers=headers)
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    refused = server.client.post("/run/sleep", json={"seconds": "x"}, headers={"Idempotency-Key": "key-2"})
    assert refused.status_code == 422
    assert server.client.post("/run/sleep", json={}, headers={"Idempotency-Key": "key-2"}).status_code == 202


def test_47_many_requests_with_one_key_at_once_give_one_job(server: Deployment) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def post(_: int) -> httpx.Response:
        return httpx.post(f"{server.url}/run/noop", json={}, headers={"Idempotency-Key": "at-once"})

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(post, range(32)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["uuid"] for answer in answers}) == 1
    assert sum("Idempotency-Replayed" not in answer.headers for answer in answers) == 1


def test_52_a_cancel_of_a_queued_job_is_200_also_twice(server: Deployment) -> None:
    uuid = server.submit("noop")
    answers = [server.client.post(f"/jobs/{uuid}/cancel"), server.client.delete(f"/jobs/{uuid}")]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["state"] == "cancelled"
    assert server.client.get(f"/jobs/{uuid}/data").json()["code"] == "job_cancelled"


def test_27_a_probe_may_name_any_host(server: Deployment) -> None:
    for path in ("/healthz", "/readyz"):
        assert server.client.get(path, headers={"Host": "10.1.2.3:8888"}).status_code == 200
