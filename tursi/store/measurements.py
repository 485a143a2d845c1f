"""Interactions on measured memory, kept by model and not by deployment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Any

from tursi.model import Build, Measurement, Peaks

KEPT = 5000
"""Builds that are remembered; beyond that those go that were measured longest ago."""

_BUILD = tuple(field.name for field in fields(Build))
_HOST = ("host_load", "host_warm", "host_busy")
_GPU = ("gpu_load", "gpu_warm", "gpu_busy")
_REST = ("load_seconds", "at")
_COLUMNS = ", ".join((*_BUILD, *_HOST, *_GPU, *_REST))
# Built of our own field names only.
_PUT = (
    f"INSERT INTO measurements ({_COLUMNS})"  # noqa: S608
    f" VALUES ({', '.join('?' * (len(_BUILD) + 8))})"
    f" ON CONFLICT ({', '.join(_BUILD)}) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in (*_HOST, *_GPU, *_REST))
)


def put(txn: Any, measurements: Sequence[Measurement]) -> None:
    """Insert what is known of builds, or replace what was."""
    txn.executemany(
        _PUT,
        [
            (
                *astuple(each.build),
                *astuple(each.host),
                *astuple(each.gpu),
                each.load_seconds,
                each.at,
            )
            for each in measurements
        ],
    )
    txn.execute(
        "DELETE FROM measurements WHERE at <"
        " (SELECT at FROM measurements ORDER BY at DESC LIMIT 1 OFFSET ?)",
        (KEPT - 1,),
    )


def every(txn: Any) -> list[Measurement]:
    """All of them, those first that were measured longest ago."""
    txn.execute(f"SELECT {_COLUMNS} FROM measurements ORDER BY at")  # noqa: S608
    return [_measurement(row) for row in txn.fetchall()]


def _measurement(row: tuple[Any, ...]) -> Measurement:
    first = len(_BUILD)
    return Measurement(
        Build(*row[:first]),
        Peaks(*row[first : first + 3]),
        Peaks(*row[first + 3 : first + 6]),
        load_seconds=row[first + 6],
        at=row[first + 7],
    )
