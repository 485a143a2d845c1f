"""How the fleet reckons with memory: what is measured, who waits, where it goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_fleet import NOW, Bench, FakeWorker

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from tursi.admission import Free
from tursi.config import Configuration, Memory
from tursi.errors import InvalidRequest, ModelFilesMissing
from tursi.fleet.shortages import Shortages
from tursi.footprint import BASE, CONTEXT, Blueprint, Group
from tursi.model import (
    Dossier,
    FailureClass,
    Fit,
    Footprint,
    Gpu,
    Limits,
    Load,
    Loaded,
    LoadOrder,
    Peaks,
    Phase,
    Progress,
    Request,
    Schedule,
    Verdict,
    WorkerLife,
)

GIB = 2**30
RESERVE = 512 * 2**20


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    one = Bench(tmp_path)
    one.open()
    yield one
    one.store.stop()


def of_size(gib: float) -> Blueprint:
    return Blueprint(int(gib * GIB), (Group("F32", int(gib * GIB / 4)),), hidden=1, intermediate=1)


def come(bench: Bench, name: str, gib: float, load: Load = Load.ALWAYS, **fields: Any) -> None:
    """Deploy a model of that size, whose files are found."""
    folder = f"/models/{name}"
    bench.hub.blueprints[folder] = of_size(gib)
    request = Request(folder, **fields)
    bench.do(bench.fleet.deploy(name, request, 1, "uid 0", Schedule(load)))
    bench.found(folder=folder, size=int(gib * GIB))


def worker(bench: Bench, name: str) -> FakeWorker:
    return [each for each in bench.workers if each.deployment == name][-1]


def phase(one: FakeWorker) -> Phase:
    return one.phase


def serve(bench: Bench, name: str, host: Peaks = Peaks(), **loaded: Any) -> FakeWorker:  # noqa: B008 - a frozen value
    one = worker(bench, name)
    one.loaded = replace(one.loaded, host=host, **loaded)
    one.become(Phase.READY)
    bench.turn()
    return one


def reason(bench: Bench, name: str) -> str:
    return bench.fleet.deployment(name).reason or ""


def fit(bench: Bench, name: str, gib: float, **fields: Any) -> Fit:
    folder = f"/models/{name}-new"
    bench.hub.blueprints[folder] = of_size(gib)
    answer: list[Fit] = []
    asking = Deferred.fromCoroutine(bench.fleet.prospect.fit(name, Request(folder, **fields), None))
    asking.addCallback(answer.append)
    bench.found(folder=folder, size=int(gib * GIB))
    [found] = answer
    return found


# -- what is measured --------------------------------------------------------------------


def test_what_was_measured_holds_for_whoever_deploys_the_same_again(tmp_path: Path) -> None:
    first = Bench(tmp_path)
    first.open()
    come(first, "a", 1)
    # Until then it is an estimate.
    assert (first.fleet.deployment("a").memory or 0) >= BASE + GIB
    serve(first, "a", Peaks(3 * GIB, 2 * GIB))
    assert first.fleet.deployment("a").memory == 3 * GIB
    first.do(first.fleet.remove("a", "uid 0"))
    worker(first, "a").stopped.callback(None)
    first.do(first.fleet.close())
    first.store.stop()

    second = Bench(tmp_path)
    second.open()
    second.hub.blueprints["/models/a"] = of_size(1)
    for name, dtype in (("other", "auto"), ("named", "float32")):
        second.deploy(name, model="/models/a", dtype=dtype)
        second.found(folder="/models/a", size=GIB)
        assert second.fleet.deployment(name).memory == 3 * GIB
    known = second.do(second.fleet.prospect.memory("other"))
    assert known.measured
    assert known.footprint is not None
    assert known.footprint.host_peaks == Peaks(3 * GIB, 2 * GIB)
    # Whoever computes otherwise starts anew.
    second.deploy("half", model="/models/a", dtype="bfloat16")
    second.found(folder="/models/a", size=GIB)
    assert not second.do(second.fleet.prospect.memory("half")).measured
    second.store.stop()


def test_what_is_used_in_service_counts_from_then_on(bench: Bench) -> None:
    come(bench, "a", 1)
    one = serve(bench, "a", Peaks(GIB, GIB))
    one.pid, one.rss, one.in_flight = 2**22 + 5, 5 * GIB, 1
    bench.reactor.advance(5.1)
    found = bench.do(bench.fleet.prospect.memory("a")).footprint
    assert found is not None
    assert (found.host_peaks.busy, found.host_settled) == (5 * GIB, 5 * GIB)
    # Less is no news.
    one.rss = 2 * GIB
    bench.reactor.advance(5.1)
    assert bench.do(bench.fleet.prospect.memory("a")).footprint == found


def test_a_worker_that_says_nothing_is_looked_at(bench: Bench) -> None:
    come(bench, "a", 1)
    worker(bench, "a").rss = 4 * GIB
    serve(bench, "a")
    found = bench.do(bench.fleet.prospect.memory("a")).footprint
    assert found is not None
    assert found.host_peaks.warm == 4 * GIB


def test_nothing_is_loaded_before_its_files_are_looked_at(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading: Deferred[Blueprint] = Deferred()
    monkeypatch.setattr(bench.hub, "blueprint", lambda _: reading)
    bench.deploy()
    bench.found(size=1000)
    assert bench.phase() is Phase.QUEUED
    reading.callback(of_size(1))
    bench.turn()
    assert bench.phase() is Phase.SPAWNING


# -- loads that ran out ------------------------------------------------------------------


def ran_out(bench: Bench, name: str, failure: FailureClass, peak: int | None = None) -> None:
    """Its load ends for want of memory."""
    one = worker(bench, name)
    one.uuid = uuid = f"uuid of {name}"
    order = LoadOrder(name, f"/models/{name}")
    one.observer.life(WorkerLife(uuid, name, 1, 0, "boot", NOW))
    one.observer.crashed(
        Dossier(
            id=0, deployment=name, generation=1, replica=0, worker=uuid, at=NOW,
            failure=failure, reason="There isn't enough memory", phase=Phase.LOADING,
            spawned_at=NOW, peak_rss=peak, order=order,
            signal=9 if peak is not None else None,
        )
    )  # fmt: skip
    one.failure = failure
    one.become(Phase.BACKOFF)
    bench.turn()


def test_memory_that_has_vanished_is_waited_for_and_tried_once_for_each_change(
    bench: Bench,
) -> None:
    bench.available = 4 * GIB
    come(bench, "a", 1)
    one = worker(bench, "a")
    one.become(Phase.LOADING)
    # Another process takes it meanwhile.
    bench.available = RESERVE + GIB
    ran_out(bench, "a", FailureClass.RESOURCE)
    for _ in range(100):
        bench.reactor.advance(1.1)
    assert one.hastened == 0
    # Its timer has fired, and still there is no more than there was.
    one.become(Phase.QUEUED)
    for _ in range(10):
        bench.reactor.advance(1.1)
    assert phase(one) is Phase.QUEUED
    assert "It waits for memory" in reason(bench, "a")
    bench.available = 4 * GIB
    bench.reactor.advance(1.1)
    bench.turn()
    assert phase(one) is Phase.SPAWNING
    # The next time there is memory again before the timer fires.
    bench.available = RESERVE + GIB
    ran_out(bench, "a", FailureClass.RESOURCE)
    bench.available = 4 * GIB
    bench.reactor.advance(1.1)
    bench.turn()
    assert (one.hastened, phase(one)) == (1, Phase.SPAWNING)


def test_a_load_that_was_killed_shows_that_it_needs_more(bench: Bench) -> None:
    bench.available = 6 * GIB
    come(bench, "a", 1)
    one = worker(bench, "a")
    one.become(Phase.LOADING)
    ran_out(bench, "a", FailureClass.OUT_OF_MEMORY, peak=6 * GIB)
    one.become(Phase.QUEUED)
    bench.turn()
    assert phase(one) is Phase.QUEUED
    assert "it needs about 6.6 GiB" in reason(bench, "a")
    bench.available = 8 * GIB
    bench.reactor.advance(1.1)
    bench.turn()
    assert phase(one) is Phase.SPAWNING
    serve(bench, "a")


def test_somebody_may_have_it_tried_whatever_was(bench: Bench) -> None:
    bench.available = RESERVE + 2 * GIB
    come(bench, "a", 1)
    one = worker(bench, "a")
    one.become(Phase.LOADING)
    bench.available = RESERVE + 2 * GIB - 1
    ran_out(bench, "a", FailureClass.OUT_OF_MEMORY, peak=2 * GIB)
    one.become(Phase.QUEUED)
    bench.turn()
    assert phase(one) is Phase.QUEUED
    bench.do(bench.fleet.stop("a", "uid 0"))
    one.stopped.callback(None)
    bench.turn()
    bench.do(bench.fleet.start("a", "uid 0"))
    assert worker(bench, "a").phase is Phase.SPAWNING


def test_a_limit_of_its_own_is_no_shortage_of_the_machine(bench: Bench) -> None:
    bench.available = 4 * GIB
    come(bench, "a", 1, limits=Limits(memory=2 * GIB))
    one = worker(bench, "a")
    one.become(Phase.LOADING)
    ran_out(bench, "a", FailureClass.OUT_OF_MEMORY, peak=2 * GIB)
    one.become(Phase.QUEUED)
    bench.turn()
    assert phase(one) is Phase.SPAWNING


def test_what_was_free_right_after_the_failure_is_the_measure() -> None:
    shortages, needs = Shortages(), Footprint(host=4 * GIB)
    short, enough = Free(2 * GIB), Free(5 * GIB)
    shortages.add("a", 1, needs, short, fits=True, killed_at=None)
    assert shortages.holds("a", 1, needs, short)
    assert not shortages.holds("a", 1, needs, Free(3 * GIB))
    assert not shortages.holds("a", 2, needs, short)
    assert "2.0 GiB were free" in (shortages.sentence("a", 1) or "")
    # It was taken and given back: then the next try needs no change.
    shortages.add("a", 1, needs, enough, fits=True, killed_at=None)
    assert not shortages.holds("a", 1, needs, enough)


# -- who goes first -----------------------------------------------------------------------


def test_a_large_one_is_not_passed_for_ever(bench: Bench) -> None:
    bench.available = RESERVE + 6 * GIB
    come(bench, "one", 2, Load.ON_DEMAND)
    serve(bench, "one", Peaks(3 * GIB, 3 * GIB, 3 * GIB)).in_flight = 1
    bench.available = RESERVE + 3 * GIB
    come(bench, "large", 5)
    come(bench, "two", 0.1)
    assert [bench.phase("large"), bench.phase("two")] == [Phase.QUEUED, Phase.SPAWNING]
    serve(bench, "two", Peaks(GIB, GIB, GIB))
    bench.reactor.advance(31)
    come(bench, "three", 0.1)
    # It would take what the large one may have as soon as nobody uses the first.
    assert bench.phase("three") is Phase.QUEUED
    bench.available = RESERVE + 6 * GIB
    bench.reactor.advance(1.1)
    bench.turn()
    assert bench.phase("large") is Phase.SPAWNING


def test_what_has_nothing_to_hope_for_holds_up_nobody(bench: Bench) -> None:
    bench.available = RESERVE + 3 * GIB
    come(bench, "large", 5)
    bench.fleet.configure(configured(limit=50 * GIB))
    come(bench, "huge", 500)
    assert bench.phase("huge") is Phase.FAILED
    bench.reactor.advance(31)
    come(bench, "small", 0.1)
    assert bench.phase("small") is Phase.SPAWNING


def test_nothing_more_goes_while_what_goes_makes_room(bench: Bench) -> None:
    bench.fleet.configure(configured(limit=7 * GIB))
    for name in ("one", "two"):
        come(bench, name, 2, Load.ON_DEMAND)
        serve(bench, name, Peaks(3 * GIB, 3 * GIB, 3 * GIB))
    bench.reactor.advance(20)
    come(bench, "three", 2)
    gone = [name for name in ("one", "two") if worker(bench, name).phase is Phase.DRAINING]
    assert len(gone) == 1
    bench.reactor.advance(20)
    bench.turn()
    assert [name for name in ("one", "two") if worker(bench, name).phase is Phase.DRAINING] == gone
    # A small one that comes now doesn't take what was freed for it.
    come(bench, "small", 0.1)
    assert bench.phase("small") is Phase.QUEUED
    worker(bench, gone[0]).stopped.callback(None)
    bench.turn()
    assert bench.phase("three") is Phase.SPAWNING


def configured(limit: int) -> Any:
    return Configuration(memory=Memory(limit_bytes=limit, min_residency_seconds=0.1))


# -- GPUs ---------------------------------------------------------------------------------


def gpu(number: int, free: float, total: float = 80) -> Gpu:
    return Gpu(f"cuda:{number}", "H100", int(total * GIB), int(free * GIB))


def test_a_model_goes_to_the_gpu_that_it_fits_best(bench: Bench) -> None:
    bench.gpus = [gpu(0, 70), gpu(1, 20), gpu(2, 5)]
    come(bench, "a", 8)
    assert worker(bench, "a").place("auto") == "cuda:1"
    # One loads on each.
    come(bench, "b", 8)
    assert worker(bench, "b").place("auto") == "cuda:0"
    # And two in all, for both read from one disk.
    come(bench, "c", 2)
    assert bench.phase("c") is Phase.QUEUED


def test_a_large_model_is_shared_by_several(bench: Bench) -> None:
    bench.gpus = [gpu(0, 40), gpu(1, 30), gpu(2, 20)]
    come(bench, "a", 50)
    assert worker(bench, "a").place("auto") == "cuda:0,cuda:1"
    fits = bench.do(bench.fleet.prospect.memory("a"))
    assert [(each.device, each.total) for each in fits.rooms[1:]] == [
        (f"cuda:{number}", 80 * GIB) for number in range(3)
    ]


def test_it_waits_for_memory_of_a_gpu_and_says_so(bench: Bench) -> None:
    bench.gpus = [gpu(0, 5)]
    come(bench, "a", 8)
    assert bench.phase("a") is Phase.QUEUED
    assert reason(bench, "a").startswith("It waits for memory of a GPU: it needs about 8.9 GiB")
    assert "cuda:0 has 4.5 GiB free" in reason(bench, "a")
    bench.gpus = [gpu(0, 50)]
    bench.fleet.look()
    bench.turn()
    assert bench.phase("a") is Phase.SPAWNING
    bench.fleet.configure(configured(limit=2**50))
    come(bench, "huge", 500)
    assert bench.phase("huge") is Phase.FAILED
    assert "more than the GPUs here have" in reason(bench, "huge")
    # On the processor it is another matter.
    come(bench, "processor", 1, device="cpu")
    assert bench.phase("processor") is Phase.SPAWNING


def test_what_a_model_will_take_of_a_gpu_is_kept_for_it(bench: Bench) -> None:
    bench.gpus = [gpu(0, 40)]
    come(bench, "a", 20)
    one = worker(bench, "a")
    one.pid = 77
    # It has loaded a part; the rest is not for others.
    bench.gpus = [replace(gpu(0, 35), processes={77: 5 * GIB})]
    come(bench, "b", 18)
    assert bench.phase("b") is Phase.QUEUED
    bench.gpus = [replace(gpu(0, 18.5), processes={77: 21 * GIB + CONTEXT})]
    measured = Peaks(20 * GIB, 21 * GIB, 21 * GIB)
    one.loaded = Loaded("fill-mask", "cuda:0", "float32", gpus={"cuda:0": measured})
    one.become(Phase.READY)
    bench.turn()
    assert bench.phase("b") is Phase.QUEUED
    come(bench, "c", 15)
    assert bench.phase("c") is Phase.SPAWNING


def test_a_model_on_a_gpu_makes_room_for_another(bench: Bench) -> None:
    bench.gpus = [gpu(0, 40)]
    come(bench, "old", 20, Load.ON_DEMAND)
    one = worker(bench, "old")
    one.pid = 77
    bench.gpus = [replace(gpu(0, 18), processes={77: 22 * GIB})]
    measured = Peaks(20 * GIB, 21 * GIB, 21 * GIB)
    serve(bench, "old", device="cuda:0", gpus={"cuda:0": measured})
    assert fit(bench, "new", 20).verdict is Verdict.EVICTS
    bench.reactor.advance(20)
    come(bench, "new", 20)
    assert phase(one) is Phase.DRAINING
    assert bench.phase("new") is Phase.QUEUED


def test_where_torch_uses_no_gpu_none_is_reckoned_with(bench: Bench) -> None:
    bench.gpus = [gpu(0, 40), gpu(1, 40)]
    come(bench, "a", 1)
    serve(bench, "a", device="cpu")
    bench.gpus = [gpu(0, 0), gpu(1, 0)]
    come(bench, "b", 1)
    assert bench.phase("b") is Phase.SPAWNING


def test_a_gpu_that_nobody_knows_is_left_to_the_worker(bench: Bench) -> None:
    come(bench, "a", 1, device="cuda:1")
    assert worker(bench, "a").place("cuda:1") == "cuda:1"


def test_a_gpu_that_is_asked_for_is_not_taken_for_the_processor(bench: Bench) -> None:
    found = fit(bench, "a", 1, device="cuda")
    assert found.footprint is not None
    assert (found.footprint.device, found.footprint.gpu) == ("cuda", 0)
    assert "nobody knows of GPU memory here" in found.message


# -- dry runs -----------------------------------------------------------------------------


def test_a_dry_run_has_the_figures(bench: Bench) -> None:
    bench.available = RESERVE + 10 * GIB
    found = fit(bench, "a", 2)
    assert found.verdict is Verdict.FITS
    assert found.message == "It fits: 1 x about 2.4 GiB, 10.0 GiB are free."
    assert (found.measured, found.limit, found.free) == (False, 2**36, 10 * GIB)
    assert found.footprint is not None
    assert found.footprint.estimate is not None
    assert found.footprint.estimate.parameters == GIB // 2
    assert found.footprint.estimate.dtype == "float32"
    assert found.rooms[0].total == 2**36


def test_what_the_limit_leaves_is_told_apart_from_what_the_machine_has(bench: Bench) -> None:
    bench.available = RESERVE + 10 * GIB
    bench.fleet.configure(Configuration(memory=Memory(limit_bytes=3 * GIB)))
    come(bench, "a", 2)
    serve(bench, "a", Peaks(2 * GIB, 2 * GIB, 2 * GIB))
    found = fit(bench, "b", 1)
    assert found.verdict is Verdict.WAITS
    assert "1.0 GiB are left of the 3.0 GiB for all models" in found.message
    assert (found.free, found.rooms[0].free) == (GIB, 10 * GIB)
    come(bench, "b", 1)
    assert reason(bench, "b").endswith("1.0 GiB are left of the 3.0 GiB for all models.")


def test_a_worker_may_have_less_than_it_needs(bench: Bench) -> None:
    bench.available = RESERVE + 10 * GIB
    assert "may have" not in fit(bench, "a", 2, limits=Limits(memory=3 * GIB)).message
    tight = fit(bench, "a", 2, limits=Limits(memory=int(2.3 * GIB)))
    assert tight.verdict is Verdict.FITS
    assert "But each of its workers may have 2.3 GiB, and is ended" in tight.message
    found = fit(bench, "a", 2, limits=Limits(memory=2 * GIB))
    assert found.verdict is Verdict.NEVER
    assert found.message == (
        "It can't fit: 1 x about 2.4 GiB, and each of its workers may have 2.0 GiB."
    )


@pytest.mark.parametrize(
    ("name", "replicas", "most"),
    [("no name", 1, None), ("", 1, None), ("a", 65, None), ("a", 3, 2)],
)
def test_a_dry_run_refuses_what_can_not_be(
    bench: Bench, name: str, replicas: int, most: int | None
) -> None:
    asking = Deferred.fromCoroutine(
        bench.fleet.prospect.fit(name, Request("/models/a"), replicas, most)
    )
    failures: list[Failure] = []
    asking.addErrback(failures.append)
    assert isinstance(failures[0].value, InvalidRequest)


def test_files_that_can_not_be_loaded_are_no_error_of_a_dry_run(bench: Bench) -> None:
    asking = Deferred.fromCoroutine(bench.fleet.prospect.fit("a", Request("/models/a"), None))
    answer: list[Fit] = []
    asking.addCallback(answer.append)
    _, waiting, _ = bench.hub.asked[-1]
    waiting.errback(ModelFilesMissing("There is no folder /models/a."))
    bench.turn()
    [found] = answer
    assert found.verdict is Verdict.UNKNOWN
    assert found.message.startswith("How large it is isn't known. There is no folder /models/a;")
    assert found.rooms


def test_a_larger_replacement_says_what_the_old_one_gives_back(bench: Bench) -> None:
    bench.available = RESERVE + 10 * GIB
    come(bench, "a", 8)
    serve(bench, "a", Peaks(9 * GIB, 9 * GIB, 9 * GIB))
    bench.available = RESERVE + GIB
    found = fit(bench, "a", 9)
    assert found.verdict is Verdict.IN_PLACE
    assert found.gives_back == 9 * GIB
    assert "which goes first and gives back 9.0 GiB" in found.message
    assert fit(bench, "a", 12).verdict is Verdict.WAITS
    assert fit(bench, "a", 100).verdict is Verdict.NEVER
    # The same again is there.
    there = bench.do(bench.fleet.prospect.memory("a"))
    assert (there.verdict, there.gives_back) == (Verdict.FITS, 0)
    assert there.message.startswith("It is in memory")


def test_what_is_being_downloaded_is_known_by_its_size(bench: Bench) -> None:
    request = Request("org/name")
    bench.hub.entries = []
    unknown = bench.do(bench.fleet.prospect.fit(None, request, None))
    assert unknown.verdict is Verdict.UNKNOWN
    assert unknown.message.startswith("How large it is isn't known. The hub can't be reached;")
    assert unknown.free is not None
    bench.hub.listed["org/name"] = GIB
    listed = bench.do(bench.fleet.prospect.fit(None, request, None))
    assert (listed.verdict, listed.memory) == (Verdict.FITS, BASE + int(GIB * 1.2))
    bench.deploy("name", model="org/name")
    _, _, progress = bench.hub.asked[0]
    progress(Progress("download", 1.0, float(2 * GIB)))
    found = bench.do(bench.fleet.prospect.fit("other", request, None))
    assert found.verdict is Verdict.FITS
    assert found.memory == BASE + int(2 * GIB * 1.2)
