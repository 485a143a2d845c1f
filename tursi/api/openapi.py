"""The OpenAPI 3.1 document, made from the endpoints' contracts and the faces' routes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

import msgspec

from tursi.api.endpoint import Contract, is_time
from tursi.api.messages import Document
from tursi.faces.huggingface.errors import PipelineError
from tursi.faces.openai.errors import ErrorBody
from tursi.faces.route import Kept, Route
from tursi.model import Role, Scope

_REFERENCE = "#/components/schemas/{name}"
PART = re.compile(r"<(?:\w+:)?(\w+)>")
"""A part of a path in werkzeug's syntax."""
_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key of `tursi keys create`."},
    "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
}
_STREAM = {"schema": {"type": "string"}}


def document(
    version: str,
    handlers: Iterable[tuple[Contract, Callable[..., Any]]],
    routes: Iterable[Route],
) -> Document:
    """The description of ``handlers`` (with their contracts) and ``routes``."""
    handlers, routes = list(handlers), list(routes)
    types: list[Any] = [ErrorBody, PipelineError, Kept]
    for contract, _ in handlers:
        types += [each for each in (contract.body, contract.query) if each is not None]
        types += [*contract.replies, *([contract.follow] if contract.follow is not None else [])]
    for route in routes:
        types += [*route.body, *route.reply]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    described = _Schemas(types, schemas)
    paths: dict[str, dict[str, Any]] = {}
    for contract, handler in handlers:
        path = PART.sub(r"{\1}", contract.path)
        paths.setdefault(path, {})[contract.method.lower()] = _endpoint(
            contract, handler, described, components
        )
    for route in routes:
        paths.setdefault(route.path, {})["post"] = _route(route, described)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tursi",
            "version": version,
            "summary": "Deploys, serves and supervises Hugging Face models.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "paths": paths,
        "components": {
            "schemas": {name: _timed(one) for name, one in components.items()},
            "securitySchemes": _SCHEMES,
        },
    }


class _Schemas:
    """The schema of each type."""

    def __init__(self, types: list[Any], schemas: tuple[dict[str, Any], ...]) -> None:
        self._types = types
        self._schemas = schemas

    def of(self, *types: Any) -> dict[str, Any]:
        """The schema of one of ``types``."""
        found = [_timed(self._schemas[self._types.index(each)]) for each in types]
        return found[0] if len(found) == 1 else {"anyOf": found}


def _endpoint(
    contract: Contract,
    handler: Callable[..., Any],
    schemas: _Schemas,
    components: dict[str, Any],
) -> dict[str, Any]:
    tag = contract.role.value if contract.role is not None else "description"
    content: dict[str, Any]
    if contract.reply is bytes:
        content = {contract.media: {"schema": {"type": "string"}}}
    else:
        content = {contract.media: {"schema": schemas.of(*contract.replies)}}
    if contract.follow is not None:
        content["text/event-stream"] = _STREAM
    operation: dict[str, Any] = {
        "operationId": f"{handler.__self__.__class__.__name__}.{handler.__name__}",  # type: ignore[attr-defined]
        "summary": _summary(handler),
        "tags": [tag],
        "security": _security(contract.scope, contract.role),
        "responses": {
            **{
                str(each): {"description": _meaning(each), "content": content}
                for each in contract.statuses
            },
            "default": _error(schemas, ErrorBody),
        },
    }
    parameters = [
        _parameter("path", name, {"type": "string"}) for name in PART.findall(contract.path)
    ]
    if contract.query is not None:
        query = components[contract.query.__name__]
        parameters += [
            _parameter("query", name, schema) for name, schema in query["properties"].items()
        ]
    if parameters:
        operation["parameters"] = parameters
    if contract.upload is not None:
        schema = {"schema": {"type": "string"}}
        operation["requestBody"] = {"required": True, "content": {contract.upload: schema}}
    if contract.body is not None:
        operation["requestBody"] = _json(schemas.of(contract.body), required=True)
    return operation


def _meaning(status: int) -> str:
    return HTTPStatus(status).phrase


def _parameter(place: str, name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": schema}


def _route(route: Route, schemas: _Schemas) -> dict[str, Any]:
    error = ErrorBody if route.name.startswith("openai.") else PipelineError
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "tags": ["inference"],
        "security": _security(Scope.INFER, Role.INFERENCE),
        "requestBody": _json({"allOf": [schemas.of(*route.body), schemas.of(Kept)]}, required=True),
        "responses": {
            "200": {
                "description": "Success",
                "content": {
                    "application/json": {"schema": schemas.of(*route.reply)},
                    "text/event-stream": _STREAM,
                },
            },
            "default": _error(schemas, error),
        },
    }
    if route.model == "path":
        operation["parameters"] = [_parameter("path", "name", {"type": "string"})]
    return operation


def _security(scope: Scope | None, role: Role | None) -> list[dict[str, list[str]]]:
    """What a client has to send; on the control socket, nothing."""
    if scope is None:
        return []
    # Where other machines can't come, inference and metrics need no key by default.
    free: list[dict[str, list[str]]] = [] if role is Role.CONTROL else [{}]
    return [{"bearer": [scope.value]}, {"header": [scope.value]}, *free]


def _error(schemas: _Schemas, kind: Any) -> dict[str, Any]:
    return {"description": "Why not", **_json(schemas.of(kind))}


def _json(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**more, "content": {"application/json": {"schema": schema}}}


def _summary(handler: Callable[..., Any]) -> str:
    return (handler.__doc__ or "").strip().splitlines()[0]


def _timed(schema: Any) -> Any:
    """``schema`` with points in time as they are sent: RFC 3339 strings."""
    if isinstance(schema, list):
        return [_timed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: _timed(each) for name, each in schema.items()}
    for name, each in found.get("properties", {}).items():
        if is_time(name) and isinstance(each, dict):
            time = {"type": "string", "format": "date-time"}
            nullable = any(one == {"type": "null"} for one in each.get("anyOf", ()))
            found["properties"][name] = (
                {"anyOf": [time, {"type": "null"}], "default": None} if nullable else time
            )
    return found
