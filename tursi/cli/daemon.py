"""Which version this is, and the daemon."""

from __future__ import annotations

import click

from tursi import __version__
from tursi.cli.connection import Connection, Exit, Failure
from tursi.cli.options import as_json
from tursi.cli.terminal import dump, line, note


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
