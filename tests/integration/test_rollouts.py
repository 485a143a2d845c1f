"""New generations beside the old ones and in their place, canaries, and ranges of replicas."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from daemon import Daemon, daemon
from patience import until

GIB = 1024**3
SETTINGS = f"""
[memory]
limit_bytes = {3 * GIB}
reserve_bytes = 0
[workers]
backoff_initial = 0.2
warm_seconds = 2.0
[requests]
scale_wait_seconds = 0.1
"""


@pytest.fixture
def running() -> Iterator[Daemon]:
    with daemon(scripted=True, settings=SETTINGS) as one:
        yield one


def script(running: Daemon, name: str, size: int = 10, **options: Any) -> str:
    folder = running.script(name, **{"echo": True, **options})
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(size)
    return str(folder)


def up(running: Daemon, **fields: Any) -> dict[str, Any]:
    return running.deploy("search", **fields)


def ask(running: Daemon, body: str = "hello") -> Any:
    return running.client.post("/v1/embeddings", json={"model": "search", "input": body})


def fates(running: Daemon) -> list[str | None]:
    found = running.control.get("/deployments/search/generations").json()["generations"]
    return [each["turns"][-1]["fate"] if each["turns"] else None for each in found]


def why(running: Daemon) -> str:
    return " ".join(running.control.get("/deployments/search/why").json()["sentences"])


def serving(running: Daemon, generation: int, **more: Any) -> None:
    """Wait until that generation alone serves."""

    def look() -> bool:
        status = running.status("search")
        numbers = {each["generation"] for each in status["workers"]}
        return numbers == {generation} and bool(status["ready"])

    until(look, f"generation {generation} serves: {running.status('search')}")


EVENTS = 20


class Load:
    """Asks all the while, also for streams, and remembers what came of it."""

    def __init__(self, running: Daemon, threads: int = 2, streams: int = 0) -> None:
        self.running = running
        self.stopped = threading.Event()
        self.statuses: Counter[int | str] = Counter()
        self.generations: Counter[str | None] = Counter()
        self.slowest = 0.0
        self.threads: list[threading.Thread] = []
        for ask, count in ((self.whole, threads), (self.stream, streams)):
            self.threads += [threading.Thread(target=self.run, args=(ask,)) for _ in range(count)]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        until(lambda: self.statuses.total() > 1, "it is under way")
        return self

    def __exit__(self, *raised: object) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def run(self, ask: Callable[[httpx.Client], int | str]) -> None:
        with httpx.Client(base_url=self.running.url, timeout=60) as client:
            while not self.stopped.is_set():
                began = time.monotonic()
                self.statuses[ask(client)] += 1
                self.slowest = max(self.slowest, time.monotonic() - began)

    def whole(self, client: httpx.Client) -> int:
        answer = client.post("/v1/embeddings", json={"model": "search", "input": "hello"})
        self.generations[answer.headers.get("x-tursi-generation")] += 1
        return answer.status_code

    def stream(self, client: httpx.Client) -> int | str:
        body = {"model": "search", "prompt": "hello", "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                return answer.status_code
            found = [text for text in answer.iter_lines() if text]
        whole = found == [f"data: {number}" for number in range(EVENTS)]
        return "stream" if whole else f"broken after {found[-2:]}"


def test_a_generation_that_answers_nothing_is_not_switched_to(running: Daemon) -> None:
    up(running, model=script(running, "good"))
    running.wait("search")
    for number, how in enumerate(("fail", "hang", "die"), 2):
        with Load(running) as load:
            up(running, model=script(running, f"bad-{how}", smoke=how))
            status = running.wait("search", "failed")
        assert "Generation 1 keeps serving." in status["reason"]
        assert set(load.statuses) == {200}
        assert fates(running) == ["serving", *["failed"] * (number - 1)]
    assert "first request" in why(running)


def test_a_canary_gets_its_share_and_is_promoted(running: Daemon) -> None:
    old, new = script(running, "old"), script(running, "new")
    up(running, model=old)
    running.wait("search")
    status = up(running, model=new, canary=25)
    assert (status["generation"], status["canary"]["generation"]) == (1, 2)
    until(lambda: running.status("search")["canary"]["ready"], "the canary is ready")
    counted = Counter(ask(running).headers["x-tursi-generation"] for _ in range(100))
    assert 23 <= counted["2"] <= 27
    # It is all there after the daemon was killed.
    running.kill()
    running.start()

    def both() -> bool:
        workers = running.status("search")["workers"]
        return {each["generation"] for each in workers if each["phase"] == "ready"} == {1, 2}

    until(both, "both are back")
    assert running.status("search")["canary"]["weight"] == 25
    assert (
        running.control.post("/deployments/search/canary", json={"weight": 50}).status_code == 202
    )
    counted = Counter(ask(running).headers["x-tursi-generation"] for _ in range(20))
    assert 8 <= counted["2"] <= 12
    assert "canary" in why(running)
    with Load(running) as load:
        running.control.post("/deployments/search/promote")
        serving(running, 2)
    assert set(load.statuses) == {200}
    assert ask(running).headers.get("x-tursi-generation") is None
    assert fates(running) == ["replaced", "serving"]


def test_a_canary_that_dies_costs_no_request_and_in_the_end_itself(running: Daemon) -> None:
    up(running, model=script(running, "old"))
    running.wait("search")
    up(running, model=script(running, "bad", die_on="hello"), canary=50)
    until(lambda: running.status("search")["canary"]["ready"], "the canary is ready")
    with Load(running, 1) as load:
        until(lambda: running.status("search")["canary"] is None, "it is given up", 60)
    assert set(load.statuses) == {200}
    assert fates(running) == ["serving", "failed"]
    serving(running, 1)
    up(running, model=script(running, "bad"), canary=50)
    back = running.control.post("/deployments/search/rollback", json={}).json()
    assert (back["outcome"], back["deployment"]["generation"]) == ("back", 1)
    assert fates(running) == ["serving", "failed", "given-up"]


def test_without_room_for_both_the_new_one_takes_the_old_ones_place(running: Daemon) -> None:
    old = script(running, "large", 2 * GIB, delay=0.05)
    up(running, model=old)
    running.wait("search")
    new = script(running, "larger", 2 * GIB + 1, load_seconds=0.5)
    fit = running.control.put(
        "/deployments/search", json={"model": new}, params={"dry_run": 1}
    ).json()
    assert fit["verdict"] == "in_place"
    beside = running.control.put(
        "/deployments/search", json={"model": new, "canary": 10}, params={"dry_run": 1}
    ).json()
    assert (beside["verdict"], "canary" in beside["message"]) == ("waits", True)
    with Load(running) as load:
        up(running, model=new)
        until(lambda: running.status("search")["in_place"], "it is done in place")
        serving(running, 2)
    assert set(load.statuses) == {200}
    assert fates(running) == ["replaced", "serving"]
    [before] = running.status("search")["workers"]
    with Load(running) as load:
        configure(running, SETTINGS.replace("[requests]", "max_batch_tokens = 512\n[requests]"))

        def reloaded() -> bool:
            status = running.status("search")
            uuids = [each["uuid"] for each in status["workers"]]
            return uuids != [before["uuid"]] and len(uuids) == 1 and status["ready"] == 1

        until(reloaded, "a worker with the new configuration is in the old one's place")
    assert set(load.statuses) == {200}
    assert not running.status("search")["in_place"]
    bad = script(running, "broken", 2 * GIB + 2, load_seconds=0.5, exit=3)
    with Load(running) as load:
        up(running, model=bad)
        until(lambda: running.status("search")["in_place"], "it is done in place")
        serving(running, 2)
    assert set(load.statuses) == {200}
    assert fates(running) == ["replaced", "serving", "failed"]
    assert running.status("search")["phase"] == "failed"
    assert "Generation 2 keeps serving." in running.status("search")["reason"]
    # Killed amidst of it, the daemon comes back with one of them.
    up(running, model=script(running, "slow", 2 * GIB + 3, load_seconds=2.0))
    until(lambda: running.status("search")["in_place"], "it is done in place")
    running.kill()
    running.start()
    assert ask(running).status_code == 200
    serving(running, 4)


def test_replicas_come_and_go_with_the_waiting(running: Daemon) -> None:
    model = script(running, "slow", delay=0.2, one_by_one=True)
    up(running, model=model, replicas=1, max_replicas=2)
    running.wait("search")
    with Load(running, 6) as load:
        until(lambda: running.status("search")["ready"] == 2, "there is another replica", 30)
    assert set(load.statuses) == {200}
    assert running.status("search")["max_replicas"] == 2
    told = running.control.get("/deployments/search/events").json()["events"]
    [scaled] = [each for each in told if each["kind"] == "autoscale"]
    assert scaled["message"] == "search goes from 1 to 2 of 1-2 replicas"
    assert "waited" in scaled["cause"]
    assert running.deploy("search", model, replicas=1)["replicas"] == 1
    serving(running, 1)


def configure(running: Daemon, settings: str) -> None:
    text = running.configuration.read_text().partition("[memory]")[0]
    running.configuration.write_text(text + settings)
    assert running.control.post("/reload").status_code == 200


def test_no_change_of_any_kind_loses_a_request_or_breaks_a_stream(running: Daemon) -> None:
    options: dict[str, Any] = {"delay": 0.01, "stream_asked": EVENTS, "interval": 0.01}
    first, second = script(running, "first", **options), script(running, "second", **options)
    waiting = script(running, "waiting", queue_seconds=1.0, load_seconds=0.2, **options)
    control, place = running.control, "/deployments/search"
    # Streams take longer than that, and are in nobody's way.
    hasty = SETTINGS.replace("[requests]", "drain_seconds = 0.1\n[requests]")
    configure(running, hasty)
    up(running, model=first)
    running.wait("search")

    def canary_ready() -> bool:
        canary = running.status("search")["canary"]
        return bool(canary and canary["ready"])

    def there(generation: int, replicas: int = 1) -> None:
        def look() -> bool:
            status = running.status("search")
            numbers = [each["generation"] for each in status["workers"]]
            return numbers == [generation] * replicas and status["ready"] == replicas

        until(look, f"only generation {generation} is there", 60)

    with Load(running, threads=3, streams=3) as load:
        up(running, model=second)
        there(2)
        control.post(f"{place}/rollback", json={})
        there(3)
        up(running, model=second, canary=30)
        until(canary_ready, "the canary is ready")
        control.post(f"{place}/canary", json={"weight": 60})
        until(lambda: load.generations["4"] > 20, "the canary is used")
        control.post(f"{place}/promote")
        there(4)
        up(running, model=first, canary=50)
        until(canary_ready, "the canary is ready")
        control.post(f"{place}/rollback", json={})
        there(4)
        control.post(f"{place}/scale", json={"replicas": 3})
        there(4, 3)
        control.post(f"{place}/scale", json={"replicas": 1})
        there(4)
        configure(running, hasty.replace("[requests]", "max_batch_tokens = 512\n[requests]"))
        before = {each["pid"] for each in running.status("search")["workers"]}
        until(
            lambda: not before & {each["pid"] for each in running.status("search")["workers"]},
            "others serve",
        )
        there(4)
        up(running, model=waiting, replicas=1, max_replicas=2)
        there(6, 2)
        up(running, model=waiting, replicas=1)
        there(6)
    assert set(load.statuses) == {200, "stream"}, load.statuses
    assert load.statuses["stream"] > 20
    # Whoever asked was never kept waiting by a change.
    assert load.slowest < 20
