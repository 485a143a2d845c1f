"""Those who wait for models, on real processes: bounded, served in turns, and told the truth."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from daemon import Daemon, daemon
from patience import until
from stand_in_hub import Fault, StandInHub

from tursi.residency import Rules

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from residents import compare, fleet, stretched
from swaps import trace

GIB = 1024**3
# Each script passes for a model of 1 GiB, so that two of them have room: also one that has
# never been loaded, of which more is reckoned, beside one that has.
SETTINGS = f"""
[memory]
limit_bytes = {29 * GIB // 10}
reserve_bytes = 0
keep_alive_seconds = 600.0
min_residency_seconds = 0.5
max_wait_seconds = 1.5
"""


class Reply(NamedTuple):
    """What a client got, and when."""

    status: int
    seconds: float
    headers: httpx.Headers
    body: Any


@pytest.fixture
def running() -> Iterator[Daemon]:
    with daemon(scripted=True, settings=SETTINGS) as one:
        yield one


def script(running: Daemon, name: str, **options: Any) -> str:
    folder = running.script(name, echo=True, **options)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(GIB)
    return str(folder)


def lazy(running: Daemon, name: str, *, unload: bool = True, **options: Any) -> None:
    """A deployment that is loaded on demand, and has been once."""
    running.deploy(name, script(running, name, **options), load="on_demand")
    running.wait(name)
    if unload:
        running.control.post(f"/deployments/{name}/unload")
        running.wait(name, "stopped")


def ask(running: Daemon, name: str, path: str = "/v1/embeddings", **fields: Any) -> Reply:
    began = time.monotonic()
    body = {"model": name, "input": "hello", "inputs": "hello", **fields}
    with httpx.Client(base_url=running.url, timeout=120) as client:
        answer = client.post(path, json=body)
    return Reply(answer.status_code, time.monotonic() - began, answer.headers, answer.json())


def at_once(count: int, call: Callable[[int], Reply]) -> list[Reply]:
    """What each of ``count`` clients gets that ask at the same time."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


def loads(running: Daemon, name: str) -> int:
    found = running.control.get(f"/deployments/{name}/events").json()["events"]
    return sum(each["kind"] == "worker.loading" for each in found)


def test_a_request_says_how_long_the_model_stays(running: Daemon) -> None:
    lazy(running, "lazy")
    assert ask(running, "lazy", keep_alive="1h30m").status == 200
    kept = running.status("lazy")
    assert not kept["pinned"]
    assert kept["unloads_at"] > time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() + 5300))
    # Where the path names it, whatever the body calls it.
    for path in ("/models/lazy", "/models/lazy/v1/embeddings"):
        assert ask(running, "any", path, keep_alive=-1).status == 200
        assert running.status("lazy")["pinned"]
        assert ask(running, "any", path, keep_alive="10m").status == 200
        assert not running.status("lazy")["pinned"]
    refused = ask(running, "lazy", keep_alive="ten minutes")
    assert (refused.status, refused.body["error"]["param"]) == (400, "keep_alive")
    assert ask(running, "lazy", keep_alive=None).status == 200
    assert ask(running, "lazy", keep_alive=0).status == 200
    running.wait("lazy", "stopped")
    # Who is loaded by it goes as soon as it has been answered.
    assert ask(running, "lazy", keep_alive=0).status == 200
    running.wait("lazy", "stopped")


def test_of_twice_as_many_as_may_wait_half_are_refused_at_once() -> None:
    with daemon(scripted=True, settings=SETTINGS + "[requests]\nmax_queued = 30\n") as running:
        lazy(running, "slow", load_seconds=2.5)
        replies = at_once(60, lambda _: ask(running, "slow"))
        assert Counter(each.status for each in replies) == {200: 30, 429: 30}
        for each in replies:
            if each.status == 200:
                assert each.seconds > 2
                continue
            assert each.seconds < 2, "it was told at once"
            loading = each.body["error"]["loading"]
            assert loading["position"] == 31 == int(each.headers["x-queue-position"])
            # By what the first load has taken.
            assert 0 < loading["eta_seconds"] <= 8
            assert loading["eta_seconds"] <= int(each.headers["retry-after"]) <= 9
        assert loads(running, "slow") == 2, "all have waited for the same load"


def test_who_waits_for_too_long_is_told_how_far_it_is() -> None:
    with daemon(scripted=True, settings=SETTINGS + "[requests]\nload_wait_seconds = 1.0\n") as one:
        one.deploy("slow", script(one, "slow", load_seconds=30.0), load="on_demand")
        until(lambda: (one.status("slow")["progress"] or {}).get("done"), "it loads")
        for path, inside in (("/v1/embeddings", "error"), ("/models/slow", None)):
            reply = ask(one, "slow", path)
            assert reply.status == 503
            detail = reply.body[inside] if inside else reply.body
            assert detail["code"] == "model_loading"
            loading = detail["loading"]
            assert loading["stage"] == "loading"
            assert 0 < loading["progress"] < 1
            assert 0 < loading["eta_seconds"] < 60
            assert int(reply.headers["retry-after"]) == detail["retry_after"]
            assert 0 <= detail["retry_after"] - loading["eta_seconds"] <= 1


def test_who_has_given_up_has_nothing_loaded(running: Daemon) -> None:
    for name in ("wanted", "first", "second"):
        lazy(running, name, unload=name == "wanted")
        assert name == "wanted" or ask(running, name, keep_alive=-1).status == 200
    with pytest.raises(httpx.ReadTimeout):
        running.client.post("/v1/embeddings", json={"model": "wanted", "input": "a"}, timeout=1.0)
    running.wait("wanted", "stopped")
    events = running.control.get("/deployments/wanted/events").json()["events"]
    assert [each["cause"] for each in events if each["kind"] == "unload"][-1] == (
        "nobody waits for it any more"
    )
    assert [running.status(name)["ready"] for name in ("first", "second")] == [1, 1]


def test_what_is_loaded_never_waits_behind_a_swap(running: Daemon) -> None:
    lazy(running, "coming", load_seconds=2.0)
    lazy(running, "there", unload=False)
    lazy(running, "going", unload=False)
    assert ask(running, "there", keep_alive=-1).status == 200
    replies: list[Reply] = []
    waiting = threading.Thread(target=lambda: replies.append(ask(running, "coming")))
    waiting.start()
    slowest = 0.0
    while waiting.is_alive():
        reply = ask(running, "there")
        assert reply.status == 200
        slowest = max(slowest, reply.seconds)
        time.sleep(0.05)
    assert [each.status for each in replies] == [200]
    assert replies[0].seconds > 1.8
    assert slowest < 1.5
    assert (running.status("going")["workers"], running.status("there")["ready"]) == ([], 1)


def test_two_that_have_room_for_one_take_turns(running: Daemon) -> None:
    lazy(running, "pinned", unload=False)
    assert ask(running, "pinned", keep_alive=-1).status == 200
    for name in ("a", "b"):
        lazy(running, name, delay=0.1, load_seconds=0.2)
    before = {name: loads(running, name) for name in ("a", "b")}
    until_then = time.monotonic() + 6

    def use(number: int) -> list[Reply]:
        found: list[Reply] = []
        while time.monotonic() < until_then:
            # Each alternates, and there is always one with either.
            found.append(ask(running, "ab"[(number + len(found)) % 2]))
        return found

    with ThreadPoolExecutor(6) as pool:
        replies = [each for some in pool.map(use, range(6)) for each in some]
    assert {each.status for each in replies} == {200}
    assert max(each.seconds for each in replies) < 9, "it waits for 1.5 s until its turn comes"
    swaps = sum(loads(running, name) - before[name] for name in ("a", "b"))
    # First come first served would swap for nearly every request.
    assert 2 <= swaps <= 12, swaps
    assert len(replies) > 2 * swaps


def test_a_model_that_is_always_in_use_leaves_others_their_turn(running: Daemon) -> None:
    lazy(running, "pinned", unload=False)
    assert ask(running, "pinned", keep_alive=-1).status == 200
    lazy(running, "other")
    lazy(running, "busy", unload=False, delay=1.0)
    stop = threading.Event()
    statuses: list[int] = []

    def use() -> None:
        with httpx.Client(base_url=running.url, timeout=120) as client:
            while not stop.is_set():
                answer = client.post("/v1/embeddings", json={"model": "busy", "input": "hello"})
                statuses.append(answer.status_code)

    threads = [threading.Thread(target=use) for _ in range(5)]
    for thread in threads:
        thread.start()
        # Not in step, so that there is no moment without a request.
        time.sleep(0.2)
    other = ask(running, "other")
    stop.set()
    for thread in threads:
        thread.join()
    assert other.status == 200
    # It waits for 1.5 s, and busy is to have been there for as long.
    assert 1.2 < other.seconds < 10
    assert set(statuses) == {200}


def test_whoever_waits_for_a_daemon_that_is_killed_hears_of_it_at_once(running: Daemon) -> None:
    running.deploy("slow", script(running, "slow", load_seconds=60.0), load="on_demand")
    running.wait("slow", "loading")
    ended: list[float] = []

    def wait(_: int) -> Reply:
        try:
            return ask(running, "slow")
        except httpx.TransportError:
            ended.append(time.monotonic())
            raise

    with ThreadPoolExecutor(40) as pool:
        waiting = [pool.submit(wait, number) for number in range(40)]
        until(lambda: running.status("slow")["queued"] == 40, "all of them wait")
        killed = time.monotonic()
        running.kill()
        errors = [each.exception(30) for each in waiting]
    assert all(isinstance(error, httpx.TransportError) for error in errors)
    assert max(ended) - killed < 5


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with StandInHub() as hub:
        for name in ("one", "two"):
            folder = tmp_path / name
            folder.mkdir()
            (folder / "config.json").write_text("{}")
            (folder / "scripted.json").write_text('{"echo": true}')
            weights = (2).to_bytes(8, "little") + b"{}" + name.encode() * 1_000_000
            (folder / "model.safetensors").write_bytes(weights)
            hub.add(f"someone/{name}", folder)
        for key, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(key, value)
        yield hub


@pytest.fixture
def both(hub: StandInHub, tmp_path: Path) -> Iterator[tuple[Daemon, Daemon]]:
    """Two daemons with one cache."""
    settings = SETTINGS + f'[hub]\nendpoint = "{hub.endpoint}"\n'
    options = ("--cache", str(tmp_path / "cache"))
    with (
        daemon(scripted=True, settings=settings, options=options) as first,
        daemon(scripted=True, settings=settings, options=options) as second,
    ):
        yield first, second


def test_two_daemons_share_a_cache_and_each_download(
    hub: StandInHub, both: tuple[Daemon, Daemon], tmp_path: Path
) -> None:
    for each in both:
        for name in ("one", "two"):
            each.deploy(name, f"someone/{name}", load="on_demand")
    replies = at_once(200, lambda number: ask(both[number % 2], ("one", "two")[number // 2 % 2]))
    assert Counter(each.status for each in replies) == {200: 200}
    assert len([path for path in hub.downloads() if "model.safetensors" in path]) == 2
    for name in ("one", "two"):
        [snapshot] = (tmp_path / "cache/hub").glob(f"models--someone--{name}/snapshots/*")
        assert {each.status(name)["commit"] for each in both} == {snapshot.name}
        assert (snapshot / "model.safetensors").read_bytes().endswith(name.encode())
        assert not list(snapshot.parents[1].glob("blobs/*.incomplete"))


def test_a_download_goes_on_where_a_killed_daemon_has_left_it(
    hub: StandInHub, both: tuple[Daemon, Daemon]
) -> None:
    path = "/content/[^/]+/[^/]+/model.safetensors"
    hub.faults.append(Fault(path, "slow", method="GET", times=1, seconds=0.5))
    killed, other = both

    def arrived(running: Daemon) -> bool:
        progress = running.status("one")["progress"]
        return bool(progress and progress["stage"] == "download" and progress["done"] > 1_500_000)

    killed.deploy("one", "someone/one", load="on_demand")
    until(lambda: arrived(killed), "half of it is there")
    other.deploy("one", "someone/one", load="on_demand")
    until(lambda: arrived(other), "who waits for another's download knows how far that is")
    killed.kill()
    assert ask(other, "one").status == 200
    [rest] = [seen.range for seen in hub.seen if seen.range and re.search(path, seen.path)]
    assert int(rest.removeprefix("bytes=").removesuffix("-")) > 1_000_000


@pytest.mark.timeout(300)  # it takes as many times longer as loads do
def test_more_models_than_have_room_do_better_than_first_come_first_served(tmp_path: Path) -> None:
    names = [f"m{number}" for number in range(10)]
    with fleet(10, 3, tmp_path, load_seconds=0.1) as (running, took):
        arrivals = stretched(trace(100, 10, 0, 10.0), took, names, 2.0)
        fifo, ours = compare(running, arrivals, Rules(10 * took, 3 * took), 3)
    assert (fifo.failed, ours.failed) == (0, 0)
    assert ours.loads < fifo.loads
    assert ours.percentile(0.95) < fifo.percentile(0.95)
