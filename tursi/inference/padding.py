"""Token lists to padded tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tursi.inference.tokens import Tokens


def padded(
    batch: Sequence[Tokens], pad_id: int, device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The inputs of a forward, padded on the right, and the mask of real tokens.

    Shapes are ``(len(batch), longest)``; the mask is boolean. Where nothing is
    padded the forward gets no mask, which spares the model an attention bias.
    """
    longest = max(len(tokens.ids) for tokens in batch)
    ids = np.full((len(batch), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(batch), longest), dtype=np.bool_)
    types = np.zeros((len(batch), longest), dtype=np.int64)
    for row, tokens in enumerate(batch):
        length = len(tokens.ids)
        ids[row, :length] = tokens.ids
        mask[row, :length] = True
        if tokens.type_ids is not None:
            types[row, :length] = tokens.type_ids
    inputs = {"input_ids": torch.from_numpy(ids).to(device)}
    real = torch.from_numpy(mask).to(device)
    if not mask.all():
        inputs["attention_mask"] = real
    if types.any():
        inputs["token_type_ids"] = torch.from_numpy(types).to(device)
    return inputs, real
