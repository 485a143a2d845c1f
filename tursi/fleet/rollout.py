"""New generations: proven, switched to, or given up for what served before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tursi.fleet.journal import Journal
from tursi.fleet.member import Member
from tursi.fleet.smoke import Smoke
from tursi.model import Fate, Generation, Phase, Turn
from tursi.plan import Key
from tursi.store import Store
from tursi.supervision.worker import Worker

ROOM_SECONDS = 15.0
"""How long a generation that is loaded in place waits for the room that was made."""
_GRAVE = frozenset({Phase.FAILED, Phase.QUARANTINED, Phase.WEDGED})
"""Phases at which a generation is given up,"""
_ALONE = _GRAVE | {Phase.BACKOFF}
"""and where nothing else serves: at the first failure."""


class Rollouts:
    """Moves members on from one generation to the next; ``soon`` asks for a convergence.

    ``now`` gives UTC epoch seconds; ``smoke_seconds`` how long a first answer may take.
    """

    def __init__(
        self,
        *,
        store: Store,
        journal: Journal,
        reactor: Any,
        now: Callable[[], float],
        smoke_seconds: Callable[[], float],
        soon: Callable[[], None],
    ) -> None:
        self._store = store
        self._journal = journal
        self._reactor = reactor
        self._now = now
        self._smoke_seconds = smoke_seconds
        self._soon = soon
        self._smokes: dict[tuple[Key, str | None], Smoke] = {}
        self._since: dict[str, float] = {}
        """When the room was made that a generation waits for."""

    def close(self) -> None:
        """Ask nothing any more."""
        smokes, self._smokes = self._smokes, {}
        for smoke in smokes.values():
            smoke.cancel()

    def advance(self, member: Member) -> None:
        """Do what is to be done next about a member's generations."""
        deployment = member.deployment
        if member.leaving:
            return
        if deployment.stable is None:
            self._settle(member)
            return
        if deployment.failed:
            return
        reason = self._failure(member, deployment.stable)
        if reason is not None:
            self.fail(member, reason)
            return
        number = deployment.generation.number
        for key, worker in list(member.workers.items()):
            if key.generation != number or key in member.retiring:
                continue
            if worker.phase is Phase.READY and not member.is_proven(key, worker):
                self._try(member, key, worker)
        if deployment.canary is None and member.fresh >= member.scale and member.awake:
            self._serve(member)

    def displace(self, member: Member) -> None:
        """Load its new generation where the old one is: there is no room beside it."""
        deployment = member.deployment
        number = deployment.generation.number
        member.in_place = number
        name, old = deployment.name, deployment.stable
        who, whom = (
            (f"generation {old.number} of {name} makes room", f"generation {number}")
            if old is not None
            else (f"the workers of {name} make room", "those with the new configuration")
        )
        self._journal.note(
            "rollout.in_place",
            f"{who} for {whom}; requests wait meanwhile",
            deployment=name,
            cause=member.waits,
        )

    # -- inside ----------------------------------------------------------------------

    def _settle(self, member: Member) -> None:
        """Remember that it serves, or can't."""
        generation = member.deployment.generation
        workers = member.of(generation.number)
        if member.in_place is not None and member.fresh >= member.scale:
            # The workers that a reload has called for are there.
            member.in_place = None
        if generation.fate is not Fate.SERVING:
            if any(worker.phase is Phase.READY for worker in workers):
                self._serve(member)
            elif generation.fate is None:
                lost = [worker for worker in workers if worker.phase is Phase.FAILED]
                if lost:
                    self.fail(member, lost[0].status().reason or "no reason is known")

    def _failure(self, member: Member, stable: Generation) -> str | None:
        """Why the generation that is wanted has to be given up, if so."""
        deployment, fetch = member.deployment, member.fetch
        if fetch is not None and fetch.error is not None and fetch.retry_at is None:
            return fetch.error.message
        workers = member.of(deployment.generation.number)
        alone = all(worker.phase is Phase.QUEUED for worker in member.of(stable.number))
        grave = _ALONE if alone and deployment.canary is None else _GRAVE
        for worker in workers:
            if worker.phase in grave:
                return worker.status().reason or f"Its worker is {worker.phase.value}."
        name = deployment.name
        waits = [worker for worker in workers if worker.phase is Phase.QUEUED]
        if not (member.waits and waits):
            self._since.pop(name, None)
            return None
        if member.never:
            return member.waits
        if member.in_place is None or any(
            key.generation != deployment.generation.number for key in member.workers
        ):
            return None
        since = self._since.setdefault(name, self._reactor.seconds())
        if self._reactor.seconds() - since < ROOM_SECONDS:
            return None
        return member.waits

    def _try(self, member: Member, key: Key, worker: Worker) -> None:
        """Send it a first request, unless that is under way."""
        tried = (key, worker.uuid)
        loaded = worker.loaded
        if tried in self._smokes or loaded is None:
            return
        wrong: list[str | None] = []

        def done(what: str | None) -> None:
            wrong.append(what)
            if self._smokes.pop(tried, None) is not None:
                self._tried(member, tried, what)

        smoke = Smoke(
            worker,
            task=loaded.task,
            name=f"{key.deployment}-{key.generation}-{key.replica}",
            seconds=self._smoke_seconds(),
            clock=self._reactor,
            done=done,
        )
        if wrong:
            self._tried(member, tried, wrong[0])
        else:
            self._smokes[tried] = smoke

    def _tried(self, member: Member, tried: tuple[Key, str | None], wrong: str | None) -> None:
        key, uuid = tried
        if wrong is None:
            member.proven.add(tried)
            member.queue.pump()
        elif member.leaving or key in member.retiring:
            # It was not to stay anyhow.
            return
        elif key.generation == member.deployment.generation.number:
            self._journal.note(
                "smoke.failed",
                f"replica {key.replica} of generation {key.generation} is not switched to",
                deployment=key.deployment,
                worker=uuid,
                cause=wrong,
            )
            self.fail(member, wrong)
        self._soon()

    def _serve(self, member: Member) -> None:
        """It serves, and nothing else does any more."""
        deployment, at = member.deployment, self._now()
        name, number = deployment.name, deployment.generation.number
        turned = _turned(deployment.generation, Turn(Fate.SERVING, at))
        member.adopt(replace(deployment, generation=turned, stable=None, canary=None))
        self._over(member)
        self._journal.hold(lambda: self._store.serve(name, number, at=at))
        member.queue.pump()

    def fail(self, member: Member, reason: str) -> None:
        """Give the wanted generation up; what has served before does so again, or still."""
        deployment, at = member.deployment, self._now()
        name, number = deployment.name, deployment.generation.number
        if deployment.canary is not None and deployment.stable is not None:
            after = replace(deployment, generation=deployment.stable, stable=None, canary=None)
            member.drop_fetch()
        else:
            turned = _turned(deployment.generation, Turn(Fate.FAILED, at, reason))
            after = replace(deployment, generation=turned)
        member.adopt(after)
        self._over(member)
        self._journal.hold(lambda: self._store.fail(name, number, reason, at=at))
        member.queue.pump()
        self._soon()

    def _over(self, member: Member) -> None:
        member.in_place = None
        member.proven.clear()
        self._since.pop(member.deployment.name, None)


def _turned(generation: Generation, turn: Turn) -> Generation:
    return replace(generation, turns=(*generation.turns, turn))
