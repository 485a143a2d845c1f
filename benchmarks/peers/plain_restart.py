"""The least that restarting takes: wait for a child's end, sleep, start it again.

Run: ``python -I plain_restart.py RESTARTS COUNT SECONDS COMMAND...``. Keeps COUNT
copies of COMMAND running, each started again SECONDS after its end, as systemd
does with ``Restart=always`` and ``RestartSec=SECONDS``. Writes a line with the pid and the
monotonic time of each end to the file RESTARTS.
"""

from __future__ import annotations

import heapq
import os
import signal
import sys
import time
from pathlib import Path


def main(restarts: str, count: int, seconds: float, command: list[str]) -> None:
    ended = {signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, ended)
    due = [0.0] * count
    with Path(restarts).open("a", buffering=1) as file:
        while True:
            while due and due[0] <= time.monotonic():
                heapq.heappop(due)
                os.posix_spawn(command[0], command, os.environ, setsigmask=())
            left = max(due[0] - time.monotonic(), 0.0) if due else 3600.0
            signal.sigtimedwait(ended, left)
            while count > len(due) and (pid := os.waitpid(-1, os.WNOHANG)[0]):
                now = time.monotonic()
                heapq.heappush(due, now + seconds)
                file.write(f"{pid} {now}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
