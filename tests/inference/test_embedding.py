from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import minilm
import models
import numpy as np
import numpy.typing as npt
import pytest
import torch
from bench import Bench
from transformers import AutoModel, AutoTokenizer

from tursi.errors import ContextLengthExceeded, InternalError, InvalidRequest
from tursi.tasks import Embeddings, EmbedRequest, Similarities, SimilarityRequest

Vectors = npt.NDArray[np.float32]
REFERENCE = json.loads((Path(__file__).parent / "minilm-reference.json").read_text("utf-8"))
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "heterogeneous", "paris", "hello")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def all_minilm() -> Bench:
    return Bench(minilm.minilm_folder())


def vectors(result: Embeddings) -> Vectors:
    return np.frombuffer(result.data, "<f4").reshape(result.count, result.dimensions)


def embed(bench: Bench, *texts: Any, **options: Any) -> Vectors:
    (result,) = bench.results(EmbedRequest(texts, **options), type_=Embeddings)
    return vectors(result)


def states(folder: Path, text: str) -> torch.Tensor:
    """Token states of one text by plain transformers, ``(tokens, hidden)``."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt", padding=False, truncation=False)
    with torch.inference_mode():
        found: torch.Tensor = model(**inputs)[0][0]
    return found


def cosine(a: Any, b: Any) -> float:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_all_minilm_equals_the_published_vectors(all_minilm: Bench) -> None:
    items = REFERENCE["items"]
    for item, vector in zip(items, embed(all_minilm, *(i["text"] for i in items)), strict=True):
        assert cosine(vector[:: REFERENCE["step"]], item["values"]) > 0.9999
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
        assert vector[:: REFERENCE["step"]] == pytest.approx(item["values"], abs=5e-4)


def test_all_minilm_equals_a_mean_by_hand(all_minilm: Bench) -> None:
    text = "A quite ordinary sentence, with a comma and a few longer words: heterogeneous."
    mean = states(minilm.minilm_folder(), text).mean(dim=0)
    assert cosine(embed(all_minilm, text)[0], mean) > 0.99999


def test_all_minilm_is_what_its_files_say(all_minilm: Bench) -> None:
    loaded = all_minilm.loaded
    assert (loaded.task, loaded.dtype, loaded.dimensions) == ("feature-extraction", "float32", 384)
    # From sentence_bert_config.json; tokenizer.json has 128, the model 512.
    assert loaded.max_length == 256
    assert loaded.parameters == 22_713_216


def test_a_batch_changes_nothing(all_minilm: Bench) -> None:
    chance = random.Random(1)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(1, 90))) for _ in range(24)]
    alone = np.concatenate([embed(all_minilm, text) for text in texts])
    together = embed(all_minilm, *texts)
    assert np.abs(alone - together).max() < 1e-6
    apart = all_minilm.results(*(EmbedRequest((text,)) for text in texts), type_=Embeddings)
    assert np.abs(alone - np.concatenate([vectors(result) for result in apart])).max() < 1e-6
    assert max(result.usage.batch_size for result in apart) > 1


def test_token_ids_are_used_as_they_are(all_minilm: Bench) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm.minilm_folder())
    ids = tuple(tokenizer("hello world")["input_ids"])
    assert np.allclose(embed(all_minilm, ids), embed(all_minilm, "hello world"), atol=1e-6)


def test_similarity_is_the_cosine(all_minilm: Bench) -> None:
    request = SimilarityRequest("a dog barks", ("the dog is barking", "stock markets fell"))
    (result,) = all_minilm.results(request, type_=Similarities)
    source, near, far = embed(all_minilm, request.source, *request.sentences)
    assert result.scores == pytest.approx((cosine(source, near), cosine(source, far)), abs=1e-6)
    assert result.scores[0] > result.scores[1]


def test_usage_counts_real_tokens(all_minilm: Bench) -> None:
    (result,) = all_minilm.results(EmbedRequest(("hello world", "hello")), type_=Embeddings)
    assert result.usage.prompt_tokens == 4 + 3
    assert result.usage.compute_seconds > 0


def test_too_long_is_refused_or_cut_when_asked(all_minilm: Bench) -> None:
    long = "word " * 400
    with pytest.raises(ContextLengthExceeded, match=r"Input 1 has 402 tokens, .* at most 256"):
        embed(all_minilm, "short", long)
    (result,) = all_minilm.results(EmbedRequest(("short", long), truncate=True), type_=Embeddings)
    assert result.truncated == (1,)
    assert result.usage.prompt_tokens == 3 + 256
    assert np.allclose(vectors(result)[1], embed(all_minilm, "word " * 254)[0], atol=1e-6)
    # What the cut has set in the tokenizer is gone again.
    with pytest.raises(ContextLengthExceeded):
        embed(all_minilm, long)


def test_far_too_long_is_refused_without_counting(all_minilm: Bench) -> None:
    huge = "word " * 1_000_000
    with pytest.raises(ContextLengthExceeded, match="has 5000000 characters"):
        embed(all_minilm, huge)
    (cut,) = embed(all_minilm, huge, truncate=True)
    assert np.allclose(cut, embed(all_minilm, "word " * 254)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ((), "There is no input"),
        (("",), "Input 0 is empty"),
        (("a", ()), "Input 1 is empty"),
        (((-1,),), "outside of the model's vocabulary"),
        (((30_522,),), r"vocabulary \(0 to 30521\)"),
        (("a",) * 2049, "at most 2048 inputs"),
    ],
)
def test_bad_inputs_have_their_sentences(
    all_minilm: Bench, inputs: tuple[Any, ...], sentence: str
) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        all_minilm.ask(EmbedRequest(inputs))
    assert not all_minilm.engine.busy


def test_dimensions_are_cut_before_scaling(all_minilm: Bench) -> None:
    whole = embed(all_minilm, "hello world")[0]
    cut = embed(all_minilm, "hello world", dimensions=16)[0]
    assert np.allclose(cut, whole[:16] / np.linalg.norm(whole[:16]), atol=1e-6)
    with pytest.raises(InvalidRequest, match="1 to 384"):
        embed(all_minilm, "hello world", dimensions=385)


def test_normalization_can_be_asked_for_and_refused(all_minilm: Bench) -> None:
    raw = embed(all_minilm, "hello world", normalize=False)[0]
    assert np.linalg.norm(raw) > 1.1
    assert cosine(raw, embed(all_minilm, "hello world")[0]) > 0.999999


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ({"pooling_mode_cls_token": True}, lambda s: s[0]),
        ({"pooling_mode_max_tokens": True}, lambda s: s.max(dim=0).values),
        ({"pooling_mode_mean_tokens": True}, lambda s: s.mean(dim=0)),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, lambda s: s.sum(dim=0) / len(s) ** 0.5),
        ({"pooling_mode_lasttoken": True}, lambda s: s[-1]),
        (
            {"pooling_mode_weightedmean_tokens": True},
            lambda s: (
                (s * torch.arange(1, len(s) + 1)[:, None]).sum(dim=0) / (len(s) * (len(s) + 1) / 2)
            ),
        ),
        ({"pooling_mode": "cls"}, lambda s: s[0]),
        (
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            lambda s: torch.cat([s[0], s.mean(dim=0)]),
        ),
    ],
)
def test_each_pooling(tmp_path: Path, mode: dict[str, Any], expected: Any) -> None:
    folder = models.sentence(tmp_path, pooling=mode)
    texts = ("the quick brown fox", "hello", "paris is the capital of france today")
    found = embed(Bench(folder), *texts)
    for text, vector in zip(texts, found, strict=True):
        assert vector == pytest.approx(expected(states(folder, text)).numpy(), abs=1e-5)


def test_dense_and_normalize_modules(tmp_path: Path) -> None:
    torch.manual_seed(3)
    dense = (torch.randn(8, 32), torch.randn(8))
    folder = models.sentence(tmp_path, dense=dense, normalize=True)
    bench = Bench(folder)
    mean = states(folder, "hello world").mean(dim=0)
    expected = torch.tanh(dense[0] @ mean + dense[1])
    assert bench.loaded.dimensions == 8
    assert embed(bench, "hello world")[0] == pytest.approx(
        (expected / expected.norm()).numpy(), abs=1e-5
    )


def test_prompts_are_put_before_the_text(tmp_path: Path) -> None:
    settings = {"prompts": {"query": "hello ", "none": ""}, "default_prompt_name": "query"}
    folder = models.sentence(tmp_path, settings=settings)
    bench = Bench(folder)
    expected = states(folder, "hello world").mean(dim=0).numpy()
    assert embed(bench, "world")[0] == pytest.approx(expected, abs=1e-5)
    assert embed(bench, "world", prompt_name="query")[0] == pytest.approx(expected, abs=1e-5)
    plain = states(folder, "world").mean(dim=0).numpy()
    assert embed(bench, "world", prompt_name="none")[0] == pytest.approx(plain, abs=1e-5)
    with pytest.raises(InvalidRequest, match="no prompt 'passage'; it has: none, query"):
        embed(bench, "world", prompt_name="passage")


def test_a_prompt_can_be_left_out_of_the_pooling(tmp_path: Path) -> None:
    folder = models.sentence(
        tmp_path,
        pooling={"pooling_mode_mean_tokens": True, "include_prompt": False},
        settings={"prompts": {"query": "hello "}},
    )
    prompt = len(AutoTokenizer.from_pretrained(folder)("hello ")["input_ids"]) - 1
    expected = states(folder, "hello world")[prompt:].mean(dim=0).numpy()
    bench = Bench(folder)
    assert embed(bench, "world", prompt_name="query")[0] == pytest.approx(expected, abs=1e-5)


def test_a_model_without_sentence_files_is_averaged(tmp_path: Path) -> None:
    folder = models.bare(tmp_path)
    expected = states(folder, "hello world").mean(dim=0).numpy()
    assert embed(Bench(folder), "hello world")[0] == pytest.approx(expected, abs=1e-5)


def test_a_decoder_can_embed_when_told_to(tmp_path: Path) -> None:
    folder = models.chat(tmp_path)
    texts = ("hello world", "the quick brown fox jumps")
    found = embed(Bench(folder, task="feature-extraction"), *texts)
    for text, vector in zip(texts, found, strict=True):
        assert vector == pytest.approx(states(folder, text).mean(dim=0).numpy(), abs=1e-5)


def test_bfloat16_is_close(tmp_path: Path) -> None:
    bench = Bench(minilm.minilm_folder(), dtype="bfloat16")
    assert bench.loaded.dtype == "bfloat16"
    item = REFERENCE["items"][0]
    vector = embed(bench, item["text"])[0]
    assert vector.dtype == np.float32
    assert cosine(vector[:: REFERENCE["step"]], item["values"]) > 0.999


def test_numbers_that_are_not_finite_are_no_answer(tmp_path: Path) -> None:
    bench = Bench(models.bare(tmp_path))
    model: Any = bench.engine._encoder._model  # type: ignore[attr-defined] # breaks it on purpose
    with torch.inference_mode():
        model.encoder.layer[1].output.LayerNorm.bias.fill_(float("nan"))
    with pytest.raises(InternalError, match="aren't finite"):
        embed(bench, "hello world")
