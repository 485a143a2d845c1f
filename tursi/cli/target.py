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
    if path.exists():
        raise Failure(f"{path} exists already; name another file.", Exit.USAGE)
    part = path.with_name(f"{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(part, flags, 0o600), "wb") as target:
            yield target
            target.flush()
            os.fsync(target.fileno())
        # Never over a file that has come meanwhile.
        os.link(part, path)
    except OSError as error:
        raise Failure(f"{path} can't be written: {error.strerror}.") from None
    finally:
        part.unlink(missing_ok=True)
