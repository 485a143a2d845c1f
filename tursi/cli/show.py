"""All about one deployment, or one model on the disk: show."""

from __future__ import annotations

import json as jsonlib
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import click

from tursi.cli.connection import Connection, Exit, Failure, path
from tursi.cli.deployments import risks
from tursi.cli.options import as_json
from tursi.cli.terminal import dump, line, local_time, safe, size
from tursi.model import Load

_KEY = 16
"""Columns for what a line is about."""
_NARROW = 40
_SHOWN_FILES = 12
_SHOWN_GENERATIONS = 3
_SENTENCE = "The sky is blue."

Rows = list[tuple[str, str]]


@click.command()
@click.argument("name", metavar="NAME|MODEL")
@as_json
@click.pass_obj
def show(connection: Connection, *, name: str, json: bool) -> None:
    """Show all about a deployment, or about a MODEL on the disk."""
    deployment = _or_none(connection, path("deployments", name))
    generations: list[dict[str, Any]] = []
    if deployment is not None:
        listed = connection.get(path("deployments", name, "generations"))
        generations = listed["generations"]
    try:
        model = connection.get(path("catalogue", name))
    except Failure as error:
        # Its files may still be on their way.
        if deployment is None or error.code != "files_unavailable":
            raise
        model = None
    if json:
        dump({"deployment": deployment, "model": model, "generations": generations})
        return
    if deployment is not None:
        line(f"{deployment['name']}: {deployment['model']}")
        _write(_deployment(deployment, _numbered(generations, deployment["generation"])))
        _write(_memory(deployment, model))
        for warning in risks(deployment):
            line(warning)
    if model is not None:
        line("" if deployment else f"{model['name']}")
        _write(_model(model))
        _write(_files(model["card"]["files"]), "files")
    if deployment is None:
        _write(_room(connection, name), "memory")
    else:
        _write(_history(generations), "history")
        _tell_routes(connection, deployment["name"], model)


def _or_none(connection: Connection, place: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = connection.get(place)
    except Failure as error:
        if error.exit_code == Exit.NOT_FOUND:
            return None
        raise
    return found


def _numbered(generations: list[dict[str, Any]], number: int) -> dict[str, Any]:
    return next((each for each in generations if each["number"] == number), {})


def _write(rows: Rows, title: str = "") -> None:
    """Lines of what it is about and what there is to say, folded where the terminal ends."""
    if not rows:
        return
    if title:
        line("")
        line(title)
    width = max(_NARROW, shutil.get_terminal_size((100, 24)).columns - 2 - _KEY)
    for key, text in rows:
        first, *others = textwrap.wrap(safe(text), width, break_on_hyphens=False) or [""]
        line(f"  {key:<{_KEY}}{first}")
        for each in others:
            line(f"  {'':<{_KEY}}{each}")


def _deployment(status: Mapping[str, Any], generation: Mapping[str, Any]) -> Rows:
    asked = generation.get("request") or {}
    choices = (generation.get("resolution") or {}).get("choices") or {}
    ready = f"{status['ready']} of {status['replicas']} replicas ready"
    if status.get("max_replicas"):
        ready += f", {status['min_replicas']} to {status['max_replicas']} by load"
    state = f"{status['phase']}, {ready}"
    if status["reason"]:
        state += f": {status['reason']}"
    rows = [("state", state)]
    for key in ("task", "device", "dtype", "quantization"):
        wanted = asked.get(key)
        text = str(status[key] or wanted or "not known yet")
        why = choices.get(key)
        if why:
            # It begins with what was chosen.
            text = why
        elif wanted in {None, "auto"}:
            text += " (chosen by Tursi)" if status[key] else ""
        rows.append((key, text))
    rows += [(key, why) for key, why in choices.items() if key not in dict(rows)]
    limits = {key: value for key, value in (status["limits"] or {}).items() if value is not None}
    if "memory" in limits:
        limits["memory"] = size(limits["memory"])
    told = ", ".join(f"{key} {value}" for key, value in limits.items())
    rows.append(("limits", told or "none"))
    rows.append(("loaded", _schedule(status)))
    return rows


def _schedule(status: Mapping[str, Any]) -> str:
    said = {
        Load.ALWAYS.value: "always",
        Load.ON_DEMAND.value: "by the first request",
        Load.MANUAL.value: "by `tursi load`",
    }[status["load"]]
    if status["load"] == Load.ON_DEMAND and status["keep_alive"] is not None:
        kept = status["keep_alive"]
        said += ", for ever" if kept < 0 else f", until nobody has asked for {kept:g} s"
    if status["unloads_at"]:
        said += f"; to be unloaded at {local_time(status['unloads_at'])}"
    return said


def _memory(status: Mapping[str, Any], model: Mapping[str, Any] | None) -> Rows:
    known = (model or {}).get("footprint")
    if not known:
        return [("memory", f"{size(status['memory'])} a worker")] if status["memory"] else []
    estimate, rows = known["estimate"], []
    if known["host"]:
        text = f"{size(known['host'])} a worker while it loads, {size(known['host_settled'])} after"
        rows.append(("memory", text))
    if known["gpu"]:
        rows.append(("gpu memory", f"{size(known['gpu'])} a worker"))
    for key, peaks in (("measured", known["host_peaks"]), ("gpu measured", known["gpu_peaks"])):
        seen = [
            f"{stage} {size(peaks[stage])}" for stage in ("load", "warm", "busy") if peaks[stage]
        ]
        if seen:
            rows.append((key, "at most " + ", ".join(seen)))
    if estimate:
        text = f"weights {size(estimate['weights'])}"
        text += f", activations {size(estimate['activations'])}" if estimate["activations"] else ""
        text += f", cache {size(estimate['cache'])}" if estimate["cache"] else ""
        rows.append(("estimated", text))
    return rows


def _model(model: Mapping[str, Any]) -> Rows:
    card = model["card"]
    kind = " ".join(filter(None, (card["architecture"], card["dtype"] and f"({card['dtype']})")))
    embedding = card["pooling"] and card["pooling"] + (", normalized" * card["normalizes"])
    prompts = [f"{name} {text!r}" for name, text in card["prompts"].items()]
    default = card["default_prompt"]
    rows = [
        ("model", model["name"]),
        ("commit", model["commit"]),
        ("license", card["license"]),
        ("made for", ", ".join(filter(None, (card["task"], card["library"])))),
        ("architecture", kind),
        ("parameters", card["parameters"] and _count(card["parameters"])),
        ("context", card["context_length"] and f"{card['context_length']} tokens"),
        ("dimensions", card["dimensions"]),
        ("pooling", embedding),
        ("prompts", ", ".join(prompts) + (f"; {default} by default" if default else "")),
        ("labels", ", ".join(card["labels"])),
        ("chat template", "yes" if card["has_chat_template"] else None),
        ("size", f"{size(model['size'])} in {len(card['files'])} files"),
        ("folder", model["folder"]),
        ("last used", model["used_at"] and local_time(model["used_at"])),
        ("used by", ", ".join(model["used_by"])),
    ]
    return [(key, str(value)) for key, value in rows if value]


def _count(number: int) -> str:
    for unit, one in (("billion", 1e9), ("million", 1e6)):
        if number >= one:
            return f"{number / one:.1f} {unit}"
    return str(number)


def _files(files: list[dict[str, Any]]) -> Rows:
    largest = sorted(files, key=lambda each: -each["size"])
    rows = [(size(each["size"]), each["name"]) for each in largest[:_SHOWN_FILES]]
    more = largest[_SHOWN_FILES:]
    if more:
        rows.append((size(sum(each["size"] for each in more)), f"in {len(more)} more"))
    return rows


def _history(generations: list[dict[str, Any]]) -> Rows:
    rows = []
    for each in generations[: -_SHOWN_GENERATIONS - 1 : -1]:
        text = f"{local_time(each['created_at'])} by {each['created_by']}: "
        text += each["request"]["model"]
        turns = each.get("turns") or ()
        if turns:
            text += f", {turns[-1]['fate'].replace('_', ' ')}"
        rows.append((f"generation {each['number']}", text))
    more = len(generations) - _SHOWN_GENERATIONS
    if more > 0:
        rows.append(("", f"and {more} before; `tursi history` lists them all"))
    return rows


def _room(connection: Connection, name: str) -> Rows:
    """Whether it would find room in memory, as far as one may ask."""
    try:
        asked = connection.call(
            "POST", "/deployments", body={"model": name}, parameters={"dry_run": 1}
        )
    except Failure:
        return []
    return [("if deployed", asked.body["message"])]


def _tell_routes(connection: Connection, name: str, model: Mapping[str, Any] | None) -> None:
    if model is None or not model["routes"]:
        return
    line("")
    line("routes")
    for each in model["routes"]:
        line(f"  POST {each}")
    line("")
    # To be pasted as it stands, so never folded.
    for each in _curl(connection, name, model):
        line(each)


def _curl(connection: Connection, name: str, model: Mapping[str, Any]) -> Iterator[str]:
    """The command that asks for the first of its routes."""
    chats = model["card"]["has_chat_template"]
    bodies = {
        "/v1/embeddings": {"model": name, "input": _SENTENCE},
        "/v1/chat/completions": {
            "model": name,
            "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        },
        "/v1/completions": {"model": name, "prompt": "The sky is"},
        f"/models/{name}": {"inputs": _SENTENCE},
    }
    if "fill-mask" in str(model["card"]["task"]) or "MaskedLM" in str(
        model["card"]["architecture"]
    ):
        bodies[f"/models/{name}"] = {"inputs": "The sky is [MASK]."}
    wanted = [
        each
        for each in model["routes"]
        if each in bodies and (chats or each != "/v1/chat/completions")
    ]
    for route in wanted[:1]:
        yield f"curl {_place(connection)}{route} \\"
        yield "  -H 'Content-Type: application/json' \\"
        if connection.url:
            yield '  -H "Authorization: Bearer $TURSI_API_KEY" \\'
        yield f"  -d {shlex.quote(jsonlib.dumps(bodies[route]))}"


def _place(connection: Connection) -> str:
    """Where requests for models are answered, as curl has it."""
    if connection.url:
        return connection.url.rstrip("/")
    for listener in connection.get("/status")["listeners"]:
        found = re.match(r"(tcp|ssl):(\d+)(.*)", listener["endpoint"])
        if found and "inference" in listener["roles"]:
            host = re.search(r"interface=([\w.-]+)", found[3])
            scheme = "https" if found[1] == "ssl" else "http"
            name = host[1] if host and host[1] != "0.0.0.0" else "localhost"  # noqa: S104 - of ours
            return f"{scheme}://{name}:{found[2]}"
    return f"--unix-socket {shlex.quote(str(connection.socket))} http://localhost"
