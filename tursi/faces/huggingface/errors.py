"""Errors as the Hugging Face clients expect them: the sentence is the value of ``error``."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from tursi.errors import (
    InternalError,
    InvalidRequest,
    PoisonRequest,
    QueueFull,
    RateLimited,
    TursiError,
)
from tursi.faces import body
from tursi.faces.route import Answer, status_of
from tursi.loading import Loading


class PipelineError(msgspec.Struct):
    """The body of every answer that isn't a success."""

    error: str
    code: str
    error_type: str | UnsetType = UNSET
    """``validation``, ``overloaded`` or ``generation``: the client's exceptions for generation."""
    param: str | UnsetType = UNSET
    retry_after: int | UnsetType = UNSET
    reference: str | UnsetType = UNSET
    incident: str | UnsetType = UNSET
    loading: Loading | UnsetType = UNSET


def detail(error: TursiError) -> PipelineError:
    """The error object."""
    found = PipelineError(error.message, error.code)
    if isinstance(error, InvalidRequest | PoisonRequest):
        found.error_type = "validation"
    elif isinstance(error, QueueFull | RateLimited):
        found.error_type = "overloaded"
    if error.param is not None:
        found.param = error.param
    if error.retry_after is not None:
        found.retry_after = body.retry_after(error.retry_after)
    if error.loading is not None:
        found.loading = error.loading
    if error.reference is not None:
        if error.code == InternalError.code:
            found.incident = error.reference
        else:
            found.reference = error.reference
    return found


def answer(error: TursiError) -> Answer:
    """The answer to a request that failed before anything was sent."""
    return body.answer(detail(error), body.error_headers(error), status_of(error))


def failure(error: TursiError) -> bytes:
    """The end of a stream that failed after it began."""
    found = detail(error)
    found.error_type = "generation"
    return body.event(found)
