"""What a user wants served: deployments, their requests and their generations."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from enum import StrEnum

from tursi.errors import InvalidRequest
from tursi.model.limits import Host, Limits
from tursi.model.reference import Reference
from tursi.model.task import Task

MAX_REPLICAS = 64
MAX_KEEP_ALIVE = 366 * 86400
"""Seconds; what is to stay for longer stays for ever."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8", "int4")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,2})?|cuda:\d{1,2}(,cuda:\d{1,2})+")


class Desired(StrEnum):
    """What the operator wants of a deployment."""

    RUNNING = "running"
    STOPPED = "stopped"


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
    limits: Limits = Limits()  # noqa: RUF009 - a frozen value
    allow_pickle: bool = False
    trust_remote_code: bool = False
    quantization: str = "none"
    """What the weights are made smaller to, whatever ``dtype`` it computes in."""

    @property
    def trust(self) -> Trust:
        """What the model may bring besides data."""
        return Trust(self.allow_pickle, self.trust_remote_code)

    def checked(self, host: Host = Host()) -> Request:  # noqa: B008 - a frozen value
        """The same in normal form; ``InvalidRequest`` names the field that is wrong."""
        devices = self.device.split(",")
        if not _DEVICE.fullmatch(self.device) or len({*devices}) < len(devices):
            raise InvalidRequest(
                f"The device {self.device[:50]!r} is unknown; use auto, cpu, mps, cuda, cuda:N, or "
                "several GPUs as cuda:0,cuda:1.",
                param="device",
            )
        if self.dtype not in DTYPES:
            raise InvalidRequest(
                f"The dtype {self.dtype[:50]!r} is unknown; use one of {', '.join(DTYPES)}.",
                param="dtype",
            )
        if self.quantization not in QUANTIZATIONS:
            raise InvalidRequest(
                f"The quantization {self.quantization[:50]!r} is unknown; use one of "
                f"{', '.join(QUANTIZATIONS)}.",
                param="quantization",
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
            quantization=self.quantization,
        )


def check_replicas(replicas: int, most: int | None = None) -> None:
    """Raise ``InvalidRequest`` unless a deployment may have that many, or so many to ``most``."""
    if not 1 <= replicas <= MAX_REPLICAS:
        raise InvalidRequest(f"A deployment has 1 to {MAX_REPLICAS} replicas.", param="replicas")
    if most is not None and not replicas <= most <= MAX_REPLICAS:
        raise InvalidRequest(
            f"The most replicas of a deployment are as many as the least or more, up to "
            f"{MAX_REPLICAS}.",
            param="max_replicas",
        )


def check_keep_alive(seconds: float) -> None:
    """Raise ``InvalidRequest`` unless a deployment may stay unused in memory for so long."""
    if not -1 <= seconds <= MAX_KEEP_ALIVE:
        raise InvalidRequest(
            f"keep_alive is -1, or a number of seconds up to {MAX_KEEP_ALIVE}.", param="keep_alive"
        )


def check_weight(weight: int) -> None:
    """Raise ``InvalidRequest`` unless a canary may have that share of the requests."""
    if not 0 <= weight <= 100:
        raise InvalidRequest("A canary's weight is 0 to 100 percent.", param="canary")


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
    choices: dict[str, str] = field(default_factory=dict)
    """What a worker chose, and why: a sentence each for device, dtype and the like."""


class Fate(StrEnum):
    """What became of a generation."""

    SERVING = "serving"
    REPLACED = "replaced"
    """Another one has taken over."""
    ROLLED_BACK = "rolled-back"
    """One has taken over that is again what was before it."""
    FAILED = "failed"
    """It could not take over, or didn't answer as a canary."""
    RETRIED = "retried"
    """It is tried again after that."""
    GIVEN_UP = "given-up"
    """Somebody wanted another one before it had taken over."""
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class Turn:
    """Something that became of a generation, and why."""

    fate: Fate
    at: float
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """One immutable version of a deployment."""

    number: int
    request: Request
    created_at: float
    created_by: str
    resolution: Resolution | None = None
    copy_of: int | None = None
    """The generation that it is again, after a rollback."""
    turns: tuple[Turn, ...] = ()
    """What became of it, oldest first."""

    @property
    def fate(self) -> Fate | None:
        """What has become of it; ``None`` while it comes up for the first time."""
        return self.turns[-1].fate if self.turns else None

    @property
    def has_served(self) -> bool:
        """Whether it has ever been what the deployment serves."""
        return any(turn.fate is Fate.SERVING for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model that the user wants served, as the store has it."""

    name: str
    desired: Desired
    replicas: int
    """The least, if ``max_replicas`` says that there may be more."""
    generation: Generation
    """What was asked for last."""
    created_at: float
    updated_at: float
    schedule: Schedule = Schedule()
    max_replicas: int | None = None
    """So many where requests have to wait long; ``None``: ``replicas`` is all there is."""
    stable: Generation | None = None
    """What serves until ``generation`` has taken over, and again if it fails."""
    canary: int | None = None
    """Percent of the requests that ``generation`` gets beside ``stable``; ``None``: it takes over
    as soon as it is ready."""
    loaded: bool = False
    """Whether somebody wants it in memory; it only matters for what is loaded manually."""

    @property
    def served(self) -> Deployment:
        """The same with what serves now, where something else is still to take over."""
        if self.stable is None:
            return self
        return replace(self, generation=self.stable, stable=None, canary=None)

    @property
    def failed(self) -> bool:
        """Whether ``generation`` could not take over, so that ``stable`` serves."""
        return self.stable is not None and self.generation.fate is Fate.FAILED
