"""What has happened, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, and because of what; append-only."""

    id: int
    at: float
    kind: str
    deployment: str | None
    message: str
    cause: str | None = None
    worker: str | None = None


@dataclass(frozen=True, slots=True)
class Story:
    """Why a deployment is as it is."""

    sentences: tuple[str, ...]
    """The answer as one would give it to a colleague."""
    events: tuple[Event, ...]
    """The chain that led there, oldest first."""
    crash: int | None = None
    """The crash that has the evidence."""
