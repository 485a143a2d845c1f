"""What HTTP calls each status (RFC 9110, section 15)."""

from __future__ import annotations

from http import HTTPStatus

# Twisted's own table has no 422, 429 or 431.
_PHRASES = {status.value: status.phrase.encode("ascii") for status in HTTPStatus}


def phrase(status: int) -> bytes:
    """The reason phrase of a status line."""
    return _PHRASES.get(status, b"Unknown")
