"""What may be opened in a model's folder, and what a file is whatever its name says.

For the daemon, which looks at a folder first, and for the worker, which reads it.
Standard library only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tursi.errors import ModelRefused

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npz", ".npy")
"""Endings of files that a pickle may be in."""
START = 512
"""Bytes that tell what a file is."""
_MAX_FILES = 10_000
_BLOBS = "blobs"
_MAGIC = (
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"Rar!\x1a\x07", "a rar archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x93NUMPY", "a numpy file"),
    (b"\x7fELF", "a program"),
)
_TAR, _TAR_OFFSET = b"ustar", 257
_PROTOCOLS = (b"\x01", b"\x02", b"\x03", b"\x04", b"\x05")
# The first protocol has no mark of its own: it begins with a mark on the stack or a global.
_OLD_PICKLE = re.compile(rb"\((dp|lp|c|i)|c[A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n")


def files(folder: Path, depth: int) -> Iterator[tuple[str, int]]:
    """Names relative to ``folder`` and sizes of the files down to ``depth`` levels.

    Raises ``ModelRefused`` for a link that leads out of the folder: what comes with
    a model must not choose what else of this machine is read. A snapshot in the
    hub's cache is links to the blobs beside it, and those are fine.
    """
    root = Path(os.path.realpath(folder))
    blobs = root.parent.parent / _BLOBS if root.parent.name == "snapshots" else None
    left = _MAX_FILES
    waiting = [(root, "", depth)]
    while waiting:
        current, prefix, levels = waiting.pop()
        with os.scandir(current) as entries:
            for entry in islice(entries, left):
                left -= 1
                if entry.is_symlink():
                    _check_link(Path(entry.path), prefix + entry.name, root, blobs)
                if entry.is_file():
                    yield prefix + entry.name, entry.stat().st_size
                elif levels > 1 and entry.is_dir(follow_symlinks=False):
                    waiting.append((Path(entry.path), f"{prefix}{entry.name}/", levels - 1))


def _check_link(path: Path, name: str, root: Path, blobs: Path | None) -> None:
    target = Path(os.path.realpath(path))
    if target.is_relative_to(root) or (blobs is not None and target.parent == blobs):
        return
    raise ModelRefused(
        f"{name!r} is a link that leads out of the model's folder; put the file itself there."
    )


def disguise(start: bytes) -> str | None:
    """What content that begins so is, where it can carry code or hide what it carries.

    ``None`` for everything else: text, JSON, safetensors, protocol buffers.
    """
    for magic, name in _MAGIC:
        if start.startswith(magic):
            return name
    if start[_TAR_OFFSET : _TAR_OFFSET + len(_TAR)] == _TAR:
        return "a tar archive"
    # A length of safetensors may look like the mark of a pickle; its brace doesn't.
    marked = start[:1] == b"\x80" and start[1:2] in _PROTOCOLS and start[8:9] != b"{"
    if marked or _OLD_PICKLE.match(start):
        return "a pickle file"
    return None
