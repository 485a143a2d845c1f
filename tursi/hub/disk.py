"""Looks at model folders on disk; each look is bounded and belongs into a thread."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Collection
from itertools import islice
from pathlib import Path

from tursi.errors import FetchInterrupted, ModelFilesMissing, ModelInUse, ModelRefused
from tursi.folder import PICKLES, files
from tursi.model import CatalogueEntry, Resolution, Trust

_MAX_SNAPSHOTS = 10_000
_PASSING = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR, errno.EIO, errno.ESTALE}
)
"""What the system may grant, or the disk be over, a little later."""
_LFS_POINTER = b"version https://git-lfs"


def look(folder: Path, trust: Trust = Trust()) -> Resolution:  # noqa: B008 - a frozen value
    """What there is to load in ``folder``, used in place; ``trust`` may allow pickle files.

    Raises ``ModelFilesMissing`` or ``ModelRefused`` with what it lacks, and
    ``FetchInterrupted`` if that couldn't be found out. Whether the files are sound
    is for the worker to find out.
    """
    try:
        if not folder.exists():
            raise ModelFilesMissing(f"There is no folder {folder}.")
        if not folder.is_dir():
            raise ModelFilesMissing(f"{folder} is no folder; name the folder that has config.json.")
        sizes = dict(files(folder, depth=2))
        endings = (".json", ".safetensors", *(PICKLES if trust.allow_pickle else ()))
        for name in sizes:
            if name.endswith(endings) and not os.access(folder / name, os.R_OK):
                raise ModelFilesMissing(f"{folder / name} can't be read by the daemon's user.")
        weights = sorted(name for name in sizes if name.endswith(".safetensors"))
        _check(folder, sizes, weights, trust)
        for name in weights:
            with (folder / name).open("rb") as file:
                if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                    raise ModelFilesMissing(
                        f"{folder / name} is only a pointer; get the file with `git lfs pull`."
                    )
    except OSError as error:
        # The text of an OSError names the path.
        if error.errno in _PASSING:
            raise FetchInterrupted(f"The folder can't be read just now: {error}.") from None
        raise ModelFilesMissing(
            f"The folder can't be read by the daemon's user: {error}."
        ) from None
    names = tuple(sorted(name for name in sizes if name.endswith(endings)))
    return Resolution(folder=str(folder), files=names, size=sum(sizes[name] for name in names))


def _check(folder: Path, sizes: dict[str, int], weights: list[str], trust: Trust) -> None:
    if "config.json" not in sizes and "modules.json" not in sizes:
        raise ModelFilesMissing(
            f"{folder} has neither config.json nor modules.json, so it is no model folder."
        )
    if weights:
        return
    pickles = sorted(name for name in sizes if name.endswith(PICKLES))
    if pickles and trust.allow_pickle:
        return
    if pickles:
        raise ModelRefused(
            f"{folder} has its weights only as pickle ({pickles[0]}), which can run code when it "
            "is loaded: save the model again with transformers' save_pretrained(), or, if you "
            "trust its author, allow it by --allow-pickle."
        )
    raise ModelFilesMissing(f"{folder} has no weights (model.safetensors).")


def catalogue(cache: Path) -> list[CatalogueEntry]:
    """Every snapshot with weights in the huggingface ``cache``, sorted by name."""
    entries = []
    for snapshot in islice(cache.glob("models--*/snapshots/*"), _MAX_SNAPSHOTS):
        try:
            sizes = dict(files(snapshot, depth=3))
        except (OSError, ModelRefused):
            continue  # removed meanwhile, or not made by us
        if any(name.endswith(".safetensors") for name in sizes):
            repository = snapshot.parent.parent.name.removeprefix("models--").replace("--", "/")
            entries.append(
                CatalogueEntry(
                    name=repository,
                    folder=str(snapshot),
                    size=sum(sizes.values()),
                    commit=snapshot.name,
                    used_at=snapshot.stat().st_mtime,
                )
            )
    return sorted(entries, key=lambda entry: (entry.name, entry.commit or ""))


def lacks(snapshot: Path, names: Collection[str]) -> bool:
    """Whether one of the files ``names`` of ``snapshot`` is missing."""
    return not snapshot.is_dir() or not all((snapshot / name).exists() for name in names)


def touch(snapshot: Path) -> None:
    """Note that the model is used now."""
    with contextlib.suppress(OSError):
        os.utime(snapshot)


def remove(cache: Path, repository: str, commits: Collection[str]) -> None:
    """Remove these snapshots of ``repository``, and the content that no other one needs.

    Raises ``ModelInUse`` while it is being downloaded.
    """
    name = "models--" + repository.replace("/", "--")
    folder, locks = cache / name, cache / ".locks" / name
    locks.mkdir(parents=True, exist_ok=True)
    # The lock that a fetcher holds.
    with (locks / "fetcher.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ModelInUse(f"{repository} is being downloaded.") from None
        for commit in commits:
            # First out of sight, so that nobody takes a half removed one for whole.
            gone = folder / "snapshots" / f".{commit}.removed"
            with contextlib.suppress(FileNotFoundError):
                (folder / "snapshots" / commit).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        _drop_references(folder / "refs", frozenset(commits))
        if not any((folder / "snapshots").glob("[!.]*")):
            shutil.rmtree(folder, ignore_errors=True)
            return
        needed = {
            os.path.basename(os.readlink(path))  # noqa: PTH115, PTH119 - names, not paths
            for path in (folder / "snapshots").rglob("*")
            if path.is_symlink()
        }
        for blob in (folder / "blobs").glob("*"):
            if blob.name not in needed:
                blob.unlink(missing_ok=True)


def _drop_references(folder: Path, commits: Collection[str]) -> None:
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if path.is_file() and path.read_text("ascii").strip() in commits:
                path.unlink()
