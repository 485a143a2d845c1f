"""The daemon put together: what is constructed, started and stopped, in which order."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred, ensureDeferred, maybeDeferred
from twisted.internet.interfaces import IListeningPort, IProtocolFactory
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure

from tursi import __version__, api, sandbox, store
from tursi.config import Configuration, Listener
from tursi.errors import (
    AlreadyRunning,
    ConfigurationError,
    DatabaseBusy,
    DatabaseError,
    DatabaseFull,
    TursiError,
)
from tursi.fleet import Fleet
from tursi.health import Checks
from tursi.hooks import Hooks
from tursi.hub import Hub
from tursi.lag import Lag
from tursi.listen import bind, check, control, is_handed_over, unclaimed
from tursi.lock import StateLock
from tursi.model import Folders, Host, Limits, LoadOrder
from tursi.notify import Notifier, describe
from tursi.plan import Key
from tursi.store import Store
from tursi.supervision import cgroup, leftovers
from tursi.supervision.containment import Encloser
from tursi.supervision.logs import LifeLog
from tursi.supervision.monitor import WorkerMonitor
from tursi.supervision.oneshot import OneShot, Running
from tursi.supervision.worker import Observer, Worker
from tursi.wire import Frame

log = Logger()

_EXIT_STATUS: Mapping[type[TursiError], int] = {
    AlreadyRunning: 75,
    ConfigurationError: 78,
    DatabaseError: 78,
}
_UPGRADE_SECONDS = 600.0
_SAVE_SECONDS = 30.0
_HOOK_LOG = 256 * 1024
"""Bytes of what a hook writes that are kept."""
_SOFTWARE = 70
_UNAVAILABLE = 69

_KEPT_VARIABLES = (
    "PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "OPENBLAS_CORETYPE",
    "OPENBLAS_L2_SIZE",
)  # fmt: skip
"""What children inherit of the daemon's environment: no token, no notify socket, nothing else."""

_FETCHER_VARIABLES = (
    "HF_ENDPOINT", "HF_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET",
    "XDG_CACHE_HOME", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy",
    "https_proxy", "all_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
)  # fmt: skip
"""What the fetcher gets besides: the way to the hub, and its token."""


def exit_status(error: TursiError) -> int:
    """The process's exit status when ``error`` keeps it from starting (sysexits.h)."""
    for kind, status in _EXIT_STATUS.items():
        if isinstance(error, kind):
            return status
    return _UNAVAILABLE


def preflight(configuration: Configuration, folders: Folders) -> None:
    """Raise what would keep the daemon from starting; change nothing.

    The same is looked at again, authoritatively, in ``startService``: between
    the two, the world may change.
    """
    StateLock(folders.state).probe()
    try:
        store.inspect(folders.database)
    except DatabaseError:
        # Or a daemon has begun to write it in the meantime.
        StateLock(folders.state).probe()
        raise
    for listener in configuration.http.listeners:
        check(listener)
    control(folders.socket, configuration.http.listeners)


class Daemon(Service):
    """Everything that one ``twistd tursi`` runs."""

    def __init__(
        self,
        configuration: Configuration,
        folders: Folders,
        reactor: Any,
        *,
        foreground: bool,
        environment: Mapping[str, str] = os.environ,
        worker_command: tuple[str, ...] = (sys.executable, "-I", "-u", "-m", "tursi.inference"),
    ) -> None:
        self._worker_command = worker_command
        self._configuration = configuration
        self._folders = folders
        self._reactor = reactor
        self._foreground = foreground
        self._environment = {
            name: environment[name] for name in _KEPT_VARIABLES if name in environment
        }
        self._lock = StateLock(folders.state)
        self._store = Store(folders.database, reactor)
        self._encloser = Encloser()
        self._monitor = WorkerMonitor(reactor)
        self._one_shot = OneShot(reactor)
        self._hub = Hub(
            cache=folders.cache / "hub",
            settings=configuration.hub,
            environment={
                **self._environment,
                **{name: environment[name] for name in _FETCHER_VARIABLES if name in environment},
            },
            spawn=self._spawn_fetcher,
            reactor=reactor,
        )
        self._fleet = Fleet(
            store=self._store,
            hub=self._hub,
            make_worker=self._make_worker,
            configuration=configuration,
            logs=folders.logs,
            reactor=reactor,
            now=time.time,
            host=_host(environment),
        )
        others = configuration.http.listeners
        self._listeners = (control(folders.socket, others), *others)
        self._ports: list[IListeningPort] = []
        self._late: list[tuple[Listener, IProtocolFactory]] = []
        self._notifier = Notifier(reactor, environment)
        self._lag = Lag(reactor)
        self._checks = Checks(
            fleet=self._fleet,
            store=self._store,
            lag=self._lag,
            folders={"state": folders.state, "cache": folders.cache, "logs": folders.logs},
            dropped={
                "hooks": lambda: self._hooks.dropped,
                "notes": lambda: self._fleet.storage().notes_dropped,
                "statistics": lambda: self._fleet.storage().minutes_dropped,
                "worker logs": lambda: self._fleet.storage().log_lines_dropped,
            },
            reactor=reactor,
        )
        self._hooks = Hooks(
            configuration.hooks,
            spawn=self._spawn_hook,
            look=lambda: Deferred.fromCoroutine(self._checks.look()).addCallback(lambda it: it[0]),
            reactor=reactor,
            now=time.time,
        )

    # -- start ---------------------------------------------------------------------

    def startService(self) -> None:  # noqa: N802 - Twisted's name
        """Take the lock, check the database and bind; whatever fails, fails the start."""
        super().startService()
        try:
            self._begin()
        except TursiError as error:
            self._notifier.status(error.message)
            if self._foreground:
                # Raising would print a traceback; there is nothing to clean up.
                sys.stderr.write(f"tursi: {error.message}\n")
                sys.stderr.flush()
                os._exit(exit_status(error))
            raise
        self._reactor.callWhenRunning(self._run)

    def _begin(self) -> None:
        # Timers must not follow the wall clock when it jumps.
        self._reactor.seconds = time.monotonic
        for folder in (self._folders.state, self._folders.runtime, self._folders.cache):
            _make_folder(folder)
        self._lock.acquire()
        # An upgrade of a large database takes its time, and so does the look at it.
        self._notifier.extend(_UPGRADE_SECONDS)
        store.prepare(self._folders.database)
        self._remove_socket()
        self._encloser = self._contain()
        info = api.Info(
            version=__version__,
            pid=os.getpid(),
            started_at=time.time(),
            state=str(self._folders.state),
            listeners=self._listeners,
            containment=self._encloser.level,
        )
        for each in unclaimed(self._listeners):
            log.warn("systemd has handed over {socket}, but no listener uses it", socket=each)
        front = api.Front(
            self._fleet,
            info,
            self._configuration,
            self._reactor,
            look=self._checks.look,
            lag=self._lag,
        )
        for listener in self._listeners:
            site = front.site(listener.roles)
            if is_handed_over(listener):
                self._late.append((listener, site))
            else:
                self._ports.append(bind(self._reactor, listener, site))

    def _contain(self) -> Encloser:
        """Find out how workers can be confined here; before any child is started."""
        groups, because = None, None
        try:
            groups = cgroup.join()
        except cgroup.NotDelegated as reason:
            because = str(reason)
        return Encloser(
            groups=groups,
            because=because,
            landlock=sandbox.landlock_version(),
            deny_sockets=sandbox.sockets_deniable(),
            temporary=self._folders.state / "tmp",
        )

    def _run(self) -> None:
        started = ensureDeferred(self._start())
        started.addErrback(self._give_up)

    async def _start(self) -> None:
        _tune_memory()
        self._store.start()
        self._lag.start()
        self._notifier.watch(self._store.ping)
        leftovers.become_subreaper()
        leftovers.bury(self._reactor)
        await self._clear_leftovers()
        await deferToThreadPool(self._reactor, self._reactor.getThreadPool(), self._encloser.sweep)
        self._monitor.startService()
        self._hooks.start(lambda tell: self._fleet.watch(None, tell))
        await self._fleet.open()
        # Who has connected there has waited, rather than being told to come again.
        self._ports += [bind(self._reactor, *each) for each in self._late]
        log.info(
            "tursi {version} serves on {listeners}",
            version=__version__,
            listeners=", ".join(listener.endpoint for listener in self._listeners),
        )
        log.info("workers are confined by {containment}", containment=str(self._encloser.level))
        self._notifier.ready()
        self._notifier.status(self._describe())
        self._fleet.watch(None, lambda _: self._notifier.changed(self._describe))

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
        self._reactor.stop()

    # -- stop -------------------------------------------------------------------------

    def stopService(self) -> Deferred[None]:  # noqa: N802 - Twisted's name
        """Stop accepting, drain, stop every child, save; each step has its deadline."""
        super().stopService()
        return ensureDeferred(self._stop())

    async def _stop(self) -> None:
        workers = self._configuration.workers
        self._notifier.stopping()
        self._notifier.extend(
            workers.drain_seconds + workers.stop_seconds + workers.kill_seconds + _SAVE_SECONDS
        )
        for port in self._ports:
            await maybeDeferred(port.stopListening)
        await self._fleet.close()
        await self._hub.stop()
        await self._hooks.stop()
        await self._monitor.stopService()
        self._notifier.unwatch()
        self._lag.stop()
        await self._store.stop()
        self._remove_socket()
        self._lock.release()

    def _remove_socket(self) -> None:
        # Stale for certain: the lock is ours. Unless it never was ours to remove.
        if not is_handed_over(self._listeners[0]):
            self._folders.socket.unlink(missing_ok=True)

    # -- children -----------------------------------------------------------------------

    def _make_worker(
        self,
        *,
        name: str,
        key: Key,
        order: LoadOrder,
        limits: Limits,
        observer: Observer,
        place: Callable[[str], str],
    ) -> Worker:
        threads = str(order.threads)
        return Worker(
            name=name,
            deployment=key.deployment,
            replica=key.replica,
            generation=key.generation,
            order=order,
            command=self._worker_command,
            environment={
                **self._environment,
                "HF_HUB_OFFLINE": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "OMP_NUM_THREADS": threads,
                "MKL_NUM_THREADS": threads,
                "TURSI_STATE": str(self._folders.state),
            },
            logs=self._folders.logs / key.deployment,
            settings=self._configuration.workers,
            requests=self._configuration.requests,
            monitor=self._monitor,
            reactor=self._reactor,
            random=random.random,
            now=time.time,
            observer=observer,
            limits=limits,
            encloser=self._encloser,
            place=place,
        )

    def _spawn_fetcher(
        self,
        name: str,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        receive: Callable[[Frame], None],
    ) -> Running:
        settings = self._configuration.workers
        return self._one_shot.run(
            name,
            arguments,
            {**environment, "TURSI_STATE": str(self._folders.state)},
            receive,
            LifeLog(
                self._folders.state / "fetches" / f"{name}.log",
                clock=time.time,
                size=settings.log_bytes,
                rate=settings.log_bytes_per_second,
            ),
        )

    def _spawn_hook(self, name: str, arguments: tuple[str, ...]) -> Running:
        return self._one_shot.run(
            f"hook {name}",
            arguments,
            {**self._environment, "TURSI_STATE": str(self._folders.state)},
            lambda _: None,
            LifeLog(
                self._folders.state / "hooks" / f"{name}.log",
                clock=time.time,
                size=_HOOK_LOG,
                rate=_HOOK_LOG,
            ),
        )


def _host(environment: Mapping[str, str]) -> Host:
    """What this machine has."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Host(
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cores=len(os.sched_getaffinity(0)),
        files=None if files == resource.RLIM_INFINITY else files,
        gpus=tuple(f"cuda:{index}" for index in range(_gpus(environment))),
    )


def _gpus(environment: Mapping[str, str]) -> int:
    """How many GPUs workers can see."""
    here = len([*Path("/dev").glob("nvidia[0-9]*")])
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    return here if chosen is None else min(here, len([*filter(None, chosen.split(","))]))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"The folder {folder} can't be made: {error.strerror}; "
            "choose another with --state, --runtime or --cache."
        ) from None


def _tune_memory() -> None:
    """Give back less memory than glibc would, and tell the collector what stays.

    Every buffer of 128 KiB or more would otherwise be mapped and unmapped, which
    is most of the cost of a large body.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 64 << 20)  # M_MMAP_THRESHOLD
        mallopt(-1, 128 << 20)  # M_TRIM_THRESHOLD
    gc.collect()
    gc.freeze()
