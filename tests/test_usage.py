from __future__ import annotations

import itertools
import os
from pathlib import Path

from twisted.internet.task import Clock

from tursi.supervision import procfs
from tursi.supervision.procfs import Usage
from tursi.supervision.usage import LOADING_SECONDS, MAX_SAMPLES, SERVING_SECONDS, Curve


class World:
    def __init__(self) -> None:
        self.clock = Clock()
        self.usage: Usage | None = Usage(1000, 0.123)
        self.serves = False
        self.curve = Curve(
            clock=self.clock,
            now=lambda: 1_000_000 + self.clock.seconds(),
            read=lambda: self.usage,
            serves=lambda: self.serves,
        )

    def times(self) -> list[float]:
        return [each.at - 1_000_000 for each in self.curve.samples]


def test_samples_are_denser_while_it_loads_and_end_when_told() -> None:
    world = World()
    world.curve.start()
    world.clock.pump([LOADING_SECONDS] * 2)
    world.serves = True
    world.clock.pump([LOADING_SECONDS, SERVING_SECONDS])
    assert world.times() == [0, 1, 2, 3, 8]
    world.curve.stop()
    world.curve.stop()
    assert world.clock.getDelayedCalls() == []


def test_what_is_gone_leaves_no_sample() -> None:
    world = World()
    world.usage = None
    world.curve.start()
    world.usage = Usage(0, 1.0)
    world.clock.pump([LOADING_SECONDS])
    assert world.curve.samples == ()


def test_a_long_life_is_thinned_towards_its_beginning() -> None:
    world = World()
    world.serves = True
    world.curve.start()
    for _ in range(2000):
        world.clock.advance(SERVING_SECONDS)
        assert len(world.curve.samples) <= MAX_SAMPLES
    times = world.times()
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] == 0
    assert times[-1] == 2000 * SERVING_SECONDS
    assert gaps[-MAX_SAMPLES // 2 :] == [SERVING_SECONDS] * (MAX_SAMPLES // 2)
    assert max(gaps[:30]) > max(gaps[30:60]) >= SERVING_SECONDS


def tree(proc: Path, children: int, pages: int, shared: int) -> None:
    for pid in range(100, 101 + children):
        folder = proc / str(pid)
        (folder / "task" / str(pid)).mkdir(parents=True)
        below = " ".join(map(str, range(101, 101 + children))) if pid == 100 else ""
        (folder / "task" / str(pid) / "children").write_text(below)
        (folder / "statm").write_text(f"9999 {pages} {shared} 1 0 1 0\n")
        fields = ["0"] * 52
        fields[21] = str(pages)
        (folder / "stat").write_text(f"{pid} (worker) {' '.join(fields)}\n")
        (folder / "smaps_rollup").write_text(f"header\nPss: {pages} kB\n")


def test_of_many_processes_what_they_share_is_estimated(tmp_path: Path) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    tree(tmp_path, children=70, pages=50, shared=40)
    assert procfs.memory_below(100, 10**12, tmp_path) == 70 * 50 * page
    assert procfs.memory_below(100, 0, tmp_path) == (70 * 10 + 40) * page


def test_of_a_few_processes_it_is_known(tmp_path: Path) -> None:
    tree(tmp_path, children=3, pages=50, shared=40)
    assert procfs.memory_below(100, 0, tmp_path) == 3 * 50 * 1024


def test_of_a_flood_of_processes_enough_are_looked_at(tmp_path: Path) -> None:
    tree(tmp_path, children=1200, pages=1, shared=0)
    assert procfs.MOST < len(procfs.descendants(100, tmp_path)) <= 1200
