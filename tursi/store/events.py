"""Interactions on events."""

from __future__ import annotations

from typing import Any

from tursi.config import Storage
from tursi.model import Event

_SELECT = "SELECT id, at, kind, deployment, message, cause, worker FROM events"


def record(
    txn: Any,
    at: float,
    kind: str,
    message: str,
    *,
    deployment: str | None = None,
    worker: str | None = None,
    cause: str | None = None,
) -> Event:
    """Append an event."""
    txn.execute(
        "INSERT INTO events (at, kind, deployment, message, cause, worker)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (at, kind, deployment, message, cause, worker),
    )
    return Event(txn.lastrowid, at, kind, deployment, message, cause, worker)


def newest(txn: Any, deployment: str | None, after: int, limit: int) -> list[Event]:
    """The newest ``limit`` events after the id ``after``, oldest first."""
    if deployment is None:
        txn.execute(f"{_SELECT} WHERE id > ? ORDER BY id DESC LIMIT ?", (after, limit))
    else:
        txn.execute(
            f"{_SELECT} WHERE deployment = ? AND id > ? ORDER BY id DESC LIMIT ?",
            (deployment, after, limit),
        )
    return [Event(*row) for row in reversed(txn.fetchall())]


def prune(txn: Any, storage: Storage) -> None:
    """Forget events past their limit."""
    # Only ever cut at the old end, so ids have no gaps that matter here.
    txn.execute(
        "DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?", (storage.event_count,)
    )
