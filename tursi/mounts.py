"""What file systems there are, by the kernel's list of mounts."""

from __future__ import annotations

import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
_OCTAL = re.compile(r"\\([0-7]{3})")


def file_system(mounts: str, folder: Path) -> str:
    """The type of the file system that holds ``folder``, by the text of a ``mountinfo``.

    Empty where that can't be told; ``folder`` is absolute and without links.
    """
    found, depth = "", -1
    for line in mounts.splitlines():
        before, separator, after = line.partition(" - ")
        fields = before.split(" ")
        if not separator or len(fields) < 5:
            continue
        point = Path(_OCTAL.sub(lambda code: chr(int(code[1], 8)), fields[4]))
        # The last one mounted on a place hides the others.
        if folder.is_relative_to(point) and len(point.parts) >= depth:
            found, depth = after.split(" ")[0], len(point.parts)
    return found
