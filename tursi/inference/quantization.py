"""Smaller weights: the linear layers of a model's body as int8 or int4.

Embeddings and heads stay as they are: they are few, and what they lose is lost at
the end. One layer at a time, so that old and new weights of all layers are never
there together, but for the first try on a processor, whose old weights must
come back if it fails.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import nn

from tursi.errors import QuantizationInaccurate, QuantizationUnsupported
from tursi.inference.fidelity import Fidelity, Floors

NONE = "none"
_FLOORS = {
    "int8": Floors(cosine=0.99, chance=0.05, divergence=0.02),
    "int4": Floors(cosine=0.95, chance=0.2, divergence=0.2),
}
_WITHOUT = "deploy it without --quantize"
_PACKAGES = {"int8": "torchao", "int4": "bitsandbytes"}
"""What makes the weights small. torchao's int4 needs kernels that only some GPUs have."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a linear layer hangs in the model."""

    parent: nn.Module
    name: str
    layer: nn.Linear

    def put(self, layer: nn.Module) -> None:
        setattr(self.parent, self.name, layer)


def check(wanted: str, model_config: Any, devices: Sequence[torch.device]) -> None:
    """Raise ``QuantizationUnsupported`` for what is known not to work before any weight is read."""
    if wanted == NONE:
        return
    if wanted not in _FLOORS:
        raise QuantizationUnsupported(
            f"There is no quantization {wanted[:50]!r}; choose {', '.join(_FLOORS)} or none."
        )
    if _own(model_config) is not None:
        raise QuantizationUnsupported(
            f"The model's weights are quantized already ({_own(model_config)}); {_WITHOUT}."
        )
    for device in devices:
        if len(devices) > 1 or device.type not in {"cpu", "cuda"}:
            name = ",".join(map(str, devices))
            raise QuantizationUnsupported(
                f"Weights can't be quantized for the device {name!r}; {_WITHOUT}, or choose the "
                "device cpu or one GPU (cuda:N)."
            )


def explain_none(model_config: Any) -> str:
    """Why there is none."""
    own = _own(model_config)
    return f"As the model's own files have it: {own}." if own else "None: none was asked for."


def quantize(
    wanted: str,
    model: Any,
    device: torch.device,
    fidelity: Fidelity | None,
    advanced: Callable[[int, int], None],
) -> str:
    """Make the weights small and say how, and how near it is to what it was.

    ``fidelity`` is ``None`` where that isn't measured. ``QuantizationUnsupported`` and
    ``QuantizationInaccurate`` say what to do.
    """
    places = list(_places(model))
    if not places:
        raise QuantizationUnsupported(
            f"The model has no layers that can be quantized (torch.nn.Linear); {_WITHOUT}."
        )
    floors = _FLOORS[wanted]
    tried = ""
    if wanted == "int8" and fidelity is not None and model.dtype == torch.float32:
        replaced = _make_dynamic(places, advanced)
        if replaced:
            likeness = fidelity.likeness(floors)
            if likeness.enough:
                return (
                    f"int8, weights and activations (torch's dynamic int8) in {len(places)} "
                    f"linear layers: {likeness.told}."
                )
            for place in places:
                place.put(place.layer)
            tried = f" Not torch's dynamic int8, which is faster: {likeness.told}."
    make = _maker(wanted)
    for done, place in enumerate(places):
        make(place, device)
        advanced(done + 1, len(places))
    package = _PACKAGES[wanted]
    told = (
        f"{wanted}, weights only, in {len(places)} linear layers, by {package} "
        f"{metadata.version(package)}"
    )
    if fidelity is None:
        return f"{told}; how near it is to the unquantized model isn't measured on a GPU."
    likeness = fidelity.likeness(floors)
    if not likeness.enough:
        raise QuantizationInaccurate(
            f"The model loses too much as {wanted}: {likeness.told}; {_WITHOUT}"
            f"{', or as int8' if wanted == 'int4' else ''}."
        )
    return f"{told}: {likeness.told}.{tried}"


def _own(model_config: Any) -> str | None:
    """How the model's own files say that it is quantized."""
    found = getattr(model_config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))


def _places(model: Any) -> Iterator[_Place]:
    """The linear layers of the body."""
    seen = set()
    for parent in model.base_model.modules():
        for name, layer in parent.named_children():
            # Not of a subclass, which may do something else; one that several share, once.
            if type(layer) is nn.Linear and layer not in seen:
                seen.add(layer)
                yield _Place(parent, name, layer)


def _make_dynamic(places: list[_Place], advanced: Callable[[int, int], None]) -> bool:
    """Put torch's own dynamic int8 in the layers' places; false where torch has none.

    It is on its way out of torch, and has no kernels on some processors.
    """
    try:
        dynamic = importlib.import_module("torch.ao.nn.quantized.dynamic")
        config = importlib.import_module("torch.ao.quantization").per_channel_dynamic_qconfig
    except (ImportError, AttributeError):
        return False
    if torch.backends.quantized.engine not in {"x86", "fbgemm", "onednn"}:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for done, place in enumerate(places):
            place.layer.qconfig = config
            place.put(dynamic.Linear.from_float(place.layer))
            advanced(done + 1, len(places))
    return True


def _maker(wanted: str) -> Callable[[_Place, torch.device], None]:
    package = _PACKAGES[wanted]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library = importlib.import_module(
                f"{package}.quantization" if wanted == "int8" else package
            )
    except ImportError as error:
        raise QuantizationUnsupported(
            f"Weights become {wanted} by the Python package {package}, which can't be imported "
            f"({str(error).splitlines()[0][:200]}): install tursi[quantization], or {_WITHOUT}."
        ) from error
    return _int8(library) if wanted == "int8" else _int4(library)


def _int8(torchao: Any) -> Callable[[_Place, torch.device], None]:
    config = torchao.Int8WeightOnlyConfig()

    def make(place: _Place, device: torch.device) -> None:
        place.layer.to(device)
        torchao.quantize_(place.layer, config)
        place.layer.requires_grad_(False)

    return make


def _int4(bitsandbytes: Any) -> Callable[[_Place, torch.device], None]:
    def make(place: _Place, device: torch.device) -> None:
        layer = place.layer
        small = bitsandbytes.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        small.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4"
        )
        small.bias = layer.bias
        # That is what makes them small.
        place.put(small.to(device))

    return make
