"""``python -I -m tursi.hook JSON PROGRAM ARGUMENT...``: becomes PROGRAM, with JSON on its stdin.

So a hook needs nobody who writes to it, and can't hold anybody up by not reading.
Standard library only.
"""

from __future__ import annotations

import os
import sys


def main(arguments: list[str]) -> int:
    """Never comes back, unless the program can't be run."""
    text, *command = arguments
    content = os.memfd_create("event")
    os.write(content, text.encode() + b"\n")
    os.lseek(content, 0, os.SEEK_SET)
    os.dup2(content, 0)
    # The data socket of a worker, which a hook isn't.
    os.close(3)
    try:
        os.execvp(command[0], command)  # noqa: S606 - no shell, and that is the point
    except OSError as error:
        sys.stderr.write(f"{command[0]} can't be run: {error.strerror}\n")
    return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
