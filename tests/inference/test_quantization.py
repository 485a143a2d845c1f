from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import minilm
import models
import numpy as np
import numpy.typing as npt
import pytest
import torch
from bench import Bench
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from tursi.errors import QuantizationInaccurate, QuantizationUnsupported
from tursi.inference import quantization
from tursi.tasks import Embeddings, EmbedRequest, Generated, GenerateRequest, Sampling

TEXTS = ("The weather is lovely today.", "He drove to the stadium.", "def main(): return 0")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def plain() -> npt.NDArray[np.float32]:
    return embed(Bench(minilm.minilm_folder()))


def embed(bench: Bench) -> npt.NDArray[np.float32]:
    (result,) = bench.results(EmbedRequest(TEXTS, normalize=True), type_=Embeddings)
    return np.frombuffer(result.data, "<f4").reshape(result.count, result.dimensions)


def calmed(folder: Path) -> Path:
    """With weaker opinions than the other tests' models have: random ones suffer most."""
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor / 8 for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def weight_bytes(bench: Bench) -> int:
    model: Any = bench.engine._encoder._model  # type: ignore[attr-defined]
    total = 0
    for tensor in (*model.parameters(), *model.buffers()):
        flatten = getattr(tensor, "__tensor_flatten__", None)
        parts = [getattr(tensor, name) for name in flatten()[0]] if flatten else [tensor]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


@pytest.mark.parametrize(
    ("wanted", "package", "least", "most_bytes"),
    [("int8", "torchao", 0.998, 60_000_000), ("int4", "bitsandbytes", 0.95, 55_000_000)],
)
def test_minilm_is_as_good_and_smaller(
    plain: npt.NDArray[np.float32], wanted: str, package: str, least: float, most_bytes: int
) -> None:
    bench = Bench(minilm.minilm_folder(), quantization=wanted)
    assert (embed(bench) * plain).sum(-1).min() > least
    assert weight_bytes(bench) < most_bytes
    assert (bench.loaded.dtype, bench.loaded.parameters) == ("float32", 22_713_216)
    told = bench.loaded.choices["quantization"]
    assert told.startswith(f"{wanted}, weights only, in 37 linear layers, by {package} ")
    assert "embeddings' cosine with those of the unquantized model is 0.9" in told
    # Faster, and far too inaccurate for this model.
    assert ("Not torch's dynamic int8" in told) == (wanted == "int8")


def test_dynamic_int8_is_taken_where_it_is_accurate(tmp_path: Path) -> None:
    folder = calmed(models.classifier(tmp_path))
    told = Bench(folder, quantization="int8").loaded.choices["quantization"]
    assert told.startswith("int8, weights and activations (torch's dynamic int8) in 13 ")
    assert "of 12 texts the first label is that of the unquantized model" in told


@pytest.mark.parametrize("build", [models.fill_mask, models.bare])
def test_dynamic_int8_is_for_float32_only(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    bench = Bench(build(tmp_path), quantization="int8", dtype="bfloat16")
    assert bench.loaded.choices["quantization"].startswith("int8, weights only, in ")
    assert bench.loaded.dtype == "bfloat16"


@pytest.mark.parametrize("wanted", ["int8", "int4"])
def test_a_quantized_model_generates(tmp_path: Path, wanted: str) -> None:
    folder = calmed(models.chat(tmp_path))
    bench = Bench(folder, quantization=wanted, dtype="bfloat16")
    (result,) = bench.results(
        GenerateRequest(prompts=("hello world",), sampling=Sampling(max_tokens=3, temperature=0)),
        type_=Generated,
    )
    assert result.usage.completion_tokens == 3
    assert "nats in the mean" in bench.loaded.choices["quantization"]


@pytest.mark.parametrize("wanted", ["int8", "int4"])
def test_what_loses_too_much_is_refused(tmp_path: Path, wanted: str) -> None:
    folder = models.bare(tmp_path)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if "LayerNorm" in name:
            # A feature that is always 0 ...
            tensor[0] = 0
        elif name.endswith(".weight") and tensor.shape[-1] == 32 and "embeddings" not in name:
            # ... has weights beside which all others look like nothing.
            tensor[:, 0] = 1e5
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(QuantizationInaccurate, match=f"loses too much as {wanted}: on 12 texts"):
        Bench(folder, quantization=wanted)


@pytest.mark.parametrize(("wanted", "package"), [("int8", "torchao"), ("int4", "bitsandbytes")])
def test_without_its_package_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, package: str
) -> None:
    for name in [*sys.modules]:
        if name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        QuantizationUnsupported, match=rf"{package}, .*install tursi\[quantization\]"
    ):
        Bench(models.bare(tmp_path), quantization=wanted, dtype="bfloat16")


def test_a_model_without_linear_layers(tmp_path: Path) -> None:
    tokenizer = models.byte_level_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(QuantizationUnsupported, match="no layers that can be quantized"):
        Bench(tmp_path, quantization="int8")


def test_weights_that_are_quantized_already(tmp_path: Path) -> None:
    folder = models.bare(tmp_path)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(QuantizationUnsupported, match=r"quantized already \(bitsandbytes\)"):
        Bench(folder, quantization="int4")


@pytest.mark.parametrize("devices", ["mps", "cuda:0,cuda:1"])
def test_a_device_that_it_does_not_work_on(devices: str) -> None:
    with pytest.raises(QuantizationUnsupported, match=f"the device '{devices}'"):
        quantization.check("int8", SimpleNamespace(), [*map(torch.device, devices.split(","))])
