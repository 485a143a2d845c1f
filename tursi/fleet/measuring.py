"""Measures what workers have of memory: when they are ready, and from time to time in service."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tursi.fleet.footprints import Footprints
from tursi.fleet.member import Member
from tursi.footprint import CONTEXT
from tursi.model import DeploymentStatus, Gpu, Peaks, Phase
from tursi.supervision import procfs
from tursi.supervision.worker import Worker

_ROSE = 1.01
"""Times the peak of the load: a higher one is of service."""


class Measuring:
    """Hands on to ``footprints`` what is seen; ``gpus`` tells how the GPUs are."""

    def __init__(
        self,
        *,
        members: Mapping[str, Member],
        footprints: Footprints,
        gpus: Callable[[], Sequence[Gpu]],
    ) -> None:
        self._members = members
        self._footprints = footprints
        self._gpus = gpus

    def ready(self, member: Member, worker: Worker) -> None:
        """A worker has become ready."""
        loaded = worker.loaded
        if loaded is None:
            return
        status = worker.status()
        highest = procfs.highest(status.pid) if status.pid else None
        self._footprints.loaded(
            worker.order,
            _device(member, worker),
            loaded,
            Peaks(highest, status.rss),
            member.load_seconds,
        )

    def sample(self) -> None:
        """Look at all that serve."""
        for member in self._members.values():
            for worker in member.workers.values():
                if worker.phase is Phase.READY and worker.loaded is not None:
                    self._sample(member, worker)

    def shown(self, status: DeploymentStatus) -> DeploymentStatus:
        """The same with what each worker has of the GPUs."""
        gpus = self._gpus()
        if not gpus:
            return status
        workers = tuple(
            replace(
                worker,
                gpus={
                    gpu.device: used
                    for gpu in gpus
                    if (used := gpu.processes.get(worker.pid or -1))
                },
            )
            for worker in status.workers
        )
        return replace(status, workers=workers)

    def _sample(self, member: Member, worker: Worker) -> None:
        status, loaded = worker.status(), worker.loaded
        if status.pid is None or loaded is None:
            return
        serves = worker.in_flight > 0
        host = status.rss if serves else None
        before, highest = loaded.host.highest, procfs.highest(status.pid)
        if before is not None and highest is not None and highest > before * _ROSE:
            host = max(host or 0, highest)
        used = [gpu.processes[status.pid] for gpu in self._gpus() if gpu.processes.get(status.pid)]
        gpu = max(0, sum(used) - CONTEXT * len(used)) if used and serves else None
        if host is not None or gpu is not None:
            self._footprints.busy(worker.order, _device(member, worker), loaded, host, gpu)


def placed(member: Member, worker: Worker) -> str | None:
    """Where a worker was told to compute, if that was chosen for it."""
    return next(
        (member.placed.get(key) for key, each in member.workers.items() if each is worker), None
    )


def _device(member: Member, worker: Worker) -> str:
    """Where it computes: on several GPUs as it was told, else as it has said."""
    told = placed(member, worker)
    if told is not None and "," in told:
        return told
    return worker.loaded.device if worker.loaded is not None else worker.order.device
