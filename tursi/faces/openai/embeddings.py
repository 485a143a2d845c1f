"""``/v1/embeddings``."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from tursi.faces.body import Inputs, answer, buffers, texts, vectors
from tursi.faces.route import Answer, Call, Context, Whole, decoded, require_task
from tursi.model import Task
from tursi.tasks import Embeddings, EmbedRequest

TASKS = frozenset({Task.FEATURE_EXTRACTION})


class EmbeddingBody(msgspec.Struct, kw_only=True):
    """A request for embeddings."""

    input: Inputs
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None = None
    truncate: bool | None = None
    """Cut inputs that are longer than the model takes, instead of refusing them."""


class Embedding(msgspec.Struct):
    """One vector."""

    index: int
    embedding: tuple[float, ...] | bytes
    """Numbers, or base64 of little-endian float32."""
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(msgspec.Struct):
    """What the request cost, special tokens included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, kw_only=True):
    """A vector per input, in order."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage
    truncated: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET
    """Indexes of the inputs that were cut; absent if there are none."""


_DECODER = msgspec.json.Decoder(EmbeddingBody)


def decode(body: bytes, content_type: str, context: Context) -> Call:  # noqa: ARG001 - a codec's signature
    """Read a request for embeddings."""
    require_task(context, TASKS)
    asked = decoded(_DECODER, body)
    inputs, _ = texts(asked.input, "input")
    as_base64 = asked.encoding_format == "base64"

    def encode(result: Embeddings) -> Answer:
        rows = buffers(result) if as_base64 else vectors(result)
        tokens = result.usage.prompt_tokens
        return answer(
            EmbeddingList(
                id=f"embd-{context.request_id}",
                created=context.created,
                model=asked.model or context.deployment,
                # msgspec writes a buffer as base64.
                data=[Embedding(index, row) for index, row in enumerate(rows)],  # type: ignore[arg-type]
                usage=EmbeddingUsage(tokens, tokens),
                truncated=result.truncated or msgspec.UNSET,
            )
        )

    request = EmbedRequest(inputs, truncate=asked.truncate, dimensions=asked.dimensions)
    return Whole(request, encode)
