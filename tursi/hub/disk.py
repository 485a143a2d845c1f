"""Looks at model folders on disk; each look is bounded and belongs into a thread."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
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
_KEEP_SECONDS = 7 * 86400
"""So long what a download has left waits for somebody to go on with it."""
_LOCK, _UNFINISHED = "fetcher.lock", ".unfinished"
"""What a fetcher holds, and the ending of its notes of what it has begun with."""
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
    for snapshot in islice(cache.glob("models--*/snapshots/[!.]*"), _MAX_SNAPSHOTS):
        if _is_unfinished(snapshot):
            continue
        try:
            sizes = dict(files(snapshot, depth=3))
        except (OSError, ModelRefused):
            continue  # removed meanwhile, or not made by us
        if any(name.endswith((".safetensors", *PICKLES)) for name in sizes):
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


def imported(root: Path) -> list[CatalogueEntry]:
    """Every model in ``root``, where imports have a folder each, sorted by name."""
    entries = []
    for folder in islice(root.glob("[!.]*"), _MAX_SNAPSHOTS):
        try:
            size = sum(dict(files(folder, depth=4)).values())
            used_at = folder.stat().st_mtime
        except (OSError, ModelRefused):
            continue
        entries.append(CatalogueEntry(folder.name, str(folder), size, used_at=used_at))
    return sorted(entries, key=lambda entry: entry.name)


def discard(root: Path, name: str) -> None:
    """Remove the folder of an import."""
    gone = root / f".{name}.removed"
    shutil.rmtree(gone, ignore_errors=True)
    # First out of sight, so that nobody takes a half removed one for whole.
    with contextlib.suppress(FileNotFoundError):
        (root / name).rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


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
    with alone(cache, name) as held:
        if not held:
            raise ModelInUse(f"{repository} is being downloaded.")
        folder = cache / name
        _clear(folder, older_than=None)
        for commit in commits:
            _hide(folder, commit)
            _marker(folder, commit).unlink(missing_ok=True)
        _clear(folder, older_than=None)


def commit(cache: Path, repository: str, revision: str) -> str:
    """The commit that a branch or tag was when it was last fetched, else ``revision`` itself."""
    folder = cache / ("models--" + repository.replace("/", "--"))
    try:
        return (folder / "refs" / revision).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return revision


def unfinished(cache: Path, repository: str) -> list[str]:
    """The commits of ``repository`` that were begun with, and of which not all has come."""
    folder = cache / ("models--" + repository.replace("/", "--"))
    return [commit for commit in _begun(folder) if _is_unfinished(_snapshot(folder, commit))]


def finish(cache: Path, repository: str, commit: str) -> None:
    """Note that all of a commit is there and right, whoever began with it."""
    _marker(cache / ("models--" + repository.replace("/", "--")), commit).unlink(missing_ok=True)


def sweep(cache: Path, now: float) -> None:
    """Finish removals that were broken off, and remove what downloads have left long ago.

    ``now`` is in UTC epoch seconds.
    """
    oldest = now - _KEEP_SECONDS
    for folder in cache.glob("models--*"):
        with contextlib.suppress(OSError), alone(cache, folder.name) as held:
            if not held:
                continue
            _clear(folder, older_than=oldest)
            for commit in _begun(folder):
                if _marker(folder, commit).stat().st_mtime < oldest:
                    if _is_unfinished(_snapshot(folder, commit)):
                        _hide(folder, commit)
                    _marker(folder, commit).unlink()
            _clear(folder, older_than=oldest)


@contextlib.contextmanager
def alone(cache: Path, name: str) -> Iterator[bool]:
    """Hold the repository as a fetcher does; whether no fetcher does."""
    locks = _locks(cache / name)
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _snapshot(folder: Path, commit: str) -> Path:
    return folder / "snapshots" / commit


def _locks(folder: Path) -> Path:
    return folder.parent / ".locks" / folder.name


def _marker(folder: Path, commit: str) -> Path:
    return _locks(folder) / (commit + _UNFINISHED)


def _begun(folder: Path) -> list[str]:
    markers = _locks(folder).glob(f"*{_UNFINISHED}")
    return [marker.name.removesuffix(_UNFINISHED) for marker in markers]


def _hide(folder: Path, commit: str) -> None:
    """First out of sight, so that nobody takes a half removed one for whole."""
    with contextlib.suppress(FileNotFoundError):
        _snapshot(folder, commit).rename(folder / "snapshots" / f".{commit}.removed")


def _is_unfinished(snapshot: Path) -> bool:
    """Whether a fetcher has begun with it and never seen that all of it is right."""
    folder = snapshot.parent.parent
    verified = (folder / "refs" / snapshot.name).exists()
    return not verified and _marker(folder, snapshot.name).exists()


def _clear(folder: Path, older_than: float | None) -> None:
    """Remove what is hidden, and content that nothing needs, if it is older than that."""
    for gone in list((folder / "snapshots").glob(".*.removed")):
        shutil.rmtree(gone, ignore_errors=True)
        _drop_references(folder / "refs", {gone.name[1:].removesuffix(".removed")})
    left = any((folder / "snapshots").glob("[!.]*"))
    needed = {
        os.path.basename(os.readlink(path))  # noqa: PTH115, PTH119 - names, not paths
        for path in (folder / "snapshots").rglob("*")
        if path.is_symlink()
    }
    for blob in list((folder / "blobs").glob("*")):
        if blob.name in needed:
            continue
        if older_than is None or blob.stat().st_mtime < older_than:
            blob.unlink(missing_ok=True)
        else:
            left = True
    if not left:
        shutil.rmtree(folder, ignore_errors=True)
        for path in list(_locks(folder).glob("*")):
            if path.name != _LOCK:
                path.unlink(missing_ok=True)


def _drop_references(folder: Path, commits: Collection[str]) -> None:
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if path.is_file() and path.read_text("ascii").strip() in commits:
                path.unlink()
