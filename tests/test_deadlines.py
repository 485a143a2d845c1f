from __future__ import annotations

import pytest

from twisted.internet.task import Clock

from tursi.supervision.deadlines import Deadlines


class Fed:
    def __init__(self) -> None:
        self.clock = Clock()
        self.given: list[str] = []
        self.deadlines = Deadlines(self.clock, lambda call, *arguments: call(*arguments))

    def wait(self, seconds: float) -> None:
        self.timer = self.deadlines.callLater(seconds, self.given.append, "expired")


def test_in_time_it_calls_at_once() -> None:
    it = Fed()
    it.wait(15)
    assert it.timer.active()
    it.clock.advance(16)
    assert it.given == ["expired"]
    assert not it.timer.active()


def test_a_daemon_that_stood_still_grants_five_seconds_once() -> None:
    it = Fed()
    it.wait(15)
    it.clock.advance(60)
    assert it.given == []
    assert it.timer.active()
    it.clock.advance(4)
    assert it.given == []
    # Even if it stands still for ever, every wait ends.
    it.clock.advance(100)
    assert it.given == ["expired"]


def test_what_came_meanwhile_cancels_it() -> None:
    it = Fed()
    it.wait(1)
    it.clock.advance(60)
    it.timer.cancel()
    it.clock.advance(60)
    assert it.given == []


@pytest.mark.parametrize("delay", [0.0, 0.5])
def test_the_grace_is_no_longer_than_the_wait(delay: float) -> None:
    it = Fed()
    it.wait(delay)
    it.clock.advance(60)
    it.clock.advance(delay)
    assert it.given == ["expired"]
    assert it.deadlines.seconds() == 60 + delay
