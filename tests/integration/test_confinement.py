"""What workers of a real daemon are kept from: memory, descriptors, files, sockets."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from daemon import Daemon, daemon
from minilm import minilm_folder
from patience import until

from tursi import sandbox

MEBIBYTE = 2**20
LIMIT = 96 * MEBIBYTE
SETTINGS = """
[workers]
backoff_initial = 0.1
"""


@pytest.fixture
def running() -> Iterator[Daemon]:
    with daemon(scripted=True, settings=SETTINGS) as one:
        yield one


def ask(one: Daemon, name: str, **fields: Any) -> httpx.Response:
    return one.client.post("/v1/embeddings", json={"model": name, "input": "hello", **fields})


def attempt(one: Daemon, name: str, *what: tuple[str, object]) -> list[str]:
    answer = ask(one, name, attempt=[(each, str(where)) for each, where in what])
    assert answer.status_code == 200, answer.text
    outcome: list[str] = answer.json()
    return outcome


def events(one: Daemon, name: str, kind: str) -> list[str]:
    found = one.control.get(f"/deployments/{name}/events", params={"limit": 1000}).json()
    return [event["message"] for event in found["events"] if event["kind"] == kind]


def lives(one: Daemon, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = one.control.get(f"/deployments/{name}/lives").json()["lives"]
    return found


def used(one: Daemon, name: str) -> int:
    (worker,) = one.status(name)["workers"]
    return worker["rss"] or 0


# -- limits -----------------------------------------------------------------------


def test_a_leak_is_told_then_ended_with_its_numbers_and_disturbs_nobody(running: Daemon) -> None:
    running.deploy("other", running.script("other"))
    running.deploy("leak", running.script("leak", leak=MEBIBYTE), limits={"memory": LIMIT})
    other = running.wait("other")["workers"][0]["pid"]
    assert running.wait("leak")["limits"]["memory"] == LIMIT
    while used(running, "leak") < 0.92 * LIMIT:
        assert ask(running, "leak").status_code == 200
    near = until(lambda: events(running, "leak", "worker.memory"), "it is told", 10)
    assert "of the 96.0 MiB that it may have" in near[0]

    def leak() -> list[dict[str, Any]]:
        if used(running, "leak") < 2 * LIMIT:
            ask(running, "leak")
        return [life for life in lives(running, "leak") if life["failure"]]

    (life,) = until(leak, "it is ended", 20)
    assert life["failure"] == "out-of-memory"
    assert life["reason"].startswith("out of memory: it needs more than its limit of 96.0 MiB")
    assert "peak" in life["reason"]
    assert life["peak_rss"] > LIMIT
    assert running.wait("leak", seconds=15)["workers"][0]["restarts"] == 1
    assert ask(running, "other").json()["pid"] == other


def test_what_a_worker_forks_counts_too(running: Daemon) -> None:
    folder = running.script("forks", fork=20)
    running.deploy("forks", folder, limits={"memory": 64 * MEBIBYTE})
    status = running.wait("forks")
    # 21 processes that share nearly all of their memory: far more than the limit, if one
    # only added up what each of them has.
    keeper = psutil.Process(status["workers"][0]["pid"]).parent()
    assert keeper is not None
    processes = keeper.children(recursive=True)
    assert len(processes) == 21
    assert sum(each.memory_info().rss for each in processes) > 64 * MEBIBYTE
    assert lives(running, "forks")[0]["ended_at"] is None


def test_files_and_threads(running: Daemon) -> None:
    folder = running.script("files", attempt=True)
    running.deploy("files", folder, limits={"files": 100, "threads": 2})
    running.wait("files")
    answer = attempt(running, "files", ("files", ""), ("variable", "OMP_NUM_THREADS"))
    assert answer == [100, "2"]


def test_limits_that_cannot_be_met_are_refused_and_those_that_nobody_can_impose_told(
    running: Daemon,
) -> None:
    folder = running.script("any")
    host = psutil.virtual_memory().total
    for limits, sentence in (
        ({"memory": 2 * host}, "is more than the"),
        ({"memory": 1000}, "1000 bytes is less than 64.0 MiB"),
        ({"threads": 5000}, "5000 is more than the"),
        ({"cpu": 5000}, "5000 is more than the"),
        ({"files": 10}, "10 is less than 64"),
        ({"processes": 2}, "2 is less than 16"),
    ):
        answer = running.control.put(
            "/deployments/any", json={"model": str(folder), "limits": limits}
        )
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == f"limits.{next(iter(limits))}"
        assert sentence in answer.json()["error"]["message"]
    running.deploy("any", folder, limits={"cpu": 0.5, "processes": 50})
    running.wait("any")
    level = running.control.get("/status").json()["containment"]
    assert level["limits"] in {"cgroup v2", "rlimits and watch"}
    assert bool(level["because"]) == (level["limits"] != "cgroup v2")
    assert running.log.read_text().count("workers are confined by") == 1


def test_another_limit_is_another_generation(running: Daemon) -> None:
    folder = running.script("any")
    limits = {"memory": 2**30, "cpu": 1, "files": 200, "processes": 100}
    assert running.deploy("any", folder, limits=limits)["generation"] == 1
    assert running.deploy("any", folder, limits=limits)["generation"] == 1
    assert running.deploy("any", folder, limits={"memory": 2**29})["generation"] == 2
    numbers = running.control.get("/deployments/any/generations").json()["generations"]
    assert [each["request"]["limits"]["memory"] for each in numbers] == [2**30, 2**29]


def test_more_threads_than_cores_are_told_once(running: Daemon) -> None:
    cores = len(psutil.Process().cpu_affinity() or ())
    for name in ("one", "two", "three"):
        running.deploy(name, running.script(name), limits={"threads": cores})
        running.wait(name)
    found = running.control.get("/events", params={"limit": 1000}).json()["events"]
    (told,) = [each for each in found if each["kind"] == "threads.overcommitted"]
    assert f"{2 * cores} threads on {cores} cores" in told["message"]


# -- the sandbox --------------------------------------------------------------------


def test_the_level_is_told(running: Daemon) -> None:
    level = running.control.get("/status").json()["containment"]
    assert level["landlock"] == sandbox.landlock_version()
    assert level["sockets"] == sandbox.sockets_deniable()
    assert level["no_new_privileges"] is True


def test_a_worker_reaches_nothing_of_the_daemons(running: Daemon, tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("hf_secret")
    folder = running.script("curious", attempt=True)
    running.deploy("curious", folder)
    running.wait("curious")
    assert running.process is not None
    daemon_pid = running.process.pid
    # What this kernel can't keep it from is told in the status, and tested there.
    version = sandbox.landlock_version() or 0
    by_landlock = (
        ("read", running.state / "tursi.sqlite"),
        ("list", running.state),
        ("read", running.configuration),
        ("read", secret),
        ("list", running.runtime),
        ("read", f"/proc/{daemon_pid}/environ"),
        ("read", f"/proc/{daemon_pid}/cmdline"),
        ("read", "/etc/shadow"),
        ("list", Path.home()),
        ("write", folder / "config.json"),
        ("write", running.state / "planted"),
        ("write", "/tmp/planted-by-a-worker"),
    )
    by_filter = (("connect", running.runtime / "control.sock"), ("tcp", running.port))
    forbidden = [
        *(by_landlock if version else ()),
        *(by_filter if sandbox.sockets_deniable() else ()),
        *([("signal", daemon_pid)] if version >= 6 else ()),
    ]
    assert attempt(running, "curious", *forbidden) == ["PermissionError"] * len(forbidden)


def test_a_worker_that_was_taken_over_reaches_nothing(running: Daemon) -> None:
    assert running.process is not None
    pid = running.process.pid
    folder = running.script("evil", attempt=True)
    shutil.copy(Path(__file__).with_name("attacker.py"), folder)
    version = sandbox.landlock_version() or 0
    given: dict[str, Any] = {
        "daemon": pid,
        "database": str(running.state / "tursi.sqlite"),
        "configuration": str(running.configuration),
        "socket": str(running.runtime / "control.sock"),
        "state": str(running.state),
        # What this kernel can't keep it from is told in the status, and tested there.
        "landlock": version > 0,
        "scope": version >= 6,
        "filter": sandbox.sockets_deniable(),
    }
    (folder / "args.json").write_text(json.dumps(given))
    before = {name: Path(given[name]).stat() for name in ("database", "configuration", "state")}
    running.deploy("evil", folder)
    running.wait("evil")
    (answer,) = attempt(running, "evil", ("run", folder / "attacker.py"))
    found = json.loads(answer)
    assert len(found["attempts"]) > 3
    assert {name: each for name, each in found["attempts"].items() if each != "refused"} == {}
    read_anything = 1 << 2
    assert found["capabilities"] & ~read_anything == 0
    if os.getuid() == 0:
        assert found["bounding"] == read_anything
    # Its socket, its log, the page of its heartbeat and what it opened just now.
    assert found["highest"] <= 8
    assert [each.split(":")[0] for each in found["descriptors"]] == [
        "/dev/null", "pipe", "pipe", "socket",
    ]  # fmt: skip
    assert not [name for name in found["variables"] if name.endswith("TOKEN") or "NOTIFY" in name]
    for name, was in before.items():
        now = Path(given[name]).stat()
        assert (now.st_mode, now.st_uid, now.st_gid) == (was.st_mode, was.st_uid, was.st_gid)
    assert running.status("evil")["phase"] == "ready"


LIES = {
    # What it writes to the daemon, and what that is told to be.
    "a head with a header too many": (
        "encode(Kind.HEAD, held, encode_head(Head(200, 'application/json', {'Set-Cookie': 'a'})))",
        "an answer has the header 'Set-Cookie'",
    ),
    "a head that divides": (
        "encode(Kind.HEAD, held, encode_head(Head(200, 'text/html\\r\\n\\r\\n<h1>', {})))",
        "an answer is of the type",
    ),
    "a time that is no number": (
        (
            "encode(Kind.HEAD, held, encode_head(Head(200, 'application/json', {})))"
            " + encode(Kind.END, held, encode_end(End(Usage(queue_seconds=float('nan')), '')))"
        ),
        "an answer took nan s",
    ),
    "pongs": ("encode(Kind.PONG, 1) * 10_000", "a PING that nobody has sent"),
    "a huge frame": ("bytes([255] * 16)", "a frame announces"),
    "many descriptors": ("None", "a descriptor that nobody asked for"),
}
LIAR = """
import os, socket, time
from tursi.model import Usage
from tursi.wire import End, Head, Kind, encode, encode_end, encode_head
held = 1
data = {lie}
ours = socket.socket(fileno=os.dup(3))
if data is None:
    page = os.memfd_create("page")
    socket.send_fds(ours, [b"x"], [page] * 200)
else:
    ours.sendall(data)
time.sleep(30)
found = "survived"
"""


def held(pid: int) -> list[str]:
    """What the daemon's descriptors are, those of its database left out: they come as needed."""
    found = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(each.readlink()))
    return [each for each in found if ".sqlite" not in each]


def test_a_worker_that_lies_is_ended_and_deceives_nobody(running: Daemon) -> None:
    assert running.process is not None
    running.deploy("other", running.script("other"))
    running.wait("other")
    process = psutil.Process(running.process.pid)
    files = held(process.pid)
    for number, (lie, sentence) in enumerate(LIES.values()):
        name = f"liar{number}"
        folder = running.script(name, attempt=True)
        (folder / "lie.py").write_text(LIAR.format(lie=lie))
        running.deploy(name, folder)
        running.wait(name)
        answer = ask(running, name, attempt=[["run", str(folder / "lie.py")]])
        assert answer.status_code in {422, 502}, answer.text
        assert "Set-Cookie" not in answer.headers
        assert answer.headers["content-type"].startswith("application/json")
        life = next(each for each in lives(running, name) if each["ended_at"])
        assert life["failure"] == "protocol", life
        assert sentence in life["reason"], life
        assert "\n" not in life["reason"]
        running.control.delete(f"/deployments/{name}")
    until(lambda: len(running.control.get("/deployments").json()["deployments"]) == 1, "they go")
    assert ask(running, "other").status_code == 200
    assert running.client.get("/health").json()["status"] == "healthy"
    with suppress(AssertionError):
        until(lambda: len(held(process.pid)) <= len(files) + 3, "nothing is held", 15)
    # A client's connection or two; it was sent 200 descriptors.
    assert len(held(process.pid)) <= len(files) + 3, (files, held(process.pid))


def test_a_private_folder_of_any_depth_is_removed(running: Daemon) -> None:
    folder = running.script("deep", attempt=True)
    (folder / "deep.py").write_text(DEEP)
    running.deploy("deep", folder)
    running.wait("deep")
    (private,) = (running.state / "tmp").iterdir()
    assert attempt(running, "deep", ("run", folder / "deep.py")) == ["dug"]
    running.control.delete("/deployments/deep")
    until(lambda: not private.exists(), "its folder goes with it", 15)
    assert running.state.exists()


DEEP = """
import os
place = os.open(os.environ["TMPDIR"], os.O_RDONLY)
os.symlink("..", "up", dir_fd=place)
for _ in range(2000):
    os.mkdir("x" * 100, 0o700, dir_fd=place)
    below = os.open("x" * 100, os.O_RDONLY, dir_fd=place)
    os.close(place)
    place = below
os.mkdir("locked", 0, dir_fd=place)
found = "dug"
"""


def test_a_link_in_a_model_opens_nothing_else(running: Daemon, tmp_path: Path) -> None:
    if sandbox.landlock_version() is None:
        pytest.skip("this kernel has no Landlock")
    folder = running.script("linked", attempt=True)
    (tmp_path / "weights.safetensors").write_text("x")
    # Deeper than the daemon itself looks.
    deep = folder / "a/b/c/d/e"
    deep.mkdir(parents=True)
    (deep / "weights.safetensors").symlink_to(tmp_path / "weights.safetensors")
    (deep / "all").symlink_to("/")
    (deep / "config.json").symlink_to(folder / "config.json")
    running.deploy("linked", folder)
    running.wait("linked")
    tried = (("read", deep / "weights.safetensors"), ("list", deep / "all"))
    assert attempt(running, "linked", *tried) == ["PermissionError"] * 2
    assert attempt(running, "linked", ("read", deep / "config.json")) == ["done"]


def test_a_worker_has_its_model_and_a_folder_of_its_own(running: Daemon) -> None:
    linked = running.script("linked", attempt=True)
    blob = linked / "blob"
    shutil.move(linked / "config.json", blob)
    (linked / "config.json").symlink_to(blob)
    running.deploy("linked", linked)
    running.wait("linked")
    (place, home) = attempt(running, "linked", ("variable", "TMPDIR"), ("variable", "HOME"))
    assert place == home
    private = Path(place)
    assert private.parent == running.state / "tmp"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    allowed = (
        ("read", linked / "config.json"),
        ("write", private / "mine"),
        ("write", "/dev/null"),
        ("read", "/proc/cpuinfo"),
    )
    assert attempt(running, "linked", *allowed) == ["done"] * len(allowed)
    assert (private / "mine").exists()
    running.control.delete("/deployments/linked")
    until(lambda: not private.exists(), "its folder goes with it", 15)


def test_what_a_killed_keeper_leaves_goes_with_the_next_daemon(running: Daemon) -> None:
    running.deploy("any", running.script("any"))
    running.wait("any")
    (left,) = (running.state / "tmp").iterdir()
    # All are looked at before any is killed: a worker that dies with its keeper can't be.
    keepers = [one for one in running.tree() if "keeper.py" in " ".join(one.cmdline())]
    for keeper in keepers:
        keeper.kill()
    running.kill()
    assert left.exists()
    running.start()
    until(lambda: not left.exists(), "it is removed", 10)
    running.wait("any")


def test_a_model_of_the_hubs_cache_loads_through_its_links() -> None:
    with daemon(settings=SETTINGS) as one:
        # As huggingface_hub lays it out: the snapshot's files are links to blobs.
        repository = one.folder / "models--org--minilm"
        snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for source in minilm_folder().rglob("*"):
            if source.is_file():
                link = snapshot / source.relative_to(minilm_folder())
                link.parent.mkdir(parents=True, exist_ok=True)
                blob = blobs / str(len(list(blobs.iterdir())))
                shutil.copy(source, blob)
                link.symlink_to(blob)
        # The threads are OpenMP's, which would set on which cores they run.
        threads = min(2, len(psutil.Process().cpu_affinity() or "1"))
        one.deploy("minilm", snapshot, limits={"memory": 2**31, "threads": threads})
        one.wait("minilm", seconds=120)
        embedding = ask(one, "minilm").json()["data"][0]["embedding"]
        assert len(embedding) == 384


# -- the daemon's own limits -----------------------------------------------------------


def test_without_descriptors_the_new_waits_and_the_old_serves(running: Daemon) -> None:
    assert running.process is not None
    running.deploy("old", running.script("old"))
    running.wait("old")
    before = ask(running, "old").json()["pid"]
    daemon_process = psutil.Process(running.process.pid)
    limits = resource.prlimit(daemon_process.pid, resource.RLIMIT_NOFILE)
    tight = (daemon_process.num_fds() + 2, limits[1])
    resource.prlimit(daemon_process.pid, resource.RLIMIT_NOFILE, tight)
    running.deploy("new", running.script("new"))

    def refused() -> Any:
        status = running.status("new")
        return status["phase"] == "backoff" and status

    status = until(refused, "the new one waits", 15)
    assert status["failure"] == "host"
    assert "Too many open files" in status["reason"]
    assert ask(running, "old").json()["pid"] == before
    resource.prlimit(daemon_process.pid, resource.RLIMIT_NOFILE, limits)
    running.wait("new", seconds=20)
    assert ask(running, "old").json()["pid"] == before
    assert ask(running, "new").status_code == 200
