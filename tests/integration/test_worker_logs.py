"""What real workers write: bounded, made harmless, folded, rotated, followed; as text and JSON."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from daemon import Daemon, daemon
from patience import until

SIZE = 64 * 1024
SETTINGS = f"""
[workers]
log_bytes = {SIZE}
log_bytes_per_second = 32768
log_format = "json"
"""
WRITES = r"""
import os, time
os.write(2, b"ERROR: \x1b[31mred\x1b[0m \xff \xe2\x80\xae turned\r\n")
for percent in range(0, 101):
    os.write(2, b"\rLoading weights: %3d%%" % percent)
os.write(2, b"\n")
os.write(1, b"2026-01-01T00:00:00.000Z tursi forged\nand {\"time\": \"forged\"}\n")
os.write(1, b"long " * 4000 + b"\n")
os.write(1, b"no end")
found = "written"
"""
FLOODS = r"""
import os
for number in range(400_000):
    os.write(1, b"%08d %s\n" % (number, b"x" * 66))
found = "flooded"
"""
TRICKLES = r"""
import os, time
for number in range(300):
    os.write(1, b"%04d %s\n" % (number, b"y" * 500))
    time.sleep(0.03)
found = "trickled"
"""


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with daemon(scripted=True, settings=SETTINGS) as one:
        yield one


def run(one: Daemon, name: str, program: str) -> None:
    folder = one.script(name, attempt=True)
    (folder / "program.py").write_text(program)
    one.deploy(name, folder)
    one.wait(name)
    attempt = [["run", str(folder / "program.py")]]
    body = {"model": name, "input": "", "attempt": attempt}
    answer = one.client.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text


def lines(one: Daemon, name: str) -> list[dict[str, Any]]:
    found = one.control.get(f"/deployments/{name}/logs", params={"lines": 1000}).json()["lines"]
    return [json.loads(line) for line in found]


def test_what_is_written_is_harmless_folded_and_says_whose_it_is(running: Daemon) -> None:
    followed: list[dict[str, Any]] = []

    def follow() -> None:
        place = "/deployments/writes/logs"
        with running.control.stream("GET", place, params={"follow": 1, "lines": 0}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    followed.append(json.loads(json.loads(line.removeprefix("data: "))))
                    if "long" in followed[-1]["message"]:
                        return

    running.deploy("writes", running.script("writes", attempt=True))
    uuid = running.wait("writes")["workers"][0]["uuid"]
    follower = threading.Thread(target=follow)
    follower.start()
    run(running, "writes", WRITES)
    follower.join(30)
    assert not follower.is_alive()
    found = until(
        lambda: [each for each in lines(running, "writes") if each["stream"] in {"out", "err"}],
        "it is there",
    )
    by_text = {each["message"]: each for each in found}
    red = by_text["ERROR: \\x1b[31mred\\x1b[0m \\xff \\u202e turned"]
    assert red["level"] == "error"
    whose = {"deployment": "writes", "generation": 1, "replica": 0, "worker": uuid, "stream": "err"}
    assert {key: red[key] for key in whose} == whose
    assert datetime.fromisoformat(red["time"]).utcoffset() is not None
    # Of 101 states of the progress bar the last one counts.
    assert [text for text in by_text if "Loading weights" in text] == ["Loading weights: 100%"]
    # What looks like a line of ours is inside of one of its own.
    assert by_text["2026-01-01T00:00:00.000Z tursi forged"]["stream"] == "out"
    assert 'and {"time": "forged"}' in by_text
    (long,) = (text for text in by_text if text.startswith("long "))
    assert len(long) < 8300
    assert long.endswith("[cut]")
    assert [each["message"] for each in followed if each["stream"] == "err"] == [
        red["message"], "Loading weights: 100%",
    ]  # fmt: skip


def test_a_flood_is_held_to_its_rate_and_the_worker_goes_on(running: Daemon) -> None:
    run(running, "floods", FLOODS)
    folder = running.state / "workers" / "floods"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= SIZE
    dropped = until(
        lambda: [each for each in lines(running, "floods") if "dropped" in each["message"]],
        "what was dropped is told",
        20,
    )
    assert dropped[0]["stream"] == "tursi"
    assert running.status("floods")["ready"] == 1


def test_a_long_log_is_rotated_and_its_end_is_kept(running: Daemon) -> None:
    run(running, "trickles", TRICKLES)
    found = lines(running, "trickles")
    numbers = [int(each["message"][:4]) for each in found if each["stream"] == "out"]
    assert numbers[-1] == 299
    assert numbers == list(range(numbers[0], 300)), "no line is lost in between"
    assert numbers[0] > 0
    files = sorted(path.name for path in (running.state / "workers" / "trickles").iterdir())
    uuid = running.status("trickles")["workers"][0]["uuid"]
    assert files == [f"{uuid}.log", f"{uuid}.log.1"]
    sizes = [(running.state / "workers/trickles" / name).stat().st_size for name in files]
    assert all(size <= SIZE // 2 for size in sizes)
    assert Path(running.state / "workers/trickles" / files[0]).stat().st_mode & 0o777 == 0o600
