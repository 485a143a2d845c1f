"""Signals: none of them kills by accident, from the first moment to the last.

What a signal asks for is done in a turn of the reactor of its own, so it never
comes between the steps of anything: an upgrade of the database, the switch to
another generation.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from twisted.logger import Logger

log = Logger()

_SOFT = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What would kill a process that doesn't know of them, and never shall."""
_SOFTWARE = 70
_LAST_WORDS_SECONDS = 5.0

_held: list[int] = []


def hold() -> None:
    """Keep signals for later: it isn't known yet what to do about them."""

    def handler(number: int, _frame: FrameType | None) -> None:
        if number not in _held:
            _held.append(number)

    for number in _SOFT:
        signal.signal(number, handler)
    _hold_quit()


def _hold_quit() -> None:
    # In every thread, as those to come inherit it: one thread waits for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGQUIT})
    # What is ignored could not be waited for.
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


class Signals:
    """What each signal does: ``actions`` by number, called in a turn of ``reactor``.

    ``at_once`` is called in the handler itself, with the number.
    """

    def __init__(
        self,
        reactor: Any,
        actions: Mapping[int, Callable[[], None]],
        at_once: Callable[[int], None] = lambda _number: None,
    ) -> None:
        self._reactor = reactor
        self._actions = actions
        self._at_once = at_once
        self._waiting = False

    def install(self) -> None:
        """Take them, and those that were held; again when the reactor has taken some of them."""
        for number in self._actions:
            signal.signal(number, self._handle)
        _hold_quit()
        if not self._waiting:
            self._waiting = True
            threading.Thread(target=_wait_for_quit, daemon=True, name="SIGQUIT").start()
        held = _held[:]
        _held.clear()
        for number in held:
            self._handle(number, None)

    def ignore(self) -> None:
        """Nothing is left to do but to end, and that goes on whatever comes."""
        for number in self._actions:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._at_once(number)
        self._reactor.callFromThread(self._actions[number])


class LastResort:
    """Ends the process when its orderly end takes too long, with the stacks in the log."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def begin(self, seconds: float) -> None:
        """From now on the process has so long to end; the first word counts."""
        if self._thread is None:
            self._thread = threading.Thread(target=_end_after, args=(seconds,), daemon=True)
            self._thread.start()


def _end_after(seconds: float) -> None:
    time.sleep(seconds)
    # The log may be what hangs.
    telling = threading.Thread(target=_tell_stacks, daemon=True)
    telling.start()
    telling.join(_LAST_WORDS_SECONDS)
    os._exit(_SOFTWARE)


def _wait_for_quit() -> None:
    """Tell where every thread stands at each SIGQUIT.

    In a thread of its own, which runs even while the main thread is held in a call
    of the system. Done by C code in a signal handler, it would read the stacks of
    threads that run, and now and then crash.
    """
    while True:
        signal.sigwait({signal.SIGQUIT})
        _tell_stacks()


def _tell_stacks() -> None:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = [
        f"thread {names.get(number, number)}\n{''.join(traceback.format_stack(frame))}"
        for number, frame in sys._current_frames().items()  # noqa: SLF001 - the documented way
    ]
    log.info("{stacks}", stacks="\n".join(["where every thread stands", *stacks]))
