"""What the machine is told, and what it has done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tursi.lifecycle.verdict import Intent, Verdict
from tursi.model import Phase


class Timer(Protocol):
    """A pending call (``IDelayedCall``)."""

    def cancel(self) -> None:
        """Don't call any more."""

    def active(self) -> bool:
        """Whether the call is still to come."""


class Clock(Protocol):
    """Monotonic time (``IReactorTime``)."""

    def seconds(self) -> float:
        """Now, in seconds."""

    def callLater(self, delay: float, callable: Callable[..., object], *args: object) -> Timer:  # noqa: A002, N802 - Twisted's name
        """Call after ``delay`` seconds."""


class Effects(Protocol):
    """What the machine has done; all of it asynchronous: no input is called from inside."""

    def announce(self, phase: Phase, cause: str) -> None:
        """The worker is in ``phase`` now, because of ``cause`` (one clause)."""

    def spawn(self) -> None:
        """Start the process; ``hello`` or ``exited`` follows."""

    def drain(self) -> None:
        """Take nothing new; ``drained`` follows once nothing is in flight."""

    def terminate(self) -> None:
        """SIGTERM."""

    def kill(self) -> None:
        """SIGKILL to the whole tree."""

    def intend(self, intent: Intent) -> None:
        """Record why what comes next is done; always before it is done."""

    def examine(self) -> None:
        """Have the worker write down where its threads stand; ``examined`` may follow."""

    def settle(self) -> None:
        """Wait for the memory of the dead process; ``settled`` follows."""

    def retry(self, seconds: float) -> None:
        """Call ``retry`` after that time, unless the worker is stopped before."""


class Lifecycle(Protocol):
    """The inputs. ``cause`` is one clause for people."""

    # -- wishes
    def start(self, cause: str, /) -> None:
        """It shall run."""

    def admit(self, cause: str, /) -> None:
        """It may spawn now."""

    def stop(self, cause: str, /) -> None:
        """It shall end, after what is in flight."""

    def restart(self, cause: str, /) -> None:
        """It shall end, after what is in flight, and come back."""

    def reset(self, cause: str, /) -> None:
        """Forget earlier failures, and try again if it had given up."""

    # -- what the worker says and does
    def hello(self, cause: str, /) -> None:
        """The worker speaks our protocol."""

    def advanced(self, cause: str, /) -> None:
        """Loading has come further."""

    def warming(self, cause: str, /) -> None:
        """The model is loaded and being tried out."""

    def loaded(self, cause: str, /) -> None:
        """The model can serve."""

    def missed(self, cause: str, /) -> None:
        """A sign of life is missing."""

    def answered(self, cause: str, /) -> None:
        """It gives every sign of life."""

    def hung(self, cause: str, /) -> None:
        """Signs of life have been missing for too long."""

    def examined(self, cause: str, /) -> None:
        """It is known where its threads stand, or there was no time left to tell."""

    def drained(self, cause: str, /) -> None:
        """Nothing is in flight."""

    def failing(self, cause: str, /) -> None:
        """The worker has said its last words and is about to exit."""

    def lost(self, cause: str, /) -> None:
        """The data socket has closed."""

    def exceeded(self, cause: str, /) -> None:
        """The worker has taken more memory than it may have."""

    def broke(self, cause: str, /) -> None:
        """The worker broke the protocol."""

    def incompatible(self, cause: str, /) -> None:
        """The worker speaks another version of the protocol."""

    def exited(self, verdict: Verdict, /) -> None:
        """The whole process tree is gone, or never came to be."""

    def settled(self, cause: str, /) -> None:
        """Its memory is free again."""

    # -- timers
    def expired(self, cause: str, /) -> None:
        """The state's own timer."""

    def retry(self, cause: str, /) -> None:
        """The time of back-off or quarantine is over."""

    # -- decisions of the machine itself
    def rest(self, cause: str, /) -> None:
        """Nobody wants it to run."""

    def requeue(self, cause: str, /) -> None:
        """Come back at once."""

    def back_off(self, cause: str, /) -> None:
        """Come back later."""

    def quarantine(self, cause: str, /) -> None:
        """Come back for a single try, much later."""

    def give_up(self, cause: str, /) -> None:
        """Don't come back."""
