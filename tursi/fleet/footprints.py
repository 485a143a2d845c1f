"""What workers need of memory: by their model's files, and by what has been measured of it.

Measurements belong to a model and to the way it is loaded, not to a deployment: they are
kept in the database, and hold for whoever deploys the same again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from tursi.errors import TursiError
from tursi.footprint import Blueprint, Terms, footprint, kind
from tursi.hub import Hub
from tursi.model import Build, Footprint, Loaded, LoadOrder, Measurement, Peaks, Resolution
from tursi.store import Store

log = Logger()

_MAX_MODELS = 1000
"""Folders whose files are remembered."""
_NEWS = 1.01
"""Times what was known: less than that is not worth a write."""


@dataclass(slots=True)
class _Model:
    """What is in a folder."""

    mark: str
    blueprint: Blueprint
    read: bool = False
    """Whether its files have been looked at."""
    of: Resolution | None = None
    """The last one that it was found to be."""
    waiting: list[Deferred[None]] = field(default_factory=list)


class Footprints:
    """Knows models by their folders; ``soon`` is called when something has been read.

    ``now`` gives UTC epoch seconds.
    """

    def __init__(
        self,
        *,
        store: Store,
        hub: Hub,
        now: Callable[[], float],
        soon: Callable[[], None],
    ) -> None:
        self._store = store
        self._hub = hub
        self._now = now
        self._soon = soon
        self._models: dict[str, _Model] = {}
        self._measured: dict[Build, Measurement] = {}
        self._unwritten: set[Build] = set()
        self._told: dict[tuple[LoadOrder, str], Footprint] = {}
        """What was reckoned since anything new was known."""

    async def open(self) -> None:
        """Remember what was measured under earlier daemons."""
        for found in await self._store.measurements():
            self._measured.setdefault(found.build, found)

    # -- files ---------------------------------------------------------------------

    def expect(self, resolution: Resolution) -> None:
        """There will be files of that size; nothing else is known of them."""
        mark = fingerprint(resolution)
        self._models[resolution.folder] = _Model(mark, Blueprint(resolution.size or 0), read=True)
        self._told.clear()

    def look(self, resolution: Resolution) -> Deferred[None]:
        """Have its files looked at; fires when that is done."""
        done: Deferred[None] = Deferred()
        if self.known(resolution):
            done.callback(None)
        else:
            self._models[resolution.folder].waiting.append(done)
        return done

    def known(self, resolution: Resolution) -> bool:
        """Whether its files have been looked at; if not, that begins now."""
        model = self._models.get(resolution.folder)
        if model is not None and model.of is resolution:
            return model.read
        mark = fingerprint(resolution)
        if model is None or model.mark != mark:
            while len(self._models) >= _MAX_MODELS:
                del self._models[next(iter(self._models))]
            model = self._models[resolution.folder] = _Model(mark, Blueprint(resolution.size or 0))
            self._told.clear()
            self._hub.blueprint(resolution.folder).addCallbacks(
                lambda found, model=model: self._read(model, found),
                lambda failure, model=model: self._unread(model, failure),
            )
        model.of = resolution
        return model.read

    def _read(self, model: _Model, found: Blueprint) -> None:
        if found.size or not model.blueprint.size:
            model.blueprint = found
        self._done(model)

    def _unread(self, model: _Model, failure: Failure) -> None:
        # Its size is known, and the load will tell what is wrong.
        log.debug("headers can't be read: {error}", error=failure.getErrorMessage())
        self._done(model)

    def _done(self, model: _Model) -> None:
        model.read = True
        self._told.clear()
        waiting, model.waiting = model.waiting, []
        for each in waiting:
            each.callback(None)
        self._soon()

    # -- what is needed ------------------------------------------------------------

    def of(self, order: LoadOrder, device: str) -> Footprint:
        """What a worker that is told this needs on such a device."""
        told = self._told.get((order, device))
        if told is None:
            if len(self._told) >= _MAX_MODELS:
                self._told.clear()
            told = self._told[order, device] = self._reckon(order, device)
        return told

    def _reckon(self, order: LoadOrder, device: str) -> Footprint:
        model = self._models.get(order.folder)
        blueprint = model.blueprint if model else Blueprint(0)
        found = self._measured.get(self._build(order, device))
        terms = Terms(
            dtype=order.dtype,
            quantization=order.quantization,
            task=order.task,
            max_batch_tokens=order.max_batch_tokens,
            max_sequences=order.max_sequences,
        )
        if found is None:
            return footprint(blueprint, terms, device)
        return footprint(blueprint, terms, device, found.host, found.gpu)

    def load_seconds(self, order: LoadOrder, device: str) -> float | None:
        """What the last load of it took."""
        found = self._measured.get(self._build(order, device))
        return found.load_seconds if found else None

    # -- what was measured ---------------------------------------------------------

    def loaded(
        self, order: LoadOrder, device: str, loaded: Loaded, seen: Peaks, seconds: float | None
    ) -> None:
        """A worker is ready; ``seen`` is what counts of host memory if it doesn't say itself."""
        host = loaded.host if loaded.host.highest is not None else seen
        gpu = _together(loaded.gpus.values())
        for build in self._builds(order, device, loaded):
            self._learn(build, host, gpu, seconds)

    def busy(
        self, order: LoadOrder, device: str, loaded: Loaded, host: int | None, gpu: int | None
    ) -> None:
        """What a worker has had while it served."""
        for build in self._builds(order, device, loaded):
            self._learn(build, Peaks(busy=host), Peaks(busy=gpu), None)

    async def write(self) -> None:
        """Keep what is new."""
        builds, self._unwritten = self._unwritten, set()
        if not builds:
            return
        try:
            await self._store.put_measurements([self._measured[build] for build in builds])
        except TursiError as error:
            log.warn("measurements wait for the database: {message}", message=error.message)
            self._unwritten |= builds

    def _learn(self, build: Build, host: Peaks, gpu: Peaks, seconds: float | None) -> None:
        was = self._measured.get(build, Measurement(build))
        new = replace(
            was,
            host=_news(was.host, host),
            gpu=_news(was.gpu, gpu),
            load_seconds=was.load_seconds if seconds is None else seconds,
        )
        if new != was:
            self._measured[build] = replace(new, at=self._now())
            self._told.clear()
            self._unwritten.add(build)

    def _builds(self, order: LoadOrder, device: str, loaded: Loaded) -> set[Build]:
        """As it was asked for, and as somebody may ask who names what came of that."""
        asked = self._build(order, device)
        return {
            replace(asked, dtype=dtype, task=task)
            for dtype in (asked.dtype, loaded.dtype)
            for task in (asked.task, loaded.task)
        }

    def _build(self, order: LoadOrder, device: str) -> Build:
        model = self._models.get(order.folder)
        return Build(
            model=model.mark if model else order.folder,
            device=kind(device),
            dtype=order.dtype,
            task=order.task or "",
            quantization=order.quantization,
            max_batch_tokens=order.max_batch_tokens,
            max_sequences=order.max_sequences,
            threads=order.threads,
        )


def fingerprint(resolution: Resolution) -> str:
    """What measurements of a model are kept by: its commit, or what its folder looks like."""
    if resolution.commit is not None:
        return resolution.commit
    text = "\0".join((resolution.folder, str(resolution.size), *resolution.files))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _news(was: Peaks, seen: Peaks) -> Peaks:
    """The greater of both, but for what is hardly more."""
    grown = was | seen
    return Peaks(
        *(
            new if old is None or new is None or new > old * _NEWS else old
            for old, new in (
                (was.load, grown.load),
                (was.warm, grown.warm),
                (was.busy, grown.busy),
            )
        )
    )


def _together(peaks: Iterable[Peaks]) -> Peaks:
    """Of several GPUs, which share a model."""
    found = list(peaks)
    return Peaks(
        _sum(each.load for each in found),
        _sum(each.warm for each in found),
        _sum(each.busy for each in found),
    )


def _sum(sizes: Iterable[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return sum(known) if known else None
