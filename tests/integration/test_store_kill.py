"""No acknowledged change is lost, whenever the daemon is killed."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tursi.store import prepare

WRITER = Path(__file__).with_name("store_writer.py")
ROUNDS = 20


def acknowledged(path: Path, chance: random.Random) -> list[str]:
    """What a writer, killed at a random instant, has said is stored."""
    with subprocess.Popen([sys.executable, WRITER, path], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        lines: list[bytes] = []
        if chance.random() < 0.7:
            # Amid the writing, rather than wherever it may have come to.
            lines.append(writer.stdout.readline())
            time.sleep(chance.uniform(0, 0.08))
        else:
            time.sleep(chance.uniform(0, 0.8))
        writer.kill()
        lines.extend(writer.stdout)
    assert writer.returncode == -signal.SIGKILL
    return [line.decode().strip() for line in lines]


def test_killed_at_random_instants(tmp_path: Path) -> None:
    path = tmp_path / "tursi.sqlite"
    chance = random.Random(2)
    events: dict[int, str] = {}
    generations: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for _ in range(ROUNDS):
        for line in acknowledged(path, chance):
            kind, key, value = line.split()
            if kind == "event":
                events[int(key)] = value
            elif kind == "generation":
                assert int(value) > generations[key]
                generations[key] = int(value)
            else:
                counts[key] += 1
        prepare(path)
        file = sqlite3.connect(path)
        assert file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert file.execute("PRAGMA foreign_key_check").fetchall() == []
        stored = dict(file.execute("SELECT id, message FROM events").fetchall())
        assert events.items() <= stored.items()
        for name, number in generations.items():
            (found,) = file.execute(
                "SELECT count(*) FROM generations WHERE deployment = ?", (name,)
            ).fetchone()
            # One more may have been stored and not yet been said, per kill.
            assert number <= found <= number + ROUNDS
        for name, count in counts.items():
            (found,) = file.execute(
                "SELECT sum(requests) FROM statistics WHERE deployment = ?", (name,)
            ).fetchone()
            assert count <= found <= count + ROUNDS
        file.close()
    # Otherwise nothing was tested.
    assert len(events) > ROUNDS
