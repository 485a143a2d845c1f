"""The memory of this machine: what models need of it, who may load, and who makes room."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from tursi import config
from tursi.fleet.member import Member
from tursi.model import Fit, Host, Load, Phase, Room, Verdict, mebibytes
from tursi.residency import Resident, Rules, Waiting, decide, next_change, order, room_in
from tursi.supervision.worker import Worker

_OVERHEAD = 400 * 1024 * 1024
"""Python, torch and transformers, before any model."""
_ACTIVATIONS = 1.2
_CONVERSION = 1.75
"""Times the files' size: while a load changes the dtype, old and new weights are there."""
_THERE = frozenset({Phase.READY, Phase.SUSPECT, Phase.DRAINING, Phase.STOPPING, Phase.KILLING})
_SERVES = frozenset({Phase.READY, Phase.SUSPECT})
_LOADING = frozenset({Phase.SPAWNING, Phase.LOADING, Phase.WARMING})
LOAD_SECONDS = 10.0
"""Of a model that has never been loaded."""


class Memory:
    """Reckons with memory in bytes; ``clock`` gives monotonic seconds.

    ``available`` tells what the machine has free just now, ``None`` where that can't
    be known.
    """

    def __init__(
        self,
        *,
        members: Mapping[str, Member],
        settings: config.Memory,
        host: Host,
        available: Callable[[], int | None],
        clock: Callable[[], float],
    ) -> None:
        self._members = members
        self._host = host
        self._available = available
        self._clock = clock
        self.configure(settings)

    def configure(self, settings: config.Memory) -> None:
        """Go by these from now on."""
        self._settings = settings
        self._limit = settings.limit_bytes or self._host.memory
        self._rules = Rules(settings.max_wait_seconds, settings.min_residency_seconds)

    def need(self, member: Member) -> int:
        """What one of its workers needs: as measured before, or else by the files' size."""
        generation = member.deployment.generation
        size = generation.resolution.size if generation.resolution else None
        return reckon(size or 0, generation.request.dtype, member.peak)

    def rooms(self) -> list[Room]:
        """What the host has."""
        return [Room("host", self._limit, self.room())]

    def fit(self, size: int, dtype: str, peak: int | None, replicas: int) -> Fit:
        """Whether so many workers of a model would find room."""
        need = reckon(size, dtype, peak)
        room, total = self.room(), need * replicas
        free = "" if room is None else f", {mebibytes(room)} are free"
        said = f"{replicas} x about {mebibytes(need)}{free}"
        verdict = Verdict.FITS
        evicts: tuple[str, ...] = ()
        if self._limit is not None and total > self._limit:
            verdict = Verdict.NEVER
            message = f"It can't fit: {said}, and models may take {mebibytes(self._limit)} here."
        elif room is None or total <= room:
            message = f"It fits: {said}."
        else:
            # As for somebody who has waited long enough.
            asking = Waiting("", total, self._clock() - self._rules.max_wait, 1, LOAD_SECONDS)
            chosen = decide(
                [asking], self._residents(), room=room, now=self._clock(), rules=self._rules
            )
            if chosen.load is None:
                verdict = Verdict.WAITS
                message = f"It would wait for memory: {said}, and what is loaded stays."
            else:
                verdict, evicts = Verdict.EVICTS, chosen.evict
                message = f"It fits if {', '.join(evicts)} is unloaded: {said}."
        return Fit(verdict, message, need, peak is not None, replicas, room, self._limit, evicts)

    def room(self) -> int | None:
        """What loads may still take; ``None`` if nothing is known of this machine's memory."""
        free: list[int] = []
        if self._limit is not None:
            free.append(self._limit - sum(self.need(member) for member, _ in self._workers()))
        available = self._available()
        if available is not None:
            # What is loading has not taken all of it yet.
            coming = sum(
                max(0, self.need(member) - (worker.status().rss or 0))
                for member, worker in self._workers()
                if worker.phase in _LOADING
            )
            free.append(available - self._settings.reserve_bytes - coming)
        return max(0, min(free)) if free else None

    def explain(self, member: Member, room: int | None) -> str | None:
        """Why a worker that is queued isn't loaded, if memory is the reason."""
        need = self.need(member)
        if room is None or need <= room:
            return None
        if self._limit is not None and need > self._limit:
            return (
                f"It needs about {mebibytes(need)}, more than the {mebibytes(self._limit)} that "
                "models may take here; deploy it with a smaller dtype, or another model."
            )
        return f"It waits for memory: it needs about {mebibytes(need)}, {mebibytes(room)} are free."

    def never(self, member: Member) -> bool:
        """Whether one of its workers needs more than all of them may have together."""
        return self._limit is not None and self.need(member) > self._limit

    def takes_turns(self, member: Member, room: int | None) -> bool:
        """Whether its new generation finds room only once the workers of the old one are gone."""
        need, number = self.need(member), member.deployment.generation.number
        if room is None or need <= room:
            return False
        old = [each for each in member.workers.values() if each.generation != number]
        return need <= room + sum(need for each in old if _there(each))

    def in_turn(self, fit: Fit, member: Member) -> Fit:
        """The same, unless it is the member's own workers that take the room."""
        name = member.deployment.name
        held = fit.verdict is Verdict.WAITS or name in fit.evicts
        own = self.need(member) * sum(_there(each) for each in member.workers.values())
        needed = (fit.memory or 0) * fit.replicas
        if not held or fit.free is None or needed > fit.free + own:
            return fit
        message = (
            f"It fits only in the place of what {name} serves now, which goes first: requests "
            f"wait until it is loaded, and if it can't be, what was before is loaded again. "
            f"{fit.replicas} x about {mebibytes(fit.memory or 0)}, {mebibytes(fit.free)} are free."
        )
        return replace(fit, verdict=Verdict.IN_PLACE, message=message, evicts=())

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
        # What has failed takes no memory, and coming back it would forget its failures.
        if member.loaded_at is None or not any(
            worker.phase in _SERVES for worker in member.workers.values()
        ):
            return None
        return max(member.used_at, member.loaded_at) + seconds

    def evictions(self, room: int | None) -> list[tuple[Member, str]]:
        """What makes room, of which there is ``room``, for a model that is waited for; and why."""
        if room is None:
            return []
        waiting = self._waiting(room)
        chosen = decide(waiting, self._residents(), room=room, now=self._clock(), rules=self._rules)
        if chosen.load is None:
            return []
        need = self.need(self._members[chosen.load])
        reason = f"{chosen.load} needs about {mebibytes(need)} of memory"
        return [(self._members[name], reason) for name in chosen.evict]

    def next_look(self) -> float | None:
        """Seconds until time alone may change anything; ``None`` if it can't."""
        now = self._clock()
        ahead = [
            max(deadline - now, 0.0)
            for member in self._awake()
            if not member.busy and (deadline := self.deadline(member)) is not None
        ]
        room = self.room()
        if room is not None:
            waiting = self._waiting(room)
            turn = next_change(waiting, self._residents(), now, self._rules)
            if turn is not None:
                ahead.append(turn)
            if waiting:
                # What others on this machine do with its memory tells nobody.
                ahead.append(1.0)
        return min(ahead, default=None)

    def turn(self, member: Member) -> tuple[float, list[str]] | None:
        """Seconds until it may have room, and what goes before it; ``None`` if nobody knows."""
        room = self.room()
        if room is None:
            return 0.0, []
        waiting = order(self._waiting(room), self._clock(), self._rules)
        names = [each.name for each in waiting]
        if member.deployment.name not in names:
            return 0.0, []
        place = names.index(member.deployment.name)
        seconds = room_in(
            waiting[place], self._residents(), room=room, now=self._clock(), rules=self._rules
        )
        return None if seconds is None else (seconds, names[:place])

    # -- inside --------------------------------------------------------------------

    def _waiting(self, room: int) -> list[Waiting]:
        """Members whose workers wait for nothing but memory."""
        return [
            Waiting(
                member.deployment.name,
                self.need(member),
                member.queue.oldest or self._since(member),
                max(1, member.queue.waiting),
                member.load_seconds or LOAD_SECONDS,
            )
            for member in self._members.values()
            if member.waited_for
            and self.need(member) > room
            and any(worker.phase is Phase.QUEUED for worker in member.serving())
        ]

    def _residents(self) -> list[Resident]:
        now = self._clock()
        return [
            Resident(
                member.deployment.name,
                self.need(member) * len(workers),
                member.loaded_at if member.loaded_at is not None else now,
                member.uses.value(now),
                member.load_seconds or LOAD_SECONDS,
                held=self._held(member, workers),
            )
            for member in self._members.values()
            if (workers := [worker for worker in member.workers.values() if _there(worker)])
        ]

    def _held(self, member: Member, workers: Collection[Worker]) -> bool:
        return (
            member.deployment.schedule.load is not Load.ON_DEMAND
            or not member.awake
            or member.busy
            or member.pinned
            # It isn't what makes room for its own next generation.
            or any(worker.phase is Phase.QUEUED for worker in member.serving())
            or any(worker.phase in _LOADING for worker in workers)
        )

    def _since(self, member: Member) -> float:
        return member.woken_at if member.woken_at is not None else self._clock()

    def _keep_alive(self, member: Member) -> float:
        return member.stays(self._settings.keep_alive_seconds)

    def _awake(self) -> Iterable[Member]:
        return [member for member in self._members.values() if member.awake and not member.leaving]

    def _workers(self) -> Iterable[tuple[Member, Worker]]:
        return [
            (member, worker)
            for member in self._members.values()
            for worker in member.workers.values()
            if _there(worker)
        ]


def reckon(size: int, dtype: str, peak: int | None) -> int:
    """Bytes that a worker needs for a model of ``size`` bytes; ``peak`` is what one has needed."""
    if peak is not None:
        return max(peak, size)
    factor = _ACTIVATIONS if dtype == "auto" else _CONVERSION
    return _OVERHEAD + int(size * factor)


def _there(worker: Worker) -> bool:
    return worker.phase in _THERE or worker.phase in _LOADING


def available() -> int | None:
    """``MemAvailable`` of this machine in bytes: what can be taken without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
