"""What the daemon says of itself."""

from __future__ import annotations

from dataclasses import dataclass

from tursi.config import Listener
from tursi.model import Containment


@dataclass(slots=True)
class Info:
    """Facts about the daemon; only its listeners change while it runs."""

    version: str
    pid: int
    started_at: float
    state: str
    """The state folder."""
    listeners: tuple[Listener, ...]
    containment: Containment = Containment("rlimits and watch")  # noqa: RUF009 - a frozen value
