"""Where a model computes, and in which precision."""

from __future__ import annotations

import re

import torch

from tursi.errors import DeviceUnavailable, DeviceUnsupported, TaskUnsuitable

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(wanted: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` names.

    Raises ``DeviceUnavailable`` if it isn't there now, ``DeviceUnsupported`` if
    it can't ever be with what is installed.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if wanted == "cpu":
        return torch.device("cpu")
    if wanted == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceUnsupported("The device 'mps' was asked for, but there is no Apple GPU.")
        return torch.device("mps")
    matched = re.fullmatch(r"cuda(?::(\d{1,3}))?", wanted)
    if matched is None:
        raise DeviceUnsupported(
            f"There is no device {wanted[:50]!r}; choose auto, cpu, cuda, cuda:N or mps."
        )
    if not torch.backends.cuda.is_built() and torch.version.hip is None:
        raise DeviceUnsupported(
            f"The device {wanted!r} was asked for, but the installed torch "
            f"{torch.__version__} is built without GPU support."
        )
    count = torch.cuda.device_count()
    index = int(matched[1] or 0)
    if index >= count:
        there = f"only {count} of them" if count else "no usable NVIDIA GPU or driver"
        raise DeviceUnavailable(f"The device {wanted!r} was asked for, but there is {there} here.")
    return torch.device("cuda", index)


def choose_dtype(wanted: str) -> torch.dtype | str:
    """``auto`` means the checkpoint's own."""
    if wanted == "auto":
        return wanted
    found = _DTYPES.get(wanted)
    if found is None:
        raise TaskUnsuitable(
            f"There is no dtype {wanted[:50]!r}; choose auto, {', '.join(_DTYPES)}."
        )
    return found
