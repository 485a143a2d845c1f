"""Errors as the OpenAI clients expect them."""

from __future__ import annotations

import msgspec

from tursi import errors
from tursi.errors import TursiError
from tursi.faces import body
from tursi.faces.route import Answer, status_of
from tursi.loading import Loading

DONE = b"data: [DONE]\n\n"
"""The last event of every stream; clients compare the whole line."""


class ErrorDetail(msgspec.Struct):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str
    retry_after: int | msgspec.UnsetType = msgspec.UNSET
    reference: str | msgspec.UnsetType = msgspec.UNSET
    """Where the evidence is, such as the id of a crash."""
    incident: str | msgspec.UnsetType = msgspec.UNSET
    """The id under which the log has the details of a defect."""
    loading: Loading | msgspec.UnsetType = msgspec.UNSET


class ErrorBody(msgspec.Struct):
    """The body of every answer that isn't a success."""

    error: ErrorDetail


# Some clients choose their exception by this word rather than by the status.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


def _type_of(status: int) -> str:
    default = "invalid_request_error" if status < 500 else "server_error"
    return _TYPES.get(status, default)


def detail(error: TursiError) -> ErrorBody:
    """The error object."""
    found = ErrorDetail(error.message, _type_of(status_of(error)), error.param, error.code)
    if error.retry_after is not None:
        found.retry_after = body.retry_after(error.retry_after)
    if error.loading is not None:
        found.loading = error.loading
    if error.reference is not None:
        if error.code == errors.InternalError.code:
            found.incident = error.reference
        else:
            found.reference = error.reference
    return ErrorBody(found)


def answer(error: TursiError) -> Answer:
    """The answer to a request that failed before anything was sent."""
    return body.answer(detail(error), body.error_headers(error), status_of(error))


def failure(error: TursiError) -> bytes:
    """The end of a stream that failed after it began."""
    return body.event(detail(error)) + DONE
