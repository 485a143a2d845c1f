from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from bench import Bench, recorded
from transformers import AutoModelForCausalLM, AutoTokenizer

from tursi.errors import ContextLengthExceeded, InternalError, InvalidRequest, by_code
from tursi.inference.generation import Generator
from tursi.inference.job import Job
from tursi.tasks import Choice, Generated, GenerateRequest, Message, Sampling
from tursi.wire import Kind

PROMPTS = (
    "the quick brown",
    "hello",
    "a worker answers what the daemon asks, and paris is the capital of france; hello world",
    "x",
    "paris is",
)

NEVER = 10**6
"""An end-of-text token that no model makes."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def bench(folder: Path) -> Bench:
    return Bench(folder)


def generate(bench: Bench, *prompts: Any, **options: Any) -> Generated:
    (result,) = bench.results(ask(*prompts, **options), type_=Generated)
    return result


def ask(*prompts: Any, n: int = 1, logprobs: int | None = None, **sampling: Any) -> GenerateRequest:
    return GenerateRequest(prompts=prompts, n=n, logprobs=logprobs, sampling=Sampling(**sampling))


def texts(result: Generated) -> list[str]:
    return [choice.text for choice in result.choices]


def ids(choice: Choice) -> list[int]:
    return [token.id for token in choice.tokens]


class Reference:
    """Plain transformers."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def greedy(self, prompt: str | Sequence[int], count: int, **options: Any) -> list[int]:
        given = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        inputs = torch.tensor([given])
        made = self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=count,
            do_sample=False,
            **options,
        )
        return [int(id_) for id_ in made[0, len(given) :]]

    def text(self, made: list[int]) -> str:
        return str(self.tokenizer.decode(made, skip_special_tokens=True))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


def made_by(bench: Bench, jobs: Sequence[Job]) -> list[list[int]]:
    found = []
    for job in jobs:
        assert bench.end(job).error == ""
        result = recorded(job).result
        assert isinstance(result, Generated)
        found.append(ids(result.choices[0]))
    return found


def test_greedy_tokens_equal_transformers(bench: Bench, reference: Reference) -> None:
    for prompt in PROMPTS:
        result = generate(bench, prompt, max_tokens=60, logprobs=0, ignore_eos=True)
        expected = reference.greedy(prompt, 60, eos_token_id=NEVER)
        assert ids(result.choices[0]) == expected
        assert result.choices[0].finish_reason == "length"
        assert result.choices[0].text == reference.text(expected)
        assert result.usage.completion_tokens == 60


def test_a_batch_changes_no_token(bench: Bench, reference: Reference) -> None:
    jobs = [
        bench.ask(ask(prompt, max_tokens=40, logprobs=0, ignore_eos=True)) for prompt in PROMPTS
    ]
    bench.run()
    for job, made in zip(jobs, made_by(bench, jobs), strict=True):
        prompt = recorded(job).request.prompts[0]  # type: ignore[union-attr] # it is one
        assert made == reference.greedy(prompt, 40, eos_token_id=NEVER)
    assert bench.end(jobs[-1]).usage.batch_size == len(PROMPTS)


def churn(bench: Bench, reference: Reference, most: int) -> None:
    """Rows of all lengths join and leave at random, at most ``most`` at a time."""
    chance = random.Random(2)
    jobs: list[Job] = []
    wanted: list[tuple[tuple[int, ...], int]] = []
    for _ in range(400):
        if len(jobs) < 14 and chance.random() < 0.3:
            prompt = tuple(chance.randrange(4, 300) for _ in range(chance.randint(1, 60)))
            count = chance.randint(1, 40)
            wanted.append((prompt, count))
            jobs.append(bench.ask(ask(prompt, max_tokens=count, logprobs=0, ignore_eos=True)))
        if bench.engine.busy:
            bench.step()
            assert isinstance(bench.engine, Generator)
            assert len(bench.engine._rows) <= most
    bench.run()
    assert len(jobs) == 14
    for (prompt, count), made in zip(wanted, made_by(bench, jobs), strict=True):
        assert made == reference.greedy(prompt, count, eos_token_id=NEVER)


def test_rows_that_join_and_leave_disturb_nobody(folder: Path, reference: Reference) -> None:
    churn(Bench(folder, max_sequences=4), reference, 4)


def test_sliding_windows_are_batched_too(tmp_path: Path) -> None:
    folder = models.sliding_window(tmp_path)
    bench = Bench(folder, max_sequences=4)
    assert isinstance(bench.engine, Generator)
    assert bench.engine._capacity == 4
    churn(bench, Reference(folder), 4)


def test_one_row_at_a_time_where_rows_can_not_share(folder: Path, reference: Reference) -> None:
    bench = Bench(folder)
    assert isinstance(bench.engine, Generator)
    bench.engine._decoder.batched = False
    bench.engine._capacity = 1
    churn(bench, reference, 1)


def test_a_model_without_a_cache_reads_everything_again(folder: Path, reference: Reference) -> None:
    bench = Bench(folder)
    assert isinstance(bench.engine, Generator)
    bench.engine._decoder.batched = bench.engine._decoder.cached = False
    bench.engine._capacity = 1
    churn(bench, reference, 1)


@pytest.mark.parametrize("family", ["GPT2", "Qwen3", "Gemma2", "Falcon", "Mamba", "Bloom"])
def test_other_families_equal_transformers(tmp_path: Path, family: str) -> None:
    import transformers

    tokenizer = models.byte_level_tokenizer()
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more: dict[str, dict[str, Any]] = {
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
        "Qwen3": {**size, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8},
        "Gemma2": {
            **size,
            "intermediate_size": 64,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 8,
        },
        "Falcon": size,
        "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    }
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer),
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=3,
        pad_token_id=0,
        **more[family],
    )
    torch.manual_seed(1)
    name = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    getattr(transformers, name)(config).eval().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    bench, reference = Bench(tmp_path), Reference(tmp_path)
    jobs = [
        bench.ask(ask(prompt, max_tokens=24, logprobs=0, ignore_eos=True)) for prompt in PROMPTS
    ]
    bench.run()
    for prompt, made in zip(PROMPTS, made_by(bench, jobs), strict=True):
        assert made == reference.greedy(prompt, 24, eos_token_id=NEVER)


def test_long_prompts_are_read_in_pieces(tmp_path: Path) -> None:
    folder = models.chat(tmp_path, context=2048)
    bench, reference = Bench(folder), Reference(folder)
    chance = random.Random(3)
    long = tuple(chance.randrange(4, 300) for _ in range(1300))
    first = bench.ask(ask("hello", max_tokens=30, logprobs=0, ignore_eos=True), stream=True)
    bench.step()
    second = bench.ask(ask(long, max_tokens=8, logprobs=0, ignore_eos=True))
    before = len(recorded(first).deltas)
    bench.step()
    bench.step()
    # Two pieces of the long prompt are read, and the other row went on.
    assert len(recorded(first).deltas) >= before
    assert isinstance(bench.engine, Generator)
    assert bench.engine._prefill is not None
    bench.run()
    assert made_by(bench, [second]) == [reference.greedy(long, 8, eos_token_id=NEVER)]


# -- ends ------------------------------------------------------------------------------


def test_eos_ends_the_text_and_is_not_shown(folder: Path, reference: Reference) -> None:
    made = reference.greedy(PROMPTS[0], 30, eos_token_id=NEVER)
    end = made[9]
    expected = made[: made.index(end)]
    bench = Bench(folder)
    assert isinstance(bench.engine, Generator)
    bench.engine._eos = frozenset({end})
    (choice,) = generate(bench, PROMPTS[0], max_tokens=30, logprobs=0).choices
    assert (ids(choice), choice.finish_reason) == (expected, "stop")
    assert choice.text == reference.text(expected)
    (choice,) = generate(bench, PROMPTS[0], max_tokens=30, logprobs=0, ignore_eos=True).choices
    assert (ids(choice), choice.finish_reason) == (made, "length")
    (choice,) = generate(bench, PROMPTS[0], max_tokens=30, min_tokens=15, logprobs=0).choices
    assert end not in ids(choice)[:15]
    assert ids(choice)[: len(expected)] == expected


def test_the_generation_config_may_list_several_ends(tmp_path: Path, folder: Path) -> None:
    def change(copy: Path) -> None:
        (copy / "generation_config.json").write_text('{"eos_token_id": [3, 77]}', "utf-8")

    bench = Bench(models.copy(folder, tmp_path / "copy", change))
    assert isinstance(bench.engine, Generator)
    assert bench.engine._eos == {3, 77}


def test_stop_tokens_end_the_text(bench: Bench, reference: Reference) -> None:
    made = reference.greedy(PROMPTS[0], 30, eos_token_id=NEVER)
    stop = made[12]
    (choice,) = generate(
        bench, PROMPTS[0], max_tokens=30, stop_token_ids=(stop,), logprobs=0, ignore_eos=True
    ).choices
    assert ids(choice) == made[: made.index(stop)]
    assert choice.finish_reason == "stop"


def test_stop_strings_never_show(bench: Bench) -> None:
    (whole,) = texts(generate(bench, PROMPTS[2], max_tokens=60, ignore_eos=True))
    for length in (1, 2, 5):
        stop = whole[20 : 20 + length]
        request = ask(
            PROMPTS[2], max_tokens=60, ignore_eos=True, stop=("never there", stop), logprobs=0
        )
        job = bench.ask(request, stream=True)
        plain = bench.ask(request)
        bench.run()
        expected = whole[: whole.index(stop)]
        assert bench.body(job).decode() == f"<{expected}>"
        assert recorded(job).deltas[-1].finish_reason == "stop"
        result = recorded(plain).result
        assert isinstance(result, Generated)
        (choice,) = result.choices
        assert (choice.text, choice.finish_reason) == (expected, "stop")
        # The tokens are those of the text that is shown.
        assert len(choice.tokens) <= bench.end(plain).usage.completion_tokens


def test_a_stop_string_that_does_not_come_costs_no_text(bench: Bench) -> None:
    (whole,) = texts(generate(bench, PROMPTS[1], max_tokens=40, ignore_eos=True))
    stop = whole[-1] + "never there"
    (result,) = texts(generate(bench, PROMPTS[1], max_tokens=40, ignore_eos=True, stop=(stop,)))
    assert result == whole


def test_without_a_limit_the_context_is_the_limit(bench: Bench) -> None:
    result = generate(bench, "hello", ignore_eos=True)
    assert result.choices[0].finish_reason == "length"
    assert result.usage.prompt_tokens + result.usage.completion_tokens == 256


def test_prompts_that_do_not_fit_are_refused_or_cut(bench: Bench, reference: Reference) -> None:
    long = tuple(range(4, 260))
    with pytest.raises(
        ContextLengthExceeded, match="context is 256 tokens, but the prompt has 256"
    ):
        generate(bench, long)
    with pytest.raises(ContextLengthExceeded, match="200 in the prompt and 100 to generate"):
        generate(bench, long[:200], max_tokens=100)
    with pytest.raises(ContextLengthExceeded, match="Prompt 0 has 500000 characters"):
        generate(bench, "hello" * 100_000)
    request = GenerateRequest(
        prompts=(long,), truncate=True, logprobs=0, sampling=Sampling(max_tokens=6, ignore_eos=True)
    )
    (result,) = bench.results(request, type_=Generated)
    assert result.usage.prompt_tokens == 250
    assert ids(result.choices[0]) == reference.greedy(long[-250:], 6, eos_token_id=NEVER)


# -- streams ---------------------------------------------------------------------------


def test_pieces_join_to_the_whole(bench: Bench) -> None:
    for prompt in PROMPTS:
        request = ask(prompt, max_tokens=50, ignore_eos=True)
        job = bench.ask(request, stream=True)
        bench.run()
        (whole,) = texts(generate(bench, prompt, max_tokens=50, ignore_eos=True))
        assert bench.body(job).decode() == f"<{whole}>"
        assert "".join(delta.text for delta in recorded(job).deltas) == whole
        reasons = [delta.finish_reason for delta in recorded(job).deltas]
        assert reasons[-1] == "length"
        assert set(reasons[:-1]) <= {None}


def test_one_frame_carries_all_streams_of_a_step(bench: Bench) -> None:
    jobs = [
        bench.ask(ask(prompt, max_tokens=40, ignore_eos=True), stream=True) for prompt in PROMPTS
    ]
    for _ in PROMPTS:
        bench.step()
    assert isinstance(bench.engine, Generator)
    assert len(bench.engine._rows) == len(PROMPTS)
    before = len(bench.frames())
    bench.step()
    assert [frame.kind for frame in bench.frames()[before:]] in ([Kind.TOKENS], [])
    bench.run()
    for job in jobs:
        assert bench.end(job).usage.completion_tokens == 40


def test_a_cancelled_stream_ends_at_the_next_step(bench: Bench, reference: Reference) -> None:
    kept = bench.ask(ask(PROMPTS[0], max_tokens=40, logprobs=0, ignore_eos=True))
    gone = bench.ask(ask(PROMPTS[1], max_tokens=200, ignore_eos=True), stream=True)
    queued = bench.ask(ask(PROMPTS[2], max_tokens=200, ignore_eos=True))
    for _ in range(10):
        bench.step()
    gone.cancelled = queued.cancelled = True
    seen = len(recorded(gone).deltas)
    bench.step()
    assert len(recorded(gone).deltas) == seen
    assert bench.end(gone).error == bench.end(queued).error == "request_cancelled"
    bench.run()
    assert made_by(bench, [kept]) == [reference.greedy(PROMPTS[0], 40, eos_token_id=NEVER)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_deadline_ends_a_stream_with_its_error(folder: Path) -> None:
    clock = Clock()
    bench = Bench(folder, clock)
    running = bench.ask(ask("hello", max_tokens=100, ignore_eos=True), stream=True, seconds=5)
    for _ in range(3):
        bench.step()
    late = bench.ask(ask("hello", max_tokens=100, ignore_eos=True), seconds=2)
    clock.now = 6.0
    bench.run()
    assert bench.body(running).endswith(b"!deadline_exceeded")
    assert bench.end(running).error == "deadline_exceeded"
    assert bench.body(late).startswith(b"deadline_exceeded The request took longer")
    (head,) = [f for f in bench.frames() if f.kind == Kind.HEAD and f.id == late.id]
    assert head.body[:2] == (504).to_bytes(2, "big")


# -- sampling --------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_alone_and_in_company(bench: Bench) -> None:
    wish: dict[str, Any] = {
        "max_tokens": 30,
        "temperature": 0.9,
        "top_p": 0.9,
        "seed": 7,
        "ignore_eos": True,
    }
    (alone,) = texts(generate(bench, "hello", **wish))
    jobs = [bench.ask(ask(prompt, **wish)) for prompt in PROMPTS]
    bench.run()
    together = recorded(jobs[1]).result
    assert isinstance(together, Generated)
    assert texts(together) == [alone]
    assert texts(generate(bench, "hello", **(wish | {"seed": 8}))) != [alone]
    assert texts(generate(bench, "hello", **(wish | {"seed": -(2**63)})))


def test_choices_of_one_prompt_differ_and_repeat_by_seed(bench: Bench) -> None:
    wish: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    first = generate(bench, "hello", "paris", n=3, **wish)
    assert [choice.index for choice in first.choices] == list(range(6))
    assert len(set(texts(first))) == 6
    assert texts(generate(bench, "hello", "paris", n=3, **wish)) == texts(first)
    tokenizer = AutoTokenizer.from_pretrained(bench.engine._tokenizer.transformers.name_or_path)  # type: ignore[attr-defined] # a generator
    assert first.usage.prompt_tokens == sum(
        len(tokenizer(text)["input_ids"]) for text in ("hello", "paris")
    )
    assert first.usage.completion_tokens == 120
    assert [choice.prompt for choice in first.choices] == ["hello"] * 3 + ["paris"] * 3


@pytest.mark.parametrize("tail", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_the_narrowest_sampling_is_greedy(
    bench: Bench, reference: Reference, tail: dict[str, Any]
) -> None:
    (choice,) = generate(
        bench, "hello", temperature=1.5, max_tokens=20, logprobs=0, ignore_eos=True, **tail
    ).choices
    assert ids(choice) == reference.greedy("hello", 20, eos_token_id=NEVER)


def test_repetition_penalty_equals_transformers(bench: Bench, reference: Reference) -> None:
    (choice,) = generate(
        bench, PROMPTS[0], max_tokens=40, repetition_penalty=1.7, logprobs=0, ignore_eos=True
    ).choices
    assert ids(choice) == reference.greedy(
        PROMPTS[0], 40, repetition_penalty=1.7, eos_token_id=NEVER
    )


def test_bias_and_penalties_move_the_choice(bench: Bench) -> None:
    (choice,) = generate(
        bench, "hello", max_tokens=5, logit_bias={42: 100.0}, logprobs=0, ignore_eos=True
    ).choices
    assert ids(choice) == [42] * 5
    (choice,) = generate(
        bench,
        "hello",
        max_tokens=5,
        logit_bias={42: 100.0, 43: 99.0},
        presence_penalty=2.0,
        logprobs=0,
        ignore_eos=True,
    ).choices
    assert ids(choice)[:2] == [42, 43]


def test_the_generation_config_gives_the_defaults(tmp_path: Path, folder: Path) -> None:
    def change(copy: Path) -> None:
        (copy / "generation_config.json").write_text(
            '{"do_sample": true, "temperature": 0.7, "top_k": 1, "eos_token_id": 3}', "utf-8"
        )

    bench = Bench(models.copy(folder, tmp_path / "copy", change))
    greedy = texts(generate(bench, "hello", max_tokens=20, temperature=0, ignore_eos=True))
    assert texts(generate(bench, "hello", max_tokens=20, ignore_eos=True)) == greedy
    assert texts(generate(bench, "hello", max_tokens=20, top_k=0, ignore_eos=True)) != greedy


def test_log_probabilities_are_the_models_own(bench: Bench, reference: Reference) -> None:
    (choice,) = generate(
        bench, "hello", max_tokens=4, logprobs=3, temperature=0, ignore_eos=True
    ).choices
    given = reference.tokenizer("hello")["input_ids"]
    for token in choice.tokens:
        with torch.inference_mode():
            chances = reference.model(torch.tensor([given])).logits[0, -1].log_softmax(-1)
        assert token.logprob == pytest.approx(float(chances[token.id]), abs=1e-4)
        assert [top.id for top in token.top] == chances.topk(3).indices.tolist()
        assert token.token == reference.tokenizer.decode([token.id])
        given = [*given, token.id]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": float("nan")}, "temperature must be between 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logit_bias": {100_000: 1.0}}, "logit_bias names the token 100000"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"n": 0}, "n must be"),
        ({"logprobs": 21}, "At most 20"),
    ],
)
def test_values_out_of_range_have_their_sentences(
    bench: Bench, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        bench.ask(ask("hello", **options))
    assert not bench.engine.busy


# -- chat ------------------------------------------------------------------------------


def test_chat_uses_the_template(bench: Bench, reference: Reference) -> None:
    messages = (Message("system", "be brief"), Message("user", "hello"))
    request = GenerateRequest(
        messages=messages, logprobs=0, sampling=Sampling(max_tokens=20, ignore_eos=True)
    )
    (result,) = bench.results(request, type_=Generated)
    prompt: Any = reference.tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert result.usage.prompt_tokens == len(prompt)
    assert ids(result.choices[0]) == reference.greedy(prompt, 20, eos_token_id=NEVER)


def test_chat_without_a_template_says_so(tmp_path: Path) -> None:
    bench = Bench(models.chat(tmp_path, chat_template=None))
    with pytest.raises(InvalidRequest, match="no chat template"):
        bench.ask(GenerateRequest(messages=(Message("user", "hello"),)))


def test_a_template_that_refuses_says_why(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    bench = Bench(models.chat(tmp_path, chat_template=template))
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        bench.ask(GenerateRequest(messages=(Message("user", "hello"),)))


def test_template_arguments_reach_the_template_and_nothing_else(tmp_path: Path) -> None:
    template = "{{ mood }}{{ messages[0]['content'] }}"
    bench = Bench(models.chat(tmp_path, chat_template=template))
    hello = (Message("user", "hello"),)
    request = GenerateRequest(
        messages=hello,
        template_arguments={"mood": "happy "},
        sampling=Sampling(max_tokens=1, ignore_eos=True),
    )
    (result,) = bench.results(request, type_=Generated)
    expected = len(bench.engine._tokenizer.transformers("happy hello")["input_ids"])  # type: ignore[attr-defined] # a generator
    assert result.usage.prompt_tokens == expected
    with pytest.raises(InvalidRequest, match="'chat_template' can't be an argument"):
        bench.ask(GenerateRequest(messages=hello, template_arguments={"chat_template": "x"}))


def test_an_empty_prompt_begins_at_the_beginning(bench: Bench, reference: Reference) -> None:
    (choice,) = generate(bench, "", max_tokens=5, logprobs=0, ignore_eos=True).choices
    begin = [reference.tokenizer.bos_token_id]
    assert ids(choice) == reference.greedy(begin, 5, eos_token_id=NEVER)
    with pytest.raises(InvalidRequest, match="Prompt 0 is empty"):
        bench.ask(ask(()))


# -- defects ---------------------------------------------------------------------------


def test_a_failed_forward_costs_its_rows_and_not_the_worker(
    folder: Path, reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(folder)
    assert isinstance(bench.engine, Generator)
    lost = bench.ask(ask("hello", max_tokens=50, ignore_eos=True), stream=True)
    for _ in range(3):
        bench.step()
    forward = bench.engine._decoder.forward

    def broken(*arguments: Any) -> torch.Tensor:
        raise RuntimeError("broken on purpose")

    bench.engine._decoder.forward = broken  # type: ignore[method-assign,assignment] # the defect
    bench.step()
    bench.engine._decoder.forward = forward  # type: ignore[method-assign] # mended
    assert bench.end(lost).error == "internal_error"
    assert by_code()["internal_error"] is InternalError
    log = capsys.readouterr().err
    assert "broken on purpose" in log
    assert "incident " in log
    result = generate(bench, "hello", max_tokens=10, logprobs=0, ignore_eos=True)
    assert ids(result.choices[0]) == reference.greedy("hello", 10, eos_token_id=NEVER)
