"""twistd with a wall clock that can be set wrong.

It goes wrong by as many seconds as the file says that TURSI_TEST_CLOCK names
(``set_clock`` writes it). A real clock can't be set without harm to others.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

_SHIFT = struct.Struct("<d")


def set_clock(path: Path, seconds: float) -> None:
    """Have the wall clock of the daemon with that file be wrong by ``seconds``."""
    # In place: the daemon has mapped this very file.
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(_SHIFT.pack(seconds))


def main() -> None:
    real = time.time
    with Path(os.environ["TURSI_TEST_CLOCK"]).open("rb") as file:
        shift = mmap.mmap(file.fileno(), _SHIFT.size, access=mmap.ACCESS_READ)
    # Before anything is imported that might take the right one.
    time.time = lambda: real() + _SHIFT.unpack_from(shift)[0]
    from twisted.scripts.twistd import run

    run()


if __name__ == "__main__":
    main()
