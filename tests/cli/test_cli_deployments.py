"""``tursi up``, ``down`` and ``ps`` against scripted answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import until
from scripted_api import Api, Reply, child, deployment, refusal, scripted_api, worker

import tursi.cli.deployments
from tursi.cli.connection import Exit

TURSI = "from tursi.cli import main; main(prog_name='tursi')"


@pytest.fixture
def api() -> Iterator[Api]:
    with scripted_api() as running:
        yield running


def created(status: dict[str, object], outcome: str = "created") -> Reply:
    return Reply({"deployment": status, "outcome": outcome}, 201 if outcome == "created" else 200)


def progress(
    stage: str,
    done: float | None = None,
    total: float | None = None,
    unit: str = "bytes",
    **files: int,
) -> dict[str, object]:
    return {"stage": stage, "done": done, "total": total, "unit": unit, **files}


# -- up ---------------------------------------------------------------------------


def test_up_waits_with_a_line_per_stage_and_says_when_it_is_ready(api: Api) -> None:
    fetching = progress("download", 1 << 20, 4 << 20)
    api.on("POST", "/deployments", created(deployment("queued", workers=[])))
    api.on(
        "GET",
        "/deployments/mini",
        deployment("queued", workers=[], progress=progress("resolve")),
        deployment("queued", workers=[], progress=fetching),
        deployment("loading"),
        deployment("loading", progress=progress("import")),
        deployment("loading", progress=progress("read", 2**20, 2**22, part=1, parts=2)),
        deployment("loading", progress=progress("load", 3, 12, "tensors")),
        deployment("warming", progress=progress("warm")),
        deployment(),
    )
    result = api.tursi("up", "org/mini")
    assert result.exit_code == Exit.OK, result.output
    assert result.stdout.splitlines() == [
        "mini: created from org/mini.",
        "mini is ready (feature-extraction, cpu, float32).",
    ]
    assert result.stderr.splitlines() == [
        "mini: waiting for its turn",
        "mini: asking the hub",
        "mini: fetching: 1 MiB of 4 MiB (25 %)",
        "mini: starting the worker",
        "mini: reading the weights: 1 MiB of 4 MiB (25 %), file 1 of 2",
        "mini: loading: 3 of 12 tensors (25 %)",
        "mini: warming up",
    ]
    assert api.asked[0].body == {"model": "org/mini"}


def test_up_with_a_name_and_options_puts_them(api: Api) -> None:
    api.on("PUT", "/deployments/other", created(deployment(name="other"), "replaced"))
    options = ("--task", "embedding", "--device", "cuda:1", "--dtype", "float16", "--replicas", "2")
    given = (*options, "--quantize", "int4")
    result = api.tursi("up", "org/mini@v2", "--name", "other", *given)
    assert result.exit_code == Exit.OK, result.output
    assert api.asked[0].body == {
        "model": "org/mini@v2",
        "task": "embedding",
        "device": "cuda:1",
        "dtype": "float16",
        "quantization": "int4",
        "replicas": 2,
    }


def test_up_asks_for_limits(api: Api) -> None:
    api.on("POST", "/deployments", created(deployment()))
    options = ("--memory", "1.5GiB", "--cpu", "0.5", "--threads", "2", "--files", "100")
    assert api.tursi("up", "org/mini", *options, "--processes", "64").exit_code == Exit.OK
    assert api.asked[0].body == {
        "model": "org/mini",
        "limits": {
            "memory": 3 * 2**29,
            "cpu": 0.5,
            "threads": 2,
            "files": 100,
            "processes": 64,
        },
    }


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2**31), ("2G", 2**31), ("2g", 2**31), ("2 GB", 2 * 10**9), ("512MiB", 2**29),
        ("300MB", 3 * 10**8), ("64k", 2**16), ("1073741824", 2**30), ("100B", 100), ("1T", 2**40),
    ],
)  # fmt: skip
def test_sizes(api: Api, text: str, size: int) -> None:
    api.on("POST", "/deployments", created(deployment()))
    assert api.tursi("up", "org/mini", "--memory", text).exit_code == Exit.OK
    assert api.asked[0].body["limits"] == {"memory": size}


@pytest.mark.parametrize(
    ("text", "sent"),
    [("2", {"replicas": 2}), ("1-4", {"replicas": 1, "max_replicas": 4}), ("3..3", None)],
)
def test_numbers_and_ranges_of_replicas(api: Api, text: str, sent: dict[str, int] | None) -> None:
    api.on("POST", "/deployments", created(deployment()))
    assert api.tursi("up", "org/mini", "--replicas", text).exit_code == Exit.OK
    expected = sent or {"replicas": 3, "max_replicas": 3}
    body = api.asked[0].body
    assert {key: body[key] for key in body if "replicas" in key} == expected


@pytest.mark.parametrize("text", ["0", "4-1", "1-65", "many", "1-", "-1"])
def test_no_numbers_of_replicas(api: Api, text: str) -> None:
    assert api.tursi("up", "org/mini", f"--replicas={text}").exit_code == Exit.USAGE
    assert not api.asked


def test_ps_shows_a_range(api: Api) -> None:
    ranged = deployment(replicas=2, min_replicas=1, max_replicas=4)
    api.on("GET", "/deployments", {"deployments": [ranged]})
    assert " 1 of 1-4 " in api.tursi("ps").stdout


@pytest.mark.parametrize("text", ["", "much", "-1G", "2GiBs", "1e9", "G", "0x10", "inf", "1 2"])
def test_no_sizes(api: Api, text: str) -> None:
    result = api.tursi("up", "org/mini", "--memory", text)
    assert result.exit_code == Exit.USAGE
    assert "is no size" in result.stderr
    assert not api.asked


@pytest.mark.parametrize("option", ["--keep-alive", "--cpu", "--timeout"])
@pytest.mark.parametrize("text", ["nan", "inf", "1e999", "-2"])
def test_no_numbers(api: Api, option: str, text: str) -> None:
    assert api.tursi("up", "org/mini", f"{option}={text}").exit_code == Exit.USAGE
    assert not api.asked


@pytest.mark.parametrize("text", ["ten", "10 m", "-1m", ""])
def test_no_time_to_stay(api: Api, text: str) -> None:
    assert api.tursi("up", "org/mini", f"--keep-alive={text}").exit_code == Exit.USAGE
    assert not api.asked


@pytest.mark.parametrize(
    ("text", "seconds"), [("600", 600), ("10m", 600), ("1h30m", 5400), ("0", 0), ("-1", -1)]
)
def test_how_long_a_model_stays(api: Api, text: str, seconds: float) -> None:
    api.on("POST", "/deployments", created(deployment()))
    assert api.tursi("up", "org/mini", "--no-wait", "--keep-alive", text).exit_code == 0
    assert api.asked[0].body["keep_alive"] == seconds


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        ("unchanged", "mini: nothing to do, it is serving (generation 1)."),
        ("replaced", "mini: changed, generation 1 takes over when it is ready."),
        ("scaled", "mini: scaled to 1 replica."),
        ("back", "mini: stays at generation 1, which serves."),
        ("started", "mini: started again (generation 1)."),
        ("retried", "mini: nothing has changed, but it had failed; it tries again."),
    ],
)
def test_up_says_what_came_of_it(api: Api, outcome: str, said: str) -> None:
    api.on("POST", "/deployments", created(deployment(), outcome))
    result = api.tursi("up", "org/mini")
    assert (result.exit_code, result.stdout) == (Exit.OK, f"{said}\n")


def test_up_of_an_existing_folder_sends_its_absolute_path(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "mini").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "org")
    api.on("POST", "/deployments", created(deployment()))
    for text in ("mini", "./mini", "../org/mini/", str(tmp_path / "org" / "mini")):
        assert api.tursi("up", text).exit_code == Exit.OK
        assert api.asked[-1].body == {"model": str(tmp_path / "org" / "mini")}


@pytest.mark.parametrize("text", ["./absent", "/absent", "~/absent", "a b", "x/y/z", "a\0b", ""])
def test_up_refuses_what_can_be_no_model(api: Api, text: str) -> None:
    result = api.tursi("up", text)
    assert result.exit_code == Exit.USAGE
    assert api.asked == []


def test_up_refuses_a_file_and_a_bad_name(api: Api, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    result = api.tursi("up", str(file))
    assert result.exit_code == Exit.USAGE
    assert "is a file; a model is a folder" in result.stderr
    assert api.tursi("up", "org/mini", "--name", "no/slash").exit_code == Exit.USAGE
    assert api.asked == []


def test_up_gives_the_reason_in_one_line_when_the_model_fails(api: Api) -> None:
    reason = "The weights are damaged.\nTraceback \x1b[31m"
    failed = worker("failed", reason=reason, failure="weights")
    api.on("POST", "/deployments", created(deployment("spawning")))
    api.on("GET", "/deployments/mini", deployment("failed", reason=reason, workers=[failed]))
    result = api.tursi("up", "org/mini")
    assert result.exit_code == Exit.DEPLOYMENT_FAILED
    assert result.stderr.splitlines()[-1] == (
        "tursi: mini failed: The weights are damaged.\\x0aTraceback \\x1b[31m"
    )


def test_up_fails_when_one_replica_of_several_fails(api: Api) -> None:
    workers = [worker(), worker("quarantined", replica=1, reason="It crashed 5 times.")]
    api.on("POST", "/deployments", created(deployment(replicas=2, workers=workers)))
    result = api.tursi("up", "org/mini", "--replicas", "2")
    assert result.exit_code == Exit.DEPLOYMENT_FAILED
    assert "It crashed 5 times." in result.stderr


def test_up_waits_for_replicas_that_are_not_there_yet(api: Api) -> None:
    api.on("POST", "/deployments", created(deployment(replicas=2), "scaled"))
    both = [worker(), worker(replica=1)]
    api.on("GET", "/deployments/mini", deployment(replicas=2, ready=2, workers=both))
    result = api.tursi("up", "org/mini", "--replicas", "2")
    assert (result.exit_code, result.stderr) == (Exit.OK, "mini: 1 of 2 replicas ready\n")


def test_up_waits_for_the_new_generation_while_the_old_one_serves(api: Api) -> None:
    old, new = worker(), worker("loading", generation=2)
    api.on(
        "POST",
        "/deployments",
        created(deployment("loading", generation=2, ready=1, workers=[old, new]), "replaced"),
    )
    both = [old, worker(generation=2)]
    api.on("GET", "/deployments/mini", deployment(generation=2, ready=2, workers=both))
    result = api.tursi("up", "org/mini", "--dtype", "bfloat16")
    assert result.exit_code == Exit.OK
    assert result.stdout.splitlines()[0] == (
        "mini: changed, generation 2 takes over when it is ready."
    )
    assert "mini: starting the worker" in result.stderr


def test_up_shows_why_it_is_tried_again_and_stops_waiting_in_time(api: Api) -> None:
    waiting = deployment(
        "backoff",
        workers=[],
        reason="The hub can't be reached.",
        next_try_at="2026-01-02T03:04:05Z",
    )
    api.on("POST", "/deployments", created(waiting))
    api.on("GET", "/deployments/mini", waiting)
    result = api.tursi("up", "org/mini", "--timeout", "0.5")
    assert result.exit_code == Exit.TRY_LATER
    assert result.stderr.startswith("mini: The hub can't be reached. Next try at ")
    assert "it goes on coming up" in result.stderr


def test_up_ends_when_somebody_stops_or_removes_the_deployment(api: Api) -> None:
    api.on("POST", "/deployments", created(deployment("loading")))
    api.on("GET", "/deployments/mini", deployment("draining", desired="stopped"))
    assert api.tursi("up", "org/mini").exit_code == Exit.DEPLOYMENT_FAILED
    api.on("GET", "/deployments/mini", refusal(404, "deployment_not_found", "It is gone."))
    assert api.tursi("up", "org/mini").exit_code == Exit.NOT_FOUND


def test_up_without_waiting_returns_at_once(api: Api) -> None:
    api.on("POST", "/deployments", created(deployment("queued", workers=[])))
    result = api.tursi("up", "org/mini", "--no-wait", "--json")
    assert result.exit_code == Exit.OK
    assert json.loads(result.stdout)["deployment"]["phase"] == "queued"
    assert len(api.asked) == 1


def test_up_prints_the_last_status_as_json(api: Api) -> None:
    api.on("POST", "/deployments", created(deployment("loading")))
    api.on("GET", "/deployments/mini", deployment())
    result = api.tursi("up", "org/mini", "--json")
    assert json.loads(result.stdout) == {"deployment": deployment(), "outcome": "created"}


def test_up_shows_the_daemons_refusal(api: Api) -> None:
    api.on("POST", "/deployments", refusal(400, "invalid_request", "The dtype 'x' is unknown."))
    result = api.tursi("up", "org/mini", "--dtype", "x")
    assert (result.exit_code, result.stderr) == (1, "tursi: The dtype 'x' is unknown.\n")


def test_ctrl_c_in_up_leaves_the_deployment_to_come_up_and_says_so(api: Api) -> None:
    api.on("POST", "/deployments", created(deployment("loading")))
    api.on("GET", "/deployments/mini", deployment("loading"))
    command = [sys.executable, "-c", TURSI, "--socket", str(api.socket), "up", "org/mini"]
    with child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        until(lambda: len(api.asked) > 2 or process.poll() is not None, "it waits", 30)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == Exit.INTERRUPTED
    assert stdout == b"mini: created from org/mini.\n"
    assert stderr.decode().splitlines() == [
        "mini: starting the worker",
        (
            "Not waiting any longer; mini goes on coming up. `tursi ps` shows it, "
            "`tursi down mini` removes it."
        ),
    ]
    assert [each.method for each in api.asked if each.method != "GET"] == ["POST"]


def test_up_on_a_terminal_shows_a_bar(api: Api) -> None:
    api.on("POST", "/deployments", created(deployment("loading")))
    half = deployment("queued", workers=[], progress=progress("download", 5 << 20, 10 << 20))
    api.on("GET", "/deployments/mini", half, half, deployment())
    command = [sys.executable, "-c", TURSI, "--socket", str(api.socket), "up", "org/mini"]
    master, slave = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with child(command, stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        shown = b""
        try:
            while piece := os.read(master, 4096):
                shown += piece
        except OSError:
            pass  # Linux's way to say that the other end of a terminal is closed.
        os.close(master)
    assert process.returncode == Exit.OK
    assert "mini: fetching: 5 MiB of 10 MiB (50 %)" in shown.decode()
    assert "mini is ready" in shown.decode()


# -- down -------------------------------------------------------------------------


def test_down_waits_until_the_workers_are_gone(api: Api) -> None:
    api.on("DELETE", "/deployments/mini", Reply(deployment("draining"), 202))
    gone = refusal(404, "deployment_not_found", "There is no deployment 'mini'.")
    api.on("GET", "/deployments/mini", deployment("draining"), gone)
    result = api.tursi("down", "mini")
    assert (result.exit_code, result.output) == (Exit.OK, "mini is removed.\n")
    assert [each.method for each in api.asked] == ["DELETE", "GET", "GET"]


def test_down_says_when_the_workers_do_not_end(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tursi.cli.deployments, "GONE_SECONDS", 0.3)
    api.on("DELETE", "/deployments/mini", Reply(deployment("draining"), 202))
    api.on("GET", "/deployments/mini", deployment("killing"))
    result = api.tursi("down", "mini")
    assert result.exit_code == Exit.TRY_LATER
    assert "its workers have not ended" in result.stderr


def test_down_of_an_unknown_deployment_has_its_own_exit_code(api: Api) -> None:
    api.on("DELETE", "/deployments/a%2Fb", refusal(404, "deployment_not_found", "No such."))
    result = api.tursi("down", "a/b", "--json")
    assert (result.exit_code, result.stderr) == (Exit.NOT_FOUND, "tursi: No such.\n")


# -- ps ---------------------------------------------------------------------------


def test_ps_lists_deployments_with_the_reasons_of_those_that_fail(api: Api) -> None:
    failed = deployment("failed", name="broken", reason="No safetensors [b]here[/b].", workers=[])
    api.on("GET", "/deployments", {"deployments": [deployment(), failed]})
    lines = api.tursi("ps").output.splitlines()
    assert lines[0].split() == [
        "NAME", "TASK", "PHASE", "READY", "DEVICE", "MEMORY", "BUSY", "QUEUED", "MODEL",
    ]  # fmt: skip
    assert lines[1].split() == [
        "mini", "feature-extraction", "ready", "1/1", "cpu", "300", "MiB", "0", "0", "org/mini",
    ]  # fmt: skip
    assert lines[3] == "broken: No safetensors [b]here[/b]."


def test_ps_shows_the_memory_of_gpus_where_there_is_any(api: Api) -> None:
    worker = {"rss": 2**20, "gpus": {"cuda:0": 2**31, "cuda:1": 2**30}}
    api.on("GET", "/deployments", {"deployments": [deployment(workers=[worker])]})
    head, row = api.tursi("ps").output.splitlines()
    assert head.split()[5:7] == ["MEMORY", "GPU"]
    assert "3.0 GiB" in row


def test_ps_shows_until_when_those_stay_that_come_by_themselves(api: Api) -> None:
    lazy = deployment(name="lazy", unloads_at="2026-01-02T03:04:05Z")
    kept = deployment(name="kept", pinned=True)
    api.on("GET", "/deployments", {"deployments": [deployment(), lazy, kept]})
    lines = api.tursi("ps").output.splitlines()
    assert lines[0].split()[-2:] == ["UNTIL", "MODEL"]
    assert lines[1].split()[-2:] == ["0", "org/mini"]
    assert lines[2].split()[-3].startswith("2026-01-0")
    assert lines[3].split()[-2:] == ["pinned", "org/mini"]


@pytest.mark.parametrize(
    ("phase", "progress", "shown"),
    [
        ("queued", {"stage": "download", "done": 43, "total": 100}, "fetching 43 %"),
        ("queued", {"stage": "resolve", "done": None}, "asking the hub"),
        ("loading", {"stage": "load", "done": 1, "total": 3}, "loading 33 %"),
        ("loading", {"stage": "import"}, "starting the worker"),
        ("queued", None, "queued"),
        ("ready", None, "ready"),
    ],
)  # fmt: skip
def test_ps_shows_how_far_it_is(
    api: Api, phase: str, progress: dict[str, object] | None, shown: str
) -> None:
    api.on("GET", "/deployments", {"deployments": [deployment(phase, progress=progress)]})
    assert f" {shown} " in api.tursi("ps").output


def test_ps_escapes_what_could_take_over_the_terminal(api: Api) -> None:
    nasty = deployment(model="/m/\x1b]0;owned\x07\x9b2J\u202e\ud800", name="a\rb")
    api.on("GET", "/deployments", {"deployments": [nasty]})
    output = api.tursi("ps").output
    assert "/m/\\x1b]0;owned\\x07\\x9b2J\\u202e\\ud800" in output
    assert "a\\x0db" in output


def test_ps_without_deployments_says_how_to_make_one(api: Api) -> None:
    api.on("GET", "/deployments", {"deployments": []})
    assert "tursi up MODEL" in api.tursi("ps").output
    assert json.loads(api.tursi("ps", "--json").output) == {"deployments": []}


def test_what_a_model_may_bring_is_asked_for_and_its_risk_said(api: Api) -> None:
    risky = deployment(allow_pickle=True, trust_remote_code=True)
    api.on("POST", "/deployments", created(risky))
    result = api.tursi("up", "org/mini", "--allow-pickle", "--trust-remote-code")
    assert result.exit_code == Exit.OK, result.output
    asked = api.asked[0].body
    assert asked == {"model": "org/mini", "allow_pickle": True, "trust_remote_code": True}
    assert "mini may load pickle files" in result.stderr
    assert "mini may run Python code" in result.stderr
    api.on("GET", "/deployments", {"deployments": [risky]})
    assert "mini may run Python code" in api.tursi("ps").stdout
    api.on("POST", "/deployments", created(deployment()))
    api.tursi("up", "org/mini")
    assert api.asked[-1].body == {"model": "org/mini"}


def test_up_dry_run_shows_the_figures(api: Api) -> None:
    estimate = {
        "size": 9, "parameters": 22_713_216, "dtype": "float32", "weights": 2**27,
        "activations": 2**25, "cache": 2**26, "from_headers": True,
    }  # fmt: skip
    none = {"load": None, "warm": None, "busy": None}
    footprint = {
        "device": "cuda", "host": 2**30, "host_settled": 2**29, "gpu": 2**31,
        "estimate": estimate, "host_peaks": none, "gpu_peaks": none,
    }  # fmt: skip
    rooms = [
        {"device": "host", "total": 2**35, "free": 2**34, "name": None},
        {"device": "cuda:0", "total": 2**36, "free": 2**33, "name": "H100"},
    ]
    found = {
        "verdict": "in_place", "message": "It fits only in the place of ...", "memory": 2**30,
        "measured": False, "gives_back": 2**29, "free": 2**34, "limit": 2**35,
        "footprint": footprint, "rooms": rooms,
    }  # fmt: skip
    api.on("POST", "/deployments", found)
    assert api.tursi("up", "org/mini", "--dry-run").stdout.splitlines()[1:] == [
        "  parameters      22,713,216 in float32",
        "  weights         128 MiB",
        "  activations     32 MiB at most",
        "  cache           64 MiB for texts that are generated",
        "  each worker     1.0 GiB of host memory, 512 MiB once it is loaded",
        "                  2.0 GiB of GPU memory (cuda)",
        "  measured        never yet, so that this is an estimate",
        "  gives back      512 MiB when the old workers have gone",
        "  free on host    16.0 GiB of 32.0 GiB",
        "  free on cuda:0  8.0 GiB of 64.0 GiB (H100)",
        "  limit           32.0 GiB for all models together",
    ]
    footprint["host_peaks"] = {"load": 2**30, "warm": 2**29, "busy": None}
    found |= {"measured": True, "free": 0}
    told = api.tursi("up", "org/mini", "--dry-run").stdout.splitlines()
    assert "  measured        1.0 GiB while loading, 512 MiB when ready" in told
    # It is the limit that leaves nothing, and not the machine.
    assert "  free on host    16.0 GiB of 32.0 GiB" in told
    assert "  limit           32.0 GiB for all models together, 0 B left" in told


def test_up_dry_run_only_tells_whether_there_is_room(api: Api) -> None:
    found = {"verdict": "evicts", "message": "It fits if other is unloaded: ...", "memory": 1}
    api.on("POST", "/deployments", found)
    api.on("PUT", "/deployments/mine", found)
    result = api.tursi("up", "org/mini", "--dry-run")
    assert (result.exit_code, result.stdout) == (Exit.OK, f"{found['message']}\n")
    assert api.asked[-1].parameters == {"dry_run": "1"}
    shown = json.loads(api.tursi("up", "org/mini", "--name", "mine", "--dry-run", "--json").stdout)
    assert shown == found
