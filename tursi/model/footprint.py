"""What a worker needs of this machine's memory: as its files tell, and as it was seen."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """When memory was measured."""

    LOAD = "load"
    """Until the weights were there."""
    WARM = "warm"
    """From then on until the worker was ready."""
    BUSY = "busy"
    """In service."""


@dataclass(frozen=True, slots=True)
class Peaks:
    """The most memory, in bytes, that a worker has had in each stage; ``None``: not measured."""

    load: int | None = None
    warm: int | None = None
    busy: int | None = None

    def __or__(self, other: Peaks) -> Peaks:
        """The greater of both, stage by stage."""
        return Peaks(
            _most(self.load, other.load),
            _most(self.warm, other.warm),
            _most(self.busy, other.busy),
        )

    @property
    def highest(self) -> int | None:
        """Of all stages."""
        return _most(_most(self.load, self.warm), self.busy)

    @property
    def settled(self) -> int | None:
        """Once the load is over."""
        return _most(self.warm, self.busy)


@dataclass(frozen=True, slots=True)
class Build:
    """What measurements hold for: a model, loaded in one way."""

    model: str
    """The hub's commit, or a digest of a folder's name, files and their size."""
    device: str
    """``cpu``, ``mps``, ``cuda``, or ``cuda x2`` on two GPUs together."""
    dtype: str = "auto"
    """As asked for, as are the others."""
    task: str = ""
    quantization: str = "none"
    max_batch_tokens: int = 1024
    max_sequences: int = 16
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Measurement:
    """The most that workers of a build have had of memory."""

    build: Build
    host: Peaks = Peaks()
    gpu: Peaks = Peaks()
    """Of all its GPUs together, without what the driver takes."""
    load_seconds: float | None = None
    """What the last load took."""
    at: float = 0.0
    """UTC epoch seconds of the last time that anything new was seen."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a model's files tell before anything is loaded; all sizes in bytes."""

    size: int = 0
    """Of the files."""
    parameters: int | None = None
    dtype: str | None = None
    """That it will have in memory."""
    weights: int = 0
    """In memory, in that dtype."""
    activations: int = 0
    """Of the largest batch."""
    cache: int = 0
    """Keys and values of all texts that are generated at a time."""
    from_headers: bool = False
    """Whether the weights' headers could be read; else all is reckoned from the size."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What each worker of a model needs; all sizes in bytes."""

    device: str = "cpu"
    """Where it computes: ``cpu``, ``mps``, ``cuda``, or ``cuda x2`` on two GPUs together."""
    host: int = 0
    """Host memory while it loads and after, whichever is more."""
    host_settled: int = 0
    """Host memory once it is loaded."""
    gpu: int = 0
    """Memory of all its GPUs together."""
    estimate: Estimate | None = None
    host_peaks: Peaks = Peaks()
    """As measured, whichever deployment it was."""
    gpu_peaks: Peaks = Peaks()

    @property
    def measured(self) -> bool:
        """Whether a worker of this model has been seen, on such a device and as large."""
        return self.host_peaks.highest is not None


def _most(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return max(one, other)
