"""``tursi show`` against scripted answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from scripted_api import Api, refusal, scripted_api

from tursi.cli.connection import Exit

NAMES = (
    "name model task desired phase replicas ready generation device dtype commit reason limits"
    " load keep_alive unloads_at memory quantization min_replicas max_replicas"
)
STATUS: dict[str, Any] = dict.fromkeys(NAMES.split()) | {
    "name": "mini",
    "model": "org/mini",
    "task": "fill-mask",
    "phase": "ready",
    "replicas": 2,
    "ready": 1,
    "generation": 5,
    "device": "cpu",
    "dtype": "float32",
    "limits": {"memory": 2 << 30, "cpu": None},
    "load": "on_demand",
    "keep_alive": 60.0,
    "quantization": "none",
}
CARD: dict[str, Any] = {
    "files": [{"name": f"f{number}", "size": number} for number in range(20)],
    "architecture": "BertForMaskedLM",
    "parameters": 22713728,
    "dtype": "float32",
    "context_length": 256,
    "dimensions": 384,
    "pooling": "mean",
    "normalizes": True,
    "prompts": {"query": "query: "},
    "default_prompt": "query",
    "labels": [],
    "has_chat_template": False,
    "license": "mit",
    "task": "fill-mask",
    "library": None,
}
PEAKS = {"load": 5 << 20, "warm": None, "busy": 7 << 20}
REPORT: dict[str, Any] = {
    "name": "org/mini",
    "folder": "/cache/mini",
    "commit": "a" * 40,
    "size": 190,
    "card": CARD,
    "used_by": ["mini"],
    "used_at": "2026-01-02T03:04:05Z",
    "footprint": {
        "host": 9 << 20,
        "host_settled": 8 << 20,
        "gpu": 0,
        "host_peaks": PEAKS,
        "gpu_peaks": dict.fromkeys(PEAKS),
        "estimate": {"weights": 3 << 20, "activations": 1 << 20, "cache": 0},
    },
    "routes": ["/models/mini"],
}
GENERATIONS = {
    "generations": [
        {
            "number": number,
            "created_at": "2026-01-02T03:04:05Z",
            "created_by": "uid 0",
            "request": {"model": "org/mini", "device": "auto", "dtype": "float32"},
            "resolution": {"choices": {"device": "cpu: there is no GPU here."}},
            "turns": [{"fate": "rolled_back"}],
        }
        for number in range(1, 6)
    ]
}
LISTENERS = {"listeners": [{"endpoint": "tcp:8430:interface=127.0.0.1", "roles": ["inference"]}]}


@pytest.fixture
def api() -> Iterator[Api]:
    with scripted_api() as running:
        running.on("GET", "/deployments/mini", STATUS)
        running.on("GET", "/deployments/mini/generations", GENERATIONS)
        running.on("GET", "/catalogue/mini", REPORT)
        running.on("GET", "/status", LISTENERS)
        yield running


def shown(api: Api, name: str = "mini") -> str:
    result = api.tursi("show", name)
    assert result.exit_code == Exit.OK, result.output
    return result.stdout


def test_a_deployment_is_shown_with_its_reasons(api: Api) -> None:
    text = shown(api)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for wanted in (
        "mini: org/mini",
        "state ready, 1 of 2 replicas ready",
        "device cpu: there is no GPU here.",
        "dtype float32",
        "limits memory 2.0 GiB",
        "loaded by the first request, until nobody has asked for 60 s",
        "memory 9 MiB a worker while it loads, 8 MiB after",
        "measured at most load 5 MiB, busy 7 MiB",
        "estimated weights 3 MiB, activations 1 MiB",
        "license mit",
        "architecture BertForMaskedLM (float32)",
        "parameters 22.7 million",
        "context 256 tokens",
        "pooling mean, normalized",
        "prompts query 'query: '; query by default",
        "19 B f19",
        "28 B in 8 more",
        "generation 5 2026-01-02 03:04:05 by uid 0: org/mini, rolled back",
        "and 2 before; `tursi history` lists them all",
        "POST /models/mini",
        "curl http://127.0.0.1:8430/models/mini \\",
        """-d '{"inputs": "The sky is [MASK]."}'""",
    ):
        assert wanted in lines, text
    assert max(map(len, text.splitlines())) <= 100


def test_a_narrow_terminal_folds_it(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    text = shown(api)
    assert max(len(line) for line in text.splitlines() if "curl" not in line) <= 60
    assert "by the first request" in " ".join(text.split())


def test_a_model_is_shown_with_whether_it_fits(api: Api) -> None:
    api.on("GET", "/catalogue/org%2Fmini", {**REPORT, "routes": [], "footprint": None})
    api.on("POST", "/deployments", {"message": "It fits."})
    text = shown(api, "org/mini")
    assert text.startswith("org/mini\n")
    assert "if deployed" in text
    assert "It fits." in text
    assert "curl" not in text
    assert api.asked[-1].parameters == {"dry_run": "1"}


def test_a_deployment_whose_files_are_coming_is_shown_without_them(api: Api) -> None:
    api.on("GET", "/catalogue/mini", refusal(409, "files_unavailable", "Not yet."))
    text = shown(api)
    assert "state" in text
    assert "files" not in text


def test_what_is_not_there_is_not_found(api: Api) -> None:
    api.on("GET", "/catalogue/nobody", refusal(404, "catalogue_entry_not_found", "None."))
    assert api.tursi("show", "nobody").exit_code == Exit.NOT_FOUND


def test_all_of_it_is_json(api: Api) -> None:
    found = json.loads(api.tursi("show", "mini", "--json").stdout)
    assert (found["deployment"], found["model"]) == (STATUS, REPORT)
    assert len(found["generations"]) == 5
