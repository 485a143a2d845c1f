"""Counts what each deployment does, and hands it to the store minute by minute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import astuple

from tursi.model import Minute, Usage

MAX_HELD = 10_000
"""Minutes that wait for the database, one a deployment; older ones are counted and dropped."""


class Statistics:
    """Minutes that are not stored yet; ``now`` gives UTC epoch seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._open: dict[tuple[str, int], list[float]] = {}
        self.dropped = 0
        """Minutes that are lost."""

    def count(
        self,
        deployment: str,
        generation: int,  # noqa: ARG002 - kept from the next version of the schema on
        key: int,  # noqa: ARG002 - as above
        status: int,
        code: str,
        seconds: float,
        waited: float,
        first_byte: float | None,  # noqa: ARG002 - as above
        usage: Usage,
    ) -> None:
        """Add one request.

        ``deployment`` may be empty and ``generation`` 0 where it got to none, ``key`` is 0
        without one; ``status`` is the HTTP status, ``code`` that of the error it ended by.
        Of ``seconds``, its whole time, it has ``waited`` until a worker got it.
        """
        failed = status >= 400 or bool(code)
        self._add(
            (deployment, int(self._now() // 60)),
            (
                1,
                int(failed),
                usage.prompt_tokens,
                usage.completion_tokens,
                seconds,
                waited + usage.queue_seconds,
            ),
        )

    def take(self) -> list[Minute]:
        """What has been counted since the last call; the store adds it up."""
        taken = [
            Minute(name, minute, int(a), int(b), int(c), int(d), e, f)
            for (name, minute), (a, b, c, d, e, f) in self._open.items()
        ]
        self._open = {}
        return taken

    def put_back(self, minutes: Iterable[Minute]) -> None:
        """Count again what could not be stored."""
        for minute in minutes:
            name, number, *counts = astuple(minute)
            self._add((name, number), counts)
        excess = len(self._open) - MAX_HELD
        if excess > 0:
            for key in sorted(self._open, key=lambda key: key[1])[:excess]:
                del self._open[key]
            self.dropped += excess

    def _add(self, key: tuple[str, int], counts: Iterable[float]) -> None:
        held = self._open.get(key)
        if held is None:
            self._open[key] = list(counts)
        else:
            for index, count in enumerate(counts):
                held[index] += count
