"""Text files that others read while they are written."""

from __future__ import annotations

import os
from pathlib import Path


def replace(path: Path, text: str, mode: int, owner: tuple[int, int] | None = None) -> None:
    """Put ``text`` in the place of ``path`` in one step, with that mode whatever the umask is.

    Nobody reads half of it, and a link there is replaced, not followed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            os.fchmod(descriptor, mode)
            if owner is not None:
                os.fchown(descriptor, *owner)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
