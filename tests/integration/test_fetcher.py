"""The real fetcher process and the unmodified huggingface_hub against the stand-in hub."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from patience import until
from pytest_twisted import ensureDeferred
from stand_in_hub import Fault, Snapshot, StandInHub

from twisted.internet import reactor
from twisted.internet.defer import gatherResults

from tursi import config, wire
from tursi.errors import HubUnreachable, RevisionNotFound
from tursi.fetcher.failures import retry_after
from tursi.fetcher.snapshot import Shelf
from tursi.hub import Hub
from tursi.model import Progress, Reference, Resolution
from tursi.supervision.logs import LifeLog
from tursi.supervision.oneshot import OneShot, Running

MODEL = "someone/tiny"
MAIN = "/content/[^/]+/[^/]+/model.safetensors"
"""The main weights at the content host."""
WEIGHT_BYTES = 300_000
# As the keeper hands the data socket over.
ONTO_THREE = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.execv(sys.argv[2], sys.argv[2:])"


def safetensors(size: int = WEIGHT_BYTES) -> bytes:
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"weight": entry}).encode()
    return struct.pack("<Q", len(header)) + header + os.urandom(size)


def write(folder: Path, **files: bytes) -> Path:
    for name, data in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@dataclass
class Run:
    """What one fetcher process said before it ended."""

    status: int
    progress: list[Progress] = field(default_factory=list)
    ready: Resolution | None = None
    failed: wire.LastWords | None = None
    errors: str = ""

    @property
    def resolution(self) -> Resolution:
        assert self.ready is not None, (self.failed, self.errors)
        assert self.status == 0
        return self.ready

    def sentence(self, code: str, status: int) -> str:
        assert self.failed is not None, self.ready
        assert (self.failed.code, self.status) == (code, status), (self.failed, self.errors)
        assert self.failed.traceback == ""
        assert "\n" not in self.failed.message
        return self.failed.message


class Fetcher:
    """Starts fetchers with one cache."""

    def __init__(self, folder: Path, hub: StandInHub, *options: str) -> None:
        self.options = options
        self.cache = folder / "cache"
        self.environment = {"PATH": os.defpath, "HF_HUB_DISABLE_TELEMETRY": "1"}
        self.environment |= hub.environment(folder / "home")

    def start(
        self, model: str, revision: str, environment: Mapping[str, str]
    ) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", "-c", ONTO_THREE, str(theirs.fileno())),
                    *(sys.executable, "-I", "-m", "tursi.fetcher"),
                    *(model, revision, str(self.cache), *self.options),
                ],
                pass_fds=[theirs.fileno()],
                env={**self.environment, **environment},
                stderr=subprocess.PIPE,
            )
        ours.settimeout(30)
        return process, ours

    def __call__(self, model: str = MODEL, revision: str = "", **environment: str) -> Run:
        process, ours = self.start(model, revision, environment)
        decoder = wire.Decoder()
        run = Run(-1)
        with process, ours:
            while data := ours.recv(65536):
                for frame in decoder.feed(data):
                    assert run.ready is None
                    assert run.failed is None
                    if frame.kind == wire.Kind.PROGRESS:
                        run.progress.append(msgspec.msgpack.decode(frame.body, type=Progress))
                    elif frame.kind == wire.Kind.READY:
                        run.ready = msgspec.msgpack.decode(frame.body, type=Resolution)
                    else:
                        run.failed = msgspec.msgpack.decode(frame.body, type=wire.LastWords)
            assert process.stderr is not None
            run.errors = process.stderr.read().decode()
            run.status = process.wait(10)
        return run


@pytest.fixture(name="hub")
def _hub() -> Iterator[StandInHub]:
    with StandInHub() as hub:
        yield hub


@pytest.fixture(name="fetch")
def _fetch(tmp_path: Path, hub: StandInHub) -> Fetcher:
    return Fetcher(tmp_path, hub)


@pytest.fixture(name="tiny")
def _tiny(tmp_path: Path, hub: StandInHub) -> Snapshot:
    folder = write(
        tmp_path / "tiny",
        **{
            "config.json": b'{"model_type": "bert"}',
            "model.safetensors": safetensors(),
            "tokenizer.json": b"{}" + b" " * 4096,
            "tokenizer_config.json": b"{}",
            "vocab.txt": b"[PAD]\n",
            "modules.json": b"[]",
            "1_Pooling__config.json": b"{}",
            "2_Dense__config.json": b"{}",
            "2_Dense__model.safetensors": safetensors(2000),
            "README.md": b"# Tiny",
            "pytorch_model.bin": b"\x80\x04pickle",
            "modeling_tiny.py": b"raise SystemExit",
            "onnx__model.onnx": b"onnx",
            "onnx__config.json": b"{}",
            "openvino__openvino_model.bin": b"ov",
            "tiny.gguf": b"GGUF",
            "model.fp16.safetensors": safetensors(2000),
        },
    )
    return hub.add(MODEL, folder)


WANTED = (
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "config.json",
    "model.safetensors",
    "modules.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def test_takes_what_the_model_needs_and_nothing_else(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub
) -> None:
    run = fetch()
    got = run.resolution
    assert got.commit == tiny.commit
    assert got.files == WANTED
    assert got.folder == str(fetch.cache / "models--someone--tiny/snapshots" / tiny.commit)
    have = {p.relative_to(got.folder).as_posix() for p in Path(got.folder).rglob("*.*")}
    assert have == set(WANTED)
    assert all(Path(got.folder, name).read_bytes() == tiny.data(name) for name in WANTED)
    assert got.size == sum(len(tiny.data(name)) for name in WANTED)
    assert run.progress[0] == Progress("resolve")
    assert run.progress[-1] == Progress("download", float(got.size), float(got.size))
    assert not [s for s in hub.seen if "agent" in s.path], "a look-up that nobody asked for"

    before = hub.downloads()
    assert fetch().resolution == got
    assert hub.downloads() == before, "the second run takes everything from the cache"


def test_progress_grows_while_a_slow_download_runs(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub, tmp_path: Path
) -> None:
    write(tiny.folder, **{"model.safetensors": safetensors(3_000_000)})
    hub.faults.append(Fault(MAIN, "slow", seconds=0.06))
    done = [p.done for p in fetch().progress if p.done is not None]
    assert done == sorted(done)
    assert len({value for value in done if 1_000_000 < value < 3_000_000}) >= 2


def test_a_mirror_may_list_names_alone(fetch: Fetcher, tiny: Snapshot, hub: StandInHub) -> None:
    hub.names_alone = True
    hub.faults.append(Fault(MAIN, "corrupt", method="GET", times=1))
    got = fetch().resolution
    assert got.size == sum(len(tiny.data(name)) for name in WANTED)
    assert all(Path(got.folder, name).read_bytes() == tiny.data(name) for name in WANTED)


def test_takes_all_shards_that_the_index_names(
    fetch: Fetcher, hub: StandInHub, tmp_path: Path
) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"metadata": {}, "weight_map": {"a": shards[0], "b": shards[1], "c": shards[1]}}
    files = {name: safetensors(2000) for name in [*shards, "consolidated.safetensors"]}
    files |= {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    hub.add(MODEL, write(tmp_path / "sharded", **files))
    assert fetch().resolution.files == (
        "config.json",
        shards[0],
        shards[1],
        "model.safetensors.index.json",
    )


def test_a_tag_and_a_commit_name_revisions(fetch: Fetcher, tiny: Snapshot, hub: StandInHub) -> None:
    write(tiny.folder.parent / "old", **{"config.json": b"{}", "model.safetensors": safetensors()})
    old = hub.add(MODEL, tiny.folder.parent / "old", "v1.0")
    assert fetch(revision="v1.0").resolution.commit == old.commit
    seen = len(hub.seen)
    pinned = fetch(revision=old.commit).resolution
    assert pinned.commit == old.commit
    assert len(hub.seen) == seen, "a commit that is complete in the cache needs no hub"


def test_the_token_goes_to_the_hub_and_not_to_the_content_host(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub
) -> None:
    hub.token = "hf_secret"
    run = fetch(HF_TOKEN="hf_secret")
    assert run.resolution.files == WANTED
    content = [s for s in hub.seen if s.path.startswith("/content/")]
    assert content
    assert all(s.host.startswith("localhost") and s.token is None for s in content)
    assert all(s.token == "hf_secret" for s in hub.seen if s not in content)
    assert "hf_secret" not in run.errors


def test_the_token_may_come_from_a_file(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub, tmp_path: Path
) -> None:
    hub.token = "hf_secret"
    (tmp_path / "token").write_text("hf_secret\n")
    assert fetch(HF_TOKEN_PATH=str(tmp_path / "token")).resolution.commit == tiny.commit
    missing = fetch(HF_TOKEN_PATH=str(tmp_path / "nothing")).sentence("token_refused", 77)
    assert missing.startswith(f"The token file {tmp_path}/nothing can't be read")


def test_not_found(fetch: Fetcher, hub: StandInHub) -> None:
    sentence = fetch("someone/nothing").sentence("repository_not_found", 66)
    assert sentence.startswith(f"{hub.endpoint} has no model someone/nothing, or it is private")
    assert "token_file" in sentence


def test_a_name_that_no_hub_can_have(fetch: Fetcher, hub: StandInHub) -> None:
    assert "someone/a--b" in fetch("someone/a--b").sentence("repository_not_found", 66)
    assert not hub.seen


def test_revision_not_found(fetch: Fetcher, tiny: Snapshot) -> None:
    sentence = fetch(revision="v9").sentence("revision_not_found", 66)
    assert sentence == "someone/tiny has no revision 'v9': check the branch, tag or commit."


@pytest.mark.parametrize(("token", "advice"), [("", "give Tursi a token"), ("hf_x", "no access")])
def test_gated(fetch: Fetcher, tiny: Snapshot, hub: StandInHub, token: str, advice: str) -> None:
    # As the real hub: the listing is public, the files aren't.
    headers = {"X_Error_Code": "GatedRepo"}
    hub.faults.append(Fault("/resolve/", status=403 if token else 401, headers=headers))
    sentence = fetch(HF_TOKEN=token).sentence("repository_gated", 77)
    assert f"accept its terms at {hub.endpoint}/someone/tiny" in sentence
    assert advice in sentence


def test_a_wrong_token(fetch: Fetcher, tiny: Snapshot, hub: StandInHub) -> None:
    hub.token = "hf_right"
    run = fetch(HF_TOKEN="hf_wrong")
    assert "refuses the token" in run.sentence("token_refused", 77)
    assert "hf_wrong" not in run.errors + run.sentence("token_refused", 77)


def test_a_token_without_the_permission(fetch: Fetcher, tiny: Snapshot, hub: StandInHub) -> None:
    hub.faults.append(Fault("/api/", status=403))
    assert "forbids" in fetch(HF_TOKEN="hf_x").sentence("token_refused", 77)


def test_no_network_uses_the_cache_or_says_so(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
        sentence = fetch(HF_ENDPOINT=nowhere).sentence("hub_unreachable", 75)
        assert sentence.startswith(f"{nowhere} can't be reached (")
        got = fetch().resolution
        assert fetch(HF_ENDPOINT=nowhere).resolution == got


def test_offline_uses_the_cache_or_says_so(fetch: Fetcher, tiny: Snapshot, hub: StandInHub) -> None:
    sentence = fetch(HF_HUB_OFFLINE="1").sentence("hub_offline", 75)
    assert sentence.startswith("someone/tiny isn't (completely) in the cache, and offline mode")
    got = fetch().resolution
    seen = len(hub.seen)
    assert fetch(HF_HUB_OFFLINE="1").resolution == got
    assert len(hub.seen) == seen
    Path(got.folder, "model.safetensors").unlink()
    assert fetch(HF_HUB_OFFLINE="1").failed is not None, "an incomplete snapshot is no model"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("/api/", status=503), "status 503"),
        (Fault("/api/", status=408), "status 408"),
        (Fault("/content/", status=403), "status 403"),
        (Fault("/api/", status=429, headers={"Retry_After": "7"}), "try again in 7 seconds"),
    ],
)
def test_a_hub_in_trouble(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub, fault: Fault, words: str
) -> None:
    hub.faults.append(fault)
    assert words in fetch().sentence("hub_unreachable", 75)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        ("300", 300),
        ("999999", 3600),
        ("Fri, 15 Jan 2027 08:01:00 GMT", 61),
        ("Fri, 15 Jan 2027 07:00:00 GMT", 1),
        ("soon", 30),
        ("", 30),
    ],
)
def test_retry_after_is_a_number_or_a_date(value: str, seconds: int) -> None:
    assert retry_after(value, 1_800_000_000.0) == seconds


@pytest.mark.parametrize(
    ("place", "status", "words"),
    [
        ("/api/", 429, "try again in 200 seconds"),
        ("/resolve/", 429, "try again in 200 seconds"),
        ("/content/", 429, "try again in 200 seconds"),
        ("/resolve/.*/config.json", 503, "status 503"),
    ],
)
def test_a_hub_that_wants_to_be_left_alone_is_waited_for_by_the_daemon(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub, place: str, status: int, words: str
) -> None:
    hub.faults.append(Fault(place, status=status, headers={"Retry_After": "200"}))
    began = time.monotonic()
    run = fetch()
    assert words in run.sentence("hub_unreachable", 75)
    assert run.failed is not None
    assert run.failed.retry_after == 200
    # huggingface_hub would sleep that long.
    assert time.monotonic() - began < 30
    asked = Counter((seen.method, seen.path) for seen in hub.seen if re.search(place, seen.path))
    assert max(asked.values()) <= 2, "it asks for a file's head, and once again at once"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(MAIN, "whole", method="GET"),
        Fault(MAIN, "short", method="GET", times=1),
    ],
    ids=["ignores the range", "says another length"],
)
def test_a_content_host_that_does_it_its_own_way(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub, fault: Fault
) -> None:
    write(tiny.folder, **{"model.safetensors": safetensors(3_000_000)})
    hub.faults += [Fault(MAIN, "truncate", method="GET", times=1), fault]
    run = fetch()
    if run.failed is not None:
        run.sentence("hub_unreachable", 75)
        run = fetch()
    got = run.resolution
    assert Path(got.folder, "model.safetensors").read_bytes() == tiny.data("model.safetensors")


def test_a_file_that_ends_early_is_asked_for_again_later(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub
) -> None:
    hub.faults.append(Fault(MAIN, "short", method="GET", times=1))
    assert "in another length" in fetch().sentence("hub_unreachable", 75)
    assert fetch().resolution.files == WANTED


def test_redirects_in_a_circle_end(fetch: Fetcher, tiny: Snapshot, hub: StandInHub) -> None:
    there = f"/{MODEL}/resolve/{tiny.commit}/config.json"
    hub.faults.append(Fault("config.json", status=307, headers={"Location": there}))
    assert "redirect" in fetch().sentence("hub_unreachable", 75)


@pytest.mark.parametrize("place", ["169.254.169.254", "[fe80::1]", "[::ffff:169.254.0.1]"])
def test_a_redirect_to_where_no_content_is_is_not_followed(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub, place: str
) -> None:
    there = {"Location": f"http://{place}/latest/meta-data/"}
    hub.faults.append(Fault(MAIN, status=302, method="GET", headers=there))
    sentence = fetch().sentence("fetch_failed", 70)
    assert sentence.startswith(f"{hub.endpoint} leads to {place.strip('[]')} (")


def test_a_hub_that_no_name_server_knows(fetch: Fetcher, hub: StandInHub) -> None:
    sentence = fetch(HF_ENDPOINT="http://hub.invalid").sentence("hub_unreachable", 75)
    assert sentence.startswith("http://hub.invalid can't be reached (")


def test_a_file_that_is_gone_from_the_hub(fetch: Fetcher, tiny: Snapshot, hub: StandInHub) -> None:
    hub.faults.append(Fault("/resolve/.*/config.json", status=404))
    assert fetch().failed is not None
    hub.faults.clear()
    assert fetch().resolution.files == WANTED


def test_a_branch_that_moves_meanwhile_gives_one_commit_or_the_other(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub
) -> None:
    held = Fault(MAIN, "hold", method="GET", times=1)
    hub.faults.append(held)
    process, ours = fetch.start(MODEL, "", {})
    with process, ours:
        assert held.reached.wait(20)
        moved = write(tiny.folder.parent / "moved", **{"config.json": b"{}"})
        write(moved, **{"model.safetensors": safetensors(), "vocab.txt": b"[PAD]\n"})
        newer = hub.add(MODEL, moved)
        process.send_signal(signal.SIGKILL)
    held.released.set()
    got = fetch().resolution
    assert got.commit == newer.commit
    assert got.files == ("config.json", "model.safetensors", "vocab.txt")
    assert all(Path(got.folder, name).read_bytes() == newer.data(name) for name in got.files)
    # Of the older one only a part has come, which is no model.
    part = fetch.cache / "models--someone--tiny/snapshots" / tiny.commit
    assert part.exists()
    assert fetch(MODEL, tiny.commit, HF_HUB_OFFLINE="1").failed is not None
    assert fetch(MODEL, tiny.commit).resolution.files == WANTED


def test_a_kept_part_counts_as_room(fetch: Fetcher, tiny: Snapshot, hub: StandInHub) -> None:
    shelf = Shelf(fetch.cache, MODEL)
    blobs = write(
        fetch.cache / "models--someone--tiny/blobs",
        **{
            "abc.1234.incomplete": b"12",
            "abc.kept.incomplete": b"12345",
            "abd.kept.incomplete": b"",
        },
    )
    assert blobs.exists()
    assert shelf.kept("abc") == 5
    assert shelf.kept("other") == 0


def test_what_is_no_hub(fetch: Fetcher, hub: StandInHub) -> None:
    hub.faults.append(Fault("/api/", "garbage"))
    assert "doesn't answer as a hub does" in fetch().sentence("hub_unreachable", 75)


def test_no_space_is_seen_before_the_download(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub
) -> None:
    tiny.sizes["model.safetensors"] = 1 << 60
    sentence = fetch().sentence("disk_full", 74)
    assert re.fullmatch(
        r"someone/tiny needs 1073741824.0 GiB more on the disk of .*, where [0-9.]+ \w+ are free\.",
        sentence,
    )
    assert not hub.downloads()


def test_a_look_tells_the_size_of_the_weights_and_writes_nothing(
    fetch: Fetcher, hub: StandInHub, tiny: Snapshot, tmp_path: Path
) -> None:
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = b'{"weight_map": {"never": "read"}}'
    files = {name: safetensors(2000) for name in [*shards, "consolidated.safetensors"]}
    written = {"config.json": b"{}", "model.safetensors.index.json": index, **files}
    hub.add("someone/large", write(tmp_path / "large", **written))
    fetch.options = ("--look",)
    for model, names in ((MODEL, ["model.safetensors"]), ("someone/large", shards)):
        found = fetch(model).ready
        assert found is not None
        assert found.files == tuple(names)
        assert found.size == sum(len(files.get(name, safetensors())) for name in names)
    assert not [*fetch.cache.rglob("*")]
    assert fetch("someone/nothing").failed is not None


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["config.json", "pytorch_model.bin"], "only as pickle (pytorch_model.bin)"),
        (["config.json", "tiny.Q4.gguf"], "only in GGUF format"),
        (["config.json", "tf_model.h5"], "only in TensorFlow format"),
        (["README.md"], "has no safetensors weights"),
        (
            ["config.json", "model.safetensors", "1_Dense/config.json", "1_Dense/a.bin"],
            "1_Dense/model.safetensors",
        ),
    ],
)
def test_no_safetensors(
    fetch: Fetcher, hub: StandInHub, tmp_path: Path, files: list[str], words: str
) -> None:
    hub.add(MODEL, write(tmp_path / "other", **dict.fromkeys(files, b"{}")))
    pickled = any(name.endswith(".bin") for name in files)
    refusal = ("repository_refused", 77) if pickled else ("safetensors_missing", 65)
    assert words in fetch().sentence(*refusal)
    assert not hub.downloads()


def test_no_configuration(fetch: Fetcher, hub: StandInHub, tmp_path: Path) -> None:
    hub.add(MODEL, write(tmp_path / "bare", **{"model.safetensors": safetensors()}))
    assert "neither config.json nor modules.json" in fetch().sentence("fetch_failed", 70)


def test_an_index_that_lies(fetch: Fetcher, hub: StandInHub, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "../../../etc/passwd"}}).encode()
    files = {"config.json": b"{}", "model.safetensors.index.json": index}
    hub.add(MODEL, write(tmp_path / "liar", **files))
    assert "isn't among its files" in fetch().sentence("safetensors_missing", 65)


def test_a_transfer_that_breaks_is_taken_up_where_it_broke(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub
) -> None:
    write(tiny.folder, **{"model.safetensors": safetensors(3_000_000)})
    hub.faults.append(Fault(MAIN, "truncate", times=1))
    got = fetch().resolution
    assert Path(got.folder, "model.safetensors").read_bytes() == tiny.data("model.safetensors")
    assert [s.range for s in hub.seen if s.range], "with a range, not from the start"


def test_a_transfer_that_stalls_is_taken_up(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub
) -> None:
    hub.faults.append(Fault(MAIN, "stall", times=1))
    assert fetch(HF_HUB_DOWNLOAD_TIMEOUT="1").resolution.files == WANTED


def test_a_file_of_another_size_than_listed_is_no_model(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub
) -> None:
    tiny.sizes["vocab.txt"] = 5
    sentence = fetch().sentence("fetch_failed", 70)
    assert "vocab.txt of someone/tiny arrived twice with 6 bytes where the hub lists 5" in sentence
    assert fetch(HF_HUB_OFFLINE="1").failed is not None, "it isn't published"
    tiny.sizes.clear()
    assert fetch().resolution.files == WANTED


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.txt"], ids=["large", "small"])
def test_wrong_bytes_are_seen_and_fetched_again(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub, name: str
) -> None:
    place = rf"/(content|resolve)/.*(?<!_Dense)/{re.escape(name)}$"
    hub.faults.append(Fault(place, "corrupt", method="GET", times=1))
    got = fetch().resolution
    assert Path(got.folder, name).read_bytes() == tiny.data(name)


def test_bytes_that_stay_wrong_are_no_model(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub
) -> None:
    hub.faults.append(Fault(MAIN, "corrupt", method="GET"))
    sentence = fetch().sentence("fetch_failed", 70)
    assert "model.safetensors of someone/tiny arrived twice with other content" in sentence
    assert fetch(HF_HUB_OFFLINE="1").failed is not None, "it isn't published"
    hub.faults.clear()
    assert fetch().resolution.files == WANTED


def test_a_commit_is_asked_for_until_it_has_been_verified(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub
) -> None:
    first = fetch(MODEL, tiny.commit).resolution
    asked = len(hub.seen)
    assert fetch(MODEL, tiny.commit).resolution == first
    assert len(hub.seen) == asked
    # As a kill before the verification, or whoever filled this cache, would leave it.
    (fetch.cache / "models--someone--tiny/refs" / tiny.commit).unlink()
    weights = Path(first.folder, "model.safetensors").resolve()
    weights.write_bytes(bytes(len(weights.read_bytes())))
    assert fetch(MODEL, tiny.commit).resolution == first
    assert weights.read_bytes() == tiny.data("model.safetensors")


def test_what_a_killed_fetcher_got_is_not_fetched_again(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub
) -> None:
    write(tiny.folder, **{"model.safetensors": safetensors(3_000_000)})
    hub.faults.append(Fault(MAIN, "stall", method="GET", times=1))
    process, ours = fetch.start(MODEL, "", {})
    blobs = fetch.cache / "models--someone--tiny/blobs"
    with process, ours:
        until(
            lambda: any(part.stat().st_size > 1_000_000 for part in blobs.glob("*.incomplete")),
            "some of it has come",
            20,
        )
        process.send_signal(signal.SIGKILL)
    assert fetch(HF_HUB_OFFLINE="1").failed is not None
    run = fetch()
    assert run.resolution.files == WANTED
    assert Path(run.resolution.folder, "model.safetensors").read_bytes() == tiny.data(
        "model.safetensors"
    )
    [rest] = [seen.range for seen in hub.seen if seen.range and re.search(MAIN, seen.path)]
    assert int(rest.removeprefix("bytes=").removesuffix("-")) > 1_000_000
    assert not list(blobs.glob("*.incomplete"))
    last = run.progress[-1]
    assert last.done is not None
    assert last.done == last.total == run.resolution.size
    assert all((each.done or 0) <= (last.done or 0) for each in run.progress)


def test_what_had_arrived_before_the_network_failed_is_kept(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub
) -> None:
    write(tiny.folder, **{"model.safetensors": safetensors(3_000_000)})
    hub.faults.append(Fault(MAIN, "truncate", method="GET", times=1))
    hub.faults.append(Fault(MAIN, method="GET", status=503, times=20))
    assert fetch().failed is not None
    hub.faults.clear()
    hub.seen.clear()
    assert fetch().resolution.files == WANTED
    ranges = [
        seen.range for seen in hub.seen if re.search(MAIN, seen.path) and seen.method == "GET"
    ]
    assert all(ranges), "with a range, not from the start"


def test_a_cache_that_cannot_be_written(fetch: Fetcher, tiny: Snapshot) -> None:
    fetch.cache.write_bytes(b"a file where a folder should be")
    sentence = fetch().sentence("fetch_failed", 70)
    assert "can't be written to the cache" in sentence
    assert os.strerror(errno.EEXIST) in sentence


# -- under a keeper, as the daemon runs it ----------------------------------------------


class Daemon:
    """The part of the daemon that downloads: the hub, and fetchers under real keepers."""

    def __init__(self, folder: Path, fetch: Fetcher, stall_seconds: float) -> None:
        self.log = folder / "fetcher.log"
        self.running: list[Running] = []
        self._one_shot = OneShot(reactor)
        self.hub = Hub(
            cache=fetch.cache,
            imported=folder / "imported",
            settings=config.Hub(stall_seconds=stall_seconds),
            environment=fetch.environment,
            spawn=self._spawn,
            reactor=reactor,
        )

    def _spawn(
        self,
        name: str,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        receive: Callable[[wire.Frame], None],
    ) -> Running:
        life_log = LifeLog(self.log, clock=time.time, size=1 << 20, rate=1 << 20)
        running = self._one_shot.run(name, arguments, environment, receive, life_log)
        self.running.append(running)
        return running


@ensureDeferred
async def test_the_hub_downloads_by_a_fetcher_under_a_keeper(
    fetch: Fetcher, tiny: Snapshot, tmp_path: Path
) -> None:
    daemon = Daemon(tmp_path, fetch, 30)
    progress: list[Progress] = []
    model = Reference.parse(MODEL)
    both = gatherResults([daemon.hub.resolve(model, progress.append) for _ in range(2)])
    first, second = await both
    assert first == second
    assert first.files == WANTED
    assert progress[-1].done == first.size
    assert len(daemon.running) == 1
    (entry,) = await daemon.hub.catalogue()
    assert (entry.name, entry.commit, entry.size) == (MODEL, tiny.commit, first.size)
    with pytest.raises(RevisionNotFound, match="has no revision 'v9'"):
        await daemon.hub.resolve(Reference.parse(MODEL + "@v9"), progress.append)
    await daemon.hub.stop()


@pytest.mark.parametrize(
    "fault", [Fault(MAIN, "stall"), Fault("/api/", "hold", at=0.0)], ids=["midway", "at once"]
)
@ensureDeferred
async def test_the_hub_gives_up_a_download_that_stalls(
    fetch: Fetcher, tiny: Snapshot, hub: StandInHub, tmp_path: Path, fault: Fault
) -> None:
    hub.faults.append(fault)
    daemon = Daemon(tmp_path, fetch, 3)
    with pytest.raises(HubUnreachable, match="made no progress for 3 seconds"):
        await daemon.hub.resolve(Reference.parse(MODEL), lambda _: None)
    # The Deferred fires only when nothing of the fetcher is left.
    assert daemon.running[0].finished.called
    await daemon.hub.stop()


def test_only_what_is_allowed_comes_besides_data(
    tmp_path: Path, hub: StandInHub, tiny: Snapshot
) -> None:
    trusting = Fetcher(tmp_path, hub, "--trust-remote-code", "--allow-pickle")
    # There are safetensors: no pickle is needed.
    run = trusting()
    assert run.resolution.files == tuple(sorted((*WANTED, "modeling_tiny.py")))
    (tiny.folder / "model.safetensors").unlink()
    hub.add(MODEL, tiny.folder)
    refused = Fetcher(tmp_path, hub)()
    assert refused.failed is not None
    assert refused.failed.code == "repository_refused"
    assert refused.status == 77
    run = trusting()
    assert "pytorch_model.bin" in run.resolution.files
    assert Path(run.resolution.folder, "pytorch_model.bin").read_bytes() == b"\x80\x04pickle"
    assert not Path(run.resolution.folder, "openvino").exists()
