"""Crashes as they happen: numbered, noted and stored with their evidence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tursi.fleet.journal import Journal
from tursi.model import Crash, Deployment, Dossier, FailureClass
from tursi.store import Store

CRASHED = "worker.crashed"
"""The kind of the event that a worker ended unasked."""


class Crashes:
    """Numbers them itself, so that an answer can name a crash before it is on the disk.

    That is safe as long as one daemon alone writes to the store, which its lock sees to.
    ``keep`` is how many stay per deployment.
    """

    def __init__(self, store: Store, journal: Journal, keep: int) -> None:
        self._store = store
        self._journal = journal
        self._keep = keep
        self._last = 0

    def keep(self, number: int) -> None:
        """Keep so many from now on."""
        self._keep = number

    async def open(self) -> None:
        """Go on with the numbers of earlier daemons."""
        self._last = await self._store.last_crash()

    def add(self, dossier: Dossier) -> Dossier:
        """Record a crash; the same with its number."""
        self._last += 1
        numbered = replace(dossier, id=self._last)
        self._journal.crash(numbered, self._keep)
        self._journal.note(
            CRASHED,
            f"replica {numbered.replica} ended while {numbered.phase.value} (crash {numbered.id})",
            deployment=numbered.deployment,
            worker=numbered.worker,
            cause=numbered.reason,
        )
        return numbered

    async def lost_contexts(self, deployments: Iterable[Deployment]) -> list[tuple[float, str]]:
        """When a worker lost its GPU context, and on which device; oldest first."""
        found = []
        for deployment in deployments:
            resolution = deployment.generation.resolution
            for crash in await self._store.crashes(deployment.name, self._keep):
                if crash.failure is FailureClass.GPU_CONTEXT:
                    order = (await self._store.crash(deployment.name, crash.id)).order
                    # It says what it took itself only when it is ready.
                    chosen = order.device in {"auto", "cuda"} and resolution is not None
                    device = resolution.device if chosen and resolution else None
                    found.append((crash.at, device or order.device))
        return sorted(found)

    async def newest(self, deployment: str, limit: int) -> list[Crash]:
        """The last ``limit`` crashes, newest first."""
        await self._journal.written()
        return await self._store.crashes(deployment, limit)

    async def one(self, deployment: str, number: int) -> Dossier:
        """A crash with all its evidence; ``CrashNotFound``."""
        await self._journal.written()
        return await self._store.crash(deployment, number)
