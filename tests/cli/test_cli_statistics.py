from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from scripted_api import Api, refusal, scripted_api

from tursi.cli.connection import Exit
from tursi.cli.terminal import duration


@pytest.fixture
def api() -> Iterator[Api]:
    with scripted_api() as running:
        yield running


TIMES = {"count": 4, "p50": 0.0123, "p95": 0.25, "p99": 1.5, "mean": 0.1}
FIGURES = {
    "requests": 1, "errors": 0, "errors_by_class": {}, "prompt_tokens": 100,
    "completion_tokens": 7, "latency": TIMES, "first_byte": {**TIMES, "p95": 0.05},
    "queue": {**TIMES, "p95": 0.002}, "batch_size": {"mean": 2.25, "max": 8},
    "memory": {"mean": 1000.0, "max": 300 * 1024**2}, "gpu_memory": None,
}  # fmt: skip
NOTHING = {
    **FIGURES, "requests": 0, "latency": None, "first_byte": None, "queue": None,
    "batch_size": None, "memory": None,
}  # fmt: skip
FAILING = {**FIGURES, "requests": 9, "errors": 6, "errors_by_class": {"lost": 1, "overload": 5}}


def statistics(**fields: Any) -> dict[str, Any]:
    """The API's answer."""
    return {
        "by": "minute",
        "since": "2026-01-02T03:00:00.000Z",
        "total": {**FAILING, "requests": 10},
        "periods": [
            {"at": "2026-01-02T03:04:00.000Z", **FIGURES},
            {"at": "2026-01-02T03:05:00.000Z", **NOTHING},
            {"at": "2026-01-03T00:00:00.000Z", **FAILING},
        ],
        "deployments": [{"deployment": "", **FAILING}, {"deployment": "mini", **FIGURES}],
        "keys": [
            {"key": 0, "name": None, **FIGURES},
            {"key": 3, "name": "ci", **FIGURES},
            {"key": 4, "name": None, **FIGURES},
        ],
        **fields,
    }


def rows(api: Api, *arguments: str) -> list[list[str]]:
    return [line.split() for line in api.tursi("stats", *arguments).stdout.splitlines()]


def test_a_deployment_has_a_row_per_minute_and_a_total(api: Api) -> None:
    api.on("GET", "/statistics", statistics())
    lines = rows(api, "mini")
    assert lines[0][:3] == ["WHEN", "REQUESTS", "P50"]
    assert lines[1][2:] == [
        "1", "12.3", "ms", "250", "ms", "1.5", "s", "50", "ms", "2", "ms", "100", "7", "2.2,",
        "max", "8", "300", "MiB", "-",
    ]  # fmt: skip
    # What nobody asked for in has no row.
    assert len(lines) == 4
    assert lines[2][-4:] == ["5", "overload,", "1", "lost"]
    assert lines[3][:2] == ["total", "10"]
    assert api.asked[0].parameters == {"by": "minute", "deployment": "mini"}
    assert json.loads(api.tursi("stats", "mini", "--json").stdout) == statistics()


def test_without_a_name_every_deployment_has_a_row(api: Api) -> None:
    api.on("GET", "/statistics", statistics())
    lines = rows(api, "--key", "ci")
    assert [line[:2] for line in lines] == [
        ["NAME", "REQUESTS"], ["(none)", "9"], ["mini", "1"], ["total", "10"],
    ]  # fmt: skip
    assert api.asked[0].parameters == {"by": "hour", "key_name": "ci"}


def test_keys_and_days_have_rows_too(api: Api) -> None:
    api.on("GET", "/statistics", statistics())
    assert [line[:2] for line in rows(api, "--by", "key")[:-1]] == [
        ["KEY", "REQUESTS"], ["(none)", "1"], ["ci", "1"], ["key", "4"],
    ]  # fmt: skip
    assert [line[0] for line in rows(api, "--by", "day")[1:]] == [
        "2026-01-02", "2026-01-03", "total",
    ]  # fmt: skip
    assert api.asked[1].parameters == {"by": "day"}


@pytest.mark.parametrize(("since", "by"), [("60m", "minute"), ("24h", "hour"), ("60d", "day")])
def test_the_longer_ago_the_longer_the_period(api: Api, since: str, by: str) -> None:
    api.on("GET", "/statistics", statistics())
    rows(api, "--since", since)
    given = api.asked[0].parameters
    assert given["by"] == by
    assert datetime.fromisoformat(given["since"]) < datetime.now(UTC)


def test_nothing_is_said_to_be_nothing(api: Api) -> None:
    nothing = statistics(periods=[], deployments=[], total=NOTHING)
    api.on("GET", "/statistics", nothing)
    api.on("GET", "/deployments/mini", {"name": "mini"})
    assert "mini has had no requests since 2026-01-0" in api.tursi("stats", "mini").stdout
    assert api.tursi("stats", "nobody").exit_code == Exit.NOT_FOUND
    api.on("GET", "/statistics", statistics(deployments=[], total=NOTHING))
    assert api.tursi("stats").stdout.startswith("There have been no requests since 2026-01-0")
    api.on("GET", "/statistics", refusal(404, "key_not_found", "There is no such key."))
    assert api.tursi("stats", "--key", "no").exit_code == Exit.NOT_FOUND
    assert api.tursi("stats", "--since", "soon").exit_code == Exit.USAGE


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (0.0, "0 ms"), (0.000123, "0.123 ms"), (0.01234, "12.3 ms"),
        (0.0999, "99.9 ms"), (0.09996, "100 ms"), (0.25, "250 ms"), (0.9996, "1 s"),
        (1.234, "1.23 s"), (59.96, "60 s"), (100, "1m 40s"), (7260, "2h 1m"),
        (3 * 86400 + 7200, "3d 2h"),
    ],
)  # fmt: skip
def test_durations_have_about_three_figures(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
