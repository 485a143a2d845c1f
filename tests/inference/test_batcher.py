from __future__ import annotations

import mmap
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
from bench import RecordedCall, bench_route
from hypothesis import given
from hypothesis import strategies as st

from tursi.faces.route import Answer
from tursi.heartbeat import SIZE, Writer
from tursi.inference.batcher import Batcher, window
from tursi.inference.job import Job
from tursi.inference.outbox import Outbox
from tursi.inference.scheduler import StickyError
from tursi.inference.tokens import Tokens
from tursi.model import Task, Usage
from tursi.tasks import ClassifyRequest, EmbedRequest, TaskRequest
from tursi.wire import Ask, Decoder, End, Kind, decode_end


class Lengths:
    """An encoder whose inputs are their own lengths and whose outputs are too."""

    task = Task.FEATURE_EXTRACTION
    requests: tuple[type[TaskRequest], ...] = (EmbedRequest,)
    max_batch_tokens = 64

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.poison: set[int] = set()
        self.error: Exception = RuntimeError("poisoned")

    def items(self, request: Any) -> list[Tokens]:
        return [Tokens(range(int(text))) for text in request.inputs]

    def compute(self, batch: Sequence[Tokens]) -> Sequence[int]:
        lengths = [len(tokens.ids) for tokens in batch]
        self.batches.append(lengths)
        if self.poison.intersection(lengths):
            raise self.error
        return lengths

    def assemble(
        self, request: Any, items: Sequence[Tokens], outputs: Sequence[Any], usage: Usage
    ) -> Any:
        return list(outputs), usage


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Shop:
    """A batcher with a recording encoder."""

    def __init__(self) -> None:
        self.encoder, self.clock = Lengths(), Clock()
        self.written: list[bytes] = []
        self.outbox = Outbox(self.written.append, lambda job: None)
        self.batcher = Batcher(self.encoder, self.outbox, Writer(mmap.mmap(-1, SIZE)), self.clock)
        self._next = 1

    def ask(self, *lengths: int, seconds: float = 60.0) -> Job:
        request = EmbedRequest(tuple(map(str, lengths)))
        job = Job(self._next, Ask("test", "", "", seconds, b""), bench_route(), self.clock.now)
        self._next += 1
        job.call = RecordedCall(request)
        self.batcher.add(job, request)
        return job

    def run(self) -> None:
        while self.batcher.busy:
            self.batcher.step()
            self.outbox.flush()

    def ends(self) -> dict[int, End]:
        frames = Decoder().feed(b"".join(self.written))
        return {frame.id: decode_end(frame.body) for frame in frames if frame.kind == Kind.END}

    def outputs(self, job: Job) -> list[int]:
        call: Any = job.call
        return list(call.result[0])


@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=60).map(sorted),
    st.data(),
    st.integers(1, 1024),
)
def test_a_window_holds_its_start_and_fits(lengths: list[int], data: Any, budget: int) -> None:
    start = data.draw(st.integers(0, len(lengths) - 1))
    low, high = window(lengths, start, budget)
    assert 0 <= low <= start < high <= len(lengths)
    padded = (high - low) * lengths[high - 1]
    assert padded <= budget or high - low == 1
    assert padded - sum(lengths[low:high]) <= sum(lengths[low:high]) // 8 + 64


def test_a_request_is_split_and_put_together_in_order() -> None:
    shop = Shop()
    lengths = (5, 60, 3, 30, 1, 30, 64, 2)
    job = shop.ask(*lengths)
    shop.run()
    assert shop.outputs(job) == list(lengths)
    assert sorted(chain.from_iterable(shop.encoder.batches)) == sorted(lengths)
    assert all(len(batch) * max(batch) <= 64 for batch in shop.encoder.batches)
    assert shop.ends()[job.id].usage.prompt_tokens == sum(lengths)


def test_requests_of_equal_length_share_a_batch() -> None:
    shop = Shop()
    jobs = [shop.ask(8) for _ in range(8)]
    shop.run()
    assert shop.encoder.batches == [[8] * 8]
    assert all(shop.ends()[job.id].usage.batch_size == 8 for job in jobs)


def test_the_oldest_is_always_in_the_next_batch() -> None:
    shop = Shop()
    shop.ask(64)
    for _ in range(20):
        shop.ask(2)
    shop.batcher.step()
    assert shop.encoder.batches[0] == [64]


def test_more_than_the_budget_goes_alone() -> None:
    shop = Shop()
    shop.ask(500, 500)
    shop.run()
    assert shop.encoder.batches == [[500], [500]]


def test_a_poisoned_input_fails_alone() -> None:
    shop = Shop()
    shop.encoder.poison = {7}
    jobs = [shop.ask(length) for length in (6, 7, 8)]
    shop.run()
    ends = shop.ends()
    assert [ends[job.id].error for job in jobs] == ["", "internal_error", ""]
    assert [shop.outputs(jobs[0]), shop.outputs(jobs[2])] == [[6], [8]]


def test_a_poisoned_input_takes_its_own_request_with_it() -> None:
    shop = Shop()
    shop.encoder.poison = {7}
    mixed, clean = shop.ask(6, 7, 8, 60, 61), shop.ask(5, 6)
    shop.run()
    assert shop.ends()[mixed.id].error == "internal_error"
    assert shop.outputs(clean) == [5, 6]
    # What is left of the failed request isn't computed any more.
    assert [60] not in shop.encoder.batches


def test_an_accelerator_that_is_lost_ends_everything() -> None:
    class AcceleratorError(RuntimeError):
        pass

    shop = Shop()
    shop.encoder.poison, shop.encoder.error = {7}, AcceleratorError("device-side assert")
    jobs = [shop.ask(7), shop.ask(60)]
    with pytest.raises(StickyError):
        shop.batcher.step()
    shop.outbox.flush()
    assert {shop.ends()[job.id].error for job in jobs} == {"internal_error"}


def test_a_deadline_counts_from_arrival_and_saves_the_work() -> None:
    shop = Shop()
    late, fine = shop.ask(8, 60, seconds=5.0), shop.ask(9)
    shop.clock.now += 6.0
    shop.run()
    assert shop.ends()[late.id].error == "deadline_exceeded"
    assert shop.ends()[fine.id].error == ""
    assert shop.encoder.batches == [[9]]


def test_a_cancelled_request_is_not_computed_and_says_nothing() -> None:
    shop = Shop()
    gone, fine = shop.ask(8, 60), shop.ask(9)
    gone.cancelled = True
    shop.run()
    kinds = [f.kind for f in Decoder().feed(b"".join(shop.written)) if f.id == gone.id]
    assert kinds == [Kind.END]
    assert shop.ends()[gone.id].error == "request_cancelled"
    assert shop.encoder.batches == [[9]]
    assert shop.outputs(fine) == [9]


def test_a_defect_in_the_encoding_costs_one_request() -> None:
    shop = Shop()

    class Broken(RecordedCall):
        def whole(self, result: Any) -> Any:
            raise ValueError("can't encode")

    broken, fine = shop.ask(8), shop.ask(8)
    broken.call = Broken(ClassifyRequest(()))
    shop.run()
    assert shop.ends()[broken.id].error == "internal_error"
    assert shop.ends()[fine.id].error == ""


def test_large_answers_leave_in_pieces() -> None:
    written: list[bytes] = []
    outbox = Outbox(written.append, lambda job: None)
    job = Job(1, Ask("test", "", "", 1.0, b""), bench_route(), 0.0)
    body = bytes(range(256)) * 12_000
    outbox.answer(job, Answer(200, "application/json", body))
    outbox.flush()
    assert len(written) == 1
    frames = list(Decoder().feed(written[0]))
    assert [frame.kind for frame in frames] == [
        Kind.HEAD,
        Kind.BODY,
        Kind.BODY,
        Kind.BODY,
        Kind.END,
    ]
    assert b"".join(frame.body for frame in frames if frame.kind == Kind.BODY) == body
