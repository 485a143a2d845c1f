"""``tursi history``, ``diff``, ``rollback`` and ``apply`` against scripted answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_api import Api, Reply, deployment, refusal, scripted_api

from tursi.cli.connection import Exit


def generation(number: int, *, commit: str | None = None, **request: Any) -> dict[str, Any]:
    limits = {"memory": None, "cpu": None, "threads": None, "files": None, "processes": None}
    asked = {"model": "org/mini", "task": None, "device": "auto", "dtype": "auto"}
    asked["quantization"] = "none"
    return {
        "number": number,
        "created_at": "2026-01-02T03:04:05Z",
        "created_by": "uid 0",
        "request": {**asked, "limits": limits, **request},
        "resolution": commit and {"folder": "/cache", "commit": commit, "task": "fill-mask"},
        "turns": [],
    }


def turn(fate: str, minute: int, reason: str | None = None) -> dict[str, Any]:
    return {"fate": fate, "at": f"2026-01-02T03:{minute:02}:05Z", "reason": reason}


@pytest.fixture
def api() -> Iterator[Api]:
    with scripted_api() as running:
        running.on(
            "GET",
            "/deployments/mini/generations",
            {
                "generations": [
                    generation(1, commit="a" * 40),
                    generation(2, dtype="float16", limits={"memory": 2**30}),
                    generation(3, commit="b" * 40),
                ]
            },
        )
        yield running


def test_history_shows_what_each_generation_was(api: Api) -> None:
    result = api.tursi("history", "mini")
    assert result.exit_code == Exit.OK, result.output
    header, first, second, third = result.stdout.splitlines()
    columns = ["GENERATION", "WHEN", "BY", "TASK", "DEVICE", "DTYPE", "COMMIT", "MODEL", "OUTCOME"]
    assert header.split() == columns
    assert first.split()[-6:] == ["fill-mask", "auto", "auto", "a" * 12, "org/mini", "-"]
    assert second.split()[-6:] == ["-", "auto", "float16", "-", "org/mini", "-"]
    assert third.startswith("3 ")
    assert len(json.loads(api.tursi("history", "mini", "--json").stdout)["generations"]) == 3


def test_history_tells_smaller_weights(api: Api) -> None:
    known = [generation(1, dtype="bfloat16", quantization="int8")]
    api.on("GET", "/deployments/mini/generations", {"generations": known})
    assert "  bfloat16, int8  " in api.tursi("history", "mini").stdout


def test_history_says_what_became_of_each_generation(api: Api) -> None:
    turns = [
        [turn("serving", 1), turn("replaced", 9, "by generation 2")],
        [turn("failed", 2, "It broke."), turn("retried", 3, "uid 0"), turn("serving", 4)],
        [turn("failed", 5, "It broke.")],
        [turn("given-up", 6, "key 3")],
        [turn("serving", 7), turn("rolled-back", 8, "by generation 6")],
    ]
    known = [{**generation(number), "turns": each} for number, each in enumerate(turns, 1)]
    api.on("GET", "/deployments/mini/generations", {"generations": known})
    found = [
        text.partition("org/mini")[2].strip()
        for text in api.tursi("history", "mini").stdout.splitlines()
    ]
    assert found[1:] == [
        "replaced by generation 2, after 8 min",
        "serves",
        "failed: It broke.",
        "given up by key 3",
        "rolled back by generation 6, after 60 s",
    ]


CANARY = {
    "generation": 2, "weight": 10, "phase": "ready", "ready": 1, "model": "org/other",
    "reason": None, "requests": 20, "errors": 1,
}  # fmt: skip


def test_a_canary_is_deployed_weighed_and_promoted(api: Api) -> None:
    both = deployment()
    both["workers"].append({**both["workers"][0], "generation": 2, "phase": "loading"})
    loading = {**both, "canary": {**CANARY, "phase": "loading", "requests": 0}, "stable": 1}
    api.on("PUT", "/deployments/mini", {"deployment": loading, "outcome": "replaced"})
    api.on("GET", "/deployments/mini", {**deployment(generation=1), "canary": None})
    command = ("up", "org/other", "--name", "mini", "--canary", "10")
    result = api.tursi(*command)
    # It went by itself while we waited.
    assert result.exit_code == Exit.DEPLOYMENT_FAILED
    assert "Generation 2 of mini is given up, generation 1 serves" in result.stderr
    assert result.stdout.startswith("mini: generation 2 gets 10 % of the requests when it is ready")
    api.on("PUT", "/deployments/mini", {"deployment": loading, "outcome": "unchanged"})
    same = api.tursi(*command[:-2], "--no-wait").stdout
    assert same.startswith("mini: nothing to do, generation 2 is a canary with 10 %")
    assert api.asked[0].body["canary"] == 10
    ready = deployment()
    ready["workers"].append({**ready["workers"][0], "generation": 2})
    api.on("GET", "/deployments/mini", {**ready, "canary": CANARY})
    assert api.tursi(*command).exit_code == Exit.OK
    api.on("GET", "/deployments", {"deployments": [{**ready, "canary": CANARY}]})
    assert api.tursi("ps").stdout.splitlines()[-1] == (
        "mini: generation 2 (org/other) is a canary with 10 % of the requests; it is ready, "
        "20 requests, 1 failed."
    )
    weighed = {**ready, "canary": {**CANARY, "weight": 50}}
    api.on("POST", "/deployments/mini/canary", Reply(weighed, 202))
    said = api.tursi("canary", "mini", "50")
    assert said.stdout == "mini: generation 2 gets 50 % of the requests.\n"
    assert api.asked[-1].body == {"weight": 50}
    assert json.loads(api.tursi("canary", "mini", "50", "--json").stdout)["canary"]["weight"] == 50
    assert api.tursi("canary", "mini", "101").exit_code == Exit.USAGE
    served = deployment(generation=2)
    served["workers"][0]["generation"] = 2
    api.on("POST", "/deployments/mini/promote", Reply(served, 202))
    assert api.tursi("promote", "mini").stdout == "mini: generation 2 takes over.\n"
    api.on("POST", "/deployments/mini/rollback", {"deployment": deployment(), "outcome": "back"})
    assert "stays at org/mini, generation 1" in api.tursi("rollback", "mini").stdout


def test_who_has_to_make_room_is_told_beforehand(api: Api) -> None:
    served = {**deployment(), "stable": 1}
    api.on(
        "PUT",
        "/deployments/mini",
        {"deployment": served, "outcome": "replaced"},
        {"verdict": "in_place", "message": "It fits only in its place."},
    )
    assert "only in its place" in api.tursi("up", "org/mini", "--name", "mini").stderr


def test_diff_compares_the_last_two_unless_told(api: Api) -> None:
    assert api.tursi("diff", "mini").stdout.splitlines() == [
        "mini, generation 2 to 3:",
        "  dtype: float16 -> auto",
        f"  commit: not set -> {'b' * 40}",
        "  folder: not set -> /cache",
        "  limits.memory: 1073741824 -> not set",
    ]
    assert "  dtype: auto -> float16" in api.tursi("diff", "mini", "1", "2").stdout
    assert json.loads(api.tursi("diff", "mini", "1", "--json").stdout) == {
        "commit": {"from": "a" * 40, "to": "b" * 40}
    }
    assert "no difference" in api.tursi("diff", "mini", "2", "2").stdout
    assert api.tursi("diff", "mini", "9").exit_code == Exit.NOT_FOUND
    assert api.tursi("diff", "mini", "1", "2", "3").exit_code == Exit.USAGE
    api.on("GET", "/deployments/mini/generations", {"generations": [generation(1)]})
    assert api.tursi("diff", "mini").stdout == "mini has one generation only.\n"
    assert json.loads(api.tursi("diff", "mini", "--json").stdout) == {}


def test_rollback_waits_until_it_is_ready(api: Api) -> None:
    back = deployment("queued", generation=4, workers=[])
    api.on("POST", "/deployments/mini/rollback", {"deployment": back, "outcome": "replaced"})
    served = deployment("ready", generation=4)
    served["workers"][0]["generation"] = 4
    api.on("GET", "/deployments/mini", served)
    result = api.tursi("rollback", "mini", "2")
    assert result.exit_code == Exit.OK, result.output
    assert result.stdout.splitlines() == [
        "mini: going back to org/mini, as generation 4.",
        "mini is ready (feature-extraction, cpu, float32).",
    ]
    assert api.asked[0].body == {"generation": 2}
    api.on("POST", "/deployments/mini/rollback", {"deployment": served, "outcome": "unchanged"})
    assert "it already is that" in api.tursi("rollback", "mini").stdout
    assert api.asked[-1].body == {}
    api.on("POST", "/deployments/mini/rollback", refusal(404, "generation_not_found", "No."))
    assert api.tursi("rollback", "mini").exit_code == Exit.NOT_FOUND


FILE = """
[deployments.mini]
model = "org/mini"
task = "fill-mask"
replicas = 2
limits = { memory = 536870912 }

[deployments.fresh]
model = "./weights"
"""


def test_apply_shows_and_does_the_difference(api: Api, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    file = tmp_path / "deployments.toml"
    file.write_text(FILE)
    old = deployment(name="old")
    api.on("GET", "/deployments", {"deployments": [deployment(), old]})
    for name in ("mini", "fresh"):
        status = deployment(name=name)
        api.on("PUT", f"/deployments/{name}", {"deployment": status, "outcome": "replaced"})
    command = ("apply", "-f", str(file), "--prune")
    shown = [
        "change mini",
        "  task: not set -> fill-mask",
        "  replicas: 1 -> 2",
        "  limits.memory: not set -> 536870912",
        "create fresh",
        f"  model: not set -> {tmp_path / 'weights'}",
        "  device: not set -> auto",
        "  dtype: not set -> auto",
        "  replicas: not set -> 1",
        "remove old",
    ]
    assert api.tursi(*command, "--dry-run").stdout.splitlines() == shown
    assert all("dry_run" in asked.parameters for asked in api.asked if asked.method != "GET")
    api.on("DELETE", "/deployments/old", Reply(old, 202))
    result = api.tursi(*command)
    assert result.exit_code == Exit.OK, result.output
    assert result.stdout.splitlines() == [*shown, "Done."]
    bodies = {asked.path: asked.body for asked in api.asked if asked.method == "PUT"}
    assert bodies["/deployments/mini"]["limits"]["memory"] == 536870912
    assert bodies["/deployments/mini"]["replicas"] == 2
    assert bodies["/deployments/fresh"]["model"] == str(tmp_path / "weights")
    [change, *_] = json.loads(api.tursi(*command, "--dry-run", "--json").stdout)["changes"]
    assert change["fields"]["replicas"] == {"from": 1, "to": 2}


def test_apply_of_canaries_and_ranges(api: Api, tmp_path: Path) -> None:
    file = tmp_path / "deployments.toml"

    def changed(text: str, **fields: Any) -> dict[str, Any]:
        file.write_text(f"[deployments.mini]\n{text}\n")
        known = {"generations": [generation(1), generation(2, dtype="float16")]}
        api.on("GET", "/deployments/mini/generations", known)
        api.on("GET", "/deployments", {"deployments": [deployment(**fields)]})
        api.on("PUT", "/deployments/mini", {"verdict": "fits"})
        result = api.tursi("apply", "-f", str(file), "--dry-run", "--json")
        assert result.exit_code == Exit.OK, result.output
        changes = json.loads(result.stdout)["changes"]
        return changes[0]["fields"] if changes else {}

    small = 'model = "org/mini"'
    half = f'{small}\ndtype = "float16"\ncanary = 10'
    as_canary = {"canary": CANARY, "stable": 1}
    assert changed(half) == {
        "dtype": {"from": "auto", "to": "float16"},
        "canary": {"from": None, "to": 10},
    }
    assert changed(half, **as_canary) == {}
    assert changed(half.replace("10", "50"), **as_canary) == {"canary": {"from": 10, "to": 50}}
    assert changed(half, generation=2) == {}
    # It was to take over, and could not or has not yet.
    assert changed(half, generation=2, stable=1) == {"canary": {"from": None, "to": 10}}
    assert changed(small, **as_canary) == {"dtype": {"from": "float16", "to": "auto"}}
    range_ = f'{small}\nreplicas = "1-4"'
    assert changed(range_) == {"max_replicas": {"from": None, "to": 4}}
    assert changed(range_, replicas=2, min_replicas=1, max_replicas=4) == {}
    assert changed(small, replicas=2, min_replicas=1, max_replicas=4) == {
        "max_replicas": {"from": 4, "to": None}
    }
    file.write_text(f'[deployments.mini]\n{small}\nreplicas = "4-1"\n')
    assert api.tursi("apply", "-f", str(file)).exit_code == Exit.USAGE


def test_what_is_as_the_file_says_is_left_alone(api: Api, tmp_path: Path) -> None:
    file = tmp_path / "deployments.toml"
    # The task by its other name, and defaults left out.
    file.write_text('[deployments.mini]\nmodel = "org/mini"\ntask = "embedding"\n')
    known = {"generations": [generation(1, task="feature-extraction")]}
    api.on("GET", "/deployments", {"deployments": [deployment()]})
    api.on("GET", "/deployments/mini/generations", known)
    assert api.tursi("apply", "-f", str(file)).stdout == "Nothing to do.\n"
    api.on("GET", "/deployments", {"deployments": [deployment(desired="stopped")]})
    api.on("PUT", "/deployments/mini", {"verdict": "fits"})
    assert "desired: stopped -> running" in api.tursi("apply", "-f", str(file), "--dry-run").stdout


def test_apply_sets_the_schedule_that_the_file_names(api: Api, tmp_path: Path) -> None:
    file = tmp_path / "deployments.toml"
    file.write_text('[deployments.mini]\nmodel = "org/mini"\nload = "on_demand"\nkeep_alive = 0\n')
    api.on("GET", "/deployments/mini/generations", {"generations": [generation(1)]})
    was = deployment(load="always", keep_alive=None)
    api.on("GET", "/deployments", {"deployments": [was]})
    now = deployment(load="on_demand", keep_alive=0.0)
    api.on("PUT", "/deployments/mini", {"deployment": now, "outcome": "scheduled"})
    assert api.tursi("apply", "-f", str(file)).stdout.splitlines() == [
        "change mini",
        "  load: always -> on_demand",
        "  keep_alive: not set -> 0",
        "Done.",
    ]
    checked, body = [asked.body for asked in api.asked if asked.method == "PUT"]
    assert (body["load"], body["keep_alive"]) == ("on_demand", 0)
    assert checked == body
    api.on("GET", "/deployments", {"deployments": [now]})
    assert api.tursi("apply", "-f", str(file)).stdout == "Nothing to do.\n"
    # A file that says nothing of it leaves it as it is.
    file.write_text('[deployments.mini]\nmodel = "org/mini"\n')
    assert api.tursi("apply", "-f", str(file)).stdout == "Nothing to do.\n"


def test_apply_does_what_it_can_and_tells_all_that_went_wrong(api: Api, tmp_path: Path) -> None:
    file = tmp_path / "deployments.toml"
    names = ("a", "b", "c")
    file.write_text("".join(f'[deployments.{name}]\nmodel = "org/mini"\n' for name in names))
    api.on("GET", "/deployments", {"deployments": []})
    fits = {"verdict": "fits"}
    bad = deployment(name="a", phase="failed", reason="Its weights are damaged.", ready=0)
    api.on("PUT", "/deployments/a", fits, {"deployment": bad, "outcome": "created"})
    api.on("PUT", "/deployments/b", fits, refusal(503, "database_unavailable", "The disk is full."))
    good = deployment(name="c")
    api.on("PUT", "/deployments/c", fits, {"deployment": good, "outcome": "created"})
    result = api.tursi("apply", "-f", str(file))
    assert result.exit_code == Exit.DEPLOYMENT_FAILED, result.output
    assert "b: The disk is full." in result.stderr
    assert "a failed: Its weights are damaged." in result.stderr
    assert "Done." not in result.stdout
    # What the daemon refuses beforehand leaves all as it is.
    api.on("PUT", "/deployments/b", fits)
    api.on("PUT", "/deployments/c", refusal(400, "invalid_request", "There are 2 cores."))
    api.asked.clear()
    result = api.tursi("apply", "-f", str(file))
    assert "c: There are 2 cores." in result.stderr
    assert all("dry_run" in asked.parameters for asked in api.asked if asked.method == "PUT")


def test_apply_tries_again_what_had_failed(api: Api, tmp_path: Path) -> None:
    file = tmp_path / "deployments.toml"
    file.write_text('[deployments.mini]\nmodel = "org/mini"\n')
    api.on("GET", "/deployments/mini/generations", {"generations": [generation(1)]})
    api.on("GET", "/deployments", {"deployments": [deployment(phase="failed")]})
    api.on("PUT", "/deployments/mini", {"deployment": deployment(), "outcome": "retried"})
    assert api.tursi("apply", "-f", str(file)).stdout == "retry mini\nDone.\n"


def test_prune_removes_nothing_for_a_file_that_is_empty(api: Api, tmp_path: Path) -> None:
    file = tmp_path / "deployments.toml"
    file.touch()
    api.on("GET", "/deployments", {"deployments": [deployment()]})
    assert api.tursi("apply", "-f", str(file)).stdout == "Nothing to do.\n"
    result = api.tursi("apply", "-f", str(file), "--prune")
    assert (result.exit_code, result.stdout) == (Exit.USAGE, "")
    file.write_text("[deployments]\n")
    # Somebody else has just removed it.
    gone = refusal(404, "deployment_not_found", "There is no deployment 'mini'.")
    api.on("DELETE", "/deployments/mini", gone)
    api.on("GET", "/deployments/mini", gone)
    assert api.tursi("apply", "-f", str(file), "--prune").stdout == "remove mini\nDone.\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[deployments.mini", "can't be read"),
        ("[http]\n", "may only have tables [deployments.NAME], but has http"),
        ("[deployments.mini]\n", "needs a model"),
        ("[deployments.mini]\nmodel = 5\n", "needs a model"),
        ('[deployments."../x"]\nmodel = "org/mini"\n', "name has 1 to 96"),
        ('[deployments.mini]\nmodel = "../nowhere"\n', "There is no folder"),
        ('[deployments.mini]\nmodel = "org/mini"\nreplica = 2\n', "no field 'replica'; use"),
        ('[deployments.mini]\nmodel = "org/mini"\ntask = "cooking"\n', "cooking"),
        ('[deployments.mini]\nmodel = "org/mini"\nreplicas = 0\n', "1 to 64 replicas"),
        ('[deployments.mini]\nmodel = "org/mini"\nload = "never"\n', "always, on_demand, manual"),
        ('[deployments.mini]\nmodel = "org/mini"\nkeep_alive = "1h"\n', "keep_alive is a number."),
        ('[deployments.mini]\nmodel = "org/mini"\nkeep_alive = inf\n', "seconds up to 31622400"),
        ('[deployments.mini]\nmodel = "org/mini"\nkeep_alive = 1e300\n', "seconds up to 31622400"),
        ('[deployments.mini]\nmodel = "org/mini"\nlimits = { cpu = inf }\n', "no number of cores"),
        ('[deployments.mini]\nmodel = "org/mini"\ntask = []\n', "task is a text."),
        ('[deployments.mini]\nmodel = "org/mini"\ndevice = 3\n', "device is a text."),
        ('[deployments.mini]\nmodel = "org/mini"\nreplicas = true\n', "whole number, or a range"),
        ('[deployments.mini]\nmodel = "org/mini"\ncanary = true\n', "canary is a whole number."),
        ('[deployments.mini]\nmodel = "org/mini"\nallow_pickle = "yes"\n', "is true or false."),
        ('[deployments.mini]\nmodel = "org/mini"\nlimits = 5\n', "limits is a table."),
        (
            '[deployments.mini]\nmodel = "org/mini"\nlimits = { memory = "2G" }\n',
            "limits.memory is a whole number.",
        ),
        (
            '[deployments.mini]\nmodel = "org/mini"\nlimits = { ram = 2 }\n',
            "There is no field 'limits.ram'; use memory, cpu, threads, files, processes.",
        ),
        ('[deployments.mini]\nmodel = ""\n', "must be a folder or a hub name"),
        (f'[deployments.mini]\nmodel = "/{"x" * 300}"\n', "File name too long"),
        (
            '[deployments.mini]\nmodel = "org/mini"\nreplicas = "1-2"\nmax_replicas = 3\n',
            "a range already",
        ),
    ],
)
def test_a_file_that_is_wrong_changes_nothing(
    api: Api, tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "deployments.toml"
    file.write_text(text)
    result = api.tursi("apply", "-f", str(file))
    assert result.exit_code == Exit.USAGE, result.output
    assert said in result.stderr.replace("\n", " ")
    assert api.asked == []
