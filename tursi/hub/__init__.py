"""Where models come from: folders on disk, and the hub by way of the fetcher process."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from twisted.internet import defer
from twisted.internet.defer import Deferred, DeferredSemaphore, fail, gatherResults, succeed
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure

from tursi import config
from tursi.errors import FetchInterrupted, ShuttingDown
from tursi.footprint import Blueprint
from tursi.hub import blueprint, disk
from tursi.hub.fetch import Fetch, Running, Spawn
from tursi.model import CatalogueEntry, Progress, Reference, Resolution, Trust

__all__ = ["Hub", "Running", "Spawn"]

_COMMAND = (sys.executable, "-I", "-m", "tursi.fetcher")
_MAX_FETCHES = 4
"""Fetcher processes at a time; more of them wait."""
_DISK_SECONDS = 30.0
"""A look at the disk that takes longer is given up (a network disk that hangs)."""


class Hub:
    """Finds and downloads models.

    ``cache`` is a huggingface cache of our own. ``environment`` is what a
    fetcher gets besides what ``settings`` say; ``spawn`` starts one under a
    keeper: name, argv, environment, and who receives its frames.
    """

    def __init__(
        self,
        *,
        cache: Path,
        settings: config.Hub,
        environment: Mapping[str, str],
        spawn: Spawn,
        reactor: Any,
    ) -> None:
        self._cache = cache
        self._given = environment
        self.configure(settings)
        self._spawn = spawn
        self._reactor = reactor
        self._slots = DeferredSemaphore(_MAX_FETCHES)
        self._fetches: dict[tuple[Reference, Trust], Fetch] = {}
        # Those too that nobody waits for any more, until their process is gone.
        self._unfinished: set[Fetch] = set()
        self._stopped = False

    def configure(self, settings: config.Hub) -> None:
        """Go by these from the next download on."""
        self._stall_seconds = settings.stall_seconds
        self._environment = _fetcher_environment(self._cache, settings, self._given)

    def resolve(
        self,
        reference: Reference,
        progress: Callable[[Progress], None],
        trust: Trust = Trust(),  # noqa: B008 - a frozen value
    ) -> Deferred[Resolution]:
        """The folder with the model's files, downloaded first where need be.

        ``trust`` says what files it may have besides data. Who waits for the same
        files shares one download, which is cancelled with the last Deferred of its
        waiters. Fails with a ``LoadError`` about a folder, a ``FetchError`` about the
        hub, or ``ShuttingDown``.
        """
        if self._stopped:
            return fail(ShuttingDown())
        if reference.folder is not None:
            return self._in_thread(partial(disk.look, trust=trust), Path(reference.folder))
        fetch = self._fetches.get((reference, trust))
        if fetch is not None and not fetch.closed:
            return fetch.wait(progress)
        fetch = self._new(reference, trust)
        # In this order: a fetcher that can't be started fails at once.
        waiting = fetch.wait(progress)
        fetch.start()
        return waiting

    def catalogue(self) -> Deferred[list[CatalogueEntry]]:
        """The models in the cache, sorted by name."""
        return self._in_thread(disk.catalogue, self._cache)

    def remove(self, repository: str, commits: Collection[str]) -> Deferred[None]:
        """Remove these snapshots from the cache; fails with ``ModelInUse`` while it is fetched."""
        return self._in_thread(partial(_removed, repository, tuple(commits)), self._cache)

    def unfinished(self, repository: str) -> Deferred[list[str]]:
        """The commits of which only a part has been downloaded."""
        return self._in_thread(partial(_unfinished, repository), self._cache)

    def sweep(self, now: float) -> Deferred[None]:
        """Remove from the cache what broken off downloads and removals have left long ago."""
        return self._in_thread(partial(disk.sweep, now=now), self._cache)

    def lacks(self, resolution: Resolution) -> Deferred[bool]:
        """Whether files that were found are no longer there."""
        return self._in_thread(partial(disk.lacks, names=resolution.files), Path(resolution.folder))

    def blueprint(self, folder: str) -> Deferred[Blueprint]:
        """What the files in a folder tell of the model's size."""
        return self._in_thread(blueprint.read, Path(folder))

    def touch(self, folder: str) -> Deferred[None]:
        """Note that the model in ``folder`` is used now, if it is in the cache."""
        if not Path(folder).is_relative_to(self._cache):
            return succeed(None)
        return self._in_thread(disk.touch, Path(folder))

    def describe(self) -> list[str]:
        """What is being downloaded, in lines."""
        return [f"downloads {reference.repository}" for reference, _ in self._fetches]

    def stop(self) -> Deferred[None]:
        """Cancel every download; fires when no fetcher is left."""
        self._stopped = True
        ends: list[Deferred[None]] = []
        for fetch in tuple(self._unfinished):
            end: Deferred[None] = Deferred()
            fetch.at_end(partial(end.callback, None))
            ends.append(end)
            fetch.cancel(ShuttingDown())
        return gatherResults(ends).addCallback(lambda _: None)

    def _in_thread(self, function: Callable[[Path], Any], path: Path) -> Deferred[Any]:
        def slow(failure: Failure) -> Failure:
            failure.trap(defer.TimeoutError)
            return Failure(
                FetchInterrupted(f"The disk with {path} doesn't answer; is it a network disk?")
            )

        found = deferToThreadPool(self._reactor, self._reactor.getThreadPool(), function, path)
        return found.addTimeout(_DISK_SECONDS, self._reactor).addErrback(slow)

    def _new(self, reference: Reference, trust: Trust) -> Fetch:
        repository = reference.repository or ""
        arguments = [*_COMMAND, repository, reference.revision or "", str(self._cache)]
        if trust.allow_pickle:
            arguments.append("--allow-pickle")
        if trust.trust_remote_code:
            arguments.append("--trust-remote-code")
        # It names a log file too.
        name = "fetch-" + re.sub(r"[^A-Za-z0-9._-]+", "--", str(reference))[:200]
        fetch = Fetch(
            str(reference),
            lambda receive: self._spawn(name, tuple(arguments), self._environment, receive),
            slots=self._slots,
            stall_seconds=self._stall_seconds,
            reactor=self._reactor,
        )
        self._fetches[reference, trust] = fetch
        self._unfinished.add(fetch)

        def ended() -> None:
            self._unfinished.discard(fetch)
            if self._fetches.get((reference, trust)) is fetch:
                del self._fetches[reference, trust]

        fetch.at_end(ended)
        return fetch


def _removed(repository: str, commits: Collection[str], cache: Path) -> None:
    disk.remove(cache, repository, commits)


def _unfinished(repository: str, cache: Path) -> list[str]:
    return disk.unfinished(cache, repository)


def _fetcher_environment(
    cache: Path, settings: config.Hub, environment: Mapping[str, str]
) -> dict[str, str]:
    """What huggingface_hub in a fetcher reads; the file with settings goes first."""
    variables = {
        "HF_ENDPOINT": settings.endpoint,
        # xet keeps chunks and logs somewhere: not in the home of whoever runs the daemon.
        "HF_XET_CACHE": str(cache / "xet"),
        **environment,
        # Telemetry asks the hub for more than the model.
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if settings.endpoint != config.Hub().endpoint:
        variables["HF_ENDPOINT"] = settings.endpoint
    if settings.offline:
        variables["HF_HUB_OFFLINE"] = "1"
    if settings.token_file:
        # The daemon never reads the token, it only says where it is.
        variables.pop("HF_TOKEN", None)
        variables["HF_TOKEN_PATH"] = settings.token_file
    return variables
