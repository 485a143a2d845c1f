"""Interactions on pulls; each change comes with its event."""

from __future__ import annotations

from typing import Any

from tursi.errors import PullNotFound
from tursi.model import Event, Pull, PullState, Trust
from tursi.store.events import record

KEPT = 1000
"""Ended pulls that are remembered."""

_SELECT = (
    "SELECT id, model, state, asked_at, asked_by, ended_at, error, folder, revision, size,"
    " allow_pickle, trust_remote_code FROM pulls"
)
_GOING = "state IN ('running', 'paused')"
_TOLD = {
    PullState.RUNNING: "goes on with the pull of",
    PullState.PAUSED: "pauses the pull of",
    PullState.CANCELLED: "cancels the pull of",
}


def add(txn: Any, model: str, trust: Trust, *, by: str, at: float) -> tuple[Pull, Event | None]:
    """Ask for a download, or go on with one of the same files."""
    risks = (trust.allow_pickle, trust.trust_remote_code)
    txn.execute(
        f"{_SELECT} WHERE model = ? AND allow_pickle = ? AND trust_remote_code = ? AND {_GOING}",
        (model, *risks),
    )
    row = txn.fetchone()
    if row is not None:
        going = _pull(row)
        if going.state is PullState.RUNNING:
            return going, None
        txn.execute("UPDATE pulls SET state = 'running', error = NULL WHERE id = ?", (going.id,))
        return one(txn, going.id), _told(txn, PullState.RUNNING, model, by, at)
    txn.execute(
        "INSERT INTO pulls (model, state, asked_at, asked_by, allow_pickle, trust_remote_code)"
        " VALUES (?, 'running', ?, ?, ?, ?) RETURNING id",
        (model, at, by, *risks),
    )
    (number,) = txn.fetchone()
    txn.execute(
        "DELETE FROM pulls WHERE id IN (SELECT id FROM pulls"
        " WHERE state NOT IN ('running', 'paused') ORDER BY id DESC LIMIT -1 OFFSET ?)",
        (KEPT,),
    )
    return one(txn, number), record(txn, at, "pull", _asked(model, trust, by), cause=by)


def change(txn: Any, pull: Pull, *, by: str, at: float) -> tuple[Pull, Event | None]:
    """Keep what has become of it; one that has ended stays as it is."""
    before = one(txn, pull.id)
    if before.state not in {PullState.RUNNING, PullState.PAUSED} or before == pull:
        return before, None
    txn.execute(
        "UPDATE pulls SET state = ?, ended_at = ?, error = ?, folder = ?, revision = ?, size = ?"
        " WHERE id = ?",
        (
            pull.state.value,
            pull.ended_at,
            pull.error,
            pull.folder,
            pull.commit,
            pull.size,
            pull.id,
        ),
    )
    if pull.state is PullState.DONE:
        where = f"{pull.model} is in {pull.folder}"
        return pull, record(txn, at, "pull.done", where)
    if pull.state is PullState.FAILED:
        message = f"the pull of {pull.model} failed"
        return pull, record(txn, at, "pull.failed", message, cause=pull.error)
    if pull.state is before.state:
        return pull, None
    return pull, _told(txn, pull.state, pull.model, by, at)


def newest(txn: Any, limit: int) -> list[Pull]:
    """All that have not ended, and of the others the last ``limit``; newest first."""
    txn.execute(
        f"{_SELECT} WHERE {_GOING} OR id IN (SELECT id FROM pulls"  # noqa: S608 - our own text
        " WHERE state NOT IN ('running', 'paused') ORDER BY id DESC LIMIT ?) ORDER BY id DESC",
        (limit,),
    )
    return [_pull(row) for row in txn.fetchall()]


def one(txn: Any, number: int) -> Pull:
    """One of them; ``PullNotFound``."""
    txn.execute(f"{_SELECT} WHERE id = ?", (number,))
    row = txn.fetchone()
    if row is None:
        raise PullNotFound(f"There is no pull {number}; `tursi pulls` lists those there are.")
    return _pull(row)


def _told(txn: Any, state: PullState, model: str, by: str, at: float) -> Event:
    return record(txn, at, f"pull.{state.value}", f"{by} {_TOLD[state]} {model}", cause=by)


def _asked(model: str, trust: Trust, by: str) -> str:
    message = f"{by} pulls {model}"
    if trust.allow_pickle:
        message += ", pickle files allowed"
    return message + (", its own code trusted" if trust.trust_remote_code else "")


def _pull(row: tuple[Any, ...]) -> Pull:
    number, model, state, asked_at, asked_by, ended_at, error, folder, *rest = row
    revision, size, pickle, code = rest
    return Pull(
        id=number,
        model=model,
        state=PullState(state),
        asked_at=asked_at,
        asked_by=asked_by,
        ended_at=ended_at,
        error=error,
        folder=folder,
        commit=revision,
        size=size,
        allow_pickle=bool(pickle),
        trust_remote_code=bool(code),
    )
