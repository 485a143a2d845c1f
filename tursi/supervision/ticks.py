"""Ticks that the regular looks at all workers share, so that the daemon wakes once for many."""

from __future__ import annotations

TICKS = 10
"""In each period: few would have the daemon do everything at once."""


def until(now: float, period: float) -> float:
    """Seconds from ``now`` until the tick nearest to the end of a period."""
    tick = period / TICKS
    return round((now + period) / tick) * tick - now
