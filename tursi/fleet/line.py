"""Who waits for one model: callers have their turns one after the other."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice

from tursi.fleet.passage import Passage

KeyId = int | None
"""The id of an API key; ``None``: all who have none."""


class Line:
    """Requests in the order of their turns.

    A caller's requests keep their order; of several callers each has one request served,
    then the next caller has, so that nobody who sends many is in the way of who sends few.
    """

    def __init__(self) -> None:
        self._callers: OrderedDict[KeyId, OrderedDict[int, Passage]] = OrderedDict()
        """By caller in the order of their turns: those who wait, by their places."""

    def __len__(self) -> int:
        return sum(map(len, self._callers.values()))

    def __bool__(self) -> bool:
        return bool(self._callers)

    def __iter__(self) -> Iterator[Passage]:
        """Caller by caller."""
        return (passage for waiting in self._callers.values() for passage in waiting.values())

    def __contains__(self, passage: Passage) -> bool:
        return passage.place in self._callers.get(_caller(passage), ())

    @property
    def next(self) -> Passage | None:
        """Whose turn it is."""
        return next(self._heads(), None)

    @property
    def oldest(self) -> Passage | None:
        """Who has waited longest."""
        return min(self._heads(), key=lambda passage: passage.began, default=None)

    def add(self, passage: Passage, *, first: bool = False) -> None:
        """Let it wait for its turn, or be the next of all."""
        caller = _caller(passage)
        waiting = self._callers.setdefault(caller, OrderedDict())
        waiting[passage.place] = passage
        if first:
            waiting.move_to_end(passage.place, last=False)
            self._callers.move_to_end(caller, last=False)

    def remove(self, passage: Passage) -> None:
        """It has had its turn, or has given up."""
        caller = _caller(passage)
        waiting = self._callers[caller]
        had_turn = self.next is passage
        del waiting[passage.place]
        if not waiting:
            del self._callers[caller]
        elif had_turn:
            self._callers.move_to_end(caller)

    def ahead(self, passage: Passage) -> int:
        """How many have their turns before it, as long as nobody else comes."""
        caller = _caller(passage)
        rounds = list(self._callers[caller]).index(passage.place)
        before, earlier = rounds, True
        for each, waiting in self._callers.items():
            if each == caller:
                earlier = False
            else:
                before += min(len(waiting), rounds + earlier)
        return before

    def excess(self, caller: KeyId) -> Passage | None:
        """Who leaves so that ``caller``, who has fewer, may wait: the last one of who has most."""
        most = max(self._callers.values(), key=len, default=OrderedDict())
        if len(most) <= len(self._callers.get(caller, ())) + 1:
            return None
        return next(reversed(most.values()))

    def _heads(self) -> Iterator[Passage]:
        return (next(islice(waiting.values(), 1)) for waiting in self._callers.values())


def _caller(passage: Passage) -> KeyId:
    return passage.work.caller.key
