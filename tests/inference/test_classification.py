from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from bench import Bench
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from tursi.errors import ContextLengthExceeded, InvalidRequest
from tursi.tasks import Classifications, ClassifyRequest, Label

TEXTS = (
    "hello world",
    "the quick brown fox jumps over the lazy dog",
    "paris",
    "how are you today?",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def two_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def three_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.multi_label(tmp_path_factory.mktemp("multi-label"))


def classify(folder: Path, *inputs: Any, **options: Any) -> tuple[tuple[Label, ...], ...]:
    (result,) = Bench(folder).results(ClassifyRequest(inputs, **options), type_=Classifications)
    return result.items


def assert_like_pipeline(
    items: tuple[tuple[Label, ...], ...], folder: Path, inputs: Any, **options: Any
) -> None:
    reference: Any = pipeline("text-classification", str(folder), device="cpu", top_k=None)
    for labels, text in zip(items, inputs, strict=True):
        (expected,) = reference([text], **options)
        assert [label.label for label in labels] == [entry["label"] for entry in expected]
        for label, entry in zip(labels, expected, strict=True):
            assert label.score == pytest.approx(entry["score"], abs=1e-5)


@pytest.mark.parametrize("function", [None, "sigmoid", "softmax", "none"])
def test_scores_equal_the_pipeline(two_labels: Path, function: str | None) -> None:
    items = classify(two_labels, *TEXTS, function=function)
    options = {} if function is None else {"function_to_apply": function}
    assert_like_pipeline(items, two_labels, TEXTS, **options)


def test_labels_that_exclude_nothing_get_a_sigmoid_each(three_labels: Path) -> None:
    items = classify(three_labels, *TEXTS)
    assert_like_pipeline(items, three_labels, TEXTS)
    assert sum(label.score for label in items[0]) != pytest.approx(1, abs=1e-3)


def test_regression_keeps_the_raw_score(tmp_path: Path, two_labels: Path) -> None:
    def change(folder: Path) -> None:
        config = folder / "config.json"
        text = config.read_text("utf-8")
        config.write_text(text.replace("{", '{"problem_type": "regression",', 1), "utf-8")

    folder = models.copy(two_labels, tmp_path / "regression", change)
    assert_like_pipeline(classify(folder, *TEXTS), folder, TEXTS)


def test_top_k_keeps_the_best(two_labels: Path) -> None:
    everything = classify(two_labels, *TEXTS)
    assert classify(two_labels, *TEXTS, top_k=1) == tuple(labels[:1] for labels in everything)
    with pytest.raises(InvalidRequest, match="top_k"):
        classify(two_labels, "hello", top_k=0)


def test_a_pair_is_one_input_with_two_segments(two_labels: Path) -> None:
    pair = ("hello world", "how are you today?")
    tokenizer = AutoTokenizer.from_pretrained(two_labels)
    model = AutoModelForSequenceClassification.from_pretrained(two_labels)
    with torch.inference_mode():
        scores = model(**tokenizer(*pair, return_tensors="pt")).logits.softmax(-1)[0]
    (labels,) = classify(two_labels, pair)
    found = {label.label: label.score for label in labels}
    assert found["NEGATIVE"] == pytest.approx(float(scores[0]), abs=1e-6)
    # A batch of pairs and single texts gives each what it gets alone.
    again = classify(two_labels, pair, "paris")[0]
    assert [label.score for label in again] == pytest.approx(
        [label.score for label in labels], abs=1e-6
    )


def test_a_decoder_with_a_head_is_not_misled_by_padding(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = models.byte_level_tokenizer()
    torch.manual_seed(0)
    for pad in (0, None):
        folder = tmp_path / str(pad)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=pad,
        )
        config.num_labels = 2
        LlamaForSequenceClassification(config).eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        together = classify(folder, *TEXTS)
        alone = [classify(folder, text)[0] for text in TEXTS]
        for a, b in zip(together, alone, strict=True):
            assert a[0].score == pytest.approx(b[0].score, abs=1e-6)


def test_too_long_is_refused_unless_cut(two_labels: Path) -> None:
    long = "hello " * 80
    with pytest.raises(ContextLengthExceeded, match="at most 64"):
        classify(two_labels, long)
    assert len(classify(two_labels, long, truncate=True)) == 1
    assert len(classify(two_labels, (long, long), truncate=True)) == 1
