"""Text classification: scored labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tursi.errors import InternalError, InvalidRequest
from tursi.inference.job import NOT_FINITE
from tursi.inference.padding import padded
from tursi.inference.tokens import Tokenizer, Tokens
from tursi.model import Task, Usage
from tursi.tasks import Classifications, ClassifyRequest, Label, TaskRequest

Scores = npt.NDArray[np.float32]


class Classifier:
    """A model with a sequence-classification head."""

    task = Task.TEXT_CLASSIFICATION
    requests: tuple[type[TaskRequest], ...] = (ClassifyRequest,)

    def __init__(self, model: Any, tokenizer: Tokenizer, *, max_batch_tokens: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._device = model.device
        self._labels = _labels(model.config)
        self._function = _default_function(model.config)
        # Decoders with a classification head look for the last token that
        # isn't padding, so they need to know what padding is; those that don't
        # get one text at a time.
        self._alone = model.config.pad_token_id is None
        self._pad = tokenizer.pad_id if self._alone else model.config.pad_token_id
        self.max_batch_tokens = max_batch_tokens

    def items(self, request: ClassifyRequest) -> list[Tokens]:
        """The texts or pairs of texts."""
        if request.top_k is not None and request.top_k < 1:
            raise InvalidRequest("top_k must be at least 1.", param="top_k")
        return self._tokenizer.encode(
            request.inputs, truncate=bool(request.truncate), param="inputs"
        )

    @torch.inference_mode()
    def compute(self, batch: Sequence[Tokens]) -> Sequence[Scores]:
        """Raw scores per text, float32."""
        if self._alone and len(batch) > 1:
            return [self.compute([tokens])[0] for tokens in batch]
        inputs, _ = padded(batch, self._pad, self._device)
        logits: Scores = self._model(**inputs).logits.float().cpu().numpy()
        return list(logits)

    def assemble(
        self,
        request: ClassifyRequest,
        items: Sequence[Tokens],  # noqa: ARG002 - the Encoder protocol's
        outputs: Sequence[Scores],
        usage: Usage,
    ) -> Classifications:
        """Labels with their scores, best first."""
        scores = np.stack(outputs)
        if not np.isfinite(scores).all():
            raise InternalError(NOT_FINITE)
        match request.function or self._function:
            case "sigmoid":
                scores = (1.0 / (1.0 + np.exp(-scores))).astype(np.float32)
            case "softmax":
                shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
                scores = shifted / shifted.sum(axis=1, keepdims=True)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : request.top_k]
        return Classifications(
            items=tuple(
                tuple(Label(self._labels[label], float(row[label])) for label in order)
                for row, order in zip(scores, best, strict=True)
            ),
            usage=usage,
        )


def _labels(config: Any) -> Mapping[int, str]:
    named = config.id2label or {}
    return {i: str(named.get(i, f"LABEL_{i}")) for i in range(config.num_labels)}


def _default_function(config: Any) -> str:
    """What transformers' pipeline applies."""
    if config.problem_type == "regression":
        return "none"
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return "sigmoid"
    return "softmax"
