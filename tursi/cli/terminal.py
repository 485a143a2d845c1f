"""What is written to the terminal: text made harmless, tables, sizes and times."""

from __future__ import annotations

import io
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from datetime import datetime
from typing import Any, TypeAlias

import click

# What could move the cursor, forge lines or turn text around: C0 and C1
# controls, line separators and the bidirectional controls. A lone surrogate
# can't be encoded at all.
_ESCAPES = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (
        *range(0x20),
        *range(0x7F, 0xA0),
        *range(0x2028, 0x202F),
        *range(0x2066, 0x206A),
        *range(0xD800, 0xE000),
    )
}
_ESCAPES_BUT_LINES = {code: text for code, text in _ESCAPES.items() if code not in {0x09, 0x0A}}
_WIDE = 1000
"""Columns of a table that goes into a file or a pipe, where nobody wants it folded."""
_FOLDED = 24
"""Columns for a folded one at least: in fewer it would be hard to read."""

_Column: TypeAlias = tuple[str, int, list[str]]
"""A column's header, its width and its cells."""


def tolerate() -> None:
    """Let a terminal that can't show a character show its escape instead of failing.

    Input that is no text comes in as lone surrogates, which are refused where it is sent.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def safe(text: object, *, lines: bool = False) -> str:
    """``text`` with every control character escaped; ``lines`` keeps tabs and line ends."""
    return str(text).translate(_ESCAPES_BUT_LINES if lines else _ESCAPES)


def line(text: object) -> None:
    """Write one line that the server had a hand in."""
    click.echo(safe(text))


def prose(text: object, *, indent: int = 0) -> None:
    """The same, broken between words where a terminal is narrower; ``indent`` what follows."""
    said = safe(text)
    if sys.stdout.isatty():
        said = textwrap.fill(
            said,
            shutil.get_terminal_size().columns,
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    click.echo(said)


def note(text: object) -> None:
    """Write one line to stderr: progress and remarks, never the result."""
    click.echo(safe(text), err=True)


def dump(value: Any, *, indent: int | None = 2) -> None:
    """Write ``value`` as JSON, in ASCII; ``indent=None`` keeps it on one line."""
    click.echo(json.dumps(value, indent=indent).replace("\x7f", "\\u007f"))


def table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], *, spare: Sequence[str] = ()
) -> None:
    """Write aligned columns; the last one is folded where it has no room.

    A terminal too narrow for all of them goes without those of ``spare``, the first ones first,
    and folds the other wide ones only where that isn't enough.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [["-" if cell is None else safe(cell) for cell in row] for row in rows]
    columns = [
        (header, max(map(cell_len, (header, *column))), column)
        for header, *column in zip(headers, *cells, strict=True)
    ]
    console = Console(file=sys.stdout)
    if console.is_terminal:
        columns = _fitting(columns, spare, console.width)
    narrow = console.width < _least(columns)
    if not console.is_terminal or console.width < _narrowest(columns):
        console = Console(file=sys.stdout, width=_WIDE)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for header, width, _ in columns[:-1]:
        shown.add_column(header, no_wrap=not narrow or width <= _FOLDED, overflow="fold")
    shown.add_column(columns[-1][0], overflow="fold")
    for row in zip(*(column for _, _, column in columns), strict=True):
        shown.add_row(*map(Text, row))
    with console.capture() as captured:
        console.print(shown)
    for text in captured.get().splitlines():
        # The padding would wrap around in a narrow terminal.
        click.echo(text.rstrip(" "))


def _fitting(columns: list[_Column], spare: Sequence[str], width: int) -> list[_Column]:
    """``columns`` without as many of ``spare`` as are too many for ``width``."""
    for name in spare:
        if _least(columns) <= width:
            break
        columns = [column for column in columns if column[0] != name]
    return columns


def _least(columns: Sequence[_Column]) -> int:
    """The width that they need, the last one folded."""
    *others, (_, last, _) = columns
    return sum(2 + width for _, width, _ in others) + min(last, _FOLDED)


def _narrowest(columns: Sequence[_Column]) -> int:
    """The width that they need, all the wide ones folded."""
    return sum(2 + min(width, _FOLDED) for _, width, _ in columns) - 2


def size(count: float | None) -> str:
    """Bytes as people read them."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float | None) -> str:
    """A duration as people read it, in three figures or so."""
    if seconds is None:
        return "-"
    if seconds < 0.9995:
        milliseconds = seconds * 1000
        return f"{milliseconds:.0f} ms" if milliseconds >= 99.95 else f"{milliseconds:.3g} ms"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    return f"{hours}h {minutes}m" if hours else f"{minutes}m {rest}s"


def local_time(text: str | None) -> str:
    """An RFC 3339 time in the terminal's time zone."""
    if not text:
        return "-"
    try:
        return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return safe(text)
