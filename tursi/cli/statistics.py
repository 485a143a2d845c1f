"""What deployments have done, for whom and how fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from tursi.cli.connection import Connection, path
from tursi.cli.options import as_json, since_time
from tursi.cli.terminal import dump, duration, line, local_time, size, table

_PERIODS = ("minute", "hour", "day")
_LONGEST = ((2 * 3600, "minute"), (14 * 86400, "hour"))
"""Up to so many seconds that period is added up, where none is shown."""


@click.command()
@click.argument("name", required=False)
@click.option(
    "--by",
    type=click.Choice((*_PERIODS, "deployment", "key")),
    help="What a line is about (default: minute, without a NAME deployment).",
)
@click.option(
    "--since",
    metavar="TIME",
    help="Not before TIME: 90m, 24h, 7d, or 2026-11-26T14:00 (default: 1h by minute, 30d by day, "
    "else 24h).",
)
@click.option("--key", metavar="KEY", help="Only for the API key KEY, by name or id; 0: for none.")
@as_json
@click.pass_obj
def stats(
    connection: Connection,
    *,
    name: str | None,
    by: str | None,
    since: str | None,
    key: str | None,
    json: bool,
) -> None:
    """Show what the deployment NAME, or every deployment, has done, and how fast."""
    by = by or ("minute" if name else "deployment")
    begin = since_time(since)
    answer = connection.get(
        "/statistics", by=_period(by, begin), since=begin, key_name=key, deployment=name
    )
    if name is not None and not answer["deployments"]:
        # Only one that has been removed has done something and isn't there.
        connection.get(path("deployments", name))
    if json:
        dump(answer)
        return
    groups = answer["periods" if by in _PERIODS else f"{by}s"]
    rows = [row for row in groups if row["requests"]]
    if not rows:
        had = f"{name} has had" if name else "There have been"
        line(f"{had} no requests since {local_time(answer['since'])}.")
        return
    lines = [
        *((_name(row, by), *_figures(row)) for row in rows),
        ("total", *_figures(answer["total"])),
    ]
    headers = (_TITLES.get(by, "WHEN"), *_HEADERS)
    # What nobody has isn't worth its room.
    shown = [
        number
        for number, name in enumerate(headers)
        if name not in _OPTIONAL or any(each[number] for each in lines)
    ]
    table(
        [headers[number] for number in shown],
        [[each[number] for number in shown] for each in lines],
        spare=_SPARE,
    )


_TITLES = {"deployment": "NAME", "key": "KEY"}
_HEADERS = (
    "REQUESTS", "P50", "P95", "P99", "1ST BYTE", "QUEUED", "TOKENS IN", "TOKENS OUT", "BATCH",
    "MEMORY", "ERRORS",
)  # fmt: skip


_OPTIONAL = frozenset({"1ST BYTE", "TOKENS IN", "TOKENS OUT", "BATCH", "MEMORY"})
_SPARE = (
    "BATCH", "MEMORY", "1ST BYTE", "P99", "TOKENS IN", "TOKENS OUT", "QUEUED", "P50",
)  # fmt: skip


def _period(by: str, begin: str | None) -> str:
    """The period to ask for."""
    if by in _PERIODS:
        return by
    if begin is None:
        return "hour"
    seconds = (datetime.now(UTC) - datetime.fromisoformat(begin)).total_seconds()
    return next((period for most, period in _LONGEST if seconds <= most), "day")


def _name(row: Mapping[str, Any], by: str) -> str:
    if by == "deployment":
        return row["deployment"] or "(none)"
    if by == "key":
        return str(row["name"] or (row["key"] and f"key {row['key']}") or "(none)")
    if by == "day":
        # A day of UTC, which can be two here.
        return str(row["at"])[:10]
    return local_time(row["at"])[:-3]


def _figures(row: Mapping[str, Any]) -> Sequence[object]:
    latency, first, queue = (row[name] or {} for name in ("latency", "first_byte", "queue"))
    batch, memory = row["batch_size"], row["memory"]
    classes = sorted(row["errors_by_class"].items(), key=lambda each: -each[1])
    return (
        row["requests"],
        *(duration(latency.get(name)) for name in ("p50", "p95", "p99")),
        duration(first["p95"]) if first else None,
        duration(queue.get("p95")),
        row["prompt_tokens"],
        row["completion_tokens"],
        f"{batch['mean']:.1f}, max {batch['max']}" if batch else None,
        size(memory["max"]) if memory else None,
        ", ".join(f"{count} {name}" for name, count in classes) or None,
    )
