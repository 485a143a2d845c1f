"""A worker life that ended unasked, and the evidence."""

from __future__ import annotations

from dataclasses import dataclass, field

from tursi.model.worker import FailureClass, LoadOrder, Phase, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Crash:
    """A worker life that ended unasked: what it comes down to."""

    id: int
    """Given when it is recorded; 0 before."""
    deployment: str
    generation: int
    replica: int
    worker: str
    """The uuid of the life."""
    at: float
    failure: FailureClass
    reason: str
    """One clause for people."""
    phase: Phase
    """The state in which it met its end."""
    spawned_at: float
    ready_at: float | None = None
    exit_status: int | None = None
    signal: int | None = None
    intent: str | None = None
    """Why the daemon ended it, where it did."""
    peak_rss: int | None = None
    cpu_seconds: float | None = None
    requests: tuple[str, ...] = ()
    """Ids of the requests that were in flight."""
    error: str | None = None
    """The last line of the traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dossier(Crash):
    """The same with all its evidence."""

    order: LoadOrder
    """What it had to load."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library to version, as far as it got to tell."""
    traceback: str | None = None
    """With its last words."""
    stacks: str | None = None
    """Where the threads of a hung worker stood."""
    log: tuple[str, ...] = ()
    """The last lines of this life."""
    usage: tuple[Sample, ...] = ()
    """Memory and processor over its life, the closer to its end the denser."""


def last_line(traceback: str | None) -> str | None:
    """What a traceback comes down to."""
    lines = (traceback or "").strip().splitlines()
    return lines[-1].strip() if lines else None
