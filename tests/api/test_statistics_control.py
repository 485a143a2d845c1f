from __future__ import annotations

from dataclasses import replace

import pytest
from conversation import House
from fake_keys import INFER, READ

from tursi.model import Phase, Progress
from tursi.rollup import Period, StatisticsQuery

pytestmark = pytest.mark.usefixtures("both_paths")


def asked(house: House) -> StatisticsQuery:
    """The last one that the fleet was asked for."""
    query = house.fleet.calls[-1][1]
    assert isinstance(query, StatisticsQuery)
    return query


def test_figures_are_told_by_period_deployment_and_key() -> None:
    house = House()
    reply = house.ask("GET", "/deployments/small/statistics?by=hour&since=2023-11-14T12:30:00Z")
    found = reply.json()
    assert (found["by"], found["since"]) == ("hour", "2023-11-14T12:00:00.000Z")
    total = found["total"]
    assert (total["requests"], total["errors"]) == (4, 1)
    assert total["errors_by_class"] == {"overload": 1}
    assert (total["prompt_tokens"], total["completion_tokens"]) == (30, 60)
    assert total["latency"]["count"] == 3
    assert total["latency"]["p50"] == pytest.approx(0.2, rel=0.01)
    assert total["latency"]["mean"] == pytest.approx(0.2)
    assert total["first_byte"]["p99"] == pytest.approx(0.05, rel=0.01)
    assert total["first_byte"]["mean"] is None
    assert total["batch_size"] == {"mean": 4.0, "max": 4}
    assert total["memory"] == {"mean": 1000.0, "max": 1000}
    assert total["gpu_memory"] is None
    assert [each["at"] for each in found["periods"]] == ["2023-11-14T22:13:20.000Z"]
    assert [each["deployment"] for each in found["deployments"]] == ["small"]
    assert [(each["key"], each["name"]) for each in found["keys"]] == [(0, None)]
    # Whose memory it is can't be said of a key.
    assert found["keys"][0]["memory"] is None
    assert asked(house) == StatisticsQuery(Period.HOUR, 1_699_963_200.0, "small", None)


@pytest.mark.parametrize(
    ("by", "seconds"), [("minute", 3600), ("hour", 86400), ("day", 30 * 86400)]
)
def test_how_far_it_goes_back_depends_on_the_period(by: str, seconds: int) -> None:
    house = House()
    assert house.ask("GET", f"/statistics?by={by}").status == 200
    query = asked(house)
    assert query.deployment is None
    assert query.since % query.by == 0
    assert house.ask("GET", "/statistics?by=week").status == 400


@pytest.mark.parametrize(
    ("key", "number"), [("3", 3), ("infer", 3), ("0", 0), ("99", None), ("nobody", None)]
)
def test_a_key_is_named_by_its_name_or_id(key: str, number: int | None) -> None:
    house = House()
    reply = house.ask("GET", f"/statistics?key_name={key}&deployment=gone")
    if number is None:
        assert (reply.status, reply.error["code"]) == (404, "key_not_found")
    else:
        assert (asked(house).key, asked(house).deployment) == (number, "gone")


def test_a_deployment_must_exist() -> None:
    assert (
        House().ask("GET", "/deployments/none/statistics").error["code"] == "deployment_not_found"
    )


def test_a_key_sees_its_own_statistics_and_no_others() -> None:
    house = House()
    own = {"Authorization": f"Bearer {INFER}"}
    for name in ("3", "infer"):
        assert house.ask("GET", f"/keys/{name}/statistics", headers=own).status == 200
        assert asked(house).key == 3
    for name in ("1", "2", "0", "admin", "99"):
        reply = house.ask("GET", f"/keys/{name}/statistics", headers=own)
        assert (reply.status, reply.error["code"]) == (404, "key_not_found")
    for path in ("/statistics?key_name=3", "/deployments/small/statistics", "/activity"):
        assert house.ask("GET", path, headers=own).error["code"] == "scope_missing"
    # Who has none is nobody's owner.
    reply = house.ask("GET", "/keys/3/statistics", headers={"Authorization": None})
    assert reply.status == 404
    assert house.ask("GET", "/keys/3/statistics").status == 200
    read = {"Authorization": f"Bearer {READ}"}
    assert house.ask("GET", "/statistics?key_name=3", headers=read).status == 200


def test_activity_is_everything_in_one_answer() -> None:
    house = House()
    loading = house.fleet.statuses["small"]
    (worker,) = loading.workers
    house.fleet.statuses["small"] = replace(
        loading, workers=(replace(worker, gpus={"cuda:0": 1000, "cuda:1": 2000}),)
    )
    house.fleet.statuses["other"] = replace(
        loading, name="other", workers=(), progress=Progress("load", 1, 4)
    )
    assert house.ask("GET", "/activity").json()["seconds"] == 1.0
    # By the clock that can't be set.
    house.clock.advance(60)
    found = house.ask("GET", "/activity").json()
    assert found["seconds"] == 10.0
    assert found["daemon"]["pid"] == 42
    assert found["daemon"]["rss"] > 0
    assert found["rooms"] == [{"device": "host", "total": 4000, "free": 1000, "name": None}]
    small, other = found["deployments"]
    assert (small["name"], small["phase"], small["rss"], small["cpu_seconds"]) == (
        "small", "ready", 1000, 2.5,
    )  # fmt: skip
    assert small["requests_per_second"] == 0.1
    assert small["tokens_per_second"] == 3.0
    assert small["latency"]["p50"] == pytest.approx(0.1, rel=0.01)
    assert small["batch_size"] == 4.0
    assert (small["gpu_memory"], other["gpu_memory"]) == (3000, None)
    assert (other["requests_per_second"], other["latency"]) == (0.0, None)
    assert other["progress"]["total"] == 4
    assert small["generations"] == []


def test_generations_are_told_apart_while_there_are_several() -> None:
    house = House()
    small = house.fleet.statuses["small"]
    (worker,) = small.workers
    both = [
        replace(worker, name=str(number), generation=number, phase=phase, in_flight=number)
        for number, phase in ((2, Phase.READY), (2, Phase.LOADING), (1, Phase.READY))
    ]
    house.fleet.statuses["small"] = replace(small, workers=tuple(both))
    house.clock.advance(60)
    (found,) = house.ask("GET", "/activity").json()["deployments"]
    old, new = found["generations"]
    assert (old["generation"], old["ready"], old["workers"], old["latency"]) == (1, 1, 1, None)
    assert (new["generation"], new["ready"], new["workers"], new["in_flight"]) == (2, 1, 2, 4)
    assert new["requests_per_second"] == pytest.approx(1 / 60)
    assert new["latency"]["p95"] == pytest.approx(0.6, rel=0.01)
