from __future__ import annotations

from pathlib import Path

import pytest

from twisted.internet.task import Clock

from tursi.supervision.logs import LifeLog
from tursi.supervision.stacks import MAX_TEXT, Stacks

DUMP = b"""Thread 0x00007f01 (most recent call first):
  File "/x/heartbeat.py", line 9 in run

Current thread 0x00007f02 (most recent call first):
  File "/x/model.py", line 3 in forward
"""


class World:
    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.log = LifeLog(
            folder / "life.log", clock=self.clock.seconds, size=1 << 24, rate=1 << 24
        )
        self.done = 0
        self.stacks = Stacks(self.log, self.clock, self.finish)

    def finish(self) -> None:
        self.done += 1


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_it_collects_from_the_first_thread_on_until_it_is_quiet(world: World) -> None:
    world.log.feed("err", b"some warning\n")
    world.clock.advance(10)
    assert (world.stacks.text, world.done) == ("", 0)
    world.log.feed("err", DUMP[:60])
    world.clock.advance(0.2)
    world.log.feed("out", b"an answer\n")
    world.log.line("a note of ours")
    world.log.feed("err", DUMP[60:])
    world.clock.advance(0.2)
    assert world.done == 0
    world.clock.advance(0.1)
    assert world.done == 1
    assert world.stacks.text == DUMP.decode().rstrip("\n")


def test_it_keeps_no_more_than_its_room(world: World) -> None:
    world.log.feed("err", DUMP)
    for _ in range(100):
        world.log.feed("err", b"x" * 1000 + b"\n")
    assert len(world.stacks.text) < MAX_TEXT + 1000


def test_closed_it_collects_no_more(world: World) -> None:
    world.log.feed("err", DUMP)
    world.stacks.close()
    world.log.feed("err", DUMP)
    world.clock.advance(10)
    assert (world.stacks.text, world.done) == (DUMP.decode().rstrip("\n"), 0)
