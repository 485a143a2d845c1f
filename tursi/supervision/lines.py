"""The two forms of a line in a worker's log: for people, and for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import msgspec

Form = Callable[[str, str, str], str]
"""Makes a line of its time in RFC 3339, its stream and its text."""

_LEVEL = re.compile(
    r"[\[(<]?(TRACE|DEBUG|INFO|NOTICE|WARN|WARNING|ERROR|CRITICAL|FATAL)[\])>]?(?::|\s|$)"
)
_LEVELS = {"warn": "warning", "fatal": "critical"}


def plain(time: str, stream: str, text: str) -> str:
    """``<time> <stream> <text>``."""
    return f"{time} {stream} {text}"


def structured(deployment: str, generation: int, replica: int, worker: str) -> Form:
    """JSON objects that also say whose line it is, and how bad where the line itself does."""
    whose = {
        "deployment": deployment,
        "generation": generation,
        "replica": replica,
        "worker": worker,
    }

    def form(time: str, stream: str, text: str) -> str:
        # The time first: lines are put in order by how they begin.
        line: dict[str, object] = {"time": time, "stream": stream, **whose, "message": text}
        level = level_of(text)
        if level is not None:
            line["level"] = level
        return msgspec.json.encode(line).decode()

    return form


def level_of(text: str) -> str | None:
    """The level that a line plainly begins with, in the words of the standard library."""
    found = _LEVEL.match(text)
    if found is None:
        return None
    level = found[1].lower()
    return _LEVELS.get(level, level)


def words(line: str) -> tuple[str, str]:
    """Stream and text of a line of either form."""
    if line.startswith("{"):
        found = json.loads(line)
        return found["stream"], found["message"]
    _, stream, text = line.split(" ", 2)
    return stream, text
