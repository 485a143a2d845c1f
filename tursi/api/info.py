"""What the daemon says of itself."""

from __future__ import annotations

from dataclasses import dataclass

from tursi.config import Listener


@dataclass(frozen=True, slots=True)
class Info:
    """Facts that hold as long as the daemon runs."""

    version: str
    pid: int
    started_at: float
    state: str
    """The state folder."""
    listeners: tuple[Listener, ...]
