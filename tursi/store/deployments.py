"""Interactions on deployments and their generations; each change comes with its event."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, fields
from enum import StrEnum
from typing import Any

from tursi.errors import DeploymentNotFound, GenerationNotFound, NoCanary
from tursi.model import (
    Deployment,
    Desired,
    Event,
    Fate,
    Generation,
    Limits,
    Load,
    Request,
    Resolution,
    Schedule,
    Turn,
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
    WEIGHED = "weighed"
    """Only the canary's share differs."""
    BACK = "back"
    """What was asked for last is given up, for what serves still."""


_GENERATIONS = (
    "SELECT g.number, g.model, g.task, g.device, g.dtype, g.created_at, g.created_by,"
    " g.copy_of, g.allow_pickle, g.trust_remote_code, g.quantization,"
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
    rows = txn.fetchall()
    if not rows:
        raise _not_found(name)
    turns = _turns(txn, name)
    return [_generation(row, turns) for row in rows]


def save(
    txn: Any,
    name: str,
    request: Request,
    replicas: int,
    *,
    by: str,
    at: float,
    schedule: Schedule | None = None,
    max_replicas: int | None = None,
    canary: int | None = None,
    imported: Resolution | None = None,
) -> tuple[Deployment, Outcome, Event | None]:
    """Create or replace; whichever it is, the deployment is to run from now on.

    Without ``schedule`` an existing one keeps its own. With ``canary`` what is new gets
    so many percent of the requests, and what serves goes on with the rest. ``imported``
    is what the request means where that has come with it.
    """
    before = _find(txn, name)
    shown = _shown(request, replicas, max_replicas)
    author = by if imported is None else f"{by} (imported)"
    if before is None:
        outcome, kind, message = Outcome.CREATED, "create", f"{by} deploys {name}: {shown}"
        txn.execute(
            "INSERT INTO deployments (name, desired, replicas, created_at, updated_at)"
            " VALUES (?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET desired = excluded.desired,"
            " replicas = excluded.replicas, created_at = excluded.created_at,"
            " updated_at = excluded.updated_at, deleted_at = NULL, generation = NULL,"
            " stable = NULL, canary = NULL, max_replicas = NULL",
            (name, Desired.RUNNING.value, replicas, at, at),
        )
        _schedule(txn, name, schedule or Schedule())
        _range(txn, name, max_replicas)
        _append(txn, name, request, by=author, at=at)
    else:
        outcome, kind, message = _difference(
            before, request, (replicas, max_replicas), schedule, canary, imported
        )
        message = message.format(by=by, name=name, shown=shown)
        if before.generation.request == request and before.failed:
            _turn(txn, name, before.generation.number, Fate.RETRIED, at, by)
        if outcome is Outcome.UNCHANGED:
            return _load(txn, name), outcome, None
        if schedule is not None:
            _schedule(txn, name, schedule)
        _range(txn, name, max_replicas)
        _update(txn, name, Desired.RUNNING, replicas, at)
        if outcome is Outcome.REPLACED:
            _append(txn, name, request, by=author, at=at)
            _supersede(txn, before, canary, by=by, at=at)
        elif outcome is Outcome.BACK:
            _give_up(txn, before, by=by, at=at)
        elif before.stable is not None and canary is not None:
            _weigh(txn, name, canary)
    if imported is not None and outcome in {Outcome.CREATED, Outcome.REPLACED}:
        kind, message = "import", f"{by} imports {name}: {shown}"
        _mean(txn, name, _load(txn, name).generation.number, imported, at=at)
    return _load(txn, name), outcome, record(txn, at, kind, message, deployment=name, cause=by)


def foretell(
    before: Deployment | None,
    request: Request,
    replicas: tuple[int, int | None],
    schedule: Schedule,
    imported: Resolution,
) -> Outcome:
    """What it would mean to ``save`` that where ``before`` is there."""
    if before is None:
        return Outcome.CREATED
    return _difference(before, request, replicas, schedule, None, imported)[0]


def _difference(
    before: Deployment,
    request: Request,
    replicas: tuple[int, int | None],
    schedule: Schedule | None,
    canary: int | None,
    imported: Resolution | None,
) -> tuple[Outcome, str, str]:
    """What saving that would mean, the kind of its event, and its message to be filled in."""
    stays = before.generation.request == request and _means(before.generation, imported)
    back = before.stable
    if back is not None and back.request == request and _means(back, imported) and not stays:
        message = f"{{by}} leaves {{name}} at generation {back.number}: {{shown}}"
        return Outcome.BACK, "rollback", message
    if not stays:
        as_canary = f", as a canary with {canary} %" if canary is not None else ""
        return Outcome.REPLACED, "replace", f"{{by}} changes {{name}}: {{shown}}{as_canary}"
    if before.desired is Desired.STOPPED:
        return Outcome.STARTED, "start", "{by} starts {name}: {shown}"
    if (before.replicas, before.max_replicas) != replicas:
        return Outcome.SCALED, "scale", "{by} scales {name}: {shown}"
    if schedule is not None and before.schedule != schedule:
        how = schedule.load.value.replace("_", " ")
        return Outcome.SCHEDULED, "schedule", f"{{by}} has {{name}} loaded {how}"
    if before.stable is not None and canary is not None and before.canary != canary:
        return Outcome.WEIGHED, "canary", _weighed(before, canary)
    return Outcome.UNCHANGED, "", ""


def _weighed(before: Deployment, weight: int) -> str:
    number = before.generation.number
    return f"{{by}} gives generation {number} of {{name}} {weight} % of the requests"


def roll_back(
    txn: Any, name: str, number: int | None, *, by: str, at: float
) -> tuple[Deployment, Outcome, Event | None]:
    """Want again what generation ``number`` was, with the very files that it meant.

    That is a new generation, unless it is what serves still. ``None`` means that, or
    else the last one that asked for something else. ``GenerationNotFound`` if there is none.
    """
    before = _load(txn, name)
    present = before.generation
    if before.stable is not None and number in {None, before.stable.number}:
        _give_up(txn, before, by=by, at=at)
        _update(txn, name, Desired.RUNNING, before.replicas, at)
        message = f"{by} gives up generation {present.number} of {name}"
        event = record(txn, at, "rollback", message, deployment=name, cause=by)
        return _load(txn, name), Outcome.BACK, event
    past = [each for each in generations(txn, name) if each.number != present.number]
    if number is None:
        fit = [each for each in past if each.number < present.number and not _vain(each)]
        wanted = next((each for each in reversed(fit) if not _same(each, present)), None)
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
    _append(txn, name, wanted.request, by=by, at=at, copy_of=wanted.number)
    _update(txn, name, Desired.RUNNING, before.replicas, at)
    _supersede(txn, before, None, by=by, at=at)
    if wanted.resolution is not None:
        after = _load(txn, name).generation.number
        _mean(txn, name, after, wanted.resolution, at=at)
    message = f"{by} rolls {name} back to generation {wanted.number}: {wanted.request.model}"
    event = record(txn, at, "rollback", message, deployment=name, cause=by)
    return _load(txn, name), Outcome.REPLACED, event


def _shown(request: Request, replicas: int, most: int | None) -> str:
    """What is asked for, in a clause."""
    number = str(replicas) if most is None else f"{replicas} to {most}"
    shown = f"{request.model}, {number} {'replica' if number == '1' else 'replicas'}"
    if request.allow_pickle:
        shown += ", pickle files allowed"
    if request.quantization != "none":
        shown += f", as {request.quantization}"
    if request.trust_remote_code:
        shown += ", its own code trusted"
    return shown


def _vain(generation: Generation) -> bool:
    """Whether it has ended without ever having served."""
    return generation.fate in {Fate.FAILED, Fate.GIVEN_UP} and not generation.has_served


def set_canary(txn: Any, name: str, weight: int, *, by: str, at: float) -> Change:
    """Give the canary that share of the requests; ``NoCanary`` if there is none."""
    before = _canary(txn, name)
    if before.canary == weight:
        return before, None
    _weigh(txn, name, weight)
    message = _weighed(before, weight).format(by=by, name=name)
    return _load(txn, name), record(txn, at, "canary", message, deployment=name, cause=by)


def promote(txn: Any, name: str, *, by: str, at: float) -> Change:
    """Let the canary take over; ``NoCanary`` if there is none."""
    before = _canary(txn, name)
    _weigh(txn, name, None)
    message = f"{by} promotes generation {before.generation.number} of {name}"
    return _load(txn, name), record(txn, at, "promote", message, deployment=name, cause=by)


def serve(txn: Any, name: str, number: int, *, at: float) -> Event | None:
    """Generation ``number`` serves from now on, in place of the stable one if there was one."""
    found = _find(txn, name)
    if found is None or found.generation.number != number:
        # Another one has been asked for meanwhile.
        return None
    _turn(txn, name, number, Fate.SERVING, at)
    message = f"generation {number} of {name} serves"
    before = found.stable or _served(generations(txn, name), number)
    if before is not None:
        back = found.generation.copy_of is not None
        fate = Fate.ROLLED_BACK if back else Fate.REPLACED
        _turn(txn, name, before.number, fate, at, f"by generation {number}")
        message += f" in place of generation {before.number}"
        txn.execute("UPDATE deployments SET stable = NULL, canary = NULL WHERE name = ?", (name,))
    return record(txn, at, "serve", message, deployment=name)


def _served(past: list[Generation], number: int) -> Generation | None:
    """What serves according to its turns, besides ``number``."""
    return next(
        (each for each in reversed(past) if each.number != number and each.fate is Fate.SERVING),
        None,
    )


def fail(txn: Any, name: str, number: int, reason: str, *, at: float) -> Event | None:
    """Generation ``number`` could not take over, or didn't do well as a canary."""
    found = _find(txn, name)
    if found is None or found.generation.number != number or found.generation.fate is Fate.FAILED:
        return None
    _turn(txn, name, number, Fate.FAILED, at, reason)
    if found.stable is None:
        message = f"generation {number} of {name} has failed"
    elif found.canary is not None:
        _point(txn, name, found.stable.number)
        message = (
            f"generation {number} of {name} is given up, generation {found.stable.number} serves"
        )
    else:
        message = (
            f"generation {number} of {name} can't take over, generation "
            f"{found.stable.number} serves"
        )
    return record(txn, at, "generation.failed", message, deployment=name, cause=reason)


def _canary(txn: Any, name: str) -> Deployment:
    found = _load(txn, name)
    if found.stable is None or found.canary is None:
        raise NoCanary(
            f"{name} has no canary; `tursi up MODEL --name {name} --canary 10` deploys one."
        )
    return found


def _supersede(txn: Any, before: Deployment, canary: int | None, *, by: str, at: float) -> None:
    """Want the generation that has just been added; what has served does so until it can."""
    name, stable = before.name, before.stable
    if stable is not None:
        if before.generation.fate is not Fate.FAILED:
            _turn(txn, name, before.generation.number, Fate.GIVEN_UP, at, by)
    elif before.generation.has_served:
        stable = before.generation
    txn.execute(
        "UPDATE deployments SET generation = NULL, stable = ?, canary = ? WHERE name = ?",
        (stable and stable.number, canary if stable else None, name),
    )


def _give_up(txn: Any, before: Deployment, *, by: str, at: float) -> None:
    """Want what serves."""
    if before.stable is not None:
        if before.generation.fate is not Fate.FAILED:
            _turn(txn, before.name, before.generation.number, Fate.GIVEN_UP, at, by)
        _point(txn, before.name, before.stable.number)


def _point(txn: Any, name: str, number: int) -> None:
    txn.execute(
        "UPDATE deployments SET generation = ?, stable = NULL, canary = NULL WHERE name = ?",
        (number, name),
    )


def _weigh(txn: Any, name: str, weight: int | None) -> None:
    txn.execute("UPDATE deployments SET canary = ? WHERE name = ?", (weight, name))


def _range(txn: Any, name: str, most: int | None) -> None:
    txn.execute("UPDATE deployments SET max_replicas = ? WHERE name = ?", (most, name))


def _turn(
    txn: Any, name: str, number: int, fate: Fate, at: float, reason: str | None = None
) -> None:
    txn.execute(
        "INSERT INTO turns (deployment, generation, fate, reason, at) VALUES (?, ?, ?, ?, ?)",
        (name, number, fate.value, reason, at),
    )


def _turns(txn: Any, name: str) -> dict[int, tuple[Turn, ...]]:
    """What became of the generations of a deployment, by their numbers."""
    txn.execute(
        "SELECT generation, fate, at, reason FROM turns WHERE deployment = ? ORDER BY id", (name,)
    )
    found: dict[int, tuple[Turn, ...]] = {}
    for number, fate, at, reason in txn.fetchall():
        found[number] = (*found.get(number, ()), Turn(Fate(fate), at, reason))
    return found


def _means(generation: Generation, imported: Resolution | None) -> bool:
    """Whether its files are those that were imported, if any were."""
    found = generation.resolution
    return imported is None or (
        found is not None and (found.folder, found.commit) == (imported.folder, imported.commit)
    )


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


def set_replicas(
    txn: Any, name: str, replicas: int, most: int | None = None, *, by: str, at: float
) -> Change:
    """Want that many replicas, or so many to ``most``."""
    before = _load(txn, name)
    if (before.replicas, before.max_replicas) == (replicas, most):
        return before, None
    _update(txn, name, before.desired, replicas, at)
    _range(txn, name, most)
    message = (
        f"{by} scales {name} from {_span(before.replicas, before.max_replicas)}"
        f" to {_span(replicas, most)}"
    )
    return _load(txn, name), record(txn, at, "scale", message, deployment=name, cause=by)


def set_loaded(txn: Any, name: str, loaded: bool) -> Deployment:
    """Want it in memory or not, where only that decides."""
    txn.execute("UPDATE deployments SET loaded = ? WHERE name = ?", (loaded, name))
    return _load(txn, name)


def _span(replicas: int, most: int | None) -> str:
    return str(replicas) if most is None else f"{replicas}-{most}"


def delete(txn: Any, name: str, *, by: str, at: float) -> Event:
    """Want it gone; its history stays."""
    found = _load(txn, name)
    for each in filter(None, (found.stable, found.generation)):
        _turn(txn, name, each.number, Fate.REMOVED, at, by)
    txn.execute("UPDATE deployments SET deleted_at = ? WHERE name = ?", (at, name))
    return record(txn, at, "delete", f"{by} removes {name}", deployment=name, cause=by)


def resolve(txn: Any, name: str, number: int, found: Resolution, *, at: float) -> Event | None:
    """Append what a generation means, unless that is what it already meant."""
    txn.execute(f"{_GENERATIONS} AND g.number = ?", (name, number))
    row = txn.fetchone()
    if row is None:
        raise _not_found(name)
    if _generation(row, {}).resolution == found:
        return None
    _mean(txn, name, number, found, at=at)
    known = (found.commit, found.task, found.device, found.dtype)
    message = f"{name} generation {number} is {', '.join((found.folder, *filter(None, known)))}"
    return record(txn, at, "resolve", message, deployment=name)


def _append(
    txn: Any, name: str, request: Request, *, by: str, at: float, copy_of: int | None = None
) -> None:
    """Add a generation."""
    txn.execute(
        "INSERT INTO generations"
        " (deployment, number, model, task, device, dtype,"
        " allow_pickle, trust_remote_code, quantization,"
        " memory, cpu, threads, files, processes, created_at, created_by, copy_of)"
        " SELECT ?, coalesce(max(number), 0) + 1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?"
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
            copy_of,
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
        "SELECT name, desired, replicas, created_at, updated_at, load, keep_alive,"
        " max_replicas, loaded, generation, stable, canary"
        " FROM deployments"
        " WHERE name = ? AND deleted_at IS NULL",
        (name,),
    )
    row = txn.fetchone()
    if row is None:
        return None
    name, desired, replicas, created_at, updated_at, load, keep_alive, most, loaded, *pointers = row
    number, stable, canary = pointers
    turns = _turns(txn, name)
    schedule = Schedule(Load(load), keep_alive)
    return Deployment(
        name,
        Desired(desired),
        replicas,
        _one(txn, name, number, turns),
        created_at,
        updated_at,
        schedule,
        most,
        _one(txn, name, stable, turns) if stable is not None else None,
        canary,
        bool(loaded),
    )


def _one(
    txn: Any, name: str, number: int | None, turns: Mapping[int, tuple[Turn, ...]]
) -> Generation:
    """That generation, or the one with the highest number."""
    which = "ORDER BY g.number DESC LIMIT 1" if number is None else "AND g.number = ?"
    txn.execute(f"{_GENERATIONS} {which}", (name,) if number is None else (name, number))
    return _generation(txn.fetchone(), turns)


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


def _generation(row: tuple[Any, ...], turns: Mapping[int, tuple[Turn, ...]]) -> Generation:
    number, model, task, device, dtype, created_at, created_by, copy_of, *rest = row
    pickle, code, small, *rest = rest
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
    return Generation(
        number, request, created_at, created_by, resolution, copy_of, turns.get(number, ())
    )


def _not_found(name: str) -> DeploymentNotFound:
    return DeploymentNotFound(f"No deployment is named {name!r}; `tursi ps` lists them.")
