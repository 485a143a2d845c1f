"""Text classification in the pipeline's shape: a list of labels per input, nested even for one."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from tursi.faces.body import MAX_INPUTS, NonEmpty, answer
from tursi.faces.route import Answer, Call, Whole, decoded
from tursi.tasks import Classifications, ClassifyRequest, Label


class TextPair(msgspec.Struct):
    """A text with its second segment, if it has one."""

    text: NonEmpty
    text_pair: NonEmpty | None = None


class ClassifyOptions(msgspec.Struct):
    """How to classify."""

    top_k: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    truncate: bool | None = None


class ClassifyBody(msgspec.Struct):
    """A request for labels."""

    inputs: (
        NonEmpty
        | TextPair
        | Annotated[list[NonEmpty | TextPair], Meta(min_length=1, max_length=MAX_INPUTS)]
    )
    parameters: ClassifyOptions | None = None


ClassifyReply = list[list[Label]]

_DECODER = msgspec.json.Decoder(ClassifyBody)


def decode(body: bytes) -> Call:
    """Read a request for labels."""
    asked = decoded(_DECODER, body)
    options = asked.parameters or ClassifyOptions()
    items = asked.inputs if isinstance(asked.inputs, list) else [asked.inputs]
    request = ClassifyRequest(
        tuple(_input(item) for item in items),
        top_k=options.top_k,
        function=options.function_to_apply,
        truncate=options.truncate,
    )
    return Whole(request, _encode)


def _input(item: str | TextPair) -> str | tuple[str, str]:
    if isinstance(item, str):
        return item
    return item.text if item.text_pair is None else (item.text, item.text_pair)


def _encode(result: Classifications) -> Answer:
    return answer(result.items)
