"""The commands of docs/deployments.rst, in their order, against a daemon and a hub."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from daemon import daemon
from patience import until
from stand_in_hub import StandInHub

DOCUMENT = Path(__file__).parents[2] / "docs" / "deployments.rst"
_BLOCK = re.compile(r"^\.\. code-block:: (?P<kind>\w+)\n\n(?P<code>(?:   .*\n|\n)+)", re.MULTILINE)


def blocks(kind: str) -> list[str]:
    """The blocks of a kind, without their indent."""
    return [
        re.sub(r"^   ", "", found["code"], flags=re.MULTILINE)
        for found in _BLOCK.finditer(DOCUMENT.read_text())
        if found["kind"] == kind
    ]


def test_the_commands_do_what_they_are_said_to(tmp_path: Path) -> None:
    with StandInHub() as hub, daemon(scripted=True) as one:
        for name in ("L6", "L12"):
            hub.add(f"sentence-transformers/all-MiniLM-{name}-v2", one.script(name))
        one.stop()
        one.start(hub.environment(tmp_path / "home"))
        [file] = [each for each in blocks("text") if "[deployments." in each]
        (one.folder / "deployments.toml").write_text(file)
        (one.folder / "models").mkdir()
        one.script("sentiment").rename(one.folder / "models" / "sentiment")
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TURSI_SOCKET": str(one.runtime / "control.sock"),
        }

        def run(code: str) -> str:
            ended = subprocess.run(
                ["bash", "-e"],
                input=code,
                env=environment,
                cwd=one.folder,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert ended.returncode == 0, ended
            return ended.stdout

        history, canary, replicas, apply, *more = blocks("bash")
        assert more == []
        said = run(history)
        assert "going back to sentence-transformers/all-MiniLM-L6-v2, as generation 3" in said
        said = run(canary)
        assert "search: generation 4 gets 50 % of the requests." in said
        assert "search: generation 4 takes over." in said
        assert one.status("search")["model"] == "sentence-transformers/all-MiniLM-L12-v2"
        run(replicas)
        assert one.status("search")["max_replicas"] == 4
        said = run(apply)
        assert "create sentiment" in said
        assert said.endswith("Done.\n")
        status = one.status("search")
        assert (status["min_replicas"], status["max_replicas"]) == (1, 4)
        until(lambda: one.status("sentiment")["load"] == "on_demand", "it is as the file says")
