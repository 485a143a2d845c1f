"""Memory is given back when nothing is going on."""

from __future__ import annotations

from fakes import InlineReactor, InlineThreadPool

from tursi.heap import TRIM_SECONDS, Heap


class Reactor(InlineReactor):
    def getThreadPool(self) -> InlineThreadPool:  # noqa: N802 - Twisted's name
        return InlineThreadPool()


def test_memory_is_given_back_now_and_then_but_not_while_it_is_used() -> None:
    reactor, busy = Reactor(), [False]
    trims: list[int] = []
    heap = Heap(reactor, lambda: busy[0], trims.append)
    heap.start()
    assert trims == []
    reactor.advance(TRIM_SECONDS)
    assert trims == [0]
    busy[0] = True
    reactor.advance(TRIM_SECONDS)
    assert trims == [0]
    busy[0] = False
    reactor.advance(TRIM_SECONDS)
    assert trims == [0, 0]
    heap.stop()
    assert not reactor.getDelayedCalls()


def test_where_the_c_library_has_no_such_call_nothing_happens() -> None:
    reactor = Reactor()
    heap = Heap(reactor, lambda: False, None)
    heap.start()
    assert not reactor.getDelayedCalls()
    heap.stop()
