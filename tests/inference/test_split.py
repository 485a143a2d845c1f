from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from tursi.errors import DeviceUnavailable, DeviceUnsupported, OutOfMemory
from tursi.inference.checkpoint import Checkpoint
from tursi.inference.device import explain_device
from tursi.inference.pretrained import read_model
from tursi.inference.split import split
from tursi.model import Task

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=8,
    num_attention_heads=4, num_key_value_heads=4,
)  # fmt: skip
LARGE = 2**30


def layers(places: dict[str, int]) -> dict[int, int]:
    """How many of the model's layers each device has."""
    counts: dict[int, int] = {}
    for name, device in places.items():
        if name.startswith("model.layers."):
            # Whole ones: a layer's parts stay together.
            assert name.count(".") == 2
            counts[device] = counts.get(device, 0) + 1
    return counts


def test_gpus_get_about_as_much() -> None:
    counts = layers(split(AutoModelForCausalLM, CONFIG, torch.float32, {0: LARGE, 2: LARGE}))
    assert set(counts) == {0, 2}
    assert sum(counts.values()) == 8
    assert abs(counts[0] - counts[2]) <= 3


def test_a_gpu_with_little_room_gets_little() -> None:
    # A layer has about 165 KB.
    counts = layers(split(AutoModelForCausalLM, CONFIG, torch.float32, {0: 500_000, 1: LARGE}))
    assert 1 <= counts[0] <= 2
    assert counts[0] + counts[1] == 8


def test_half_the_bytes_need_half_the_room() -> None:
    free = {0: 500_000, 1: 500_000}
    with pytest.raises(OutOfMemory, match="free memory of cuda:0, cuda:1; use more GPUs"):
        split(AutoModelForCausalLM, CONFIG, torch.float32, free)
    assert layers(split(AutoModelForCausalLM, CONFIG, torch.bfloat16, free)).keys() == {0, 1}


def test_a_model_loads_by_the_modules_places(tmp_path: Path) -> None:
    folder = models.chat(tmp_path)
    checkpoint, config = Checkpoint(folder), AutoConfig.from_pretrained(folder)
    checkpoint.check()
    places = split(AutoModelForCausalLM, config, torch.float32, {0: LARGE, 1: LARGE})
    assert set(places.values()) == {0, 1}

    def answer(where: dict[str, Any] | None) -> torch.Tensor:
        model = read_model(
            checkpoint, Task.TEXT_GENERATION, config, AutoModelForCausalLM, "auto", print, where
        )
        with torch.inference_mode():
            logits: torch.Tensor = model.eval()(torch.tensor([[1, 2, 3]])).logits
        return logits

    # Two GPUs that are in truth the processor.
    assert torch.equal(answer(dict.fromkeys(places, "cpu")), answer(None))


def test_without_accelerate_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(DeviceUnsupported, match=r"install tursi\[gpus\]"):
        split(AutoModelForCausalLM, CONFIG, torch.float32, {0: LARGE, 1: LARGE})


def test_gpus_that_are_not_there() -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("they are")
    with pytest.raises((DeviceUnavailable, DeviceUnsupported), match="'cuda:"):
        explain_device("cuda:0,cuda:1")


def test_several_gpus_have_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    choice = explain_device("cuda:2,cuda:0")
    assert (str(choice), choice.first) == ("cuda:2,cuda:0", torch.device("cuda", 2))
    assert choice.why == "cuda:2, cuda:0: it was asked for."
    assert explain_device("cuda:1,cuda:2", "it fits no single GPU").why.endswith(
        "cuda:1, cuda:2: it fits no single GPU."
    )
