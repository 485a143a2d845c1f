"""NVIDIA's GPUs here: how much memory each has, how much of it is free, and who has the rest.

The driver is asked through NVML in a thread, for it may hang; what was learnt last is
there at once. Without the driver, or with a torch that can't use it, there are no GPUs.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from tursi.model import Gpu

log = Logger()

SECONDS = 1.0
"""Between two looks."""
ABSENT_SECONDS = 60.0
"""The same where there is no driver, which may come."""
DEADLINE = 5.0
"""Seconds after which a look that hasn't ended says that nothing is known."""


class Gpus:
    """Looks at the GPUs from ``start`` to ``stop``.

    ``environment`` says which of them workers see; ``library`` gives the module that
    asks the driver, ``in_thread`` runs a function in a thread of its own.
    """

    def __init__(
        self,
        reactor: Any,
        environment: Mapping[str, str],
        *,
        library: Callable[[], Any] | None = None,
        in_thread: Callable[[Any, Callable[[], Any]], Deferred[Any]] | None = None,
    ) -> None:
        self._reactor = reactor
        self._visible = environment.get("CUDA_VISIBLE_DEVICES")
        self._library = library or _library
        self._in_thread = in_thread or _in_thread
        self._found: tuple[Gpu, ...] = ()
        self._late = False
        self._running = False
        self._driver: Any = None
        self._timer: IDelayedCall | None = None
        self._deadline: IDelayedCall | None = None
        self._changed: Callable[[], None] = lambda: None

    @property
    def latest(self) -> Sequence[Gpu]:
        """As they were a moment ago; with nothing free while the driver doesn't answer."""
        if not self._late:
            return self._found
        return tuple(
            Gpu(each.device, each.name, each.total, 0, each.processes) for each in self._found
        )

    @property
    def trouble(self) -> str | None:
        """What keeps it from knowing more, in a sentence."""
        if not self._late:
            return None
        return f"NVIDIA's driver hasn't answered for {DEADLINE:.0f} s; nothing is loaded on GPUs."

    def start(self, changed: Callable[[], None]) -> None:
        """Look now and go on; ``changed`` is called when there is something new."""
        self._changed, self._running = changed, True
        self._look()

    def stop(self) -> None:
        """Look no more."""
        self._running = False
        for timer in (self._timer, self._deadline):
            if timer is not None and timer.active():
                timer.cancel()

    def _look(self) -> None:
        self._deadline = self._reactor.callLater(DEADLINE, self._is_late)
        self._in_thread(self._reactor, self._read).addCallbacks(self._read_, self._failed)

    def _is_late(self) -> None:
        self._late = True
        if self._found:
            log.warn("{trouble}", trouble=self.trouble)
            self._changed()

    def _read_(self, found: tuple[Gpu, ...]) -> None:
        self._learn(found, SECONDS if found else ABSENT_SECONDS)

    def _failed(self, failure: Failure) -> None:
        log.debug("there are no GPUs: {error}", error=failure.getErrorMessage())
        self._driver = None
        self._learn((), ABSENT_SECONDS)

    def _learn(self, found: tuple[Gpu, ...], again: float) -> None:
        if not self._running:
            return
        if self._deadline is not None and self._deadline.active():
            self._deadline.cancel()
        new = self._late or found != self._found
        self._found, self._late = found, False
        self._timer = self._reactor.callLater(again, self._look)
        if new:
            self._changed()

    # -- in a thread ---------------------------------------------------------------

    def _read(self) -> tuple[Gpu, ...]:
        if self._driver is None:
            driver = self._library()
            driver.nvmlInit()
            self._driver = driver
        driver = self._driver
        return tuple(
            _gpu(driver, f"cuda:{number}", handle)
            for number, handle in enumerate(_handles(driver, self._visible))
        )


def _handles(driver: Any, visible: str | None) -> list[Any]:
    """Those that workers see, in their order (by the bus, as ``CUDA_DEVICE_ORDER`` says)."""
    here = [driver.nvmlDeviceGetHandleByIndex(each) for each in range(driver.nvmlDeviceGetCount())]
    if visible is None:
        return here
    chosen = []
    for word in (each.strip() for each in visible.split(",")):
        found = _chosen(driver, here, word)
        if found is None:
            # CUDA too takes those before the first that it can't find.
            break
        chosen.append(found)
    return chosen


def _chosen(driver: Any, here: Sequence[Any], word: str) -> Any | None:
    if word.isascii() and word.isdigit():
        return here[int(word)] if int(word) < len(here) else None
    if word.startswith("MIG-"):
        try:
            return driver.nvmlDeviceGetHandleByUUID(word)
        except driver.NVMLError:
            return None
    if not word.startswith("GPU-"):
        return None
    return next((each for each in here if driver.nvmlDeviceGetUUID(each).startswith(word)), None)


def _gpu(driver: Any, device: str, handle: Any) -> Gpu:
    try:
        memory = driver.nvmlDeviceGetMemoryInfo(handle)
        name = str(driver.nvmlDeviceGetName(handle))
    except driver.NVMLError as error:
        # One that has fallen off the bus; the others keep their numbers.
        log.debug("{device} can't be asked: {error}", device=device, error=str(error))
        return Gpu(device, "", 0, 0)
    try:
        processes = driver.nvmlDeviceGetComputeRunningProcesses(handle)
    except driver.NVMLError:
        processes = []
    used: dict[int, int] = {}
    for each in processes:
        # In some containers the driver tells no sizes.
        used[int(each.pid)] = used.get(int(each.pid), 0) + int(each.usedGpuMemory or 0)
    return Gpu(device, name, int(memory.total), int(memory.free), used)


def _library() -> Any:
    if not torch_uses_them():
        raise ImportError("the installed torch is built for the processor only")
    return importlib.import_module("pynvml")


def torch_uses_them() -> bool:
    """Whether the torch that workers import may be able to, by its version."""
    try:
        return not metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return True


def _in_thread(reactor: Any, function: Callable[[], Any]) -> Deferred[Any]:
    """Run ``function`` in a thread that nobody waits for at the end."""
    done: Deferred[Any] = Deferred()

    def run() -> None:
        try:
            result: Any = function()
        except BaseException:  # noqa: BLE001 - whatever it is, it is told
            result = Failure()
        # The reactor may have gone.
        with suppress(Exception):
            reactor.callFromThread(done.callback, result)

    # Threads of a pool are waited for when the daemon stops.
    threading.Thread(target=run, name="gpus", daemon=True).start()
    return done
