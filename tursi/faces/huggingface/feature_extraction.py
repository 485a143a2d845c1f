"""Embeddings and sentence similarity in the shape of the Hugging Face clients.

One text gives ``[[numbers]]``, as text-embeddings-inference does: the answer is
always a list with a vector per input.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from tursi.errors import InvalidRequest
from tursi.faces.body import MAX_INPUTS, Inputs, NonEmpty, answer, texts, vectors
from tursi.faces.route import Answer, Call, Whole, decoded
from tursi.tasks import Embeddings, EmbedRequest, Similarities, SimilarityRequest

T = TypeVar("T")


class EmbedOptions(msgspec.Struct, kw_only=True):
    """How to embed."""

    normalize: bool | None = None
    truncate: bool | None = None
    truncation_direction: Literal["left", "right"] | None = None
    prompt_name: str | None = None
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None


class SentencePair(msgspec.Struct):
    """A sentence, and those to compare it with."""

    source_sentence: NonEmpty
    sentences: Annotated[list[NonEmpty], Meta(min_length=1, max_length=MAX_INPUTS)]


class EmbedBody(EmbedOptions, kw_only=True):
    """A request for embeddings or similarities; options may stand at the root or inside."""

    inputs: Inputs | SentencePair
    parameters: EmbedOptions | None = None


EmbedReply = list[tuple[float, ...]]
SimilarityReply = list[float]

_DECODER = msgspec.json.Decoder(EmbedBody)
_NO_OPTIONS = EmbedOptions()


def decode(body: bytes) -> Call:
    """Read a request for embeddings or similarities."""
    asked = decoded(_DECODER, body)
    inside = asked.parameters or _NO_OPTIONS
    if "left" in (asked.truncation_direction, inside.truncation_direction):
        raise InvalidRequest(
            "Tursi cuts inputs at their end; 'truncation_direction' can only be 'right'.",
            param="truncation_direction",
        )
    if "base64" in (asked.encoding_format, inside.encoding_format):
        raise InvalidRequest(
            "This route answers with numbers; 'encoding_format' can only be 'float'.",
            param="encoding_format",
        )
    truncate = _either(asked.truncate, inside.truncate)
    if isinstance(asked.inputs, SentencePair):
        pair = asked.inputs
        similarity = SimilarityRequest(pair.source_sentence, tuple(pair.sentences), truncate)
        return Whole(similarity, _encode_similarities)
    inputs, _ = texts(asked.inputs, "inputs")
    request = EmbedRequest(
        inputs,
        normalize=_either(asked.normalize, inside.normalize),
        truncate=truncate,
        prompt_name=_either(asked.prompt_name, inside.prompt_name),
        dimensions=_either(asked.dimensions, inside.dimensions),
    )
    return Whole(request, _encode_embeddings)


def _either(root: T | None, inside: T | None) -> T | None:
    return inside if root is None else root


def _encode_embeddings(result: Embeddings) -> Answer:
    # The shape has no place to say it.
    cut = {"x-tursi-truncated": str(len(result.truncated))} if result.truncated else None
    return answer(list(vectors(result)), cut)


def _encode_similarities(result: Similarities) -> Answer:
    return answer(result.scores)
