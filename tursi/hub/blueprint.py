"""Reads what a model's files tell of its size: headers of safetensors files, and config.json.

A file is somebody else's and may be broken or hostile: every read has a bound, and what
can't be understood counts as a file whose size alone is known. Whether it can be loaded
is for the worker to find out.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from tursi.folder import PICKLES, files
from tursi.footprint import Blueprint, Group, dimensions, merge, stored, tensors

MAX_HEADER = 4 * 1024 * 1024
"""Bytes, which are about 30,000 tensors; a file with more counts by its size.

While it is decoded, no other thread does anything.
"""
MAX_HEADERS = 64 * 1024 * 1024
"""Bytes of all headers of a model together."""
_MAX_JSON = 16 * 1024 * 1024
_LENGTH = 8
_ONE = "model.safetensors"


def read(folder: Path) -> Blueprint:
    """What there is to load in ``folder``; belongs into a thread.

    Raises ``OSError`` or ``ModelRefused`` where it can't be looked at.
    """
    sizes = dict(files(folder, depth=2))
    inside = _transformer(folder)
    weights = _weights(folder, inside, sizes)
    described = _config(folder / inside / "config.json")
    groups: list[Group] = []
    largest = 0
    left = MAX_HEADERS
    for name in weights:
        if not name.endswith(".safetensors"):
            groups.clear()
            break
        try:
            found, widest, length = _header(folder / name, left)
        except (OSError, ValueError):
            groups.clear()
            break
        left -= length
        largest = max(largest, widest)
        groups += found.values()
    chosen = sum(sizes[name] for name in weights) or sum(sizes.values())
    return Blueprint(chosen, merge(groups), largest if groups else 0, **described)


def _weights(folder: Path, inside: str, sizes: dict[str, int]) -> list[str]:
    """The files that are loaded: one, or those that an index names; and those of modules."""
    prefix = f"{inside}/" if inside else ""
    found = _of_index(folder, prefix, sizes)
    if not found:
        endings = (".safetensors", *PICKLES)
        own = [name for name in sizes if _parent(name) == inside and name.endswith(endings)]
        safe = [name for name in own if name.endswith(".safetensors")]
        found = sorted(safe or own)
    modules = {
        name
        for name in sizes
        if name.endswith(f"/{_ONE}") and _parent(name) != inside and "modules.json" in sizes
    }
    return [*found, *sorted(modules)]


def _of_index(folder: Path, prefix: str, sizes: dict[str, int]) -> list[str]:
    if prefix + _ONE in sizes:
        return [prefix + _ONE]
    index = _json(folder / f"{prefix}{_ONE}.index.json")
    shards: Any = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict):
        return []
    names = {prefix + shard for shard in shards.values() if isinstance(shard, str)}
    return sorted(names & sizes.keys())


def _transformer(folder: Path) -> str:
    """Where the transformer is in a folder of sentence-transformers."""
    modules = _json(folder / "modules.json")
    match modules:
        case [{"path": str(path)}, *_] if path and not _leads_out(path):
            return path.strip("/")
        case _:
            return ""


def _leads_out(path: str) -> bool:
    return path.startswith("/") or ".." in PurePosixPath(path).parts


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def _config(path: Path) -> dict[str, Any]:
    config = _json(path)
    return dimensions(config) if isinstance(config, dict) else {}


def _header(path: Path, left: int) -> tuple[dict[str, Group], int, int]:
    """The tensors of a safetensors file by kind, the largest, and the length of its header.

    ``ValueError`` for a header that is none, or tells of more than the file has.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size - _LENGTH
        length = int.from_bytes(file.read(_LENGTH), "little")
        if length > min(MAX_HEADER, left, size):
            raise ValueError(f"the header of {path.name} can't have {length} bytes")
        header = _decode(file.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"the header of {path.name} is no object")  # noqa: TRY004 - of the file
    found, widest = tensors(header)
    if stored(found.values()) > size - length:
        raise ValueError(f"{path.name} has fewer bytes than its header tells of")
    return found, widest, length


def _json(path: Path) -> Any:
    """The value in a file; ``None`` where there is none that can be read."""
    if not path.is_file():
        # What is something else might be waited for without end.
        return None
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_JSON + 1)
        return _decode(data) if len(data) <= _MAX_JSON else None
    except (OSError, ValueError):
        return None


def _decode(data: bytes) -> Any:
    """The value of a JSON text; ``ValueError`` for what is none."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error
