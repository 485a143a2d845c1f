"""Processes are found by what stands in their environment, but never the one that looks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LOOKS = """
import sys
from pathlib import Path
from tursi import mark
print([pid for pid, _ in mark.bearers(mark.of_state(Path(sys.argv[1])))])
"""


def test_who_looks_is_not_among_the_found(tmp_path: Path) -> None:
    # As when a hook, which has the mark itself, runs "tursi stop".
    environment = {**os.environ, "TURSI_STATE": str(tmp_path)}
    sleeps = [sys.executable, "-c", "print('up', flush=True); input()"]
    with subprocess.Popen(
        sleeps, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"up\n"
        done = subprocess.run(
            [sys.executable, "-c", LOOKS, str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        other.kill()
    assert done.stdout == f"[{other.pid}]\n"
