"""``/openapi.json``: OpenAPI 3.1, generated from the table of routes, the endpoints and the job types."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import zerog
from zerog import views
from zerog.exceptions import ZerogError, tree
from zerog.record import State
from zerog.registry import Registry
from zerog.server.endpoint import ANY, EVENTS, HTML, JSON, PROBLEM, Answer, Endpoint, Parameter, RunParameter
from zerog.server.problems import problems
from zerog.server.run import Run
from zerog.server.schemas import AGENT, NEEDS, of_agents


def _object(properties: Mapping[str, Any], required: Iterable[str] | None = None) -> dict[str, Any]:
    names = list(properties) if required is None else list(required)
    return {"type": "object", "properties": dict(properties), "required": names}


def _nullable(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": [kind, "null"], **more}


_TIME = {"type": "string", "format": "date-time"}
_COUNT = {"type": "integer", "minimum": 0}
_HREF = {"type": "string", "format": "uri-reference"}

_PROGRESS: dict[str, Any] = {
    "uuid": {"type": "string", "format": "uuid"},
    "jobType": {"type": "string"},
    "state": {"type": "string", "enum": [state.value for state in State]},
    "cancelling": {"type": "boolean"},
    "completeness": {"type": "number", "minimum": 0, "maximum": 1},
    "resultCode": {"type": "integer", "description": "-1 until the job has ended"},
    "message": _nullable("string"),
    "reason": _nullable("string"),
    "attempt": _COUNT,
    "updatedAt": _TIME,
    "href": _HREF,
}
_ACCEPTED = {**_PROGRESS, "status": {"type": "integer", "const": 202}, "replayed": {"type": "boolean"}}
_ITEM = {**_PROGRESS, "number": {"type": "integer", "minimum": 0}, "createdAt": _TIME}
_TIMES = {"startedAt": _nullable("string", format="date-time"), "finishedAt": _nullable("string", format="date-time")}
_COUNTERS = _object({"errors": _COUNT, "crashes": _COUNT, "losses": _COUNT})
_REFERENCE = _object({"href": _HREF})
_PROBLEM = {"$ref": "#/components/schemas/Problem"}
#: How many there are is null where nobody has counted them.
_COUNTED = _object(
    {"href": _HREF, "count": _nullable("integer"), "items": {"type": "array", "items": _object(_ITEM)}},
    ("href", "count"),
)
_EVENT: dict[str, Any] = {
    "number": _COUNT,
    "at": _TIME,
    "level": {"type": "string", "enum": ["event", "warning", "error"]},
    "attempt": _COUNT,
    "message": {"type": "string"},
    "code": _nullable("integer"),
    "source": {"type": "string", "enum": ["stdout", "stderr"]},
    "traceback": _nullable("string"),
    "reason": _nullable("string"),
}
_REQUIRED = ("number", "at", "attempt", "message", "code")
_ENTRIES = {"type": "array", "items": _object(_EVENT, _REQUIRED)}
_QUEUE = {**_object(dict.fromkeys(("ready", "reserved", "delayed", "buried"), _COUNT)), "type": ["object", "null"]}
_PAUSED = {
    **_object({"by": {"type": "string"}, "at": _TIME, "message": _nullable("string")}),
    "type": ["object", "null"],
}
_EXPLANATION = {
    "href": _HREF,
    "uuid": {"type": "string", "format": "uuid"},
    "jobType": {"type": "string"},
    "state": {"type": "string", "enum": [state.value for state in State]},
    "reason": {"type": "string", "enum": list(views.WHY)},
    "message": _nullable("string"),
    "agent": _nullable("string"),
    "seconds": {"type": "number", "minimum": 0},
    "parents": {"type": "array", "items": _REFERENCE},
    "by": {"type": "string"},
    "at": _TIME,
    "notBefore": _TIME,
    "ahead": _nullable("integer", minimum=0),
    "needs": NEEDS,
    "unmet": {"type": "object"},
}
_RETRIED = {
    "job": _REFERENCE,
    "status": {"type": "integer"},
    "code": {"type": "string"},
    "detail": {"type": "string"},
    "retried": _REFERENCE,
}
_TYPE = {
    "jobType": {"type": "string"},
    "description": {"type": "string"},
    "schema": {"type": "object"},
    "example": {"type": "object"},
    "curl": {"type": "string"},
    "queue": _QUEUE,
    "paused": _PAUSED,
    "href": _HREF,
}


_WAITING = {
    "jobType": {"type": "string"},
    "href": _HREF,
    "queue": _QUEUE,
    "ageSeconds": _nullable("number", minimum=0),
    "paused": _PAUSED,
}


def _page(item: Mapping[str, Any]) -> dict[str, Any]:
    return _object({"items": {"type": "array", "items": dict(item)}, "next": _nullable("string"), "href": _HREF})


def _problem() -> dict[str, Any]:
    fault = {
        "pointer": {"type": "string"},
        "parameter": {"type": "string"},
        "code": {"type": "string"},
        "detail": {"type": "string"},
    }
    text = {"type": "string"}
    return _object(
        {
            "type": _HREF,
            "title": text,
            "status": {"type": "integer"},
            "code": {**text, "examples": sorted({error.code for error in tree(ZerogError)})},
            "detail": text,
            "message": text,
            "errors": {"type": "array", "items": _object(fault, ["code", "detail"])},
        }
    )


def _schemas() -> dict[str, Any]:
    whole = {
        **_ITEM,
        "parameters": {"type": "object"},
        "priority": _COUNT,
        "notBefore": _nullable("string", format="date-time"),
        **_TIMES,
        "counters": _COUNTERS,
        "agent": _nullable("string"),
        "limits": NEEDS,
        "failedOn": {"type": "array", "items": {"type": "string"}},
        "revision": _COUNT,
        "parents": {"type": "array", "items": _REFERENCE},
        "relationships": _REFERENCE,
        "retriedFrom": {**_REFERENCE, "type": ["object", "null"]},
        "result": {
            **_object({"mediaType": {"type": "string"}, "size": _COUNT, "href": _HREF}),
            "type": ["object", "null"],
        },
    }
    info = {
        **_PROGRESS,
        "createdAt": _TIME,
        **_TIMES,
        "counters": _COUNTERS,
        "agent": _nullable("string"),
        "dropped": _object({"events": _COUNT, "bytes": _COUNT}),
        **dict.fromkeys(("events", "warnings", "errors"), _ENTRIES),
    }
    text = {"type": "string"}
    start = {
        "service": text, "version": text, "href": _HREF, "jobs": _REFERENCE, "types": _REFERENCE,
        "openapi": _REFERENCE, "queue": _REFERENCE, "running": {"type": "array", "items": _object(_ITEM)},
        "newest": {"type": "array", "items": _object(_ITEM)},
    }  # fmt: skip
    return {
        "Progress": _object(_PROGRESS),
        "Job": _object(whole),
        "Jobs": _page(_object(_ITEM)),
        "Info": _object(info),
        "Events": _page(_object(_EVENT, _REQUIRED)),
        "Type": _object(_TYPE),
        "Types": _page(_object(_TYPE)),
        "Explanation": _object(_EXPLANATION, ("href", "uuid", "jobType", "state", "reason", "message")),
        "Retries": _object({"items": {"type": "array", "items": _object(_RETRIED, ("job", "status"))}, "href": _HREF}),
        "Pruned": _object({"pruned": _COUNT, "next": _nullable("integer"), "href": _HREF}),
        "Start": _object(start),
        "Relationships": _object({"href": _HREF, "parents": _COUNTED, "children": _COUNTED}),
        "Queue": _object(
            {"href": _HREF, "available": {"type": "boolean"}, "items": {"type": "array", "items": _object(_WAITING)}}
        ),
        "Status": _status(),
        "Batch": _object(
            {"items": {"type": "array", "items": {"anyOf": [_object(_ACCEPTED), _problem()]}}, "href": _HREF}
        ),
        "Health": _object({"status": text}),
        "Ready": _object({"status": text, "store": text, "queue": text}),
        "Description": {"type": "object"},
        **of_agents(),
        "Problem": _problem(),
    }


def _status() -> dict[str, Any]:
    text, number = {"type": "string"}, {"type": "number", "minimum": 0}
    names = {"type": "array", "items": text}
    load = {"requests": _nullable("integer"), "exceptions": _nullable("integer"), "averageSeconds": _nullable("number")}
    process = {
        "pid": _COUNT, "host": text, "start": _TIME, "uptime": number, "memory": _COUNT, "cpu": number,
        "threads": _COUNT, "version": text,
    }  # fmt: skip
    endpoint = {"name": text, "url": text, "methods": names, "required": names, "optional": names}
    of_type = {"jobType": text, "queue": _QUEUE, "paused": {"type": "boolean"}, "href": _HREF}
    statistics = {
        **load,
        "byEndpoint": {"type": ["object", "null"], "additionalProperties": _object(load)},
        "byStatus": {"type": ["object", "null"], "additionalProperties": _COUNT},
        "since": _nullable("string", format="date-time"),
        "store": _object({"kind": text, "available": {"type": "boolean"}}),
    }
    return _object(
        {
            "href": _HREF,
            "service": text,
            "process": _object(process),
            "configuration": {"type": "object", "additionalProperties": _object({"value": {}, "source": text})},
            "endpoints": {"type": "array", "items": _object(endpoint)},
            "statistics": _object(statistics),
            "queue": _object({"available": {"type": "boolean"}, "items": {"type": "array", "items": _object(of_type)}}),
            "agents": _object(
                {
                    "items": {"type": "array", "items": AGENT},
                    "states": {"type": "object", "additionalProperties": _COUNT},
                }
            ),
        }
    )


class Description(Endpoint):
    """The description of this service in OpenAPI 3.1."""

    name = "openapi"
    url = "/openapi.json"
    offers = (JSON, "application/vnd.oai.openapi+json")
    responses = {"GET": {200: ("this description", "Description")}}

    async def get(self) -> Answer:
        """Send the description."""
        services = self.services
        names = [name for name in services.registry.names if self.sees(name)]
        known = Known(services.registry, names, services.run_parameters, services.tokens.on)
        return Answer(describe(services.endpoints, known))


@dataclass(frozen=True)
class Known:
    """What a description is made of beside the endpoints: the job types ``names``, the parameters that applications add
    to submits, and whether tokens are on (``closed``).  ``schemas`` are the components as far as they are known."""

    registry: Registry
    names: Sequence[str]
    run_parameters: Sequence[RunParameter] = ()
    closed: bool = False
    schemas: dict[str, Any] = field(default_factory=lambda: _schemas())


def describe(endpoints: Sequence[type[Endpoint]], known: Known) -> dict[str, Any]:
    """Return the description of endpoints and job types."""
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        if endpoint.url == "/run/{jobType}":
            for name in known.names:
                schema_name = "Parameters." + name
                known.schemas[schema_name] = _lift(known.registry.schema(name), schema_name, known.schemas)
                paths[f"/run/{name}"] = _path(endpoint, known, name)
        paths[endpoint.url] = _path(endpoint, known)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ZeroG",
            "version": zerog.__version__,
            "description": "A job server: POST a job, poll its progress, fetch its data.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": known.schemas,
            "responses": _refusals(endpoints),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "what zerog token create prints"}
            },
        },
    }


def _lift(schema: Mapping[str, Any], name: str, schemas: dict[str, Any]) -> dict[str, Any]:
    """Move a schema's own definitions among the components, under the name of the type that has them."""

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: _reference(item, name) if key == "$ref" else moved(item) for key, item in value.items()}
        if isinstance(value, list):
            return [moved(item) for item in value]
        return value

    body = {key: value for key, value in schema.items() if key != "$defs"}
    for definition, content in schema.get("$defs", {}).items():
        schemas[f"{name}.{definition}"] = moved(content)
    lifted: dict[str, Any] = moved(body)
    return lifted


def _reference(target: str, name: str) -> str:
    return target.replace("#/$defs/", f"#/components/schemas/{name}.")


def _path(endpoint: type[Endpoint], known: Known, job_type: str | None = None) -> dict[str, Any]:
    operations = {}
    for method in endpoint.methods():
        operation = _operation(endpoint, method, known, job_type)
        anybody = endpoint.public or not known.closed
        roles = endpoint.needed_roles(method)
        operation["security"] = [*({"bearer": [role]} for role in roles), *([{}] if anybody else [])]
        operations[method.lower()] = operation
    return operations


def _operation(endpoint: type[Endpoint], method: str, known: Known, job_type: str | None) -> dict[str, Any]:
    summary = (getattr(endpoint, method.lower()).__doc__ or endpoint.__doc__ or endpoint.name).strip().split("\n")[0]
    suffix = f"_{job_type.replace('-', '_')}" if job_type else ""
    name = f"{method.lower()}_{re.sub(r'[^a-z]+', '_', endpoint.name)}{suffix}"
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": summary,
        "parameters": _parameters(endpoint, method, known, job_type, name),
        "responses": _responses(endpoint, method),
    }
    if endpoint.reads_json(method):
        schema: dict[str, Any] = {"$ref": f"#/components/schemas/Parameters.{job_type}"}
        if job_type is None:
            model = endpoint.bodies.get(method) or endpoint.model(method)
            schema = (
                ({} if method in endpoint.any_json else {"type": "object"})
                if model is None
                else _lift(model.model_json_schema(), name, known.schemas)
            )
            if endpoint.many:
                schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": endpoint.many}
        content: dict[str, Any] = {"schema": schema}
        if job_type is not None:
            content["example"] = known.registry.describe(job_type)["example"]
        operation["requestBody"] = {"required": method not in endpoint.body_optional, "content": {JSON: content}}
    return operation


def _parameters(
    endpoint: type[Endpoint], method: str, known: Known, job_type: str | None, name: str
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for part in re.findall(r"\{(\w+)\}", endpoint.url):
        if part == "jobType":
            if job_type is not None:
                continue
            schema: dict[str, Any] = {"type": "string", "enum": list(known.names)}
        else:
            schema = {"type": "string", "format": "uuid"} if part == "uuid" else {"type": "string"}
        found.append({"name": part, "in": "path", "required": True, "schema": schema})
    found += _of_model(endpoint, method, known, name)
    found += [_parameter("query", one) for one in endpoint.query_parameters(method)]
    if issubclass(endpoint, Run):
        found += [_parameter("query", one.parameter()) for one in known.run_parameters]
    return found + [_parameter("header", one) for one in endpoint.headers.get(method, ())]


def _parameter(place: str, parameter: Parameter) -> dict[str, Any]:
    schema = dict(parameter.schema)
    return {
        "name": parameter.name,
        "in": place,
        "required": parameter.required,
        "description": parameter.description,
        "schema": {"type": "array", "items": schema} if parameter.repeated else schema,
    }


def _of_model(endpoint: type[Endpoint], method: str, known: Known, name: str) -> list[dict[str, Any]]:
    """Return the parameters in the query that an application's endpoint describes by a model."""
    model = endpoint.model(method)
    if model is None or endpoint.reads_json(method):
        return []
    schema = _lift(model.model_json_schema(), name, known.schemas)
    in_path = re.findall(r"\{(\w+)\}", endpoint.url)
    return [
        {
            "name": member,
            "in": "query",
            "required": member in schema.get("required", ()),
            "description": described.get("description", ""),
            "schema": described,
        }
        for member, described in schema.get("properties", {}).items()
        if member not in in_path
    ]


def _responses(endpoint: type[Endpoint], method: str) -> dict[str, Any]:
    described = endpoint.responses.get(method, {})
    responses = {str(status): _response(endpoint, status, *what) for status, what in described.items()}
    if not responses:
        responses["200"] = {"description": "the answer", "content": {offer: {} for offer in endpoint.offers}}
    for status, codes in problems(endpoint, method).items():
        answer = responses.setdefault(str(status), {"$ref": f"#/components/responses/{_name(status, codes)}"})
        if "content" in answer:
            answer["content"] = {**_refusal(codes)["content"], **answer["content"]}
    responses["default"] = {"$ref": "#/components/responses/Problem"}
    return responses


def _refusals(endpoints: Iterable[type[Endpoint]]) -> dict[str, Any]:
    """Return the responses that are problems, each once however many operations answer it."""
    any_other = {PROBLEM: {"schema": _PROBLEM}, HTML: {"schema": {"type": "string"}}}
    found: dict[str, Any] = {"Problem": {"description": "any other error, as a problem document", "content": any_other}}
    for endpoint in endpoints:
        for method in endpoint.methods():
            for status, codes in problems(endpoint, method).items():
                found[_name(status, codes)] = _refusal(codes)
    return found


def _name(status: int, codes: Sequence[str]) -> str:
    """Return the name of a response that is a problem with one of some codes."""
    return f"Problem{status}.{codes[0] if len(codes) == 1 else views.digest(','.join(codes).encode())[:8]}"


def _refusal(codes: Sequence[str]) -> dict[str, Any]:
    """Return the response that is a problem with one of some codes."""
    schema = {"allOf": [_PROBLEM, {"properties": {"code": {"enum": list(codes)}}}]}
    return {
        "description": "a problem: " + ", ".join(codes),
        "content": {PROBLEM: {"schema": schema}, HTML: {"schema": {"type": "string"}}},
    }


def _response(endpoint: type[Endpoint], status: int, description: str, schema: str | None) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": description}
    if schema is None:
        return answer
    if schema == "Bytes":
        offer = endpoint.offers[0]
        answer["content"] = {offer: {}}
        return answer
    content: dict[str, Any] = {}
    types = endpoint.offers if endpoint.offers != ANY else (JSON, HTML)
    for media_type in types:
        if media_type in (HTML, EVENTS):
            content[media_type] = {"schema": {"type": "string"}}
        else:
            content[media_type] = {"schema": {"$ref": f"#/components/schemas/{schema}"}}
    answer["content"] = content
    return answer
