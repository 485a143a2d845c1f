"""NVIDIA's GPUs through a driver that does what the test says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.task import Clock

from tursi import gpus
from tursi.gpus import ABSENT_SECONDS, DEADLINE, SECONDS, Gpus
from tursi.model import Gpu

GIB = 2**30


class NVMLError(Exception):
    """As pynvml raises it."""


@dataclass
class Card:
    uuid: str
    total: int = 80 * GIB
    free: int = 79 * GIB
    processes: list[tuple[int, int | None]] = field(default_factory=list)
    lost: bool = False
    silent: bool = False
    """Whether it tells of no processes."""


class Driver:
    """The functions of pynvml that are called."""

    NVMLError = NVMLError

    def __init__(self, *cards: Card) -> None:
        self.cards = cards
        self.absent = False
        self.inits = 0

    def nvmlInit(self) -> None:  # noqa: N802 - pynvml's name, as all below
        self.inits += 1
        if self.absent:
            raise NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        if self.absent:
            raise NVMLError("Driver Not Loaded")
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:  # noqa: N802
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:  # noqa: N802
        for card in self.cards:
            if f"MIG-{card.uuid}" == uuid:
                return Card(uuid, 10 * GIB, 9 * GIB)
        raise NVMLError("Not Found")

    def nvmlDeviceGetUUID(self, card: Card) -> str:  # noqa: N802
        return f"GPU-{card.uuid}"

    def nvmlDeviceGetName(self, card: Card) -> str:  # noqa: N802
        return "NVIDIA H100"

    def nvmlDeviceGetMemoryInfo(self, card: Card) -> Any:  # noqa: N802
        if card.lost:
            raise NVMLError("GPU is lost")
        return SimpleNamespace(total=card.total, free=card.free)

    def nvmlDeviceGetComputeRunningProcesses(self, card: Card) -> list[Any]:  # noqa: N802
        if card.silent:
            raise NVMLError("Not Supported")
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in card.processes]


class World:
    def __init__(self, *cards: Card, **environment: str) -> None:
        self.clock = Clock()
        self.driver = Driver(*cards)
        self.changes = 0
        self.hanging: list[Deferred[Any]] | None = None
        self.gpus = Gpus(
            self.clock, environment, library=lambda: self.driver, in_thread=self.in_thread
        )

    def in_thread(self, _: Any, function: Callable[[], Any]) -> Deferred[Any]:
        if self.hanging is None:
            return maybeDeferred(function)
        waiting: Deferred[Any] = Deferred()
        self.hanging.append(waiting.addCallback(lambda _: function()))
        return waiting

    def start(self) -> World:
        def changed() -> None:
            self.changes += 1

        self.gpus.start(changed)
        return self


def seen(world: World) -> list[str]:
    return [f"{each.device} {each.total // GIB} {each.free // GIB}" for each in world.gpus.latest]


def test_what_each_has_and_who_uses_it() -> None:
    card = Card("a", processes=[(7, 3 * GIB), (7, GIB), (8, None)])
    world = World(card, Card("b", free=5 * GIB)).start()
    assert world.gpus.latest == (
        Gpu("cuda:0", "NVIDIA H100", 80 * GIB, 79 * GIB, {7: 4 * GIB, 8: 0}),
        Gpu("cuda:1", "NVIDIA H100", 80 * GIB, 5 * GIB, {}),
    )
    assert world.changes == 1
    world.clock.advance(SECONDS)
    assert world.changes == 1
    card.free = GIB
    world.clock.advance(SECONDS)
    assert (world.changes, seen(world)[0]) == (2, "cuda:0 80 1")
    # The driver is asked to begin once.
    assert world.driver.inits == 1
    world.gpus.stop()
    assert world.clock.getDelayedCalls() == []


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("", []),
        ("-1", []),
        ("1", ["cuda:0 80 2"]),
        ("1, 0", ["cuda:0 80 2", "cuda:1 80 1"]),
        ("0,7,1", ["cuda:0 80 1"]),
        ("GPU-bb", ["cuda:0 80 2"]),
        ("MIG-aa", ["cuda:0 10 9"]),
        ("MIG-zz,0", []),
    ],
)
def test_workers_see_what_they_are_shown(visible: str, expected: list[str]) -> None:
    cards = (Card("aa", free=GIB), Card("bb", free=2 * GIB))
    assert seen(World(*cards, CUDA_VISIBLE_DEVICES=visible).start()) == expected


def test_without_a_driver_there_are_none_until_it_comes() -> None:
    world = World(Card("a"))
    world.driver.absent = True
    world.start()
    assert (seen(world), world.gpus.trouble) == ([], None)
    world.driver.absent = False
    world.clock.advance(ABSENT_SECONDS)
    assert seen(world) == ["cuda:0 80 79"]
    # And it may go.
    world.driver.absent = True
    world.clock.advance(SECONDS)
    assert (seen(world), world.changes) == ([], 2)


def test_a_lost_gpu_has_no_room_and_the_others_keep_their_numbers() -> None:
    world = World(Card("a", lost=True), Card("b", silent=True)).start()
    assert seen(world) == ["cuda:0 0 0", "cuda:1 80 79"]


def test_while_the_driver_hangs_nothing_is_free() -> None:
    world = World(Card("a")).start()
    world.hanging = []
    world.clock.advance(SECONDS)
    world.clock.advance(DEADLINE - 0.1)
    assert (seen(world), world.gpus.trouble) == (["cuda:0 80 79"], None)
    world.clock.advance(0.1)
    assert seen(world) == ["cuda:0 80 0"]
    assert world.gpus.trouble is not None
    # It isn't asked again before it has answered.
    world.clock.advance(100)
    assert len(world.hanging) == 1
    waiting, world.hanging = world.hanging[0], None
    waiting.callback(None)
    assert seen(world) == ["cuda:0 80 79"]
    assert "hasn't answered" not in str(world.gpus.trouble)
    world.gpus.stop()


def test_an_answer_after_the_end_starts_nothing() -> None:
    world = World(Card("a"))
    world.hanging = []
    world.start().gpus.stop()
    world.hanging[0].callback(None)
    assert world.clock.getDelayedCalls() == []


def test_a_torch_without_gpus_uses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tursi.gpus.metadata.version", lambda _: "2.13.0+cpu")
    assert not gpus.torch_uses_them()
    clock = Clock()
    one = Gpus(clock, {}, in_thread=lambda _, function: maybeDeferred(function))
    one.start(lambda: None)
    assert one.latest == ()
    monkeypatch.setattr("tursi.gpus.metadata.version", lambda _: "2.13.0")
    assert gpus.torch_uses_them()
