"""No acknowledged change is lost, whenever the daemon is killed."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

from tursi.rollup import Period, Record, Rollup, StatisticsQuery
from tursi.sketch import Sketch
from tursi.store import connection, prepare, statistics
from tursi.store.schema import UPGRADES

WRITER = Path(__file__).with_name("store_writer.py")
ROUNDS = int(os.environ.get("TURSI_KILLS", "60"))


def acknowledged(writer: subprocess.Popen[str], chance: random.Random) -> list[str]:
    """What a writer, killed at a random instant, has said is stored."""
    assert writer.stdin is not None
    assert writer.stdout is not None
    writer.stdin.write("\n")
    writer.stdin.flush()
    pid = int(writer.stdout.readline().removeprefix("pid "))
    lines: list[str] = []
    if chance.random() < 0.8:
        # Amid the writing, rather than wherever it may have come to.
        lines.append(writer.stdout.readline().strip())
        time.sleep(chance.uniform(0, 0.04))
    else:
        time.sleep(chance.uniform(0, 0.15))
    os.kill(pid, signal.SIGKILL)
    lines.extend(line.strip() for line in iter(writer.stdout.readline, "end\n"))
    return lines


def test_killed_at_random_instants(tmp_path: Path) -> None:
    path = tmp_path / "tursi.sqlite"
    chance = random.Random(2)
    events: dict[int, str] = {}
    generations: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    writer = subprocess.Popen(
        [sys.executable, WRITER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    for _ in range(ROUNDS):
        for line in acknowledged(writer, chance):
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
        whole: dict[str, int] = {}
        for name, count in counts.items():
            for span in Period:
                rows = file.execute(
                    "SELECT requests, latency FROM rollups WHERE deployment = ? AND span IN (0, ?)",
                    (name, span.value),
                ).fetchall()
                found = sum(requests for requests, _ in rows)
                assert count <= found <= count + ROUNDS
                # Rolled up or not yet: nothing twice, nothing lost, in no period.
                assert found == whole.setdefault(name, found)
                assert found == sum(Sketch.decode(latency).count for _, latency in rows)
        file.close()
    writer.communicate(timeout=30)
    assert writer.returncode == 0
    # Otherwise nothing was tested.
    assert len(events) > ROUNDS


def test_an_upgrade_killed_at_each_statement_is_done_or_not(tmp_path: Path) -> None:
    killer = Path(__file__).with_name("upgrade_killer.py")
    ran = subprocess.run(
        [sys.executable, killer, tmp_path / "tursi.sqlite"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    kills = [json.loads(line) for line in ran.stdout.splitlines()]
    newest = len(UPGRADES) + 1
    for kill in kills:
        assert kill["whole"], kill
        assert kill["done"], kill
    for before in range(newest):
        seen = [kill["after"] for kill in kills if kill["before"] == before]
        # Never back again, and no version left out.
        assert seen == sorted(seen)
        assert set(seen) == set(range(before, newest + 1))
    assert [kill for kill in kills if not kill["killed"] and kill["after"] != newest] == []


def test_a_rollup_killed_at_each_statement_counts_everything_once(tmp_path: Path) -> None:
    path = tmp_path / "tursi.sqlite"
    prepare(path)
    rows = [(start, name, number) for start in (0, 60, 7200) for name in "ab" for number in (1, 2)]
    with closing(sqlite3.connect(path, isolation_level=None)) as file:
        connection.for_writing(file)
        for start, name, number in rows:
            rollup = Rollup()
            rollup.count("", True, number / 10, 0.0, None, 1, 1, 1)
            statistics.add(file.cursor(), [Record(start, name, 0, rollup)])
    killer = Path(__file__).with_name("rollup_killer.py")
    for statement in itertools.count():
        status = subprocess.run(
            [sys.executable, killer, path, str(statement)], timeout=60, check=False
        ).returncode
        with closing(sqlite3.connect(path)) as file:
            for period in Period:
                query = StatisticsQuery(period, 0)
                total = statistics.summary(file.cursor(), query).total
                assert (total.requests, total.latency.count) == (len(rows), len(rows))
            fresh = file.execute("SELECT count(*) FROM rollups WHERE span = 0").fetchone()[0]
        assert (fresh == 0) == (status == 0)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert statement >= 8
