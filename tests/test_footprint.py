"""What a model is reckoned to need, by example and by its laws."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from minilm import minilm_folder

from tursi.footprint import (
    BASE,
    CONTEXT,
    MIB,
    Blueprint,
    Group,
    Terms,
    dimensions,
    estimate,
    footprint,
    gpus,
    kind,
    merge,
    tensors,
)
from tursi.hub import card
from tursi.hub.blueprint import read
from tursi.model import Peaks

BERT = Blueprint(
    size=440_000_000,
    groups=(Group("F32", 110_000_000, 85_000_000), Group("I64", 512)),
    largest=23_440_896,
    dtype="float32",
    hidden=768,
    intermediate=3072,
    layers=12,
    key_values=1536,
    vocabulary=30522,
    positions=512,
)


def test_parameters_and_weights_come_from_the_headers() -> None:
    told = estimate(BERT, Terms())
    assert (told.parameters, told.dtype) == (110_000_512, "float32")
    assert told.weights == 110_000_000 * 4 + 512 * 8
    assert (told.cache, told.from_headers) == (0, True)
    assert estimate(BERT, Terms(dtype="bfloat16")).weights == 110_000_000 * 2 + 512 * 8


def test_kinds_of_less_than_a_byte_are_as_small_as_they_are() -> None:
    packed = Blueprint(0, (Group("F4", 1000), Group("F6_E2M3", 1000), Group("F8_E8M0", 100)))
    assert estimate(packed, Terms()).weights == 500 + 750 + 100


def test_a_load_that_converts_has_the_file_and_what_comes_of_it() -> None:
    as_it_is, converted = (
        footprint(BERT, Terms(), "cpu"),
        footprint(BERT, Terms(dtype="bfloat16"), "cpu"),
    )
    assert as_it_is.host == as_it_is.host_settled
    assert converted.host > BASE + 110_000_000 * 6
    assert converted.host_settled < as_it_is.host_settled


def test_a_text_that_is_written_is_remembered() -> None:
    llama = Blueprint(
        size=16 * 10**9,
        groups=(Group("BF16", 8 * 10**9, 7 * 10**9),),
        hidden=4096,
        intermediate=14336,
        layers=32,
        key_values=2 * 8 * 128,
        vocabulary=128256,
        positions=131072,
        generates=True,
    )
    told = estimate(llama, Terms(max_sequences=16))
    assert told.dtype == "bfloat16"
    assert told.cache == 2 * 16 * 1024 * 32 * 2048 * 2
    # As an encoder it remembers nothing.
    assert estimate(llama, Terms(task="feature-extraction")).cache == 0
    assert estimate(llama, Terms(quantization="int4")).weights < 7 * 10**9
    assert estimate(llama, Terms(quantization="int8")).weights < 10 * 10**9


def test_on_a_gpu_the_host_only_loads() -> None:
    one = footprint(BERT, Terms(), "cuda")
    assert one.gpu > CONTEXT + 110_000_000 * 4
    assert one.host > one.host_settled
    assert footprint(BERT, Terms(), "cuda x2").gpu == one.gpu + CONTEXT
    assert footprint(BERT, Terms(), "cpu").gpu == footprint(BERT, Terms(), "mps").gpu == 0


def test_what_has_been_measured_counts() -> None:
    warm = footprint(BERT, Terms(), "cpu", Peaks(900 * MIB, 700 * MIB))
    assert warm.host == 900 * MIB
    # It has not served yet, so that its batches are still to come.
    assert warm.host_settled == 700 * MIB + estimate(BERT, Terms()).activations
    busy = footprint(BERT, Terms(), "cpu", Peaks(900 * MIB, 700 * MIB, 800 * MIB))
    assert (busy.host, busy.host_settled) == (900 * MIB, 800 * MIB)
    # Pages of the file that nobody has touched yet may still be.
    few = footprint(BERT, Terms(), "cpu", Peaks(50 * MIB, 60 * MIB, 70 * MIB))
    assert few.host_settled == estimate(BERT, Terms()).weights
    gpu = footprint(BERT, Terms(), "cuda", Peaks(900, 800, 700), Peaks(10, 2**30, 2**31))
    assert gpu.gpu == CONTEXT + 2**31


def test_without_headers_the_size_is_all_there_is() -> None:
    told = footprint(Blueprint(size=2**30), Terms(), "cpu")
    assert told.host == BASE + int(2**30 * 1.2)
    assert told.estimate is not None
    assert not told.estimate.from_headers
    assert footprint(Blueprint(size=2**30), Terms(dtype="float32"), "cpu").host > told.host


def test_devices_have_kinds() -> None:
    assert [kind(each) for each in ("cpu", "cuda", "cuda:3", "cuda:0,cuda:2", "mps")] == [
        "cpu", "cuda", "cuda", "cuda x2", "mps",
    ]  # fmt: skip
    assert [gpus(each) for each in ("cpu", "cuda", "cuda x2")] == [1, 1, 2]


counts = st.integers(0, 10**11)
groups = st.lists(
    st.builds(
        lambda kind, many, part: Group(kind, many, int(many * part)),
        st.sampled_from(("F32", "F16", "BF16", "F8_E4M3", "I64", "U8", "SOMETHING_NEW")),
        counts,
        st.floats(0, 1),
    ),
    max_size=4,
).map(merge)
dims = st.none() | st.integers(1, 2**20)
blueprints = st.builds(
    Blueprint,
    size=counts,
    groups=groups,
    largest=counts,
    dtype=st.sampled_from((None, "float32", "bfloat16", "nonsense")),
    hidden=dims,
    intermediate=dims,
    layers=dims,
    key_values=dims,
    vocabulary=dims,
    positions=dims,
    generates=st.booleans(),
    every_token=st.booleans(),
)
terms = st.builds(
    Terms,
    st.sampled_from(("auto", "float32", "bfloat16", "float16")),
    st.sampled_from(("none", "int8", "int4")),
    st.sampled_from((None, "text-generation", "fill-mask", "feature-extraction")),
    st.integers(1, 2**16),
    st.integers(1, 1024),
)
peaks = st.builds(Peaks, *[st.none() | counts] * 3)


@given(blueprints, terms, st.sampled_from(("cpu", "mps", "cuda", "cuda x3")), peaks, peaks)
def test_a_footprint_is_whole_and_has_what_was_measured(
    blueprint: Blueprint, asked: Terms, device: str, host: Peaks, gpu: Peaks
) -> None:
    found = footprint(blueprint, asked, device, host, gpu)
    assert found.host >= found.host_settled >= 0
    assert found.host >= (host.load or 0)
    assert found.host_settled >= (host.settled or 0)
    assert (found.gpu > 0) == device.startswith("cuda")
    if device.startswith("cuda") and gpu.settled is not None:
        assert found.gpu >= gpu.settled


@given(blueprints, terms, st.integers(1, 4))
def test_more_of_anything_never_needs_less(blueprint: Blueprint, asked: Terms, times: int) -> None:
    more = Terms(
        asked.dtype,
        asked.quantization,
        asked.task,
        asked.max_batch_tokens * times,
        asked.max_sequences * times,
    )
    assert (
        footprint(blueprint, more, "cpu").host_settled
        >= footprint(blueprint, asked, "cpu").host_settled
    )


@given(blueprints, terms)
def test_a_quantized_model_is_no_larger(blueprint: Blueprint, asked: Terms) -> None:
    dense = Terms(asked.dtype, "none", asked.task, asked.max_batch_tokens, asked.max_sequences)
    assert estimate(blueprint, asked).weights <= estimate(blueprint, dense).weights


values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = (
    "hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads", "text_config",
    "num_hidden_layers", "vocab_size", "architectures", "torch_dtype", "num_experts_per_tok",
    "max_position_embeddings", "intermediate_size",
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(NAMES), values))
def test_no_configuration_is_too_strange(config: dict[str, Any]) -> None:
    blueprint = Blueprint(1000, **dimensions(config))
    assert footprint(blueprint, Terms(), "cpu").host > 0


@given(st.dictionaries(st.text(max_size=8), values))
def test_a_header_is_one_or_is_refused(header: dict[str, Any]) -> None:
    try:
        found, largest = tensors(header)
    except ValueError:
        return
    assert largest <= sum(group.parameters for group in found.values())


# -- files -----------------------------------------------------------------------------


def safetensors(path: Path, header: dict[str, Any], data: int = 4096) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * data)


def tensor(*shape: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [0, 0]}


def test_minilm_is_read_in_a_moment() -> None:
    found = read(minilm_folder())
    assert found.parameters is not None
    assert 22_600_000 < found.parameters < 22_800_000
    assert (found.hidden, found.layers, found.positions) == (384, 6, 512)
    needs = footprint(found, Terms(), "cpu")
    # A worker has had 411 MiB when it was ready, and 448 MiB under load.
    assert 448 * MIB < needs.host < 700 * MIB


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    safetensors(tmp_path / "model-1.safetensors", {"a": tensor(10, 10)})
    safetensors(tmp_path / "model-2.safetensors", {"b": tensor(5), "c": tensor(3, dtype="I64")})
    safetensors(tmp_path / "other.safetensors", {"d": tensor(1000)})
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text('{"hidden_size": 10, "num_attention_heads": 2}')
    found = read(tmp_path)
    assert found.groups == (Group("F32", 105, 100), Group("I64", 3))
    assert (found.parameters, found.largest, found.hidden) == (108, 100, 10)
    assert found.size == sum(
        (tmp_path / f"model-{number}.safetensors").stat().st_size for number in (1, 2)
    )


def test_a_header_that_tells_of_more_than_the_file_has_is_none(tmp_path: Path) -> None:
    safetensors(tmp_path / "model.safetensors", {"a": tensor(1000)}, data=3999)
    assert read(tmp_path).groups == ()
    safetensors(tmp_path / "model.safetensors", {"a": tensor(1000)}, data=4000)
    assert read(tmp_path).groups == (Group("F32", 1000),)


def test_a_header_that_is_too_long_counts_by_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors(tmp_path / "model.safetensors", {"a": tensor(1000)})
    monkeypatch.setattr("tursi.hub.blueprint.MAX_HEADER", 20)
    found = read(tmp_path)
    assert found.groups == ()
    assert found.size == (tmp_path / "model.safetensors").stat().st_size


def test_modules_of_sentence_transformers_count(tmp_path: Path) -> None:
    safetensors(tmp_path / "0_Transformer/model.safetensors", {"embeddings": tensor(10, 2)})
    safetensors(tmp_path / "2_Dense/model.safetensors", {"linear.weight": tensor(4, 4)})
    (tmp_path / "0_Transformer/config.json").write_text('{"hidden_size": 77}')
    modules = [{"path": "0_Transformer"}, {"path": "2_Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    found = read(tmp_path)
    assert (found.parameters, found.hidden) == (36, 77)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 4096,
        (2**40).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"{[(<",
        (2).to_bytes(8, "little") + b"[]",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        b'\x18\0\0\0\0\0\0\0{"a": {"dtype": "F32" }} ',
    ],
)
def test_weights_without_a_header_count_by_their_size(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": "many"}')
    (tmp_path / "model.safetensors").write_bytes(content)
    found = read(tmp_path)
    assert (found.groups, found.hidden) == ((), None)
    assert found.size == len(content) or not content


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    safetensors(tmp_path / "model.safetensors", {"a": tensor(10)})
    for name in ("config.json", "modules.json", "README.md", "tokenizer_config.json"):
        os.mkfifo(tmp_path / name)
    assert read(tmp_path).parameters == 10
    assert card.read(tmp_path).parameters == 10


def test_a_pickle_counts_by_its_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04" + b"x" * 998)
    assert read(tmp_path) == Blueprint(1000, **dimensions({}))
