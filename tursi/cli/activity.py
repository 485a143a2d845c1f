"""What goes on, drawn into a terminal of any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from tursi.cli.terminal import duration, safe, size

if TYPE_CHECKING:
    from rich.text import Text

Row = dict[str, Any]

SORTS: Mapping[str, tuple[str, Callable[[Row], Any]]] = {
    "n": ("name", lambda _: ()),
    "r": ("requests", lambda row: -row["requests_per_second"]),
    "l": ("latency", lambda row: -((row["latency"] or {}).get("p95") or 0)),
    "m": ("memory", lambda row: -row["rss"]),
    "c": ("cpu", lambda row: -(row["cpu"] or 0)),
}
"""By the key that chooses it: its name, and what rows are ordered by before their names."""

_LEAST_NAME = 12
"""Columns that a name is cut to before anything else goes."""
_GAP = 2
_HEALTHY = frozenset({"ready"})
_AT_REST = frozenset({"stopped"})
_ILL = frozenset({"failed", "quarantined", "wedged", "backoff", "suspect"})


class _Column(NamedTuple):
    title: str
    cell: Callable[[Row], str]
    keep: int
    """Those with the lowest number go first where there is no room."""
    least: int = 0
    """As wide at least, lest everything moves with each look."""


_COLUMNS = (
    _Column("PHASE", lambda row: _phase(row), 99),  # noqa: PLW0108 - defined below
    _Column("READY", lambda row: f"{row['ready']}/{row['replicas']}", 6),
    _Column("GEN", lambda row: str(row["generation"]), 0),
    _Column("REQ/S", lambda row: _rate(row["requests_per_second"]), 98, 5),
    _Column("ERR/S", lambda row: _rate(row["errors_per_second"]), 8),
    _Column("P50", lambda row: _time(row, "p50"), 3, 7),
    _Column("P95", lambda row: _time(row, "p95"), 97, 7),
    _Column("QUEUE", lambda row: str(row["queued"] or "-"), 9),
    _Column("BUSY", lambda row: str(row["in_flight"] or "-"), 7),
    _Column("TOK/S", lambda row: _rate(row["tokens_per_second"]), 5, 5),
    _Column("BATCH", lambda row: f"{row['batch_size']:.1f}" if row["batch_size"] else "-", 2),
    _Column("MEMORY", lambda row: size(row["rss"]) if row["rss"] else "-", 10, 7),
    _Column("GPU", lambda row: size(row["gpu_memory"]) if row["gpu_memory"] else "-", 1),
    _Column("CPU", lambda row: "-" if row["cpu"] is None else f"{row['cpu']:.0f} %", 4, 5),
)


def with_cpu(now: Row, before: Row | None) -> Row:
    """The activity with shares of a processor in percent, from what was used since ``before``."""
    seconds = (_at(now) - _at(before)).total_seconds() if before else 0.0

    def share(one: Row, other: Row | None) -> float | None:
        if other is None or seconds <= 0:
            return None
        used = float(one["cpu_seconds"] - other["cpu_seconds"])
        # A worker that ends takes its seconds along.
        return 100 * used / seconds if used >= 0 else None

    earlier = {row["name"]: row for row in before["deployments"]} if before else {}
    same = before is not None and before["daemon"]["pid"] == now["daemon"]["pid"]
    daemon = now["daemon"]
    return now | {
        "daemon": daemon | {"cpu": share(daemon, before["daemon"] if before and same else None)},
        "deployments": [
            row | {"cpu": share(row, earlier.get(row["name"]))} for row in now["deployments"]
        ],
    }


def frame(
    activity: Row,
    width: int,
    height: int | None,
    *,
    sort: str = "n",
    trouble: str = "",
) -> Text:
    """All of it in ``height`` lines of ``width`` columns, or as many as it needs.

    ``trouble`` is told in place of the second line; what is shown is then old.
    """
    from rich.text import Text

    head = [_daemon(activity), Text(safe(trouble), "bold red") if trouble else _rooms(activity)]
    foot = [] if height is None else [_keys(sort)]
    order = SORTS[sort][1]
    deployments = sorted(activity["deployments"], key=lambda row: (order(row), row["name"]))
    rows = [each for row in deployments for each in (row, *_generations(row))]
    room = len(rows) if height is None else max(height - len(head) - len(foot) - 2, 0)
    lines = [*head, Text("")]
    if rows:
        lines += _table(rows, width, room, dim=bool(trouble))
    else:
        lines.append(Text("There are no deployments; `tursi up MODEL` makes one."))
    hidden = len(rows) - room
    if hidden > 0:
        # In the place of the last row that would fit.
        lines[-1] = Text(f"... and {hidden + 1} more", "dim")
    if height is not None:
        lines = lines[: height - len(foot)]
        lines += [Text("")] * (height - len(foot) - len(lines))
    for each in (*lines, *foot):
        each.truncate(width, overflow="ellipsis")
    return Text("\n", no_wrap=True, overflow="crop").join([*lines, *foot])


def _generations(row: Row) -> list[Row]:
    """A row for each generation, where there are several."""
    return [
        each
        | {
            "name": f"  gen {each['generation']}",
            "phase": "",
            "replicas": each["workers"],
            "queued": 0,
            "rss": 0,
            **dict.fromkeys(("progress", "tokens_per_second", "batch_size", "gpu_memory", "cpu")),
        }
        for each in row["generations"]
    ]


def _daemon(activity: Row) -> Text:
    from rich.text import Text

    daemon = activity["daemon"]
    at, began = _at(activity), datetime.fromisoformat(daemon["started_at"])
    up = duration(max(round((at - began).total_seconds()), 0))
    cpu = "" if daemon["cpu"] is None else f"   cpu {daemon['cpu']:.1f} %"
    return Text.assemble(
        (f"tursi {safe(daemon['version'])}", "bold"),
        f"   {at.astimezone():%H:%M:%S}   up {up}{cpu}   memory {size(daemon['rss'])}",
    )


def _rooms(activity: Row) -> Text:
    from rich.text import Text

    rows = activity["deployments"]
    rate = sum(row["requests_per_second"] for row in rows)
    busy = sum(row["in_flight"] for row in rows)
    said = [f"{_rate(rate, '0')} req/s, {busy} in flight"]
    for room in activity["rooms"]:
        total = f" of {size(room['total'])}" if room["total"] is not None else ""
        if room["free"] is not None:
            said.append(f"{safe(room['device'])} {size(room['free'])}{total} free")
    return Text("   ".join(said))


def _keys(sort: str) -> Text:
    from rich.text import Text

    said = Text.assemble(("q quit   sort by:", "dim"))
    for key, (name, _) in SORTS.items():
        said.append("  ").append(f"{key} {name}", "bold" if key == sort else "dim")
    return said


def _table(rows: Sequence[Row], width: int, room: int, *, dim: bool) -> list[Text]:
    """The header and ``room`` rows."""
    from rich.cells import cell_len, set_cell_size
    from rich.text import Text

    names = [safe(row["name"]) for row in rows]
    columns = {
        column: [column.title, *(column.cell(row) for row in rows)]
        for column in _COLUMNS
        # What no deployment has isn't worth its room.
        if column.title != "GPU" or any(row["gpu_memory"] for row in rows)
    }
    widths = {column: max(column.least, *map(len, cells)) for column, cells in columns.items()}
    longest = max(map(cell_len, ("NAME", *names)))

    def used() -> int:
        return sum(_GAP + widths[column] for column in columns)

    while len(columns) > 1 and used() + min(longest, _LEAST_NAME) > width:
        del columns[min(columns, key=lambda column: column.keep)]
    name_width = max(min(longest, width - used()), 4)
    lines = []
    for number, name in enumerate(("NAME", *names)[: room + 1]):
        row = rows[number - 1] if number else None
        if cell_len(name) > name_width:
            name = set_cell_size(name, name_width - 1) + "…"  # noqa: PLW2901 - the same, cut
        text = Text(set_cell_size(name, name_width), _style("", row, dim=dim))
        for column, cells in columns.items():
            cell = cells[number]
            pad = cell.ljust if column.title == "PHASE" else cell.rjust
            text.append(" " * _GAP)
            text.append(pad(widths[column]), _style(column.title, row, dim=dim))
        lines.append(text)
    return lines


def _style(title: str, row: Row | None, *, dim: bool) -> str:
    if row is None:
        return "bold"
    if dim:
        return "dim"
    if title == "PHASE":
        phase = row["phase"]
        if phase in _HEALTHY:
            return "green"
        return "red" if phase in _ILL else "dim" if phase in _AT_REST else "yellow"
    return "red" if title == "ERR/S" and row["errors_per_second"] else ""


def _phase(row: Row) -> str:
    """The phase, with how far it has come."""
    progress = row["progress"]
    if not progress:
        return str(row["phase"])
    stage = safe(progress["stage"])
    if progress["done"] is None or not progress["total"]:
        return stage
    return f"{stage} {100 * min(progress['done'] / progress['total'], 1):.0f} %"


def _rate(value: float | None, nothing: str = "-") -> str:
    if not value:
        return nothing
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _time(row: Row, name: str) -> str:
    return duration((row["latency"] or {}).get(name))


def _at(activity: Row) -> datetime:
    return datetime.fromisoformat(activity["at"])
