"""Interactions on statistics: records of minutes, and what they are rolled up to.

A record is added to the row of its minute (``span`` 0). Once that minute is over, one
transaction adds the row to those of the minute, the hour and the day that are kept, and
deletes it. So whatever is counted is in each of the three once, or in none of them yet and
in the first; it doesn't matter when, how often, or how late that is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from sqlite3 import Connection
from typing import Any

from tursi.config import Storage
from tursi.errors import InvalidRequest
from tursi.rollup import (
    MAXIMA,
    SKETCHES,
    SUMS,
    ErrorClass,
    Period,
    Record,
    Rollup,
    StatisticsQuery,
    Summary,
)
from tursi.sketch import Sketch

MAX_ROWS = 30_000
"""That one query may add up; more would take seconds."""
_COMPACT_BYTES = 1024
"""Sketches that were put one after the other are added up when they are longer than that."""

_WHERE = ("span", "start", "deployment", "key")
_ERRORS = tuple(f"errors_{each.value}" for each in ErrorClass)
_COUNTS = (*SUMS, *_ERRORS, *MAXIMA)
_COLUMNS = (*_WHERE, *_COUNTS, *SKETCHES)


def _adding(sketches: str) -> str:
    """What becomes of a row that is there already; ``sketches`` is the function for them."""
    return (
        " ON CONFLICT (span, deployment, start, key) DO UPDATE SET "
        + ", ".join(f"{name} = {name} + excluded.{name}" for name in (*SUMS, *_ERRORS))
        + ", "
        + ", ".join(f"{name} = max({name}, excluded.{name})" for name in MAXIMA)
        + ", "
        + ", ".join(f"{name} = {sketches}({name}, excluded.{name})" for name in SKETCHES)
    )


_ADD = (
    f"INSERT INTO rollups ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608 - our own names
    + _adding("joined_sketches")
)
_ROLL_UP = (
    f"INSERT INTO rollups ({', '.join(_COLUMNS)}) SELECT :span, start - start % :span,"  # noqa: S608 - our own names
    f" deployment, key, {', '.join(_COUNTS)},"
    f" {', '.join(SKETCHES)}"
    " FROM rollups WHERE span = 0 AND start < :until" + _adding("merged_sketches")
)
_COMPACT = (
    "UPDATE rollups SET "  # noqa: S608 - our own names
    + ", ".join(f"{name} = merged_sketches({name}, NULL)" for name in SKETCHES)
    + " WHERE span = 0 AND start < ?"
)


def prepare(connection: Connection) -> None:
    """Teach the connection that writes to add up sketches."""
    connection.create_function("joined_sketches", 2, _joined)
    connection.create_function("merged_sketches", 2, _merged)


def add(txn: Any, records: Iterable[Record]) -> None:
    """Add to what is counted."""
    txn.executemany(
        _ADD,
        [
            (
                0,
                start,
                deployment,
                key,
                *(getattr(rollup, name) for name in SUMS),
                *(rollup.errors.get(each.value, 0) for each in ErrorClass),
                *(getattr(rollup, name) for name in MAXIMA),
                *(getattr(rollup, name).encode() or None for name in SKETCHES),
            )
            for start, deployment, key, rollup in records
        ],
    )


def roll_up(txn: Any, at: float) -> None:
    """Add the minutes that are over to the minutes, hours and days that are kept."""
    until = int(at) - int(at) % Period.MINUTE
    txn.execute("SELECT 1 FROM rollups WHERE span = 0 AND start < ? LIMIT 1", (until,))
    if txn.fetchone() is None:
        return
    txn.execute(_COMPACT, (until,))
    for period in Period:
        txn.execute(_ROLL_UP, {"span": period.value, "until": until})
    txn.execute("DELETE FROM rollups WHERE span = 0 AND start < ?", (until,))


def prune(txn: Any, storage: Storage, at: float) -> None:
    """Forget what is past its limits."""
    for period, kept in (
        (Period.MINUTE, storage.statistics_minutes),
        (Period.HOUR, storage.statistics_hours),
        (Period.DAY, storage.statistics_days),
    ):
        txn.execute(
            "DELETE FROM rollups WHERE span = ? AND start < ?",
            (period.value, int(at) - int(at) % period - kept * period),
        )


def summary(txn: Any, query: StatisticsQuery) -> Summary:
    """Add up what ``query`` asks for; ``InvalidRequest`` if that is too much at once."""
    period = query.by.value
    since = int(query.since) - int(query.since) % period
    where, parameters = "span IN (0, ?) AND start >= ?", [period, since]
    for name in ("deployment", "key"):
        value = getattr(query, name)
        if value is not None:
            where += f" AND {name} = ?"
            parameters.append(value)
    txn.execute(
        f"SELECT {', '.join(_COLUMNS)} FROM rollups WHERE {where} LIMIT ?",  # noqa: S608 - our own names
        (*parameters, MAX_ROWS + 1),
    )
    periods: dict[int, Rollup] = {}
    series: dict[tuple[str, int], Rollup] = {}
    for number, row in enumerate(iter(txn.fetchone, None)):
        if number == MAX_ROWS:
            raise InvalidRequest(
                "That is too much to add up at once; ask for a later beginning, longer periods "
                "or one deployment.",
                param="since",
            )
        _, start, deployment, key = row[: len(_WHERE)]
        rollup = _rollup(row)
        periods.setdefault(start - start % period, Rollup()).merge(rollup)
        series.setdefault((deployment, key), Rollup()).merge(rollup)
    total = Rollup()
    deployments: dict[str, Rollup] = {}
    keys: dict[int, Rollup] = {}
    for (deployment, key), rollup in series.items():
        total.merge(rollup)
        deployments.setdefault(deployment, Rollup()).merge(rollup)
        keys.setdefault(key, Rollup()).merge(rollup)
    return Summary(
        total,
        dict(sorted(periods.items())),
        dict(sorted(deployments.items())),
        dict(sorted(keys.items())),
    )


def _rollup(row: tuple[Any, ...]) -> Rollup:
    found = Rollup()
    values = dict(zip(_COLUMNS, row, strict=True))
    for name in (*SUMS, *MAXIMA):
        setattr(found, name, values[name])
    found.errors = {
        each.value: values[name]
        for each, name in zip(ErrorClass, _ERRORS, strict=True)
        if values[name]
    }
    for name in SKETCHES:
        setattr(found, name, _decoded(values[name]))
    return found


def _decoded(data: bytes | None) -> Sketch:
    try:
        return Sketch.decode(data or b"")
    except ValueError:
        # Rather no percentiles of one minute than none at all, or a daemon that can't count.
        return Sketch()


def _joined(one: bytes | None, other: bytes | None) -> bytes | None:
    joined = (one or b"") + (other or b"")
    if len(joined) <= _COMPACT_BYTES:
        return joined or None
    return _merged(one, other)


def _merged(one: bytes | None, other: bytes | None) -> bytes | None:
    if not one and not other:
        return None
    merged = _decoded(one)
    merged.merge(_decoded(other))
    return merged.encode()
