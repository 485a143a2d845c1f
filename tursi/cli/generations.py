"""Versions of a deployment: history, diff, rollback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import click

from tursi.cli.connection import Connection, Exit, Failure, path
from tursi.cli.deployments import await_ready, waiting
from tursi.cli.options import as_json
from tursi.cli.terminal import dump, line, local_time, table
from tursi.model import Fate


@click.command()
@click.argument("name")
@as_json
@click.pass_obj
def history(connection: Connection, *, name: str, json: bool) -> None:
    """List the generations of the deployment NAME: what, when, by whom, and what became of it."""
    answer = connection.get(path("deployments", name, "generations"))
    if json:
        dump(answer)
        return
    table(
        ("GENERATION", "WHEN", "BY", "TASK", "DEVICE", "DTYPE", "COMMIT", "MODEL", "OUTCOME"),
        [
            (
                each["number"],
                local_time(each["created_at"]),
                each["created_by"],
                *(_meant(each, key) for key in ("task", "device")),
                _precision(each),
                (_meant(each, "commit") or "-")[:12],
                each["request"]["model"],
                _outcome(each),
            )
            for each in answer["generations"]
        ],
        spare=("DTYPE", "DEVICE", "TASK", "COMMIT"),
    )


@click.command()
@click.argument("name")
@click.argument("generations", type=click.IntRange(min=1), nargs=-1, metavar="[FROM] [TO]")
@as_json
@click.pass_obj
def diff(connection: Connection, *, name: str, generations: tuple[int, ...], json: bool) -> None:
    """Show in what generation TO of NAME differs from generation FROM.

    TO is the present one unless it is given, and FROM the one before that.
    """
    if len(generations) > 2:
        raise click.UsageError("Two generations can be compared, not more.")
    known = {
        each["number"]: each
        for each in connection.get(path("deployments", name, "generations"))["generations"]
    }
    later = generations[1] if len(generations) == 2 else max(known)
    earlier = generations[0] if generations else later - 1
    if earlier < 1:
        dump({}) if json else line(f"{name} has one generation only.")
        return
    for number in (earlier, later):
        if number not in known:
            raise Failure(
                f"{name} has no generation {number}; `tursi history {name}` lists them.",
                Exit.NOT_FOUND,
            )
    found = changes(_flat(known[earlier]), _flat(known[later]))
    if json:
        dump({key: {"from": before, "to": after} for key, before, after in found})
        return
    line(f"{name}, generation {earlier} to {later}:")
    for text in told(found) or ["  no difference"]:
        line(text)


@click.command()
@click.argument("name")
@click.argument("percent", type=click.IntRange(0, 100))
@as_json
@click.pass_obj
def canary(connection: Connection, *, name: str, percent: int, json: bool) -> None:
    """Give the canary of NAME another share of the requests, in PERCENT.

    `tursi up MODEL --name NAME --canary PERCENT` deploys one.
    """
    place = path("deployments", name, "canary")
    status = connection.call("POST", place, body={"weight": percent}).body
    if json:
        dump(status)
    else:
        number = status["canary"]["generation"]
        line(f"{name}: generation {number} gets {percent} % of the requests.")


@click.command()
@click.argument("name")
@waiting
@as_json
@click.pass_context
def promote(
    context: click.Context, /, *, name: str, no_wait: bool, timeout: float, json: bool
) -> None:
    """Let the canary of NAME take over, and end what it was tried beside."""
    status = context.obj.call("POST", path("deployments", name, "promote")).body
    if not json:
        line(f"{name}: generation {status['generation']} takes over.")
    answer = {"deployment": status, "outcome": "promoted"}
    await_ready(context, answer, no_wait=no_wait, timeout=timeout, json=json)


@click.command()
@click.argument("name")
@click.argument("generation", type=click.IntRange(min=1), required=False)
@waiting
@as_json
@click.pass_context
def rollback(
    context: click.Context,
    /,
    *,
    name: str,
    generation: int | None,
    no_wait: bool,
    timeout: float,
    json: bool,
) -> None:
    """Go back to an earlier GENERATION of NAME, with the very files that it had.

    Without GENERATION that is the last one that was something else. What serves
    now goes on until the other is ready. A canary, or a generation that has not taken
    over yet, is given up instead, for what serves still.
    """
    connection: Connection = context.obj
    place = path("deployments", name, "rollback")
    asked = {} if generation is None else {"generation": generation}
    answer = connection.call("POST", place, body=asked).body
    if not json:
        line(_gone_back(answer))
    await_ready(context, answer, no_wait=no_wait, timeout=timeout, json=json)


def _gone_back(answer: Mapping[str, Any]) -> str:
    status = answer["deployment"]
    name, number, model = status["name"], status["generation"], status["model"]
    if answer["outcome"] == "unchanged":
        return f"{name}: nothing to do, it already is that (generation {number})."
    if answer["outcome"] == "back":
        return f"{name}: stays at {model}, generation {number}."
    return f"{name}: going back to {model}, as generation {number}."


def _outcome(generation: Mapping[str, Any]) -> str:
    """What became of it."""
    turns = generation.get("turns") or []
    if not turns:
        return "-"
    last = turns[-1]
    told: str = _FATES.get(last["fate"], last["fate"])
    if last["reason"]:
        told += f": {last['reason']}" if last["fate"] == Fate.FAILED else f" {last['reason']}"
        if last["fate"] in {Fate.GIVEN_UP, Fate.REMOVED, Fate.RETRIED}:
            told = f"{_FATES[last['fate']]} by {last['reason']}"
    served = [turn["at"] for turn in turns if turn["fate"] == Fate.SERVING]
    if last["fate"] in {Fate.REPLACED, Fate.ROLLED_BACK, Fate.REMOVED} and served:
        told += f", after {_between(served[-1], last['at'])}"
    return told


def _between(begin: str, end: str) -> str:
    """A length of time in whole units."""
    ended, begun = datetime.fromisoformat(end), datetime.fromisoformat(begin)
    seconds = max(round((ended - begun).total_seconds()), 0)
    for unit, size, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < most:
            return f"{seconds // size} {unit}"
    return f"{seconds // 86400} days"


_FATES: Mapping[str, str] = {
    Fate.SERVING: "serves",
    Fate.REPLACED: "replaced",
    Fate.ROLLED_BACK: "rolled back",
    Fate.FAILED: "failed",
    Fate.RETRIED: "tried again",
    Fate.GIVEN_UP: "given up",
    Fate.REMOVED: "removed",
}


def changes(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[tuple[str, object, object]]:
    """Each key whose values differ, with both; ``None`` where it has none."""
    keys = [*after, *(key for key in before if key not in after)]
    return [
        (key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)
    ]


def told(found: Sequence[tuple[str, object, object]]) -> list[str]:
    """Changes as lines for people."""
    return [f"  {key}: {_word(before)} -> {_word(after)}" for key, before, after in found]


def flat(request: Mapping[str, Any]) -> dict[str, Any]:
    """A deployment's request with its limits beside the rest, what isn't set left out."""
    limits = {f"limits.{key}": value for key, value in (request.get("limits") or {}).items()}
    rest = {key: value for key, value in request.items() if key != "limits"}
    return {
        key: value
        for key, value in {**rest, **limits}.items()
        if value is not None and value is not False and (key, value) != ("quantization", "none")
    }


def _flat(generation: Mapping[str, Any]) -> dict[str, Any]:
    known = generation.get("resolution") or {}
    meant = {key: known.get(key) for key in ("commit", "folder", "size")}
    return {
        **flat(generation["request"]),
        **{key: value for key, value in meant.items() if value is not None},
    }


def _meant(generation: Mapping[str, Any], key: str) -> Any:
    """What it turned out to be, or else what was asked for."""
    known = generation.get("resolution") or {}
    return known.get(key) or generation["request"].get(key)


def _precision(generation: Mapping[str, Any]) -> str:
    """What it computes in, and what its weights are made smaller to."""
    made = generation["request"].get("quantization", "none")
    dtype = str(_meant(generation, "dtype"))
    return dtype if made == "none" else f"{dtype}, {made}"


def _word(value: object) -> str:
    return "not set" if value is None else str(value)
