"""Numbers and times as people say them."""

from __future__ import annotations

from datetime import UTC, datetime


def clause(text: str) -> str:
    """A sentence as part of another."""
    return text.strip().rstrip(".")


def count(number: int, noun: str) -> str:
    """So many of something, in words."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def noun(number: int, word: str) -> str:
    """The word for one of something, or for more (of those that take "es")."""
    return word if number == 1 else f"{word}es"


def times(number: int) -> str:
    """How often."""
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def moment(at: float, now: float) -> str:
    """A point in time, and how long ago that is."""
    return f"{clock(at, now)} ({ago(at, now)})"


def clock(at: float, now: float) -> str:
    """A point in time in UTC; with its day if that isn't today."""
    then, today = datetime.fromtimestamp(at, UTC), datetime.fromtimestamp(now, UTC)
    day = "" if then.date() == today.date() else f"{then:%Y-%m-%d} "
    return f"{day}{then:%H:%M:%S} UTC"


def ago(at: float, now: float) -> str:
    """How long ago."""
    return f"{duration(now - at)} ago" if now - at >= 1 else "just now"


def ahead(at: float, now: float) -> str:
    """How soon."""
    return f"in {duration(at - now)}" if at - now >= 1 else "now"


def duration(seconds: float) -> str:
    """A length of time in the unit or two that people would use."""
    whole = max(round(seconds), 0)
    if whole < 120:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} days"
