"""What to do next, decided purely from what is wanted and what is there.

Boot, deploy, change, scale, removal, a worker's death and a finished download
all end in one call of ``decide``; nothing else starts or retires a worker.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from tursi.admission import Candidate, Free, admit
from tursi.model import Phase

LOAD_SLOTS = 2
"""Workers that may load at the same time on one host: loading is bound by disk and memory."""

LOADING = frozenset({Phase.SPAWNING, Phase.LOADING, Phase.WARMING})
"""The phases that take a slot."""
_SERVING = frozenset({Phase.READY, Phase.SUSPECT})


class Key(NamedTuple):
    """Names a worker: one replica of one generation of a deployment."""

    deployment: str
    generation: int
    replica: int
    revision: int = 0
    """How often the daemon's configuration has changed what its worker is told to load."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One deployment as it should be; ``replicas`` is 0 for one that should be stopped."""

    deployment: str
    generation: int
    replicas: int
    resolved: bool
    """Whether it is known which files the generation means."""
    revision: int = 0
    stable: int | None = None
    """The generation that has served before and does so until the other has taken over."""
    split: bool = False
    """Both of them serve: the other is a canary."""
    failed: bool = False
    """The other could not take over, and ``stable`` is to serve."""
    in_place: bool = False
    """It finds no room beside ``stable``, or an earlier revision, which has to go first."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One worker as it is."""

    key: Key
    phase: Phase
    retiring: bool
    memory: int = 0
    """Bytes of host memory that it is reckoned to need."""
    gpu: int = 0
    """Bytes that it is reckoned to need of GPUs."""
    device: str = "auto"
    """As asked for, or where it is being loaded."""
    waited: float = 0.0
    """Seconds for which it has been queued."""
    hopes: bool = True
    """Whether there would be room for it if everything went that may."""
    held: bool = False
    """Whether it isn't to be loaded yet, whatever is free."""
    finishing: bool = False
    """Whether it is retiring, but has not been told to end: it could still be kept."""


@dataclass(frozen=True, slots=True)
class Resolve:
    """Find out (and fetch) which files the generation means."""

    deployment: str
    generation: int


@dataclass(frozen=True, slots=True)
class Create:
    """Make a worker, which then queues for a load slot."""

    key: Key


@dataclass(frozen=True, slots=True)
class Admit:
    """Let a queued worker spawn."""

    key: Key
    device: str = "auto"
    """Where it is to be loaded, such as ``cuda:1`` or ``cuda:0,cuda:1``."""


@dataclass(frozen=True, slots=True)
class Retire:
    """Drain a worker, stop it and forget it."""

    key: Key


@dataclass(frozen=True, slots=True)
class Keep:
    """Let a worker that is retiring serve again."""

    key: Key


Action: TypeAlias = Resolve | Create | Admit | Retire | Keep


def decide(
    wanted: Sequence[Wanted],
    seen: Sequence[Seen],
    slots: int = LOAD_SLOTS,
    free: Free = Free(),  # noqa: B008 - a frozen value
    *,
    first: str | None = None,
    patience: float = 30.0,
) -> list[Action]:
    """The actions that bring ``seen`` nearer to ``wanted``.

    ``free`` is the memory that loads may still take. ``first`` names the deployment that
    others make room for just now, ``patience`` is how many seconds what waits for memory
    is passed by what is smaller.
    Deciding again after acting yields nothing new, so it may be called at any
    time. A new generation or revision starts beside the old one, which goes on serving
    until every replica of the new one is ready, unless there is room for one of them
    only; if the new one fails, the old one stays, or comes back. A canary and what it
    is tried beside are both there. A worker that is still retiring blocks a new one of
    its key, so that no replica exists twice; if it only finishes what it is at, it is kept.
    """
    by_deployment: dict[str, list[Seen]] = {}
    for worker in seen:
        by_deployment.setdefault(worker.key.deployment, []).append(worker)
    actions: list[Action] = []
    for want in wanted:
        actions += _deployment(want, by_deployment.pop(want.deployment, []))
    for workers in by_deployment.values():
        actions += _retire(workers)
    return actions + _admissions(seen, actions, slots, free, first, patience)


def _deployment(want: Wanted, workers: Collection[Seen]) -> list[Action]:
    if not want.replicas:
        return _retire(workers)
    actions: list[Action] = []
    wanted = []
    if want.stable is not None and (want.split or want.failed):
        wanted.append(want.stable)
    if not want.failed:
        if want.resolved:
            wanted.append(want.generation)
        else:
            actions.append(Resolve(want.deployment, want.generation))
    mine = {
        number: [worker for worker in workers if worker.key.generation == number]
        for number in wanted
    }
    whole = {number for number in wanted if _ready(want, mine[number]) >= want.replicas}
    if want.generation not in whole and want.stable not in wanted and not want.in_place:
        actions += _return(want, workers)
    for number in wanted:
        actions += _generation(want, number, mine[number], whole=number in whole)
    if not wanted or (not want.resolved and not want.failed):
        # What an older generation serves goes on meanwhile.
        return actions
    others = [worker for worker in workers if worker.key.generation not in wanted]
    return actions + _retire([worker for worker in others if _leaves(want, worker, workers, whole)])


def _return(want: Wanted, workers: Collection[Seen]) -> list[Action]:
    """Have back what served before, if nothing of it is there since a daemon has ended."""
    stable = want.stable
    if stable is None or any(worker.key.generation == stable for worker in workers):
        return []
    return [
        Create(Key(want.deployment, stable, replica, want.revision))
        for replica in range(want.replicas)
    ]


def _generation(
    want: Wanted, number: int, workers: Collection[Seen], *, whole: bool
) -> list[Action]:
    """Bring one generation to as many replicas as are wanted."""
    current = [worker for worker in workers if worker.key.revision == want.revision]
    there = {worker.key.replica for worker in current}
    create = [
        Create(Key(want.deployment, number, replica, want.revision))
        for replica in range(want.replicas)
        if replica not in there
    ]
    leaving = [worker for worker in current if worker.key.replica >= want.replicas]
    leaving += _outdated(want, workers, current, whole=whole)
    keep = [
        Keep(worker.key)
        for worker in current
        if worker.finishing and worker.key.replica < want.replicas
    ]
    return [*create, *keep, *_retire(leaving)]


def _outdated(
    want: Wanted, workers: Collection[Seen], current: Collection[Seen], *, whole: bool
) -> list[Seen]:
    """Those of an earlier revision that go: each when the one in its place is ready.

    Where there is no room for both it goes before that, one after the other.
    """
    older = [worker for worker in workers if worker.key.revision != want.revision]
    fresh = {worker.key.replica for worker in current if worker.phase is Phase.READY}
    gone = [
        worker
        for worker in older
        if whole or worker.key.replica in fresh or worker.phase not in _SERVING
    ]
    moving = gone or any(worker.retiring for worker in older)
    if want.in_place and not moving and all(each.phase not in LOADING for each in current):
        queued = {worker.key.replica for worker in current if worker.phase is Phase.QUEUED}
        return [worker for worker in older if worker.key.replica in queued][:1]
    return gone


def _ready(want: Wanted, workers: Collection[Seen]) -> int:
    """How many of the replicas that are wanted of a generation serve."""
    return sum(
        worker.phase is Phase.READY
        and worker.key.revision == want.revision
        and worker.key.replica < want.replicas
        for worker in workers
    )


def _leaves(want: Wanted, worker: Seen, workers: Collection[Seen], whole: Collection[int]) -> bool:
    """Whether a worker goes whose generation isn't wanted any more, or not yet again."""
    number = worker.key.generation
    if number == want.stable:
        return want.in_place or want.generation in whole
    if number == want.generation:
        # It could not take over; what tells why takes no room.
        return worker.phase is not Phase.FAILED
    serves = any(
        each.key.generation == want.stable and each.phase is Phase.READY for each in workers
    )
    return bool(whole) or serves or worker.phase not in _SERVING


def _retire(workers: Collection[Seen]) -> list[Action]:
    return [Retire(worker.key) for worker in workers if not worker.retiring]


def _admissions(
    seen: Sequence[Seen],
    actions: Sequence[Action],
    slots: int,
    free: Free,
    first: str | None,
    patience: float,
) -> list[Action]:
    leaving = {action.key for action in actions if isinstance(action, Retire)}
    loading = [worker for worker in seen if worker.phase in LOADING]
    candidates = [
        Candidate(
            worker.key,
            worker.memory,
            worker.gpu,
            worker.device,
            worker.waited,
            first=worker.key.deployment == first,
            hopes=worker.hopes,
        )
        for worker in seen
        if worker.phase is Phase.QUEUED
        and not (worker.retiring or worker.held)
        and worker.key not in leaving
    ]
    busy = {device for worker in loading if worker.gpu for device in worker.device.split(",")}
    admitted = admit(candidates, free, slots - len(loading), busy, patience)
    return [Admit(key, device) for key, device in admitted]
