"""Durations as Go writes them, and clients of Ollama: ``10m``, ``-1m``, ``1h30m``, ``300ms``."""

from __future__ import annotations

import re

_UNITS = {
    "ns": 1e-9,
    "us": 1e-6,
    "\N{MICRO SIGN}s": 1e-6,
    "\N{GREEK SMALL LETTER MU}s": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}
_PART = rf"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)({'|'.join(_UNITS)})"
_PARTS = re.compile(_PART)
_WHOLE = re.compile(rf"([-+]?)(0|(?:{_PART})+)")
_MOST = 2**63 / 1e9
"""Seconds that Go's nanoseconds hold."""
_LONGEST = 100
"""Characters; nobody means more."""


def parse(text: str) -> float:
    """Its seconds, or ``ValueError`` where Go would refuse it."""
    found = _WHOLE.fullmatch(text) if len(text) <= _LONGEST else None
    if found is None:
        raise ValueError(f"{text[:_LONGEST]!r} is no duration")
    parts = _PARTS.findall(found[2])
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if seconds >= _MOST:
        raise ValueError(f"{text!r} is longer than 292 years")
    return -seconds if found[1] == "-" else seconds
