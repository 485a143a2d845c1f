"""Bodies, queries and replies of the control API, beyond the words of the domain."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import msgspec

from tursi.fleet import Part
from tursi.model import (
    MAX_CPU,
    MAX_FILES,
    MAX_KEEP_ALIVE,
    MAX_MEMORY,
    MAX_PROCESSES,
    MAX_THREADS,
    ApiKey,
    AuditEntry,
    CatalogueEntry,
    Containment,
    Crash,
    DeploymentStatus,
    Event,
    Generation,
    Limits,
    Load,
    PullStatus,
    Role,
    Scope,
    WorkerLife,
    WorkerStatus,
)

Replicas = Annotated[int, msgspec.Meta(ge=1, le=64)]
Weight = Annotated[int, msgspec.Meta(ge=0, le=100)]
Limit = Annotated[int, msgspec.Meta(ge=0, le=1000)]
Rate = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]


class _Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A body or query; a slip in a name is an error rather than ignored. Null means absent."""


class LimitsBody(_Body):
    """What each worker may use; what is absent has its default, or no limit."""

    memory: Annotated[int, msgspec.Meta(ge=1, le=MAX_MEMORY)] | None = None
    """Bytes."""
    cpu: Annotated[float, msgspec.Meta(gt=0, le=MAX_CPU)] | None = None
    """Cores, such as 1.5."""
    threads: Annotated[int, msgspec.Meta(ge=1, le=MAX_THREADS)] | None = None
    """Threads that compute."""
    files: Annotated[int, msgspec.Meta(ge=1, le=MAX_FILES)] | None = None
    """Open descriptors."""
    processes: Annotated[int, msgspec.Meta(ge=1, le=MAX_PROCESSES)] | None = None
    """Processes and threads together."""

    def value(self) -> Limits:
        """The same in the words of the domain."""
        return Limits(**msgspec.structs.asdict(self))


class DeploymentBody(_Body):
    """What a deployment is to serve."""

    model: str
    """An absolute folder on the daemon's machine, or a hub name: ``org/name[@revision]``."""
    task: str | None = None
    device: str | None = None
    dtype: str | None = None
    replicas: Replicas | None = None
    """Absent: as many as there are, or one."""
    max_replicas: Replicas | None = None
    """As many as this where requests wait long, and ``replicas`` where they don't."""
    limits: LimitsBody | None = None
    allow_pickle: bool | None = None
    """Load weights from pickle files, where the model has no others."""
    trust_remote_code: bool | None = None
    """Run Python code from the model's own files, with all that the worker may do."""
    quantization: str | None = None
    """Weights as int8 or int4; absent: none."""
    load: Load | None = None
    """When it is in memory; absent: as it was, or always."""
    keep_alive: Annotated[float, msgspec.Meta(ge=-1, le=MAX_KEEP_ALIVE)] | None = None
    """Seconds without a request after which what is loaded on demand is unloaded; -1: never."""
    canary: Weight | None = None
    """Let what is new have so many percent of the requests, until it is promoted, beside what
    serves; absent: it takes over when it is ready."""


class NewDeploymentBody(DeploymentBody):
    """The same, with a name that defaults to the last part of ``model``."""

    name: str | None = None


class DeployQuery(_Body):
    """How to take a deployment's body."""

    dry_run: bool = False
    """Only tell whether it would find room in memory."""


class ScaleBody(_Body):
    """How many replicas to run."""

    replicas: Replicas
    max_replicas: Replicas | None = None
    """As many as this where requests wait long; absent: always ``replicas``."""


class CanaryBody(_Body):
    """What share of the requests a canary gets."""

    weight: Weight
    """Percent."""


class RollbackBody(_Body):
    """Where to go back to."""

    generation: Annotated[int, msgspec.Meta(ge=1, le=2**53)] | None = None
    """Absent: the last one that asked for something else."""


class KeyBody(_Body):
    """A key to make."""

    name: str
    scopes: Annotated[list[Scope], msgspec.Meta(min_length=1, max_length=8)]
    deployments: Annotated[list[str], msgspec.Meta(min_length=1, max_length=1000)] | None = None
    """Names of the only deployments it may use."""
    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None


class LivesQuery(_Body):
    """Which worker lives to list."""

    limit: Limit = 100


class CrashesQuery(_Body):
    """Which crashes to list."""

    limit: Limit = 100


class EventsQuery(_Body):
    """Which events to list."""

    after: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Only events with a larger id."""
    limit: Limit = 100
    """The newest of them, in ascending order."""
    follow: bool = False
    """Go on with what happens, as server-sent events."""


class AllEventsQuery(EventsQuery):
    """Which events of which deployment to list."""

    deployment: str | None = None


class AuditLogQuery(_Body):
    """Which entries of the audit to list."""

    since: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    who: str | None = None
    """``uid 1000``, ``key 3``, an address."""
    action: str | None = None
    """What they asked for: ``deployments.stop``, or ``deployments`` for all of these."""
    target: str | None = None
    limit: Limit = 100
    """The newest of them, in ascending order."""


class LogsQuery(_Body):
    """Which lines of the log to show."""

    lines: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 100
    follow: bool = False
    """Go on with what is written, as server-sent events."""


class Deployments(msgspec.Struct, frozen=True):
    """All deployments, by name."""

    deployments: list[DeploymentStatus]


class Deployed(msgspec.Struct, frozen=True):
    """A deployment, and what came of asking for it."""

    deployment: DeploymentStatus
    outcome: str
    """created, unchanged, replaced, scaled, scheduled, weighed, started, retried, or back: what
    serves is asked for again, so that nothing is loaded."""


class Workers(msgspec.Struct, frozen=True):
    """Replicas as they are now."""

    workers: list[WorkerStatus]


class Generations(msgspec.Struct, frozen=True):
    """Versions of a deployment, oldest first."""

    generations: list[Generation]


class Lives(msgspec.Struct, frozen=True):
    """Lives of a deployment's workers, newest first."""

    lives: list[WorkerLife]


class Crashes(msgspec.Struct, frozen=True):
    """Crashes of a deployment's workers, newest first."""

    crashes: list[Crash]


class Events(msgspec.Struct, frozen=True):
    """Events in ascending order."""

    events: list[Event]


class AuditLog(msgspec.Struct, frozen=True):
    """Entries of the audit in ascending order."""

    entries: list[AuditEntry]


class Lines(msgspec.Struct, frozen=True):
    """Lines of a log: time in RFC 3339, stream, text; or as JSON objects, if so configured."""

    lines: list[str]


class Catalogue(msgspec.Struct, frozen=True):
    """Models on this machine's disk."""

    models: list[CatalogueEntry]


class PullBody(_Body):
    """What to download."""

    model: str
    """A hub name: ``org/name[@revision]``."""
    allow_pickle: bool | None = None
    """Take pickle files where the model has nothing better."""
    trust_remote_code: bool | None = None
    """Take the model's Python code."""


class PullQuery(_Body):
    """How to look at a pull."""

    follow: bool = False
    """Go on with how it goes, as server-sent events, until it has ended."""


class ImportQuery(_Body):
    """How to take an archive."""

    name: str | None = None
    """Of the deployment; absent: the one that it had."""
    allow_pickle: bool = False
    """Take pickle files, if its deployment loads them."""
    trust_remote_code: bool = False
    """Take Python code, if its deployment runs that."""
    dry_run: bool = False
    """Only tell what it would do; no more than the archive's manifest has to be sent."""


class PullList(msgspec.Struct, frozen=True):
    """Those that have not ended, and the latest others; newest first."""

    pulls: list[PullStatus]


class KeyList(msgspec.Struct, frozen=True):
    """API keys, oldest first."""

    keys: list[ApiKey]


class IssuedKey(msgspec.Struct, frozen=True):
    """A new API key."""

    key: ApiKey
    secret: str
    """The key itself, as it is sent; it can't be shown again."""


class ListenerView(msgspec.Struct, frozen=True):
    """Where the daemon listens, and what it answers there."""

    endpoint: str
    roles: list[Role]


class Counts(msgspec.Struct, frozen=True):
    """What there is of each."""

    deployments: int
    workers: int
    ready: int
    queued: int
    in_flight: int


class DaemonStatus(msgspec.Struct, frozen=True):
    """The daemon as it is now."""

    version: str
    pid: int
    started_at: float
    state: str
    """The state folder."""
    listeners: list[ListenerView]
    versions: dict[str, str]
    counts: Counts
    containment: Containment
    trouble: list[str]
    """What is not well, in sentences; the parts of ``/health`` that aren't healthy."""


class Reloaded(msgspec.Struct, frozen=True):
    """What came of reading the configuration again. Nothing in it needs a restart of the daemon."""

    changed: list[str]
    """The settings that differ from before, as ``table.name``; ``certificates`` if renewed."""
    rolled: list[str]
    """Deployments whose workers are being replaced, because of what they are told to load."""


class Health(msgspec.Struct, frozen=True):
    """The daemon's health, and of which parts it is made."""

    status: str
    parts: list[Part]


class Liveness(msgspec.Struct, frozen=True):
    """That the daemon answers."""

    alive: bool


class Readiness(msgspec.Struct, frozen=True):
    """Whether everything that should serve does."""

    ready: bool
    waiting: list[str]
    """Deployments that are on their way."""


class ModelEntry(msgspec.Struct, frozen=True):
    """A model as the OpenAI clients list it."""

    id: str
    created: int
    """UTC epoch seconds."""
    object: str = "model"
    owned_by: str = "tursi"


class ModelList(msgspec.Struct, frozen=True):
    """Models as the OpenAI clients list them."""

    data: list[ModelEntry]
    object: str = "list"


class ModelInfo(msgspec.Struct, frozen=True):
    """What is behind a model's URL."""

    model_id: str
    model_sha: str | None
    model_dtype: str | None
    task: str | None
    device: str | None
    version: str


class ModelHealth(msgspec.Struct, frozen=True):
    """Whether a model serves."""

    status: str


Document = dict[str, Any]
"""An OpenAPI document."""
