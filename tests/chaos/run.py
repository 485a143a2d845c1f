"""A daemon under load and under attack: does it keep its promises?

``python tests/chaos/run.py --seconds 60 --seed 7`` starts a real daemon with
scripted workers, lets clients ask and somebody change deployments, and meanwhile
kills, stops, floods and sets the clock at random. Then it heals everything, looks
at what is left, prints the figures, and ends with 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS), str(TESTS / "integration")]

from checker import (  # noqa: E402 - after the path
    Change,
    History,
    Role,
    Sample,
    lost_changes,
    slowest,
    table,
    violations,
)
from clients import (  # noqa: E402 - the same
    PIECES,
    Archivist,
    Changer,
    Choice,
    Client,
    Loader,
    Puller,
    Roller,
    StreamClient,
)
from clock_daemon import set_clock  # noqa: E402 - the same
from daemon import Daemon  # noqa: E402 - the same
from nemesis import Nemesis, lives  # noqa: E402 - the same
from patience import until  # noqa: E402 - the same
from stand_in_hub import Fault as StandInFault  # noqa: E402 - the same
from stand_in_hub import StandInHub  # noqa: E402 - the same

SETTINGS = """
[workers]
backoff_initial = 0.2
backoff_max = 1.0
good_seconds = 2.0
max_failures = 1000
quarantine_seconds = 1.0
beat_seconds = 1.0
ping_seconds = 2.0
ping_timeout = 2.0
first_seconds = 3.0
drain_seconds = 3.0
stop_seconds = 1.0
kill_seconds = 2.0
[requests]
load_wait_seconds = 40.0
[memory]
limit_bytes = {limit}
reserve_bytes = 0
min_residency_seconds = 0.5
max_wait_seconds = 3.0
[hub]
stall_seconds = 8.0
endpoint = "{endpoint}"
"""
GIB = 2**30
LAZY = {"lazy-a": 1, "lazy-b": 1, "lazy-c": 1}
TURNED = {"turned": 1}
LAZY_BYTES = 4 * GIB
LIMIT = 11 * GIB + GIB // 2
"""Room for two of them, and for everybody else."""
PULLED = 4
PULLED_BYTES = 2 * 2**20
CALM = {"calm": 1, "calm-pair": 2}
HIT = {"solo-a": 1, "solo-b": 1, "pair-a": 2, "pair-b": 2}
STREAMS = {"streams": 2}
CHURN = ("churn-a", "churn-b", "churn-c")
CLIENTS = 2
"""Of each deployment."""
SAMPLE_SECONDS = 0.5
HEAL_SECONDS = 60.0
MAX_DESCRIPTORS = 4
"""More than at the beginning, with the same deployments and no client."""
MAX_RSS = 40 * 2**20
"""The same: buffers of the size of the largest burst are kept."""
DEFECTS = ("Traceback (most recent call last)", "Unhandled", "CRITICAL")


class Run:
    """One run on a state folder of its own."""

    def __init__(self, folder: Path, seconds: float, seed: int, pause: float) -> None:
        self.seconds = seconds
        self.pause = pause
        self.chance = random.Random(seed)
        self.history = History(
            {
                **dict.fromkeys(CALM, Role.CALM),
                **dict.fromkeys(HIT | STREAMS, Role.HIT),
                **dict.fromkeys(CHURN, Role.CHURN),
                **dict.fromkeys(LAZY, Role.LAZY),
                **dict.fromkeys(TURNED, Role.TURNED),
            },
            CALM | HIT | STREAMS | LAZY | TURNED,
        )
        self.hub = StandInHub()
        # So that a download lasts long enough to be hit.
        self.hub.faults.append(StandInFault("/content/", "slow", method="GET", seconds=0.1))
        self.models = tuple(self.publish(folder, number) for number in range(PULLED))
        self.clock = folder / "clock"
        set_clock(self.clock, 0.0)
        program = TESTS / "integration" / "clock_daemon.py"
        settings = SETTINGS.format(limit=LIMIT, endpoint=self.hub.endpoint)
        self.running = Daemon(folder, scripted=True, settings=settings, program=program)
        self.nemesis = Nemesis(
            self.running,
            (*HIT, *STREAMS),
            (*CHURN, *LAZY),
            self.clock,
            random.Random(self.chance.random()),
            {**self.hub.environment(folder / "home"), "HF_HUB_OFFLINE": "0"},
            self.hub,
            pause=pause,
            kill_daemon_at=seconds * 0.3,
            # The last one has to live long enough to be measured.
            spare_daemon_after=seconds * 0.5,
            tell_fault=self.history.faults.append,
            tell_window=self.history.windows.append,
            tell_violation=self.history.violations.append,
        )
        self.figures: list[str] = []

    def publish(self, folder: Path, number: int) -> str:
        """Put a model on the hub; its name."""
        model = folder / f"hub-{number}"
        model.mkdir()
        (model / "config.json").write_text("{}")
        content = self.chance.randbytes(PULLED_BYTES)
        (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + content)
        self.hub.add(f"someone/m{number}", model)
        return f"someone/m{number}"

    def go(self) -> None:
        """All of it."""
        with self.hub:
            self.go_on()

    def go_on(self) -> None:
        """The same, while the hub serves."""
        self.running.start(self.nemesis.environment())
        try:
            before = self.deploy()
            sampling = threading.Event()
            sampler = threading.Thread(target=self.sample, args=(sampling,), daemon=True)
            sampler.start()
            self.attack()
            sampling.set()
            sampler.join()
            self.heal(before)
            self.end()
        finally:
            self.running.close()
            for process in self.running.tree():
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def deploy(self) -> tuple[int, int]:
        """Bring everything up; descriptors and RSS at rest."""
        for name, replicas in CALM.items():
            model = self.running.script(name, echo=True, delay=0.1, fork=1)
            self.running.deploy(name, model, replicas=replicas)
        for name, replicas in HIT.items():
            model = self.running.script(name, echo=True, delay=0.1, fork=1, obey=True)
            self.running.deploy(name, model, replicas=replicas)
        for name, replicas in STREAMS.items():
            model = self.running.script(name, stream=PIECES, interval=0.02, obey=True)
            self.running.deploy(name, model, replicas=replicas)
        for name in LAZY:
            folder = self.running.script(name, echo=True, delay=0.05, load_seconds=0.3)
            with (folder / "model.safetensors").open("r+b") as file:
                file.truncate(LAZY_BYTES)
            self.running.deploy(name, folder, load="on_demand", keep_alive=2.0)
        for name in TURNED:
            self.running.deploy(name, self.running.script(name, echo=True, delay=0.1))
        for name in (*CALM, *HIT, *STREAMS, *TURNED):
            self.running.wait(name)
        return self.used()

    def attack(self) -> None:
        """Clients, changes and harm, for as long as it shall take."""
        clients = [
            (StreamClient if name in STREAMS else Client)(
                self.running.port, name, number, self.history.asks.append
            )
            for name in self.history.roles
            for number in range(CLIENTS)
        ]
        models = tuple(
            str(self.running.script(f"model-{number}", echo=True, load_seconds=0.2 * number))
            for number in range(3)
        )
        changer = Changer(
            self.running.control,
            Choice(CHURN, models),
            random.Random(self.chance.random()),
            self.history.changes.append,
            self.pause / 4,
        )
        self.puller = Puller(
            self.running.control,
            self.models,
            random.Random(self.chance.random()),
            self.history.turns.append,
            self.look_at_cache,
            self.pause / 3,
        )
        loader = Loader(
            self.running.control, tuple(LAZY), random.Random(self.chance.random()), self.pause
        )
        self.roller = Roller(
            self.running.control,
            next(iter(TURNED)),
            tuple(
                str(self.running.script(f"turn-{number}", echo=True, delay=0.1 * number))
                for number in range(3)
            ),
            random.Random(self.chance.random()),
            self.pause,
        )
        self.archivist = Archivist(
            self.running.control, "calm", "copy", random.Random(self.chance.random()), self.pause
        )
        actors: list[Client | Changer | Loader | Puller | Roller | Archivist | Nemesis] = [
            *clients,
            self.archivist,
            changer,
            self.roller,
            loader,
            self.puller,
            self.nemesis,
        ]
        for actor in actors:
            actor.start()
        time.sleep(self.seconds)
        # Harm ends first: what it has done must be answered for.
        for actor in reversed(actors):
            actor.end()
        for actor in reversed(actors):
            actor.join(120)
            if actor.is_alive():
                self.history.violations.append(f"{actor.name} waits for ever")

    def sample(self, ending: threading.Event) -> None:
        """What the daemon uses, again and again."""
        while not ending.wait(SAMPLE_SECONDS):
            number = self.nemesis.daemons
            if not self.nemesis.alive.is_set():
                continue
            with suppress(psutil.Error, AssertionError):
                descriptors, rss = self.used()
                self.history.samples.append(Sample(number, time.monotonic(), descriptors, rss))

    def used(self) -> tuple[int, int]:
        """The daemon's descriptors and RSS."""
        assert self.running.process is not None
        process = psutil.Process(self.running.process.pid)
        return process.num_fds(), process.memory_info().rss

    def heal(self, before: tuple[int, int]) -> None:
        """Everything must come back by itself, and nothing else be left."""
        self.nemesis.heal()
        began = time.monotonic()
        for name in (*CALM, *HIT, *STREAMS, *TURNED):
            self.expect(lambda name=name: self.running.wait(name, seconds=HEAL_SECONDS))
        healed = time.monotonic() - began
        for name in CHURN:
            self.expect(lambda name=name: self.settle(name))
        self.finish_pulls()
        self.expect(self.find_copy)
        for name in LAZY:
            self.expect(lambda name=name: until(lambda: self.asked(name) == 200, name, 60))
        for name in CALM:
            crashes = self.running.control.get(f"/deployments/{name}/crashes").json()["crashes"]
            if crashes:
                self.history.violations.append(f"{name} was never hit and has {crashes}")
        self.expect(self.owned)
        # As it was at the beginning, for the count.
        self.running.control.post("/deployments/turned/scale", json={"replicas": 1})
        self.running.control.post("/deployments/turned/promote", json={})
        for name in (*CHURN, *LAZY):
            self.running.control.delete(f"/deployments/{name}")
        self.expect(
            lambda: until(lambda: self.at_rest(before), f"as little is used as before: {before}")
        )
        descriptors, rss = self.used()
        gone = self.nemesis.gone_seconds
        most = f"within {max(gone):.3f} s at most" if gone else "(never waited for)"
        self.figures = [
            f"healed within {healed:.1f} s; after a daemon's kill -9 all was gone {most}"
        ]
        turns = ", ".join(f"{count} x {what}" for what, count in sorted(self.roller.done.items()))
        self.figures.append(f"turned: {turns}; {self.archivist.imports} imports")
        self.figures.append(
            f"at rest: descriptors {before[0]} -> {descriptors},"
            f" RSS {before[1] >> 20} -> {rss >> 20} MiB"
        )

    def look_at_cache(self) -> None:
        """See that what is listed is a model, whole and right."""
        try:
            answer = self.running.control.get("/catalogue")
        except httpx.HTTPError:
            return
        for entry in answer.json()["models"] if answer.status_code == 200 else []:
            folder = Path(entry["folder"])
            if entry["name"] not in self.models:
                continue
            snapshot = self.hub.repositories[entry["name"]]["main"]
            for name in snapshot.names():
                try:
                    right = (folder / name).read_bytes() == snapshot.data(name)
                except FileNotFoundError:
                    # Removed since it was listed, unless the folder is still there.
                    right = not folder.exists()
                if not right:
                    self.history.violations.append(f"{entry['name']} is listed with a wrong {name}")

    def find_copy(self) -> None:
        """What was imported is there, unless it was removed again."""
        name, there = self.archivist.copy, self.archivist.there
        if there:
            self.running.wait(name, seconds=HEAL_SECONDS)
        elif there is False:
            until(
                lambda: self.running.control.get(f"/deployments/{name}").status_code == 404,
                f"{name} is gone, as was acknowledged",
                20,
            )
        self.running.control.delete(f"/deployments/{name}")

    def finish_pulls(self) -> None:
        """Every pull comes to its end."""
        for number in self.puller.pulls:
            if self.puller.turn(number, "read") == "paused":
                self.puller.turn(number, "resume")
        for number in self.puller.pulls:
            self.expect(
                lambda number=number: until(
                    lambda: (
                        self.running.control.get(f"/pulls/{number}").json()["state"]
                        in {"done", "cancelled"}
                    ),
                    f"pull {number} ends: {self.running.control.get(f'/pulls/{number}').text}",
                    HEAL_SECONDS,
                )
            )
            self.puller.turn(number, "read")
        self.look_at_cache()
        cache = self.running.state / "cache" / "hub"
        unfinished = [
            *cache.glob("models--*/blobs/*.incomplete"), *cache.glob(".locks/*/*.unfinished"),
            *cache.glob(".locks/*/reference.*"),
        ]  # fmt: skip
        cancelled = {turn.pull for turn in self.history.turns if turn.state == "cancelled"}
        if unfinished and not cancelled:
            self.history.violations.append(f"left in the cache: {unfinished}")

    def at_rest(self, before: tuple[int, int]) -> bool:
        """Whether about as little is used as at the beginning."""
        descriptors, rss = self.used()
        return descriptors <= before[0] + MAX_DESCRIPTORS and rss <= before[1] + MAX_RSS

    def asked(self, name: str) -> int:
        """How a request for it is answered."""
        body = {"model": name, "input": "hello"}
        return self.running.client.post("/v1/embeddings", json=body).status_code

    def expect(self, look: Any) -> None:
        """Do that, and note it if it fails."""
        try:
            look()
        except (AssertionError, httpx.HTTPError) as error:
            self.history.violations.append(f"after all was healed: {error}")

    def settle(self, name: str) -> None:
        """Read what is wanted of it in the end, and see it come about."""
        reader = Changer(self.running.control, Choice((), ()), self.chance, lambda _: None, 1.0)
        last: list[Change] = []

        def explained() -> bool:
            # One that was deleted is still seen until its workers have ended.
            last[:] = [seen for seen in [reader.read(name)] if seen is not None]
            mine = [each for each in self.history.changes if each.deployment == name]
            return bool(last) and len(lost_changes([*mine, *last])) == len(lost_changes(mine))

        try:
            until(explained, f"{name} is as it was left", 20)
        finally:
            self.history.changes += last
        wanted = last[0].seen
        if wanted is not None and wanted.running:
            self.running.wait(name, seconds=HEAL_SECONDS)
        elif wanted is not None:
            self.running.wait(name, "stopped", HEAL_SECONDS)

    def owned(self) -> None:
        """Every process belongs to a worker that the daemon knows."""

        def strangers() -> list[psutil.Process]:
            listed = self.running.control.get("/deployments").json()["deployments"]
            known = {worker["uuid"] for each in listed for worker in each["workers"]}
            found = []
            for process in self.running.tree():
                with suppress(psutil.NoSuchProcess):
                    if process.environ().get("TURSI_WORKER") not in known and lives(process):
                        found.append(process)
            return found

        until(lambda: not strangers(), f"nobody is left over: {strangers()}", 20)

    def end(self) -> None:
        """Stop it, and look at what is left on disk and in the process table."""
        status = self.running.stop()
        if status != 0:
            self.history.violations.append(f"the daemon ended with {status}")
        left = [process for process in self.running.tree() if lives(process)]
        if left:
            self.history.violations.append(f"the daemon has left {left}")
        with sqlite3.connect(self.running.state / "tursi.sqlite") as database:
            (answer,) = database.execute("PRAGMA integrity_check").fetchone()
        if answer != "ok":
            self.history.violations.append(f"the database: {answer}")
        for line in self.running.log.read_text(errors="replace").splitlines():
            if any(word in line for word in DEFECTS):
                self.history.violations.append(f"the daemon's log has: {line}")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--seed", type=int, default=None)
    options.add_argument("--pause", type=float, default=1.5, help="seconds between two faults")
    options.add_argument("--keep", action="store_true", help="keep the state folder")
    given = options.parse_args()
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"chaos for {given.seconds:.0f} s with --seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="tursi-"))
    run = Run(folder, given.seconds, seed, given.pause)
    try:
        run.go()
    finally:
        broken = violations(run.history)
        print("\n".join([*table(run.history), *run.figures, *slowest(run.history)]))
        if broken or given.keep:
            print(f"state folder: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    for line in broken[:40]:
        print(f"VIOLATION {line}")
    print(f"{len(broken)} violations; --seed {seed}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
