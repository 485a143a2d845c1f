"""Who stays in memory: what nobody uses goes, and what costs least makes room for others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from tursi.admission import ANY, Free
from tursi.fleet.member import Member
from tursi.fleet.memory import Memory, There
from tursi.fleet.words import duration
from tursi.model import Load, Phase, mebibytes
from tursi.plan import LOADING
from tursi.residency import Decision, Resident, Waiting, decide, next_change, order, room_in

_SERVES = frozenset({Phase.READY, Phase.SUSPECT})
LOAD_SECONDS = 10.0
"""Of a model that has never been loaded."""


class Pool(NamedTuple):
    """Memory that models wait for: the host's, or a GPU's."""

    waiting: list[Waiting]
    residents: list[Resident]
    room: int
    """What is free, or will be when those have gone that are going."""


class Residence:
    """Decides by what ``memory`` knows; ``clock`` gives monotonic seconds."""

    def __init__(
        self, members: Mapping[str, Member], memory: Memory, clock: Callable[[], float]
    ) -> None:
        self._members = members
        self._memory = memory
        self._clock = clock
        self.first: str | None = None
        """The deployment that others make room for just now."""
        self.paused: frozenset[str] = frozenset()
        """Those that take no new requests, so that they can go for who has waited too long."""

    def idle(self) -> list[tuple[Member, str]]:
        """What is loaded on demand and has not been used for long enough, with the reason."""
        now, found = self._clock(), []
        for member in self._awake():
            deadline = self.deadline(member)
            if deadline is not None and deadline <= now and not member.busy:
                seconds = self._keep_alive(member)
                said = f"nobody has used it for {seconds:g} s" if seconds else "nobody uses it"
                found.append((member, said))
        return found

    def deadline(self, member: Member) -> float | None:
        """When it will be unloaded if it isn't used, on the monotonic clock."""
        seconds = self._keep_alive(member)
        if member.deployment.schedule.load is not Load.ON_DEMAND or not member.awake or seconds < 0:
            return None
        if member.changing:
            # What is new is loaded once, used or not.
            return None
        # What has failed takes no memory, and coming back it would forget its failures.
        if member.loaded_at is None or not any(
            worker.phase in _SERVES for worker in member.workers.values()
        ):
            return None
        return max(member.used_at, member.loaded_at) + seconds

    def evictions(self, free: Free) -> list[tuple[Member, str]]:
        """What makes room for a model that is waited for; and why."""
        self.first = None
        found: dict[str, str] = {}
        paused: set[str] = set()
        for device, pool in self._pools(free).items():
            chosen = self.decide(pool)
            paused.update(chosen.pause)
            if chosen.load is None:
                continue
            self.first = self.first or chosen.load
            size = next(each.size for each in pool.waiting if each.name == chosen.load)
            of = "memory" if device == "" else f"memory of {device}"
            caller = self._members[chosen.load].queue.caller
            asked = "" if caller is None else f", which {caller} has asked for,"
            need = f"{chosen.load}{asked} needs about {mebibytes(size)} of {of}"
            for name in chosen.evict:
                found.setdefault(name, f"{need}; {self._worth(self._members[name])}")
        self.paused = frozenset(paused)
        return [(self._members[name], reason) for name, reason in found.items()]

    def decide(self, pool: Pool) -> Decision:
        """Who is loaded next of those that wait for it, and who goes for that."""
        return decide(
            pool.waiting,
            pool.residents,
            room=pool.room,
            now=self._clock(),
            rules=self._memory.rules,
        )

    def next_look(self, free: Free) -> float | None:
        """Seconds until time alone may change anything; ``None`` if it can't."""
        now = self._clock()
        ahead = [
            max(deadline - now, 0.0)
            for member in self._awake()
            if not member.busy and (deadline := self.deadline(member)) is not None
        ]
        for pool in self._pools(free).values():
            turn = next_change(pool.waiting, pool.residents, now, self._memory.rules)
            if turn is not None:
                ahead.append(turn)
            if pool.waiting:
                # What others on this machine do with its memory tells nobody.
                ahead.append(1.0)
        if any(member.waits or self._memory.short(member) for member in self._members.values()):
            ahead.append(1.0)
        return min(ahead, default=None)

    def turn(self, member: Member) -> tuple[float, list[str]] | None:
        """Seconds until it may have room, and what goes before it; ``None`` if nobody knows."""
        now, name = self._clock(), member.deployment.name
        for pool in self._pools(self._memory.free()).values():
            waiting = order(pool.waiting, now, self._memory.rules)
            names = [each.name for each in waiting]
            if name not in names:
                continue
            place = names.index(name)
            seconds = room_in(
                waiting[place], pool.residents, room=pool.room, now=now, rules=self._memory.rules
            )
            return None if seconds is None else (seconds, names[:place])
        return 0.0, []

    def staying(self, member: Member) -> list[str]:
        """What has the memory that it waits for and can't go, each in a clause that says why."""
        if member.waits is None:
            return []
        found = {}
        for there in self._memory.there():
            other = there.member
            why = _keeps(other) or ("has requests" if other.occupied else None)
            if why is not None and other is not member and not there.goes:
                found[other.deployment.name] = f"{other.deployment.name} {why}"
        return [found[name] for name in sorted(found)]

    def host(self, room: int, but: str | None = None) -> Pool:
        """The host's memory, ``but`` for a deployment that isn't to make room."""
        return self._pool(room, lambda there: there.host, but)

    def gpu(self, device: str, room: int, but: str | None = None) -> Pool:
        """A GPU's."""

        def size(there: There) -> int:
            devices = self._memory.devices(there)
            return there.needs.gpu // len(devices) if device in devices else 0

        return self._pool(room, size, but)

    # -- inside --------------------------------------------------------------------

    def _pools(self, free: Free) -> dict[str, Pool]:
        """What is short, by GPU; the host's memory has no name."""
        if free.host is None and not free.gpus:
            return {}
        pools: dict[str, Pool] = {}
        for member in self._members.values():
            if not (member.waited_for and self._memory.is_queued(member)):
                continue
            needs = self._memory.of(member)
            if needs is None:
                continue
            if free.host is not None and needs.host > free.host:
                if "" not in pools:
                    pools[""] = self.host(free.host)
                pools[""].waiting.append(self._waits(member, needs.host))
            device = self._memory.device(member)
            if needs.gpu and self._memory.place(needs, device, free.gpus) is None:
                for name in self._hoped_for(device, free):
                    if name not in pools:
                        pools[name] = self.gpu(name, free.gpus[name])
                    pools[name].waiting.append(self._waits(member, needs.gpu))
        return pools

    def _hoped_for(self, device: str, free: Free) -> list[str]:
        """The GPU where most can be made free for it, or those that it must have."""
        if device not in ANY:
            return [name for name in device.split(",") if name in free.gpus]

        def possible(name: str) -> int:
            pool = self.gpu(name, free.gpus[name])
            going = (each for each in pool.residents if not (each.held or each.busy))
            return pool.room + sum(each.size for each in going)

        return [max(free.gpus, key=possible)] if free.gpus else []

    def _worth(self, member: Member) -> str:
        """Why it is one that goes, in a clause."""
        idle = self._clock() - max(member.used_at, member.loaded_at or 0.0)
        used = (
            "it is in use" if member.queue.waiting else f"nobody has used it for {duration(idle)}"
        )
        if member.load_seconds is None:
            return used
        return f"{used}, and it loads in about {duration(max(member.load_seconds, 1.0))}"

    def _waits(self, member: Member, size: int) -> Waiting:
        since = member.woken_at if member.woken_at is not None else self._clock()
        return Waiting(
            member.deployment.name,
            size,
            member.queue.oldest or since,
            max(1, member.queue.waiting),
            member.load_seconds or LOAD_SECONDS,
        )

    def _pool(self, room: int, size: Callable[[There], int], but: str | None) -> Pool:
        now = self._clock()
        sizes: dict[str, int] = {}
        for there in self._memory.there():
            if there.goes:
                room += size(there)
            elif there.member.deployment.name != but:
                name = there.member.deployment.name
                sizes[name] = sizes.get(name, 0) + size(there)
        residents = [
            Resident(
                name,
                taken,
                member.loaded_at if member.loaded_at is not None else now,
                member.uses.value(now),
                member.load_seconds or LOAD_SECONDS,
                held=_held(member),
                busy=member.occupied,
            )
            for name, taken in sizes.items()
            if taken and (member := self._members[name])
        ]
        return Pool([], residents, room)

    def _keep_alive(self, member: Member) -> float:
        return member.stays(self._memory.keep_alive)

    def _awake(self) -> Iterable[Member]:
        return [member for member in self._members.values() if member.awake and not member.leaving]


def _held(member: Member) -> bool:
    return not member.awake or _keeps(member) is not None


def _keeps(member: Member) -> str | None:
    """Why it makes no room for others, used or not, in a clause."""
    load = member.deployment.schedule.load
    if load is not Load.ON_DEMAND:
        return "is there always" if load is Load.ALWAYS else "is there until it is unloaded"
    if member.pinned:
        return "is pinned"
    if any(worker.phase in LOADING for worker in member.workers.values()):
        return "is being loaded"
    return None
