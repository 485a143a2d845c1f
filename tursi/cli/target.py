"""A new file of the user's, which has its name only once all of it is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tursi.cli.connection import Exit, Failure


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Write to it; it appears at ``path`` when the context ends well, never over another."""
    if os.path.lexists(path):
        raise Failure(f"{path} exists already; name another file.", Exit.USAGE)
    part = path.with_name(f"{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(part, flags, 0o600), "wb") as target:
            try:
                yield target
                target.flush()
                os.fsync(target.fileno())
                if not _is_at(part, target):
                    raise Failure(f"Another command has begun to write {path}; this one gives up.")
                _call(part, path)
            finally:
                if _is_at(part, target):
                    part.unlink()
    except OSError as error:
        raise Failure(f"{path} can't be written: {error.strerror}.") from None


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Whether it is still ``file`` that is there."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _call(part: Path, path: Path) -> None:
    """Give it its name, but never over a file that has come meanwhile."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:
        # The file systems of USB sticks have no links.
        if os.path.lexists(path):
            raise
        part.rename(path)
