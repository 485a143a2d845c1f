"""Interactions on crashes: their rows beside those of the lives that they ended."""

from __future__ import annotations

from typing import Any

import msgspec

from tursi.errors import CrashNotFound
from tursi.model import Crash, Dossier, FailureClass, LoadOrder, Phase, Sample, last_line

_SHORT = (
    "c.id, w.deployment, w.generation, w.replica, c.worker, c.at, w.failure, w.reason, c.phase,"
    " w.spawned_at, w.ready_at, w.exit_status, w.signal, w.intent, w.peak_rss, w.cpu_seconds,"
    " c.requests, c.traceback"
)
_LONG = f"{_SHORT}, c.load, c.versions, c.stacks, c.log, c.usage"
_FROM = "FROM crashes AS c JOIN workers AS w ON w.uuid = c.worker WHERE w.deployment = ?"
_json = msgspec.json.encode


def add(txn: Any, dossier: Dossier, keep: int) -> None:
    """Insert it beside its life, which must be there; of its deployment ``keep`` stay."""
    txn.execute(
        "INSERT INTO crashes (id, worker, at, phase, load, traceback, stacks, log, usage,"
        " requests, versions) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            dossier.id,
            dossier.worker,
            dossier.at,
            dossier.phase.value,
            _json(dossier.order).decode(),
            dossier.traceback,
            dossier.stacks,
            _json(dossier.log).decode(),
            _json([(each.at, each.rss, each.cpu_seconds) for each in dossier.usage]).decode(),
            _json(dossier.requests).decode(),
            _json(dossier.versions).decode(),
        ),
    )
    txn.execute(
        f"DELETE FROM crashes WHERE id IN (SELECT c.id {_FROM} ORDER BY c.id DESC LIMIT -1"  # noqa: S608 - our own text
        " OFFSET ?)",
        (dossier.deployment, keep),
    )


def newest(txn: Any, deployment: str, limit: int) -> list[Crash]:
    """The last ``limit`` crashes of a deployment, newest first."""
    txn.execute(
        f"SELECT {_SHORT} {_FROM} ORDER BY c.id DESC LIMIT ?",
        (deployment, limit),
    )
    return [Crash(**_short(row)) for row in txn.fetchall()]


def one(txn: Any, deployment: str, number: int) -> Dossier:
    """A crash with its evidence; ``CrashNotFound``."""
    txn.execute(f"SELECT {_LONG} {_FROM} AND c.id = ?", (deployment, number))
    row = txn.fetchone()
    if row is None:
        raise CrashNotFound(
            f"{deployment} has no crash {number}; `tursi crashes {deployment}` lists those it has."
        )
    load, versions, stacks, lines, usage = row[-5:]
    return Dossier(
        **_short(row),
        order=msgspec.json.decode(load, type=LoadOrder),
        versions=msgspec.json.decode(versions, type=dict[str, str]),
        traceback=row[17],
        stacks=stacks,
        log=msgspec.json.decode(lines, type=tuple[str, ...]),
        usage=tuple(
            Sample(*each)
            for each in msgspec.json.decode(usage, type=list[tuple[float, int, float]])
        ),
    )


def last(txn: Any) -> int:
    """The highest id so far, 0 where there was no crash yet."""
    txn.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'crashes'")
    return int(txn.fetchone()[0])


def _short(row: tuple[Any, ...]) -> dict[str, Any]:
    traceback = row[17]
    return {
        "id": row[0],
        "deployment": row[1],
        "generation": row[2],
        "replica": row[3],
        "worker": row[4],
        "at": row[5],
        "failure": FailureClass(row[6]),
        "reason": row[7],
        "phase": Phase(row[8]),
        "spawned_at": row[9],
        "ready_at": row[10],
        "exit_status": row[11],
        "signal": row[12],
        "intent": row[13],
        "peak_rss": row[14],
        "cpu_seconds": row[15],
        "requests": msgspec.json.decode(row[16], type=tuple[str, ...]),
        "error": last_line(traceback),
    }
