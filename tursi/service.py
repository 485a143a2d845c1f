"""The daemon put together: what is constructed, started and stopped, in which order."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredLock, ensureDeferred
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure

from tursi import __version__, api, config, heap, logging, store
from tursi.api import Reloaded
from tursi.certificates import certificates
from tursi.children import WORKER_COMMAND, Children
from tursi.config import Configuration, Listener
from tursi.errors import (
    AddressInUse,
    DatabaseBusy,
    DatabaseFull,
    InternalError,
    ShuttingDown,
    TursiError,
)
from tursi.fleet import Fleet
from tursi.gpus import Gpus
from tursi.health import Checks
from tursi.hooks import Hooks
from tursi.host import available, fitting, host
from tursi.hub import Hub
from tursi.instance import Instance
from tursi.lag import Lag
from tursi.launch import Launch, close_inherited
from tursi.listen import (
    check,
    check_nobody_serves,
    control,
    give_to_group,
    group_id,
    is_handed_over,
    needs_keys,
    unclaimed,
)
from tursi.model import AuditEntry, Folders
from tursi.notify import Notifier, describe
from tursi.ports import Ports
from tursi.preflight import exit_status
from tursi.premises import NO_ROOM, Premises
from tursi.signals import LastResort, Signals
from tursi.store import Store
from tursi.supervision import leftovers

log = Logger()

_UPGRADE_SECONDS = 600.0
_SAVE_SECONDS = 30.0
_RELOAD_SECONDS = 1.0
"""Between two reloads by SIGHUP: each is audited."""
_SOFTWARE = 70


class Daemon(Service):
    """Everything that one ``twistd tursi`` runs."""

    def __init__(
        self,
        configuration: Configuration,
        folders: Folders,
        reactor: Any,
        launch: Launch = Launch(),  # noqa: B008 - a frozen value
        *,
        environment: Mapping[str, str] = os.environ,
        worker_command: tuple[str, ...] = WORKER_COMMAND,
    ) -> None:
        self._configuration = configuration
        self._folders = folders
        self._reactor = reactor
        self._launch = launch
        self._store = Store(folders.database, reactor)
        self._keys = api.Keys(self._store, reactor)
        self._premises = Premises(folders, launch)
        self._children = Children(
            configuration,
            folders,
            reactor,
            environment=environment,
            worker_command=worker_command,
        )
        self._gpus = Gpus(reactor, environment)
        self._hub = Hub(
            cache=folders.cache / "hub",
            imported=folders.state / "models",
            settings=configuration.hub,
            environment=self._children.fetcher_environment,
            spawn=self._children.spawn_fetcher,
            reactor=reactor,
        )
        self._fleet = Fleet(
            store=self._store,
            hub=self._hub,
            make_worker=self._children.make_worker,
            configuration=configuration,
            logs=folders.logs,
            reactor=reactor,
            now=time.time,
            host=host(environment),
            available=available,
            gpus=lambda: self._gpus.latest,
        )
        others = configuration.http.listeners
        self._listeners = (control(folders.socket, others), *others)
        self._premises.socket_is_ours = not is_handed_over(self._listeners[0])
        self._ports = Ports(
            reactor, lambda listener: self._front.site(listener.roles, **_kind(listener))
        )
        self._front: api.Front
        self._info: api.Info
        self._reloading = DeferredLock()
        self._hangup: Any = None
        """The timer of the next reload by SIGHUP, while it waits."""
        self._hung_up_at = -_RELOAD_SECONDS
        self._group: int | None = None
        """Of the control socket."""
        self._notifier = Notifier(reactor, environment)
        self._lag = Lag(reactor)
        self._heap = heap.Heap(reactor, lambda: self._fleet.busy)
        self._checks = Checks(
            fleet=self._fleet,
            store=self._store,
            lag=self._lag,
            folders={"state": folders.state, "cache": folders.cache, "logs": folders.logs},
            dropped={
                "hooks": lambda: self._hooks.dropped,
                "notes": lambda: self._fleet.records.storage().notes_dropped,
                "statistics": lambda: self._fleet.records.storage().minutes_dropped,
                "worker logs": lambda: self._fleet.records.storage().log_lines_dropped,
                "log": lambda: logging.current.dropped,
            },
            reactor=reactor,
        )
        self._hooks = Hooks(
            configuration.hooks,
            spawn=self._children.spawn_hook,
            look=lambda: Deferred.fromCoroutine(self._checks.look()).addCallback(lambda it: it[0]),
            reactor=reactor,
            now=time.time,
        )
        self._started_at = time.time()
        self._starting: Deferred[None] | None = None
        self._stopping = False
        self._last_resort = LastResort()
        self._signals = Signals(
            reactor,
            {
                signal.SIGTERM: lambda: self._end("SIGTERM"),
                signal.SIGINT: lambda: self._end("SIGINT"),
                signal.SIGHUP: self._hang_up,
                signal.SIGUSR1: self._dump,
                signal.SIGUSR2: _toggle_debug,
            },
            self._signalled,
        )

    # -- start ---------------------------------------------------------------------

    def privilegedStartService(self) -> None:  # noqa: N802 - Twisted's name
        """Take the folders and the lock, before twistd changes its user."""
        super().privilegedStartService()
        self._attempt(self._take)

    def startService(self) -> None:  # noqa: N802 - Twisted's name
        """Check the database and bind; whatever fails, fails the start."""
        super().startService()
        self._attempt(self._begin)
        self._reactor.callWhenRunning(self._run)

    def _attempt(self, step: Callable[[], None]) -> None:
        try:
            with _room(self._folders.state):
                step()
        except TursiError as error:
            self._notifier.status(error.message)
            log.critical("{message}", message=error.message)
            self._premises.leave()
            # Raising would print a traceback or lose the status, by the mode.
            if self._launch.parent is not None:
                self._launch.parent.refuses(exit_status(error), error.message)
            else:
                # sys.stderr may go to the log by now.
                os.write(2, f"tursi: {error.message}\n".encode())
            os._exit(exit_status(error))
        except BaseException:
            self._premises.leave()
            raise

    def _take(self) -> None:
        if not self._premises.taken:
            self._signals.install()
            self._premises.take()

    def _begin(self) -> None:
        # Not everything that starts a service knows of privileges.
        self._take()
        # Timers must not follow the wall clock when it jumps.
        self._reactor.seconds = time.monotonic
        # An upgrade of a large database takes its time, and so does the look at it.
        self._notifier.extend(_UPGRADE_SECONDS)
        store.prepare(self._folders.database)
        self._check_socket()
        self._premises.remove_socket()
        self._children.contain()
        info = api.Info(
            version=__version__,
            pid=os.getpid(),
            started_at=self._started_at,
            state=str(self._folders.state),
            listeners=self._listeners,
            containment=self._children.encloser.level,
        )
        for each in unclaimed(self._listeners):
            log.warn("systemd has handed over {socket}, but no listener uses it", socket=each)
        # In the background that was done before the fork. No child inherits what systemd has
        # handed over any more, so the rest is nobody's.
        if self._launch.foreground:
            close_inherited(os.environ)
        self._info = info
        self._group = group = group_id(self._configuration.http.control_group)
        self._front = api.Front(
            self._fleet,
            info,
            fitting(self._configuration),
            self._reactor,
            self._keys,
            self._reload,
            look=self._checks.look,
            lag=self._lag,
            group=group,
        )
        self._ports.open(each for each in self._listeners if not is_handed_over(each))
        self._give_socket(group)
        self._write_status()
        if self._launch.parent is not None:
            self._launch.parent.serves()

    def _check_socket(self) -> None:
        if self._premises.socket_is_ours:
            check_nobody_serves(self._folders.socket)

    def _give_socket(self, group: int | None) -> None:
        if group is not None and self._premises.socket_is_ours:
            give_to_group(self._folders.socket, group)

    def _write_status(self) -> None:
        file = logging.current.path
        configuration = self._launch.configuration or self._folders.configuration
        status = Instance(
            pid=os.getpid(),
            started_at=datetime.fromtimestamp(self._started_at, UTC).isoformat(timespec="seconds"),
            version=__version__,
            state=str(self._folders.state),
            cache=str(self._folders.cache),
            configuration=str(configuration) if configuration.exists() else None,
            log=str(file) if file is not None else None,
            listeners=tuple(listener.endpoint for listener in self._listeners),
            foreground=self._launch.foreground,
            stop_seconds=self._stop_seconds(),
        )
        self._premises.describe(status)

    def _stop_seconds(self) -> float:
        """How long an orderly end may take."""
        workers = self._configuration.workers
        return workers.drain_seconds + workers.stop_seconds + workers.kill_seconds + _SAVE_SECONDS

    def _run(self) -> None:
        # The reactor has taken some of them as it started.
        self._signals.install()
        self._reactor.addSystemEventTrigger("after", "shutdown", self._signals.ignore)
        self._starting = ensureDeferred(self._start())
        self._starting.addErrback(self._give_up)

    async def _start(self) -> None:
        heap.tune()
        self._store.start()
        self._lag.start()
        self._heap.start()
        self._notifier.watch(self._store.ping)
        leftovers.become_subreaper()
        leftovers.bury(self._reactor)
        await self._clear_leftovers()
        pool = self._reactor.getThreadPool()
        await deferToThreadPool(self._reactor, pool, self._children.encloser.sweep)
        self._children.monitor.startService()
        await self._keys.start()
        self._gpus.start(self._fleet.look)
        self._hooks.start(lambda tell: self._fleet.records.watch(None, tell))
        await self._fleet.open()
        # Who has connected there has waited, rather than being told to come again.
        self._ports.open(each for each in self._listeners if is_handed_over(each))
        log.info(
            "tursi {version} serves on {listeners}",
            version=__version__,
            listeners=", ".join(listener.endpoint for listener in self._listeners),
        )
        level = self._children.encloser.level
        log.info("workers are confined by {containment}", containment=str(level))
        self._notifier.ready()
        self._notifier.status(self._describe())
        self._fleet.records.watch(None, lambda _: self._notifier.changed(self._describe))

    def _describe(self) -> str:
        return describe(self._fleet.deployments())

    async def _clear_leftovers(self) -> None:
        """Kill what an earlier daemon has left, and close the records of its workers."""
        unfinished = await self._store.unfinished_lives()
        killed = await leftovers.sweep(
            self._reactor,
            unfinished,
            boot_id=leftovers.read_boot_id(),
            state=self._folders.state,
        )
        if killed:
            log.warn("killed {count} processes of an earlier daemon", count=len(killed))
        for life in unfinished:
            try:
                await self._store.put_life(
                    replace(life, ended_at=time.time(), reason="the daemon itself ended")
                )
            except (DatabaseBusy, DatabaseFull) as error:
                # Serving matters more; the next start finds them again.
                log.warn("ends of earlier workers aren't recorded: {error}", error=error)
                break

    def _give_up(self, failure: Failure) -> None:
        log.failure("the daemon could not start", failure)
        # twistd knows no way to say an exit status once the reactor runs.
        self._reactor.addSystemEventTrigger("after", "shutdown", os._exit, _SOFTWARE)
        self._end("a failed start")

    # -- stop -------------------------------------------------------------------------

    def stopService(self) -> Deferred[None]:  # noqa: N802 - Twisted's name
        """Stop accepting, drain, stop every child, save; each step has its deadline."""
        super().stopService()
        return ensureDeferred(self._stop())

    async def _stop(self) -> None:
        self._stopping = True
        self._last_resort.begin(self._stop_seconds())
        self._notifier.stopping()
        self._notifier.extend(self._stop_seconds())
        # A reload under way would open the ports again; those that wait find out by themselves.
        await self._reloading.acquire()
        self._reloading.release()
        await self._ports.close()
        if self._starting is not None:
            # Half a start can't be undone; it takes no longer than the last resort allows.
            await self._starting
        await self._fleet.close()
        await self._hub.stop()
        await self._hooks.stop()
        await self._children.monitor.stopService()
        self._notifier.unwatch()
        self._gpus.stop()
        self._lag.stop()
        self._heap.stop()
        await self._keys.stop()
        await self._store.stop()
        self._premises.leave()
        log.info("tursi has stopped")

    # -- signals --------------------------------------------------------------------------

    def _signalled(self, number: int) -> None:
        if number in {signal.SIGTERM, signal.SIGINT}:
            # Now, and not when the reactor comes to it: it may be what hangs.
            self._last_resort.begin(self._stop_seconds())

    def _end(self, cause: str) -> None:
        """Stop; asked a second time, don't wait for what is in flight."""
        if self._stopping:
            log.info("{cause} again: what is in flight is not waited for", cause=cause)
            self._fleet.hurry()
            return
        self._stopping = True
        log.info("stopping because of {cause}", cause=cause)
        self._reactor.stop()

    # -- reload ---------------------------------------------------------------------------

    def _hang_up(self) -> None:
        """Read the configuration again; many at once count as one."""
        if self._hangup is None:
            wait = max(0.0, self._hung_up_at + _RELOAD_SECONDS - time.monotonic())
            self._hangup = self._reactor.callLater(wait, self._hung_up)

    def _hung_up(self) -> None:
        self._hangup, self._hung_up_at = None, time.monotonic()
        ensureDeferred(self._reload()).addErrback(_not_reloaded).addBoth(self._audit_reload)

    def _audit_reload(self, error: TursiError | Reloaded | None) -> None:
        """Keep that there was a SIGHUP; nobody can tell from whom."""
        code = error.code if isinstance(error, TursiError) else None
        entry = AuditEntry(0, time.time(), "SIGHUP", "reload", code=code)
        ensureDeferred(self._fleet.records.record(entry)).addErrback(
            lambda failure: log.failure("a reload is not audited", failure)
        )

    async def _reload(self) -> Reloaded:
        """Open the log anew, read the configuration and apply what has changed, all or nothing."""
        logging.current.reopen()
        await self._reloading.acquire()
        try:
            if self._starting is not None:
                await self._starting
            if self._stopping:
                raise ShuttingDown
            self._notifier.reloading()
            return await self._apply()
        finally:
            if not self._stopping:
                self._notifier.ready()
            self._reloading.release()

    async def _apply(self) -> Reloaded:
        configuration, group = await deferToThreadPool(
            self._reactor, self._reactor.getThreadPool(), self._read
        )
        changed = config.changes(self._configuration, configuration)
        listeners = (self._listeners[0], *configuration.http.listeners)
        if group != self._group:
            self._give_socket(os.getegid() if group is None else group)
        try:
            if await self._ports.change(self._listeners, listeners):
                changed.append("certificates")
        except TursiError:
            if group != self._group:
                self._give_socket(os.getegid() if self._group is None else self._group)
            raise
        # From here on nothing can fail.
        self._configuration = self._children.configuration = configuration
        self._listeners = self._info.listeners = listeners
        self._group = group
        self._front.configure(fitting(configuration), group)
        for listener, site in self._ports.sites(listeners):
            self._front.adapt(site, listener.roles, **_kind(listener))
        logging.current.configure(configuration.log)
        self._hub.configure(configuration.hub)
        self._hooks.configure(configuration.hooks)
        rolled = self._fleet.configure(configuration)
        self._write_status()
        log.info("the configuration was read: {changed}", changed=", ".join(changed) or "no change")
        return Reloaded(changed, rolled)

    def _read(self) -> tuple[Configuration, int | None]:
        """The configuration as the file has it now, if it can be used, and its control group."""
        configuration = config.load(self._launch.configuration, self._folders.configuration)
        for listener in configuration.http.listeners:
            # Who listens there may be ourselves.
            with suppress(AddressInUse):
                check(listener)
            certificates(listener)
        return configuration, group_id(configuration.http.control_group)

    # -- for people -------------------------------------------------------------------------

    def _dump(self) -> None:
        """Write to the log how everything is."""
        descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
        timers = len(self._reactor.getDelayedCalls())
        up = time.time() - self._started_at
        lines = [
            (
                f"pid {os.getpid()}, up {up:.0f} s, {threading.active_count()} threads, "
                f"{timers} timers, {descriptors} descriptors"
            ),
            *(f"listens on {listener.endpoint}" for listener in self._listeners),
            *self._fleet.describe(),
            *self._hub.describe(),
        ]
        log.info("{status}", status="\n".join(["status", *lines]))


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Say so if there is no room for ``folder``."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise DatabaseFull(
            f"The disk of {folder} is full; free some space, then start Tursi again."
        ) from None


def _not_reloaded(failure: Failure) -> TursiError:
    if isinstance(failure.value, TursiError):
        log.error("the configuration stays as it was: {message}", message=failure.value.message)
        return failure.value
    log.failure("the configuration stays as it was", failure)
    return InternalError()


def _toggle_debug() -> None:
    debugging = logging.current.toggle_debug()
    log.info("debug messages are {state}", state="on" if debugging else "off")


def _kind(listener: Listener) -> dict[str, bool]:
    """What a listener's site has to know of it besides its roles."""
    return {"is_open": not needs_keys(listener), "is_proxied": listener.behind_proxy}
