from __future__ import annotations

from conversation import INFO, House
from fake_fleet import FakeFleet, status
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tursi.api.metrics import Growth, Metrics
from tursi.model import Usage


def text(metrics: Metrics) -> str:
    return metrics.text("")[1].decode()


def test_the_format_is_negotiated() -> None:
    house = House()
    plain = house.ask("GET", "/metrics")
    assert plain.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert len(list(text_string_to_metric_families(plain.body.decode()))) > 5
    modern = house.ask(
        "GET", "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
    )
    assert modern.headers["Content-Type"].startswith("application/openmetrics-text")
    assert modern.body.endswith(b"# EOF\n")
    assert list(openmetrics(modern.body.decode()))


def test_every_family_has_help_type_and_a_conventional_name() -> None:
    metrics = Metrics(FakeFleet(), INFO)
    metrics.record("small", "openai.chat", 200, 0.5, Usage(1, 2, 3, 0.1, 0.2), "x")
    for family in text_string_to_metric_families(text(metrics)):
        assert family.name.startswith("tursi_")
        assert family.documentation
        assert family.type not in {"unknown", "untyped"}
        for sample in family.samples:
            assert set(sample.labels) <= {
                "deployment", "route", "status", "code", "version", "kind", "le", "device",
            }  # fmt: skip
            if family.type == "counter":
                assert sample.name.endswith("_total")


def test_nothing_is_announced_that_has_no_value() -> None:
    families = {
        family.name: family
        for family in text_string_to_metric_families(text(Metrics(FakeFleet(), INFO)))
    }
    assert all(family.samples for family in families.values())
    refused = families["tursi_requests_refused"].samples
    assert {sample.labels["code"]: sample.value for sample in refused}["host_refused"] == 0


def test_histograms_are_cumulative() -> None:
    metrics = Metrics(FakeFleet(), INFO)
    for seconds in (0.0005, 0.001, 0.3, 9999.0):
        metrics.record("small", "openai.chat", 200, seconds, Usage(), "")
    samples = {
        (sample.name, sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(text(metrics))
        for sample in family.samples
    }
    assert samples["tursi_request_seconds_bucket", "0.001"] == 2
    assert samples["tursi_request_seconds_bucket", "0.5"] == 3
    assert samples["tursi_request_seconds_bucket", "+Inf"] == 4
    assert samples["tursi_request_seconds_count", None] == 4


def test_a_removed_deployment_leaves_no_series() -> None:
    fleet = FakeFleet()
    metrics = Metrics(fleet, INFO)
    fleet.statuses["other"] = status("other")
    metrics.record("other", "openai.chat", 200, 0.1, Usage(), "")
    assert 'deployment="other"' in text(metrics)
    del fleet.statuses["other"]
    assert "other" not in text(metrics)


def test_workers_are_told() -> None:
    found = text(Metrics(FakeFleet(), INFO))
    for line in [
        'tursi_workers{deployment="small",status="ready"} 1.0',
        'tursi_worker_restarts_total{deployment="small"} 1.0',
        'tursi_worker_rss_bytes{deployment="small"} 1000.0',
        'tursi_worker_gpu_bytes{deployment="small",device="cuda:0"} 500.0',
        'tursi_memory_total_bytes{device="host"} 4000.0',
        'tursi_memory_free_bytes{device="host"} 1000.0',
        'tursi_worker_cpu_seconds_total{deployment="small"} 2.5',
        'tursi_replicas_ready{deployment="small"} 1.0',
        'tursi_build_info{version="1.2.3"} 1.0',
    ]:
        assert line in found


def test_a_counter_never_falls_when_a_worker_begins_anew() -> None:
    growth = Growth()
    for now, total in [
        ({"a": 5.0}, 5.0),
        ({"a": 7.0, "b": 1.0}, 8.0),
        ({"b": 2.0}, 9.0),
        ({"b": 0.5}, 9.5),
    ]:
        growth.update(now)
        assert growth.total == total
