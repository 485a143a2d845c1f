"""Fill-mask: words for the masked places of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tursi.errors import InvalidRequest, TaskUnsuitable
from tursi.inference.padding import padded
from tursi.inference.tokens import Tokenizer, Tokens
from tursi.model import Task, Usage
from tursi.tasks import Fill, FillMaskRequest, Fills, TaskRequest

_LOGITS_LIMIT = 256 * 1024 * 1024
"""Bytes of scores per forward: one float32 for each token and word of the vocabulary."""


class MaskFiller:
    """A model with a masked-language head."""

    task = Task.FILL_MASK
    requests: tuple[type[TaskRequest], ...] = (FillMaskRequest,)

    def __init__(self, model: Any, tokenizer: Tokenizer, *, max_batch_tokens: int) -> None:
        mask = tokenizer.transformers.mask_token_id
        if mask is None:
            raise TaskUnsuitable("The model can't do fill-mask: its tokenizer has no mask token.")
        self._mask = int(mask)
        self._model = model
        self._tokenizer = tokenizer
        self._device = model.device
        self._vocabulary = int(model.config.vocab_size)
        self.max_batch_tokens = min(max_batch_tokens, _LOGITS_LIMIT // (4 * self._vocabulary))

    def items(self, request: FillMaskRequest) -> list[Tokens]:
        """The texts; each must have a mask token."""
        if request.top_k < 1:
            raise InvalidRequest("top_k must be at least 1.", param="top_k")
        if request.targets is not None:
            self._targets(request.targets)
        items = self._tokenizer.encode(
            request.inputs, truncate=bool(request.truncate), param="inputs"
        )
        for index, tokens in enumerate(items):
            if self._mask not in tokens.ids:
                raise InvalidRequest(
                    f"Input {index} has no mask token; write "
                    f"{self._tokenizer.transformers.mask_token} where a word is wanted.",
                    param="inputs",
                )
        return items

    @torch.inference_mode()
    def compute(self, batch: Sequence[Tokens]) -> Sequence[torch.Tensor]:
        """Scores ``(masks, vocabulary)`` per text, float32."""
        inputs, _ = padded(batch, self._tokenizer.pad_id, self._device)
        logits = self._model(**inputs).logits
        return [
            logits[row, [i for i, id_ in enumerate(tokens.ids) if id_ == self._mask]].float().cpu()
            for row, tokens in enumerate(batch)
        ]

    def assemble(
        self,
        request: FillMaskRequest,
        items: Sequence[Tokens],
        outputs: Sequence[torch.Tensor],
        usage: Usage,
    ) -> Fills:
        """The best words for each mask of each text."""
        targets = None if request.targets is None else self._targets(request.targets)
        return Fills(
            items=tuple(
                self._fills(tokens, logits, request.top_k, targets)
                for tokens, logits in zip(items, outputs, strict=True)
            ),
            usage=usage,
        )

    def _fills(
        self, tokens: Tokens, logits: torch.Tensor, top_k: int, targets: list[int] | None
    ) -> tuple[tuple[Fill, ...], ...]:
        # Over the whole vocabulary even where only the targets are shown, as
        # transformers does: a score says how likely the word is at all.
        chances = logits.softmax(dim=-1)
        if targets is not None:
            chances = chances[:, targets]
        values, places = chances.topk(min(top_k, chances.shape[-1]))
        masks = [i for i, id_ in enumerate(tokens.ids) if id_ == self._mask]
        found = []
        for mask, row, columns in zip(masks, values.tolist(), places.tolist(), strict=True):
            fills = []
            for score, column in zip(row, columns, strict=True):
                token = targets[column] if targets is not None else column
                ids = [*tokens.ids[:mask], token, *tokens.ids[mask + 1 :]]
                # With several masks the others must stay visible.
                sequence = self._tokenizer.decode(ids, special=len(masks) > 1)
                word = self._tokenizer.decode([token], special=True)
                fills.append(Fill(score, token, word, sequence))
            found.append(tuple(fills))
        return tuple(found)

    def _targets(self, words: Sequence[str]) -> list[int]:
        tokenizer = self._tokenizer.transformers
        vocabulary = tokenizer.get_vocab()
        ids: dict[int, None] = {}
        for word in words:
            id_ = vocabulary.get(word)
            if id_ is None:
                pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
                id_ = pieces[0] if pieces else None
            if id_ is not None:
                ids[id_] = None
        if not ids:
            raise InvalidRequest("None of the targets is a word of the model.", param="targets")
        return list(ids)
