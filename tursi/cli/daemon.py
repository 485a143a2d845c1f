"""The daemon itself: how it is, and which version."""

from __future__ import annotations

from typing import Any

import click

from tursi import __version__
from tursi.cli.connection import Connection, Exit, Failure
from tursi.cli.options import as_json
from tursi.cli.terminal import dump, line, local_time, note, table
from tursi.model import Containment


@click.command()
@as_json
@click.pass_obj
def status(connection: Connection, *, json: bool) -> None:
    """Show how the daemon is: version, listeners, folders, counts."""
    found = connection.get("/status")
    if json:
        dump(found)
        return
    if "containment" in found:
        found["containment"] = str(Containment(**found["containment"]))
    rows = [(key.replace("_", " "), each) for key, value in found.items() for each in _shown(value)]
    rows = [(key, local_time(value) if key == "started at" else value) for key, value in rows]
    table(("DAEMON", str(connection.socket)), rows)


@click.command()
@as_json
@click.pass_obj
def version(connection: Connection, *, json: bool) -> None:
    """Show the version of this command, and of the daemon if one answers."""
    try:
        answered = str(connection.get("/status").get("version"))
    except Failure as error:
        if error.exit_code != Exit.NO_DAEMON:
            raise
        answered = None
    if json:
        dump({"client": __version__, "daemon": answered})
        return
    line(f"tursi {__version__}")
    if answered is None:
        note("No daemon answers; `tursi status` says why.")
    elif answered != __version__:
        line(f"daemon {answered} (restart it to bring it to this version)")
    else:
        line(f"daemon {answered}")


def _shown(value: Any) -> list[str]:
    """A value of the status as lines."""
    if isinstance(value, list):
        return [text for each in value for text in _shown(each)]
    if isinstance(value, dict):
        if "endpoint" in value:
            return [f"{value['endpoint']} ({', '.join(value.get('roles', []))})"]
        return [", ".join(f"{key} {each}" for key, each in value.items())]
    return [str(value)]
