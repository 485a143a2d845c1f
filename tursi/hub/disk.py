"""Looks at model folders on disk; each look is bounded and belongs into a thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tursi.errors import ModelFilesMissing, ModelRefused
from tursi.model import CatalogueEntry, Resolution

_MAX_FILES = 10_000
_MAX_SNAPSHOTS = 10_000
_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LFS_POINTER = b"version https://git-lfs"


def look(folder: Path) -> Resolution:
    """What there is to load in ``folder``, used in place.

    Raises ``ModelFilesMissing`` or ``ModelRefused`` with what it lacks. Whether
    the files are sound is for the worker to find out.
    """
    try:
        if not folder.exists():
            raise ModelFilesMissing(f"There is no folder {folder}.")
        if not folder.is_dir():
            raise ModelFilesMissing(f"{folder} is no folder; name the folder that has config.json.")
        sizes = dict(_files(folder, depth=2))
        for name in sizes:
            if name.endswith((".json", ".safetensors")) and not os.access(folder / name, os.R_OK):
                raise ModelFilesMissing(f"{folder / name} can't be read by the daemon's user.")
        weights = sorted(name for name in sizes if name.endswith(".safetensors"))
        _check(folder, sizes, weights)
        for name in weights:
            with (folder / name).open("rb") as file:
                if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                    raise ModelFilesMissing(
                        f"{folder / name} is only a pointer; get the file with `git lfs pull`."
                    )
    except OSError as error:
        # The text of an OSError names the path.
        raise ModelFilesMissing(
            f"The folder can't be read by the daemon's user: {error}."
        ) from None
    files = tuple(sorted(name for name in sizes if name.endswith((".json", ".safetensors"))))
    return Resolution(folder=str(folder), files=files, size=sum(sizes[name] for name in files))


def _check(folder: Path, sizes: dict[str, int], weights: list[str]) -> None:
    if "config.json" not in sizes and "modules.json" not in sizes:
        raise ModelFilesMissing(
            f"{folder} has neither config.json nor modules.json, so it is no model folder."
        )
    if weights:
        return
    pickles = sorted(name for name in sizes if name.endswith(_PICKLE))
    if pickles:
        raise ModelRefused(
            f"{folder} has its weights only as pickle ({pickles[0]}), which Tursi doesn't load "
            "because it can run code; save it again with transformers' save_pretrained()."
        )
    raise ModelFilesMissing(f"{folder} has no weights (model.safetensors).")


def catalogue(cache: Path) -> list[CatalogueEntry]:
    """Every snapshot with weights in the huggingface ``cache``, sorted by name."""
    entries = []
    for snapshot in islice(cache.glob("models--*/snapshots/*"), _MAX_SNAPSHOTS):
        try:
            sizes = dict(_files(snapshot, depth=3))
        except OSError:
            continue  # removed meanwhile
        if any(name.endswith(".safetensors") for name in sizes):
            repository = snapshot.parent.parent.name.removeprefix("models--").replace("--", "/")
            entries.append(
                CatalogueEntry(
                    name=repository,
                    folder=str(snapshot),
                    size=sum(sizes.values()),
                    commit=snapshot.name,
                )
            )
    return sorted(entries, key=lambda entry: (entry.name, entry.commit or ""))


def _files(folder: Path, depth: int) -> Iterator[tuple[str, int]]:
    """Names relative to ``folder`` and sizes of the files down to ``depth`` levels."""
    left = _MAX_FILES
    waiting = [(folder, "", depth)]
    while waiting:
        current, prefix, levels = waiting.pop()
        with os.scandir(current) as entries:
            for entry in islice(entries, left):
                left -= 1
                if entry.is_file():
                    yield prefix + entry.name, entry.stat().st_size
                elif levels > 1 and entry.is_dir(follow_symlinks=False):
                    waiting.append((Path(entry.path), f"{prefix}{entry.name}/", levels - 1))
