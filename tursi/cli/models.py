"""Models on the disk: pull, pulls, models, rm."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from typing import Any

import click

from tursi.cli.connection import Connection, Exit, Failure, path
from tursi.cli.options import as_json
from tursi.cli.progress import Look, Verdict, display
from tursi.cli.terminal import dump, duration, line, local_time, note, size, table
from tursi.errors import InvalidRequest
from tursi.model import PullState, Reference

_SILENCE_SECONDS = 60.0
"""The daemon says something at least every quarter of a minute."""
_STAGES = {"resolve": "asking the hub", "download": "fetching"}


@click.command()
@click.argument("model")
@click.option("--allow-pickle", is_flag=True, help="Take pickle weights: they can run code.")
@click.option("--trust-remote-code", is_flag=True, help="Take Python code that is in the model.")
@click.option("--no-wait", is_flag=True, help="Don't wait until it is there.")
@click.option("--pause", is_flag=True, help="Stop its download; what has arrived is kept.")
@click.option("--cancel", is_flag=True, help="Give its download up.")
@as_json
@click.pass_context
def pull(
    context: click.Context,
    /,
    *,
    model: str,
    allow_pickle: bool,
    trust_remote_code: bool,
    no_wait: bool,
    pause: bool,
    cancel: bool,
    json: bool,
) -> None:
    """Download MODEL, org/name[@revision], from the hub, or go on with that.

    Ctrl-C ends only the waiting: the daemon goes on, also after a restart.
    """
    connection: Connection = context.obj
    name = str(_reference(model))
    if pause or cancel:
        status = _turn(connection, name, "cancel" if cancel else "pause")
    else:
        risks = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
        asked = {"model": name, **{key: True for key, value in risks.items() if value}}
        status = connection.call("POST", "/pulls", body=asked).body
        if not no_wait:
            try:
                status = _followed(connection, status)
            except KeyboardInterrupt:
                note(
                    f"Not waiting any longer; {name} goes on coming. `tursi pulls` shows it, "
                    f"`tursi pull --pause {name}` stops it."
                )
                context.exit(Exit.INTERRUPTED)
    if json:
        dump(status)
    else:
        line(_told(status))
    if status["state"] == PullState.FAILED:
        raise Failure(str(status["error"]), Exit.FAILED)


@click.command()
@as_json
@click.pass_obj
def pulls(connection: Connection, *, json: bool) -> None:
    """List the downloads of models and how they go."""
    answer = connection.get("/pulls")
    if json:
        dump(answer)
        return
    if not answer["pulls"]:
        line("Nothing has been pulled; `tursi pull MODEL` downloads a model.")
        return
    table(
        ("WHEN", "BY", "STATE", "PROGRESS", "MODEL"),
        [
            (
                local_time(status["asked_at"]),
                status["asked_by"],
                status["state"],
                _progress(status),
                status["model"],
            )
            for status in answer["pulls"]
        ],
        spare=("BY", "WHEN"),
    )
    for status in answer["pulls"]:
        if status["error"] and status["state"] in {PullState.RUNNING, PullState.FAILED}:
            line(f"{status['model']}: {status['error']}")


@click.command()
@as_json
@click.pass_obj
def models(connection: Connection, *, json: bool) -> None:
    """List the models on this machine's disk and who uses them."""
    answer = connection.get("/catalogue")
    if json:
        dump(answer)
        return
    if not answer["models"]:
        line("There are no models; `tursi pull MODEL` downloads one.")
        return
    table(
        ("MODEL", "COMMIT", "SIZE", "LAST USED", "USED BY", "FOLDER"),
        [
            (
                entry["name"],
                (entry["commit"] or "-")[:12],
                size(entry["size"] or None),
                local_time(entry["used_at"]),
                ", ".join(entry["used_by"]) or "-",
                entry["folder"],
            )
            for entry in answer["models"]
        ],
        spare=("FOLDER", "COMMIT", "LAST USED"),
    )


@click.command()
@click.argument("model")
@as_json
@click.pass_obj
def rm(connection: Connection, *, model: str, json: bool) -> None:
    """Delete the files of MODEL, org/name[@revision], from the disk.

    One that was imported and isn't of the hub is named as `tursi models` has it.
    """
    answer = connection.call("DELETE", path("catalogue", str(_reference(model)))).body
    if json:
        dump(answer)
        return
    for entry in answer["models"]:
        name = " ".join(filter(None, (entry["name"], (entry["commit"] or "")[:12])))
        line(f"{name} is removed ({size(entry['size'])}).")
    if not answer["models"]:
        line(f"What had arrived of {model} is removed.")


def _reference(text: str) -> Reference:
    try:
        found = Reference.parse(text)
    except InvalidRequest as error:
        raise click.BadParameter(error.message, param_hint="MODEL") from None
    if found.folder is not None:
        raise click.BadParameter(
            "It is a name, org/name[@revision], and no folder.", param_hint="MODEL"
        )
    return found


def _turn(connection: Connection, name: str, how: str) -> dict[str, Any]:
    for status in connection.get("/pulls")["pulls"]:
        if status["model"] == name and status["state"] in {PullState.RUNNING, PullState.PAUSED}:
            place = path("pulls", str(status["id"]))
            if how == "cancel":
                turned: dict[str, Any] = connection.call("DELETE", place).body
            else:
                turned = connection.call("POST", f"{place}/pause").body
            return turned
    raise Failure(f"No pull of {name} is going on; `tursi pulls` lists them.", Exit.NOT_FOUND)


def _followed(connection: Connection, status: dict[str, Any]) -> dict[str, Any]:
    """Show how it goes until it has ended or somebody has paused it; its last status."""
    place = path("pulls", str(status["id"]))
    with (
        display() as shown,
        connection.stream(
            "GET", place, parameters={"follow": 1}, seconds=_SILENCE_SECONDS
        ) as events,
    ):
        for event in events:
            status = jsonlib.loads(event.data)
            if status["state"] != PullState.RUNNING:
                return status
            shown.show(status["model"], _look(status))
    raise Failure("The daemon has ended the stream; it may be stopping.", Exit.NO_DAEMON)


def _look(status: Mapping[str, Any]) -> Look:
    if status["next_try_at"] is not None:
        again = local_time(status["next_try_at"])
        return Look(Verdict.COMING, f"{status['error']} Next try at {again}.")
    progress = status["progress"]
    if progress is None:
        return Look(Verdict.COMING, "waiting for its turn")
    stage = _STAGES.get(progress["stage"], progress["stage"])
    speed = f" at {size(status['rate'])}/s" if status["rate"] is not None else ""
    if status["remaining_seconds"] is not None and status["remaining_seconds"] >= 1:
        speed += f", {duration(status['remaining_seconds'])} left"
    return Look(
        Verdict.COMING,
        stage,
        progress["done"],
        progress["total"],
        progress["unit"] or "bytes",
        speed=speed,
    )


def _progress(status: Mapping[str, Any]) -> str:
    """How far it is, in a few words."""
    if status["state"] != PullState.RUNNING:
        return size(status["size"])
    if status["next_try_at"] is not None:
        return f"next try at {local_time(status['next_try_at'])}"
    return str(_look(status))


def _told(status: Mapping[str, Any]) -> str:
    name = status["model"]
    match status["state"]:
        case PullState.DONE:
            return (
                f"{name} is on the disk ({size(status['size'])}, commit {status['commit'][:12]})."
            )
        case PullState.PAUSED:
            return f"{name} is paused; `tursi pull {name}` goes on."
        case PullState.CANCELLED:
            return f"{name} is given up."
        case PullState.FAILED:
            return f"{name} could not be downloaded."
        case _:
            return f"{name} is coming; `tursi pulls` shows how it goes."
