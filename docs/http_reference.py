"""The directive ``http-reference``: the routes, from the daemon's OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

JsonSchema = Mapping[str, Any]


def description() -> dict[str, Any]:
    """The OpenAPI document, without a daemon."""
    from twisted.internet.task import Clock

    from tursi import __version__
    from tursi.api import Front, Info, Keys
    from tursi.api.openapi import document
    from tursi.config import Configuration
    from tursi.faces import TABLE

    info = Info(version=__version__, pid=0, started_at=0.0, state="", listeners=())
    # Describing the routes asks nothing of a fleet.
    nobody: Any = None
    clock = Clock()
    front = Front(nobody, info, Configuration(), clock, Keys(nobody, clock))
    return document(__version__, front.handlers, TABLE)


def render(document: Mapping[str, Any]) -> str:
    """The routes as reStructuredText, grouped by the role that answers them."""
    groups: dict[str, list[str]] = {}
    components = document["components"]["schemas"]
    for path, operations in sorted(document["paths"].items()):
        for method, operation in operations.items():
            entry = "\n".join(_operation(method, path, operation, components))
            groups.setdefault(operation["tags"][0], []).append(entry)
    return "\n\n".join(
        "\n\n".join((_heading(f"Role: {role}", "-"), *entries))
        for role, entries in sorted(groups.items())
    )


def _heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}"


def _operation(
    method: str, path: str, operation: Mapping[str, Any], components: Mapping[str, JsonSchema]
) -> Iterator[str]:
    yield _heading(f"``{method.upper()} {path}``", "~")
    yield ""
    yield operation["summary"].rstrip(".") + "."
    yield ""
    scopes = [scope for one in operation["security"] for each in one.values() for scope in each]
    if scopes:
        yield f"Scope: ``{scopes[0]}``."
        yield ""
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "query":
            yield _field(parameter["name"], parameter["schema"], required=parameter["required"])
    body = operation.get("requestBody")
    if body is not None:
        ((media, content),) = body["content"].items()
        schema = content["schema"]
        if media != "application/json":
            yield ""
            yield f"Body: ``{media}``."
        for name in _names(schema):
            yield ""
            yield f"Body, ``{name}``:"
            yield ""
            found = components[name]
            for field, kind in found.get("properties", {}).items():
                yield _field(field, kind, required=field in found.get("required", ()))
            yield ""
    yield ""
    statuses = [status for status in operation["responses"] if status != "default"]
    yield f"Answers {', '.join(statuses)}."


def _field(name: str, schema: JsonSchema, *, required: bool) -> str:
    default = schema.get("default")
    if required:
        more = ", required"
    elif default is None or default in ([], {}):
        more = ""
    else:
        more = f", default ``{default}``"
    return f"* ``{name}``: {_type(schema)}{more}"


def _type(schema: JsonSchema) -> str:
    names = _names(schema)
    if names:
        return " or ".join(f"``{name}``" for name in names)
    options = schema.get("anyOf")
    if options:
        return " or ".join(dict.fromkeys(_type(each) for each in options))
    if "enum" in schema:
        return "one of " + ", ".join(f"``{each}``" for each in schema["enum"])
    kind = schema.get("type", "anything")
    if kind == "array" and isinstance(schema.get("items"), Mapping):
        items = _type(schema["items"])
        return f"list of ({items})" if " or " in items else f"list of {items}"
    return ", ".join(kind) if isinstance(kind, list) else str(kind)


def _names(schema: JsonSchema) -> list[str]:
    """Components that a schema refers to at its top."""
    if "$ref" in schema:
        return [schema["$ref"].rpartition("/")[2]]
    options = schema.get("anyOf", ())
    if options and all("$ref" in each for each in options):
        return [each["$ref"].rpartition("/")[2] for each in options]
    return []


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    from docutils.nodes import Node
    from sphinx.util.docutils import SphinxDirective

    class HttpReference(SphinxDirective):
        """Inserts the reference."""

        def run(self) -> list[Node]:
            return self.parse_text_to_nodes(render(description()), allow_section_headings=True)

    app.add_directive("http-reference", HttpReference)
    return {"parallel_read_safe": True}
