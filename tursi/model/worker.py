"""A replica's process: its states, its lives, what it is told and what it says."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from tursi.model.footprint import Peaks


class Phase(StrEnum):
    """The states of a worker; docs/reliability.rst draws them."""

    STOPPED = "stopped"
    QUEUED = "queued"
    SPAWNING = "spawning"
    LOADING = "loading"
    WARMING = "warming"
    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"
    STOPPING = "stopping"
    KILLING = "killing"
    SETTLING = "settling"
    BACKOFF = "backoff"
    QUARANTINED = "quarantined"
    FAILED = "failed"
    WEDGED = "wedged"


class FailureClass(StrEnum):
    """Why a worker life ended unasked."""

    TRANSIENT = "transient"
    PERMANENT = "permanent"
    CONFIGURATION = "configuration"
    WEIGHTS = "weights"
    NOT_FOUND = "not-found"
    REFUSED = "refused"
    ENVIRONMENT = "environment"
    RESOURCE = "resource"
    SOFTWARE = "software"
    GPU_CONTEXT = "gpu-context"
    OUT_OF_MEMORY = "out-of-memory"
    EXTERNAL_KILL = "external-kill"
    CRASH = "crash"
    HUNG = "hung"
    HOST = "host"
    PROTOCOL = "protocol"


@dataclass(frozen=True, slots=True)
class WorkerLife:
    """One life of a worker: from its spawn to its end, as the store has it."""

    uuid: str
    deployment: str
    generation: int
    replica: int
    boot_id: str
    spawned_at: float
    keeper_pid: int | None = None
    keeper_start_time: int | None = None
    worker_pid: int | None = None
    ready_at: float | None = None
    ended_at: float | None = None
    intent: str | None = None
    failure: FailureClass | None = None
    reason: str | None = None
    exit_status: int | None = None
    signal: int | None = None
    peak_rss: int | None = None
    cpu_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """What a worker used at a point in time."""

    at: float
    rss: int
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a step has come; ``done`` and ``total`` are in ``unit`` where known."""

    stage: str
    done: float | None = None
    total: float | None = None
    unit: str = "bytes"
    part: int | None = None
    """Of ``parts``: the file of weights that it is at, counted from 1."""
    parts: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What one answer cost; sent by the worker with the end of each answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    batch_size: int = 0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """What the daemon tells a fresh worker to load (the body of a LOAD frame)."""

    deployment: str
    folder: str
    task: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 1
    max_batch_tokens: int = 1024
    max_sequences: int = 16
    beat_seconds: float = 1.0
    """Between two heartbeats."""
    allow_pickle: bool = False
    trust_remote_code: bool = False
    quantization: str = "none"
    device_because: str | None = None
    """Why the daemon chose ``device``, where the user left it open: a clause."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a worker says of the model it has loaded (the body of a READY frame)."""

    task: str
    device: str
    dtype: str
    max_length: int | None = None
    dimensions: int | None = None
    parameters: int | None = None
    load_seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    """What it chose, and why: a sentence each for ``device``, ``dtype``, ``quantization`` and
    ``attention``. Without figures that differ from load to load."""
    host: Peaks = Peaks()  # noqa: RUF009 - a frozen value
    """Host memory, as far as it could be measured."""
    gpus: dict[str, Peaks] = field(default_factory=dict)
    """Memory of each GPU that it uses."""
