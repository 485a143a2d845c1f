"""Bodies that are no sensible JSON: the same short answer on every route that takes one."""

from __future__ import annotations

import pytest
from conversation import House, request

from tursi.api.openapi import PART
from tursi.faces import TABLE

pytestmark = pytest.mark.usefixtures("both_paths")

BODIES = {
    "nothing": b"",
    "half an object": b'{"model": "small"',
    "two objects": b'{"model": "small"} {}',
    "a comment": b'{"model": "small"} // x',
    "single quotes": b"{'model': 'small'}",
    "a number": b"1",
    "null": b"null",
    "a list": b"[]",
    "a text": b'"model"',
    "NaN": b'{"model": NaN}',
    "Infinity": b'{"model": -Infinity}',
    "a number that is no name": b'{"model": ' + b"9" * 5000 + b"}",
    "lists a hundred thousand deep": b"[" * 100_000,
    "objects a hundred thousand deep": b'{"model":' * 100_000,
    "lists within the object": b'{"model": "small", "x": ' + b"[" * 100_000,
    "no UTF-8": b'{"model": "\xff"}',
    "no UTF-8 elsewhere": b'{"model": "small", "x": "\xc3"}',
    "a surrogate as bytes": b'{"model": "\xed\xa0\x80"}',
    "half of a pair": rb'{"model": "\ud800"}',
    "UTF-16": '{"model": "small"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"model": "small"}',
    "a NUL in it": b'{"model": "sm\x00all"}',
}


def routes() -> list[tuple[str, str]]:
    """Method and path of every route that takes a body."""
    found = [
        (contract.method, PART.sub("small", contract.path))
        for contract, _ in House().front.handlers
        if contract.body is not None
    ]
    # Where the path names the model, the body is for the worker to judge.
    found += [("POST", route.path) for route in TABLE if route.model == "body"]
    return sorted(found)


@pytest.mark.parametrize(("method", "path"), routes())
def test_what_is_no_json_object_is_refused_in_one_sentence(method: str, path: str) -> None:
    house = House()
    for what, body in BODIES.items():
        reply = house.ask(method, path, body, headers={"Content-Type": "application/json"})
        assert (reply.status, reply.error["code"]) == (400, "invalid_request"), what
        assert len(reply.body) < 1000
        assert b"Traceback" not in reply.body
        assert b".py" not in reply.body
    assert not house.fleet.calls
    assert not house.fleet.passages


def test_of_two_models_the_last_one_counts() -> None:
    house = House()
    house.send(request("POST", "/v1/embeddings", b'{"model": "nobody", "model": "small"}'))
    assert [passage.model for passage in house.fleet.passages] == ["small"]
