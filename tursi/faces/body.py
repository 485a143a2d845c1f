"""What the faces share about bodies: the forms of text input, JSON answers, events, vectors."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeAlias

import msgspec

from tursi.errors import (
    DeploymentUnavailable,
    InvalidRequest,
    KeyRefused,
    KeyRequired,
    TursiError,
)
from tursi.faces.route import Answer
from tursi.loading import POSITION_HEADER
from tursi.tasks import Embeddings, Text

MAX_INPUTS = 2048
"""Inputs of one request."""

NonEmpty = Annotated[str, msgspec.Meta(min_length=1)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Inputs: TypeAlias = str | list[str | TokenId | list[TokenId]]
"""A text, a list of texts, token ids, or a list of lists of token ids."""

_ENCODER = msgspec.json.Encoder()


def texts(value: Inputs, param: str) -> tuple[tuple[Text, ...], bool]:
    """The inputs in ``value``, and whether it was a list of them rather than one."""
    if isinstance(value, str):
        return (_checked(value, param),), False
    if not value:
        raise InvalidRequest(f"The field '{param}' is empty; give at least one input.", param=param)
    ids = tuple(item for item in value if isinstance(item, int))
    if len(ids) == len(value):
        return (ids,), False
    if ids:
        raise InvalidRequest(
            f"The field '{param}' mixes token ids with texts or lists; "
            "give texts, token ids, or lists of token ids.",
            param=param,
        )
    if len(value) > MAX_INPUTS:
        raise InvalidRequest(
            f"The field '{param}' has {len(value)} inputs; a request takes at most {MAX_INPUTS}.",
            param=param,
        )
    items = tuple(
        _checked(item if isinstance(item, str) else tuple(item), f"{param}[{index}]")
        for index, item in enumerate(value)
        if not isinstance(item, int)
    )
    return items, True


def _checked(item: Text, param: str) -> Text:
    if not item:
        raise InvalidRequest(f"The input '{param}' is empty.", param=param)
    return item


def answer(value: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> Answer:
    """``value`` as a JSON answer."""
    return Answer(status, "application/json", _ENCODER.encode(value), headers)


def event(value: Any) -> bytes:
    """``value`` as one server-sent event."""
    return b"data: " + _ENCODER.encode(value) + b"\n\n"


def retry_after(seconds: int) -> int:
    """``seconds`` as clients take them: they ignore a ``Retry-After`` over 120 altogether."""
    return min(max(seconds, 1), 120)


def error_headers(error: TursiError) -> Mapping[str, str] | None:
    """The headers that tell a client when to try again, or not to, or how to say who it is."""
    if error.retry_after is not None:
        headers = {"Retry-After": str(retry_after(error.retry_after))}
        if error.loading is not None:
            headers[POSITION_HEADER] = str(error.loading.position)
        return headers
    if error.code == DeploymentUnavailable.code:
        # Clients retry every 503, but waiting doesn't help here.
        return {"x-should-retry": "false"}
    return _CHALLENGES.get(error.code)


_CHALLENGES: Mapping[str, Mapping[str, str]] = {
    KeyRequired.code: {"WWW-Authenticate": 'Bearer realm="tursi"'},
    KeyRefused.code: {"WWW-Authenticate": 'Bearer realm="tursi", error="invalid_token"'},
}


def buffers(embeddings: Embeddings) -> Iterator[memoryview]:
    """The float32 buffer of each vector."""
    view, size = memoryview(embeddings.data), 4 * embeddings.dimensions
    return (view[start : start + size] for start in range(0, size * embeddings.count, size))


def vectors(embeddings: Embeddings) -> Iterator[tuple[float, ...]]:
    """The numbers of each vector.

    They go into the answer as the shortest form of the equal double: exact,
    and five times as fast to write as a form rounded to what float32 needs.
    """
    return struct.Struct(f"<{embeddings.dimensions}f").iter_unpack(embeddings.data)


def finite(logprob: float) -> float:
    """``logprob``, with the customary number for "impossible": JSON has no minus infinity."""
    return max(-9999.0, logprob)
