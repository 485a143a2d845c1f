"""What happened: logs, events and statistics."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping, Sequence
from typing import Any

import click

from tursi.cli.connection import Connection, Exit, Failure, path
from tursi.cli.options import as_json
from tursi.cli.terminal import dump, line, local_time, table


@click.command()
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines until Ctrl-C.")
@click.option(
    "-n", "--lines", type=click.IntRange(min=0), default=100, show_default=True, help="Lines."
)
@as_json
@click.pass_obj
def logs(connection: Connection, *, name: str, follow: bool, lines: int, json: bool) -> None:
    """Show what the workers of the deployment NAME have written."""
    place = path("deployments", name, "logs")
    if not follow:
        answer = connection.get(place, lines=lines)
        if json:
            dump(answer)
            return
        for text in answer["lines"]:
            line(text)
        return
    for text in _followed(connection, place, {"lines": lines, "follow": 1}):
        if json:
            dump(text, indent=None)
        else:
            line(text)


@click.command()
@click.argument("name", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on with new events until Ctrl-C.")
@click.option(
    "-n", "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Events."
)
@as_json
@click.pass_obj
def events(
    connection: Connection, *, name: str | None, follow: bool, limit: int, json: bool
) -> None:
    """Show what happened and why, to every deployment or to NAME."""
    parameters: dict[str, object] = {"limit": limit, "deployment": name}
    if not follow:
        answer = connection.get("/events", **parameters)
        if json:
            dump(answer)
            return
        for event in answer["events"]:
            line(_event(event))
        return
    for event in _followed(connection, "/events", {**parameters, "follow": 1}):
        if json:
            dump(event, indent=None)
        else:
            line(_event(event))


@click.command()
@click.argument("name")
@click.option(
    "--minutes",
    type=click.IntRange(min=1),
    default=60,
    show_default=True,
    help="How far to look back.",
)
@as_json
@click.pass_obj
def stats(connection: Connection, *, name: str, minutes: int, json: bool) -> None:
    """Show what the deployment NAME has done, minute by minute."""
    answer = connection.get(path("deployments", name, "statistics"), minutes=minutes)
    if json:
        dump(answer)
        return
    rows = answer["minutes"]
    if not rows:
        line(f"{name} has had no requests in the last {minutes} minutes.")
        return
    total = {key: sum(row[key] for row in rows) for key in _COUNTS}
    table(
        ("MINUTE", "REQUESTS", "ERRORS", "MEAN", "QUEUED", "TOKENS IN", "TOKENS OUT"),
        [
            *((local_time(row["minute"])[:-3], *_statistics(row)) for row in rows),
            ("total", *_statistics(total)),
        ],
    )


_COUNTS = (
    "requests", "errors", "prompt_tokens", "completion_tokens", "seconds", "queue_seconds",
)  # fmt: skip


def _statistics(row: Mapping[str, Any]) -> Sequence[object]:
    requests = row["requests"]
    return (
        requests,
        row["errors"],
        f"{1000 * row['seconds'] / requests:.1f} ms" if requests else None,
        f"{1000 * row['queue_seconds'] / requests:.1f} ms" if requests else None,
        row["prompt_tokens"],
        row["completion_tokens"],
    )


def _event(event: Mapping[str, Any]) -> str:
    cause = f" (cause: {event['cause']})" if event.get("cause") else ""
    about = f"{event['deployment']}: " if event.get("deployment") else ""
    return f"{local_time(event['at'])}  {event['kind']}  {about}{event['message']}{cause}"


def _followed(connection: Connection, place: str, parameters: dict[str, object]) -> Any:
    with connection.stream("GET", place, parameters=parameters) as stream:
        for event in stream:
            yield jsonlib.loads(event.data)
    raise Failure("The daemon has ended the stream; it may be stopping.", Exit.NO_DAEMON)
