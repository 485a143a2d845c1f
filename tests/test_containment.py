from __future__ import annotations

import json
import sys
from pathlib import Path

from test_cgroup import Kernel

from tursi.model import Limits
from tursi.supervision.cgroup import Groups
from tursi.supervision.containment import Encloser, Enclosure
from tursi.supervision.life import FILES

WORKER = ("/usr/bin/python3", "-I", "-m", "tursi.inference")


def enclose(encloser: Encloser, limits: Limits = Limits(), **environment: str) -> Enclosure:  # noqa: B008
    return encloser.enclose(
        "abc", limits, model="/models/small", command=WORKER, environment=environment
    )


def test_where_the_kernel_offers_nothing(tmp_path: Path) -> None:
    encloser = Encloser(because="version 2 isn't mounted", temporary=tmp_path / "tmp")
    assert str(encloser.level) == (
        "rlimits and watch (version 2 isn't mounted), no Landlock, network not closed, "
        "no new privileges"
    )
    one = enclose(encloser, Limits(memory=2**30))
    assert not one.limits_memory
    assert one.killed_for_memory() is None
    assert one.peak() is None
    order = json.loads(one.confinement.order(1))
    assert (order["parent"], order["files"], order["group"]) == (1, FILES, "")
    assert (order["landlock"], order["deny_sockets"]) == (0, False)
    assert order["temporary"] == str(tmp_path / "tmp" / "abc")
    one.end()


def test_where_it_offers_all(tmp_path: Path) -> None:
    base = Kernel(tmp_path / "group")
    base.mkdir()
    encloser = Encloser(
        groups=Groups(base, frozenset({"memory", "pids"})),
        landlock=7,
        deny_sockets=True,
        temporary=tmp_path / "tmp",
    )
    assert str(encloser.level) == "cgroup v2, Landlock 7, no network, no new privileges"
    one = enclose(encloser, Limits(memory=2**30, files=99))
    assert one.limits_memory
    assert one.killed_for_memory() is False
    (base / "worker-abc/memory.events").write_text("oom_kill 1\n")
    (base / "worker-abc/memory.peak").write_text("12345\n")
    assert one.killed_for_memory() is True
    assert one.peak() == 12345
    confinement = one.confinement
    assert confinement.group == str(base / "worker-abc")
    assert (confinement.files, confinement.landlock, confinement.deny_sockets) == (99, 7, True)
    one.end()
    assert not (base / "worker-abc").exists()


def test_it_may_read_its_code_and_little_else() -> None:
    confinement = enclose(Encloser(landlock=7), LD_LIBRARY_PATH="/opt/cuda/lib::").confinement
    package = Path(__file__).parents[1] / "tursi"
    assert {sys.prefix, sys.base_prefix, str(package), WORKER[0], "/opt/cuda/lib"} <= set(
        confinement.read
    )
    assert confinement.listed == (str(package.parent),)
    assert not {"/", "/etc", "/proc", "/home", "/root", "/var", "/run", "", "/dev", "/sys"} & set(
        confinement.read
    )
    assert all(path.startswith("/dev/") for path in confinement.write)
    assert confinement.model == "/models/small"


def test_private_folders_that_were_left_are_swept(tmp_path: Path) -> None:
    (tmp_path / "tmp/old/deep").mkdir(parents=True)
    Encloser(temporary=tmp_path / "tmp").sweep()
    assert (tmp_path / "tmp").stat().st_mode & 0o777 == 0o700
    assert list((tmp_path / "tmp").iterdir()) == []
