"""Deployments that go from one real daemon to another as archives."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from daemon import Daemon, daemon, free_port
from minilm import minilm_folder
from patience import gone, until
from self_signed import certificate
from small_disk import SmallDisk, may_mount
from stand_in_hub import StandInHub

DOCUMENT = Path(__file__).parents[2] / "docs/deployments.rst"
TURSI = str(Path(sys.executable).with_name("tursi"))
TAR = {"Content-Type": "application/x-tar"}
MIB = 1 << 20


def command(of: Daemon, *words: str) -> list[str]:
    return [TURSI, "--socket", str(of.runtime / "control.sock"), *words]


def tursi(of: Daemon, *words: str, status: int = 0) -> str:
    """What the command says; it must end with ``status``."""
    done = subprocess.run(
        command(of, *words), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == status, done
    return done.stdout + done.stderr


def commands() -> list[list[str]]:
    """Those that the documentation has."""
    block = DOCUMENT.read_text().partition(":name: example-archive")[2].split("\n\n")[1]
    return [line.split()[1:] for line in block.splitlines()]


def weights(size: int) -> bytes:
    """Passes for safetensors as far as a scripted worker is concerned."""
    return (2).to_bytes(8, "little") + b"{}" + os.urandom(MIB) * (size // MIB)


def put(of: Daemon, size: int, name: str = "big") -> Path:
    """Deploy a model of that size."""
    folder = of.script(name)
    (folder / "model.safetensors").write_bytes(weights(size))
    of.deploy(name, folder)
    of.wait(name)
    return folder


def models(of: Daemon) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = of.control.get("/catalogue").json()["models"]
    return found


def kept(of: Daemon) -> list[str]:
    """What there is of imports on the disk."""
    state = of.state
    if of.process is not None and isinstance(of, SmallDisk):
        state = Path(f"/proc/{of.process.pid}/root{state}")
    return sorted(
        str(path.relative_to(state))
        for folder in (state / "models", state / "cache")
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    )


@pytest.fixture(scope="module")
def source() -> Iterator[Daemon]:
    with daemon(scripted=True) as one:
        put(one, 24 * MIB)
        yield one


@pytest.fixture(scope="module")
def archive(source: Daemon) -> Path:
    file = source.folder / "big.tar"
    said = tursi(source, "export", "big", "-o", str(file))
    assert f"big is exported to {file} (24 MiB)." in said
    assert file.stat().st_mode & 0o777 == 0o600
    return file


@pytest.fixture(scope="module")
def target() -> Iterator[Daemon]:
    with daemon(scripted=True) as one:
        yield one


@pytest.fixture
def empty(target: Daemon) -> Iterator[Daemon]:
    """A daemon without a model, which is left so."""
    yield target
    for each in target.control.get("/deployments").json()["deployments"]:
        tursi(target, "down", each["name"])
    for entry in models(target):
        tursi(target, "rm", entry["name"])
    assert kept(target) == []


# -- there and back ---------------------------------------------------------------------


def test_a_model_of_the_hub_serves_the_same_where_there_is_no_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, file = "sentence-transformers/all-MiniLM-L6-v2", tmp_path / "search.tar"
    asked = {"model": "search", "input": ["one", "another sentence"]}
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with StandInHub() as hub, daemon() as one:
        hub.add(name, minilm_folder())
        one.stop()
        one.start(hub.environment(tmp_path / "home"))
        tursi(one, "up", name, "--name", "search", "--load", "on_demand", "--threads", "2")
        before = one.client.post("/v1/embeddings", json=asked).json()["data"]
        first, dry, real, show = commands()
        monkeypatch.chdir(tmp_path)
        tursi(one, *first)
        commit = one.status("search")["commit"]
    with daemon(settings="[hub]\noffline = true\n") as other:
        said = tursi(other, *dry)
        assert "search: a new deployment" in said
        assert models(other) == []
        said = tursi(other, *real)
        assert "search: imported." in said
        assert "search is ready" in said
        after = other.client.post("/v1/embeddings", json=asked).json()["data"]
        assert [each["embedding"] for each in after] == [each["embedding"] for each in before]
        status = other.status("search")
        assert (status["model"], status["commit"]) == (name, commit)
        assert (status["load"], status["limits"]["threads"]) == ("on_demand", 2)
        [entry] = models(other)
        assert (entry["name"], entry["commit"], entry["used_by"]) == (name, commit, ["search"])
        told = tursi(other, *show)
        assert "256 tokens" in told
        assert "22.7 million" in told
        asks = told[told.index("curl ") :]
        answer = subprocess.run(
            ["bash", "-c", asks], capture_output=True, text=True, timeout=60, check=True
        )
        assert len(json.loads(answer.stdout)["data"][0]["embedding"]) == 384
        # What is the same is shared, and nothing to do.
        assert "nothing to change" in tursi(other, "import", str(file))
        # By the name of the hub too, without a hub.
        assert commit[:12] in tursi(other, "pull", name)
        assert "(imported)" in tursi(other, "history", "search")
        events = other.control.get("/deployments/search/events").json()["events"]
        assert events[0]["kind"] == "import"
        audit = other.control.get("/audit").json()["entries"]
        found = [(each["action"], each["target"], each["status"]) for each in audit]
        assert found[:2] == [("imports", "search", 201), ("imports", "search", 200)]
        refused = other.control.delete(f"/catalogue/{name}")
        assert refused.json()["error"]["code"] == "model_in_use"


def test_a_folder_comes_with_its_deployment_and_goes_alone(empty: Daemon, archive: Path) -> None:
    tursi(empty, "import", str(archive), "--name", "mine")
    [entry] = models(empty)
    assert (entry["commit"], entry["used_by"]) == (None, ["mine"])
    assert Path(entry["folder"]).parent == empty.state / "models"
    assert entry["size"] > 24 * MIB
    assert "mine" in tursi(empty, "rm", entry["name"], status=1)
    tursi(empty, "down", "mine")
    assert "is removed" in tursi(empty, "rm", entry["name"])
    assert models(empty) == []


def test_an_import_changes_a_deployment_as_up_does(empty: Daemon, archive: Path) -> None:
    empty.deploy("big", empty.script())
    empty.wait("big")
    assert "changes the deployment" in tursi(empty, "import", str(archive), "--dry-run")
    assert "generation 2 takes over" in tursi(empty, "import", str(archive))
    tursi(empty, "rollback", "big")
    assert empty.status("big")["model"].endswith("script")
    tursi(empty, "rollback", "big", "2")
    assert "/models/big-" in empty.status("big")["model"]
    empty.wait("big")
    for change, outcome in (
        (lambda: None, "unchanged"),
        (lambda: empty.control.post("/deployments/big/scale", json={"replicas": 2}), "scaled"),
        (lambda: empty.control.post("/deployments/big/stop"), "started"),
        (lambda: empty.deploy("big", empty.script("stalls", stall=True)), "back"),
    ):
        change()
        answers = [
            empty.control.post("/imports", params=asked, content=archive.read_bytes(), headers=TAR)
            for asked in ({"dry_run": 1}, {})
        ]
        assert [each.json()["outcome"] for each in answers] == [outcome] * 2


def test_from_one_to_the_other_by_a_pipe(source: Daemon, empty: Daemon) -> None:
    first = subprocess.Popen(command(source, "export", "big", "-o", "-"), stdout=subprocess.PIPE)
    second = subprocess.run(
        command(empty, "import", "-"),
        stdin=first.stdout,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (first.wait(60), second.returncode) == (0, 0), second


def test_over_tls_with_a_key(source: Daemon, archive: Path, tmp_path: Path) -> None:
    certificate(tmp_path, "there")
    port = free_port()
    settings = (
        "[[http.listeners]]\n"
        f'endpoint = "ssl:{port}:interface=127.0.0.1:privateKey={tmp_path}/key.pem:'
        f'certKey={tmp_path}/cert.pem"\n'
        'roles = ["inference", "health", "control"]\n'
    )
    with daemon(scripted=True, settings=settings) as one:
        keys = {}
        for scope in ("admin", "read"):
            made = one.control.post("/keys", json={"name": scope, "scopes": [scope]})
            keys[scope] = made.json()["secret"]

        def remote(key: str, *words: str) -> subprocess.CompletedProcess[str]:
            environment = {
                **os.environ,
                "TURSI_URL": f"https://127.0.0.1:{port}",
                "TURSI_API_KEY": keys[key],
                "SSL_CERT_FILE": str(tmp_path / "cert.pem"),
            }
            return subprocess.run(
                [TURSI, *words],
                env=environment, capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip

        refused = remote("read", "import", str(archive))
        assert refused.returncode == 1
        assert "lacks the scope 'admin'" in refused.stderr
        assert remote("admin", "import", str(archive)).returncode == 0
        one.wait("big")
        back = remote("admin", "export", "big", "-o", str(tmp_path / "back.tar"))
        assert back.returncode == 0, back
        damaged = damage(archive, tmp_path / "damaged.tar", 4 * MIB)
        told = remote("admin", "import", str(damaged), "--name", "other")
        assert (told.returncode, "altered or damaged" in told.stderr) == (1, True), told


# -- what is refused ----------------------------------------------------------------------


def damage(archive: Path, other: Path, at: int) -> Path:
    data = bytearray(archive.read_bytes())
    data[at] ^= 1
    other.write_bytes(data)
    return other


def test_what_is_not_whole_leaves_nothing(empty: Daemon, archive: Path, tmp_path: Path) -> None:
    size = archive.stat().st_size
    first = archive.read_bytes().index(b"files/config.json")
    for at, words in [(first + 600, "damaged|between"), (size - 2 * MIB, "altered or damaged")]:
        said = tursi(empty, "import", str(damage(archive, tmp_path / "x.tar", at)), status=1)
        assert any(word in said for word in words.split("|")), said
    cut = tmp_path / "cut.tar"
    cut.write_bytes(archive.read_bytes()[: size // 2])
    assert "ends too early" in tursi(empty, "import", str(cut), status=1)
    cut.write_bytes(archive.read_bytes() + b"x")
    assert "after its end" in tursi(empty, "import", str(cut), status=1)
    cut.write_bytes(b"something else")
    assert "no archive" in tursi(empty, "import", str(cut), status=1)
    assert "can't be read" in tursi(empty, "import", str(tmp_path / "none.tar"), status=2)
    assert models(empty) == []
    assert kept(empty) == []


def test_nobody_is_made_to_trust(empty: Daemon, source: Daemon, tmp_path: Path) -> None:
    folder = source.script("pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "modeling.py").write_text("print()")
    source.deploy("pickled", folder, allow_pickle=True, trust_remote_code=True)
    source.wait("pickled")
    file = tmp_path / "pickled.tar"
    tursi(source, "export", "pickled", "-o", str(file))
    assert "--allow-pickle" in tursi(empty, "import", str(file), status=1)
    said = tursi(empty, "import", str(file), "--allow-pickle", status=1)
    assert "--trust-remote-code" in said
    assert kept(empty) == []
    flags = ("--allow-pickle", "--trust-remote-code")
    assert "may load pickle files" in tursi(empty, "import", str(file), *flags)
    status = empty.status("pickled")
    assert (status["allow_pickle"], status["trust_remote_code"]) == (True, True)


def test_an_export_is_of_what_is_there(source: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "x.tar"
    assert "no deployment" in tursi(source, "export", "nobody", "-o", str(file), status=4)
    folder = source.script("going")
    source.deploy("going", folder)
    source.wait("going")
    (folder / "model.safetensors").unlink()
    assert "no safetensors" in tursi(source, "export", "going", "-o", str(file), status=1)
    assert not list(tmp_path.iterdir())
    file.write_text("mine")
    assert "exists already" in tursi(source, "export", "big", "-o", str(file), status=2)
    assert file.read_text() == "mine"


# -- kills and full disks ------------------------------------------------------------------


def halves(file: Path, between: Any) -> Iterator[bytes]:
    data = file.read_bytes()
    yield data[: len(data) // 2]
    between()
    yield data[len(data) // 2 :]


def test_a_daemon_that_is_killed_in_an_import_has_nothing_of_it(
    empty: Daemon, archive: Path
) -> None:
    def kill() -> None:
        until(lambda: any(".importing" in each for each in kept(empty)), "some of it is there")
        empty.kill()

    with pytest.raises(httpx.TransportError):
        empty.control.post("/imports", content=halves(archive, kill), headers=TAR)
    assert kept(empty)
    empty.start()
    until(lambda: kept(empty) == [], "what was left is swept")
    assert models(empty) == []
    tursi(empty, "import", str(archive))


def test_a_command_that_is_killed_in_an_import_leaves_nothing(empty: Daemon, archive: Path) -> None:
    running = subprocess.Popen(
        command(empty, "import", "-"), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert running.stdin is not None
    running.stdin.write(archive.read_bytes()[: 15 * MIB])
    running.stdin.flush()
    until(lambda: any(".importing" in each for each in kept(empty)), "some of it is there")
    running.kill()
    running.wait(10)
    until(lambda: kept(empty) == [], "it is given up")

    def audited() -> bool:
        entries = empty.control.get("/audit").json()["entries"]
        found = [each["action"] for each in entries if each["code"] == "request_cancelled"]
        return found == ["imports"]

    until(audited, "it is in the audit")
    tursi(empty, "import", str(archive))


def test_who_stops_reading_an_export_is_told_that_it_is_not_whole(source: Daemon) -> None:
    running = subprocess.Popen(
        command(source, "export", "big", "-o", "-"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert running.stdout is not None
    running.stdout.read(1000)
    running.stdout.close()
    _, said = running.communicate(timeout=60)
    assert (running.returncode, b"it isn't whole" in said) == (1, True), said


def test_kills_in_an_export_leave_no_file_that_looks_whole(
    source: Daemon, archive: Path, tmp_path: Path
) -> None:
    file = tmp_path / "big.tar"
    # The reader is stopped, so that the export can't end before the kill.
    read, write = os.pipe()
    running = subprocess.Popen(command(source, "export", "big", "-o", "-"), stdout=write)
    os.close(write)
    assert os.read(read, 1000)
    source.kill()
    rest = io.FileIO(read).readall()
    assert running.wait(60) == 3
    assert len(rest) < archive.stat().st_size - 1000
    until(lambda: not source.tree(), "its workers are gone")
    source.start()
    source.wait("big")
    (tmp_path / "big.tar.part").write_text("of one that was killed")
    tursi(source, "export", "big", "-o", str(file))
    # When and by whom is in it; all else is the same.
    assert file.read_bytes()[-24 * MIB :] == archive.read_bytes()[-24 * MIB :]
    assert [each.name for each in tmp_path.iterdir()] == ["big.tar"]


@pytest.mark.skipif(not may_mount(), reason="a file system can't be mounted here")
def test_a_disk_that_becomes_full_keeps_nothing(source: Daemon, archive: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="tursi-"))
    small = SmallDisk(folder, scripted=True)
    try:
        small.start()
        told = small.control.post("/imports", content=archive.read_bytes(), headers=TAR)
        assert (told.status_code, told.json()["error"]["code"]) == (507, "disk_full")
        assert "MiB are free" in told.json()["error"]["message"]
        put(source, 8 * MIB, "small")
        file = folder / "small.tar"
        tursi(source, "export", "small", "-o", str(file))
        told = small.control.post("/imports", content=halves(file, small.fill), headers=TAR)
        assert (told.status_code, told.json()["error"]["code"]) == (507, "disk_full")
        assert "became full" in told.json()["error"]["message"]
        small.filler.unlink()
        until(lambda: kept(small) == [], "nothing is kept")
        tursi(small, "import", str(file))
        small.wait("small")
    finally:
        small.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_stop_gives_an_import_up(empty: Daemon, archive: Path) -> None:
    process = empty.process
    assert process is not None

    def stop() -> None:
        until(lambda: any(".importing" in each for each in kept(empty)), "some of it is there")
        process.terminate()
        until(lambda: gone(process.pid) or not (empty.runtime / "control.sock").exists(), "it ends")

    try:
        answer = empty.control.post("/imports", content=halves(archive, stop), headers=TAR)
        assert json.loads(answer.content)["error"]["code"] == "shutting_down"
    except httpx.TransportError:
        pass
    process.wait(60)
    empty.start()
    until(lambda: kept(empty) == [], "nothing is kept")
    assert models(empty) == []
