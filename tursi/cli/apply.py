"""Deployments as a file has them: apply."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click

from tursi.cli.connection import Connection, Exit, Failure, path
from tursi.cli.deployments import GONE_SECONDS, await_gone, waiting
from tursi.cli.file import SCHEDULE, read
from tursi.cli.generations import changes, flat, told
from tursi.cli.options import as_json
from tursi.cli.progress import GIVEN_UP, display, wait
from tursi.cli.terminal import dump, line


class _Change(NamedTuple):
    """What has to be done to one deployment."""

    name: str
    what: str
    """create, change, retry or remove."""
    differences: list[tuple[str, object, object]]
    body: dict[str, Any]

    def shown(self) -> dict[str, Any]:
        """The same as JSON has it."""
        fields = {key: {"from": old, "to": new} for key, old, new in self.differences}
        return {"name": self.name, "change": self.what, "fields": fields}


@click.command()
@click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="The file: a table [deployments.NAME] for each, with the fields of `tursi up`.",
)
@click.option("--prune", is_flag=True, help="Remove deployments that the file doesn't have.")
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@waiting
@as_json
@click.pass_obj
def apply(
    connection: Connection,
    *,
    file: Path,
    prune: bool,
    dry_run: bool,
    no_wait: bool,
    timeout: float,
    json: bool,
) -> None:
    """Bring the deployments to what a TOML file says, and show what that changes."""
    plan = _plan(connection, read(file, prune=prune), prune=prune)
    if json:
        dump({"changes": [change.shown() for change in plan]})
    else:
        _show(plan)
    for change in plan:
        _check(connection, change)
    if dry_run:
        return
    _carry_out(connection, plan, seconds=None if no_wait else timeout)
    if plan and not json:
        line("Done.")


def _show(plan: list[_Change]) -> None:
    for change in plan:
        line(f"{change.what} {change.name}")
        for text in told(change.differences):
            line(text)
    if not plan:
        line("Nothing to do.")


def _carry_out(connection: Connection, plan: list[_Change], *, seconds: float | None) -> None:
    """Do it all, and wait so long for each; what goes wrong is told in the end."""
    troubles: list[Failure] = []
    begun: list[tuple[_Change, dict[str, Any]]] = []
    for change in plan:
        with _collecting(troubles):
            begun.append((change, _do(connection, change)))
    for change, status in begun:
        with _collecting(troubles):
            if change.what == "remove":
                _await_removal(connection, change.name)
            elif seconds is not None:
                wait(connection, status, seconds=seconds, shown=display())
    for trouble in troubles[:-1]:
        trouble.show()
    if troubles:
        raise troubles[-1]


@contextmanager
def _collecting(troubles: list[Failure]) -> Iterator[None]:
    """What goes wrong with one deployment keeps none of the others from what they need."""
    try:
        yield
    except Failure as error:
        if error.exit_code == Exit.NO_DAEMON:
            raise
        troubles.append(error)


def _plan(
    connection: Connection, wanted: dict[str, dict[str, Any]], *, prune: bool
) -> list[_Change]:
    present = {each["name"]: each for each in connection.get("/deployments")["deployments"]}
    plan = []
    for name, body in wanted.items():
        after = {"desired": "running", **flat(body)}
        status = present.get(name)
        known = _generations(connection, name) if status is not None else []
        if status is None or not known:
            plan.append(_Change(name, "create", changes({}, flat(body)), body))
            continue
        found = _differences(status, known, body, after)
        if found:
            plan.append(_Change(name, "change", found, body))
        elif status["phase"] in GIVEN_UP:
            plan.append(_Change(name, "retry", [], body))
    if prune:
        plan += [_Change(name, "remove", [], {}) for name in present if name not in wanted]
    return plan


def _generations(connection: Connection, name: str) -> list[dict[str, Any]]:
    """Those of a deployment; none of one that has been removed, and whose workers still end."""
    try:
        answer = connection.get(path("deployments", name, "generations"))
    except Failure as error:
        if error.exit_code != Exit.NOT_FOUND:
            raise
        return []
    return list(answer["generations"])


def _differences(
    status: dict[str, Any],
    known: list[dict[str, Any]],
    body: dict[str, Any],
    after: dict[str, Any],
) -> list[tuple[str, object, object]]:
    """In what a deployment differs from what the file says, as far as that says it."""
    canary = status.get("canary")
    number = (canary or status)["generation"]
    wanted = next(each for each in known if each["number"] == number)
    before = {
        "desired": status["desired"],
        **flat(wanted["request"]),
        "replicas": status.get("min_replicas") or status["replicas"],
        **{key: status[key] for key in SCHEDULE if key in body},
    }
    if status.get("max_replicas") is not None:
        before["max_replicas"] = status["max_replicas"]
    found = changes(before, {key: value for key, value in after.items() if key != "canary"})
    weight = canary["weight"] if canary else None
    # What has taken over is no canary any more.
    if body.get("canary") not in {None, weight} and (status.get("stable") is not None or found):
        found.append(("canary", weight, body["canary"]))
    return found


def _check(connection: Connection, change: _Change) -> None:
    """Have the daemon look at it, before anything is changed."""
    if change.what != "remove":
        _put(connection, change, dry_run=1)


def _do(connection: Connection, change: _Change) -> dict[str, Any]:
    status: dict[str, Any]
    if change.what == "remove":
        status = _remove(connection, change.name)
    else:
        status = _put(connection, change)["deployment"]
    return status


def _remove(connection: Connection, name: str) -> dict[str, Any]:
    try:
        return dict(connection.call("DELETE", path("deployments", name)).body)
    except Failure as error:
        if error.exit_code != Exit.NOT_FOUND:
            raise
        # Somebody has removed it, and its workers still end.
        return {}


def _put(connection: Connection, change: _Change, **parameters: object) -> Any:
    try:
        place = path("deployments", change.name)
        return connection.call("PUT", place, body=change.body, parameters=parameters).body
    except Failure as error:
        raise Failure(f"{change.name}: {error.message}", Exit(error.exit_code)) from None


def _await_removal(connection: Connection, name: str) -> None:
    if not await_gone(connection, path("deployments", name)):
        raise Failure(
            f"{name} is removed, but its workers have not ended within {GONE_SECONDS:.0f} s.",
            Exit.TRY_LATER,
        )
