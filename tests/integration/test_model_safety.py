"""Models and names that try to reach beyond the model, against a real daemon."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from daemon import Daemon, daemon

NAMES = [
    "../secret",
    "org/../../secret",
    "..",
    "org/name@../../secret",
    "org/name@main/../../x",
    "/srv/../etc",
    "..\\secret",
    "C:\\secret",
    "org/na\0me",
    "/srv/\0",
    "%2e%2e/secret",
    "org%2F..%2Fsecret",
    "\u043erg/name",  # a Cyrillic letter that looks like an o
    "org\u2215name",
    "org/\u2025/name",
    "~/secret",
    "file:///etc/passwd",
    "https://example.org/model",
    "org/name/part",
    "o" * 4096,
    "/" + "o" * 4096,
    "org/name@" + "a" * 4096,
    "",
]


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with daemon(scripted=True) as one:
        yield one


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_elsewhere_are_refused(running: Daemon, name: str) -> None:
    answer = running.control.put("/deployments/x", json={"model": name})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "model"
    # And as the name of a deployment, in the path.
    answer = running.control.put(f"/deployments/{quote(name, safe='')}", json={"model": "org/a"})
    assert answer.status_code in {400, 404, 405}, answer.text
    assert running.control.get("/deployments").json() == {"deployments": []}
    assert not [*(running.state / "fetches").glob("*")]


def test_clients_hear_why_a_model_is_refused_but_not_where_it_is(running: Daemon) -> None:
    folder = running.script("pickled")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps([1]))
    running.deploy("pickled", folder)
    status = running.wait("pickled", "failed")
    assert status["failure"] == "refused"
    assert str(folder) in status["reason"]
    for answer in (
        running.client.post("/v1/embeddings", json={"model": "pickled", "input": "x"}),
        running.client.get("/health"),
        running.client.get("/v1/models"),
        running.client.get("/models/pickled/info"),
        running.client.get("/ready"),
    ):
        assert str(running.folder) not in answer.text
    answer = running.client.post("/v1/embeddings", json={"model": "pickled", "input": "x"})
    assert answer.status_code == 503
    assert "only as pickle" in answer.json()["error"]["message"]
    # With the risk taken it goes on to the worker.
    status = running.deploy("pickled", folder, allow_pickle=True)
    assert status["allow_pickle"]
    running.wait("pickled")


def test_a_link_to_elsewhere_is_refused(running: Daemon) -> None:
    folder = running.script("linked")
    secret = running.folder / "secret"
    secret.write_text("{}")
    (folder / "tokenizer.json").symlink_to(secret)
    running.deploy("linked", folder)
    status = running.wait("linked", "failed")
    assert status["failure"] == "refused"
    assert "leads out of the model's folder" in status["reason"]
