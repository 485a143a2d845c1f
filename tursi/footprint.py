"""What a model needs of memory, reckoned from its files: an upper bound, before it is loaded.

Pure: somebody else has read the headers of the weights and the configuration. A header
tells how many numbers of which kind there are; the configuration tells how large what is
computed in between becomes, and what the texts that are generated have to remember.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tursi.model import Estimate, Footprint, Peaks, Task

MIB = 1024 * 1024
BASE = 400 * MIB
"""Python, torch and transformers in host memory, before any model."""
CONTEXT = 512 * MIB
"""What the driver takes of each GPU, before any model."""
CUDA_HOST = 768 * MIB
"""What CUDA's libraries take of host memory."""
SEQUENCE_TOKENS = 1024
"""That a text which is generated is reckoned to have, where the model allows more."""
_COPIES = 2
"""Of what texts remember, while one joins the others or leaves them."""
_LONGEST = 8192
"""Tokens of one input that are reckoned with, where the model allows more."""
_PREFILL = 512
"""Tokens of prompts that are read at a time."""
_FRAGMENTS = 1.05
"""Of a GPU's memory, for what lies between the pieces."""
_UNKNOWN = 0.2
"""The part of the weights that activations are taken for where the configuration says nothing."""
_FLOAT = 4
"""Bytes: sums and norms are computed in float32, whatever the weights are."""

_KINDS: Mapping[str, tuple[str, float, bool]] = {
    # As safetensors calls it: as torch calls it, its bytes, and whether a load converts it.
    "F64": ("float64", 8, True),
    "F32": ("float32", 4, True),
    "F16": ("float16", 2, True),
    "BF16": ("bfloat16", 2, True),
    "F8_E4M3": ("float8_e4m3fn", 1, False),
    "F8_E5M2": ("float8_e5m2", 1, False),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1, False),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1, False),
    "F8_E8M0": ("float8_e8m0fnu", 1, False),
    "F6_E2M3": ("float6_e2m3fn", 0.75, False),
    "F6_E3M2": ("float6_e3m2fn", 0.75, False),
    "F4": ("float4_e2m1fn_x2", 0.5, False),
    "I64": ("int64", 8, False),
    "I32": ("int32", 4, False),
    "I16": ("int16", 2, False),
    "I8": ("int8", 1, False),
    "U64": ("uint64", 8, False),
    "U32": ("uint32", 4, False),
    "U16": ("uint16", 2, False),
    "U8": ("uint8", 1, False),
    "BOOL": ("bool", 1, False),
}
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_QUANTIZED = {"int8": 1.1, "int4": 0.65}
"""Bytes of a number in a quantized matrix, its share of the scales included."""
_MOST_AXES = 16
"""Of a tensor: many more make a number that takes for ever to multiply."""
_COMPARED = 2048
"""Tokens of the texts by which a quantized model is held against the unquantized one."""
_EMBEDDINGS = ("embed", "wte", "wpe", "lm_head", "shared", "position_bias", "relative_attention")
"""Parts of the names of matrices that a quantized load leaves as they are."""


@dataclass(frozen=True, slots=True)
class Group:
    """The tensors of one kind in a model's files."""

    kind: str
    """As safetensors calls it, such as ``BF16``."""
    parameters: int
    matrices: int = 0
    """Those of them that a quantized load makes smaller."""


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What a model's files tell of it; sizes in bytes."""

    size: int
    """Of the weights' files, or of all files where the weights can't be told from others."""
    groups: tuple[Group, ...] = ()
    """Empty where no header could be read."""
    largest: int = 0
    """Parameters of the largest tensor."""
    dtype: str | None = None
    """That the configuration names."""
    hidden: int | None = None
    intermediate: int | None = None
    layers: int | None = None
    key_values: int | None = None
    """Numbers that attention remembers of each token in each layer."""
    vocabulary: int | None = None
    positions: int | None = None
    generates: bool = False
    """Whether it writes texts, as far as its architecture's name tells."""
    every_token: bool = False
    """Whether it tells the chance of every word for every token."""

    @property
    def parameters(self) -> int | None:
        """All of them; ``None`` where no header could be read."""
        return sum(group.parameters for group in self.groups) if self.groups else None


@dataclass(frozen=True, slots=True)
class Terms:
    """What a load was asked for."""

    dtype: str = "auto"
    quantization: str = "none"
    task: str | None = None
    max_batch_tokens: int = 1024
    max_sequences: int = 16


def tensors(header: Mapping[str, Any]) -> tuple[dict[str, Group], int]:
    """The tensors of one safetensors header by kind, and the parameters of the largest.

    Raises ``ValueError`` for what is no such header.
    """
    parameters: dict[str, int] = {}
    matrices: dict[str, int] = {}
    largest = 0
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        match tensor:
            case {"dtype": str(kind), "shape": [*shape]} if len(shape) <= _MOST_AXES and all(
                type(size) is int and 0 <= size < 2**48 for size in shape
            ):
                count = math.prod(shape)
            case _:
                raise ValueError(f"{name[:100]!r} is described by no kind and shape")
        parameters[kind] = parameters.get(kind, 0) + count
        largest = max(largest, count)
        if len(shape) == 2 and not any(part in name for part in _EMBEDDINGS):
            matrices[kind] = matrices.get(kind, 0) + count
    groups = {kind: Group(kind, count, matrices.get(kind, 0)) for kind, count in parameters.items()}
    return groups, largest


def stored(groups: Iterable[Group]) -> int:
    """The bytes that they have in the file, at least."""
    return sum(
        int(group.parameters * _KINDS[group.kind][1]) for group in groups if group.kind in _KINDS
    )


def merge(groups: Iterable[Group]) -> tuple[Group, ...]:
    """One group for each kind."""
    merged: dict[str, Group] = {}
    for group in groups:
        was = merged.get(group.kind, Group(group.kind, 0))
        merged[group.kind] = Group(
            group.kind, was.parameters + group.parameters, was.matrices + group.matrices
        )
    return tuple(merged[kind] for kind in sorted(merged))


def dimensions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a ``Blueprint`` from a configuration as transformers writes it."""
    text = next(
        (
            config[name]
            for name in ("text_config", "decoder", "llm_config")
            if isinstance(config.get(name), dict)
        ),
        config,
    )
    hidden = _number(text, "hidden_size", "d_model", "n_embd", "dim")
    heads = _number(text, "num_attention_heads", "n_head", "n_heads", "encoder_attention_heads")
    head = _number(text, "head_dim")
    if head is None and hidden is not None:
        head = hidden // heads if heads else hidden
    kept = _number(text, "num_key_value_heads", "multi_query_group_num") or heads or 1
    intermediate = _number(
        text, "intermediate_size", "ffn_dim", "encoder_ffn_dim", "d_ff", "n_inner", "hidden_dim"
    )
    experts = _number(text, "num_experts_per_tok")
    if experts is not None:
        intermediate = (_number(text, "moe_intermediate_size") or intermediate or 0) * experts
    if not intermediate and hidden is not None:
        intermediate = 4 * hidden
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    named = config.get("dtype", config.get("torch_dtype", text.get("dtype")))
    return {
        "dtype": named.removeprefix("torch.") if isinstance(named, str) else None,
        "hidden": hidden,
        "intermediate": intermediate,
        "layers": _number(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        "key_values": None if head is None else 2 * kept * head,
        "vocabulary": _number(text, "vocab_size"),
        "positions": _number(
            text, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"
        ),
        "generates": name.endswith(("ForCausalLM", "LMHeadModel")),
        "every_token": name.endswith(("ForMaskedLM", "ForPreTraining")),
    }


def estimate(blueprint: Blueprint, terms: Terms) -> Estimate:
    """What can be told before the load."""
    dtype = _target(blueprint, terms.dtype)
    generates, every_token = blueprint.generates, blueprint.every_token
    if terms.task is not None:
        generates = terms.task == Task.TEXT_GENERATION
        every_token = terms.task == Task.FILL_MASK
    return Estimate(
        size=blueprint.size,
        parameters=blueprint.parameters,
        dtype=dtype if terms.quantization == "none" else terms.quantization,
        weights=_weights(blueprint, dtype, terms.quantization),
        activations=_activations(blueprint, terms, generates=generates, every_token=every_token),
        cache=_cache(blueprint, dtype, terms) if generates else 0,
        from_headers=bool(blueprint.groups),
    )


def footprint(
    blueprint: Blueprint,
    terms: Terms,
    device: str,
    host: Peaks = Peaks(),  # noqa: B008 - a frozen value
    gpu: Peaks = Peaks(),  # noqa: B008 - the same
) -> Footprint:
    """What each worker needs on such a device, by what has been measured where anything has."""
    told = estimate(blueprint, terms)
    grows = told.activations + told.cache
    load = BASE + _loading(blueprint, terms, told.weights)
    if not device.startswith("cuda"):
        settled = BASE + told.weights + grows
        if terms.quantization != "none":
            # What is left unquantized keeps all pages of the file.
            settled += blueprint.size
        if host.settled is not None:
            # What has not been used yet may still be needed: pages of the file, and batches.
            settled = max(host.settled, told.weights) + (grows if host.busy is None else 0)
            load = host.load or host.settled
        return Footprint(device, max(load, settled), settled, 0, told, host, gpu)
    settled = host.settled if host.settled is not None else BASE + CUDA_HOST
    load = host.load if host.load is not None else load + CUDA_HOST
    count = gpus(device)
    # What torch reports doesn't have what the driver takes.
    needed = CONTEXT * count + int(told.weights * _FRAGMENTS) + grows
    if gpu.settled is not None:
        measured = max(gpu.highest or 0, told.weights) + (grows if gpu.busy is None else 0)
        needed = CONTEXT * count + measured
    return Footprint(device, max(load, settled), settled, needed, told, host, gpu)


def least(needs: Footprint) -> int:
    """Host memory without which no worker of it can be, however careful the reckoning."""
    weights = 0 if needs.device.startswith("cuda") or not needs.estimate else needs.estimate.weights
    return BASE // 2 + weights


def kind(device: str) -> str:
    """What measurements are kept by: ``cuda`` for any one GPU, ``cuda x2`` for two together."""
    count = device.count(",") + 1
    name = device.partition(":")[0]
    return f"{name} x{count}" if count > 1 else name


def gpus(kind: str) -> int:
    """How many of them a device of that kind means."""
    _, _, count = kind.partition(" x")
    return int(count) if count else 1


def _target(blueprint: Blueprint, asked: str) -> str | None:
    """The dtype that the weights will have."""
    if asked != "auto":
        return asked
    if blueprint.dtype in _SIZES:
        return blueprint.dtype
    floats = [group for group in blueprint.groups if _KINDS.get(group.kind, ("", 0, False))[2]]
    if not floats:
        return None
    return _KINDS[max(floats, key=lambda group: group.parameters).kind][0]


def _weights(blueprint: Blueprint, dtype: str | None, quantization: str) -> int:
    """Of the model in memory."""
    if not blueprint.groups:
        return blueprint.size
    smaller = _QUANTIZED.get(quantization)
    total = 0.0
    for group in blueprint.groups:
        each = _bytes(group, dtype)
        if smaller is None or not _converts(group):
            total += group.parameters * each
        else:
            total += (group.parameters - group.matrices) * each
            total += group.matrices * min(smaller, each)
    return math.ceil(total)


def _loading(blueprint: Blueprint, terms: Terms, weights: int) -> int:
    """Host memory of weights while they are loaded: those of the file too that are converted."""
    dtype = _target(blueprint, terms.dtype)
    if not blueprint.groups:
        # A pickle is read whole, and nobody knows of which kind it is.
        return 2 * blueprint.size if terms.dtype != "auto" else int(blueprint.size * (1 + _UNKNOWN))
    read = sum(
        group.parameters * _KINDS[group.kind][1]
        for group in blueprint.groups
        if _converts(group) and _KINDS[group.kind][0] != dtype
    )
    dense = _weights(blueprint, dtype, "none")
    loading = math.ceil(read) + dense
    if terms.quantization != "none":
        words = blueprint.vocabulary or 0 if blueprint.generates or blueprint.every_token else 0
        loading += weights + 2 * _FLOAT * _COMPARED * words
    # A tensor is there twice while it is converted.
    return loading + (blueprint.largest * _FLOAT if read else 0)


def _converts(group: Group) -> bool:
    return _KINDS.get(group.kind, ("", 0.0, False))[2]


def _bytes(group: Group, dtype: str | None) -> float:
    """Of each number of the group, in memory."""
    _, size, converts = _KINDS.get(group.kind, ("", 8.0, False))
    return _SIZES.get(dtype or "", size) if converts else size


def _activations(blueprint: Blueprint, terms: Terms, *, generates: bool, every_token: bool) -> int:
    """Of the largest computation: what layers pass on, masks, and chances of words."""
    hidden, intermediate = blueprint.hidden, blueprint.intermediate
    if hidden is None or intermediate is None:
        return int(blueprint.size * _UNKNOWN)
    vocabulary = blueprint.vocabulary or 0
    positions = blueprint.positions or _PREFILL
    if generates:
        tokens, longest = _PREFILL, min(positions, _LONGEST)
        words = terms.max_sequences * vocabulary * 3
    else:
        # One input is never cut, however small the batches are to be.
        tokens = max(terms.max_batch_tokens, min(positions, _LONGEST))
        longest = min(positions, tokens)
        words = tokens * vocabulary * 2 if every_token else 0
    each = 12 * hidden + 3 * intermediate
    return _FLOAT * (tokens * each + 2 * tokens * longest + words)


def _cache(blueprint: Blueprint, dtype: str | None, terms: Terms) -> int:
    """Of keys and values, where as many texts are generated as may be."""
    if blueprint.layers is None or blueprint.key_values is None:
        return int(blueprint.size * _UNKNOWN)
    tokens = min(blueprint.positions or SEQUENCE_TOKENS, SEQUENCE_TOKENS)
    each = blueprint.layers * blueprint.key_values * _SIZES.get(dtype or "", _FLOAT)
    return _COPIES * terms.max_sequences * tokens * each


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these that is a number which can be."""
    for name in names:
        value = config.get(name)
        if type(value) is int and 0 < value < 2**32:
            return value
    return None
