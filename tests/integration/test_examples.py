"""The README's examples, as they stand there, against a real daemon and model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon import Daemon, daemon
from minilm import minilm_folder
from stand_in_hub import StandInHub

README = Path(__file__).parent.parent.parent / "README.rst"
_EXAMPLE = re.compile(
    r"^\.\. code-block:: (?:bash|python)\n   :name: example-(?P<name>\w+)\n\n"
    r"(?P<code>(?:   .*\n|\n)+)",
    re.MULTILINE,
)


def examples() -> dict[str, str]:
    """The named examples, without their indent."""
    return {
        found["name"]: re.sub(r"^   ", "", found["code"], flags=re.MULTILINE)
        for found in _EXAMPLE.finditer(README.read_text())
    }


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, dict[str, str]]]:
    with StandInHub() as hub, daemon() as one:
        hub.add("sentence-transformers/all-MiniLM-L6-v2", minilm_folder())
        one.stop()
        one.start(hub.environment(tmp_path_factory.mktemp("home")))
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TURSI_SOCKET": str(one.runtime / "control.sock"),
        }
        # huggingface_hub refuses every address when this is set.
        environment.pop("HF_HUB_OFFLINE", None)
        yield one, environment


def run(
    running: tuple[Daemon, dict[str, str]], program: list[str], code: str
) -> subprocess.CompletedProcess[str]:
    one, environment = running
    # The tests' daemon has a port of its own; nothing else is changed.
    code = code.replace(":8430", f":{one.port}")
    ended = subprocess.run(
        program,
        input=code,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert ended.returncode == 0, ended
    return ended


def test_the_command_line(running: tuple[Daemon, dict[str, str]]) -> None:
    said = run(running, ["bash", "-e"], examples()["cli"]).stdout
    assert "all-MiniLM-L6-v2 is ready" in said
    assert "COSINE" in said


@pytest.mark.parametrize("name", ["curl", "control"])
def test_curl(running: tuple[Daemon, dict[str, str]], name: str) -> None:
    running[0].deploy("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2")
    running[0].wait("all-MiniLM-L6-v2")
    assert run(running, ["bash", "-e"], examples()[name]).stdout


@pytest.mark.parametrize("name", ["openai", "huggingface"])
def test_python(running: tuple[Daemon, dict[str, str]], name: str) -> None:
    running[0].deploy("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2")
    running[0].wait("all-MiniLM-L6-v2")
    assert run(running, [sys.executable, "-"], examples()[name]).stdout
