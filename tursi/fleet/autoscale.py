"""Replicas between a least and a most number, by how long requests wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from twisted.logger import Logger

from tursi.fleet.journal import Journal
from tursi.fleet.member import Member
from tursi.fleet.memory import Memory
from tursi.model import Desired, Host, Phase, mebibytes
from tursi.scaling import Rules, Scaler

log = Logger()

TICK_SECONDS = 1.0


class Autoscale:
    """Watches the waiting of each deployment that has a range; ``clock`` is monotonic.

    ``soon`` asks for a convergence.
    """

    def __init__(
        self,
        *,
        members: Mapping[str, Member],
        memory: Memory,
        journal: Journal,
        host: Host,
        target: float,
        clock: Callable[[], float],
        soon: Callable[[], None],
    ) -> None:
        self._members = members
        self._memory = memory
        self._journal = journal
        self._host = host
        self._rules = Rules(target)
        self._clock = clock
        self._soon = soon
        self._scalers: dict[str, Scaler] = {}
        self._waits: dict[str, list[float]] = {}
        """Of the requests that have ended since the last tick."""

    def configure(self, target: float) -> None:
        """Go by that target from now on."""
        self._rules = replace(self._rules, target=target)
        for scaler in self._scalers.values():
            scaler.rules = self._rules

    def count(self, deployment: str, waited: float) -> None:
        """A request of it has waited so long until a worker was at it."""
        if deployment in self._scalers:
            self._waits.setdefault(deployment, []).append(waited)

    def tick(self) -> None:
        """Look at all of them; once a second or so."""
        waits, self._waits = self._waits, {}
        for name, member in [*self._members.items()]:
            if member.deployment.max_replicas is not None:
                scaler = self._scalers.get(name)
                if scaler is None:
                    scaler = self._scalers[name] = Scaler(self._rules)
                # One deployment's defect must not end this for all.
                with log.failuresHandled("the replicas of {name} stay", name=name):
                    self._look(member, scaler, waits.get(name, []))
        for name in [*self._scalers]:
            found = self._members.get(name)
            if found is None or found.deployment.max_replicas is None:
                del self._scalers[name]

    def _look(self, member: Member, scaler: Scaler, waits: list[float]) -> None:
        deployment, now = member.deployment, self._clock()
        if member.leaving or not member.awake or deployment.desired is Desired.STOPPED:
            member.scale = deployment.replicas
            return
        if deployment.stable is not None and deployment.canary is None and not deployment.failed:
            # Until the new generation has taken over, the waiting tells nothing of it.
            if member.waits is not None and member.scale > deployment.replicas:
                self._scale(member, member.scale - 1, member.waits)
            return
        oldest = member.queue.oldest
        waited = max(
            sum(waits) / len(waits) if waits else 0.0, now - oldest if oldest is not None else 0.0
        )
        serving = member.of(deployment.served.generation.number)
        ready = [worker for worker in serving if worker.phase is Phase.READY]
        most = deployment.max_replicas or deployment.replicas
        if len(ready) < member.scale > deployment.replicas and member.waits is not None:
            # There was room when it was asked for.
            scaler.hold(now)
            self._scale(member, member.scale - 1, member.waits)
            return
        wanted = scaler.decide(
            now,
            waited=waited,
            replicas=member.scale,
            ready=len(ready),
            least=deployment.replicas,
            most=most,
        )
        if wanted > member.scale:
            hindrance = self._hindrance(member, wanted)
            if hindrance is not None:
                self._hold(member, scaler, hindrance)
                return
        if wanted > member.scale:
            self._scale(member, wanted, f"requests waited {waited:.2g} s")
        elif wanted < member.scale:
            self._scale(member, wanted, "requests have not waited for a while")

    def _scale(self, member: Member, wanted: int, why: str) -> None:
        deployment = member.deployment
        self._journal.note(
            "autoscale",
            f"{deployment.name} goes from {member.scale} to {wanted} of "
            f"{deployment.replicas}-{deployment.max_replicas} replicas",
            deployment=deployment.name,
            cause=why,
        )
        member.scale = wanted
        self._soon()

    def _hindrance(self, member: Member, wanted: int) -> str | None:
        """Why there can't be so many, or ``None``."""
        need, free = self._memory.need(member), self._memory.free()
        # A canary's generations have as many each.
        more = need * (2 if member.deployment.canary is not None else 1)
        if free.host is not None and more > free.host:
            return (
                f"another replica needs about {mebibytes(more)} of memory, "
                f"{self._memory.told(free)}"
            )
        if not self._memory.fits_beside(member):
            return "another replica finds no room on the GPUs"
        workers = member.of(member.deployment.served.generation.number)
        threads = max((worker.threads for worker in workers), default=1)
        on_cpu = any(worker.loaded and worker.loaded.device == "cpu" for worker in workers)
        cores = self._host.cores
        if on_cpu and cores is not None and wanted * threads > cores:
            return f"{wanted} replicas with {threads} threads each have more than {cores:g} cores"
        return None

    def _hold(self, member: Member, scaler: Scaler, why: str) -> None:
        scaler.hold(self._clock())
        name = member.deployment.name
        self._journal.note(
            "autoscale.held",
            f"{name} stays at {member.scale} replicas, although requests wait",
            deployment=name,
            cause=why,
        )
