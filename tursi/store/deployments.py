"""Interactions on deployments and their generations; each change comes with its event."""

from __future__ import annotations

import json
from dataclasses import astuple, fields
from enum import StrEnum
from typing import Any

from tursi.errors import DeploymentNotFound, GenerationNotFound
from tursi.model import (
    Deployment,
    Desired,
    Event,
    Generation,
    Limits,
    Load,
    Request,
    Resolution,
    Schedule,
)
from tursi.store.events import record

Change = tuple[Deployment, Event | None]
"""What a deployment has become, and the event; ``None`` where nothing had to change."""


class Outcome(StrEnum):
    """What saving a deployment meant."""

    CREATED = "created"
    UNCHANGED = "unchanged"
    REPLACED = "replaced"
    """Asked for something else: a new generation."""
    SCALED = "scaled"
    """Only the number of replicas differs."""
    SCHEDULED = "scheduled"
    """Only when it is in memory differs."""
    STARTED = "started"
    """The same request, and it was stopped."""


_GENERATIONS = (
    "SELECT g.number, g.model, g.task, g.device, g.dtype, g.created_at, g.created_by,"
    " g.allow_pickle, g.trust_remote_code, g.quantization,"
    " g.memory, g.cpu, g.threads, g.files, g.processes,"
    " m.folder, r.task, r.dtype, r.device, r.choices, m.revision, m.files, m.size"
    " FROM generations AS g"
    " LEFT JOIN resolutions AS r ON r.id = (SELECT max(id) FROM resolutions"
    "  WHERE deployment = g.deployment AND generation = g.number)"
    " LEFT JOIN models AS m ON m.id = r.model"
    " WHERE g.deployment = ?"
)
_LIMITS = len(fields(Limits))
_MODEL = "SELECT id FROM models WHERE folder = ? AND revision IS ? AND files = ? AND size IS ?"


def every(txn: Any) -> list[Deployment]:
    """All deployments that exist, by name."""
    txn.execute("SELECT name FROM deployments WHERE deleted_at IS NULL ORDER BY name")
    return [_load(txn, name) for (name,) in txn.fetchall()]


def generations(txn: Any, name: str) -> list[Generation]:
    """All generations that ever had this deployment's name, oldest first."""
    txn.execute(f"{_GENERATIONS} ORDER BY g.number", (name,))
    found = [_generation(row) for row in txn.fetchall()]
    if not found:
        raise _not_found(name)
    return found


def save(
    txn: Any,
    name: str,
    request: Request,
    replicas: int,
    *,
    by: str,
    at: float,
    schedule: Schedule | None = None,
) -> tuple[Deployment, Outcome, Event | None]:
    """Create or replace; whichever it is, the deployment is to run from now on.

    Without ``schedule`` an existing one keeps its own.
    """
    before = _find(txn, name)
    shown = _shown(request, replicas)
    if before is None:
        outcome, kind, message = Outcome.CREATED, "create", f"{by} deploys {name}: {shown}"
        txn.execute(
            "INSERT INTO deployments (name, desired, replicas, created_at, updated_at)"
            " VALUES (?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET desired = excluded.desired,"
            " replicas = excluded.replicas, created_at = excluded.created_at,"
            " updated_at = excluded.updated_at, deleted_at = NULL",
            (name, Desired.RUNNING.value, replicas, at, at),
        )
        _schedule(txn, name, schedule or Schedule())
    else:
        if before.generation.request != request:
            outcome, kind, message = Outcome.REPLACED, "replace", f"{by} changes {name}: {shown}"
        elif before.desired is Desired.STOPPED:
            outcome, kind, message = Outcome.STARTED, "start", f"{by} starts {name}: {shown}"
        elif before.replicas != replicas:
            outcome, kind, message = Outcome.SCALED, "scale", f"{by} scales {name}: {shown}"
        elif schedule is not None and before.schedule != schedule:
            outcome, kind = Outcome.SCHEDULED, "schedule"
            message = f"{by} has {name} loaded {schedule.load.value.replace('_', ' ')}"
        else:
            return before, Outcome.UNCHANGED, None
        if schedule is not None:
            _schedule(txn, name, schedule)
        _update(txn, name, Desired.RUNNING, replicas, at)
    if outcome in {Outcome.CREATED, Outcome.REPLACED}:
        _append(txn, name, request, by=by, at=at)
    return _load(txn, name), outcome, record(txn, at, kind, message, deployment=name, cause=by)


def roll_back(
    txn: Any, name: str, number: int | None, *, by: str, at: float
) -> tuple[Deployment, Outcome, Event | None]:
    """Want again what generation ``number`` was, with the very files that it meant.

    That is a new generation. ``None`` means the last one that asked for something else.
    ``GenerationNotFound`` if there is none.
    """
    before = _load(txn, name)
    present = before.generation
    past = [each for each in generations(txn, name) if each.number != present.number]
    if number is None:
        wanted = next((each for each in reversed(past) if not _same(each, present)), None)
        if wanted is None:
            raise GenerationNotFound(f"{name} has never been anything else; there is no way back.")
    else:
        wanted = next((each for each in (*past, present) if each.number == number), None)
        if wanted is None:
            raise GenerationNotFound(
                f"{name} has no generation {number}; `tursi history {name}` lists them."
            )
        if _same(wanted, present):
            return before, Outcome.UNCHANGED, None
    _append(txn, name, wanted.request, by=by, at=at)
    _update(txn, name, Desired.RUNNING, before.replicas, at)
    if wanted.resolution is not None:
        after = _load(txn, name).generation.number
        _mean(txn, name, after, wanted.resolution, at=at)
    message = f"{by} rolls {name} back to generation {wanted.number}: {wanted.request.model}"
    event = record(txn, at, "rollback", message, deployment=name, cause=by)
    return _load(txn, name), Outcome.REPLACED, event


def _shown(request: Request, replicas: int) -> str:
    """What is asked for, in a clause."""
    shown = f"{request.model}, {replicas} {'replica' if replicas == 1 else 'replicas'}"
    if request.allow_pickle:
        shown += ", pickle files allowed"
    if request.quantization != "none":
        shown += f", as {request.quantization}"
    if request.trust_remote_code:
        shown += ", its own code trusted"
    return shown


def _same(one: Generation, other: Generation) -> bool:
    """Whether they ask for the same and mean the same files, as far as that is known."""
    if one.request != other.request:
        return False
    if one.resolution is None or other.resolution is None:
        return True
    return (one.resolution.folder, one.resolution.commit) == (
        other.resolution.folder,
        other.resolution.commit,
    )


def set_desired(txn: Any, name: str, desired: Desired, *, by: str, at: float) -> Change:
    """Want it running or stopped."""
    before = _load(txn, name)
    if before.desired is desired:
        return before, None
    _update(txn, name, desired, before.replicas, at)
    kind = "start" if desired is Desired.RUNNING else "stop"
    event = record(txn, at, kind, f"{by} {kind}s {name}", deployment=name, cause=by)
    return _load(txn, name), event


def set_replicas(txn: Any, name: str, replicas: int, *, by: str, at: float) -> Change:
    """Want that many replicas."""
    before = _load(txn, name)
    if before.replicas == replicas:
        return before, None
    _update(txn, name, before.desired, replicas, at)
    message = f"{by} scales {name} from {before.replicas} to {replicas}"
    return _load(txn, name), record(txn, at, "scale", message, deployment=name, cause=by)


def delete(txn: Any, name: str, *, by: str, at: float) -> Event:
    """Want it gone; its history stays."""
    _load(txn, name)
    txn.execute("UPDATE deployments SET deleted_at = ? WHERE name = ?", (at, name))
    return record(txn, at, "delete", f"{by} removes {name}", deployment=name, cause=by)


def resolve(txn: Any, name: str, number: int, found: Resolution, *, at: float) -> Event | None:
    """Append what a generation means, unless that is what it already meant."""
    txn.execute(f"{_GENERATIONS} AND g.number = ?", (name, number))
    row = txn.fetchone()
    if row is None:
        raise _not_found(name)
    if _generation(row).resolution == found:
        return None
    _mean(txn, name, number, found, at=at)
    known = (found.commit, found.task, found.device, found.dtype)
    message = f"{name} generation {number} is {', '.join((found.folder, *filter(None, known)))}"
    return record(txn, at, "resolve", message, deployment=name)


def _append(txn: Any, name: str, request: Request, *, by: str, at: float) -> None:
    """Add a generation."""
    txn.execute(
        "INSERT INTO generations"
        " (deployment, number, model, task, device, dtype,"
        " allow_pickle, trust_remote_code, quantization,"
        " memory, cpu, threads, files, processes, created_at, created_by)"
        " SELECT ?, coalesce(max(number), 0) + 1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?"
        " FROM generations WHERE deployment = ?",
        (
            name,
            request.model,
            request.task,
            request.device,
            request.dtype,
            request.allow_pickle,
            request.trust_remote_code,
            request.quantization,
            *astuple(request.limits),
            at,
            by,
            name,
        ),
    )


def _mean(txn: Any, name: str, number: int, found: Resolution, *, at: float) -> None:
    """Add what a generation means."""
    model = (found.folder, found.commit, json.dumps(found.files), found.size)
    txn.execute(_MODEL, model)
    row = txn.fetchone()
    if row is None:
        txn.execute(
            "INSERT INTO models (folder, revision, files, size) VALUES (?, ?, ?, ?) RETURNING id",
            model,
        )
        row = txn.fetchone()
    txn.execute(
        "INSERT INTO resolutions (deployment, generation, model, task, device, dtype, choices, at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            name,
            number,
            row[0],
            found.task,
            found.device,
            found.dtype,
            json.dumps(found.choices),
            at,
        ),
    )


def _find(txn: Any, name: str) -> Deployment | None:
    txn.execute(
        "SELECT name, desired, replicas, created_at, updated_at, load, keep_alive"
        " FROM deployments"
        " WHERE name = ? AND deleted_at IS NULL",
        (name,),
    )
    row = txn.fetchone()
    if row is None:
        return None
    txn.execute(f"{_GENERATIONS} ORDER BY g.number DESC LIMIT 1", (name,))
    generation = _generation(txn.fetchone())
    name, desired, replicas, created_at, updated_at, load, keep_alive = row
    schedule = Schedule(Load(load), keep_alive)
    return Deployment(
        name, Desired(desired), replicas, generation, created_at, updated_at, schedule
    )


def _load(txn: Any, name: str) -> Deployment:
    found = _find(txn, name)
    if found is None:
        raise _not_found(name)
    return found


def _update(txn: Any, name: str, desired: Desired, replicas: int, at: float) -> None:
    txn.execute(
        "UPDATE deployments SET desired = ?, replicas = ?, updated_at = ? WHERE name = ?",
        (desired.value, replicas, at, name),
    )


def _schedule(txn: Any, name: str, schedule: Schedule) -> None:
    txn.execute(
        "UPDATE deployments SET load = ?, keep_alive = ? WHERE name = ?",
        (schedule.load.value, schedule.keep_alive, name),
    )


def _generation(row: tuple[Any, ...]) -> Generation:
    number, model, task, device, dtype, created_at, created_by, pickle, code, small, *rest = row
    limits, (folder, *rest) = Limits(*rest[:_LIMITS]), rest[_LIMITS:]
    resolution = None
    if folder is not None:
        task_found, dtype_found, device_found, choices, revision, files, size = rest
        resolution = Resolution(
            folder=folder,
            task=task_found,
            dtype=dtype_found,
            device=device_found,
            commit=revision,
            files=tuple(json.loads(files)),
            size=size,
            choices=json.loads(choices),
        )
    request = Request(model, task, device, dtype, limits, bool(pickle), bool(code), small)
    return Generation(number, request, created_at, created_by, resolution)


def _not_found(name: str) -> DeploymentNotFound:
    return DeploymentNotFound(f"No deployment is named {name!r}; `tursi ps` lists them.")
