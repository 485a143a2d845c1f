"""What a worker says, held against what an honest one could say.

A worker may have been taken over by its model or by a request. What it says of
itself only harms its own deployment; nothing of it may become a line of somebody's
log, a header of another answer or a number that others are added to. Each function
returns what to go on with, or raises ``WireError``.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

from tursi.errors import InternalError, by_code
from tursi.model import Loaded, Progress, Task
from tursi.wire import End, Head, LastWords, WireError

TYPES = frozenset({"application/json", "text/event-stream"})
"""What an answer may be; never what a browser would run."""
FIELDS = frozenset({"retry-after", "x-should-retry"})
"""Headers that it may have besides its type: no framing, and none that a proxy obeys."""
MAX_SECONDS = 366 * 86400.0
MAX_CLAUSE = 1000
MAX_TRACEBACK = 64 * 1024
"""Characters."""
_MAX_WORD = 100
_MAX_VERSIONS = 32
_MAX_CHOICES = 16
_MAX_PARTS = 1_000_000
_VISIBLE = re.compile(r"[\x20-\x7e]{1,255}")
_WORD = re.compile(r"[A-Za-z0-9_.:,-]{1,255}")

# What could forge lines, colour a terminal or turn text around: C0 and C1
# controls, line separators, and the bidirectional controls.
_ESCAPES = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (
        *range(0x20),
        *range(0x7F, 0xA0),
        *range(0x2028, 0x202F),
        *range(0x2066, 0x206A),
    )
}
_ESCAPES_BUT_TABS = {code: text for code, text in _ESCAPES.items() if code != 0x09}
_ESCAPES_BUT_LINES = {code: text for code, text in _ESCAPES.items() if code not in {0x09, 0x0A}}


def harmless(text: str, *, lines: bool = False) -> str:
    """``text`` with its control characters escaped but tabs, and line ends if ``lines``."""
    return text.translate(_ESCAPES_BUT_LINES if lines else _ESCAPES_BUT_TABS)


def head(said: Head) -> Head:
    """The head of an answer."""
    if not 200 <= said.status <= 599:
        raise WireError(f"an answer has the status {said.status}")
    if said.content_type not in TYPES:
        raise WireError(f"an answer is of the type {said.content_type[:_MAX_WORD]!r}")
    for name, value in said.headers.items():
        if name.lower() not in FIELDS or not _VISIBLE.fullmatch(value):
            raise WireError(f"an answer has the header {name[:_MAX_WORD]!r}")
    return said


def end(said: End) -> End:
    """The end of an answer."""
    usage = said.usage
    for seconds in (usage.queue_seconds, usage.compute_seconds):
        # Not "outside of": that isn't true of what is no number.
        if not 0 <= seconds <= MAX_SECONDS:
            raise WireError(f"an answer took {seconds} s")
    if said.error and said.error not in by_code():
        return End(usage, InternalError.code)
    return said


def progress(said: Progress) -> Progress:
    """A step of loading."""
    return Progress(
        _clause(said.stage, _MAX_WORD),
        _amount(said.done),
        _amount(said.total),
        _clause(said.unit, _MAX_WORD),
        _count(said.part),
        _count(said.parts),
    )


def loaded(said: Loaded) -> Loaded:
    """What the model turned out to be."""
    try:
        Task(said.task)
    except ValueError:
        raise WireError(f"it has loaded a model for {said.task[:_MAX_WORD]!r}") from None
    for word in (said.device, said.dtype):
        if not _WORD.fullmatch(word):
            raise WireError(f"it has loaded a model on or as {word[:_MAX_WORD]!r}")
    if not 0 <= said.load_seconds <= MAX_SECONDS:
        raise WireError(f"it has loaded for {said.load_seconds} s")
    versions = list(said.versions.items())[:_MAX_VERSIONS]
    choices = list(said.choices.items())[:_MAX_CHOICES]
    return replace(
        said,
        versions={_clause(key, _MAX_WORD): _clause(text, _MAX_WORD) for key, text in versions},
        choices={_clause(key, _MAX_WORD): _clause(text, MAX_CLAUSE) for key, text in choices},
    )


def last_words(said: LastWords) -> LastWords:
    """Why it is about to exit."""
    return LastWords(
        _clause(said.code, _MAX_WORD),
        _clause(said.message, MAX_CLAUSE),
        harmless(said.traceback[-MAX_TRACEBACK:], lines=True),
    )


def _clause(text: str, most: int) -> str:
    return harmless(text if len(text) <= most else f"{text[:most]} [cut]")


def _count(number: int | None) -> int | None:
    if number is not None and not 0 <= number <= _MAX_PARTS:
        raise WireError(f"it is at file {number}")
    return number


def _amount(number: float | None) -> float | None:
    if number is not None and not (math.isfinite(number) and number >= 0):
        raise WireError(f"it has come as far as {number}")
    return number
