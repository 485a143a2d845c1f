"""A file of deployments, read and checked: what each of them is to be."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click

from tursi.cli.connection import Exit, Failure
from tursi.cli.deployments import reference
from tursi.cli.options import Replicas
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

SCHEDULE = ("load", "keep_alive")
"""Fields that stay as they are where a file leaves them out."""

_WORDS = {
    (str,): "a text",
    (int,): "a whole number",
    (int, float): "a number",
    (int, str): 'a whole number, or a range such as "1-4"',
    (bool,): "true or false",
    (dict,): "a table",
}
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("model", "task", "device", "dtype", "quantization"), (str,)),
    **dict.fromkeys(("allow_pickle", "trust_remote_code"), (bool,)),
    "replicas": (int, str),
    **dict.fromkeys(("max_replicas", "canary"), (int,)),
    "limits": (dict,),
    "load": (str,),
    "keep_alive": (int, float),
}
_LIMITS: dict[str, tuple[type, ...]] = {
    each.name: (int, float) if each.name == "cpu" else (int,) for each in fields(Limits)
}


def read(file: Path, *, prune: bool) -> dict[str, dict[str, Any]]:
    """The body to put for each deployment, by its name; ``Failure`` for what is wrong in it.

    With ``prune`` what the file doesn't have is removed.
    """
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
    if prune and not found:
        raise Failure(
            f"{file} is empty, and --prune would remove every deployment. If none is wanted, say "
            "so by an empty table [deployments].",
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
        replicas, most = _replicas(given)
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


def _replicas(given: dict[str, Any]) -> tuple[int, int | None]:
    """The least number and the most, taken out of ``given``."""
    replicas, most = given.pop("replicas", 1), given.pop("max_replicas", None)
    if isinstance(replicas, str):
        if most is not None:
            raise InvalidRequest("replicas is a range already, so leave max_replicas out.")
        replicas, most = Replicas().convert(replicas, None, None)
    check_replicas(replicas, most)
    return replicas, most


def _check_fields(given: dict[str, Any]) -> None:
    _check_types(given, _TYPES)
    _check_types(given.get("limits", {}), _LIMITS, "limits.")


def _check_types(
    given: dict[str, Any], types: dict[str, tuple[type, ...]], where: str = ""
) -> None:
    for key, value in given.items():
        if key not in types:
            raise InvalidRequest(f"There is no field {where + key!r}; use {', '.join(types)}.")
        # Not isinstance: true is no number.
        if type(value) not in types[key]:
            raise InvalidRequest(f"{where}{key} is {_WORDS[types[key]]}.", param=f"{where}{key}")


def _schedule(given: dict[str, Any]) -> dict[str, Any]:
    """When it is in memory, taken out of ``given``; what the file leaves out stays as it is."""
    schedule = {key: given.pop(key) for key in SCHEDULE if key in given}
    if schedule.get("load", Load.ALWAYS) not in [*Load]:
        raise InvalidRequest(f"load is one of {', '.join(Load)}.", param="load")
    seconds = schedule.get("keep_alive", 0.0)
    check_keep_alive(seconds)
    return schedule


def _reference(file: Path, model: str) -> Reference:
    # Relative to the file: that is where it was written.
    beside = file.absolute().parent / Path(model).expanduser()
    return reference(str(beside) if model.startswith((".", "~")) else model)
