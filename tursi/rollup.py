"""What was done over a span of time: counts and distributions that add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from math import log
from typing import NamedTuple

from tursi.model import Usage
from tursi.sketch import LEAST, MOST, SCALE, ZERO, Sketch, bin_of


class ErrorClass(StrEnum):
    """How requests fail, told apart by who can do something about it."""

    CLIENT = "client"
    """It asked for what can't be done: 4xx but for those below."""
    OVERLOAD = "overload"
    """It was refused for now: 429 and 503."""
    LOST = "lost"
    """Its worker ended while it held it."""
    TIMEOUT = "timeout"
    """It was not answered, or had not arrived, in time."""
    CANCELLED = "cancelled"
    """Its client went away, or read too slowly."""
    INTERNAL = "internal"
    """Anything else that failed on this side."""
    UNKNOWN = "unknown"
    """Counted by a version that didn't tell them apart."""


FAULTS = (ErrorClass.LOST, ErrorClass.TIMEOUT, ErrorClass.INTERNAL)
"""Those that say something about the model and its worker."""


class Period(IntEnum):
    """Spans that statistics are kept by, in seconds."""

    MINUTE = 60
    HOUR = 3600
    DAY = 86400


class Observation(NamedTuple):
    """One request, at its end."""

    deployment: str
    """Empty where it got to none."""
    generation: int
    """0 where no worker got it."""
    key: int
    """0 without one."""
    status: int
    """Of HTTP."""
    code: str
    """Of the error that it ended by, or empty."""
    seconds: float
    """Its whole time,"""
    waited: float
    """and the part of it until a worker got it."""
    first_byte: float | None
    """Seconds until then, of a stream."""
    usage: Usage


class Rollup:
    """What was done, added up. An error that is counted is a request too.

    Latency and queue time are those of requests that a worker got, so that refusing
    many at once doesn't look fast. What is ``served`` are these.
    """

    __slots__ = (
        "batch_max", "batch_size", "batched", "completion_tokens", "errors", "first_byte", "gpu",
        "gpu_max", "latency", "prompt_tokens", "queue", "queue_seconds", "requests", "rss",
        "rss_max", "samples", "seconds", "served",
    )  # fmt: skip

    def __init__(self) -> None:
        self.requests = 0
        self.served = 0
        self.errors: dict[str, int] = {}
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.seconds = 0.0
        """Of all served requests together,"""
        self.queue_seconds = 0.0
        """and the part of them that they waited for a worker, and in it for their batch."""
        self.batched = 0
        """Requests that were part of a batch,"""
        self.batch_size = 0
        """and the sizes of these batches, added up."""
        self.batch_max = 0
        self.samples = 0
        """How often memory was looked at; bytes of all workers, added up over these times."""
        self.rss = 0
        self.rss_max = 0
        self.gpu = 0
        self.gpu_max = 0
        self.latency = Sketch()
        self.first_byte = Sketch()
        """From the request's beginning, of streams."""
        self.queue = Sketch()

    def count(
        self,
        error: str,
        served: bool,
        seconds: float,
        waited: float,
        first_byte: float | None,
        batch_size: int,
        prompt_tokens: int,
        completion_tokens: int,
    ) -> None:
        """Add one request, with the class of its error or an empty one."""
        self.requests += 1
        if error:
            self.errors[error] = self.errors.get(error, 0) + 1
        if not served:
            return
        self.served += 1
        self.seconds += seconds
        # As Sketch.add does it: a call for each would be a third of what this costs.
        sketch = self.latency
        place = int(log(seconds) * SCALE + ZERO) if LEAST <= seconds < MOST else bin_of(seconds)
        sketch[place] = sketch.get(place, 0) + 1
        self.queue_seconds += waited
        sketch = self.queue
        place = int(log(waited) * SCALE + ZERO) if LEAST <= waited < MOST else bin_of(waited)
        sketch[place] = sketch.get(place, 0) + 1
        if first_byte is not None:
            self.first_byte.add(first_byte)
        if batch_size:
            self.batched += 1
            self.batch_size += batch_size
            self.batch_max = max(self.batch_max, batch_size)
            self.prompt_tokens += prompt_tokens
            self.completion_tokens += completion_tokens

    def sample(self, rss: int, gpu: int) -> None:
        """Add a look at the memory of all workers together."""
        self.samples += 1
        self.rss += rss
        self.rss_max = max(self.rss_max, rss)
        self.gpu += gpu
        self.gpu_max = max(self.gpu_max, gpu)

    def merge(self, other: Rollup) -> None:
        """Add all of ``other``."""
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in MAXIMA:
            setattr(self, name, max(getattr(self, name), getattr(other, name)))
        for name in SKETCHES:
            getattr(self, name).merge(getattr(other, name))
        for error, count in other.errors.items():
            self.errors[error] = self.errors.get(error, 0) + count

    @property
    def failed(self) -> int:
        """Errors of every class."""
        return sum(self.errors.values())

    @property
    def faults(self) -> int:
        """Errors that say something about the model and its worker."""
        return sum(self.errors.get(each, 0) for each in FAULTS)

    def __eq__(self, other: object) -> bool:
        """Whether it has counted the same."""
        return isinstance(other, Rollup) and all(
            getattr(self, name) == getattr(other, name) for name in self.__slots__
        )

    __hash__ = None  # type: ignore[assignment] # it changes

    def __repr__(self) -> str:
        """What is in it, for tests."""
        found = {name: getattr(self, name) for name in self.__slots__}
        return f"Rollup({', '.join(f'{name}={each}' for name, each in found.items() if each)})"


SUMS = (
    "requests", "served", "prompt_tokens", "completion_tokens", "seconds", "queue_seconds",
    "batched", "batch_size", "samples", "rss", "gpu",
)  # fmt: skip
MAXIMA = ("batch_max", "rss_max", "gpu_max")
SKETCHES = ("latency", "first_byte", "queue")


class Record(NamedTuple):
    """What one deployment did for one key within one minute."""

    start: int
    """UTC epoch seconds."""
    deployment: str
    """Empty: of requests that got to none."""
    key: int
    """Its id; 0: of requests without one. The memory of workers is counted there too."""
    rollup: Rollup


@dataclass(frozen=True, slots=True)
class StatisticsQuery:
    """Which statistics; ``since`` is in UTC epoch seconds."""

    by: Period
    since: float
    deployment: str | None = None
    key: int | None = None
    """0: only requests without one."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The same records added up in several ways."""

    total: Rollup = field(default_factory=Rollup)
    periods: Mapping[int, Rollup] = field(default_factory=dict)
    """By when they began, in UTC epoch seconds."""
    deployments: Mapping[str, Rollup] = field(default_factory=dict)
    keys: Mapping[int, Rollup] = field(default_factory=dict)
