"""``tursi doctor``: what the facts mean, and that they are found."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tursi import store
from tursi.doctor import Facts, Finding, Level, collect, examine
from tursi.doctor.facts import Place, Port
from tursi.model import Folders

DIRECTORY, FILE, SOCKET = stat.S_IFDIR | 0o750, stat.S_IFREG | 0o600, stat.S_IFSOCK | 0o660


def place(what: str, mode: int = DIRECTORY, **fields: Any) -> Place:
    known: dict[str, Any] = {
        "exists": True, "mode": mode, "writable": True, "filesystem": "ext4", "free": 10**12,
    }  # fmt: skip
    return Place(what, Path("/srv") / what.replace(" ", "-"), **(known | fields))


WELL = Facts(
    system="Linux",
    python=(3, 11, 4),
    packages={"tursi": "0.1", "torch": "2.10.0+cpu", "transformers": "5.5", "kernels": None},
    sqlite="3.52.1",
    uid=1000,
    umask=0o027,
    now=1_800_000_000.0,
    configuration=place("configuration", FILE),
    configuration_problem=None,
    token=place("token file", FILE),
    places=(place("state folder"), place("cache folder"), place("database", FILE)),
    socket=place("control socket", SOCKET),
    ports=(Port("tcp:8430:interface=127.0.0.1", "127.0.0.1", 8430, taken=False),),
    holder=None,
    status={"version": "0.1", "pid": 7},
    unanswered=None,
    newest=1_799_999_000.0,
    database={"schema": 9, "size": 2**20, "problems": []},
    cgroup=None,
    landlock=7,
    seccomp=True,
    graphics=("NVIDIA",),
    nvidia_driver="570.86.10",
    devices=(("/dev/nvidia0", True), ("/dev/nvidia-uvm", True)),
    hub="",
    endpoint="https://huggingface.co",
)


def worse(facts: Facts) -> list[Finding]:
    return [each for each in examine(facts) if each.level is not Level.OK]


def test_where_all_is_well_nothing_is_advised() -> None:
    assert worse(WELL) == []
    assert len({each.name for each in examine(WELL)}) > 12


def folder(**fields: Any) -> dict[str, Any]:
    return {"places": (place("state folder", **fields),)}


@pytest.mark.parametrize(
    ("change", "level", "name", "words"),
    [
        ({"system": "Darwin"}, "problem", "system", "Linux"),
        ({"python": (3, 10, 1)}, "problem", "python", "3.11"),
        ({"packages": {**WELL.packages, "torch": "2.9.1"}}, "problem", "torch", ">=2.10"),
        ({"packages": {**WELL.packages, "transformers": None}}, "problem", "transformers", "pip"),
        ({"packages": {**WELL.packages, "transformers": "5.4.9"}}, "problem", "transformers", "5."),
        ({"packages": {**WELL.packages, "kernels": "0.9"}}, "warning", "kernels", "uninstall"),
        ({"packages": {**WELL.packages, "tursi": "0.2"}}, "warning", "daemon", "Restart"),
        ({"sqlite": "3.40.1"}, "note", "sqlite", "3.51.3"),
        ({"configuration_problem": "x: bad"}, "problem", "configuration", "x: bad"),
        (
            {"configuration": place("c", stat.S_IFREG | 0o666)},
            "problem", "configuration", "chmod go-w",
        ),
        ({"token": place("t", stat.S_IFREG | 0o644)}, "problem", "hub token", "chmod 600"),
        ({"token": place("t", exists=False)}, "problem", "hub token", "token_file"),
        ({**folder(writable=False), "status": None}, "problem", "state folder", "chown"),
        (folder(mode=stat.S_IFDIR | 0o777), "problem", "state folder", "chmod o-w"),
        (folder(filesystem="nfs4"), "problem", "state folder", "local disk"),
        (folder(free=10**6), "problem", "state folder", "Free some space"),
        (
            {"places": (place("database", stat.S_IFREG | 0o644),)},
            "warning", "database", "chmod 600",
        ),
        ({"places": (place("cache folder", free=5 * 2**30),)}, "note", "cache folder", "--cache"),
        ({"database": {"error": "It can't be read."}}, "problem", "integrity", "be read"),
        (
            {"database": {"schema": 9, "size": 1, "problems": ["row 3 is missing"]}},
            "problem", "integrity", "row 3",
        ),
        (
            {"database": {"schema": 8, "size": 1, "problems": [], "waiting": 1}},
            "note", "integrity", "1 upgrade to come",
        ),
        (
            {"database": {"schema": 9, "size": 2**31, "problems": []}},
            "note", "integrity", "large",
        ),
        ({"umask": 0}, "warning", "umask", "027"),
        ({"status": None, "holder": 77}, "problem", "daemon", "77"),
        ({"status": None, "socket": place("s", exists=False)}, "note", "daemon", "twistd"),
        ({"socket": place("s", FILE)}, "problem", "control socket", "no socket"),
        ({"socket": place("s", stat.S_IFSOCK | 0o666)}, "problem", "control socket", "everybody"),
        ({"socket": place("s" * 120, exists=False)}, "problem", "control socket", "107"),
        (
            {"ports": (Port("tcp:80", "0.0.0.0", 80, taken=True, owner="nginx (pid 3)"),)},
            "problem", "port", "nginx",
        ),
        ({"orphans": ((5, "python"),)}, "problem", "orphans", "python 5"),
        ({"newest": WELL.now + 7200}, "warning", "clock", "2.0 h"),
        ({"now": 100.0, "newest": None}, "problem", "clock", "Set it"),
        ({"cgroup": "no"}, "note", "cgroups", "Delegate"),
        ({"landlock": None}, "warning", "landlock", "5.13"),
        ({"landlock": 2}, "note", "landlock", "6.7"),
        ({"seccomp": False}, "warning", "seccomp", "seccomp"),
        ({"nvidia_driver": None, "devices": ()}, "problem", "gpu", "no driver"),
        ({"devices": (("/dev/nvidia0", False),)}, "problem", "gpu", "groups video"),
        ({"devices": ()}, "problem", "gpu", "nvidia-modprobe"),
        ({"hub": "refused"}, "problem", "hub", "refused"),
    ],
)  # fmt: skip
def test_each_trouble_has_its_advice(
    change: dict[str, Any], level: str, name: str, words: str
) -> None:
    found = [each for each in worse(replace(WELL, **change)) if each.name == name]
    assert [each.level for each in found] == [level]
    assert found[0].advice
    assert "\n" not in found[0].advice
    assert words in f"{found[0].message} {found[0].advice}"


def test_a_stale_socket_is_nothing_to_worry_about() -> None:
    found = {each.name: each for each in worse(replace(WELL, status=None))}
    assert found["control socket"].level is Level.NOTE


def test_the_level_that_a_daemon_tells_counts() -> None:
    status = {**(WELL.status or {}), "containment": {"because": "told by the daemon"}}
    [found] = worse(replace(WELL, status=status))
    assert "told by the daemon" in found.message


# -- facts ----------------------------------------------------------------------------


def folders(tmp_path: Path) -> Folders:
    return Folders(
        state=tmp_path / "state",
        runtime=tmp_path / "run",
        cache=tmp_path / "cache",
        configuration=tmp_path / "tursi.toml",
    )


def test_facts_of_an_empty_machine_change_nothing(tmp_path: Path) -> None:
    facts = collect(folders(tmp_path), status=None, unanswered="nobody")
    assert facts.python == sys.version_info[:3]
    assert facts.packages["transformers"]
    assert facts.sqlite.count(".") == 2
    assert facts.holder is None
    assert not facts.places[0].exists
    assert facts.places[0].free
    assert facts.places[0].filesystem
    assert [*tmp_path.iterdir()] == []


def test_facts_of_a_machine_in_trouble(tmp_path: Path) -> None:
    places = folders(tmp_path)
    places.state.mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        places.configuration.write_text(
            f'[[http.listeners]]\nendpoint = "tcp:{port}:interface=127.0.0.1"\n'
            'roles = ["inference"]\n[hub]\ntoken_file = "/nonexistent"\n'
        )
        orphan = subprocess.Popen(
            [sys.executable, "-c", "input()"],
            stdin=subprocess.PIPE,
            env={**os.environ, "TURSI_STATE": str(places.state), "TURSI_WORKER": "uuid"},
        )
        with orphan:
            deadline = time.monotonic() + 30
            facts = collect(places, status=None, unanswered=None)
            # The environment is there once the program is.
            while not facts.orphans and time.monotonic() < deadline:
                facts = collect(places, status=None, unanswered=None)
            orphan.kill()
    assert [pid for pid, _ in facts.orphans] == [orphan.pid]
    assert [(each.port, each.taken) for each in facts.ports] == [(port, True)]
    assert facts.token is not None
    assert not facts.token.exists
    names = {each.name for each in examine(facts) if each.level is Level.PROBLEM}
    assert {"port", "orphans", "hub token"} <= names


def test_a_configuration_that_is_wrong_is_a_finding(tmp_path: Path) -> None:
    places = folders(tmp_path)
    places.configuration.write_text("[http]\nnonsense = 1\n")
    facts = collect(places, status=None, unanswered=None)
    assert "nonsense" in str(facts.configuration_problem)


def test_the_command_without_a_daemon(tmp_path: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "TURSI_STATE_DIR": str(tmp_path / "state"),
        "TURSI_RUNTIME_DIR": str(tmp_path / "run"),
        "TURSI_CACHE_DIR": str(tmp_path / "cache"),
        "TURSI_CONFIG": str(tmp_path / "tursi.toml"),
    }
    command = [sys.executable, "-c", "from tursi.cli import main; main(prog_name='tursi')"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "doctor", *arguments],
            env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    (tmp_path / "tursi.toml").write_text("nonsense = 1\n")
    shown = run()
    assert shown.returncode == 1, shown.stderr
    assert "FAIL  configuration" in shown.stdout
    assert "> Correct the file" in shown.stdout
    found = json.loads(run("--json").stdout)
    assert found["problems"] >= 1
    levels = {each["name"]: each["level"] for each in found["findings"]}
    assert levels["configuration"] == "problem"
    assert levels["daemon"] == "note"
    assert "integrity" not in levels
    database = tmp_path / "state" / "tursi.sqlite"
    database.parent.mkdir()
    store.prepare(database)
    content = database.read_bytes()

    def integrity() -> tuple[str, str]:
        [one] = [
            each for each in json.loads(run("--json").stdout)["findings"]
            if each["name"] == "integrity"
        ]  # fmt: skip
        return one["level"], one["message"]

    assert integrity()[0] == "ok"
    with closing(sqlite3.connect(database)) as file:
        file.execute(f"PRAGMA user_version = {store.NEWEST - 2}")
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert integrity()[0] == "note"
    assert "2 upgrades to come" in integrity()[1]
    damaged = bytearray(content)
    damaged[4096 * 3 : 4096 * 4] = b"\xa5" * 4096
    database.write_bytes(damaged)
    assert integrity()[0] == "problem"
    # It was read, and nothing else.
    assert database.read_bytes() == damaged
    assert [each.name for each in database.parent.iterdir()] == ["tursi.sqlite"]
