"""Groups against a folder that behaves like cgroup v2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tursi.model import Limits
from tursi.supervision import cgroup
from tursi.supervision.cgroup import Groups, Leaf, NotDelegated

PID = 4711


class Kernel(type(Path())):  # type: ignore[misc] # the class of this system's paths
    """Paths in a cgroup file system: its folders come with their files and go with them."""

    controllers = "cpuset cpu io memory pids"
    busy = False
    """Whether a group can't be removed just yet."""

    def mkdir(self, *args: Any, **kwargs: Any) -> None:
        super().mkdir(*args, **kwargs)
        for name in (
            "cgroup.procs", "cgroup.subtree_control", "cgroup.kill",
            "memory.max", "memory.swap.max", "memory.oom.group", "memory.peak",
            "pids.max", "cpu.max",
        ):  # fmt: skip
            (self / name).touch()
        (self / "cgroup.controllers").write_text(self.controllers)
        (self / "cgroup.events").write_text("populated 0\nfrozen 0\n")
        (self / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 1\noom_kill 0\n")

    def rmdir(self) -> None:
        if Kernel.busy:
            raise OSError(16, "Device or resource busy")
        for file in self.iterdir():
            if file.is_file():
                file.unlink()
        super().rmdir()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Kernel, "busy", False)
    one = Kernel(tmp_path / "cgroup")
    one.mkdir()
    return one


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(
        "1:name=systemd:/x\n0::/system.slice/tursi.service\n"
    )
    return tmp_path / "proc"


@pytest.fixture
def base(root: Path) -> Path:
    (root / "system.slice").mkdir()
    (root / "system.slice" / "tursi.service").mkdir()
    return root / "system.slice" / "tursi.service"


def join(root: Path, proc: Path, *, delegated: bool = True) -> Groups:
    return cgroup.join(root, proc, delegated=lambda _: delegated, pid=PID)


def test_the_daemon_moves_below_its_group_and_controls_the_others(
    root: Path, base: Path, proc: Path
) -> None:
    groups = join(root, proc)
    assert groups.base == base
    assert groups.controllers == {"cpu", "memory", "pids"}
    assert (base / "daemon/cgroup.procs").read_text() == str(PID)
    assert (base / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"


def test_started_again_in_the_daemons_own_group(root: Path, base: Path, proc: Path) -> None:
    join(root, proc)
    (base / "cgroup.subtree_control").write_text("cpu memory pids")
    (proc / "self/cgroup").write_text("0::/system.slice/tursi.service/daemon\n")
    assert join(root, proc, delegated=False).base == base


def test_a_namespace_of_our_own_needs_nobodys_leave(root: Path, proc: Path) -> None:
    (proc / "self/cgroup").write_text("0::/\n")
    assert join(root, proc, delegated=False).base == root


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("version 1", "version 2 isn't mounted"),
        ("no group", "we are in no group"),
        ("not ours", "isn't delegated to us"),
        ("no memory", "memory isn't among"),
        ("gone", "can't be read"),
        ("others there", "can't be divided: Device or resource busy"),
    ],
)
def test_what_is_not_delegated(
    root: Path,
    base: Path,
    proc: Path,
    what: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    match what:
        case "version 1":
            (root / "cgroup.controllers").unlink()
        case "no group":
            (proc / "self/cgroup").write_text("4:memory:/process\n")
        case "no memory":
            (base / "cgroup.controllers").write_text("cpu pids")
        case "gone":
            (base / "cgroup.controllers").unlink()
        case "others there":
            write = cgroup._write

            def refuse(file: Path, text: str) -> None:
                if file.name == "cgroup.subtree_control":
                    raise OSError(16, "Device or resource busy")
                write(file, text)

            monkeypatch.setattr(cgroup, "_write", refuse)
    with pytest.raises(NotDelegated, match=reason):
        join(root, proc, delegated=what != "not ours")
    # Nothing has changed.
    assert not (base / "daemon").exists()
    assert (base / "cgroup.subtree_control").read_text() == ""


def test_a_life_has_its_limits(base: Path) -> None:
    groups = Groups(base, frozenset({"cpu", "memory", "pids"}))
    leaf = groups.create("abc", Limits(memory=2**30, cpu=1.5, processes=40))
    assert leaf.folder == base / "worker-abc"
    settings = {
        name: (leaf.folder / name).read_text()
        for name in (
            "memory.max", "memory.swap.max", "memory.oom.group", "pids.max", "cpu.max"
        )
    }  # fmt: skip
    assert settings == {
        "memory.max": "1073741824",
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": "40",
        "cpu.max": "150000 100000",
    }


def test_without_limits_there_is_still_one_of_processes(base: Path) -> None:
    leaf = Groups(base, frozenset({"memory", "pids"})).create("abc", Limits(cpu=2.0))
    assert (leaf.folder / "pids.max").read_text() == str(cgroup.PROCESSES)
    assert (leaf.folder / "memory.max").read_text() == ""
    assert (leaf.folder / "cpu.max").read_text() == "", "cpu isn't among the controllers"


def test_a_kernel_that_cannot_swap(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Kernel.mkdir

    def mkdir(self: Kernel, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        (self / "memory.swap.max").unlink()

    monkeypatch.setattr(Kernel, "mkdir", mkdir)
    leaf = Groups(base, frozenset({"memory"})).create("abc", Limits(memory=2**30))
    assert (leaf.folder / "memory.max").read_text() == str(2**30)


def test_a_group_that_cannot_be_made_leaves_nothing(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Path, _: str) -> None:
        raise OSError(22, f"Invalid argument: {file}")

    monkeypatch.setattr(cgroup, "_write", refuse)
    with pytest.raises(OSError, match="Invalid"):
        Groups(base, frozenset({"memory"})).create("abc", Limits(memory=2**30))
    assert not (base / "worker-abc").exists()


def test_the_kernels_counts(base: Path) -> None:
    leaf = Groups(base, frozenset({"memory"})).create("abc", Limits(memory=2**30))
    assert leaf.kills() == 0
    assert leaf.peak() is None
    (leaf.folder / "memory.events").write_text("oom 2\noom_kill 3\noom_group_kill 1\n")
    (leaf.folder / "memory.peak").write_text("1073741824\n")
    assert leaf.kills() == 3
    assert leaf.peak() == 2**30
    leaf.folder.rmdir()
    assert leaf.kills() == 0


def test_what_is_still_populated_is_killed_and_what_stays_is_tried_again(base: Path) -> None:
    groups = Groups(base, frozenset({"memory"}))
    first, second = (groups.create(name, Limits()) for name in ("a", "b"))
    (first.folder / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    Kernel.busy = True
    groups.remove(first)
    assert (first.folder / "cgroup.kill").read_text() == "1"
    Kernel.busy = False
    groups.remove(second)
    assert not first.folder.exists()
    assert not second.folder.exists()


def test_what_an_earlier_daemon_left_is_swept(base: Path) -> None:
    (base / "worker-old").mkdir()
    (base / "daemon").mkdir()
    Groups(base, frozenset({"memory"})).sweep()
    assert not (base / "worker-old").exists()
    assert (base / "daemon").exists()
    assert Leaf(base / "worker-old").remove(), "gone is gone"


def test_by_what_delegation_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 0)
    told: dict[str, bytes] = {}

    def getxattr(_: Path, name: str) -> bytes:
        if name not in told:
            raise OSError(61, "No data available")
        return told[name]

    monkeypatch.setattr(os, "getxattr", getxattr)
    assert not cgroup.is_delegated(tmp_path)
    told["trusted.delegate"] = b"1"
    assert cgroup.is_delegated(tmp_path)
    told.clear()
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid or 1)
    owned = tmp_path.stat().st_uid != 0
    assert cgroup.is_delegated(tmp_path) is owned
