"""Why a worker's life ended, decided purely from the evidence."""

from __future__ import annotations

import hashlib
import signal
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from tursi.errors import FetchError, LoadError, TursiError, by_code
from tursi.model import FailureClass, mebibytes
from tursi.wire import LastWords

ENVIRONMENT_SECONDS = 300.0
"""Between two looks whether a device has come."""
RESOURCE_SECONDS = 60.0
"""Between two looks whether there is memory."""
HOST_SECONDS = 5.0
"""Before the host is asked again for what it had refused (descriptors, processes)."""


class Policy(Enum):
    """What to do after a life."""

    ASKED = auto()
    """It was asked to end: nothing has failed."""
    COUNT = auto()
    """Back off; too many of these in a row end in quarantine."""
    WAIT = auto()
    """Back off for as long as it takes: trying does no harm and may succeed."""
    GIVE_UP = auto()
    """Trying again can't help."""


@dataclass(frozen=True, slots=True)
class Intent:
    """Why the daemon itself ends a worker; recorded before any signal is sent."""

    name: str
    reason: str
    failure: FailureClass | None = None
    """``None`` where somebody asked for it."""
    permanent: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a life ended, and how to go on."""

    policy: Policy
    reason: str
    """One sentence, for people."""
    failure: FailureClass | None = None
    wait: float = 0.0
    """Seconds to wait at least (WAIT)."""
    digest: str = ""
    """Of the traceback with which loading failed, if it did."""


class Refusal(Protocol):
    """Why a worker could not be started (``supervision.life.Refusal``)."""

    @property
    def message(self) -> str:
        """One clause, as the system has it."""


class Ending(Protocol):
    """What is known of the process's end (``supervision.life.Exit``)."""

    @property
    def exit_status(self) -> int | None:
        """Of a process that has exited."""

    @property
    def signal(self) -> int | None:
        """That killed the process."""

    @property
    def peak_rss(self) -> int | None:
        """Bytes."""

    @property
    def reported(self) -> bool:
        """Whether the keeper could tell."""

    @property
    def refusal(self) -> Refusal | None:
        """Why there never was a worker."""


_STATUSES: dict[int, tuple[Policy, FailureClass, str]] = {
    # sysexits.h, as far as it goes; LoadError.exit_status uses the same numbers.
    64: (Policy.GIVE_UP, FailureClass.CONFIGURATION, "it was started wrongly"),
    65: (Policy.GIVE_UP, FailureClass.WEIGHTS, "the weights are damaged or don't fit the model"),
    66: (Policy.GIVE_UP, FailureClass.NOT_FOUND, "files of the model are missing"),
    69: (Policy.WAIT, FailureClass.ENVIRONMENT, "the device isn't there"),
    70: (Policy.COUNT, FailureClass.SOFTWARE, "an unexpected error"),
    71: (Policy.WAIT, FailureClass.RESOURCE, "there isn't enough memory"),
    75: (Policy.WAIT, FailureClass.TRANSIENT, "something it needs is away for the moment"),
    77: (Policy.GIVE_UP, FailureClass.REFUSED, "the model isn't allowed"),
    78: (Policy.GIVE_UP, FailureClass.CONFIGURATION, "the model can't be served as configured"),
    86: (Policy.COUNT, FailureClass.GPU_CONTEXT, "the GPU's context is lost"),
    127: (Policy.WAIT, FailureClass.HOST, "its program can't be run"),
}
_WAITS = {
    FailureClass.ENVIRONMENT: ENVIRONMENT_SECONDS,
    FailureClass.RESOURCE: RESOURCE_SECONDS,
    FailureClass.HOST: HOST_SECONDS,
}
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGTRAP}


def classify(
    ending: Ending,
    intent: Intent | None,
    last_words: LastWords | None,
    *,
    loading: bool,
    out_of_memory: bool = False,
    limit: int | None = None,
) -> Verdict:
    """Why a worker ended.

    ``loading`` says that it was never ready, ``out_of_memory`` that the kernel
    has killed something for want of memory just now, ``limit`` to how many bytes
    the kernel has held it.
    """
    if intent is not None:
        return _intended(intent)
    if ending.refusal is not None:
        return not_spawned(OSError(ending.refusal.message))
    if last_words is not None:
        return _said(ending, last_words, loading=loading)
    if ending.signal is not None:
        return _signalled(
            ending, ending.signal, loading=loading, out_of_memory=out_of_memory, limit=limit
        )
    if ending.exit_status is not None:
        return _exited(ending.exit_status)
    return Verdict(
        Policy.COUNT,
        "the keeper was killed and the worker with it"
        if not ending.reported
        else "how the worker ended isn't known",
        FailureClass.EXTERNAL_KILL,
    )


def failure_class(error: TursiError) -> FailureClass | None:
    """The class of a failure that the daemon itself met while it looked for the files."""
    status = getattr(error, "exit_status", None)
    return _STATUSES[status][1] if status in _STATUSES else None


def not_spawned(error: Exception) -> Verdict:
    """The verdict where no process came to be."""
    what = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return Verdict(
        Policy.WAIT, f"the worker couldn't be started: {what}", FailureClass.HOST, HOST_SECONDS
    )


def _intended(intent: Intent) -> Verdict:
    if intent.failure is None:
        return Verdict(Policy.ASKED, intent.reason)
    policy = Policy.GIVE_UP if intent.permanent else Policy.COUNT
    return Verdict(policy, intent.reason, intent.failure)


def _said(ending: Ending, words: LastWords, *, loading: bool) -> Verdict:
    error = by_code().get(words.code)
    status = ending.exit_status
    if status not in _STATUSES:
        # It was killed before it could exit, or exits otherwise: its word counts.
        known = isinstance(error, type) and issubclass(error, (LoadError, FetchError))
        status = error.exit_status if known else 70  # type: ignore[union-attr] # narrowed by known
    policy, failure, _ = _STATUSES[status]
    digest = ""
    if failure is FailureClass.SOFTWARE and loading and words.traceback:
        digest = hashlib.sha256(words.traceback.encode("utf-8", "replace")).hexdigest()
    return Verdict(policy, words.message, failure, _WAITS.get(failure, 0.0), digest)


def _exited(status: int) -> Verdict:
    if status in _STATUSES:
        policy, failure, meaning = _STATUSES[status]
        reason = f"the worker ended with exit status {status}: {meaning}"
        return Verdict(policy, reason, failure, _WAITS.get(failure, 0.0))
    failure = FailureClass.TRANSIENT if status == 0 else FailureClass.SOFTWARE
    return Verdict(Policy.COUNT, f"the worker ended by itself with exit status {status}", failure)


def too_much(limit: int, peak: int | None) -> str:
    """The reason where a worker wanted more memory than it may have."""
    sentence = f"out of memory: it needs more than its limit of {mebibytes(limit)}"
    return sentence if peak is None else f"{sentence} (peak {mebibytes(peak)})"


def _signalled(
    ending: Ending, number: int, *, loading: bool, out_of_memory: bool, limit: int | None
) -> Verdict:
    try:
        name = f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL and out_of_memory:
        if limit is not None:
            reason = too_much(limit, ending.peak_rss)
        else:
            reason = "out of memory: the kernel killed the worker"
            if ending.peak_rss is not None:
                reason += f"; it had used up to {ending.peak_rss / 2**30:.1f} GiB"
        if loading and limit is None:
            # Others had the memory: there may be enough another time, and the fleet looks first.
            return Verdict(Policy.WAIT, reason, FailureClass.OUT_OF_MEMORY, RESOURCE_SECONDS)
        return Verdict(Policy.COUNT, reason, FailureClass.OUT_OF_MEMORY)
    if number == signal.SIGILL:
        return Verdict(
            Policy.GIVE_UP,
            f"crashed with {name}: the installed libraries need another CPU",
            FailureClass.PERMANENT,
        )
    if number in _CRASHES:
        hint = ": look for a full disk or /dev/shm" if number == signal.SIGBUS else ""
        return Verdict(Policy.COUNT, f"crashed with {name}{hint}", FailureClass.CRASH)
    return Verdict(Policy.COUNT, f"killed by {name} from outside", FailureClass.EXTERNAL_KILL)
