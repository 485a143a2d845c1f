"""Statistics as they are shown: rollups in figures."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, TypeVar

import msgspec

from tursi.model import Phase, Progress, Room
from tursi.rollup import Period, Rollup
from tursi.sketch import Sketch

PERIODS = {"minute": Period.MINUTE, "hour": Period.HOUR, "day": Period.DAY}


class KeyStatisticsQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Which statistics to show."""

    period: Literal["minute", "hour", "day"] = msgspec.field(name="by", default="minute")
    since: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    """Absent: for an hour, a day or thirty days, depending on the period."""


class DeploymentStatisticsQuery(KeyStatisticsQuery, kw_only=True, forbid_unknown_fields=True):
    """Which statistics of a deployment to show."""

    key_name: str | None = None
    """Only requests with this key, by its name or id; 0: those without one."""


class StatisticsQuery(DeploymentStatisticsQuery, kw_only=True, forbid_unknown_fields=True):
    """Which statistics of which deployment to show."""

    deployment: str | None = None
    """Also one that has been deleted."""


class Times(msgspec.Struct, frozen=True):
    """How durations are distributed, in seconds; percentiles are right within 1 %."""

    count: int
    p50: float
    p95: float
    p99: float
    mean: float | None = None


class Amount(msgspec.Struct, frozen=True):
    """How large something was."""

    mean: float
    max: int


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What was done. Null is what there was nothing of, or what isn't known any more."""

    requests: int
    """The refused ones too."""
    errors: int
    errors_by_class: dict[str, int]
    """client, overload, lost, timeout, cancelled, internal; unknown in old records."""
    prompt_tokens: int
    completion_tokens: int
    latency: Times | None
    """From the complete request to its answer's end, of those that a worker got."""
    first_byte: Times | None
    """From the complete request to its answer's first byte, of streams."""
    queue: Times | None
    """The part of the latency before a worker began with it."""
    batch_size: Amount | None
    memory: Amount | None
    """Bytes of host memory, of all workers of the deployment together."""
    gpu_memory: Amount | None


class PeriodFigures(Figures, frozen=True, kw_only=True):
    """What was done in the period that began then."""

    at: float


class DeploymentFigures(Figures, frozen=True, kw_only=True):
    """What a deployment did."""

    deployment: str
    """Empty: requests that got to none."""


class KeyFigures(Figures, frozen=True, kw_only=True):
    """What was done for a key."""

    key: int
    """Its id; 0: requests without one."""
    name: str | None
    """Null without a key."""


class Statistics(msgspec.Struct, frozen=True):
    """The same requests three times: by period, by deployment and by key."""

    by: str
    since: float
    """When the first period begins."""
    total: Figures
    periods: list[PeriodFigures]
    """Those in which anything was done, oldest first."""
    deployments: list[DeploymentFigures]
    keys: list[KeyFigures]


F = TypeVar("F", bound=Figures)


def figures(kind: type[F], rollup: Rollup, *, memory: bool = True, **more: object) -> F:
    """``rollup`` as a ``kind``; without ``memory`` where it is of several deployments."""
    sampled = memory and rollup.samples > 0
    served = rollup.served
    return kind(
        requests=rollup.requests,
        errors=rollup.failed,
        errors_by_class=rollup.errors,
        prompt_tokens=rollup.prompt_tokens,
        completion_tokens=rollup.completion_tokens,
        latency=times(rollup.latency, rollup.seconds, served),
        first_byte=times(rollup.first_byte),
        queue=times(rollup.queue, rollup.queue_seconds, served),
        batch_size=_amount(rollup.batch_size, rollup.batched, rollup.batch_max),
        memory=_amount(rollup.rss, rollup.samples, rollup.rss_max) if sampled else None,
        gpu_memory=(
            _amount(rollup.gpu, rollup.samples, rollup.gpu_max)
            if sampled and rollup.gpu_max
            else None
        ),
        **more,
    )


def times(sketch: Sketch, seconds: float | None = None, count: int = 0) -> Times | None:
    """What a sketch tells, and the mean where the sum and the count are known."""
    mean = seconds / count if seconds is not None and count else None
    if not sketch:
        # Of requests that an older version has counted, only the mean is known.
        return None if mean is None else Times(count, mean, mean, mean, mean)
    p50, p95, p99 = sketch.quantiles(0.5, 0.95, 0.99)
    return Times(sketch.count, p50, p95, p99, mean)


def _amount(total: int, count: int, most: int) -> Amount | None:
    return Amount(total / count, most) if count else None


class DaemonUse(msgspec.Struct, frozen=True):
    """What the daemon's own process uses."""

    version: str
    pid: int
    started_at: float
    cpu_seconds: float
    rss: int
    """Bytes."""


class GenerationActivity(msgspec.Struct, frozen=True):
    """What one of several generations that are there has done in the last minute."""

    generation: int
    ready: int
    workers: int
    in_flight: int
    requests_per_second: float
    errors_per_second: float
    latency: Times | None


class DeploymentActivity(msgspec.Struct, frozen=True, kw_only=True):
    """What a deployment does now."""

    name: str
    phase: Phase
    ready: int
    replicas: int
    generation: int
    progress: Progress | None
    reason: str | None
    queued: int
    in_flight: int
    requests_per_second: float
    errors_per_second: float
    tokens_per_second: float
    """Of inputs and of answers together."""
    latency: Times | None
    batch_size: float | None
    """On average."""
    rss: int
    """Bytes, of all workers together, as the next two."""
    gpu_memory: int | None
    cpu_seconds: float
    """Since the workers began, so that it falls when one ends."""
    generations: list[GenerationActivity]
    """While there are several, oldest first."""


class Activity(msgspec.Struct, frozen=True):
    """What goes on, in one answer that costs little."""

    at: float
    seconds: float
    """The time before, that rates and percentiles are of."""
    daemon: DaemonUse
    rooms: list[Room]
    """Memory of the host and of each GPU."""
    deployments: list[DeploymentActivity]
