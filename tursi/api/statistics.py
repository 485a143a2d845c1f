"""Statistics of deployments and keys, and what goes on just now."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import psutil

from tursi.api.endpoint import endpoint, identity
from tursi.api.figures import (
    PERIODS,
    Activity,
    DaemonUse,
    DeploymentActivity,
    DeploymentFigures,
    DeploymentStatisticsQuery,
    Figures,
    GenerationActivity,
    KeyFigures,
    KeyStatisticsQuery,
    PeriodFigures,
    Statistics,
    StatisticsQuery,
    figures,
    times,
)
from tursi.api.fleet import Fleet
from tursi.api.info import Info
from tursi.errors import KeyNotFound
from tursi.model import Caller, DeploymentStatus, Phase, Role, Scope
from tursi.rollup import Period, Rollup
from tursi.rollup import StatisticsQuery as Asked

WINDOW_SECONDS = 10.0
"""What "now" means."""
GENERATION_SECONDS = 60.0
"""The same for generations, to one of which not many requests may go."""
_LOOK_BACK = {Period.MINUTE: 3600, Period.HOUR: 86400, Period.DAY: 30 * 86400}

KeyNames = Callable[[], Any]
"""Gives, in time, every key's name by its id, the revoked ones too."""


class StatisticsControl:
    """Handlers that show what was done and what is.

    ``monotonic`` gives seconds since anything, ``now`` UTC epoch seconds.
    """

    def __init__(
        self,
        fleet: Fleet,
        info: Info,
        key_names: KeyNames,
        monotonic: Callable[[], float],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._fleet = fleet
        self._info = info
        self._key_names = key_names
        self._monotonic = monotonic
        self._now = now
        self._began = monotonic()
        self._process = psutil.Process(os.getpid())

    @endpoint("GET", "/statistics", query=StatisticsQuery, reply=Statistics, role=Role.CONTROL)
    async def all(
        self, period: str, since: datetime | None, key_name: str | None, deployment: str | None
    ) -> Statistics:
        """Show what all deployments have done."""
        return await self._tell(period, since, deployment, key_name)

    @endpoint(
        "GET", "/deployments/<name>/statistics", query=DeploymentStatisticsQuery, reply=Statistics,
        role=Role.CONTROL,
    )  # fmt: skip
    async def of_deployment(
        self, name: str, period: str, since: datetime | None, key_name: str | None
    ) -> Statistics:
        """Show what the deployment has done."""
        self._fleet.deployment(name)
        return await self._tell(period, since, name, key_name)

    @endpoint(
        "GET", "/keys/<name>/statistics", query=KeyStatisticsQuery, reply=Statistics,
        role=Role.INFERENCE,
    )  # fmt: skip
    async def of_key(
        self, name: str, period: str, since: datetime | None, caller: Caller
    ) -> Statistics:
        """Show what was done for an API key: for its owner, or for who may read everything."""
        own = caller.key is not None and name in {str(caller.key), caller.key_name}
        if not own and Scope.READ not in caller.scopes:
            raise KeyNotFound("A key may see its own statistics only; name it by its id or name.")
        return await self._tell(period, since, None, name)

    async def _tell(
        self, period: str, since: datetime | None, deployment: str | None, key: str | None
    ) -> Statistics:
        names: Mapping[int, str] = await self._key_names()
        length = PERIODS[period]
        begin = since.timestamp() if since is not None else self._now() - _LOOK_BACK[length]
        begin = max(begin - begin % length, 0)
        number = None if key is None else _number(key, names)
        found = await self._fleet.records.statistics(Asked(length, begin, deployment, number))
        alone = len(found.deployments) <= 1
        return Statistics(
            period,
            begin,
            figures(Figures, found.total, memory=alone),
            [
                figures(PeriodFigures, rollup, memory=alone, at=start)
                for start, rollup in found.periods.items()
            ],
            [
                figures(DeploymentFigures, rollup, deployment=name)
                for name, rollup in found.deployments.items()
            ],
            [
                figures(KeyFigures, rollup, memory=False, key=id_, name=names.get(id_))
                for id_, rollup in found.keys.items()
            ],
        )

    @endpoint("GET", "/activity", reply=Activity, role=Role.CONTROL)
    def activity(self) -> Activity:
        """Show what the daemon and every deployment do now."""
        info = self._info
        # The wall clock may have been set since.
        up = self._monotonic() - self._began
        seconds = max(min(WINDOW_SECONDS, up), 1.0)
        recent = self._fleet.records.recent(WINDOW_SECONDS)
        with self._process.oneshot():
            used, memory = self._process.cpu_times(), self._process.memory_info()
        nothing = Rollup()
        return Activity(
            self._now(),
            seconds,
            DaemonUse(info.version, info.pid, info.started_at, used.user + used.system, memory.rss),
            [*self._fleet.prospect.rooms()],
            [
                _activity(
                    status,
                    recent.get(status.name, nothing),
                    seconds,
                    self._generations(status, up),
                )
                for status in self._fleet.deployments()
            ],
        )

    def _generations(self, status: DeploymentStatus, up: float) -> list[GenerationActivity]:
        numbers = sorted({each.generation for each in status.workers if each.generation})
        if len(numbers) == 1 or not numbers:
            return []
        recent, nothing = self._fleet.records.recent_of(status.name, GENERATION_SECONDS), Rollup()
        seconds = max(min(GENERATION_SECONDS, up), 1.0)
        found = []
        for number in numbers:
            workers = [each for each in status.workers if each.generation == number]
            done = recent.get(number, nothing)
            found.append(
                GenerationActivity(
                    number,
                    sum(each.phase is Phase.READY for each in workers),
                    len(workers),
                    sum(each.in_flight for each in workers),
                    done.requests / seconds,
                    done.failed / seconds,
                    times(done.latency, done.seconds, done.served),
                )
            )
        return found


def _number(key: str, names: Mapping[int, str]) -> int:
    """The id of the key that is called so; 0 for none."""
    for number, name in names.items():
        if name == key:
            return number
    found = identity(key)
    if found is None or (found and found not in names):
        raise KeyNotFound
    return found


def _activity(
    status: DeploymentStatus,
    recent: Rollup,
    seconds: float,
    generations: list[GenerationActivity],
) -> DeploymentActivity:
    return DeploymentActivity(
        name=status.name,
        phase=status.phase,
        ready=status.ready,
        replicas=status.replicas,
        generation=status.generation,
        progress=status.progress,
        reason=status.reason,
        queued=status.queued,
        in_flight=status.in_flight,
        requests_per_second=recent.requests / seconds,
        errors_per_second=recent.failed / seconds,
        tokens_per_second=(recent.prompt_tokens + recent.completion_tokens) / seconds,
        latency=times(recent.latency, recent.seconds, recent.served),
        batch_size=recent.batch_size / recent.batched if recent.batched else None,
        rss=sum(worker.rss or 0 for worker in status.workers),
        gpu_memory=sum(sum(worker.gpus.values()) for worker in status.workers) or None,
        cpu_seconds=sum(worker.cpu_seconds or 0.0 for worker in status.workers),
        generations=generations,
    )
