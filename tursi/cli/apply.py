"""Deployments as a file has them: apply."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import click

from tursi.cli.connection import Connection, Exit, Failure, path
from tursi.cli.deployments import GONE_SECONDS, await_gone, reference, waiting
from tursi.cli.generations import changes, flat, told
from tursi.cli.options import Replicas, as_json
from tursi.cli.progress import display, wait
from tursi.cli.terminal import dump, line
from tursi.errors import InvalidRequest
from tursi.model import (
    Limits,
    Load,
    Reference,
    Request,
    check_keep_alive,
    check_replicas,
    check_weight,
    deployment_name,
)

_SCHEDULE = ("load", "keep_alive")
_WORDS = {
    (str,): "a text",
    (int,): "a whole number",
    (int, float): "a number",
    (int, str): 'a whole number, or a range such as "1-4"',
    (bool,): "true or false",
    (dict,): "a table",
}
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("model", "task", "device", "dtype", "quantization", "load"), (str,)),
    **dict.fromkeys(("allow_pickle", "trust_remote_code"), (bool,)),
    **dict.fromkeys(("max_replicas", "canary"), (int,)),
    "replicas": (int, str),
    "keep_alive": (int, float),
    "limits": (dict,),
}
_LIMITS: dict[str, tuple[type, ...]] = {
    each.name: (int, float) if each.name == "cpu" else (int,) for each in fields(Limits)
}


class _Change(NamedTuple):
    """What has to be done to one deployment."""

    name: str
    what: str
    """create, change or remove."""
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
    plan = _plan(connection, _read(file), prune=prune)
    if json:
        dump({"changes": [change.shown() for change in plan]})
    else:
        for change in plan:
            line(f"{change.what} {change.name}")
            for text in told(change.differences):
                line(text)
        if not plan:
            line("Nothing to do.")
    if dry_run:
        return
    statuses = [_do(connection, change) for change in plan]
    for change, status in zip(plan, statuses, strict=True):
        if change.what == "remove":
            _await_removal(connection, change.name)
        elif not no_wait:
            wait(connection, status, seconds=timeout, shown=display())
    if plan and not json:
        line("Done.")


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Failure(f"{file} can't be read: {error}", Exit.USAGE) from None
    others = found.keys() - {"deployments"}
    tables = found.get("deployments", {})
    if others or not isinstance(tables, dict):
        raise Failure(
            f"{file} may only have tables [deployments.NAME], but has "
            f"{', '.join(sorted(others)) or 'something else under that name'}.",
            Exit.USAGE,
        )
    return {name: _wanted(file, name, table) for name, table in tables.items()}


def _wanted(file: Path, name: str, table: Any) -> dict[str, Any]:
    """The body to put, in the daemon's own normal form, so that it can be compared."""
    try:
        deployment_name(name)
        if not isinstance(table, dict) or not isinstance(table.get("model"), str):
            raise Failure(
                f'{file}: [deployments.{name}] needs a model, such as model = "org/name".',
                Exit.USAGE,
            )
        given = dict(table)
        _check_fields(given)
        replicas, most = given.pop("replicas", 1), given.pop("max_replicas", None)
        if isinstance(replicas, str):
            replicas, most = Replicas().convert(replicas, None, None)
        check_replicas(replicas, most)
        canary = given.pop("canary", None)
        if canary is not None:
            check_weight(canary)
        schedule = _schedule(given)
        extra = {"max_replicas": most, "canary": canary}
        extra = {key: value for key, value in extra.items() if value is not None}
        given["model"] = str(_reference(file, given["model"]))
        given["limits"] = Limits(**given.get("limits", {}))
        return {**asdict(Request(**given).checked()), "replicas": replicas, **schedule, **extra}
    except InvalidRequest as error:
        raise Failure(f"{file}: [deployments.{name}]: {error.message}", Exit.USAGE) from None
    except click.BadParameter as error:
        raise Failure(f"{file}: [deployments.{name}]: {error.message}", Exit.USAGE) from None


def _check_fields(given: dict[str, Any]) -> None:
    _check_types(given, _TYPES)
    _check_types(given.get("limits", {}), _LIMITS, "limits.")


def _check_types(
    given: dict[str, Any], types: dict[str, tuple[type, ...]], where: str = ""
) -> None:
    for key, value in given.items():
        allowed = types.get(key)
        if allowed is None:
            raise InvalidRequest(f"There is no field {where + key!r}; use {', '.join(types)}.")
        # Not isinstance: true is no number.
        if type(value) not in allowed:
            raise InvalidRequest(f"{where}{key} is {_WORDS[allowed]}.", param=f"{where}{key}")


def _schedule(given: dict[str, Any]) -> dict[str, Any]:
    """When it is in memory, taken out of ``given``; what the file leaves out stays as it is."""
    schedule = {key: given.pop(key) for key in _SCHEDULE if key in given}
    if schedule.get("load", Load.ALWAYS) not in [*Load]:
        raise InvalidRequest(f"load is one of {', '.join(Load)}.", param="load")
    seconds = schedule.get("keep_alive", 0.0)
    check_keep_alive(seconds)
    return schedule


def _reference(file: Path, model: str) -> Reference:
    # Relative to the file: that is where it was written.
    beside = file.absolute().parent / Path(model).expanduser()
    return reference(str(beside) if model.startswith((".", "~")) else model)


def _plan(
    connection: Connection, wanted: dict[str, dict[str, Any]], *, prune: bool
) -> list[_Change]:
    present = {each["name"]: each for each in connection.get("/deployments")["deployments"]}
    plan = []
    for name, body in wanted.items():
        after = {"desired": "running", **flat(body)}
        status = present.get(name)
        if status is None:
            plan.append(_Change(name, "create", changes({}, flat(body)), body))
            continue
        found = _differences(connection, status, body, after)
        if found:
            plan.append(_Change(name, "change", found, body))
    if prune:
        plan += [_Change(name, "remove", [], {}) for name in present if name not in wanted]
    return plan


def _differences(
    connection: Connection, status: dict[str, Any], body: dict[str, Any], after: dict[str, Any]
) -> list[tuple[str, object, object]]:
    """In what a deployment differs from what the file says, as far as that says it."""
    canary = status.get("canary")
    number = (canary or status)["generation"]
    known = connection.get(path("deployments", status["name"], "generations"))["generations"]
    wanted = next(each for each in known if each["number"] == number)
    before = {
        "desired": status["desired"],
        **flat(wanted["request"]),
        "replicas": status.get("min_replicas") or status["replicas"],
        **{key: status[key] for key in _SCHEDULE if key in body},
    }
    if status.get("max_replicas") is not None:
        before["max_replicas"] = status["max_replicas"]
    found = changes(before, {key: value for key, value in after.items() if key != "canary"})
    weight = canary["weight"] if canary else None
    # What has taken over is no canary any more.
    if body.get("canary") not in {None, weight} and (canary or found):
        found.append(("canary", weight, body["canary"]))
    return found


def _do(connection: Connection, change: _Change) -> dict[str, Any]:
    place = path("deployments", change.name)
    status: dict[str, Any]
    if change.what == "remove":
        status = connection.call("DELETE", place).body
    else:
        status = connection.call("PUT", place, body=change.body).body["deployment"]
    return status


def _await_removal(connection: Connection, name: str) -> None:
    if not await_gone(connection, path("deployments", name)):
        raise Failure(
            f"{name} is removed, but its workers have not ended within {GONE_SECONDS:.0f} s.",
            Exit.TRY_LATER,
        )
