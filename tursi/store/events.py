"""Interactions on events and statistics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tursi.config import Storage
from tursi.model import Event, Minute

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


def add_minutes(txn: Any, minutes: Iterable[Minute]) -> None:
    """Add to the rollups."""
    txn.executemany(
        "INSERT INTO statistics (deployment, minute, requests, errors, prompt_tokens,"
        " completion_tokens, seconds, queue_seconds) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (deployment, minute) DO UPDATE SET requests = requests + excluded.requests,"
        " errors = errors + excluded.errors,"
        " prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
        " completion_tokens = completion_tokens + excluded.completion_tokens,"
        " seconds = seconds + excluded.seconds,"
        " queue_seconds = queue_seconds + excluded.queue_seconds",
        [
            (
                each.deployment,
                each.minute,
                each.requests,
                each.errors,
                each.prompt_tokens,
                each.completion_tokens,
                each.seconds,
                each.queue_seconds,
            )
            for each in minutes
        ],
    )


def minutes_since(txn: Any, deployment: str, since: int) -> list[Minute]:
    """The rollups from the epoch minute ``since`` on, oldest first."""
    txn.execute(
        "SELECT deployment, minute, requests, errors, prompt_tokens, completion_tokens, seconds,"
        " queue_seconds FROM statistics WHERE deployment = ? AND minute >= ? ORDER BY minute",
        (deployment, since),
    )
    return [Minute(*row) for row in txn.fetchall()]


def prune(txn: Any, storage: Storage, at: float) -> None:
    """Forget events and statistics past their limits."""
    txn.execute(
        "DELETE FROM statistics WHERE minute < ?",
        (int(at // 60) - storage.statistics_days * 24 * 60,),
    )
    # Only ever cut at the old end, so ids have no gaps that matter here.
    txn.execute(
        "DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?", (storage.event_count,)
    )
