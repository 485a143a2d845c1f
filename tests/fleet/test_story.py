from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tursi.config import Workers
from tursi.fleet.story import MAX_EVENTS, tell
from tursi.model import (
    CanaryStatus,
    Crash,
    DeploymentStatus,
    Desired,
    Event,
    FailureClass,
    Limits,
    Load,
    Phase,
    Progress,
    Story,
    WorkerStatus,
)

NOW = 1_800_000_000.0  # 08:00:00 UTC
CREATED = Event(1, NOW - 600, "create", "mini", "uid 0 deploys mini: org/mini, 1 replica", "uid 0")


def worker(phase: Phase = Phase.READY, **fields: Any) -> WorkerStatus:
    return replace(
        WorkerStatus("mini.1.0#1", 0, phase, NOW - 60, uuid="life", generation=1), **fields
    )


def status(*workers: WorkerStatus, **fields: Any) -> DeploymentStatus:
    phase = workers[0].phase if workers else Phase.STOPPED
    one = DeploymentStatus(
        name="mini",
        model="org/mini",
        task=None,
        desired=Desired.RUNNING,
        phase=phase,
        replicas=max(len(workers), 1),
        ready=sum(each.phase is Phase.READY for each in workers),
        generation=1,
        device="cpu",
        dtype="float32",
        commit=None,
        created_at=NOW - 600,
        updated_at=NOW - 600,
        next_try_at=workers[0].next_try_at if workers else None,
        progress=workers[0].progress if workers else None,
        reason=workers[0].reason if workers else None,
        workers=workers,
    )
    return replace(one, **fields)


def crash(number: int = 7, **fields: Any) -> Crash:
    one = Crash(
        id=number,
        deployment="mini",
        generation=1,
        replica=0,
        worker="life",
        at=NOW - 60,
        failure=FailureClass.CRASH,
        reason="crashed with signal 11 (SIGSEGV)",
        phase=Phase.READY,
        spawned_at=NOW - 500,
        ready_at=NOW - 480,
        signal=11,
        peak_rss=3 * 2**29,
    )
    return replace(one, **fields)


def story(
    status: DeploymentStatus, *crashes: Crash, events: tuple[Event, ...] = (CREATED,)
) -> Story:
    return tell(status, events, crashes, Workers(), NOW)


def test_the_healthy() -> None:
    told = story(status(worker(), in_flight=3, queued=1))
    assert told.sentences == (
        (
            "mini is ready, since 07:59:00 UTC (60 s ago): 1 of 1 replica serving, "
            "3 requests in flight, 1 request waiting."
        ),
        "The last order came 10 min ago: uid 0 deploys mini: org/mini, 1 replica.",
        "None of its workers has ended unasked.",
    )
    assert (told.events, told.crash) == ((CREATED,), None)


@pytest.mark.parametrize("kind", ["import", "replace", "schedule", "rollback", "scale"])
def test_the_last_order_is_told_whatever_it_was(kind: str) -> None:
    order = Event(2, NOW - 50, kind, "mini", "uid 0 wants something of mini", "uid 0")
    told = story(status(worker()), events=(CREATED, order)).sentences
    assert told[1] == "The last order came 50 s ago: uid 0 wants something of mini."


def test_the_healthy_with_a_past() -> None:
    told = story(status(worker(failures=2)), crash(at=NOW - 7300), crash(6))
    assert told.sentences[2:] == (
        (
            "The last time that a worker ended unasked was 2 h 1 min ago, while ready: "
            "crashed with signal 11 (SIGSEGV) (crash 7)."
        ),
        (
            "It has failed twice in a row before; that is forgotten at 08:09:00 UTC, in 9 min, "
            "if nothing happens until then."
        ),
    )
    assert told.crash == 7


def test_a_crash_and_the_next_try() -> None:
    waiting = worker(
        Phase.BACKOFF, failure=FailureClass.CRASH, failures=1, next_try_at=NOW + 8, reason="crashed"
    )
    told = story(status(waiting), crash(requests=("a", "b")))
    assert told.sentences == (
        "mini is waiting before it is started again, since 07:59:00 UTC (60 s ago).",
        "Its worker ended 60 s ago, after 7 min in service: crashed with signal 11 (SIGSEGV).",
        "It held 2 requests then: a, b.",
        "That was its first failure; 5 in a row lead to quarantine.",
        (
            "Crash 7 has the evidence: it used up to 1.5 GiB of memory; `tursi "
            "crashes mini 7` shows "
            "its last lines and more."
        ),
        "A library crashed: another version, dtype or device may not.",
        (
            "The next try is at 08:00:08 UTC, in 8 s; deploying it again with "
            "`tursi up` doesn't wait "
            "for that."
        ),
    )
    assert told.crash == 7


def test_a_crash_loop_in_quarantine_tells_of_each() -> None:
    quarantined = worker(
        Phase.QUARANTINED, failure=FailureClass.CRASH, failures=3, next_try_at=NOW + 840
    )
    same = story(status(quarantined), crash(), crash(6), crash(5), crash(4))
    assert "That was failure 3 in a row." in same.sentences
    assert "Each time the reason was the same (crashes 5, 6)." in same.sentences
    assert same.sentences[-1].startswith("A single try follows at 08:14:00 UTC, in 14 min.")
    other = crash(6, reason="killed by signal 9 (SIGKILL) from outside", at=NOW - 90)
    two = story(status(replace(quarantined, failures=2)), crash(), crash(6), crash(5))
    assert "The one before had the same reason (crash 6)." in two.sentences
    mixed = story(status(quarantined), crash(), other)
    assert (
        "Before that: 90 s ago killed by signal 9 (SIGKILL) from outside (crash 6)."
        in mixed.sentences
    )


def test_memory_against_its_limit_and_the_traceback() -> None:
    failed = worker(Phase.FAILED, failure=FailureClass.OUT_OF_MEMORY)
    told = story(
        status(failed, limits=Limits(memory=2**31)),
        crash(
            failure=FailureClass.OUT_OF_MEMORY,
            reason="out of memory: the kernel killed the worker.",
            error="MemoryError: no more",
            ready_at=None,
        ),
    )
    assert told.sentences[1:] == (
        (
            "Its worker ended 60 s ago, 7 min after its start, before it was ready: "
            "out of memory: the kernel killed the worker."
        ),
        (
            "Crash 7 has the evidence: its traceback ends with 'MemoryError: no "
            "more', it used up to "
            "1.5 GiB of memory of the 2.0 GiB that it may use; `tursi crashes "
            "mini 7` shows its last "
            "lines and more."
        ),
        "Free memory, allow it more, or deploy it with a smaller dtype or fewer replicas.",
        "Nothing is tried by itself any more; deploying it again with `tursi up` does.",
    )


def test_one_replica_in_trouble_beside_one_that_serves() -> None:
    down = worker(
        Phase.BACKOFF,
        replica=1,
        failure=FailureClass.CRASH,
        failures=1,
        next_try_at=NOW + 4,
        reason="crashed with signal 11 (SIGSEGV)",
    )
    told = story(status(worker(), down), crash(replica=1))
    assert "1 of 2 replicas serving" in told.sentences[0]
    assert told.sentences[1].startswith("The worker of replica 1 ended 60 s ago")
    assert told.sentences[-1] == (
        "Replica 1 is waiting before it is started again, since 07:59:00 UTC (60 s ago): "
        "crashed with signal 11 (SIGSEGV); its next try is at 08:00:04 UTC, in 4 s."
    )


def test_an_older_generation_that_keeps_serving_is_told() -> None:
    told = story(
        status(
            worker(Phase.LOADING, generation=2, progress=Progress("load", 40, 100)),
            worker(),
            generation=2,
        )
    )
    assert told.sentences[0].startswith("mini is loading the model (40 %), since")
    assert told.sentences[-2:] == (
        "If nothing moves for 5 min, it is ended and tried again.",
        "Replica 0 of generation 1 is ready, since 07:59:00 UTC (60 s ago).",
    )


def test_a_canary_is_told_of_with_what_is_worse() -> None:
    canary = CanaryStatus(2, 10, Phase.READY, 1, "org/other", "5 % of its requests fail.", 100, 5)
    told = story(status(worker(), canary=canary)).sentences
    assert told[1] == (
        "Generation 2 is a canary with 10 % of the requests; it is ready, and 5 of 100 requests "
        "failed."
    )
    assert told[2] == "5 % of its requests fail."
    assert "tursi promote mini" in told[3]


def test_a_generation_that_failed_or_takes_the_others_place_is_told_of() -> None:
    failed = Event(
        9, NOW - 60, "generation.failed", "mini", "generation 2 of mini is given up", "it crashed"
    )
    told = story(status(worker()), events=(CREATED, failed)).sentences
    assert told[1].startswith("Generation 2 of mini is given up, since ")
    assert told[1].endswith(": it crashed.")
    assert not any(
        "given up" in each
        for each in story(
            status(worker()), events=(failed, replace(CREATED, id=10, at=NOW))
        ).sentences
    )
    assert any("no room for two" in each for each in story(status(in_place=True)).sentences)


def test_a_generation_that_is_down_is_not_the_deployment() -> None:
    down = status(
        worker(Phase.FAILED, generation=2),
        worker(),
        phase=Phase.FAILED,
        generation=2,
        stable=1,
        ready=1,
    )
    told = story(down).sentences[0]
    assert told.startswith("mini serves generation 1; generation 2 is down, and not tried again")


def test_a_range_of_replicas_and_what_keeps_from_more() -> None:
    held = Event(
        9, NOW - 60, "autoscale.held", "mini", "mini stays at 1 replicas", "2 GiB are free"
    )
    told = story(status(worker(), min_replicas=1, max_replicas=4), events=(CREATED, held)).sentences
    assert "(from 1 to 4 as needed)" in told[0]
    assert told[1] == "mini stays at 1 replicas: 2 GiB are free."


def test_the_stopped_and_those_without_files() -> None:
    stop = Event(2, NOW - 172_800, "stop", "mini", "uid 0 stops mini", "uid 0")
    told = story(status(desired=Desired.STOPPED), events=(CREATED, stop))
    assert told.sentences[:2] == (
        "mini is stopped, since 2027-01-13 08:00:00 UTC (2 days ago).",
        "The last order came 2 days ago: uid 0 stops mini.",
    )
    assert (
        "mini is down for want of its files, and not tried again"
        in (story(status(phase=Phase.FAILED, reason="There is no folder /x.")).sentences[0])
    )
    crashed = status(worker(), generation=2, stable=1, phase=Phase.FAILED, reason="It ended.")
    assert (
        story(crashed)
        .sentences[0]
        .startswith("mini serves generation 1; generation 2 is down, and not tried again")
    )
    missing = story(status(phase=Phase.FAILED, reason="There is no folder /x."))
    assert missing.sentences[1:3] == (
        "The reason: There is no folder /x.",
        "It began 10 min ago: uid 0 deploys mini: org/mini, 1 replica.",
    )


def test_what_is_not_loaded_tells_who_has_taken_its_place() -> None:
    unload = Event(3, NOW - 60, "unload", "mini", "mini is unloaded", "big needs 3 GiB of memory")
    scale = Event(4, NOW - 50, "scale", "mini", "uid 0 scales mini from 1 to 2", "uid 0")
    asleep = status(load=Load.ON_DEMAND)
    assert story(asleep, events=(CREATED, unload, scale)).sentences == (
        "mini is not loaded.",
        "It was unloaded 60 s ago: big needs 3 GiB of memory.",
        "The last order came 50 s ago: uid 0 scales mini from 1 to 2.",
        "None of its workers has ended unasked.",
        "The next request for it loads it.",
    )
    load = Event(5, NOW - 40, "load", "mini", "mini is loaded", "a request of key 1 (ci)")
    # The daemon has ended since.
    assert story(asleep, events=(CREATED, unload, load)).sentences[1] == (
        "Nobody has asked for it since the daemon began."
    )
    assert story(status(worker(), load=Load.ON_DEMAND), events=(CREATED, load)).sentences[1] == (
        "It was loaded 40 s ago: a request of key 1 (ci)."
    )


def test_files_that_come_from_the_hub_or_do_not() -> None:
    progress = Progress("download", 9 * 2**20, 20 * 2**20)
    fetching = story(status(phase=Phase.QUEUED, progress=progress))
    assert fetching.sentences[0].startswith(
        "mini is fetching its files from the hub (45 %, 9.0 MiB of 20.0 MiB), since"
    )
    asking = story(status(phase=Phase.QUEUED, progress=Progress("resolve")))
    assert asking.sentences[0].startswith("mini is asking the hub for its files, since")
    failed = Event(2, NOW - 5, "fetch.failed", "mini", "the files of mini can't be had", "no net")
    away = story(
        status(phase=Phase.BACKOFF, reason="no net", next_try_at=NOW + 3, progress=progress),
        events=(CREATED, failed),
    )
    assert away.sentences[0] == (
        "mini is waiting before the hub is asked again for its files, since 07:59:55 UTC (5 s ago)."
    )
    assert away.sentences[-1].startswith("The next try is at 08:00:03 UTC, in 3 s;")


def test_the_queued_is_told_what_it_waits_for() -> None:
    waiting = status(worker(Phase.QUEUED))

    def told(**fields: Any) -> tuple[str, ...]:
        return tell(waiting, (CREATED,), (), Workers(), NOW, **fields).sentences

    assert (
        told(loading=["a", "b", "mini"])[-1] == "It waits for what is being loaded just now: a, b."
    )
    assert told(loading=list("abcdefgh"))[-1].endswith(": a, b, c, d, e and 3 more.")
    assert told(loading=["a"], paused="Too many died: nothing is started.")[-1] == (
        "Too many died: nothing is started."
    )


def test_who_waits_for_memory_is_told_what_keeps_it() -> None:
    waiting = status(worker(Phase.QUEUED), reason="It waits for memory.")
    load = Event(5, NOW - 4, "load", "mini", "mini is loaded", "a request of 127.0.0.1")
    keeping = ("big is pinned", "old has requests")
    told = tell(waiting, (CREATED, load), (), Workers(), NOW, staying=keeping).sentences
    assert told[1:] == (
        "It was asked for 4 s ago: a request of 127.0.0.1.",
        "The reason: It waits for memory.",
        "It began 10 min ago: uid 0 deploys mini: org/mini, 1 replica.",
        "What has the memory stays: big is pinned, old has requests.",
    )


def test_what_can_never_have_its_memory_is_told_so() -> None:
    large = status(worker(Phase.QUEUED), phase=Phase.FAILED, reason="It needs 5 GiB of 1 GiB.")
    told = tell(large, (CREATED,), (), Workers(), NOW).sentences
    assert told == (
        "mini is too large for this machine as it is configured, since 07:59:00 UTC (60 s ago).",
        "The reason: It needs 5 GiB of 1 GiB.",
        "It began 10 min ago: uid 0 deploys mini: org/mini, 1 replica.",
        "It is loaded as soon as models may take enough memory (memory.limit_bytes).",
    )


def test_a_hung_one_was_killed_for_it_and_a_suspect_may_be() -> None:
    waiting = worker(Phase.BACKOFF, failure=FailureClass.HUNG, failures=1, next_try_at=NOW + 1)
    hung = crash(failure=FailureClass.HUNG, intent="hung", reason="its heartbeat has stood still")
    told = story(status(waiting), hung)
    assert told.sentences[1] == (
        "Its worker was killed 60 s ago, after 7 min in service, because it hung: its heartbeat "
        "has stood still."
    )
    assert "The stacks in there show where it stood." in told.sentences
    suspect = story(status(worker(Phase.SUSPECT, reason="its heartbeat has stood still for 5 s")))
    assert suspect.sentences[1] == "The reason: its heartbeat has stood still for 5 s."
    assert suspect.sentences[-1].startswith("It gets nothing new meanwhile.")


def test_requests_that_are_refused_are_told_until_that_is_over() -> None:
    refused = Event(
        5, NOW - 60, "request.refused", "mini", "request r1 is refused for an hour",
        "two workers ended while they held it",
    )  # fmt: skip
    sentence = (
        "Request r1 is refused for an hour since 07:59:00 UTC (60 s ago): two workers ended while "
        "they held it."
    )
    assert sentence in story(status(worker()), events=(CREATED, refused)).sentences
    restart = Event(6, NOW - 30, "restart", "mini", "uid 0 restarts mini", "uid 0")
    assert sentence not in story(status(worker()), events=(CREATED, refused, restart)).sentences
    early = replace(refused, at=NOW - 3700)
    assert len(story(status(worker()), events=(CREATED, early)).sentences) == 3


def test_a_device_that_may_be_failing_is_told_to_who_uses_it() -> None:
    sentence = "cuda:0 is suspect: workers have lost their GPU context on it 3 times within 1 h."

    def told(device: str, *crashes: Crash) -> tuple[str, ...]:
        shown = status(worker(device=device), device=device)
        suspects = {"cuda:0": sentence}
        return tell(shown, (CREATED,), crashes, Workers(), NOW, suspects=suspects).sentences

    assert sentence in told("cuda:0")
    assert sentence not in told("cpu")


def test_the_chain_leaves_out_what_only_passes_by() -> None:
    passing = [
        Event(number, NOW, f"worker.{phase.value}", "mini", "m")
        for number, phase in enumerate((Phase.SPAWNING, Phase.LOADING, Phase.SETTLING), 10)
    ]
    many = [Event(number, NOW, "worker.ready", "mini", "m") for number in range(20, 40)]
    told = story(status(worker()), events=(CREATED, *passing, many[0]))
    assert [event.id for event in told.events] == [1, 20]
    assert len(story(status(worker()), events=tuple(many)).events) == MAX_EVENTS


def test_another_replicas_or_an_overcome_crash_is_no_cause() -> None:
    waiting = worker(Phase.BACKOFF, failure=FailureClass.HOST, reason="no more processes")
    for each in (crash(replica=1), crash(generation=2), crash()):
        told = story(status(waiting), each)
        assert "The reason: no more processes." in told.sentences


TIMES = st.floats(NOW - 10**7, NOW + 10**6)
WORKERS = st.builds(
    worker,
    phase=st.sampled_from(Phase),
    replica=st.integers(0, 3),
    since=TIMES,
    generation=st.integers(1, 2),
    reason=st.none() | st.just("It is so."),
    failure=st.none() | st.sampled_from(FailureClass),
    failures=st.integers(0, 9),
    next_try_at=st.none() | TIMES,
    progress=st.none() | st.builds(Progress, st.just("load"), st.none() | st.floats(0, 9)),
)
CRASHES = st.builds(
    crash,
    number=st.integers(1, 99),
    at=TIMES,
    replica=st.integers(0, 3),
    failure=st.sampled_from(FailureClass),
    phase=st.sampled_from(Phase),
    ready_at=st.none() | TIMES,
    peak_rss=st.none() | st.integers(0, 2**40),
    error=st.none() | st.just("ValueError: so"),
    requests=st.lists(st.just("r1"), max_size=9).map(tuple),
)


@given(
    st.lists(WORKERS, max_size=4),
    st.lists(CRASHES, max_size=4),
    st.sampled_from(Desired),
    st.sampled_from(Phase),
)
def test_whatever_has_happened_there_is_an_answer_in_sentences(
    workers: list[WorkerStatus], crashes: list[Crash], desired: Desired, phase: Phase
) -> None:
    shown = status(*workers, desired=desired, phase=workers[0].phase if workers else phase)
    told = story(shown, *sorted(crashes, key=lambda each: -each.id))
    assert told.sentences
    for sentence in told.sentences:
        assert sentence.endswith(".")
        assert ".." not in sentence
        assert "None " not in sentence.replace("None of its workers", "")
        assert "{" not in sentence
    assert len(set(told.sentences)) == len(told.sentences) or len(workers) > 1


@pytest.mark.parametrize("phase", Phase)
def test_every_phase_has_its_words(phase: Phase) -> None:
    assert story(status(worker(phase))).sentences[0].startswith("mini is ")
