"""Where a model computes, and in which precision."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

import torch

from tursi.errors import DeviceUnavailable, DeviceUnsupported, TaskUnsuitable

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Choice(NamedTuple):
    """One device or several, and why it is these, as a sentence."""

    devices: tuple[torch.device, ...]
    why: str

    @property
    def first(self) -> torch.device:
        """Where inputs go."""
        return self.devices[0]

    def __str__(self) -> str:
        """As a user would name it."""
        return ",".join(map(str, self.devices))


def explain_device(wanted: str, because: str | None = None) -> Choice:
    """The device, or devices with commas between them, that ``wanted`` names, and why.

    As ``choose_device`` does. ``because`` is the reason of whoever chose it.
    """
    devices = tuple(map(choose_device, wanted.split(",")))
    if because is not None or wanted != "auto":
        name = ", ".join(map(str, devices))
        return Choice(devices, f"{name}: {because or 'it was asked for'}.")
    [device] = devices
    if device.type == "cuda":
        count = torch.cuda.device_count()
        which = f"the first of {count} GPUs" if count > 1 else "the only GPU"
        return Choice(devices, f"{device}: {which} ({torch.cuda.get_device_name(device)}).")
    if device.type == "mps":
        return Choice(devices, "mps: the Apple GPU.")
    return Choice(devices, f"cpu: {_no_gpu()}.")


def _no_gpu() -> str:
    """Why there is none, as a clause."""
    if not _built_for_gpus():
        return f"the installed torch {torch.__version__} is built without GPU support"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not hidden.strip("-1, "):
        return "CUDA_VISIBLE_DEVICES hides all GPUs"
    return "there is no usable GPU or driver"


def _built_for_gpus() -> bool:
    return torch.backends.cuda.is_built() or torch.version.hip is not None


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
    if not _built_for_gpus():
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


def explain_dtype(wanted: str, found: torch.dtype, named: str | None, stored: str | None) -> str:
    """Why the model computes in ``found``, as a sentence.

    ``named`` is what its configuration names and ``stored`` what most of its weights
    are, where that is known.
    """
    name = str(found).removeprefix("torch.")
    if wanted != "auto":
        why = "it was asked for"
    elif named == name:
        why = "the checkpoint's own, by its config.json"
    elif stored == name:
        why = "the checkpoint's own, by its weights"
    else:
        why = "transformers' choice for it"
    converted = f"; its weights are stored as {stored}" if stored not in {None, name} else ""
    return f"{name}: {why}{converted}."


def explain_attention(model: Any) -> str:
    """By what attention is computed, as a sentence."""
    name = getattr(model.config, "_attn_implementation", None) or "eager"
    if name == "eager":
        return "eager: transformers has nothing faster for this architecture here."
    return f"{name}: transformers' choice for this architecture here."


def torch_dtype(wanted: torch.dtype | str, *names: str | None) -> torch.dtype:
    """``wanted``, or else the first of ``names`` that is one."""
    if isinstance(wanted, torch.dtype):
        return wanted
    return next((_DTYPES[name] for name in names if name in _DTYPES), torch.float32)
