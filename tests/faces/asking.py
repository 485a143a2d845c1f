"""Asking a face without a server: decode a body, read the events of a stream."""

from __future__ import annotations

import json
from typing import Any

from tursi.errors import TursiError
from tursi.faces import TABLE
from tursi.faces.route import Call, Context, Route
from tursi.model import Task


def route(name: str) -> Route:
    found = TABLE.named(name)
    assert found is not None
    return found


def ask(name: str, body: Any, task: Task) -> Call:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    context = Context("my-model", task, "r1", 1_700_000_000)
    return route(name).decode(data, "application/json", context)


def refusal(name: str, body: Any, task: Task) -> TursiError:
    try:
        ask(name, body, task)
    except TursiError as error:
        return error
    raise AssertionError(f"{str(body)[:200]} was accepted")


def events(data: bytes) -> list[Any]:
    """The decoded data of each event; ``[DONE]`` stays a string."""
    assert data.endswith(b"\n\n")
    found = []
    for item in data.decode().removesuffix("\n\n").split("\n\n"):
        assert item.startswith("data: ")
        assert "\n" not in item
        text = item.removeprefix("data: ")
        found.append(text if text == "[DONE]" else json.loads(text))
    return found
