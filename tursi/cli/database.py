"""The database: backed up, checked and restored, whether or not a daemon runs."""

from __future__ import annotations

import json as jsonlib
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from tursi.cli.connection import Connection, Exit, Failure, failure
from tursi.cli.options import as_json
from tursi.cli.process import find
from tursi.cli.target import new_file
from tursi.cli.terminal import dump, line, size
from tursi.model import folders

_SECONDS = 3600.0
"""For as long as reading through a large database on a slow disk may take."""

_state = click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help="Work on the database in this state folder, which no daemon may be using.",
)


@click.group("db")
def db() -> None:
    """Back up, check and restore the database."""


@db.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), required=False)
@_state
@as_json
@click.pass_obj
def backup(connection: Connection, *, file: Path | None, state: Path | None, json: bool) -> None:
    """Write a consistent copy to FILE, while the daemon goes on."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    chosen = (file or Path(f"tursi-{stamp}.sqlite")).absolute()
    answer = None if state else _fetched(connection, chosen)
    if answer is None:
        answer = offline(connection, state, "backup", chosen)
    if json:
        dump(answer)
    else:
        line(f"The database is backed up in {answer['file']} ({size(answer['size'])}).")


@db.command()
@_state
@as_json
@click.pass_obj
def check(connection: Connection, *, state: Path | None, json: bool) -> None:
    """Read all of the database, and tell whether it is whole."""
    answer = None
    if state is None:
        try:
            answer = connection.call("GET", "/database", seconds=_SECONDS).body
        except Failure as error:
            _unless_nobody(error)
    if answer is None:
        answer = offline(connection, state, "check")
    if json:
        dump(answer)
    else:
        line(f"{answer['path']}: {size(answer['size'])}, schema {answer['schema']}")
        for copy in answer["copies"]:
            line(f"copy from before an upgrade: {copy}")
        for problem in answer["problems"]:
            line(f"problem: {problem}")
        line("It is damaged." if answer["problems"] else "It is whole.")
    if answer["problems"]:
        raise SystemExit(int(Exit.FAILED))


@db.command()
@click.argument("file", type=click.Path(path_type=Path))
@_state
@as_json
@click.pass_obj
def restore(connection: Connection, *, file: Path, state: Path | None, json: bool) -> None:
    """Put the backup FILE in the place of the database; no daemon may run."""
    answer = offline(connection, state, "restore", file.absolute())
    if json:
        dump(answer)
        return
    line(f"{answer['file']} is restored from {file}.")
    if answer["replaced"]:
        line(f"The one before it is {answer['replaced']}.")


def _fetched(connection: Connection, file: Path) -> dict[str, Any] | None:
    """The daemon's copy, written to ``file``; ``None`` where no daemon answers."""
    try:
        with new_file(file) as target:
            connection.download("POST", "/database/backup", target, seconds=_SECONDS)
            length = target.tell()
    except Failure as error:
        _unless_nobody(error)
        return None
    return {"file": str(file), "size": length}


def _unless_nobody(error: Failure) -> None:
    """Raise it, unless it says that no daemon runs."""
    if error.exit_code != Exit.NO_DAEMON or error.code:
        raise error


def offline(
    connection: Connection,
    state: Path | None,
    action: str,
    *arguments: Path,
    seconds: float = _SECONDS,
) -> dict[str, Any]:
    """What the tool answers that works on the file itself; ``Failure``."""
    service = find(connection, state=state)
    usual = folders(os.environ, os.getuid()).socket.absolute()
    if state is None and connection.socket != usual and service.said is None:
        # Another daemon's socket says nothing of where its state is.
        raise Failure(
            f"No daemon answers at {connection.socket}; name its state folder with --state.",
            Exit.NO_DAEMON,
        )
    folder = service.places.state.absolute()
    command = [sys.executable, "-I", "-m", "tursi.database", action, str(folder)]
    try:
        done = subprocess.run(
            [*command, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"Reading the database took more than {seconds:.0f} s.") from None
    try:
        answer: dict[str, Any] = jsonlib.loads(done.stdout)
    except ValueError:
        raise Failure(f"The database tool ended with status {done.returncode}.") from None
    if answer.get("error", {}).get("code") == "already_running":
        raise Failure(f"{answer['error']['message']} Stop it first.")
    if done.returncode:
        raise failure(answer, done.returncode)
    return answer
