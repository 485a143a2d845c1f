"""What happened: logs, events and the audit."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping, Sequence
from typing import Any

import click

from tursi.cli.connection import Connection, Exit, Failure, path
from tursi.cli.options import as_json, since_time
from tursi.cli.terminal import dump, line, local_time, note, prose, size, table

_INDENT = 4
"""Of an event's second line."""


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
        found = [_log_line(text) for text in answer["lines"]]
        if json:
            dump({**answer, "lines": found})
            return
        for each in found:
            line(_read(each))
        return
    for text in _followed(connection, place, {"lines": lines, "follow": 1}):
        if json:
            dump(_log_line(text), indent=None)
        else:
            line(_read(_log_line(text)))


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
            prose(_event(event), indent=_INDENT)
        if not answer["events"]:
            note(f"There are no events of {name}." if name else "There are no events.")
        return
    for event in _followed(connection, "/events", {**parameters, "follow": 1}):
        if json:
            dump(event, indent=None)
        else:
            prose(_event(event), indent=_INDENT)


@click.command()
@click.option("--since", metavar="TIME", help="Not before TIME: 90m, 24h, 7d, or 2026-11-26T14:00.")
@click.option("--by", metavar="WHO", help="Only of WHO: 'uid 1000', 'key 3', an address.")
@click.option("--action", help="Only of that kind: deployments.stop, or deployments for all such.")
@click.option("--target", metavar="NAME", help="Only what was done to NAME.")
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(1, 1000),
    default=50,
    show_default=True,
    help="Entries.",
)
@as_json
@click.pass_obj
def audit(
    connection: Connection,
    *,
    since: str | None,
    by: str | None,
    action: str | None,
    target: str | None,
    limit: int,
    json: bool,
) -> None:
    """Show who changed what, or was refused it."""
    answer = connection.get(
        "/audit", since=since_time(since), who=by, action=action, target=target, limit=limit
    )
    if json:
        dump(answer)
        return
    rows = answer["entries"]
    if not rows:
        line("The audit has nothing of that.")
        return
    table(
        ("ID", "WHEN", "WHO", "ACTION", "TARGET", "RESULT", "REQUEST"),
        [
            (
                row["id"],
                local_time(row["at"]),
                row["by"],
                row["action"],
                row["target"],
                " ".join(str(part) for part in (row["status"], row["code"]) if part) or "done",
                row["request"],
            )
            for row in rows
        ],
        spare=("REQUEST", "ID"),
    )


@click.command()
@click.argument("name")
@click.argument("id", required=False)
@click.option(
    "-n", "--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Crashes."
)
@as_json
@click.pass_obj
def crashes(
    connection: Connection,
    *,
    name: str,
    id: str | None,  # noqa: A002 - the user's word
    limit: int,
    json: bool,
) -> None:
    """Show how workers of NAME ended unasked; with ID all that is known of one."""
    if id is not None:
        found = connection.get(path("deployments", name, "crashes", id))
        dump(found) if json else _dossier(found)
        return
    answer = connection.get(path("deployments", name, "crashes"), limit=limit)
    if json:
        dump(answer)
        return
    rows = answer["crashes"]
    if not rows:
        line(f"No worker of {name} has ended unasked.")
        return
    table(
        ("ID", "WHEN", "REPLICA", "WHILE", "CLASS", "MEMORY", "HELD", "REASON"),
        [
            (
                row["id"],
                local_time(row["at"]),
                row["replica"],
                row["phase"],
                row["failure"],
                size(row["peak_rss"]),
                len(row["requests"]),
                row["reason"],
            )
            for row in rows
        ],
        spare=("HELD", "REPLICA", "MEMORY", "WHILE"),
    )


@click.command()
@click.argument("name")
@as_json
@click.pass_obj
def why(connection: Connection, *, name: str, json: bool) -> None:
    """Tell why the deployment NAME is as it is, and what comes next."""
    answer = connection.get(path("deployments", name, "why"))
    if json:
        dump(answer)
        return
    for sentence in answer["sentences"]:
        prose(sentence)
    if answer["events"]:
        line("")
        for event in answer["events"]:
            prose(_event({**event, "deployment": None}), indent=_INDENT)


def _log_line(text: str) -> str | dict[str, Any]:
    """A line of a log; an object where the daemon writes them as such."""
    if text.startswith("{"):
        try:
            found = jsonlib.loads(text)
        except ValueError:
            return text
        if isinstance(found, dict) and {"time", "stream", "message"} <= found.keys():
            return found
    return text


def _read(text: str | dict[str, Any]) -> str:
    """The same for people."""
    if isinstance(text, str):
        return text
    return f"{text['time']} {text['stream']} {text['message']}"


def _event(event: Mapping[str, Any]) -> str:
    cause = event.get("cause")
    # Where the message says it already, once is enough.
    cause = f" (cause: {cause})" if cause and cause not in event["message"] else ""
    about = f"{event['deployment']}: " if event.get("deployment") else ""
    return f"{local_time(event['at'])}  {event['kind']}  {about}{event['message']}{cause}"


def _followed(connection: Connection, place: str, parameters: dict[str, object]) -> Any:
    with connection.stream("GET", place, parameters=parameters) as stream:
        for event in stream:
            yield jsonlib.loads(event.data)
    raise Failure("The daemon has ended the stream; it may be stopping.", Exit.NO_DAEMON)


def _dossier(found: Mapping[str, Any]) -> None:
    """All that is known of one crash."""
    order = found["order"]
    began = found["ready_at"] or found["spawned_at"]
    line(f"Crash {found['id']} of {found['deployment']}: {found['reason']}")
    for name, value in (
        ("when", local_time(found["at"])),
        ("while", f"{found['phase']}, since {local_time(began)}"),
        ("class", found["failure"]),
        ("worker", f"replica {found['replica']}, generation {found['generation']}"),
        ("life", found["worker"]),
        ("exit status", found["exit_status"]),
        ("signal", found["signal"]),
        ("intent", found["intent"]),
        ("peak memory", size(found["peak_rss"]) if found["peak_rss"] else None),
        ("processor", f"{found['cpu_seconds']:.1f} s" if found["cpu_seconds"] else None),
        ("held", ", ".join(found["requests"])),
        ("model", order["folder"]),
        ("asked for", ", ".join(filter(None, (order["task"], order["device"], order["dtype"])))),
        ("versions", ", ".join(f"{key} {text}" for key, text in found["versions"].items())),
    ):
        if value not in {None, ""}:
            line(f"  {name + ':':<13}{value}")
    for title, text in (("traceback", found["traceback"]), ("stacks", found["stacks"])):
        if text:
            _section(title, text.splitlines())
    if found["usage"]:
        _section(
            "memory and processor",
            [
                f"{local_time(each['at'])}  {size(each['rss'])}  {each['cpu_seconds']:.1f} s"
                for each in found["usage"]
            ],
        )
    if found["log"]:
        _section("log", [_read(_log_line(text)) for text in found["log"]])


def _section(title: str, lines: Sequence[str]) -> None:
    line("")
    line(f"{title}:")
    for text in lines:
        line(f"  {text}")
