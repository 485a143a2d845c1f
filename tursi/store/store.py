"""The store's face: asynchronous, in the words of the domain."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from twisted.enterprise.adbapi import ConnectionPool
from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from tursi.config import Storage
from tursi.errors import DatabaseBusy, ShuttingDown
from tursi.model import (
    ApiKey,
    AuditEntry,
    AuditQuery,
    Crash,
    DatabaseReport,
    Deployment,
    Desired,
    Dossier,
    Event,
    Generation,
    Measurement,
    NewKey,
    Pull,
    Request,
    Resolution,
    Schedule,
    Trust,
    WorkerLife,
)
from tursi.rollup import Record, StatisticsQuery, Summary
from tursi.store import (
    audit,
    backups,
    connection,
    crashes,
    deployments,
    events,
    keys,
    lives,
    measurements,
    place,
    pulls,
    statistics,
)
from tursi.store.deployments import Outcome

PATIENCE_SECONDS = 6.0
"""How long a call waits, those before it included, while another process holds the file."""
MAX_PENDING = 1000
"""Calls that may wait for the database; more are refused at once, but for those that are few
by their nature and must not be lost: the lives of workers and their crashes."""

T = TypeVar("T")
log = Logger()


class Store:
    """Reads and writes the file that ``prepare`` has made ready.

    Every method returns a Deferred of domain values. What a Deferred of a change
    has fired for is on the disk. It fails with ``DatabaseBusy``, ``DatabaseFull``,
    ``DatabaseError`` or ``ShuttingDown`` besides what each method says. Cancelling
    a Deferred doesn't undo the change.

    ``pool`` makes the connection pools (``ConnectionPool``'s signature).
    """

    def __init__(self, path: Path, reactor: Any, pool: Callable[..., Any] = ConnectionPool) -> None:
        self._path = path
        self._reactor = reactor
        self._pool = pool
        self._writer: Any = None
        self._reader: Any = None
        self._pending = 0
        self._reading_all = False
        self._stopped: Deferred[None] | None = None
        self._watchers: list[Callable[[Event], object]] = []

    def start(self) -> None:
        """Open the pools; they connect with the first call."""
        # One writer: SQLite has one write lock anyway, and who waits for it in
        # its own thread waits fairly.
        self._writer = self._open(1, connection.for_writing)
        self._reader = self._open(2, connection.for_reading)

    def stop(self) -> Deferred[None]:
        """Refuse further calls, wait for those under way, and close the file."""
        if self._writer is None:
            return succeed(None)
        if self._stopped is None:
            checkpoint = self._run(self._writer, _checkpoint)
            checkpoint.addErrback(
                lambda failure: log.failure("The write-ahead log stays", failure=failure)
            )
            self._stopped = Deferred()
            self._close_when_idle()
        waiting: Deferred[None] = Deferred()
        self._stopped.chainDeferred(waiting)
        return waiting

    def ping(self) -> Deferred[None]:
        """A way through the thread that writes and back, whatever state the file is in."""
        if self._writer is None or self._stopped is not None:
            return fail(ShuttingDown())
        return self._begin(lambda: self._writer.runInteraction(_nothing))

    def watch(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """Call ``callback`` with every event once it is stored, in order; returns the undoing."""
        self._watchers.append(callback)
        return lambda: self._watchers.remove(callback) if callback in self._watchers else None

    # -- deployments ---------------------------------------------------------------

    def deployments(self) -> Deferred[list[Deployment]]:
        """All deployments that exist, by name."""
        return self._read(deployments.every)

    def generations(self, name: str) -> Deferred[list[Generation]]:
        """All generations, oldest first, also of a deleted deployment; ``DeploymentNotFound``."""
        return self._read(deployments.generations, name)

    def save(
        self,
        name: str,
        request: Request,
        replicas: int,
        *,
        by: str,
        at: float,
        schedule: Schedule | None = None,
        max_replicas: int | None = None,
        canary: int | None = None,
        imported: Resolution | None = None,
    ) -> Deferred[tuple[Deployment, Outcome]]:
        """Create or replace a deployment, which is to run from now on.

        Without ``schedule`` an existing one keeps its own. With ``canary`` what is new
        gets so many percent of the requests, beside what serves. ``imported`` is what
        the request means where that has come with it.
        """
        saved = self._write(
            deployments.save,
            name,
            request,
            replicas,
            by=by,
            at=at,
            schedule=schedule,
            max_replicas=max_replicas,
            canary=canary,
            imported=imported,
        )
        return saved.addCallback(self._announced_last)

    def roll_back(
        self, name: str, number: int | None, *, by: str, at: float
    ) -> Deferred[tuple[Deployment, Outcome]]:
        """Want an earlier generation again, the last other one if ``None``.

        ``DeploymentNotFound``, ``GenerationNotFound``.
        """
        saved = self._write(deployments.roll_back, name, number, by=by, at=at)
        return saved.addCallback(self._announced_last)

    def set_desired(
        self, name: str, desired: Desired, *, by: str, at: float
    ) -> Deferred[Deployment]:
        """Want it running or stopped; ``DeploymentNotFound``."""
        changed = self._write(deployments.set_desired, name, desired, by=by, at=at)
        return changed.addCallback(self._announced)

    def set_replicas(
        self, name: str, replicas: int, most: int | None = None, *, by: str, at: float
    ) -> Deferred[Deployment]:
        """Want that many replicas, or so many to ``most``; ``DeploymentNotFound``."""
        changed = self._write(deployments.set_replicas, name, replicas, most, by=by, at=at)
        return changed.addCallback(self._announced)

    def set_loaded(self, name: str, loaded: bool) -> Deferred[Deployment]:
        """Want it in memory or not, if it is loaded manually; ``DeploymentNotFound``."""
        return self._write(deployments.set_loaded, name, loaded)

    def set_canary(self, name: str, weight: int, *, by: str, at: float) -> Deferred[Deployment]:
        """Give the canary that share; ``DeploymentNotFound``, ``NoCanary``."""
        changed = self._write(deployments.set_canary, name, weight, by=by, at=at)
        return changed.addCallback(self._announced)

    def promote(self, name: str, *, by: str, at: float) -> Deferred[Deployment]:
        """Let the canary take over once it is ready; ``DeploymentNotFound``, ``NoCanary``."""
        changed = self._write(deployments.promote, name, by=by, at=at)
        return changed.addCallback(self._announced)

    def serve(self, name: str, number: int, *, at: float) -> Deferred[None]:
        """Generation ``number`` serves from now on."""
        return self._write(deployments.serve, name, number, at=at).addCallback(self._announce)

    def fail(self, name: str, number: int, reason: str, *, at: float) -> Deferred[None]:
        """Generation ``number`` has failed; what it should have taken over from serves."""
        failed = self._write(deployments.fail, name, number, reason, at=at)
        return failed.addCallback(self._announce)

    def delete(self, name: str, *, by: str, at: float) -> Deferred[None]:
        """Want it gone; its history stays. ``DeploymentNotFound``."""
        return self._write(deployments.delete, name, by=by, at=at).addCallback(self._announce)

    def resolve(
        self, name: str, number: int, resolution: Resolution, *, at: float
    ) -> Deferred[None]:
        """Add what generation ``number`` turned out to mean; ``DeploymentNotFound``."""
        resolved = self._write(deployments.resolve, name, number, resolution, at=at)
        return resolved.addCallback(self._announce)

    # -- pulls ---------------------------------------------------------------------

    def add_pull(self, model: str, trust: Trust, *, by: str, at: float) -> Deferred[Pull]:
        """Ask for a download; one of the same files that has not ended goes on instead."""
        added = self._write(pulls.add, model, trust, by=by, at=at)
        return added.addCallback(self._announced)

    def set_pull(self, pull: Pull, *, by: str, at: float) -> Deferred[Pull]:
        """Keep what has become of a pull; ``PullNotFound``."""
        changed = self._write(pulls.change, pull, by=by, at=at)
        return changed.addCallback(self._announced)

    def pulls(self, limit: int) -> Deferred[list[Pull]]:
        """Those that have not ended, and the latest others up to ``limit``; newest first."""
        return self._read(pulls.newest, limit)

    def pull(self, number: int) -> Deferred[Pull]:
        """One of them; ``PullNotFound``."""
        return self._read(pulls.one, number)

    # -- memory --------------------------------------------------------------------

    def put_measurements(self, found: Sequence[Measurement]) -> Deferred[None]:
        """Insert what workers of builds have had of memory, or replace what was known."""
        return self._write(measurements.put, tuple(found))

    def measurements(self) -> Deferred[list[Measurement]]:
        """All of them, those first that were measured longest ago."""
        return self._read(measurements.every)

    # -- history -------------------------------------------------------------------

    def put_life(self, life: WorkerLife) -> Deferred[None]:
        """Insert a worker's life, or replace what was known of it."""
        return self._write(lives.put, life, must=True)

    def lives(self, deployment: str, limit: int) -> Deferred[list[WorkerLife]]:
        """The last ``limit`` lives of a deployment's workers, newest first."""
        return self._read(lives.newest, deployment, limit)

    def unfinished_lives(self) -> Deferred[list[WorkerLife]]:
        """Every life whose end isn't recorded, oldest first."""
        return self._read(lives.unfinished)

    def add_crash(self, dossier: Dossier, *, keep: int) -> Deferred[None]:
        """Keep a crash, whose life has been put before; ``keep`` of its deployment stay."""
        return self._write(crashes.add, dossier, keep, must=True)

    def crashes(self, deployment: str, limit: int) -> Deferred[list[Crash]]:
        """The last ``limit`` crashes of a deployment, newest first."""
        return self._read(crashes.newest, deployment, limit)

    def crash(self, deployment: str, number: int) -> Deferred[Dossier]:
        """One of them with all its evidence; ``CrashNotFound``."""
        return self._read(crashes.one, deployment, number)

    def last_crash(self) -> Deferred[int]:
        """The highest id that a crash has ever had; 0 if there was none."""
        return self._read(crashes.last)

    def record(
        self,
        at: float,
        kind: str,
        message: str,
        *,
        deployment: str | None = None,
        worker: str | None = None,
        cause: str | None = None,
    ) -> Deferred[Event]:
        """Append an event."""
        recorded = self._write(
            events.record, at, kind, message, deployment=deployment, worker=worker, cause=cause
        )
        return recorded.addCallback(lambda event: self._announced((event, event)))

    def events(self, deployment: str | None, after: int, limit: int) -> Deferred[list[Event]]:
        """The newest ``limit`` events after the id ``after``, oldest first."""
        return self._read(events.newest, deployment, after, limit)

    def add_records(self, records: Sequence[Record]) -> Deferred[None]:
        """Add to the statistics."""
        return self._write(statistics.add, tuple(records))

    def roll_up(self, *, at: float) -> Deferred[None]:
        """Add what was counted in the minutes before to the minutes, hours and days."""
        return self._write(statistics.roll_up, at)

    def statistics(self, query: StatisticsQuery) -> Deferred[Summary]:
        """Statistics, added up; ``InvalidRequest`` if they are too many."""
        return self._read(statistics.summary, query)

    def add_audit(self, entry: AuditEntry) -> Deferred[AuditEntry]:
        """Append to the audit; the entry with its id."""
        return self._write(audit.add, entry)

    def audit(self, query: AuditQuery) -> Deferred[list[AuditEntry]]:
        """The newest entries that ``query`` asks for, oldest first."""
        return self._read(audit.newest, query)

    def prune(self, storage: Storage, *, at: float) -> Deferred[None]:
        """Forget what is past its limits."""
        return self._write(_prune, storage, at)

    # -- the file ------------------------------------------------------------------

    def backup(self) -> Deferred[Path]:
        """A consistent copy beside the file, made while the rest goes on; the caller removes it."""
        to = place.beside(self._path, "backup")

        def copy() -> Path:
            # Of a caller that had no time for it, or of a daemon that was killed.
            to.unlink(missing_ok=True)
            backups.backup(self._path, to, in_use=True)
            return to

        return self._aside(copy)

    def report(self) -> Deferred[DatabaseReport]:
        """Read all of the file, and tell how it is."""
        return self._aside(partial(backups.report, self._path, in_use=True))

    # -- keys ----------------------------------------------------------------------

    def keys(self) -> Deferred[list[tuple[ApiKey, bytes]]]:
        """All API keys with their digests, the revoked ones too, oldest first."""
        return self._read(keys.every)

    def add_key(self, key: NewKey, digest: bytes) -> Deferred[ApiKey]:
        """Keep a key's digest and what it allows; ``KeyExists``."""
        return self._write(keys.add, key, digest)

    def revoke_key(self, name: str, *, at: float) -> Deferred[ApiKey]:
        """Make the key with this name or id invalid for ever; ``KeyNotFound``."""
        return self._write(keys.revoke, name, at=at)

    def keys_used(self, times: Mapping[int, float]) -> Deferred[None]:
        """Note when keys, by their ids, were last used."""
        return self._write(keys.used, dict(times))

    # -- transactions --------------------------------------------------------------

    def _open(self, size: int, prepare: Callable[[sqlite3.Connection], None]) -> Any:
        return self._pool(
            "sqlite3",
            str(self._path),
            cp_reactor=self._reactor,
            cp_min=size,
            cp_max=size,
            cp_openfun=prepare,
            isolation_level=None,
            # adbapi closes a thread's connection in the reactor's thread.
            check_same_thread=False,
            cached_statements=256,
        )

    def _read(self, interaction: Callable[..., T], *arguments: Any) -> Deferred[T]:
        return self._run(self._reader, _transaction, "BEGIN", _until(), interaction, arguments, {})

    def _write(
        self,
        interaction: Callable[..., T],
        *arguments: Any,
        must: bool = False,
        **keywords: Any,
    ) -> Deferred[T]:
        # A deferred transaction that reads first can't wait for the write lock.
        return self._run(
            self._writer,
            _transaction,
            "BEGIN IMMEDIATE",
            _until(),
            interaction,
            arguments,
            keywords,
            must=must,
        )

    def _aside(self, work: Callable[[], T]) -> Deferred[T]:
        """Run what takes long on a connection of its own, one at a time."""
        if self._reading_all:
            return fail(
                DatabaseBusy(
                    "The database is being read through already; try again when that is done.",
                    retry_after=5,
                )
            )
        self._reading_all = True

        def run() -> Deferred[T]:
            # For its thread: the pool's connections must not write, not even elsewhere.
            running: Deferred[T] = self._reader.runWithConnection(lambda _: work())
            return running

        def done(outcome: T | Failure) -> T | Failure:
            self._reading_all = False
            return outcome

        return self._hold(self._reader, run).addBoth(done)

    def _run(
        self, pool: Any, interaction: Callable[..., T], *arguments: Any, must: bool = False
    ) -> Deferred[T]:
        return self._hold(pool, lambda: pool.runInteraction(interaction, *arguments), must=must)

    def _hold(
        self, pool: Any, run: Callable[[], Deferred[T]], *, must: bool = False
    ) -> Deferred[T]:
        """What ``run`` gives; the pools stay open until it has."""
        if pool is None or self._stopped is not None:
            return fail(ShuttingDown())
        if self._pending >= MAX_PENDING and not must:
            return fail(DatabaseBusy(retry_after=5))
        return self._begin(run)

    def _begin(self, run: Callable[[], Deferred[T]]) -> Deferred[T]:
        self._pending += 1
        running = run()
        # The caller may cancel its Deferred; the statement runs on all the same.
        answer: Deferred[T] = Deferred()
        running.addErrback(self._meaning).addBoth(self._done, answer)
        return answer

    def _meaning(self, failure: Failure) -> NoReturn:
        error = failure.value
        if isinstance(error, sqlite3.Error):
            raise connection.meaning(error, self._path) from error
        failure.raiseException()

    def _done(self, result: Any, answer: Deferred[Any]) -> None:
        self._pending -= 1
        if not answer.called:
            (answer.errback if isinstance(result, Failure) else answer.callback)(result)
        self._close_when_idle()

    def _close_when_idle(self) -> None:
        if self._stopped is None or self._stopped.called or self._pending:
            return
        # The last connection to close would checkpoint: let it be the writer.
        self._reader.close()
        self._writer.close()
        self._stopped.callback(None)

    def _announced(self, change: tuple[T, Event | None]) -> T:
        value, event = change
        self._announce(event)
        return value

    def _announced_last(
        self, saved: tuple[Deployment, Outcome, Event | None]
    ) -> tuple[Deployment, Outcome]:
        deployment, outcome, event = saved
        self._announce(event)
        return deployment, outcome

    def _announce(self, event: Event | None) -> None:
        if event is None:
            return
        for callback in tuple(self._watchers):
            with log.failuresHandled("A watcher of events failed"):
                callback(event)


def _transaction(
    txn: Any,
    begin: str,
    until: float,
    interaction: Callable[..., T],
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
) -> T:
    """Run ``interaction`` in a transaction, which adbapi commits or rolls back."""
    try:
        _begin(txn, begin, until)
        return interaction(txn, *arguments, **keywords)
    except BaseException:
        # The error's traceback keeps the cursor until the reactor's thread lets go of it,
        # which would then wait for whatever this thread waits for next: seconds, where
        # another process holds the file.
        txn.close()
        raise


def _begin(txn: Any, begin: str, until: float) -> None:
    while True:
        try:
            txn.execute(begin)
        except sqlite3.OperationalError as error:
            # SQLite has mostly waited already, but not in every case. Waiting
            # here, in the pool's own thread, keeps the changes in their order.
            if not connection.is_busy(error) or time.monotonic() >= until:
                raise
            time.sleep(0.05)
        else:
            return


def _nothing(txn: Any) -> None:
    txn.execute("SELECT 1")


def _until() -> float:
    return time.monotonic() + PATIENCE_SECONDS


def _checkpoint(txn: Any) -> None:
    txn.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _prune(txn: Any, storage: Storage, at: float) -> None:
    events.prune(txn, storage)
    statistics.prune(txn, storage, at)
    lives.prune(txn, storage)
    audit.prune(txn, storage)
