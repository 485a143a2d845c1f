"""Interactions on the lives of workers."""

from __future__ import annotations

from dataclasses import astuple, fields
from typing import Any

from tursi.config import Storage
from tursi.model import FailureClass, WorkerLife

_NAMES = tuple(field.name for field in fields(WorkerLife))
_COLUMNS = ", ".join(_NAMES)
_FAILURE = _NAMES.index("failure")
# Built of our own field names only.
_PUT = (
    f"INSERT INTO workers ({_COLUMNS}) VALUES ({', '.join('?' * len(_NAMES))})"  # noqa: S608
    " ON CONFLICT (uuid) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in _NAMES if name != "uuid")
    # A note that had to wait must not bring an ended one back to life.
    + " WHERE excluded.ended_at IS NOT NULL OR workers.ended_at IS NULL"
)
_SELECT = f"SELECT {_COLUMNS} FROM workers"  # noqa: S608


def put(txn: Any, life: WorkerLife) -> None:
    """Insert or replace what is known of a life."""
    txn.execute(_PUT, astuple(life))


def newest(txn: Any, deployment: str, limit: int) -> list[WorkerLife]:
    """The last ``limit`` lives of a deployment's workers, newest first."""
    txn.execute(
        f"{_SELECT} WHERE deployment = ? ORDER BY spawned_at DESC, uuid LIMIT ?",
        (deployment, limit),
    )
    return [_life(row) for row in txn.fetchall()]


def unfinished(txn: Any) -> list[WorkerLife]:
    """Every life whose end isn't recorded, oldest first."""
    txn.execute(f"{_SELECT} WHERE ended_at IS NULL ORDER BY spawned_at")
    return [_life(row) for row in txn.fetchall()]


def prune(txn: Any, storage: Storage) -> None:
    """Forget all but the newest lives; never one whose end isn't recorded."""
    txn.execute(
        "DELETE FROM workers WHERE ended_at IS NOT NULL AND spawned_at <"
        " (SELECT spawned_at FROM workers ORDER BY spawned_at DESC LIMIT 1 OFFSET ?)",
        (storage.worker_lives - 1,),
    )


def _life(row: tuple[Any, ...]) -> WorkerLife:
    failure = row[_FAILURE]
    values = list(row)
    values[_FAILURE] = FailureClass(failure) if failure is not None else None
    return WorkerLife(*values)
