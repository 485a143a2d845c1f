"""When what could not be fetched is tried again."""

from __future__ import annotations

FIRST_SECONDS = 5.0
MOST_SECONDS = 300.0


def delay(attempts: int, retry_after: float | None) -> float:
    """Seconds to wait after so many attempts in vain, and not less than the hub asks for."""
    # More doublings than these are past every limit.
    growing = FIRST_SECONDS * float(2 ** min(attempts, 16))
    return max(min(MOST_SECONDS, growing), float(retry_after or 0))
