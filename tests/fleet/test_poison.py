from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tursi.fleet.poison import MAX_SUSPECTS, MEMORY_SECONDS, Suspects, digest

ROUTE, BODY = "openai.chat", b'{"model": "a"}'


class World:
    def __init__(self) -> None:
        self.now = 1000.0
        self.suspects = Suspects(lambda: self.now)

    def die(self, life: str, body: bytes = BODY) -> bool:
        return self.suspects.died(digest(ROUTE, body), len(body), life)

    def poison(self, body: bytes = BODY) -> bool:
        found = self.suspects.recognize(ROUTE, body)
        suspicion = self.suspects.of(found) if found else None
        return suspicion is not None and suspicion.poison


def test_two_deaths_make_poison_and_one_life_dies_once() -> None:
    world = World()
    assert not world.die("a")
    assert not world.die("a")
    assert not world.poison()
    assert world.die("b")
    assert world.poison()
    assert not world.die("c")


def test_route_and_body_tell_requests_apart() -> None:
    world = World()
    world.die("a")
    assert world.suspects.recognize(ROUTE, BODY) == digest(ROUTE, BODY)
    assert world.suspects.recognize(ROUTE, BODY.replace(b"a", b"b")) is None
    assert world.suspects.recognize("openai.completions", BODY) is None
    assert world.suspects.recognize(ROUTE, b"{}") is None


def test_an_answer_clears_and_an_hour_forgets() -> None:
    world = World()
    world.die("a")
    world.suspects.clear(digest(ROUTE, BODY))
    assert not world.suspects
    world.die("b")
    world.now += MEMORY_SECONDS - 1
    world.die("c")
    assert world.poison()
    world.now += MEMORY_SECONDS - 1
    assert world.poison()
    # Further deaths don't prolong what is held against it.
    world.die("d")
    world.now += 1
    assert not world.poison()
    assert not world.suspects


def test_a_death_learns_the_number_of_its_crash() -> None:
    world = World()
    world.die("a")
    world.die("b")
    world.suspects.identified("b", 7)
    suspicion = world.suspects.of(digest(ROUTE, BODY))
    assert suspicion is not None
    assert suspicion.deaths == {"a": None, "b": 7}
    world.suspects.forgive()
    assert not world.suspects


@given(st.lists(st.integers(0, 3 * MAX_SUSPECTS), max_size=3 * MAX_SUSPECTS))
def test_it_stays_bounded_and_remembers_the_latest(bodies: list[int]) -> None:
    world = World()
    for number, body in enumerate(bodies):
        world.die(str(number), str(body).encode())
        assert len(world.suspects) <= MAX_SUSPECTS
    if bodies:
        assert world.suspects.recognize(ROUTE, str(bodies[-1]).encode()) is not None
