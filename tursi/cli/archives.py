"""Deployments with their files as archives: export, import."""

from __future__ import annotations

import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import click

from tursi.cli.connection import Connection, Exit, Failure, path
from tursi.cli.deployments import announcement, await_ready, risks, waiting
from tursi.cli.options import as_json
from tursi.cli.progress import Display, Look, Transfer, Verdict, display
from tursi.cli.target import new_file
from tursi.cli.terminal import dump, line, local_time, note, prose, size

_SECONDS = 3600.0
"""For as long as the daemon may read large files for their hashes, or write the last of them."""
_BLOCK = 512
_MAX_HEAD = 8 * 1024 * 1024
"""Bytes of an archive's manifest; the daemon takes fewer."""
_PIECE = 256 * 1024
_STDIO = "-"


@click.command()
@click.argument("name")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="The file to write (default: NAME.tar); - means standard output.",
)
@as_json
@click.pass_obj
def export(connection: Connection, *, name: str, output: Path | None, json: bool) -> None:
    """Write the deployment NAME with all its files into one archive.

    `tursi import` makes the same deployment of it, on a machine without a network too.
    """
    place = path("deployments", name, "export")
    if str(output) == _STDIO:
        if sys.stdout.isatty():
            raise Failure("An archive is nothing for a terminal; name a file with -o.", Exit.USAGE)
        try:
            with display() as shown:
                _fetch(connection, place, sys.stdout.buffer, name, shown)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise Failure("Nobody reads the archive any more, and it isn't whole.") from None
        return
    chosen = (output or Path(f"{name}.tar")).absolute()
    with display() as shown, new_file(chosen) as target:
        _fetch(connection, place, target, name, shown)
        length = target.tell()
    if json:
        dump({"file": str(chosen), "size": length})
    else:
        line(f"{name} is exported to {chosen} ({size(length)}).")


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
@click.option("--name", help="Name of the deployment (default: the one that it had).")
@click.option("--dry-run", is_flag=True, help="Only tell what it would do.")
@click.option("--allow-pickle", is_flag=True, help="Take pickle weights: they can run code.")
@click.option("--trust-remote-code", is_flag=True, help="Take Python code that is in the model.")
@waiting
@as_json
@click.pass_context
def import_(
    context: click.Context,
    /,
    *,
    file: Path,
    name: str | None,
    dry_run: bool,
    allow_pickle: bool,
    trust_remote_code: bool,
    no_wait: bool,
    timeout: float,
    json: bool,
) -> None:
    """Deploy what FILE has, an archive of `tursi export`; - means standard input.

    Every file is compared with its hash, and nothing is kept of an archive that isn't
    whole. What is on the disk already is shared.
    """
    connection: Connection = context.obj
    wishes: dict[str, Any] = {"name": name}
    wishes |= {"allow_pickle": 1} if allow_pickle else {}
    wishes |= {"trust_remote_code": 1} if trust_remote_code else {}
    with _opened(file) as source:
        head = _head(source)
        # What speaks against it is said before all of it is sent.
        plan = _upload(connection, iter([head]), {**wishes, "dry_run": 1})
        if not json:
            _tell(plan)
        if dry_run:
            dump(plan) if json else None
            return
        total = os.fstat(source.fileno()).st_size if source.seekable() else None
        try:
            with display() as shown:
                answer = _send(connection, head, source, total, wishes, str(plan["name"]), shown)
        except KeyboardInterrupt:
            note(f"{plan['name']} is not imported; nothing is kept of what was sent.")
            raise
    status = answer["deployment"]
    if not json:
        line(_announcement(status, answer["outcome"]))
        for warning in risks(status):
            note(warning)
    await_ready(context, answer, no_wait=no_wait, timeout=timeout, json=json)


def _fetch(
    connection: Connection, place: str, target: IO[bytes], name: str, shown: Display
) -> None:
    transfer = Transfer("exporting", time.monotonic)

    def advanced(done: int, total: int | None) -> None:
        shown.show(name, transfer.look(done, total))

    # For their hashes, which come before all else.
    shown.show(name, Look(Verdict.COMING, "its files are read"))
    connection.download("POST", place, target, seconds=_SECONDS, advanced=advanced)


def _upload(
    connection: Connection, pieces: Iterator[bytes], wishes: dict[str, Any]
) -> dict[str, Any]:
    answer: dict[str, Any] = connection.upload(
        "/imports", pieces, "application/x-tar", parameters=wishes, seconds=_SECONDS
    )
    return answer


def _send(
    connection: Connection,
    head: bytes,
    source: IO[bytes],
    total: int | None,
    wishes: dict[str, Any],
    name: str,
    shown: Display,
) -> dict[str, Any]:
    transfer = Transfer("importing", time.monotonic)

    def advanced(done: int) -> None:
        shown.show(name, transfer.look(done, total))

    return _upload(connection, _pieces(head, source, advanced), wishes)


def _pieces(head: bytes, source: IO[bytes], advanced: Callable[[int], None]) -> Iterator[bytes]:
    done = len(head)
    yield head
    while piece := source.read(_PIECE):
        yield piece
        done += len(piece)
        advanced(done)


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    if str(file) == _STDIO:
        yield sys.stdin.buffer
        return
    try:
        with file.open("rb") as source:
            yield source
    except OSError as error:
        if error.filename is None:
            raise
        raise Failure(f"{file} can't be read: {error.strerror}.", Exit.USAGE) from None


def _head(source: IO[bytes]) -> bytes:
    """The archive up to the end of its manifest."""
    first = source.read(_BLOCK)
    try:
        length = tarfile.TarInfo.frombuf(first, "utf-8", "strict").size
    except (tarfile.TarError, ValueError):
        length = -1
    if not 0 <= length <= _MAX_HEAD:
        raise Failure("This is no archive that `tursi export` has made.", code="archive_invalid")
    return first + source.read(length + -length % _BLOCK)


def _tell(plan: dict[str, Any]) -> None:
    """What an archive is, and what it means here."""
    what = {
        "created": "a new deployment",
        "replaced": "changes the deployment",
        "unchanged": "the same as the deployment",
        "scaled": "changes the deployment's number of replicas",
        "scheduled": "changes when the deployment is loaded",
        "started": "starts the deployment, which is the same",
        "back": "leaves the deployment at what it serves, and gives up what was to take over",
    }.get(plan["outcome"], plan["outcome"])
    prose(f"{plan['model']}, exported {local_time(plan['exported_at'])} by {plan['exported_by']}")
    shared = f", of which {size(plan['present'])} are here already" if plan["present"] else ""
    line(f"{plan['files']} files, {size(plan['size'])}{shared}; {size(plan['free'])} are free")
    line(f"{plan['name']}: {what}")


def _announcement(status: dict[str, Any], outcome: str) -> str:
    name, number = status["name"], status["generation"]
    return {
        "created": f"{name}: imported.",
        "replaced": f"{name}: imported, generation {number} takes over when it is ready.",
        "unchanged": f"{name}: nothing to change, it is what the archive has.",
    }.get(outcome) or announcement(status, outcome, ready=False)
