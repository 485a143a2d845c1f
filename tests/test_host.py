"""How much memory there is for us, by the machine and by the control groups that we are in."""

from __future__ import annotations

from pathlib import Path

from tursi.host import available, memory

MIB = 2**20
GIB = 2**30


def machine(folder: Path, cgroup: str = "") -> tuple[Path, Path]:
    """A machine with 64 GiB, of which 40 are free."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/meminfo").write_text(
        f"MemTotal: {64 * MIB} kB\nMemFree: 1 kB\nMemAvailable: {40 * MIB} kB\n"
    )
    (folder / "proc/self/cgroup").write_text(cgroup)
    return folder / "proc", folder / "sys"


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"memory.{name}").write_text(f"{content}\n")


def test_a_machine_has_what_it_has(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "0::/user.slice\n")
    group(groups / "user.slice", max="max", current=GIB, stat="inactive_file 0")
    assert (memory(proc, groups), available(proc, groups)) == (64 * GIB, 40 * GIB)


def test_a_units_limit_holds_for_what_is_below_it(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "0::/system.slice/tursi.service/daemon\n")
    group(groups / "system.slice/tursi.service/daemon", max="max", current=1, stat="anon 1")
    group(
        groups / "system.slice/tursi.service",
        max=8 * GIB,
        current=5 * GIB,
        # Files that have been read are given up first.
        stat=f"anon {3 * GIB}\ninactive_file {2 * GIB}\nactive_file {MIB}",
    )
    assert (memory(proc, groups), available(proc, groups)) == (8 * GIB, 5 * GIB)


def test_a_container_sees_its_group_as_the_root(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "4:memory:/docker/abc\n1:name=systemd:/\n0::/\n")
    group(
        groups / "memory",
        limit_in_bytes=2 * GIB,
        usage_in_bytes=3 * GIB,
        stat="total_inactive_file 0",
    )
    assert (memory(proc, groups), available(proc, groups)) == (2 * GIB, 0)


def test_a_limit_beyond_the_machine_is_none(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "4:memory:/\n")
    group(
        groups / "memory",
        limit_in_bytes=9223372036854771712,
        usage_in_bytes=GIB,
        stat="total_inactive_file 0",
    )
    assert (memory(proc, groups), available(proc, groups)) == (64 * GIB, 40 * GIB)


def test_where_nothing_is_told_nothing_is_known(tmp_path: Path) -> None:
    assert (memory(tmp_path, tmp_path), available(tmp_path, tmp_path)) == (None, None)
