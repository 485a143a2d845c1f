"""Who has changed what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Somebody changed something, or was refused it; append-only."""

    id: int
    """0 until it is stored."""
    at: float
    by: str
    """Who it was, in words."""
    action: str
    """What they asked for, such as ``deployments.stop``."""
    target: str | None = None
    """What it was asked for, by name."""
    status: int | None = None
    """The answer's HTTP status; ``None`` where there was no request."""
    code: str | None = None
    """Of the error that it was answered with."""
    request: str | None = None
    """The request's id."""
    key: int | None = None
    """The id of their key."""
    uid: int | None = None
    """Their user, if they came by the control socket."""
    address: str | None = None
    """Their address, if they came over the network."""


@dataclass(frozen=True, slots=True)
class AuditQuery:
    """Which entries of the audit to list."""

    since: float = 0.0
    by: str | None = None
    action: str | None = None
    target: str | None = None
    limit: int = 100
