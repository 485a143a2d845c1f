"""Files of weights: what they really are, and whether a safetensors file holds together."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tursi.errors import ModelFilesMissing, ModelRefused, WeightsCorrupt
from tursi.folder import START, disguise

MAX_HEADER = 100_000_000
"""Bytes; safetensors itself allows no more."""
_LENGTH = 8
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of weights."""

    path: Path
    size: int
    """Bytes."""
    tensors: Mapping[str, int] = field(default_factory=dict)
    """The bytes of each, where that is known."""
    dtypes: Mapping[str, int] = field(default_factory=dict)
    """The bytes of each dtype, by torch's names."""


def check_weights(path: Path) -> Shard:
    """Raise unless this is a safetensors file whose header fits it.

    ``ModelRefused`` for a pickle or an archive by that name, ``WeightsCorrupt`` and
    ``ModelFilesMissing`` for what is merely broken.
    """
    try:
        with path.open("rb") as file:
            start = file.read(START)
            if start.startswith(b"version https://git-lfs"):
                raise ModelFilesMissing(
                    f"{path.name} is only a Git LFS pointer; fetch the real file with "
                    "'git lfs pull'."
                )
            what = disguise(start)
            if what is not None:
                raise ModelRefused(
                    f"{path.name} is no safetensors file but {what}, which could run code when it "
                    "is loaded; replace it with a safetensors file."
                )
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(start[:_LENGTH], "little")
            if size < _LENGTH or length > min(MAX_HEADER, size - _LENGTH):
                raise _damaged(path, f"its header can't have {length} bytes")
            file.seek(_LENGTH)
            shard = _header(path, size, file.read(length))
        with safe_open(path, framework="numpy") as weights:
            if not weights.keys():
                raise WeightsCorrupt(f"{path.name} holds no weights.")
    except SafetensorError as error:
        raise _damaged(path, str(error)) from None
    except OSError as error:
        raise ModelFilesMissing(f"{path.name} can't be read: {error.strerror or error}.") from None
    return shard


def check_pickled(path: Path) -> Shard:
    """Raise ``ModelRefused`` unless this is a file of ``torch.save()``."""
    try:
        with path.open("rb") as file:
            what = disguise(file.read(START))
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ModelFilesMissing(f"{path.name} can't be read: {error.strerror or error}.") from None
    if what not in {"a zip archive", "a pickle file"}:
        raise ModelRefused(f"{path.name} is {what or 'unknown'} and no file of torch.save().")
    return Shard(path, size)


def _header(path: Path, size: int, header: bytes) -> Shard:
    """What it tells; every tensor lies within the bytes that follow it."""
    data = size - _LENGTH - len(header)
    try:
        tensors: Any = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header isn't JSON: {error}") from None
    if not isinstance(tensors, dict):
        raise _damaged(path, "its header is no JSON object")
    sizes: dict[str, int] = {}
    dtypes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        if name == "__metadata__":
            continue
        match tensor:
            case {"data_offsets": [int(begin), int(end)]} if 0 <= begin <= end <= data:
                sizes[name] = end - begin
                dtypes[_DTYPES.get(str(tensor.get("dtype")), "other")] += end - begin
            case _:
                raise _damaged(path, f"the tensor {name[:100]!r} lies outside of the file")
    return Shard(path, size, sizes, dtypes)


def _damaged(path: Path, why: str) -> WeightsCorrupt:
    return WeightsCorrupt(f"{path.name} is damaged ({why}); replace it with a fresh copy.")
