"""The files of a model read into an archive; everything here belongs into a thread."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tursi import archive
from tursi.archive import Digest, File, Manifest
from tursi.errors import FetchError, FilesUnavailable, ModelRefused
from tursi.folder import files
from tursi.model import Trust
from tursi.selection import select

_PIECE = 1 << 20
_MAX_INDEX = 64 * 1024 * 1024
_KEY = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_UNKNOWN = "0" * 64
"""Stands for a hash until it is known."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file to be exported, and where its content is."""

    file: File
    path: Path
    """Without links."""


def find(model: str, folder: Path, trust: Trust) -> list[Found]:
    """The files that ``model`` needs of those in ``folder``, the main weights last.

    Raises ``FilesUnavailable`` with what is wrong.
    """
    try:
        sizes = dict(files(folder, depth=4))
        chosen = select(model, sizes, lambda name: _index(folder / name), trust)
        return [_found(folder, name) for name in (*sorted(chosen.first), *chosen.weights)]
    except (FetchError, ModelRefused) as error:
        raise FilesUnavailable(error.message) from None
    except OSError as error:
        raise FilesUnavailable(
            f"The files of {model} can't be read ({error}); `tursi restart` has them fetched "
            "again, where they came from the hub."
        ) from None


def _index(path: Path) -> bytes:
    if path.stat().st_size > _MAX_INDEX:
        raise FilesUnavailable(f"{path.name} is larger than any index.")
    return path.read_bytes()


def _found(folder: Path, name: str) -> Found:
    path = Path(os.path.realpath(folder / name))
    if len(name) > archive.MAX_NAME:
        raise FilesUnavailable(
            f"The name {name[:200]!r} has over {archive.MAX_NAME} characters, which an archive "
            "has no room for."
        )
    if not os.access(path, os.R_OK):
        raise FilesUnavailable(f"{folder / name} can't be read by the daemon's user.")
    # In the hub's cache contents are named by their hash.
    key = path.name if path.parent.name == "blobs" and _KEY.fullmatch(path.name) else None
    sha256 = key if key is not None and len(key) == len(_UNKNOWN) else _UNKNOWN
    blob = key if key is not None and sha256 == _UNKNOWN else None
    return Found(File(name, path.stat().st_size, sha256, blob), path)


def pieces(
    found: Sequence[Found], describe: Callable[[Sequence[File]], Manifest]
) -> Iterator[bytes]:
    """The archive, bit by bit; nothing now and then while files are read for their hashes.

    Raises ``FilesUnavailable`` where a file isn't any more what it was.
    """
    known = []
    for each in found:
        file = each.file
        if file.sha256 == _UNKNOWN:
            digest = Digest(file)
            for piece in _read(each):
                digest.update(piece)
                yield b""
            file = File(file.name, file.size, digest.sha256, file.blob)
        known.append(Found(file, each.path))
    manifest = describe([each.file for each in known])
    yield archive.opening(manifest)
    for each in known:
        yield archive.file_header(manifest, each.file)
        digest = Digest(each.file)
        for piece in _read(each):
            digest.update(piece)
            yield piece
        if not digest.matches():
            raise FilesUnavailable(
                f"{each.file.name} is damaged on the disk, or was changed while it was exported."
            )
        yield archive.padding(each.file.size)
    yield archive.closing()


def _read(found: Found) -> Iterator[bytes]:
    """The content; as much as its size was, or ``FilesUnavailable``."""
    changed = FilesUnavailable(f"{found.file.name} was changed while it was exported.")
    try:
        # Where somebody puts a pipe in its place meanwhile, nobody would ever write into it.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(found.path, flags)
    except OSError:
        raise changed from None
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != found.file.size:
            raise changed
        left = found.file.size
        while left:
            piece = file.read(min(_PIECE, left))
            if not piece:
                raise changed
            left -= len(piece)
            yield piece
