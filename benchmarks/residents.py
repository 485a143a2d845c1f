"""Twenty models in memory for eight, on real processes: our queue against first come first served.

The same seeded trace (as in ``swaps.py``: popularity by Zipf's law, in bursts) goes to the
same daemon twice: as it comes, and through a front that lets no request overtake one
whose model isn't there yet, with two loads at a time as the daemon has. Prints the loads and
the waits of both, and what the simulation of ``swaps.py`` says of the trace.

Run: ``python benchmarks/residents.py`` with tiny models in real workers, ``--scripted`` with
workers that only pass for models.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path += [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "integration")]

from daemon import Daemon, daemon  # noqa: E402 - found by the lines above
from patience import until  # noqa: E402 - the same
from swaps import Arrival, Fifo, Ours, Policy, simulate, trace  # noqa: E402 - the same

from tursi.residency import Rules  # noqa: E402 - with the above

SLOTS = 2
"""Loads at a time."""
SCRIPTED_SIZE = 1024**3
SAMPLES = 3
"""Models whose load and memory are taken for those of all."""
LOAD_SECONDS = 3.0
"""What loads take on average in the simulation, by which the trace's times are stretched."""


@dataclass(frozen=True)
class Result:
    """What came of one way to serve the trace."""

    loads: int
    waits: tuple[float, ...]
    """Seconds from a request's arrival until its answer."""
    failed: int

    def percentile(self, share: float) -> float:
        return sorted(self.waits)[int(share * (len(self.waits) - 1))]

    def __str__(self) -> str:
        return (
            f"{self.loads:>6} {self.percentile(0.5):>7.1f}s {self.percentile(0.95):>7.1f}s"
            f" {max(self.waits):>7.1f}s {self.failed:>7}"
        )


class Requests:
    """The trace's requests on their way, each in a thread of its own."""

    def __init__(self, running: Daemon, arrivals: list[Arrival], *, in_order: bool) -> None:
        self._running = running
        self._arrivals = arrivals
        self._in_order = in_order
        self._lock = threading.Condition()
        self._passed = 0
        """Of those that go in order: how many have been let through."""
        self._absent: dict[int, str] = {}
        """Those that have been sent though their models weren't there."""
        self.waits: list[float] = []
        self.failed = 0

    def run(self) -> None:
        """Send all of them in time, and wait for the answers."""
        threads, began = [], time.monotonic()
        for number, arrival in enumerate(self._arrivals):
            time.sleep(max(0.0, began + arrival.at - time.monotonic()))
            thread = threading.Thread(target=self._ask, args=(number, arrival.model.name))
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join()

    def _ask(self, number: int, model: str) -> None:
        arrived = time.monotonic()
        with httpx.Client(base_url=self._running.url, timeout=900) as client:
            if self._in_order:
                self._queue(number, model)
            answer = client.post("/v1/embeddings", json={"model": model, "input": "hello"})
        with self._lock:
            self._absent.pop(number, None)
            self._lock.notify_all()
            self.waits.append(time.monotonic() - arrived)
            self.failed += answer.status_code != 200

    def _queue(self, number: int, model: str) -> None:
        with self._lock:
            while self._passed != number:
                self._lock.wait()
            while self._absent:
                others = set(self._absent.values()) - {model}
                if model in self._absent.values() or (
                    len(others) < SLOTS and not self._is_there(model)
                ):
                    break
                self._lock.wait()
            if model in self._absent.values() or not self._is_there(model):
                self._absent[number] = model
            self._passed += 1
            self._lock.notify_all()

    def _is_there(self, model: str) -> bool:
        return bool(self._running.status(model)["ready"])


def serve(running: Daemon, arrivals: list[Arrival], *, in_order: bool) -> Result:
    """Have the trace answered from a state in which nothing is loaded."""
    names = sorted({arrival.model.name for arrival in arrivals})
    for name in names:
        running.control.post(f"/deployments/{name}/unload")
    until(lambda: not any(running.status(name)["workers"] for name in names), "nothing is loaded")
    before = sum(loads(running, name) for name in names)
    requests = Requests(running, arrivals, in_order=in_order)
    requests.run()
    return Result(
        sum(loads(running, name) for name in names) - before,
        tuple(requests.waits),
        requests.failed,
    )


def loads(running: Daemon, name: str) -> int:
    """How often it has been loaded."""
    found = running.control.get(f"/deployments/{name}/events", params={"limit": 1000}).json()
    return sum(each["kind"] == "worker.ready" for each in found["events"])


def tiny(folder: Path) -> Path:
    """A sentence embedder with a few thousand parameters."""
    from models import sentence

    return sentence(folder)


def scripted(folder: Path, load_seconds: float) -> Path:
    """What passes for a model of ``SCRIPTED_SIZE``."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "scripted.json").write_text(
        f'{{"echo": true, "delay": 0.05, "load_seconds": {load_seconds}}}'
    )
    with (folder / "model.safetensors").open("wb") as file:
        file.write((2).to_bytes(8, "little") + b"{}")
        file.truncate(SCRIPTED_SIZE)
    return folder


def settings(limit: int, rules: Rules) -> str:
    """The daemon's configuration; ``limit`` in bytes, 0 for what the machine has."""
    return (
        "[memory]\n"
        f"limit_bytes = {limit}\nreserve_bytes = 0\nkeep_alive_seconds = -1.0\n"
        f"min_residency_seconds = {rules.min_residency}\nmax_wait_seconds = {rules.max_wait}\n"
        "[requests]\nload_wait_seconds = 900.0\ndeadline_seconds = 900.0\nmax_queued = 10000\n"
    )


@contextmanager
def fleet(
    models: int, room: int, folder: Path, *, load_seconds: float | None
) -> Iterator[tuple[Daemon, float]]:
    """A daemon with so many models in memory for ``room``, and what loading one takes."""
    is_scripted = load_seconds is not None
    with daemon(scripted=is_scripted, settings=settings(0, Rules())) as running:
        folders = {
            f"m{number}": tiny(folder / f"m{number}")
            if load_seconds is None
            else scripted(folder / f"m{number}", load_seconds)
            for number in range(models)
        }
        took, needs = [], []
        for name in list(folders)[:SAMPLES]:
            began = time.monotonic()
            running.deploy(name, folders[name], load="on_demand")
            running.wait(name, seconds=180)
            took.append(time.monotonic() - began)
            # What is measured of a model counts from its first request on.
            running.client.post("/v1/embeddings", json={"model": name, "input": "hello"})
            running.control.post(f"/deployments/{name}/unload")
            running.wait(name, "stopped")
            body = {"name": name, "model": str(folders[name])}
            fit = running.control.post("/deployments", json=body, params={"dry_run": 1}).json()
            needs.append(fit["memory"])
        for name in list(folders)[SAMPLES:]:
            running.deploy(name, folders[name], load="on_demand")
        for name in folders:
            until(lambda name=name: loads(running, name), f"{name} has been loaded", 300)  # type: ignore[misc] # a lambda's default
        limit = int(max(needs) * (room + 0.5))
        print(f"{models} models of {max(needs) >> 20} MiB, {limit >> 20} MiB for them", flush=True)
        running.limit = limit  # type: ignore[attr-defined] # for who configures it anew
        yield running, sorted(took)[len(took) // 2]


def configure(running: Daemon, rules: Rules) -> None:
    """Go by other rules from now on."""
    limit: int = running.limit  # type: ignore[attr-defined] # see above
    head = running.configuration.read_text().split("[memory]")[0]
    running.configuration.write_text(head + settings(limit, rules))
    assert running.control.post("/reload").status_code == 200


def stretched(
    arrivals: list[Arrival], load_seconds: float, names: list[str], pace: float
) -> list[Arrival]:
    """The trace with loads that take so long, for models that all are as large."""
    factor = load_seconds / LOAD_SECONDS / pace
    models = {
        name: replace(
            next(each.model for each in arrivals if each.model.name == name),
            size=1, load_seconds=load_seconds, answer_seconds=0.05,
        )
        for name in names
        if any(each.model.name == name for each in arrivals)
    }  # fmt: skip
    return [Arrival(each.at * factor, models[each.model.name]) for each in arrivals]


def compare(
    running: Daemon, arrivals: list[Arrival], rules: Rules, room: int
) -> tuple[Result, Result]:
    """First come first served, and ours."""
    quick = Rules(max_wait=0.1, min_residency=0.1)
    found = []
    print(f"{'':>12} {'loads':>6} {'p50':>8} {'p95':>8} {'most':>8} {'failed':>7}")
    ours = Ours()
    ours.rules = rules
    ways: list[tuple[str, bool, Rules, Policy]] = [
        ("FIFO", True, quick, Fifo()), ("ours", False, rules, ours),
    ]  # fmt: skip
    for name, in_order, counts, policy in ways:
        configure(running, counts)
        result = serve(running, arrivals, in_order=in_order)
        said = simulate(arrivals, policy, room)
        print(f"{name:>12} {result}")
        print(
            f"{'simulated':>12} {said.swaps:>6} {said.percentile(0.5):>7.1f}s"
            f" {said.percentile(0.95):>7.1f}s {max(said.waits):>7.1f}s",
            flush=True,
        )
        found.append(result)
    return found[0], found[1]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--models", type=int, default=20)
    options.add_argument("--room", type=int, default=8)
    options.add_argument("--requests", type=int, default=200)
    options.add_argument("--rate", type=float, default=3.0, help="a second, where a load takes 3 s")
    options.add_argument("--pace", type=float, default=2.0, help="of the trace, to that of loads")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--scripted", action="store_true")
    asked = options.parse_args()
    load_seconds = 1.0 if asked.scripted else None
    with (
        tempfile.TemporaryDirectory() as built,
        fleet(asked.models, asked.room, Path(built), load_seconds=load_seconds) as (running, took),
    ):
        arrivals = trace(asked.requests, asked.models, asked.seed, asked.rate)
        names = [f"m{number}" for number in range(asked.models)]
        arrivals = stretched(arrivals, took, names, asked.pace)
        print(f"{len(arrivals)} requests in {arrivals[-1].at:.0f} s, a load takes {took:.1f} s")
        factor = took / LOAD_SECONDS
        compare(running, arrivals, Rules(30.0 * factor, 10.0 * factor), asked.room)


if __name__ == "__main__":
    main()
