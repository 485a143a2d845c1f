"""A model over several GPUs: which of its layers goes to which, by accelerate."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tursi.errors import DeviceUnsupported, OutOfMemory

_FOR_WEIGHTS = 0.9
"""Of the memory that is free; the rest is for what is computed."""


def free_memory(devices: Sequence[torch.device]) -> dict[int, int]:
    """Bytes of each GPU that weights may take now."""
    return {
        device.index: int(_FOR_WEIGHTS * torch.cuda.mem_get_info(device)[0]) for device in devices
    }


def split(
    auto_class: Any, config: Any, dtype: torch.dtype, free: Mapping[int, int]
) -> dict[str, int]:
    """The GPU of each module, so that each GPU gets about as much.

    ``DeviceUnsupported`` without accelerate, ``OutOfMemory`` if the weights don't fit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from accelerate import infer_auto_device_map
            from accelerate.utils import get_balanced_memory
    except ImportError as error:
        raise DeviceUnsupported(
            "A model is laid over several GPUs by the Python package accelerate, which can't be "
            "imported: install tursi[gpus], or choose one device."
        ) from error
    # Of no size: only the shapes matter.
    with torch.device("meta"):
        model = auto_class.from_config(config)
    model.tie_weights()
    whole = sorted(model._no_split_modules or ())  # noqa: SLF001 - what its author says can't be divided
    balanced = get_balanced_memory(
        model, max_memory=dict(free), no_split_module_classes=whole, dtype=dtype
    )
    places: dict[str, Any] = infer_auto_device_map(
        model,
        max_memory={index: balanced[index] for index in free},
        no_split_module_classes=whole,
        dtype=dtype,
    )
    if not all(isinstance(place, int) for place in places.values()):
        raise OutOfMemory(
            "The model's weights don't fit into the free memory of "
            f"{', '.join(f'cuda:{index}' for index in free)}; use more GPUs, or a smaller dtype."
        )
    return places
