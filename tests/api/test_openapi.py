from __future__ import annotations

from typing import Any

from conversation import House
from openapi_spec_validator import OpenAPIV31SpecValidator

from tursi.api.openapi import PART
from tursi.faces import TABLE


def document(house: House) -> Any:
    return house.ask("GET", "/openapi.json").json()


def test_the_document_is_valid() -> None:
    found = document(House())
    assert found["openapi"] == "3.1.0"
    assert found["info"]["version"] == "1.2.3"
    OpenAPIV31SpecValidator(found).validate()


def test_every_route_is_in_the_document() -> None:
    house = House()
    described = {
        (path, method) for path, methods in document(house)["paths"].items() for method in methods
    }
    klein = house.front.klein.url_map
    served = {
        (PART.sub(r"{\1}", rule.rule), method.lower())
        for rule in klein.iter_rules()
        for method in rule.methods or ()
        if method != "HEAD"
    }
    served |= {(route.path, "post") for route in TABLE}
    assert described == served


def test_every_operation_says_which_scope_it_needs() -> None:
    house = House()
    found = document(house)
    assert set(found["components"]["securitySchemes"]) == {"bearer", "header"}
    for contract, _ in house.front.handlers:
        path = PART.sub(r"{\1}", contract.path)
        security = found["paths"][path][contract.method.lower()]["security"]
        scopes = {scope for one in security for each in one.values() for scope in each}
        assert scopes == ({contract.scope.value} if contract.scope else set())
        assert ({} in security) is (contract.scope is not None and contract.role != "control")
    for route in TABLE:
        security = found["paths"][route.path]["post"]["security"]
        assert security == [{"bearer": ["infer"]}, {"header": ["infer"]}, {}]


def test_times_are_described_as_they_are_sent() -> None:
    schemas = document(House())["components"]["schemas"]
    time = {"type": "string", "format": "date-time"}
    assert schemas["DeploymentStatus"]["properties"]["created_at"] == time
    assert time in schemas["DeploymentStatus"]["properties"]["next_try_at"]["anyOf"]
    assert schemas["PeriodFigures"]["properties"]["at"] == time


def test_operations_have_names_of_their_own_and_a_summary() -> None:
    operations = [one for each in document(House())["paths"].values() for one in each.values()]
    names = [each["operationId"] for each in operations]
    assert len(set(names)) == len(names)
    assert all(each["summary"] for each in operations)


def test_errors_are_described_in_the_shape_of_the_route() -> None:
    paths = document(House())["paths"]
    for path, kind in [("/v1/embeddings", "ErrorBody"), ("/models/{name}", "PipelineError")]:
        content = paths[path]["post"]["responses"]["default"]["content"]
        assert content["application/json"]["schema"]["$ref"].endswith(f"/{kind}")


def test_every_body_of_a_model_may_say_how_long_that_stays() -> None:
    found = document(House())
    for route in TABLE:
        [content] = found["paths"][route.path]["post"]["requestBody"]["content"].values()
        kept = content["schema"]["allOf"][-1]["$ref"].rpartition("/")[2]
        assert "keep_alive" in found["components"]["schemas"][kept]["properties"]
