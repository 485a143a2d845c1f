"""Fill-mask in the pipeline's shape.

A text with one mask gives a list of proposals, a text with several a list of
such lists; a list of texts gives a list of what each gives.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from tursi.faces.body import MAX_INPUTS, NonEmpty, answer
from tursi.faces.route import Answer, Call, Whole, decoded
from tursi.tasks import Fill, FillMaskRequest, Fills

DEFAULT_TOP_K = 5


class FillMaskOptions(msgspec.Struct):
    """What to propose."""

    top_k: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    targets: NonEmpty | Annotated[list[NonEmpty], Meta(min_length=1, max_length=1024)] | None = None
    truncate: bool | None = None


class FillMaskBody(msgspec.Struct):
    """A request for proposals; the texts have the tokenizer's mask token in them."""

    inputs: NonEmpty | Annotated[list[NonEmpty], Meta(min_length=1, max_length=MAX_INPUTS)]
    parameters: FillMaskOptions | None = None


FillMaskReply = list[Fill | list[Fill | list[Fill]]]

_DECODER = msgspec.json.Decoder(FillMaskBody)


def decode(body: bytes) -> Call:
    """Read a request for proposals."""
    asked = decoded(_DECODER, body)
    options = asked.parameters or FillMaskOptions()
    several = isinstance(asked.inputs, list)
    targets = options.targets

    def encode(result: Fills) -> Answer:
        items = [masks[0] if len(masks) == 1 else masks for masks in result.items]
        return answer(items if several else items[0])

    request = FillMaskRequest(
        _tuple(asked.inputs),
        top_k=options.top_k or DEFAULT_TOP_K,
        targets=None if targets is None else _tuple(targets),
        truncate=options.truncate,
    )
    return Whole(request, encode)


def _tuple(value: str | list[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
