"""The text of one continuation while it grows: whole characters, stop strings held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"
"""What a tokenizer's decoder shows for bytes that aren't a whole character yet."""
_MAX_HELD = 16
"""Tokens after which undecodable bytes are shown as what they are."""


class Transcript:
    """Decodes tokens as they come; ``push`` returns what may be shown.

    ``context`` are tokens that precede the first one: some tokenizers write a
    word's leading space only if something stands before it.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str] = (),
        context: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._stops = tuple(stop for stop in stops if stop)
        self._window = list(context)
        self._read = len(self._window)
        self._held = ""
        self.length = 0
        """Characters decoded so far, shown or held."""
        self.shown = 0
        """Characters shown so far."""
        self.stopped = False
        """Whether a stop string has come; nothing more will be shown."""

    def push(self, token: int, *, stops: bool = True) -> str:
        """Add a token. With ``stops`` false, stop strings don't count yet."""
        self._window.append(token)
        return self._show(self._decoded(final=False), stops=stops, final=False)

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        return self._show(self._decoded(final=True), stops=True, final=True)

    def _decoded(self, *, final: bool) -> str:
        """The new whole characters at the end of the window, which then moves on."""
        before = self._decode(self._window[: self._read]) if self._read else ""
        text = self._decode(self._window)
        waiting = len(self._window) - self._read
        held = waiting < _MAX_HELD and not final
        if held and (text.endswith(_UNFINISHED) or len(text) <= len(before)):
            return ""
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return text[len(before) :]

    def _show(self, text: str, *, stops: bool, final: bool) -> str:
        if self.stopped:
            return ""
        self.length += len(text)
        self._held += text
        if stops and self._stops:
            places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
            if places:
                self.stopped = True
                return self._release(min(places))
        keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        return self._release(len(self._held) - keep)

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self.shown += count
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``stop``."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
