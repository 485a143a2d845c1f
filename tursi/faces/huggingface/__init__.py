"""The shapes of the Hugging Face pipelines: ``POST /models/{name}`` with ``inputs``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tursi.faces.huggingface import (
    errors,
    feature_extraction,
    fill_mask,
    text_classification,
    text_generation,
)
from tursi.faces.route import Call, Context, Route, require_task
from tursi.model import Task

_CODECS: Mapping[Task, Callable[[bytes], Call]] = {
    Task.FEATURE_EXTRACTION: feature_extraction.decode,
    Task.TEXT_CLASSIFICATION: text_classification.decode,
    Task.FILL_MASK: fill_mask.decode,
    Task.TEXT_GENERATION: text_generation.decode,
}
_TASKS = frozenset(_CODECS)


def decode(body: bytes, content_type: str, context: Context) -> Call:  # noqa: ARG001 - a codec's signature
    """Read a body in the shape of the model's task."""
    require_task(context, _TASKS)
    return _CODECS[context.task](body)


ROUTES: tuple[Route, ...] = (
    Route(
        name="huggingface",
        path="/models/{name}",
        model="path",
        tasks=_TASKS,
        decode=decode,
        error=errors.answer,
        failure=errors.failure,
        summary="Run a model in the pipeline shape of its task",
        body=(
            feature_extraction.EmbedBody,
            text_classification.ClassifyBody,
            fill_mask.FillMaskBody,
            text_generation.GenerationBody,
        ),
        reply=(
            feature_extraction.EmbedReply,
            feature_extraction.SimilarityReply,
            text_classification.ClassifyReply,
            fill_mask.FillMaskReply,
            text_generation.GenerationReply,
        ),
    ),
)
