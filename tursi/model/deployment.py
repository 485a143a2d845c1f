"""What a user wants served: deployments, their requests and their generations."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

from tursi.errors import InvalidRequest
from tursi.model.limits import Host, Limits
from tursi.model.reference import Reference
from tursi.model.task import Task

MAX_REPLICAS = 64
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
    choices: dict[str, str] = field(default_factory=dict)
    """What a worker chose, and why: a sentence each for device, dtype and the like."""


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
