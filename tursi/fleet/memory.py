"""The memory of this machine: what models need of it, who may load, and who makes room."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from tursi import config
from tursi.admission import ANY, Candidate, Free, place
from tursi.fleet.footprints import Footprints
from tursi.fleet.member import Member
from tursi.fleet.shortages import Shortages
from tursi.footprint import CONTEXT, gpus, kind
from tursi.model import Dossier, Footprint, Gpu, Host, Load, LoadOrder, Phase, mebibytes
from tursi.plan import LOADING, Key, Seen
from tursi.residency import Rules
from tursi.supervision.worker import Worker

_THERE = frozenset({Phase.READY, Phase.SUSPECT, Phase.DRAINING, Phase.STOPPING, Phase.KILLING})
_SERVES = frozenset({Phase.READY, Phase.SUSPECT})


class There(NamedTuple):
    """A worker that is in memory or on its way there."""

    member: Member
    key: Key
    worker: Worker
    needs: Footprint

    @property
    def loads(self) -> bool:
        """Whether it is on its way."""
        return self.worker.phase in LOADING

    @property
    def host(self) -> int:
        """Host memory that it needs now."""
        return self.needs.host if self.loads else self.needs.host_settled

    @property
    def goes(self) -> bool:
        """Whether its memory will be free soon."""
        return (
            self.key in self.member.retiring
            or not self.member.awake
            or self.worker.phase not in (_SERVES | LOADING)
        )


class Memory:
    """Reckons with memory in bytes; ``clock`` gives monotonic seconds.

    ``available`` tells what the machine has free just now, ``None`` where that can't
    be known, and ``gpus`` how the GPUs are. ``orders`` says what a member's next worker
    will be told, ``suspects`` which GPUs to avoid.
    """

    def __init__(
        self,
        *,
        members: Mapping[str, Member],
        footprints: Footprints,
        settings: config.Memory,
        host: Host,
        available: Callable[[], int | None],
        gpus: Callable[[], Sequence[Gpu]],
        suspects: Callable[[], Collection[str]],
        orders: Callable[[Member], LoadOrder | None],
        clock: Callable[[], float],
    ) -> None:
        self._members = members
        self._footprints = footprints
        self._host = host
        self._available = available
        self._gpus = gpus
        self._suspects = suspects
        self._orders = orders
        self._clock = clock
        self._queued: dict[Key, float] = {}
        """Since when workers wait."""
        self._blind = False
        """Whether workers that may choose have chosen the processor, GPUs or not."""
        self.shortages = Shortages()
        self.configure(settings)

    def configure(self, settings: config.Memory) -> None:
        """Go by these from now on."""
        self._settings = settings
        self.limit = settings.limit_bytes or self._host.memory
        self.rules = Rules(settings.max_wait_seconds, settings.min_residency_seconds)

    @property
    def keep_alive(self) -> float:
        """Seconds that what is loaded on demand stays unused, if it doesn't say itself."""
        return self._settings.keep_alive_seconds

    # -- what is needed ------------------------------------------------------------

    def kind(self, device: str) -> str:
        """Where a worker will compute that is asked for on ``device``."""
        if device != "auto":
            return kind(device)
        if self._gpus() and not self._blind:
            return "cuda"
        return "mps" if sys.platform == "darwin" else "cpu"

    def needs(self, order: LoadOrder, device: str | None = None) -> Footprint:
        """What a worker needs that is told this, on ``device`` if that is known."""
        found = self._footprints.of(order, self.kind(device or order.device))
        if not found.gpu or self._reckons(device or order.device):
            return found
        return replace(found, gpu=0)

    def of(self, member: Member) -> Footprint | None:
        """What its next worker needs; ``None`` as long as its files aren't known."""
        order = self._orders(member)
        if order is None or self._is_unread(member, member.due.number):
            return None
        needs = self.needs(order)
        least = self.shortages.least(member.deployment.name, member.due.number)
        return needs if needs.host >= least else replace(needs, host=least)

    def device(self, member: Member) -> str:
        """Where its present generation was asked to compute."""
        return member.due.request.device

    def measures(self, order: LoadOrder, device: str) -> None:
        """A worker has been loaded on ``device``."""
        self._blind = order.device in ANY and device == "cpu" and bool(self._gpus())

    def seen(self, free: Free) -> list[Seen]:
        """All workers as the plan sees them."""
        now, found = self._clock(), []
        queued: dict[Key, float] = {}
        most: Free | None = None
        for member in self._members.values():
            for seen in member.seen(0):
                worker, device = member.workers[seen.key], member.placed.get(seen.key)
                if seen.phase is not Phase.QUEUED:
                    needs = self.needs(worker.order, device)
                    device = device or worker.order.device
                    found.append(replace(seen, gpu=needs.gpu, device=device))
                    continue
                # Before anything is reckoned with them.
                unread = self._is_unread(member, seen.key.generation)
                needs = self._next(worker)
                queued[seen.key] = since = self._queued.get(seen.key, now)
                most = most or self._most(free)
                found.append(
                    replace(
                        seen,
                        memory=needs.host,
                        gpu=_alone(needs),
                        device=worker.order.device,
                        waited=now - since,
                        hopes=self._fits(needs, worker.order.device, most),
                        held=unread
                        or self.shortages.holds(
                            seen.key.deployment, seen.key.generation, needs, free
                        ),
                    )
                )
        self._queued = queued
        return found

    # -- what is free --------------------------------------------------------------

    def free(self, but: str | None = None) -> Free:
        """What loads may still take, once the worker life ``but`` has gone too."""
        there = [each for each in self.there() if but is None or each.worker.uuid != but]
        machine = available = self._available()
        if available is not None:
            # What is there has not taken all that it needs yet.
            growth = sum(
                max(0, each.host - (each.worker.status().rss or 0)) for each in there if each.loads
            )
            machine = max(0, available - self._settings.reserve_bytes - growth)
        host = machine
        if self.limit is not None:
            left = max(0, self.limit - sum(each.host for each in there))
            host = left if machine is None else min(left, machine)
        return Free(
            host, {gpu.device: self._free(gpu, there) for gpu in self._gpus()}, self._suspects(),
            machine,
        )  # fmt: skip

    def told(self, free: Free) -> str:
        """What is free of the host, as a clause."""
        if free.host is None:
            return "nobody knows what is free"
        if free.is_limited and self.limit is not None:
            return f"{mebibytes(free.host)} are left of the {mebibytes(self.limit)} for all models"
        return f"{mebibytes(free.host)} are free"

    def _free(self, gpu: Gpu, there: Collection[There]) -> int:
        growth = 0
        for each in there:
            devices = self.devices(each)
            if gpu.device in devices:
                used = self._used(gpu, each.worker)
                growth += max(0, each.needs.gpu // len(devices) - used)
        return max(0, gpu.free - self._settings.reserve_bytes - growth)

    def _used(self, gpu: Gpu, worker: Worker) -> int:
        """What a worker has of a GPU, by the driver or by what it has said itself."""
        told = gpu.processes.get(worker.status().pid or -1, 0)
        said = worker.loaded.gpus.get(gpu.device) if worker.loaded else None
        if told or said is None:
            return told
        return (said.settled or 0) + CONTEXT

    # -- who waits -----------------------------------------------------------------

    def explain(self, member: Member, free: Free) -> str | None:
        """Why a worker that is queued isn't loaded, if memory is the reason."""
        needs = self.of(member)
        if needs is None or not self.is_queued(member):
            return None
        never = self.impossible(needs, self.device(member))
        if never is not None:
            return never
        generation = member.due
        if free.host is not None and needs.host > free.host:
            return (
                f"It waits for memory: it needs about {mebibytes(needs.host)}, {self.told(free)}."
            )
        device = self.device(member)
        if self.place(needs, device, free.gpus) is None:
            named = "a GPU" if device in ANY else device
            return (
                f"It waits for memory of {named}: it needs about {mebibytes(needs.gpu)}, "
                f"{_listed(free.gpus)}."
            )
        if self._holds(member, needs, free):
            return self.shortages.sentence(member.deployment.name, generation.number)
        return None

    def impossible(self, needs: Footprint, device: str) -> str | None:
        """Why a worker can't ever be loaded here, if it can't."""
        if self.limit is not None and needs.host > self.limit:
            return (
                f"It needs about {mebibytes(needs.host)}, more than the {mebibytes(self.limit)} "
                "that models may take here; deploy it with a smaller dtype, or another model."
            )
        if needs.gpu and self.place(needs, device, self._totals()) is None:
            return (
                f"It needs about {mebibytes(needs.gpu)} of GPU memory, more than the GPUs here "
                "have; deploy it with a smaller dtype, on the processor (--device cpu), or "
                "another model."
            )
        return None

    def never(self, member: Member) -> bool:
        """Whether one of its workers needs more than all of them may have together."""
        needs = self.of(member)
        return needs is not None and self.impossible(needs, self.device(member)) is not None

    def fits_beside(self, member: Member) -> bool:
        """Whether a worker of its present generation finds room beside what is there now."""
        needs = self.of(member)
        return needs is None or self._fits(needs, self.device(member), self.free())

    def need(self, member: Member) -> int:
        """Host memory that its next worker needs; 0 as long as nothing is known of it."""
        needs = self.of(member)
        return needs.host if needs is not None else 0

    def without(self, free: Free, gone: Collection[There]) -> Free:
        """What would be free if these had gone."""
        gpus = dict(free.gpus)
        for each in gone:
            devices = self.devices(each)
            for device in devices:
                gpus[device] += each.needs.gpu // len(devices)
        back = sum(each.host for each in gone)
        return Free(None if free.host is None else free.host + back, gpus, free.suspects)

    def _most(self, free: Free) -> Free:
        """What would be free if everything had gone that goes, or may."""
        going = [
            each
            for each in self.there()
            if each.goes or each.member.deployment.schedule.load is Load.ON_DEMAND
        ]
        return self.without(free, going)

    def _fits(self, needs: Footprint, device: str, free: Free) -> bool:
        if free.host is not None and needs.host > free.host:
            return False
        return self.place(needs, device, free.gpus) is not None

    def ran_out(self, member: Member, dossier: Dossier) -> None:
        """A load has ended for want of memory."""
        needs, free = self.of(member), self.free(but=dossier.worker)
        # What it may not have, no change of the machine's memory gives it.
        if needs is None or member.due.request.limits.memory is not None:
            return
        self.shortages.add(
            member.deployment.name,
            dossier.generation,
            needs,
            free,
            fits=self.place(needs, self.device(member), free.gpus) is not None,
            killed_at=dossier.peak_rss if dossier.signal is not None else None,
        )

    def short(self, member: Member) -> bool:
        """Whether its last load ran out of memory."""
        generation = member.due
        return self.shortages.of(member.deployment.name, generation.number) is not None

    def relieved(self, free: Free) -> list[Worker]:
        """Workers that wait for their next try for want of memory, of which there is more now."""
        found = []
        for member in self._members.values():
            name, number = member.deployment.name, member.due.number
            if self.shortages.of(name, number) is None:
                continue
            for worker in member.serving():
                if worker.phase is Phase.BACKOFF and worker.generation == number:
                    needs = self._next(worker)
                    fits = free.host is None or needs.host <= free.host
                    if fits and self.shortages.relieved(name, number, needs, free):
                        found.append(worker)
        return found

    # -- what is there -------------------------------------------------------------

    def there(self) -> Iterator[There]:
        """Every worker that has memory, or is about to have some."""
        for member in self._members.values():
            for key, worker in member.workers.items():
                if worker.phase in _THERE or worker.phase in LOADING:
                    needs = self.needs(worker.order, member.placed.get(key))
                    yield There(member, key, worker, needs)

    def devices(self, there: There) -> list[str]:
        """The GPUs that it has memory of."""
        if not there.needs.gpu:
            return []
        device = there.member.placed.get(there.key) or there.worker.order.device
        if device in ANY and there.worker.loaded is not None:
            device = there.worker.loaded.device
        # What is left to the worker becomes the first.
        names = ["cuda:0"] if device in ANY else device.split(",")
        here = {gpu.device for gpu in self._gpus()}
        return [name for name in names if name in here]

    def place(self, needs: Footprint, device: str, gpus: Mapping[str, int]) -> str | None:
        """Where it would be loaded if so much were free; ``None``: nowhere."""
        return place(Candidate("", needs.host, _alone(needs), device), gpus)

    def is_only(self, device: str) -> bool:
        """Whether there is no GPU but that one."""
        return [gpu.device for gpu in self._gpus()] == [device]

    def is_queued(self, member: Member) -> bool:
        """Whether any of its workers waits for its turn."""
        return any(worker.phase is Phase.QUEUED for worker in member.serving())

    # -- inside --------------------------------------------------------------------

    def _next(self, worker: Worker) -> Footprint:
        """What a worker needs that isn't there yet."""
        needs = self.needs(worker.order)
        least = self.shortages.least(worker.deployment, worker.generation)
        return needs if needs.host >= least else replace(needs, host=least)

    def _is_unread(self, member: Member, number: int) -> bool:
        """Whether its files have still to be looked at."""
        generation = member.generation(number)
        if generation is None or generation.resolution is None:
            return False
        return not self._footprints.known(generation.resolution)

    def _holds(self, member: Member, needs: Footprint, free: Free) -> bool:
        return self.shortages.holds(member.deployment.name, member.due.number, needs, free)

    def _reckons(self, device: str) -> bool:
        """Whether the memory of the GPUs that are asked for is known."""
        here = {gpu.device for gpu in self._gpus()}
        return bool(here) if device in ANY else set(device.split(",")) <= here

    def _totals(self) -> dict[str, int]:
        return {
            gpu.device: max(0, gpu.total - self._settings.reserve_bytes) for gpu in self._gpus()
        }


def _alone(needs: Footprint) -> int:
    """What one GPU would need for what several share."""
    return max(0, needs.gpu - (gpus(needs.device) - 1) * CONTEXT)


def _listed(free: Mapping[str, int]) -> str:
    told = [f"{device} has {mebibytes(size)} free" for device, size in sorted(free.items())]
    return ", ".join(told[:4]) or "there is none"
