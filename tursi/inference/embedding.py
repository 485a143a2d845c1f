"""Text embeddings and sentence similarity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tursi.errors import InternalError, InvalidRequest
from tursi.inference.job import NOT_FINITE
from tursi.inference.padding import padded
from tursi.inference.pooling import Head
from tursi.inference.tokens import Tokenizer, Tokens
from tursi.model import Task, Usage
from tursi.tasks import (
    Embeddings,
    EmbedRequest,
    Similarities,
    SimilarityRequest,
    TaskRequest,
    TaskResult,
)

Vector = npt.NDArray[np.float32]


class Embedder:
    """A transformer with a pooling head."""

    task = Task.FEATURE_EXTRACTION
    requests: tuple[type[TaskRequest], ...] = (EmbedRequest, SimilarityRequest)

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        head: Head,
        *,
        prompts: Mapping[str, str],
        default_prompt: str | None,
        max_batch_tokens: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._head = head
        self._prompts = prompts
        self._default_prompt = default_prompt
        self.max_batch_tokens = max_batch_tokens
        self._device = model.device

    def items(self, request: EmbedRequest | SimilarityRequest) -> list[Tokens]:
        """The texts with their prompt; a similarity's source comes first."""
        if isinstance(request, SimilarityRequest):
            texts: Sequence[Any] = (request.source, *request.sentences)
            prompt = self._prompt(None)
            if not request.sentences:
                raise InvalidRequest("There are no sentences to compare with.", param="sentences")
        else:
            texts = request.inputs
            prompt = self._prompt(request.prompt_name)
        items = self._tokenizer.encode(texts, truncate=bool(request.truncate), prefix=prompt)
        if prompt and not self._head.include_prompt:
            length = self._prompt_length(prompt)
            for text, tokens in zip(texts, items, strict=True):
                tokens.prompt = length if isinstance(text, str) else 0
        return items

    @torch.inference_mode()
    def compute(self, batch: Sequence[Tokens]) -> Sequence[Vector]:
        """A vector per text, before normalization."""
        inputs, mask = padded(batch, self._tokenizer.pad_id, self._device)
        states = self._model(**inputs)[0]
        for row, tokens in enumerate(batch):
            if tokens.prompt:
                mask[row, : min(tokens.prompt, len(tokens.ids) - 1)] = False
        vectors: npt.NDArray[np.float32] = self._head(states, mask).cpu().numpy()
        return list(vectors)

    def assemble(
        self,
        request: EmbedRequest | SimilarityRequest,
        items: Sequence[Tokens],
        outputs: Sequence[Vector],
        usage: Usage,
    ) -> TaskResult:
        """Vectors in order, or the cosines of the first with each other one."""
        vectors = np.stack(outputs)
        if not np.isfinite(vectors).all():
            raise InternalError(NOT_FINITE)
        if isinstance(request, SimilarityRequest):
            unit = _normalized(vectors)
            scores = unit[1:] @ unit[0]
            return Similarities(scores=tuple(map(float, scores)), usage=usage)
        available = vectors.shape[1]
        if request.dimensions is not None:
            if not 1 <= request.dimensions <= available:
                raise InvalidRequest(
                    f"The model's embeddings have {available} dimensions; "
                    f"ask for 1 to {available} of them.",
                    param="dimensions",
                )
            vectors = vectors[:, : request.dimensions]
        normalize = self._head.normalize if request.normalize is None else request.normalize
        if normalize:
            vectors = _normalized(vectors)
        return Embeddings(
            data=np.ascontiguousarray(vectors, dtype="<f4").tobytes(),
            count=len(items),
            dimensions=vectors.shape[1],
            usage=usage,
            truncated=tuple(i for i, tokens in enumerate(items) if tokens.truncated),
        )

    def dimensions(self) -> int:
        """The length of a vector, found by computing one."""
        return len(self.compute([Tokens([self._tokenizer.pad_id])])[0])

    def _prompt(self, name: str | None) -> str:
        if name is None:
            name = self._default_prompt
            return self._prompts.get(name, "") if name else ""
        if name not in self._prompts:
            known = ", ".join(sorted(self._prompts)) or "none"
            raise InvalidRequest(
                f"The model has no prompt {name!r}; it has: {known}.", param="prompt_name"
            )
        return self._prompts[name]

    def _prompt_length(self, prompt: str) -> int:
        ids = self._tokenizer.encode([prompt], truncate=True)[0].ids
        # The separator that closes a text stands after the whole text, not
        # after its prompt.
        return len(ids) - (ids[-1] in self._tokenizer.transformers.all_special_ids)


def _normalized(vectors: Vector) -> Vector:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Vector = vectors / np.maximum(lengths, 1e-12)
    return unit
