"""``tursi doctor``: what commonly goes wrong, and what to do."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tursi.cli.connection import Connection, Exit, Failure
from tursi.cli.database import offline
from tursi.cli.options import as_json
from tursi.cli.process import find
from tursi.cli.terminal import dump, safe

if TYPE_CHECKING:
    from tursi.doctor import Facts

_HUB_SECONDS = 10.0
_DATABASE_SECONDS = 30.0
"""More than a database of some hundred megabytes takes to be read."""
_SIGNS = {"ok": ("ok", "green"), "note": ("note", "cyan"), "warning": ("warn", "yellow"),
          "problem": ("FAIL", "red")}  # fmt: skip


@click.command()
@click.option("--hub", is_flag=True, help="Also see whether the hub can be reached.")
@as_json
@click.pass_context
def doctor(context: click.Context, *, hub: bool, json: bool) -> None:
    """Look for what commonly goes wrong, with advice; exits with 1 if something doesn't work.

    Works with and without a running daemon; run it as the daemon's user.
    """
    # Late: other commands needn't wait for it.
    from tursi.doctor import Level, collect, examine

    connection: Connection = context.obj
    status, unanswered = _ask(connection)
    service = find(connection)
    places, said = service.places, service.said
    if said is not None and said.configuration is not None:
        places = replace(places, configuration=Path(said.configuration))
    facts = collect(places, status=status, unanswered=unanswered)
    facts = replace(facts, database=_database(connection, facts))
    if hub:
        facts = replace(facts, hub=_reach(facts.endpoint))
    findings = examine(facts)
    problems = sum(each.level is Level.PROBLEM for each in findings)
    warnings = sum(each.level is Level.WARNING for each in findings)
    if json:
        dump({"findings": [asdict(each) for each in findings], "problems": problems})
    else:
        width = max(len(each.name) for each in findings)
        for each in findings:
            word, colour = _SIGNS[each.level]
            mark = click.style(f"{word:>4}", fg=colour, bold=each.level is not Level.OK)
            click.echo(f"{mark}  {each.name:<{width}}  {safe(each.message)}")
            if each.advice:
                click.echo(click.style(_folded(safe(each.advice), width + 8), dim=True))
        click.echo(_summary(problems, warnings))
    if problems:
        context.exit(Exit.FAILED)


def _ask(connection: Connection) -> tuple[dict[str, Any] | None, str | None]:
    try:
        found: dict[str, Any] = connection.get("/status")
    except Failure as error:
        return None, error.message
    return found, None


def _database(connection: Connection, facts: Facts) -> dict[str, Any] | None:
    """What a look through it has found, by the daemon if one runs."""
    place = next(each for each in facts.places if each.what == "database")
    try:
        if facts.status is not None:
            found: dict[str, Any] = connection.call(
                "GET", "/database", seconds=_DATABASE_SECONDS
            ).body
            return found
        if not place.exists or facts.holder is not None:
            return None
        return offline(connection, place.path.parent, "look", seconds=_DATABASE_SECONDS)
    except Failure as error:
        return {"error": error.message}


def _reach(endpoint: str) -> str:
    """Why the hub doesn't answer; empty if it does."""
    # Imported late: it takes longer than all the rest of a command's start.
    import httpx

    try:
        httpx.head(endpoint, timeout=_HUB_SECONDS)
    except httpx.HTTPError as error:
        return str(error) or type(error).__name__
    return ""


def _folded(advice: str, indent: int) -> str:
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    return click.wrap_text(
        advice,
        width=max(columns - 1, indent + 30),
        initial_indent=" " * indent + "> ",
        subsequent_indent=" " * (indent + 2),
    )


def _summary(problems: int, warnings: int) -> str:
    if not problems and not warnings:
        return "Nothing is wrong."
    counts = [
        f"{count} {word}{'s' * (count > 1)}"
        for count, word in ((problems, "problem"), (warnings, "warning"))
        if count
    ]
    return f"{' and '.join(counts)} found."
