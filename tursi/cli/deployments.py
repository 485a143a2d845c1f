"""Deployments: up, down, ps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from tursi.cli import memory
from tursi.cli.connection import Connection, Exit, Failure, path
from tursi.cli.options import Number, Replicas, Seconds, Size, as_json
from tursi.cli.progress import Verdict, display, look, wait
from tursi.cli.terminal import dump, line, local_time, note, size, table
from tursi.errors import InvalidRequest
from tursi.model import QUANTIZATIONS, Limits, Load, Phase, Reference, deployment_name

READY_SECONDS = 3600.0
"""How long ``up`` waits unless told otherwise: the daemon's own limit for a load."""
GONE_SECONDS = 90.0
"""How long ``down`` waits: more than the daemon's deadlines for a stop together."""
_POLL_SECONDS = 0.2
_LIMITS = tuple(each.name for each in fields(Limits))

Command = TypeVar("Command", bound=Callable[..., Any])


def waiting(command: Command) -> Command:
    """Options ``--no-wait`` and ``--timeout``, which go to ``await_ready``."""
    for option in (
        click.option(
            "--timeout",
            type=Number(min=0),
            default=READY_SECONDS,
            show_default=True,
            help="Seconds to wait until it is ready.",
        ),
        click.option("--no-wait", is_flag=True, help="Don't wait until it is ready."),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("model")
@click.option("--name", help="Name of the deployment (default: the model's last segment).")
@click.option("--task", help="What the model does (default: as its own files say).")
@click.option("--device", help="auto, cpu, cuda, cuda:N, cuda:N,cuda:M or mps (default: auto).")
@click.option("--dtype", help="auto, float32, bfloat16 or float16 (default: auto).")
@click.option(
    "--quantize",
    "quantization",
    type=click.Choice(QUANTIZATIONS),
    help="Weights as int8 or int4 (default: none).",
)
@click.option(
    "--replicas",
    type=Replicas(),
    help="Number of workers (default: 1), or a range: 1-4 are as many as requests need.",
)
@click.option(
    "--canary",
    type=click.IntRange(0, 100),
    metavar="PERCENT",
    help="Give it so many percent of the requests, and leave the rest to what serves now.",
)
@click.option("--memory", type=Size(), help="Most memory of each worker, such as 2GiB.")
@click.option("--cpu", type=Number(min=0, min_open=True), help="Most cores of each.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads to compute with.")
@click.option("--files", type=click.IntRange(min=1), help="Most open files of each worker.")
@click.option("--processes", type=click.IntRange(min=1), help="Most processes and threads.")
@click.option(
    "--load",
    type=click.Choice([each.value for each in Load]),
    help="When it is in memory (default: as it was, or always).",
)
@click.option(
    "--keep-alive",
    type=Seconds(min=-1),
    help="Time without a request until what is loaded on demand is unloaded: seconds, or such as"
    " 10m; -1: never.",
)
@click.option("--dry-run", is_flag=True, help="Only tell whether it would find room in memory.")
@click.option("--allow-pickle", is_flag=True, help="Load pickle weights: they can run code.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that is in the model.")
@waiting
@as_json
@click.pass_context
def up(
    context: click.Context,
    /,
    *,
    model: str,
    name: str | None,
    replicas: tuple[int, int | None] | None,
    dry_run: bool,
    no_wait: bool,
    timeout: float,
    json: bool,
    **options: str | float | None,
) -> None:
    """Deploy MODEL and wait until it is ready.

    MODEL is a folder or a hub name, org/name[@revision]; a folder that exists
    wins. Deploying under a name that is in use changes that deployment; the
    same again does nothing.
    """
    connection: Connection = context.obj
    given = {
        key: value for key, value in options.items() if value is not None and value is not False
    }
    limits = {key: given.pop(key) for key in _LIMITS if key in given}
    asked: dict[str, Any] = {"model": str(reference(model)), **given}
    if replicas is not None:
        asked["replicas"] = replicas[0]
        if replicas[1] is not None:
            asked["max_replicas"] = replicas[1]
    if limits:
        asked["limits"] = limits
    method, place = ("POST", "/deployments") if name is None else ("PUT", _place(name))
    parameters = {"dry_run": 1} if dry_run else None
    answer = connection.call(method, place, body=asked, parameters=parameters).body
    if dry_run:
        if json:
            dump(answer)
        else:
            line(answer["message"])
            memory.show(answer)
        return
    status = answer["deployment"]
    if not json:
        ready = look(status).verdict is Verdict.READY
        line(announcement(status, answer["outcome"], ready=ready))
        beside = status.get("stable") is not None and status.get("canary") is None
        if answer["outcome"] == "replaced" and beside:
            _tell_of_place(connection, status["name"], asked)
        for warning in risks(status):
            note(warning)
    await_ready(context, answer, no_wait=no_wait, timeout=timeout, json=json)


def _tell_of_place(connection: Connection, name: str, asked: dict[str, Any]) -> None:
    """Say so if the new generation has to take the old one's place in memory."""
    place = path("deployments", name)
    fit = connection.call("PUT", place, body=asked, parameters={"dry_run": 1}).body
    if fit["verdict"] == "in_place":
        note(fit["message"])


def await_ready(
    context: click.Context, answer: dict[str, Any], *, no_wait: bool, timeout: float, json: bool
) -> None:
    """Wait until the deployment that ``answer`` tells of is ready, and say so."""
    status = answer["deployment"]
    if not (no_wait or look(status).verdict is Verdict.READY):
        try:
            status = wait(context.obj, status, seconds=timeout, shown=display())
        except KeyboardInterrupt:
            note(
                f"Not waiting any longer; {status['name']} goes on coming up. `tursi ps` shows "
                f"it, `tursi down {status['name']}` removes it."
            )
            context.exit(Exit.INTERRUPTED)
        if not json:
            line(_ready(status))
    if json:
        dump({"deployment": status, "outcome": answer["outcome"]})


@click.command()
@click.argument("name")
@as_json
@click.pass_obj
def down(connection: Connection, *, name: str, json: bool) -> None:
    """Remove the deployment NAME, after its running requests."""
    place = path("deployments", name)
    status = connection.call("DELETE", place).body
    if json:
        dump(status)
    if not await_gone(connection, place):
        raise Failure(
            f"{name} is removed, but its workers have not ended within {GONE_SECONDS:.0f} s.",
            Exit.TRY_LATER,
        )
    if not json:
        line(f"{name} is removed.")


@click.command()
@click.argument("name")
@waiting
@as_json
@click.pass_context
def load(
    context: click.Context, /, *, name: str, no_wait: bool, timeout: float, json: bool
) -> None:
    """Load the deployment NAME into memory now, whatever its schedule."""
    status = context.obj.call("POST", path("deployments", name, "load")).body
    answer = {"deployment": status, "outcome": "loaded"}
    if not json and look(status).verdict is Verdict.READY:
        line(_ready(status))
    await_ready(context, answer, no_wait=no_wait, timeout=timeout, json=json)


@click.command()
@click.argument("name")
@as_json
@click.pass_obj
def unload(connection: Connection, *, name: str, json: bool) -> None:
    """Free the memory of the deployment NAME, after its running requests."""
    status = connection.call("POST", path("deployments", name, "unload")).body
    if json:
        dump(status)
    else:
        line(f"{name} is unloaded; it is loaded again {_load(status)}.")


@click.command()
@as_json
@click.pass_obj
def ps(connection: Connection, *, json: bool) -> None:
    """List the deployments and how they are."""
    answer = connection.get("/deployments")
    if json:
        dump(answer)
        return
    statuses = answer["deployments"]
    if not statuses:
        line("Nothing is deployed; `tursi up MODEL` deploys a model.")
        return
    # Only of what comes and goes by itself.
    until = ("UNTIL",) if any(_until(status) for status in statuses) else ()
    gpus = ("GPU",) if any(_gpus(status) for status in statuses) else ()
    table(
        (
            "NAME",
            "TASK",
            "PHASE",
            "READY",
            "DEVICE",
            "MEMORY",
            *gpus,
            "BUSY",
            "QUEUED",
            *until,
            "MODEL",
        ),
        [
            (
                status["name"],
                status["task"],
                _phase(status),
                _ready_of(status),
                status["device"],
                size(_memory(status)),
                *((size(_gpus(status)),) if gpus else ()),
                status["in_flight"],
                status["queued"],
                *((_until(status),) if until else ()),
                status["model"],
            )
            for status in statuses
        ],
        spare=("TASK", "DEVICE", "QUEUED", "BUSY"),
    )
    for status in statuses:
        if status["reason"] and status["phase"] != Phase.READY:
            line(f"{status['name']}: {status['reason']}")
        if status.get("canary"):
            line(_canary(status))
        for warning in risks(status):
            line(warning)


def reference(text: str) -> Reference:
    """What ``text`` means here: a folder that exists, else a hub name; a usage error if neither."""
    try:
        folder = Path(text).expanduser()
        is_folder = bool(text) and folder.is_dir()
        is_file = bool(text) and not is_folder and folder.exists()
    except (OSError, RuntimeError) as error:
        raise click.BadParameter(
            f"{text[:100]!r} can't be a folder: {error}", param_hint="MODEL"
        ) from None
    if is_folder:
        # Symbolic links stay: a hub cache's snapshots are made of them.
        return Reference.parse(os.path.abspath(folder))  # noqa: PTH100 - absolute() would keep ".."
    if is_file:
        raise click.BadParameter(f"{text} is a file; a model is a folder.", param_hint="MODEL")
    if text.startswith(("/", ".", "~")):
        raise click.BadParameter(f"There is no folder {text}.", param_hint="MODEL")
    try:
        return Reference.parse(text)
    except InvalidRequest as error:
        raise click.BadParameter(error.message, param_hint="MODEL") from None


def _place(name: str) -> str:
    try:
        return path("deployments", deployment_name(name))
    except InvalidRequest as error:
        raise click.BadParameter(error.message, param_hint="--name") from None


def risks(status: dict[str, Any]) -> list[str]:
    """What whoever allowed it should know."""
    name, found = status["name"], []
    if status.get("allow_pickle"):
        found.append(
            f"{name} may load pickle files, which can run code on this machine within the "
            "worker's confinement."
        )
    if status.get("trust_remote_code"):
        found.append(
            f"{name} may run Python code from the model's own files within the worker's "
            "confinement; deploy it only if you trust its author."
        )
    return found


def announcement(status: dict[str, Any], outcome: str, *, ready: bool) -> str:
    """What came of a change, in a sentence."""
    name, number = status["name"], status["generation"]
    canary = status.get("canary")
    if outcome == "unchanged" and canary:
        return (
            f"{name}: nothing to do, generation {canary['generation']} is a canary with "
            f"{canary['weight']} % of the requests; `tursi promote {name}` lets it take over."
        )
    if outcome == "unchanged":
        if ready and not status["ready"]:
            return f"{name}: nothing to do, it is loaded when it is asked for."
        if ready:
            return f"{name}: nothing to do, it is serving (generation {number})."
        return f"{name}: nothing to change, it is still coming up (generation {number})."
    if outcome in {"replaced", "weighed"} and canary:
        return (
            f"{name}: generation {canary['generation']} gets {canary['weight']} % of the requests "
            f"when it is ready; `tursi promote {name}` or `tursi rollback {name}` ends that."
        )
    return {
        "created": f"{name}: created from {status['model']}.",
        "replaced": f"{name}: changed, generation {number} takes over when it is ready.",
        "scaled": f"{name}: scaled to {_count(status)}.",
        "back": f"{name}: stays at generation {number}, which serves.",
        "scheduled": f"{name}: is now loaded {_load(status)}.",
        "started": f"{name}: started again (generation {number}).",
        "retried": f"{name}: nothing has changed, but it had failed; it tries again.",
    }.get(outcome, f"{name}: {outcome}.")


def _count(status: dict[str, Any]) -> str:
    least, most = status.get("min_replicas"), status.get("max_replicas")
    if most is not None:
        return f"{least}-{most} replicas"
    return f"{status['replicas']} replica{'s' * (status['replicas'] > 1)}"


def _load(status: dict[str, Any]) -> str:
    return {
        Load.ALWAYS.value: "always",
        Load.ON_DEMAND.value: "by the first request",
        Load.MANUAL.value: "by `tursi load`",
    }[status["load"]]


def _ready(status: dict[str, Any]) -> str:
    canary = status.get("canary")
    if canary is not None:
        return f"Generation {canary['generation']} of {status['name']} is ready, as a canary."
    made = [status.get(key) for key in ("task", "device", "dtype", "quantization")]
    what = ", ".join(str(each) for each in made if each not in {None, "none"})
    return f"{status['name']} is ready ({what})." if what else f"{status['name']} is ready."


def _phase(status: dict[str, Any]) -> str:
    """The phase; while files are fetched, or a model loads, how far that is."""
    progress = status.get("progress")
    if progress is None or status["phase"] not in {Phase.QUEUED, Phase.LOADING, Phase.WARMING}:
        return str(status["phase"])
    seen = look(status)
    if not seen.total or seen.done is None:
        return seen.stage
    return f"{seen.stage} {100 * min(seen.done / seen.total, 1):.0f} %"


def _until(status: dict[str, Any]) -> str:
    """When it is unloaded, unless it is used."""
    if status.get("pinned"):
        return "pinned"
    return local_time(status["unloads_at"]) if status.get("unloads_at") else ""


def _ready_of(status: dict[str, Any]) -> str:
    """How many workers serve, of how many."""
    least, most = status.get("min_replicas"), status.get("max_replicas")
    if most is None:
        return f"{status['ready']}/{status['replicas']}"
    return f"{status['ready']} of {least}-{most}"


def _canary(status: dict[str, Any]) -> str:
    """What there is to say of a canary."""
    canary = status["canary"]
    told = (
        f"{status['name']}: generation {canary['generation']} ({canary['model']}) is a canary with "
        f"{canary['weight']} % of the requests; it is {canary['phase']}"
    )
    if canary["requests"]:
        told += f", {canary['requests']} requests, {canary['errors']} failed"
    return f"{told}: {canary['reason']}" if canary["reason"] else f"{told}."


def _memory(status: dict[str, Any]) -> int | None:
    known = [worker["rss"] for worker in status["workers"] if worker["rss"] is not None]
    return sum(known) if known else None


def _gpus(status: dict[str, Any]) -> int | None:
    """What it has of GPUs."""
    return sum(sum((worker.get("gpus") or {}).values()) for worker in status["workers"]) or None


def await_gone(connection: Connection, place: str) -> bool:
    """Wait until there is no such deployment any more; false if that takes too long."""
    deadline = time.monotonic() + GONE_SECONDS
    while time.monotonic() < deadline:
        try:
            connection.get(place)
        except Failure as error:
            if error.exit_code == Exit.NOT_FOUND:
                return True
            raise
        time.sleep(_POLL_SECONDS)
    return False
