"""Where models come from: folders on disk, archives, and the hub by way of the fetcher process."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from twisted.internet import defer
from twisted.internet.defer import Deferred, DeferredSemaphore, fail, gatherResults, succeed
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure

from tursi import config
from tursi.archive import File, Manifest
from tursi.errors import FetchInterrupted, FilesUnavailable, ModelRefused, ShuttingDown
from tursi.footprint import Blueprint
from tursi.hub import blueprint, card, disk, exports, imports
from tursi.hub.exports import Found
from tursi.hub.fetch import Fetch, Running, Spawn
from tursi.hub.imports import Place, Room, Staging
from tursi.model import CatalogueEntry, ModelCard, Progress, Reference, Resolution, Trust

__all__ = ["Found", "Hub", "Room", "Running", "Spawn", "Staging"]

_COMMAND = (sys.executable, "-I", "-m", "tursi.fetcher")
_MAX_FETCHES = 4
"""Fetcher processes at a time; more of them wait."""
_MAX_LOOKS = 2
"""Those that only ask the hub what there is."""
_LOOK_SECONDS = 20.0
"""A hub that hasn't told within that time isn't waited for: somebody waits for the answer."""
_DISK_SECONDS = 30.0
"""A look at the disk that takes longer is given up (a network disk that hangs)."""
_STEP_SECONDS = 300.0
"""A step of an import or export that takes longer is given up."""

T = TypeVar("T")


class _Errand:
    """What fetchers are sent for: to download, or only to look what there is."""

    def __init__(
        self, name: str, options: tuple[str, ...], at_once: int, stall_seconds: float
    ) -> None:
        self.name = name
        """With which names of its fetchers begin."""
        self.options = options
        self.slots = DeferredSemaphore(at_once)
        self.stall_seconds = stall_seconds
        self.going: dict[tuple[Reference, Trust], Fetch] = {}


class Hub:
    """Finds, downloads, imports and exports models.

    ``cache`` is a huggingface cache of our own, ``imported`` the folder for models that
    were imported and aren't of the hub. ``environment`` is what a
    fetcher gets besides what ``settings`` say; ``spawn`` starts one under a
    keeper: name, argv, environment, and who receives its frames.
    """

    def __init__(
        self,
        *,
        cache: Path,
        imported: Path,
        settings: config.Hub,
        environment: Mapping[str, str],
        spawn: Spawn,
        reactor: Any,
    ) -> None:
        self._cache = cache
        self._imported = imported
        self._given = environment
        self._downloads = _Errand("fetch", (), _MAX_FETCHES, settings.stall_seconds)
        self._looks = _Errand("look", ("--look",), _MAX_LOOKS, _LOOK_SECONDS)
        self.configure(settings)
        self._spawn = spawn
        self._reactor = reactor
        # Those too that nobody waits for any more, until their process is gone.
        self._unfinished: set[Fetch] = set()
        self._stopped = False

    def configure(self, settings: config.Hub) -> None:
        """Go by these from the next download on."""
        self._downloads.stall_seconds = settings.stall_seconds
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
        return self._wait(self._downloads, reference, trust, progress)

    def look(self, reference: Reference, trust: Trust) -> Deferred[Resolution]:
        """The commit and the size of the weights on the hub, of which nothing is downloaded.

        Fails with a ``FetchError`` about the hub, or ``ShuttingDown``.
        """
        if self._stopped:
            return fail(ShuttingDown())
        return self._wait(self._looks, reference, trust, lambda _: None)

    def _wait(
        self,
        errand: _Errand,
        reference: Reference,
        trust: Trust,
        progress: Callable[[Progress], None],
    ) -> Deferred[Resolution]:
        """What a fetcher brings that is on that errand already, or is sent on it."""
        fetch = errand.going.get((reference, trust))
        if fetch is not None and not fetch.closed:
            return fetch.wait(progress)
        fetch = self._new(errand, reference, trust)
        # In this order: a fetcher that can't be started fails at once.
        waiting = fetch.wait(progress)
        fetch.start()
        return waiting

    def catalogue(self) -> Deferred[list[CatalogueEntry]]:
        """The models in the cache, sorted by name, then those that were imported."""
        return self._in_thread(
            lambda cache: [*disk.catalogue(cache), *disk.imported(self._imported)], self._cache
        )

    def is_imported(self, folder: str) -> bool:
        """Whether a folder is that of an import, which may be deleted."""
        return Path(folder).parent == self._imported

    def discard(self, folder: str) -> Deferred[None]:
        """Remove the folder of an import."""
        return self._in_thread(partial(disk.discard, name=Path(folder).name), self._imported)

    def remove(self, repository: str, commits: Collection[str]) -> Deferred[None]:
        """Remove these snapshots from the cache; fails with ``ModelInUse`` while it is fetched."""
        return self._in_thread(partial(_removed, repository, tuple(commits)), self._cache)

    def commit(self, repository: str, revision: str) -> Deferred[str]:
        """The commit that a branch or tag was when it was last fetched, else ``revision``."""
        find = partial(disk.commit, repository=repository, revision=revision)
        return self._in_thread(find, self._cache)

    def unfinished(self, repository: str) -> Deferred[list[str]]:
        """The commits of which only a part has been downloaded."""
        return self._in_thread(partial(_unfinished, repository), self._cache)

    def sweep(self, now: float) -> Deferred[None]:
        """Remove what broken off downloads and removals have left long ago, and killed imports."""

        def clear(cache: Path) -> None:
            for root in (cache, self._imported):
                imports.sweep(root)
            disk.sweep(cache, now)

        return self._in_thread(clear, self._cache)

    def lacks(self, resolution: Resolution) -> Deferred[bool]:
        """Whether files that were found are no longer there."""
        return self._in_thread(partial(disk.lacks, names=resolution.files), Path(resolution.folder))

    def blueprint(self, folder: str) -> Deferred[Blueprint]:
        """What the files in a folder tell of the model's size."""
        return self._in_thread(blueprint.read, Path(folder))

    def card(self, folder: str) -> Deferred[ModelCard]:
        """What the files in a folder tell of the model; fails with ``FilesUnavailable``."""

        def unreadable(failure: Failure) -> Failure:
            failure.trap(OSError, ModelRefused)
            return Failure(
                FilesUnavailable(
                    f"The files in {folder} can't be read: {failure.getErrorMessage()}"
                )
            )

        return self._in_thread(card.read, Path(folder)).addErrback(unreadable)

    def touch(self, folder: str) -> Deferred[None]:
        """Note that the model in ``folder`` is used now, if it is in the cache."""
        if not (Path(folder).is_relative_to(self._cache) or self.is_imported(folder)):
            return succeed(None)
        return self._in_thread(disk.touch, Path(folder))

    # -- archives ------------------------------------------------------------------

    def exportable(self, model: str, folder: str, trust: Trust) -> Deferred[list[Found]]:
        """The files that ``model`` needs of ``folder``; ``FilesUnavailable``."""
        return self.step(exports.find, model, Path(folder), trust)

    def archive(
        self, found: Sequence[Found], describe: Callable[[Sequence[File]], Manifest]
    ) -> Iterator[bytes]:
        """The archive of these files, piece by piece, each to be taken in a thread."""
        return exports.pieces(found, describe)

    def room(self, manifest: Manifest) -> Deferred[Room]:
        """What importing that would take of the disk; ``DiskFull``."""
        return self.step(self._place(manifest).room)

    def stage(self, manifest: Manifest) -> Deferred[Staging]:
        """Where the files of an import go until all are there; its methods block."""
        return self.step(Staging, self._place(manifest))

    def step(self, function: Callable[..., T], *arguments: Any) -> Deferred[T]:
        """What that gives, from a thread."""
        pool = self._reactor.getThreadPool()
        done: Deferred[T] = deferToThreadPool(self._reactor, pool, function, *arguments)
        return done.addTimeout(_STEP_SECONDS, self._reactor).addErrback(_slow)

    def _place(self, manifest: Manifest) -> Place:
        return Place(manifest, self._cache, self._imported)

    def describe(self) -> list[str]:
        """What is being downloaded, in lines."""
        return [f"downloads {reference.repository}" for reference, _ in self._downloads.going]

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

    def _new(self, errand: _Errand, reference: Reference, trust: Trust) -> Fetch:
        repository = reference.repository or ""
        arguments = [*_COMMAND, repository, reference.revision or "", str(self._cache)]
        if trust.allow_pickle:
            arguments.append("--allow-pickle")
        if trust.trust_remote_code:
            arguments.append("--trust-remote-code")
        arguments += errand.options
        # It names a log file too.
        name = f"{errand.name}-" + re.sub(r"[^A-Za-z0-9._-]+", "--", str(reference))[:200]
        fetch = Fetch(
            str(reference),
            lambda receive: self._spawn(name, tuple(arguments), self._environment, receive),
            slots=errand.slots,
            stall_seconds=errand.stall_seconds,
            reactor=self._reactor,
        )
        errand.going[reference, trust] = fetch
        self._unfinished.add(fetch)

        def ended() -> None:
            self._unfinished.discard(fetch)
            if errand.going.get((reference, trust)) is fetch:
                del errand.going[reference, trust]

        fetch.at_end(ended)
        return fetch


def _slow(failure: Failure) -> Failure:
    failure.trap(defer.TimeoutError)
    return Failure(
        FetchInterrupted(f"The disk has not answered within {_STEP_SECONDS:.0f} s; try again.")
    )


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
