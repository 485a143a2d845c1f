from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from bench import Bench
from transformers import pipeline

from tursi.errors import InvalidRequest
from tursi.tasks import Fill, FillMaskRequest, Fills

ONE = "paris is the [MASK] of france"
TWO = "the [MASK] brown fox jumps over the [MASK]"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.fill_mask(tmp_path_factory.mktemp("fill-mask"))


@pytest.fixture(scope="module")
def bench(folder: Path) -> Bench:
    return Bench(folder)


def fill(bench: Bench, *inputs: str, **options: Any) -> tuple[tuple[tuple[Fill, ...], ...], ...]:
    (result,) = bench.results(FillMaskRequest(inputs, **options), type_=Fills)
    return result.items


def as_pipeline(fills: tuple[Fill, ...]) -> list[dict[str, Any]]:
    return [
        {
            "score": pytest.approx(each.score, abs=1e-6),
            "token": each.token,
            "token_str": each.token_str,
            "sequence": each.sequence,
        }
        for each in fills
    ]


@pytest.mark.parametrize("top_k", [1, 5, 20])
def test_fills_equal_the_pipeline(bench: Bench, folder: Path, top_k: int) -> None:
    reference: Any = pipeline("fill-mask", str(folder), device="cpu")
    one, two = fill(bench, ONE, TWO, top_k=top_k)
    assert [as_pipeline(fills) for fills in one] == [reference(ONE, top_k=top_k)]
    assert [as_pipeline(fills) for fills in two] == reference(TWO, top_k=top_k)


def test_targets_equal_the_pipeline(bench: Bench, folder: Path) -> None:
    reference: Any = pipeline("fill-mask", str(folder), device="cpu")
    targets = ("fox", "dog", "today")
    ((fills,),) = fill(bench, ONE, targets=targets)
    assert as_pipeline(fills) == reference(ONE, targets=list(targets))


def test_more_fills_than_words_are_all_words(bench: Bench) -> None:
    ((fills,),) = fill(bench, ONE, top_k=10_000)
    assert sum(each.score for each in fills) == pytest.approx(1, abs=1e-5)


def test_a_text_without_a_mask_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidRequest, match=r"Input 1 has no mask token; write \[MASK\]"):
        fill(bench, ONE, "paris")


def test_targets_that_are_no_words_are_refused(bench: Bench) -> None:
    with pytest.raises(InvalidRequest, match="None of the targets"):
        fill(bench, ONE, targets=("",))
