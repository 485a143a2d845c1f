"""The workers' logs of each deployment: their ends, what is added to them, and which are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from tursi.supervision import logs
from tursi.supervision.worker import Worker


class Logs:
    """A log file per worker life, in a folder per deployment; ``kept`` of them are kept."""

    def __init__(self, folder: Path, kept: int) -> None:
        self._folder = folder
        self._kept = kept
        self._followers: dict[str, list[Callable[[str], None]]] = {}

    def keep(self, kept: int) -> None:
        """Keep so many from now on."""
        self._kept = kept

    def tail(self, deployment: str, lives: Iterable[str], lines: int) -> list[str]:
        """The last lines of these lives' logs together, in order of their times."""
        # Each line begins with its time, in a form that sorts.
        found = sorted(
            line for uuid in lives for line in logs.tail(self._path(deployment, uuid), lines)
        )
        return found[-lines:]

    def follow(self, deployment: str, callback: Callable[[str], None]) -> Callable[[], None]:
        """Call back with each new line, of lives to come too, until the answer is called."""
        followers = self._followers.setdefault(deployment, [])
        followers.append(callback)

        def unfollow() -> None:
            with suppress(ValueError):
                followers.remove(callback)
            if not followers:
                self._followers.pop(deployment, None)

        return unfollow

    def attach(self, worker: Worker) -> None:
        """A life has begun: pass its lines on, and drop logs that are too many."""
        log, deployment = worker.log, worker.deployment
        if log is not None:
            log.subscribe(lambda line: self._tell(deployment, line))
        self._prune(deployment)

    def _tell(self, deployment: str, line: str) -> None:
        for callback in list(self._followers.get(deployment, ())):
            callback(line)

    def _prune(self, deployment: str) -> None:
        found = []
        for path in (self._folder / deployment).glob("*.log"):
            with suppress(FileNotFoundError):
                found.append((path.stat().st_mtime, path))
        for _, path in sorted(found, reverse=True)[self._kept :]:
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}.1").unlink(missing_ok=True)

    def _path(self, deployment: str, uuid: str) -> Path:
        return self._folder / deployment / f"{uuid}.log"
