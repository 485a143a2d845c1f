"""Whose turn it is of those that wait for one model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from test_queue import Recorder

from tursi.fleet.line import Line
from tursi.fleet.passage import Passage, Work
from tursi.model import Caller

CALLERS = st.lists(st.sampled_from([None, 1, 2, 3]), max_size=20)


def line_of(callers: list[int | None]) -> tuple[Line, list[Passage]]:
    line, waiting = Line(), []
    for place, key in enumerate(callers, 1):
        work = Work("r", "i", "", b"", 9.0, caller=Caller(key=key))
        passage = Passage(None, work, Recorder(), float(place))  # type: ignore[arg-type] # never led
        passage.place = place
        line.add(passage)
        waiting.append(passage)
    return line, waiting


def serve(line: Line) -> list[Passage]:
    """All of them, in the order of their turns."""
    served = []
    while (passage := line.next) is not None:
        line.remove(passage)
        served.append(passage)
    return served


@given(CALLERS)
def test_everybody_has_the_turn_that_was_foretold(callers: list[int | None]) -> None:
    line, waiting = line_of(callers)
    assert len(line) == len(waiting)
    assert set(line) == set(waiting)
    foretold = {passage: line.ahead(passage) for passage in waiting}
    assert {passage: turn for turn, passage in enumerate(serve(line))} == foretold
    assert not line


def test_callers_have_one_turn_after_the_other() -> None:
    line, waiting = line_of([1, 1, 1, 2, None, 2])
    assert [passage.place for passage in serve(line)] == [1, 4, 5, 2, 6, 3]
    line, waiting = line_of([1, 1, 2, 2])
    # Who gives up has not had a turn.
    line.remove(waiting[1])
    line.remove(waiting[2])
    assert [passage.place for passage in serve(line)] == [1, 4]


def test_who_is_sent_again_is_next_and_the_oldest_is_known() -> None:
    line, waiting = line_of([1, 2, 2])
    line.remove(waiting[2])
    line.add(waiting[2], first=True)
    assert line.next is waiting[2]
    assert line.oldest is waiting[0]
    assert line.ahead(waiting[0]) == 1
    assert waiting[2] in line
    line.remove(waiting[2])
    assert waiting[2] not in line


def test_who_has_most_leaves_a_place_to_who_has_less() -> None:
    line, waiting = line_of([1, 2, 1, 1, 2])
    assert line.excess(3) is waiting[3]
    assert line.excess(2) is None, "they would only change places"
    assert line.excess(1) is None
    assert Line().excess(1) is None
