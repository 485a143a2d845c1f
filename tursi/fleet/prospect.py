"""Whether a deployment would find room: what a dry run answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from tursi.admission import Free
from tursi.errors import FetchError, LoadError
from tursi.fleet.footprints import Footprints
from tursi.fleet.member import Member
from tursi.fleet.memory import Memory, There
from tursi.fleet.pulls import Pulls
from tursi.fleet.residence import LOAD_SECONDS, Pool, Residence
from tursi.footprint import least
from tursi.hub import Hub
from tursi.model import (
    Fit,
    Footprint,
    Gpu,
    Host,
    LoadOrder,
    Reference,
    Request,
    Resolution,
    Room,
    Verdict,
    check_replicas,
    deployment_name,
    mebibytes,
)
from tursi.plan import LOAD_SLOTS
from tursi.residency import Waiting

MakeOrder: TypeAlias = Callable[[str, Request, Resolution], LoadOrder]
"""What a worker of the deployment with that name would be told."""


class Prospect:
    """Answers what would become of a load, without beginning one."""

    def __init__(
        self,
        *,
        member: Callable[[str], Member],
        members: Mapping[str, Member],
        memory: Memory,
        residence: Residence,
        footprints: Footprints,
        hub: Hub,
        pulls: Pulls,
        order: MakeOrder,
        gpus: Callable[[], Sequence[Gpu]],
        host: Host,
        clock: Callable[[], float],
    ) -> None:
        self._member = member
        self._members = members
        self._memory = memory
        self._residence = residence
        self._footprints = footprints
        self._hub = hub
        self._pulls = pulls
        self._order = order
        self._gpus = gpus
        self._host = host
        self._clock = clock

    async def fit(
        self,
        name: str | None,
        request: Request,
        replicas: int | None,
        most: int | None = None,
        *,
        beside: bool = False,
    ) -> Fit:
        """Whether ``deploy`` of the same would find room; it changes and downloads nothing.

        Raises what that would raise for what can't be. With ``beside`` it is for a canary,
        so that what serves has to stay.
        """
        checked = request.checked(self._host)
        reference = Reference.parse(checked.model)
        name = deployment_name(reference.short_name if name is None else name)
        member = self._members.get(name)
        if replicas is None:
            replicas = member.deployment.replicas if member else 1
        check_replicas(replicas, most)
        same = member is not None and member.deployment.generation.request == checked
        try:
            resolution = await self._on_disk(reference, checked, member if same else None)
            coming = None if resolution else await self._on_hub(reference, checked)
        except (LoadError, FetchError) as error:
            return self._unknown(replicas, f"How large it is isn't known. {error.message}")
        if resolution is not None:
            await self._footprints.look(resolution)
        elif coming is not None:
            self._footprints.expect(resolution := coming)
        else:
            return self._unknown(replicas, "How large it is isn't known yet.")
        order = self._order(name, checked, resolution)
        found = _within(self.of(order, replicas, member, same=same), checked.limits.memory)
        if beside and found.verdict is Verdict.IN_PLACE:
            message = (
                f"There is no room for a canary beside what {name} serves: "
                "it would wait for memory. Without --canary it would take the other's place."
            )
            return replace(found, verdict=Verdict.WAITS, message=message, evicts=())
        return found

    async def memory(self, name: str) -> Fit:
        """What each of its workers needs of memory, and what there is."""
        deployment = self._member(name).deployment
        return await self.fit(name, deployment.generation.request, deployment.replicas)

    def of(self, order: LoadOrder, replicas: int, member: Member | None, *, same: bool) -> Fit:
        """Whether so many workers that are told this find room.

        ``member`` is the deployment as it is, if there is one; ``same`` says that its
        present generation is what is asked for.
        """
        needs, free = self._memory.needs(order), self._memory.free()
        name = member.deployment.name if member else None
        mine = [each for each in self._memory.there() if each.member is member]
        number = member.deployment.generation.number if member else 0
        newest = (number, member.revision if member else 0)
        there = [
            each for each in mine if same and (each.key.generation, each.key.revision) == newest
        ]
        old = [each for each in mine if each not in there and not each.goes]
        missing = max(0, replicas - len(there))
        gives_back = sum(each.host for each in old)
        verdict, said, evicts = self._verdict(order, needs, free, replicas, missing, name, old)
        figures = f"{replicas} x about {mebibytes(needs.host)}"
        if needs.gpu:
            figures += f", and {mebibytes(needs.gpu)} of GPU memory"
        elif needs.device.startswith("cuda"):
            figures += ", and nobody knows of GPU memory here"
        if free.host is not None:
            figures += f", {self._memory.told(free)}"
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
            self._rooms(free, free.machine),
        )

    def rooms(self) -> tuple[Room, ...]:
        """Memory of the host and of each GPU."""
        free = self._memory.free()
        return self._rooms(free, free.host)

    def _rooms(self, free: Free, host: int | None) -> tuple[Room, ...]:
        return (
            Room("host", self._host.memory, host),
            *(
                Room(gpu.device, gpu.total, free.gpus.get(gpu.device), gpu.name)
                for gpu in self._gpus()
            ),
        )

    async def _on_disk(
        self, reference: Reference, request: Request, member: Member | None
    ) -> Resolution | None:
        """The model's files, if they are here."""
        if member is not None and not member.lost:
            known = member.deployment.generation.resolution
            if known is not None:
                return known
        if reference.folder is not None:
            return await self._hub.resolve(reference, lambda _: None, request.trust)
        entries = [
            entry
            for entry in await self._hub.catalogue()
            if entry.name == reference.repository and reference.revision in {None, entry.commit}
        ]
        if not entries:
            return None
        entry = max(entries, key=lambda entry: entry.used_at or 0.0)
        return Resolution(folder=entry.folder, commit=entry.commit, size=entry.size)

    async def _on_hub(self, reference: Reference, request: Request) -> Resolution | None:
        """Its size by what the hub lists; ``None`` while that is asked for by a download."""
        name = str(reference)
        told = [
            member.fetch.progress
            for member in self._members.values()
            if member.fetch is not None and member.deployment.generation.request.model == name
        ]
        told += self._pulls.progress(name)
        totals = [each.total for each in told if each is not None and each.unit == "bytes"]
        if not told:
            return await self._hub.look(reference, request.trust)
        size = next((int(total) for total in totals if total), None)
        return None if size is None else Resolution(folder=f"hub:{name}", size=size)

    def _unknown(self, replicas: int, message: str) -> Fit:
        free = self._memory.free()
        return Fit(
            Verdict.UNKNOWN,
            f"{message.rstrip('.')}; {self._memory.told(free)}.",
            replicas=replicas,
            free=free.host,
            limit=self._memory.limit,
            rooms=self._rooms(free, free.machine),
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
            within = f"within the {mebibytes(limit)} that models may take here"
            return Verdict.NEVER, f"It can't fit {within}: {{figures}}.", ()
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


def _within(found: Fit, own: int | None) -> Fit:
    """The same for workers that may have no more than ``own`` bytes of the host each."""
    if own is None or found.footprint is None or found.footprint.host <= own:
        return found
    limit = f"each of its workers may have {mebibytes(own)}"
    if own < least(found.footprint):
        sentence = f"It can't fit: {found.replicas} x about {mebibytes(found.footprint.host)}, and"
        return replace(found, verdict=Verdict.NEVER, message=f"{sentence} {limit}.", evicts=())
    return replace(
        found, message=f"{found.message} But {limit}, and is ended if it needs more than that."
    )


def _together(needs: Footprint, count: int) -> int:
    """Host memory of so many, of which few load at a time."""
    loading = min(count, LOAD_SLOTS)
    return needs.host * loading + needs.host_settled * (count - loading)


def _and(names: Sequence[str]) -> str:
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]
