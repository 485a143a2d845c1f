"""The words of the domain: frozen values that every floor speaks.

Times are UTC epoch seconds (``float``), sizes are bytes, durations are seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from tursi.errors import InvalidRequest

DEFAULT_PORT = 8430
"""The TCP port of the default inference listener on 127.0.0.1."""

MAX_REPLICAS = 64
MIN_MEMORY = 64 * 1024 * 1024
"""Bytes below which not even an empty worker fits."""
MIN_CPU = 0.01
"""Cores: the kernel knows no smaller share."""
MIN_FILES = 64
MIN_PROCESSES = 16
MAX_PROCESSES = 4_194_304
"""As many as a Linux system can have."""
DTYPES = ("auto", "float32", "bfloat16", "float16")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,2})?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


class Task(StrEnum):
    """What a model does, by the Hugging Face pipeline name."""

    FEATURE_EXTRACTION = "feature-extraction"
    TEXT_CLASSIFICATION = "text-classification"
    FILL_MASK = "fill-mask"
    TEXT_GENERATION = "text-generation"

    @classmethod
    def parse(cls, name: str) -> Task:
        """The task with this name or common alias; ``InvalidRequest`` if there is none."""
        wanted = name.strip().lower()
        wanted = _TASK_ALIASES.get(wanted, wanted)
        try:
            return cls(wanted)
        except ValueError:
            known = ", ".join(task.value for task in cls)
            raise InvalidRequest(
                f"Tursi doesn't know the task {name!r}; choose one of: {known}.", param="task"
            ) from None


_TASK_ALIASES: Mapping[str, str] = {
    "embedding": "feature-extraction",
    "embeddings": "feature-extraction",
    "sentence-similarity": "feature-extraction",
    "sentiment-analysis": "text-classification",
    "chat": "text-generation",
}


class Phase(StrEnum):
    """The states of a worker (shared/reliability 2.2; docs/reliability.rst draws them)."""

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


class Desired(StrEnum):
    """What the operator wants of a deployment."""

    RUNNING = "running"
    STOPPED = "stopped"


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


class Role(StrEnum):
    """What a listener answers."""

    INFERENCE = "inference"
    HEALTH = "health"
    METRICS = "metrics"
    CONTROL = "control"


class Scope(StrEnum):
    """What a key allows; ``admin`` includes the others."""

    INFER = "infer"
    READ = "read"
    ADMIN = "admin"


ALL_SCOPES = frozenset(Scope)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, and what they may do."""

    scopes: frozenset[Scope] = frozenset()
    """All that they may do, what one scope includes being listed too."""
    address: str | None = None
    """The client's IP address; ``None`` on a Unix socket."""
    uid: int | None = None
    """The user at the other end of a Unix socket."""
    key: int | None = None
    """Id of the API key, if one was sent."""
    key_name: str | None = None
    deployments: frozenset[str] | None = None
    """Names of the only deployments they may use; ``None`` means all."""

    @property
    def trusted(self) -> bool:
        """Whether they may read about this machine, the paths in its messages included."""
        return Scope.READ in self.scopes

    def __str__(self) -> str:
        """In words, for the history."""
        if self.key is not None:
            return f"key {self.key} ({self.key_name})"
        if self.uid is not None:
            return f"uid {self.uid}"
        return self.address or "unknown"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A bearer key as it may be shown: without its secret."""

    id: int
    name: str
    scopes: tuple[Scope, ...]
    created_at: float
    created_by: str
    deployments: tuple[str, ...] | None = None
    """Names of the only deployments it may use; ``None`` means all."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    last_used_at: float | None = None
    revoked_at: float | None = None


def key_name(text: str) -> str:
    """``text`` if it can name a key, else ``InvalidRequest``."""
    if not _NAME.fullmatch(text) or text.isdigit():
        raise InvalidRequest(
            "A key's name has 1 to 96 letters, digits, '.', '_' and '-', begins with a letter "
            "or digit, and isn't a number.",
            param="name",
        )
    return text


def deployment_name(text: str) -> str:
    """``text`` if it can name a deployment, else ``InvalidRequest``."""
    if not _NAME.fullmatch(text):
        raise InvalidRequest(
            "A deployment's name has 1 to 96 letters, digits, '.', '_' and '-', "
            "and begins with a letter or digit.",
            param="name",
        )
    return text


@dataclass(frozen=True, slots=True)
class Reference:
    """Where a model comes from: a folder on disk or a hub repository."""

    repository: str | None = None
    revision: str | None = None
    folder: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read ``/abs/folder`` or ``[org/]name[@revision]``.

        Whether a relative path exists is for the caller to know (the CLI makes
        it absolute): the daemon's working directory means nothing to a user.
        """
        if "\0" in text or not text or len(text) > 4096:
            raise InvalidRequest("The model must be a folder or a hub name.", param="model")
        if text.startswith("/"):
            if ".." in text.split("/"):
                raise InvalidRequest("A folder is named without '..' in its path.", param="model")
            return cls(folder=text)
        repository, at, revision = text.partition("@")
        if (
            not _REPOSITORY.fullmatch(repository)
            or (at and not _REVISION.fullmatch(revision))
            or ".." in text
        ):
            raise InvalidRequest(
                f"{text[:200]!r} is neither an absolute folder nor a hub name like "
                "'org/name' or 'org/name@revision'.",
                param="model",
            )
        return cls(repository=repository, revision=revision or None)

    def __str__(self) -> str:
        """The reference as the user would write it."""
        if self.folder is not None:
            return self.folder
        return f"{self.repository}@{self.revision}" if self.revision else str(self.repository)

    @property
    def short_name(self) -> str:
        """The last segment, which names a deployment when the user doesn't."""
        text = self.folder or self.repository or ""
        last = text.rstrip("/").rpartition("/")[2]
        return re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-")[:96] or "model"


@dataclass(frozen=True, slots=True)
class Host:
    """What this machine has; ``None`` where that isn't known."""

    memory: int | None = None
    """Bytes."""
    cores: int | None = None
    files: int | None = None
    """Descriptors that a process may be allowed to have open."""
    gpus: tuple[str, ...] = ()
    """The devices that workers may compute on besides the processor, as far as known."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What each worker of a deployment may use; ``None`` means the default, or no limit."""

    memory: int | None = None
    """Bytes."""
    cpu: float | None = None
    """Cores: 1.5 is one and a half of them."""
    threads: int | None = None
    """Compute threads."""
    files: int | None = None
    """Open descriptors."""
    processes: int | None = None
    """Processes and threads together."""

    def check(self, host: Host) -> None:
        """Raise ``InvalidRequest`` for what can't be met on ``host``."""
        memory, cpu = self.memory, self.cpu
        if memory is not None and memory < MIN_MEMORY:
            raise _unmet("memory", f"{mebibytes(memory)} is less than {mebibytes(MIN_MEMORY)}")
        if memory is not None and host.memory is not None and memory > host.memory:
            raise _unmet(
                "memory", f"{mebibytes(memory)} is more than the {mebibytes(host.memory)} here"
            )
        if cpu is not None and not (math.isfinite(cpu) and cpu >= MIN_CPU):
            raise _unmet("cpu", f"{cpu:g} is less than {MIN_CPU:g} of a core")
        _at_most("cpu", cpu, host.cores, "cores")
        _at_least("threads", self.threads, 1)
        _at_most("threads", self.threads, host.cores, "cores")
        _at_least("files", self.files, MIN_FILES)
        _at_most("files", self.files, host.files, "that the system allows a process")
        _at_least("processes", self.processes, MIN_PROCESSES)
        _at_most("processes", self.processes, MAX_PROCESSES, "that Linux can have")


def mebibytes(size: int) -> str:
    """A size of memory, for people."""
    if size < 2**20:
        return f"{size} bytes"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and value < least:
        raise _unmet(name, f"{value:g} is less than {least:g}")


def _at_most(name: str, value: float | None, most: float | None, of_what: str) -> None:
    if value is not None and most is not None and value > most:
        raise _unmet(name, f"{value:g} is more than the {most:g} {of_what}")


def _unmet(name: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"The limit {name} can't be met: {why}.", param=f"limits.{name}")


class Load(StrEnum):
    """When a deployment's workers are in memory."""

    ALWAYS = "always"
    ON_DEMAND = "on_demand"
    """From the first request until nobody has asked for a while, or others need the memory."""
    MANUAL = "manual"
    """When somebody says so."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """When a deployment is in memory; changing that needs no new generation."""

    load: Load = Load.ALWAYS
    keep_alive: float | None = None
    """Seconds without a request after which it is unloaded, less than 0: never; ``None``: as
    configured. It only matters for what is loaded on demand."""


@dataclass(frozen=True, slots=True)
class Trust:
    """What a model may bring besides data; whoever allows it trusts the model's author."""

    allow_pickle: bool = False
    """Weights in pickle files, read by torch's restricted unpickler."""
    trust_remote_code: bool = False
    """Python code from the model's own files."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks of a deployment; equal requests need no new generation."""

    model: str
    task: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    limits: Limits = Limits()
    allow_pickle: bool = False
    trust_remote_code: bool = False

    @property
    def trust(self) -> Trust:
        """What the model may bring besides data."""
        return Trust(self.allow_pickle, self.trust_remote_code)

    def checked(self, host: Host = Host()) -> Request:
        """The same in normal form; ``InvalidRequest`` names the field that is wrong."""
        if not _DEVICE.fullmatch(self.device):
            raise InvalidRequest(
                f"The device {self.device[:50]!r} is unknown; use auto, cpu, mps, cuda or cuda:N.",
                param="device",
            )
        if self.dtype not in DTYPES:
            raise InvalidRequest(
                f"The dtype {self.dtype[:50]!r} is unknown; use one of {', '.join(DTYPES)}.",
                param="dtype",
            )
        self.limits.check(host)
        return Request(
            model=str(Reference.parse(self.model)),
            task=Task.parse(self.task).value if self.task is not None else None,
            device=self.device,
            dtype=self.dtype,
            limits=self.limits,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
        )


def check_replicas(replicas: int) -> None:
    """Raise ``InvalidRequest`` unless a deployment may have that many."""
    if not 1 <= replicas <= MAX_REPLICAS:
        raise InvalidRequest(f"A deployment has 1 to {MAX_REPLICAS} replicas.", param="replicas")


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a generation's request turned out to mean, once known."""

    folder: str
    task: str | None = None
    dtype: str | None = None
    device: str | None = None
    commit: str | None = None
    files: tuple[str, ...] = ()
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """One immutable version of a deployment."""

    number: int
    request: Request
    created_at: float
    created_by: str
    resolution: Resolution | None = None


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model that the user wants served, as the store has it."""

    name: str
    desired: Desired
    replicas: int
    generation: Generation
    created_at: float
    updated_at: float
    schedule: Schedule = Schedule()


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Crash:
    """A worker life that ended unasked: what it comes down to."""

    id: int
    """Given when it is recorded; 0 before."""
    deployment: str
    generation: int
    replica: int
    worker: str
    """The uuid of the life."""
    at: float
    failure: FailureClass
    reason: str
    """One clause for people."""
    phase: Phase
    """The state in which it met its end."""
    spawned_at: float
    ready_at: float | None = None
    exit_status: int | None = None
    signal: int | None = None
    intent: str | None = None
    """Why the daemon ended it, where it did."""
    peak_rss: int | None = None
    cpu_seconds: float | None = None
    requests: tuple[str, ...] = ()
    """Ids of the requests that were in flight."""
    error: str | None = None
    """The last line of the traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dossier(Crash):
    """The same with all its evidence."""

    order: LoadOrder
    """What it had to load."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library to version, as far as it got to tell."""
    traceback: str | None = None
    """With its last words."""
    stacks: str | None = None
    """Where the threads of a hung worker stood."""
    log: tuple[str, ...] = ()
    """The last lines of this life."""
    usage: tuple[Sample, ...] = ()
    """Memory and processor over its life, the closer to its end the denser."""


def last_line(traceback: str | None) -> str | None:
    """What a traceback comes down to."""
    lines = (traceback or "").strip().splitlines()
    return lines[-1].strip() if lines else None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, and because of what; append-only."""

    id: int
    at: float
    kind: str
    deployment: str | None
    message: str
    cause: str | None = None
    worker: str | None = None


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Somebody changed something, or was refused it; append-only."""

    id: int
    """0 until it is stored."""
    at: float
    by: str
    """Who it was, in words."""
    action: str
    """What they asked for, such as ``deployments.stop``."""
    target: str | None = None
    """What it was asked for, by name."""
    status: int | None = None
    """The answer's HTTP status; ``None`` where there was no request."""
    code: str | None = None
    """Of the error that it was answered with."""
    request: str | None = None
    """The request's id."""
    key: int | None = None
    """The id of their key."""
    uid: int | None = None
    """Their user, if they came by the control socket."""
    address: str | None = None
    """Their address, if they came over the network."""


@dataclass(frozen=True, slots=True)
class AuditQuery:
    """Which entries of the audit to list."""

    since: float = 0.0
    by: str | None = None
    action: str | None = None
    target: str | None = None
    limit: int = 100


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
class Progress:
    """How far a step has come; ``done`` and ``total`` are in ``unit`` where known."""

    stage: str
    done: float | None = None
    total: float | None = None
    unit: str = "bytes"


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
    cpu_seconds: float | None = None
    task: str | None = None
    device: str | None = None
    dtype: str | None = None


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
    limits: Limits = Limits()
    """Of each worker, as asked for."""
    load: Load = Load.ALWAYS
    keep_alive: float | None = None
    """Seconds, as asked for."""
    unloads_at: float | None = None
    """When it will be unloaded, unless it is used."""
    memory: int | None = None
    """Bytes that each worker is reckoned to need."""
    allow_pickle: bool = False
    """Whether weights in pickle files may be loaded."""
    trust_remote_code: bool = False
    """Whether Python code from the model's own files may run."""


class Verdict(StrEnum):
    """Whether a model would find room."""

    FITS = "fits"
    EVICTS = "evicts"
    """If others go, which only are loaded on demand."""
    WAITS = "waits"
    """Not now, for what is there stays."""
    NEVER = "never"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Fit:
    """What would become of a deployment as far as memory goes; all sizes in bytes."""

    verdict: Verdict
    message: str
    memory: int | None = None
    """That each worker is reckoned to need."""
    measured: bool = False
    """Whether that was measured, not estimated."""
    replicas: int = 1
    free: int | None = None
    """That loads may still take."""
    limit: int | None = None
    """That all models may take."""
    evicts: tuple[str, ...] = ()
    """Deployments that would go."""


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


@dataclass(frozen=True, slots=True)
class Story:
    """Why a deployment is as it is."""

    sentences: tuple[str, ...]
    """The answer as one would give it to a colleague."""
    events: tuple[Event, ...]
    """The chain that led there, oldest first."""
    crash: int | None = None
    """The crash that has the evidence."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one answer cost; sent by the worker with the end of each answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    batch_size: int = 0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Minute:
    """Statistics of one deployment over one minute."""

    deployment: str
    minute: int
    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    queue_seconds: float = 0.0


class PullState(StrEnum):
    """How far a pull is."""

    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """A download of a model that somebody asked for, as the store has it."""

    id: int
    model: str
    """``org/name[@revision]``."""
    state: PullState
    asked_at: float
    asked_by: str
    ended_at: float | None = None
    error: str | None = None
    """Why it failed, or why it has to be tried again."""
    folder: str | None = None
    commit: str | None = None
    size: int | None = None
    """Bytes of the model, once it is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullStatus(Pull):
    """The same with how it goes just now."""

    progress: Progress | None = None
    rate: float | None = None
    """Bytes per second, over the last seconds."""
    remaining_seconds: float | None = None
    next_try_at: float | None = None


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A model on this machine's disk."""

    name: str
    folder: str
    size: int
    commit: str | None = None
    used_by: tuple[str, ...] = ()
    """Deployments."""
    used_at: float | None = None
    """When it was last loaded, or else downloaded."""


_FHS_STATE = Path("/var/lib/tursi")
_FHS_LOGS = Path("/var/log/tursi")


@dataclass(frozen=True, slots=True)
class Folders:
    """Where the daemon keeps what; the CLI needs the same answers."""

    state: Path
    runtime: Path
    cache: Path
    configuration: Path
    log_folder: Path | None = None
    """Of the daemon's own log, where somebody has named one."""

    @property
    def socket(self) -> Path:
        """The Unix socket with all roles."""
        return self.runtime / "control.sock"

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.state / "tursi.sqlite"

    @property
    def logs(self) -> Path:
        """The folder with a log file per worker life."""
        return self.state / "workers"

    @property
    def log(self) -> Path:
        """The daemon's own log, where it is a file."""
        usual = _FHS_LOGS if self.state == _FHS_STATE else self.state
        return (self.log_folder or usual) / "tursi.log"

    @property
    def pid_file(self) -> Path:
        """Names the daemon's process."""
        return self.runtime / "tursi.pid"

    @property
    def status_file(self) -> Path:
        """Tells what a running daemon is."""
        return self.runtime / "tursi.json"

    def moved(
        self, *, state: Path | None = None, runtime: Path | None = None, cache: Path | None = None
    ) -> Folders:
        """With the folders that the command line names, absolute; the others follow ``state``."""
        found = self
        if state is not None:
            state = state.absolute()
            found = replace(self, state=state, runtime=state / "run", cache=state / "cache")
        if runtime is not None:
            found = replace(found, runtime=runtime.absolute())
        return found if cache is None else replace(found, cache=cache.absolute())


def folders(environ: Mapping[str, str], uid: int) -> Folders:
    """Folders by FHS for root and by XDG for everyone else.

    ``TURSI_STATE_DIR``, ``TURSI_RUNTIME_DIR``, ``TURSI_CACHE_DIR``, ``TURSI_LOG_DIR``
    and ``TURSI_CONFIG`` name them one by one and win.
    """
    home = Path(environ.get("HOME") or "/")
    if uid == 0:
        state, runtime = _FHS_STATE, Path("/run/tursi")
        cache, configuration = Path("/var/cache/tursi"), Path("/etc/tursi/tursi.toml")
    else:
        state = _xdg(environ, "XDG_STATE_HOME", home / ".local/state") / "tursi"
        cache = _xdg(environ, "XDG_CACHE_HOME", home / ".cache") / "tursi"
        configuration = _xdg(environ, "XDG_CONFIG_HOME", home / ".config") / "tursi/tursi.toml"
        runtime = _xdg(environ, "XDG_RUNTIME_DIR", state.parent) / "tursi"
        if "XDG_RUNTIME_DIR" not in environ:
            runtime = state / "run"
    return Folders(
        state=Path(environ.get("TURSI_STATE_DIR") or state),
        runtime=Path(environ.get("TURSI_RUNTIME_DIR") or runtime),
        cache=Path(environ.get("TURSI_CACHE_DIR") or cache),
        configuration=Path(environ.get("TURSI_CONFIG") or configuration),
        log_folder=Path(logs) if (logs := environ.get("TURSI_LOG_DIR")) else None,
    )


def _xdg(environ: Mapping[str, str], variable: str, default: Path) -> Path:
    # The XDG specification says to ignore relative values.
    value = environ.get(variable, "")
    return Path(value) if Path(value).is_absolute() else default


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
