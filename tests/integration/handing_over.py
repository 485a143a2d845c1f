"""Start a program as systemd would: with listening sockets from descriptor 3 on.

``handing_over.py NAME=DESCRIPTOR,... COMMAND...``
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    pairs = [pair.split("=") for pair in sys.argv[1].split(",")]
    for number, (_, descriptor) in enumerate(pairs, 3):
        # What comes here is above them all.
        os.dup2(int(descriptor), number, inheritable=True)
    os.environ.update(
        LISTEN_PID=str(os.getpid()),
        LISTEN_FDS=str(len(pairs)),
        LISTEN_FDNAMES=":".join(name for name, _ in pairs),
    )
    os.closerange(3 + len(pairs), 256)
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
