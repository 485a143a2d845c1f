"""How deployments, what serves them and what keeps them are now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tursi.model.deployment import Desired, Load
from tursi.model.limits import Limits
from tursi.model.worker import FailureClass, Phase, Progress


@dataclass(frozen=True, slots=True)
class StorageStatus:
    """What waits for the disk, and what is lost because there was no room."""

    waiting: int = 0
    """Notes of what happened."""
    notes_dropped: int = 0
    minutes_dropped: int = 0
    """Minutes of the statistics."""
    log_lines_dropped: int = 0
    """Lines of the workers' logs."""


@dataclass(frozen=True, slots=True)
class DatabaseReport:
    """How the database is, all of it read."""

    path: str
    size: int
    """Bytes."""
    schema: int
    """Its version."""
    problems: tuple[str, ...] = ()
    """What isn't whole in it."""
    copies: tuple[str, ...] = ()
    """Files from before upgrades, oldest first."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A replica as it is now."""

    name: str
    replica: int
    phase: Phase
    since: float
    uuid: str | None = None
    generation: int | None = None
    pid: int | None = None
    reason: str | None = None
    failure: FailureClass | None = None
    failures: int = 0
    """In a row, without a good period between them."""
    restarts: int = 0
    next_try_at: float | None = None
    progress: Progress | None = None
    in_flight: int = 0
    rss: int | None = None
    gpus: Mapping[str, int] = field(default_factory=dict)
    """Bytes that it has of each GPU, as far as the driver tells."""
    cpu_seconds: float | None = None
    task: str | None = None
    device: str | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class CanaryStatus:
    """A generation that gets a share of the requests, beside the one that gets the rest."""

    generation: int
    weight: int
    """Percent of the requests."""
    phase: Phase
    ready: int
    """Replicas that serve."""
    model: str
    reason: str | None = None
    """Why it doesn't serve, or what is worse with it than with the other."""
    requests: int = 0
    """That it has answered since it has this weight, or the daemon began,"""
    errors: int = 0
    """and how many of them failed."""


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """A deployment as the control API shows it: desired and observed."""

    name: str
    model: str
    task: str | None
    desired: Desired
    phase: Phase
    replicas: int
    ready: int
    generation: int
    device: str | None
    dtype: str | None
    commit: str | None
    created_at: float
    updated_at: float
    reason: str | None = None
    failure: FailureClass | None = None
    next_try_at: float | None = None
    progress: Progress | None = None
    queued: int = 0
    in_flight: int = 0
    workers: tuple[WorkerStatus, ...] = ()
    limits: Limits = Limits()  # noqa: RUF009 - a frozen value
    """Of each worker, as asked for."""
    load: Load = Load.ALWAYS
    keep_alive: float | None = None
    """Seconds, as asked for."""
    unloads_at: float | None = None
    """When it will be unloaded, unless it is used."""
    pinned: bool = False
    """Whether it is loaded on demand, and stays until somebody unloads it."""
    memory: int | None = None
    """Bytes that each worker is reckoned to need."""
    allow_pickle: bool = False
    """Whether weights in pickle files may be loaded."""
    trust_remote_code: bool = False
    """Whether Python code from the model's own files may run."""
    quantization: str = "none"
    """As asked for."""
    min_replicas: int | None = None
    max_replicas: int | None = None
    """Between which ``replicas`` is chosen by how long requests wait; ``None``: it is fixed."""
    stable: int | None = None
    """The generation that serves until ``generation`` has taken over, if there is one."""
    canary: CanaryStatus | None = None
    """Besides what all the rest of this tells of."""
    in_place: bool = False
    """Whether the new generation is loaded where the old one was, for want of memory."""


@dataclass(frozen=True, slots=True)
class Containment:
    """How far workers are kept from what isn't theirs on this machine."""

    limits: str
    """``cgroup v2``, or ``rlimits and watch``."""
    because: str | None = None
    """Why it isn't cgroup v2."""
    landlock: int | None = None
    """The version of Landlock's interface; ``None`` where the kernel has none."""
    sockets: bool = False
    """Whether a worker is kept from the network and from connecting to anything."""
    no_new_privileges: bool = True

    def __str__(self) -> str:
        """The level in one line."""
        landlock = f"Landlock {self.landlock}" if self.landlock else "no Landlock"
        sockets = "no network" if self.sockets else "network not closed"
        limits = f"{self.limits} ({self.because})" if self.because else self.limits
        return f"{limits}, {landlock}, {sockets}, no new privileges"
