"""How a deployment comes up, shown as it happens."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Self, TypeAlias

from tursi.cli.connection import Connection, Exit, Failure, path
from tursi.cli.terminal import duration, local_time, note, safe, size
from tursi.model import Desired, Load, Phase

POLL_SECONDS = 0.25
_WINDOW_SECONDS = 10.0
"""What a rate is taken over."""
_POINT_SECONDS = 0.1
LINE_SECONDS = 5.0
"""Between two plain lines about the same stage."""

_STAGES: Mapping[str, str] = {
    "resolve": "asking the hub",
    "download": "fetching",
    "verify": "checking what has come",
    "import": "starting the worker",
    "read": "reading the weights",
    "load": "loading",
    "measure": "comparing with the unquantized model",
    "quantize": "quantizing",
    "warm": "warming up",
}
_PHASES: Mapping[str, str] = {
    Phase.QUEUED: "waiting for its turn",
    Phase.SPAWNING: "starting the worker",
    # Until it tells how far it is, it imports what it needs.
    Phase.LOADING: "starting the worker",
    Phase.WARMING: "warming up",
}
GIVEN_UP = {Phase.FAILED, Phase.QUARANTINED, Phase.WEDGED}


class Verdict(Enum):
    """What a look at a deployment says about waiting for it."""

    READY = auto()
    COMING = auto()
    FAILED = auto()
    STOPPED = auto()


@dataclass(frozen=True, slots=True)
class Look:
    """A deployment at one moment; ``done`` and ``total`` are in ``unit`` where known."""

    verdict: Verdict
    stage: str
    done: float | None = None
    total: float | None = None
    unit: str = ""
    part: int | None = None
    """Of ``parts``: the file that it is at."""
    parts: int | None = None
    speed: str = ""
    """How fast it goes, where that is known; it changes all the time."""

    def __str__(self) -> str:
        """The stage, with how far it is."""
        if self.done is None:
            return self.stage + self.speed
        if self.unit == "bytes":
            amount = size(self.done) + (f" of {size(self.total)}" if self.total else "")
        elif self.total:
            amount = f"{self.done:.0f} of {self.total:.0f} {self.unit}"
        else:
            amount = f"{self.done:.0f} {self.unit}"
        if self.total:
            amount += f" ({100 * min(self.done / self.total, 1):.0f} %)"
        if self.part and self.parts and self.parts > 1:
            amount += f", file {self.part} of {self.parts}"
        return f"{self.stage}{self.speed}: {amount}"


def look(status: Mapping[str, Any]) -> Look:
    """What the API's status of a deployment means for one who waits for it.

    An older generation may serve meanwhile; it doesn't count.
    """
    if status["desired"] == Desired.STOPPED:
        return Look(Verdict.STOPPED, "stopped")
    if status.get("canary") is not None:
        return look({**status, **_as_deployment(status), "canary": None})
    if status["phase"] == Phase.STOPPED and status.get("load", Load.ALWAYS) != Load.ALWAYS:
        return Look(Verdict.READY, "not loaded now")
    phases = [
        worker["phase"]
        for worker in status["workers"]
        if worker["generation"] == status["generation"]
    ]
    ready = phases.count(Phase.READY)
    if status["phase"] == Phase.READY and ready >= status["replicas"]:
        return Look(Verdict.READY, "ready")
    given_up = ready < len(phases) and all(each in {*GIVEN_UP, Phase.READY} for each in phases)
    if status["phase"] in GIVEN_UP or given_up:
        return Look(Verdict.FAILED, _reason(status))
    if status["phase"] == Phase.BACKOFF:
        reason = _reason(status).removesuffix(".")
        again = status.get("next_try_at")
        when = f" Next try at {local_time(again)}." if again else ""
        return Look(Verdict.COMING, f"{reason}.{when}")
    progress = status.get("progress")
    if progress is None:
        stage = _PHASES.get(status["phase"], status["phase"])
        if status.get("in_place") and status["phase"] == Phase.QUEUED:
            stage = "waiting for the old generation to make room"
        if ready:
            stage = f"{ready} of {status['replicas']} replicas ready"
        return Look(Verdict.COMING, stage)
    return Look(
        Verdict.COMING,
        _STAGES.get(progress["stage"], progress["stage"]),
        progress.get("done"),
        progress.get("total"),
        progress.get("unit") or "",
        progress.get("part"),
        progress.get("parts"),
    )


def _as_deployment(status: Mapping[str, Any]) -> dict[str, Any]:
    """A canary as a deployment would be that is nothing else."""
    canary = status["canary"]
    current = [each for each in status["workers"] if each["generation"] == canary["generation"]]
    best: Mapping[str, Any] = next(
        (each for each in current if each["phase"] == canary["phase"]), {}
    )
    progress = status.get("progress") if not current else best.get("progress")
    return {
        "generation": canary["generation"],
        "phase": canary["phase"],
        "reason": canary["reason"],
        "next_try_at": best.get("next_try_at"),
        "progress": progress,
    }


def _wanted(status: Mapping[str, Any]) -> int:
    """The generation that was asked for last."""
    return int((status.get("canary") or status)["generation"])


def _reason(status: Mapping[str, Any]) -> str:
    workers: Iterable[Mapping[str, Any]] = status["workers"]
    reasons = [
        worker["reason"]
        for worker in workers
        if worker.get("reason") and worker["generation"] == status["generation"]
    ]
    return str(status.get("reason") or (reasons[0] if reasons else f"It is {status['phase']}."))


class Transfer:
    """How fast bytes go by, and how long the rest of them will take."""

    def __init__(self, stage: str, monotonic: Callable[[], float]) -> None:
        self._stage = stage
        self._monotonic = monotonic
        self._points: deque[tuple[float, int]] = deque()

    def look(self, done: int, total: int | None) -> Look:
        """What to show when so many are through."""
        now, points = self._monotonic(), self._points
        if not points or now - points[-1][0] >= _POINT_SECONDS:
            points.append((now, done))
        while len(points) > 2 and now - points[1][0] >= _WINDOW_SECONDS:
            points.popleft()
        speed = ""
        (first, before), (last, after) = points[0], points[-1]
        if last - first >= 1 and after > before:
            rate = (after - before) / (last - first)
            speed = f" at {size(rate)}/s"
            if total is not None and (total - done) / rate >= 1:
                speed += f", {duration((total - done) / rate)} left"
        full = None if total is None else float(total)
        return Look(Verdict.COMING, self._stage, float(done), full, "bytes", speed=speed)


class Lines:
    """A line per stage, and one now and then while it lasts: for logs and pipes."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._last = ""
        self._stage = ""
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def show(self, name: str, seen: Look) -> None:
        """Write a line if there is something new to say."""
        text, now = str(seen), self._monotonic()
        if text == self._last or (seen.stage == self._stage and now < self._next):
            return
        self._last, self._stage, self._next = text, seen.stage, now + LINE_SECONDS
        note(f"{name}: {text}")


class Bar:
    """A live bar on the terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()

    def show(self, name: str, seen: Look) -> None:
        """Move the bar; it pulses where no total is known."""
        self._progress.update(
            self._task,
            description=safe(f"{name}: {seen}"),
            completed=seen.done or 0.0,
            total=seen.total or None,
        )


Display: TypeAlias = Bar | Lines


def display() -> Display:
    """A bar if stderr is a terminal, else lines."""
    return Bar() if sys.stderr.isatty() else Lines()


def wait(
    connection: Connection, status: dict[str, Any], *, seconds: float, shown: Display
) -> dict[str, Any]:
    """Wait until the deployment is ready; its last status.

    ``Failure`` with the reason when it can't become ready, or isn't within ``seconds``.
    """
    name, number = status["name"], _wanted(status)
    deadline = time.monotonic() + seconds
    with shown:
        while True:
            seen = look(status)
            if seen.verdict is Verdict.READY:
                return status
            if seen.verdict is Verdict.FAILED:
                raise Failure(f"{name} failed: {seen.stage}", Exit.DEPLOYMENT_FAILED)
            if seen.verdict is Verdict.STOPPED:
                raise Failure(f"{name} was stopped meanwhile.", Exit.DEPLOYMENT_FAILED)
            if time.monotonic() > deadline:
                raise Failure(
                    f"{name} isn't ready within {seconds:.0f} s ({seen}); it goes on coming up.",
                    Exit.TRY_LATER,
                )
            shown.show(name, seen)
            time.sleep(POLL_SECONDS)
            status = connection.get(path("deployments", name))
            if _wanted(status) < number:
                raise Failure(
                    f"Generation {number} of {name} is given up, generation {_wanted(status)} "
                    f"serves: `tursi why {name}` tells more.",
                    Exit.DEPLOYMENT_FAILED,
                )
