"""Whether a deployment would find room: what a dry run answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tursi.admission import Free
from tursi.fleet.member import Member
from tursi.fleet.memory import Memory, There
from tursi.fleet.residence import LOAD_SECONDS, Pool, Residence
from tursi.model import Fit, Footprint, Gpu, LoadOrder, Room, Verdict, mebibytes
from tursi.plan import LOAD_SLOTS
from tursi.residency import Waiting


class Prospect:
    """Answers what would become of a load, without beginning one."""

    def __init__(
        self,
        *,
        memory: Memory,
        residence: Residence,
        gpus: Callable[[], Sequence[Gpu]],
        total: int | None,
        clock: Callable[[], float],
    ) -> None:
        self._memory = memory
        self._residence = residence
        self._gpus = gpus
        self._total = total
        self._clock = clock

    def of(self, order: LoadOrder, replicas: int, member: Member | None, *, same: bool) -> Fit:
        """Whether so many workers that are told this find room.

        ``member`` is the deployment as it is, if there is one; ``same`` says that its
        present generation is what is asked for.
        """
        needs, free = self._memory.needs(order), self._memory.free()
        name = member.deployment.name if member else None
        mine = [each for each in self._memory.there() if each.member is member]
        number = member.deployment.generation.number if member else 0
        there = [each for each in mine if same and each.key.generation == number]
        old = [each for each in mine if each not in there and not each.goes]
        missing = max(0, replicas - len(there))
        gives_back = sum(each.host for each in old)
        verdict, said, evicts = self._verdict(order, needs, free, replicas, missing, name, old)
        figures = f"{replicas} x about {mebibytes(needs.host)}"
        if needs.gpu:
            figures += f", and {mebibytes(needs.gpu)} of GPU memory"
        if free.host is not None:
            figures += f", {mebibytes(free.host)} are free"
        if needs.gpu and free.gpus:
            told = (f"{mebibytes(size)} on {device}" for device, size in free.gpus.items())
            figures += f" and {', '.join(told)}"
        return Fit(
            verdict,
            said.format(figures=figures),
            needs.host,
            needs.measured,
            replicas,
            free.host,
            self._memory.limit,
            evicts,
            gives_back,
            needs,
            self.rooms(free),
        )

    def rooms(self, free: Free) -> tuple[Room, ...]:
        """What the host and each GPU have."""
        return (
            Room("host", self._total, free.host),
            *(
                Room(gpu.device, gpu.total, free.gpus.get(gpu.device), gpu.name)
                for gpu in self._gpus()
            ),
        )

    def _verdict(
        self,
        order: LoadOrder,
        needs: Footprint,
        free: Free,
        replicas: int,
        missing: int,
        name: str | None,
        old: Sequence[There],
    ) -> tuple[Verdict, str, tuple[str, ...]]:
        total = _together(needs, missing)
        if not missing:
            return Verdict.FITS, "It is in memory: {figures}.", ()
        limit = self._memory.limit
        if limit is not None and _together(needs, replicas) > limit:
            sentence = f"models may take {mebibytes(limit)} here"
            return Verdict.NEVER, f"It can't fit: {{figures}}, and {sentence}.", ()
        never = self._memory.impossible(needs, order.device)
        if never is not None:
            return Verdict.NEVER, f"It can't fit: {{figures}}. {never}", ()
        evicts = self._evicts(order, needs, free, total, missing, name)
        if evicts == ():
            return Verdict.FITS, "It fits: {figures}.", ()
        if evicts:
            gone = _and(evicts)
            return Verdict.EVICTS, f"It fits if {gone} is unloaded: {{figures}}.", evicts
        if old:
            back = mebibytes(sum(each.host for each in old))
            without = self._memory.without(free, old)
            evicts = self._evicts(order, needs, without, total, missing, name)
            if evicts is not None:
                also = f" and {_and(evicts)} is unloaded" if evicts else ""
                sentence = (
                    f"It fits only in the place of what {name} serves now, which goes first and "
                    f"gives back {back}{also}: requests wait until it is loaded, and if it can't "
                    "be, what was before is loaded again. {figures}."
                )
                return Verdict.IN_PLACE, sentence, evicts
        return Verdict.WAITS, "It would wait for memory: {figures}, and what is loaded stays.", ()

    def _evicts(
        self,
        order: LoadOrder,
        needs: Footprint,
        free: Free,
        total: int,
        count: int,
        name: str | None,
    ) -> tuple[str, ...] | None:
        """Who would have to go; ``None`` if nothing allowed makes enough room."""
        going: dict[str, None] = {}
        if free.host is not None and total > free.host:
            chosen = self._asks(self._residence.host(free.host, name), total)
            if chosen is None:
                return None
            going.update(dict.fromkeys(chosen))
        gpus, slots = dict(free.gpus), count if needs.gpu else 0
        for _ in range(slots):
            device = self._memory.place(needs, order.device, gpus)
            if device is None:
                found = self._on_gpu(needs, order.device, gpus, name)
                if found is None:
                    return None
                device, chosen = found
                going.update(dict.fromkeys(chosen))
            names = [each for each in device.split(",") if each in gpus]
            for each in names:
                gpus[each] = max(0, gpus[each] - needs.gpu // len(names))
        return tuple(going)

    def _on_gpu(
        self, needs: Footprint, device: str, gpus: Mapping[str, int], name: str | None
    ) -> tuple[str, tuple[str, ...]] | None:
        """A GPU, and who would have to leave it."""
        named = device.split(",")
        for each, room in sorted(gpus.items(), key=lambda item: -item[1]):
            if device in {"auto", "cuda"} or [each] == named:
                chosen = self._asks(self._residence.gpu(each, room, name), needs.gpu)
                if chosen is not None:
                    return each, chosen
        return None

    def _asks(self, pool: Pool, size: int) -> tuple[str, ...] | None:
        # As for somebody who has waited long enough.
        since = self._clock() - self._memory.rules.max_wait
        pool.waiting.append(Waiting("", size, since, 1, LOAD_SECONDS))
        chosen = self._residence.decide(pool)
        return None if chosen.load is None else chosen.evict


def _together(needs: Footprint, count: int) -> int:
    """Host memory of so many, of which few load at a time."""
    loading = min(count, LOAD_SLOTS)
    return needs.host * loading + needs.host_settled * (count - loading)


def _and(names: Sequence[str]) -> str:
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]
