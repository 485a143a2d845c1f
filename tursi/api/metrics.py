"""Metrics in the Prometheus formats: what requests did, counted; what the fleet is, looked up.

Labels are the deployment's name, the route's name, an HTTP status, a phase, or
an error code: all of them few. What a client sent never becomes a label.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tursi.api.audit import Audit
from tursi.api.fleet import Fleet
from tursi.api.info import Info
from tursi.errors import HostRefused, InvalidRequest, PayloadTooLarge, RequestTimeout
from tursi.lag import Lag
from tursi.model import DeploymentStatus, Usage

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_REFUSALS = tuple(
    kind.code for kind in (InvalidRequest, HostRefused, RequestTimeout, PayloadTooLarge)
)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """Counts per bucket; an observation costs one bisection."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count ``value``."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by upper bound, and the sum."""
        total, found = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            found.append(("+Inf" if bound == float("inf") else repr(float(bound)), float(total)))
        return found, self._sum


class Series:
    """What one deployment did by one route."""

    __slots__ = ("batch", "completion", "errors", "prompt", "queue", "seconds", "statuses")

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.errors: dict[str, int] = {}
        self.seconds = Histogram(_SECONDS)
        self.queue = Histogram(_SECONDS)
        self.batch = Histogram(_SIZES)
        self.prompt = 0
        self.completion = 0


class Growth:
    """A counter over the lives of workers, each of which begins at nought."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self.total = 0.0

    def update(self, now: dict[str, float]) -> None:
        """Take the current values by worker; one that has fallen has begun anew."""
        for name, value in now.items():
            last = self._last.get(name, 0.0)
            self.total += value - last if value >= last else value
        self._last = now


class Metrics(Collector):
    """Counts requests, and tells everything when it is asked."""

    def __init__(
        self,
        fleet: Fleet,
        info: Info,
        audit: Audit | None = None,
        lag: Lag | None = None,
    ) -> None:
        self._lag = lag
        self._fleet = fleet
        self._audit = audit
        self._info = info
        self._series: dict[tuple[str, str], Series] = {}
        self._restarts: dict[str, Growth] = {}
        self._cpu: dict[str, Growth] = {}
        # Those that any daemon meets are there from the start, so that their rates are right.
        self._refused = dict.fromkeys(_REFUSALS, 0)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def record(
        self, deployment: str, route: str, status: int, seconds: float, usage: Usage, code: str
    ) -> None:
        """Count one request; ``code`` is of the error it ended by, or empty."""
        key = (deployment, route)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = Series()
        series.statuses[status] = series.statuses.get(status, 0) + 1
        series.seconds.observe(seconds)
        if code:
            series.errors[code] = series.errors.get(code, 0) + 1
        if usage.batch_size:
            series.queue.observe(usage.queue_seconds)
            series.batch.observe(usage.batch_size)
            series.prompt += usage.prompt_tokens
            series.completion += usage.completion_tokens

    def refused(self, code: str) -> None:
        """Count a request that was refused before it had arrived."""
        self._refused[code] = self._refused.get(code, 0) + 1

    def text(self, accept: str) -> tuple[str, bytes]:
        """Content type and text in the format that an ``Accept`` header asks for."""
        encode, content_type = choose_encoder(accept)
        return content_type, encode(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Everything that there is to tell, as prometheus-client encodes it."""
        return (family for family in self._families() if family.samples)

    def _families(self) -> Iterator[Metric]:
        statuses = self._fleet.deployments()
        self._forget({status.name for status in statuses})
        yield from self._requests()
        refused = CounterMetricFamily(
            "tursi_requests_refused", "Requests of any kind that were refused while they arrived.",
            labels=["code"],
        )  # fmt: skip
        for code, count in self._refused.items():
            refused.add_metric([code], count)
        yield refused
        yield from self._deployments(statuses)
        yield from self._memory()
        yield from self._storage()
        if self._lag is not None:
            yield from _loop(self._lag)
        build = GaugeMetricFamily("tursi_build_info", "The daemon's version.", labels=["version"])
        build.add_metric([self._info.version], 1)
        yield build
        yield GaugeMetricFamily(
            "tursi_start_time_seconds", "When the daemon started, in UTC epoch seconds.",
            value=self._info.started_at,
        )  # fmt: skip

    def _memory(self) -> Iterator[Metric]:
        total = GaugeMetricFamily(
            "tursi_memory_total_bytes", "Memory of the host and of each GPU.", labels=["device"]
        )
        free = GaugeMetricFamily(
            "tursi_memory_free_bytes", "The part of it that loads may still take.",
            labels=["device"],
        )  # fmt: skip
        for room in self._fleet.prospect.rooms():
            for gauge, size in ((total, room.total), (free, room.free)):
                if size is not None:
                    gauge.add_metric([room.device], size)
        yield from (total, free)

    def _storage(self) -> Iterator[Metric]:
        status = self._fleet.records.storage()
        yield GaugeMetricFamily(
            "tursi_notes_waiting", "Notes of what happened that wait for the database.",
            value=status.waiting,
        )  # fmt: skip
        dropped = CounterMetricFamily(
            "tursi_dropped", "What could not be written and is lost, by its kind.", labels=["kind"]
        )
        for kind, count in (
            ("note", status.notes_dropped),
            ("minute", status.minutes_dropped),
            ("log_line", status.log_lines_dropped),
            ("refusal", self._audit.dropped if self._audit is not None else 0),
        ):
            dropped.add_metric([kind], count)
        yield dropped

    def _forget(self, existing: set[str]) -> None:
        """Drop what was counted for deployments that are gone."""
        self._series = {
            key: series for key, series in self._series.items() if key[0] in existing or not key[0]
        }
        for growths in (self._restarts, self._cpu):
            for name in growths.keys() - existing:
                del growths[name]

    def _requests(self) -> Iterator[Metric]:
        where = ["deployment", "route"]
        requests = CounterMetricFamily(
            "tursi_requests", "Inference requests by HTTP status.", labels=[*where, "status"]
        )
        errors = CounterMetricFamily(
            "tursi_request_errors", "Inference requests that failed, by error code.",
            labels=[*where, "code"],
        )  # fmt: skip
        prompt = CounterMetricFamily("tursi_prompt_tokens", "Tokens of inputs.", labels=where)
        completion = CounterMetricFamily(
            "tursi_completion_tokens", "Tokens that were generated.", labels=where
        )
        seconds = HistogramMetricFamily(
            "tursi_request_seconds", "Time from a complete request to its answer's end.",
            labels=where,
        )  # fmt: skip
        queue = HistogramMetricFamily(
            "tursi_queue_seconds", "Time that requests waited in the worker for their batch.",
            labels=where,
        )  # fmt: skip
        batch = HistogramMetricFamily(
            "tursi_batch_size", "Requests or sequences in the batch that each request was part of.",
            labels=where,
        )  # fmt: skip
        for key, series in self._series.items():
            for status, count in series.statuses.items():
                requests.add_metric([*key, str(status)], count)
            for code, count in series.errors.items():
                errors.add_metric([*key, code], count)
            prompt.add_metric(key, series.prompt)
            completion.add_metric(key, series.completion)
            for family, histogram in (
                (seconds, series.seconds),
                (queue, series.queue),
                (batch, series.batch),
            ):
                buckets, total = histogram.buckets()
                family.add_metric(key, buckets, total)
        yield from (requests, errors, seconds, queue, batch, prompt, completion)

    def _deployments(self, statuses: Sequence[DeploymentStatus]) -> Iterator[Metric]:
        gauges: tuple[tuple[str, str, Callable[[DeploymentStatus], float]], ...] = (
            ("tursi_requests_in_flight", "Requests that workers hold.", lambda one: one.in_flight),
            ("tursi_requests_queued", "Requests that wait for a worker.", lambda one: one.queued),
            ("tursi_replicas", "Replicas that are wanted.", lambda one: one.replicas),
            ("tursi_replicas_ready", "Replicas that serve.", lambda one: one.ready),
            ("tursi_worker_rss_bytes", "Resident memory of the workers.", _rss),
        )
        for name, documentation, value in gauges:
            gauge = GaugeMetricFamily(name, documentation, labels=["deployment"])
            for status in statuses:
                gauge.add_metric([status.name], value(status))
            yield gauge
        gpu = GaugeMetricFamily(
            "tursi_worker_gpu_bytes", "GPU memory of the workers.", labels=["deployment", "device"]
        )
        for status in statuses:
            for device, size in _gpus(status).items():
                gpu.add_metric([status.name, device], size)
        yield gpu
        phases = GaugeMetricFamily(
            "tursi_workers", "Workers by phase.", labels=["deployment", "status"]
        )
        restarts = CounterMetricFamily(
            "tursi_worker_restarts", "Restarts of workers.", labels=["deployment"]
        )
        cpu = CounterMetricFamily(
            "tursi_worker_cpu_seconds", "CPU time of the workers.", labels=["deployment"]
        )
        for status in statuses:
            counts: dict[str, int] = {}
            for worker in status.workers:
                counts[worker.phase.value] = counts.get(worker.phase.value, 0) + 1
            for phase, count in counts.items():
                phases.add_metric([status.name, phase], count)
            grown = self._restarts.setdefault(status.name, Growth())
            grown.update({each.name: float(each.restarts) for each in status.workers})
            restarts.add_metric([status.name], grown.total)
            used = self._cpu.setdefault(status.name, Growth())
            used.update(
                {each.uuid or each.name: each.cpu_seconds or 0.0 for each in status.workers}
            )
            cpu.add_metric([status.name], used.total)
        yield from (phases, restarts, cpu)


def _loop(lag: Lag) -> Iterator[Metric]:
    buckets, total = lag.buckets()
    lateness = HistogramMetricFamily(
        "tursi_event_loop_lag_seconds", "How much later than asked the event loop calls."
    )
    lateness.add_metric([], buckets, total)
    yield lateness
    yield GaugeMetricFamily(
        "tursi_event_loop_worst_lag_seconds", "The most of the last minute.", value=lag.worst
    )


def _gpus(status: DeploymentStatus) -> dict[str, int]:
    used: dict[str, int] = {}
    for worker in status.workers:
        for device, size in worker.gpus.items():
            used[device] = used.get(device, 0) + size
    return used


def _rss(status: DeploymentStatus) -> int:
    return sum(worker.rss or 0 for worker in status.workers)
