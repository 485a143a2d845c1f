"""What sentence-transformers does after the transformer: pooling, dense layers, normalization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional

from tursi.errors import ArchitectureUnsupported, ModelFilesMissing, WeightsCorrupt
from tursi.inference.checkpoint import Checkpoint
from tursi.inference.weights import check_weights

_OLD_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""In the order in which several poolings are concatenated."""

_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Identity": lambda values: values,
    "Tanh": torch.tanh,
    "ReLU": functional.relu,
    "GELU": functional.gelu,
    "SiLU": functional.silu,
    "Sigmoid": torch.sigmoid,
}


@dataclass(frozen=True, slots=True)
class Head:
    """Turns token states into one vector per text."""

    modes: tuple[str, ...]
    include_prompt: bool
    layers: tuple[Callable[[torch.Tensor], torch.Tensor], ...]
    normalize: bool
    """Whether the model's own files end with a normalization."""

    def __call__(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Vectors ``(batch, dimensions)`` in float32, not normalized.

        ``states`` is ``(batch, tokens, hidden)``; ``mask`` is true where a token counts.
        """
        # In float32 whatever the model computes in: the sums are long.
        states = states.float()
        pooled = [_POOLINGS[mode](states, mask) for mode in self.modes]
        vectors = pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=-1)
        for layer in self.layers:
            vectors = layer(vectors)
        return vectors


def read_head(checkpoint: Checkpoint, device: torch.device) -> Head:
    """The head that the model's files describe; plain mean pooling if there are none."""
    modes: tuple[str, ...] = ("mean",)
    include_prompt, normalize = True, False
    layers: list[Callable[[torch.Tensor], torch.Tensor]] = []
    for module in checkpoint.modules[1:]:
        kind = str(module.get("type", "")).rpartition(".")[2]
        path = str(module.get("path", ""))
        match kind:
            case "Pooling":
                config = checkpoint.json(f"{path}/config.json")
                modes = _modes(config)
                include_prompt = bool(config.get("include_prompt", True))
            case "Dense":
                layers.append(_dense(checkpoint, path, device))
            case "Normalize":
                normalize = True
            case "Dropout":
                pass
            case _:
                raise ArchitectureUnsupported(
                    f"Tursi doesn't know the sentence-transformers module {kind!r} "
                    "that this model uses."
                )
    return Head(modes, include_prompt, tuple(layers), normalize)


def _modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    named = config.get("pooling_mode")
    if named is not None:
        modes = (named,) if isinstance(named, str) else tuple(named)
    else:
        modes = tuple(mode for key, mode in _OLD_KEYS.items() if config.get(key))
    unknown = [mode for mode in modes if mode not in _POOLINGS]
    if unknown or not modes:
        raise ArchitectureUnsupported(
            f"Tursi doesn't know the pooling {unknown[0]!r} that this model uses."
            if unknown
            else "The model's pooling configuration names no pooling."
        )
    return modes


def _dense(
    checkpoint: Checkpoint, path: str, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    config = checkpoint.json(f"{path}/config.json")
    file = checkpoint.root / path / "model.safetensors"
    if not file.is_file():
        raise ModelFilesMissing(f"{path}/{file.name} is missing; the model's dense layer needs it.")
    check_weights(file)
    weights = load_file(file, device=str(device))
    weight, bias = weights.get("linear.weight"), weights.get("linear.bias")
    if weight is None or weight.dim() != 2:
        raise WeightsCorrupt(f"{path}/{file.name} has no weights of a dense layer.")
    name = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    activation = _ACTIVATIONS.get(name)
    if activation is None:
        raise ArchitectureUnsupported(f"Tursi doesn't know the activation {name!r}.")
    matrix = weight.float()
    offset = None if bias is None else bias.float()
    return lambda vectors: activation(functional.linear(vectors, matrix, offset))


def _cls(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    first = mask.int().argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), first]


def _last(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), last]


def _max(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states.masked_fill(~mask.unsqueeze(-1), float("-inf")).amax(dim=1)


def _sum(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # One matrix product for the whole batch instead of a masked copy of it.
    return torch.bmm(mask.unsqueeze(1).to(states.dtype), states).squeeze(1)


def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _sum(states, mask) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def _mean_sqrt_len(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _sum(states, mask) / mask.sum(dim=1, keepdim=True).clamp(min=1).sqrt()


def _weighted_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = torch.arange(1, mask.shape[1] + 1, device=states.device) * mask
    total = torch.bmm(weights.unsqueeze(1).to(states.dtype), states).squeeze(1)
    return total / weights.sum(dim=1, keepdim=True).clamp(min=1)


_POOLINGS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
