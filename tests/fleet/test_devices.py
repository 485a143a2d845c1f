from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tursi.fleet.devices import MAX_LOST, WINDOW_SECONDS, Devices


class World:
    def __init__(self, *present: str) -> None:
        self.now = 1000.0
        self.devices = Devices(lambda: self.now, present)

    def lose(self, device: str, times: int = 1, every: float = 1.0) -> list[bool]:
        said = []
        for _ in range(times):
            said.append(self.devices.lost(device))
            self.now += every
        return said


def test_the_third_lost_context_within_an_hour_makes_a_device_suspect() -> None:
    world = World("cuda:0")
    assert world.lose("cuda:0", MAX_LOST, every=WINDOW_SECONDS / 4) == [False, False, True]
    assert world.devices.suspects == {
        "cuda:0": "cuda:0 is suspect: workers have lost their GPU context on it 3 times within 1 h."
    }
    # Told once; and over once the oldest is past.
    assert world.lose("cuda:0", every=0) == [False]
    world.now += WINDOW_SECONDS
    assert world.devices.suspects == {}


def test_lost_contexts_far_apart_say_nothing() -> None:
    world = World("cuda:0")
    assert not any(world.lose("cuda:0", 100, every=WINDOW_SECONDS / (MAX_LOST - 1)))


def test_each_device_for_itself() -> None:
    world = World("cuda:0", "cuda:1")
    world.lose("cuda:0", MAX_LOST - 1)
    assert not any(world.lose("cuda:1", MAX_LOST - 1))
    assert world.devices.suspects == {}


def test_new_loads_go_elsewhere_where_there_is_another_device() -> None:
    world = World("cuda:0", "cuda:1", "cuda:2")
    assert world.devices.place("auto") == "auto"
    # What asked for no certain one had the first.
    world.lose("auto", 2)
    world.lose("cuda", 1)
    assert list(world.devices.suspects) == ["cuda:0"]
    assert [world.devices.place(asked) for asked in ("auto", "cuda")] == ["cuda:1", "cuda:1"]
    # Who wants a certain one, or none, gets it.
    for asked in ("cuda:0", "cuda:2", "cpu", "mps"):
        assert world.devices.place(asked) == asked
    world.lose("cuda:1", MAX_LOST)
    assert world.devices.place("auto") == "cuda:2"
    world.lose("cuda:2", MAX_LOST)
    assert world.devices.place("auto") == "auto"
    world.now += WINDOW_SECONDS
    assert world.devices.place("auto") == "auto"


def test_what_was_lost_before_the_daemon_began_counts_as_long_as_anything_else() -> None:
    world = World("cuda:0", "cuda:1")
    for ago in (WINDOW_SECONDS + 1, WINDOW_SECONDS - 60, 30.0, 20.0):
        world.devices.lost("cuda", ago)
    assert world.devices.place("auto") == "cuda:1"
    world.now += 61
    assert world.devices.suspects == {}


def test_the_only_device_is_tried_again() -> None:
    world = World("cuda:0")
    world.lose("cuda:0", MAX_LOST)
    assert world.devices.place("auto") == "auto"


@given(st.lists(st.sampled_from(["auto", "cuda", "cuda:0", "cuda:1", "cpu"]), max_size=50))
def test_what_is_kept_is_bounded_and_a_suspect_is_never_chosen_over_another(
    lost: list[str],
) -> None:
    world = World("cuda:0", "cuda:1")
    for device in lost:
        world.lose(device)
        assert all(len(times) <= MAX_LOST for times in world.devices._lost.values())
        chosen = world.devices.place("auto")
        suspects = world.devices.suspects
        assert chosen in {"auto", "cuda:1"}
        assert not (chosen == "auto" and "cuda:0" in suspects and "cuda:1" not in suspects)
