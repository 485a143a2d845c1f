"""A short chaos run; ``make chaos`` is the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parents[1] / "chaos" / "run.py"


def test_a_few_seconds_of_chaos_break_no_promise() -> None:
    ended = subprocess.run(
        [sys.executable, str(RUN), "--seconds", "8", "--pause", "0.6", "--seed", "3"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "\n0 violations" in ended.stdout
    assert "1 x kill -9 of the daemon" in ended.stdout, ended.stdout
