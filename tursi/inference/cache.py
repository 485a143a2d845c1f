"""The attention cache of the rows that are generated together.

Rows are aligned at their right end, so the ones that are shorter have unused
places on the left, which the mask hides. Rows join and leave between steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_BATCHED_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
_BATCHED_KINDS = {"full_attention", "sliding_attention"}


class Decoder:
    """A causal language model, called with what its forward understands."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.device: torch.device = model.device
        # The decorators around forward hide nothing: signature() looks through.
        names = set(inspect.signature(model.forward).parameters)
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._positions = "position_ids" in names
        self._last_only = "logits_to_keep" in names
        self.cached = bool(model._supports_default_dynamic_cache()) and self._cache_name in names  # noqa: SLF001 - transformers' own generate asks the same
        """Whether it can go on from a cache; else each step reads everything again."""
        self.batched = self.cached and self._positions and _joinable(model.config)
        """Whether rows can share one cache."""

    def empty_cache(self) -> DynamicCache | None:
        """A fresh cache, where the model uses one."""
        return DynamicCache(config=self._model.config) if self.cached else None

    def forward(
        self,
        ids: torch.Tensor,
        cache: DynamicCache | None,
        mask: torch.Tensor | None,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Logits of the last token ``(rows, vocabulary)`` in float32; the cache grows.

        ``ids`` and ``positions`` are ``(rows, new)``, ``mask`` ``(rows, cached + new)``;
        no mask means that every place counts.
        """
        arguments: dict[str, Any] = {"input_ids": ids}
        if mask is not None:
            arguments["attention_mask"] = mask
        if self._positions:
            arguments["position_ids"] = positions
        if self._last_only:
            arguments["logits_to_keep"] = 1
        if self._cache_name == "cache" or cache is not None:
            arguments[self._cache_name] = cache
        logits = self._model(**arguments, use_cache=cache is not None).logits
        return logits[:, -1].to(torch.float32, copy=True)  # type: ignore[no-any-return] # the model is untyped


def _joinable(config: Any) -> bool:
    config = config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not set(kinds) <= _BATCHED_KINDS:
        return False
    return all(type(layer) in _BATCHED_LAYERS for layer in DynamicCache(config=config).layers)


class SharedCache:
    """One cache for many rows."""

    def __init__(self, cache: DynamicCache | None, lengths: Sequence[int]) -> None:
        self.cache = cache
        self.lengths = list(lengths)
        """Tokens in the cache, per row."""

    @property
    def width(self) -> int:
        """Places per row, the longest row's length."""
        return max(self.lengths)

    def join(self, other: SharedCache) -> None:
        """Take over the rows of ``other``, below ours; ``other`` is used up."""
        width = max(self.width, other.width)
        joined = []
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            places = _places(mine, width)
            joined.append(
                (
                    torch.cat([_fit(mine.keys, places), _fit(theirs.keys, places)]),
                    torch.cat([_fit(mine.values, places), _fit(theirs.values, places)]),
                )
            )
        self._replace(joined, width)
        self.lengths += other.lengths

    def repeat(self, count: int) -> None:
        """Make ``count`` equal rows of each."""
        if count > 1 and self.cache is not None:
            self.cache.batch_repeat_interleave(count)
            self.lengths = [length for length in self.lengths for _ in range(count)]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row but these, and the places that only the others needed."""
        lengths = [self.lengths[row] for row in rows]
        width = max(lengths)
        wanted = torch.tensor(rows, dtype=torch.long)
        kept = []
        for layer in self._layers:
            places = _places(layer, width)
            # Layers may be on several devices.
            index = wanted = wanted.to(layer.keys.device)
            kept.append(
                (
                    _fit(layer.keys, places).index_select(0, index),
                    _fit(layer.values, places).index_select(0, index),
                )
            )
        self._replace(kept, width)
        self.lengths = lengths

    def step(self, decoder: Decoder, tokens: Sequence[int]) -> torch.Tensor:
        """Feed each row its next token; logits ``(rows, vocabulary)``."""
        device = decoder.device
        lengths = torch.tensor(self.lengths, dtype=torch.long, device=device).unsqueeze(1)
        places = torch.arange(self.width + 1, device=device)
        mask = (places >= self.width - lengths).long()
        ids = torch.tensor(tokens, dtype=torch.long, device=device).unsqueeze(1)
        logits = decoder.forward(ids, self.cache, mask, lengths)
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    @property
    def _layers(self) -> list[Any]:
        return [] if self.cache is None else self.cache.layers

    def _replace(self, states: Sequence[tuple[torch.Tensor, torch.Tensor]], width: int) -> None:
        # Only now, all at once: running out of memory halfway must not leave
        # a cache whose layers disagree.
        for layer, (keys, values) in zip(self._layers, states, strict=True):
            layer.keys, layer.values = keys, values
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = width


def _places(layer: Any, width: int) -> int:
    if isinstance(layer, DynamicSlidingWindowLayer):
        return min(width, layer.sliding_window - 1)
    return width


def _fit(states: torch.Tensor, places: int) -> torch.Tensor:
    """``states`` with exactly ``places`` of them: cut or filled with zeros on the left."""
    have = states.shape[-2]
    if have >= places:
        return states[..., have - places :, :]
    return functional.pad(states, (0, 0, places - have, 0))
