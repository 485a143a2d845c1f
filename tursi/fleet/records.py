"""What is kept of the past: generations, events, crashes, logs, statistics and the audit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tursi.config import Workers
from tursi.fleet.crashes import Crashes
from tursi.fleet.devices import Devices
from tursi.fleet.governor import Governor
from tursi.fleet.journal import Journal
from tursi.fleet.ledger import Ledger
from tursi.fleet.logs import Logs
from tursi.fleet.member import Member
from tursi.fleet.residence import Residence
from tursi.fleet.story import tell
from tursi.model import (
    AuditEntry,
    AuditQuery,
    Crash,
    DatabaseReport,
    Dossier,
    Event,
    Generation,
    StorageStatus,
    Story,
    WorkerLife,
)
from tursi.plan import LOADING
from tursi.rollup import Rollup, StatisticsQuery, Summary
from tursi.store import Store
from tursi.supervision.logs import LifeLog

TOLD_EVENTS = 200
TOLD_CRASHES = 20
"""What a story is made of."""


class Records:
    """Answers what has happened and who did it; ``now`` gives UTC epoch seconds.

    ``member`` finds a deployment or raises ``DeploymentNotFound``, as every method does
    that is asked for one by name.
    """

    def __init__(
        self,
        *,
        member: Callable[[str], Member],
        members: Mapping[str, Member],
        store: Store,
        journal: Journal,
        crashes: Crashes,
        ledger: Ledger,
        logs: Logs,
        devices: Devices,
        governor: Governor,
        residence: Residence,
        workers: Callable[[], Workers],
        now: Callable[[], float],
    ) -> None:
        self._member = member
        self._members = members
        self._store = store
        self._journal = journal
        self._crashes = crashes
        self._ledger = ledger
        self._logs = logs
        self._devices = devices
        self._governor = governor
        self._residence = residence
        self._workers = workers
        self._now = now

    async def generations(self, name: str) -> list[Generation]:
        """Its generations, oldest first."""
        self._member(name)
        await self._journal.written()
        return await self._store.generations(name)

    async def lives(self, name: str, limit: int) -> list[WorkerLife]:
        """Its latest worker lives, newest first."""
        self._member(name)
        return await self._store.lives(name, limit)

    async def crashes(self, name: str, limit: int) -> list[Crash]:
        """Its latest crashes, newest first."""
        self._member(name)
        return await self._crashes.newest(name, limit)

    async def crash(self, name: str, number: int) -> Dossier:
        """One of them with all its evidence; ``CrashNotFound``."""
        self._member(name)
        return await self._crashes.one(name, number)

    async def why(self, name: str) -> Story:
        """Why it is as it is."""
        member = self._member(name)
        crashes = await self._crashes.newest(name, TOLD_CRASHES)
        events = await self._store.events(name, 0, TOLD_EVENTS)
        return tell(
            member.status(),
            events,
            crashes,
            self._workers(),
            self._now(),
            suspects=self._devices.suspects,
            loading=sorted(
                {
                    worker.deployment
                    for each in self._members.values()
                    for worker in each.workers.values()
                    if worker.phase in LOADING
                }
            ),
            staying=self._residence.staying(member),
            paused=self._governor.trouble,
        )

    async def events(self, deployment: str | None, after: int, limit: int) -> list[Event]:
        """The newest ``limit`` events after the id ``after``, oldest first."""
        return await self._store.events(deployment, after, limit)

    def watch(
        self, deployment: str | None, callback: Callable[[Event], None]
    ) -> Callable[[], None]:
        """Call back with each new event until the returned function is called."""
        return self._journal.watch(deployment, callback)

    async def log_tail(self, name: str, lines: int) -> list[str]:
        """The last lines that its workers wrote, or the last one that lived."""
        workers = self._member(name).workers.values()
        lives = [worker.uuid for worker in workers if worker.uuid is not None]
        if not lives:
            lives = [life.uuid for life in await self._store.lives(name, 1)]
        return self._logs.tail(name, lives, lines)

    def follow_log(self, name: str, callback: Callable[[str], None]) -> Callable[[], None]:
        """Call back with each line that its workers write until the answer is called."""
        self._member(name)
        return self._logs.follow(name, callback)

    async def statistics(self, query: StatisticsQuery) -> Summary:
        """What was done; ``InvalidRequest`` where that is too much at once."""
        return await self._ledger.tell(query)

    def recent(self, seconds: float) -> Mapping[str, Rollup]:
        """What each deployment did in the last ``seconds``."""
        return self._ledger.recent(seconds)

    def recent_of(self, name: str, seconds: float) -> Mapping[int, Rollup]:
        """What each generation of the deployment did in the last ``seconds``."""
        return self._ledger.recent_of(name, seconds)

    async def record(self, entry: AuditEntry) -> None:
        """Add to the audit; returns when that is on the disk, or has to wait for it."""
        await self._journal.audit(entry)

    async def audit(self, query: AuditQuery) -> list[AuditEntry]:
        """The newest entries of the audit that ``query`` asks for, oldest first."""
        await self._journal.written()
        return await self._store.audit(query)

    async def backup(self) -> Path:
        """A consistent copy of the database, which the caller removes."""
        await self._journal.written()
        return await self._store.backup()

    async def database_report(self) -> DatabaseReport:
        """How the database is, all of it read."""
        return await self._store.report()

    def storage(self) -> StorageStatus:
        """What waits for the disk, and what is lost."""
        return StorageStatus(
            waiting=self._journal.waiting,
            notes_dropped=self._journal.dropped,
            minutes_dropped=self._ledger.dropped,
            log_lines_dropped=LifeLog.unwritten,
        )
