"""Real models behind the real daemon, used by the official OpenAI client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import openai
import psutil
import pytest
from daemon import Daemon, daemon
from minilm import minilm_folder
from patience import until
from stand_in_hub import Fault, StandInHub

TURSI = Path(sys.executable).with_name("tursi")
HELLO: Any = [{"role": "user", "content": "hello fox"}]


def tursi(running: Daemon, *words: str, status: int = 0) -> str:
    """What the command line prints; fails unless it ends with ``status``."""
    ended = subprocess.run(
        [str(TURSI), "--socket", str(running.runtime / "control.sock"), *words],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert ended.returncode == status, ended
    return ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def running(made: Path) -> Iterator[Daemon]:
    with daemon() as one:
        one.deploy("minilm", minilm_folder())
        one.deploy("chat", models.chat(made / "chat"))
        one.deploy("classifier", models.classifier(made / "classifier"))
        one.deploy("filler", models.fill_mask(made / "filler"))
        for name in ("minilm", "chat", "classifier", "filler"):
            one.wait(name)
        yield one


@pytest.fixture
def client(running: Daemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def test_models_are_listed_and_retrieved(client: openai.OpenAI, running: Daemon) -> None:
    assert {model.id for model in client.models.list()} >= {"minilm", "chat"}
    assert client.models.retrieve("minilm").id == "minilm"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_embeddings_are_those_of_the_model(client: openai.OpenAI) -> None:
    texts = ["why is the sky blue?", "a fox", "the quick brown fox " * 20]
    answer = client.embeddings.create(model="minilm", input=texts)
    vectors = [item.embedding for item in answer.data]
    assert [len(vector) for vector in vectors] == [384] * 3
    assert all(abs(sum(x * x for x in vector) - 1) < 1e-4 for vector in vectors)
    # As another implementation, in half precision, has published them.
    assert vectors[0][:3] == pytest.approx([0.010071031, -0.0017594865, 0.050072223], abs=1e-3)
    alone = client.embeddings.create(model="minilm", input=texts[1]).data[0].embedding
    assert alone == pytest.approx(vectors[1], abs=1e-5)


def test_chat_streams_what_it_answers_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="chat", messages=HELLO, max_tokens=12, temperature=0
    )
    stream = client.chat.completions.create(
        model="chat",
        messages=HELLO,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    completion = client.completions.create(model="chat", prompt="the fox", max_tokens=4)
    assert completion.usage is not None
    assert completion.usage.completion_tokens <= 4


def test_every_family_answers_in_its_pipeline_shape(running: Daemon) -> None:
    def ask(name: str, inputs: object, **parameters: object) -> Any:
        body = {"inputs": inputs, "parameters": parameters}
        answer = running.client.post(f"/models/{name}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    [labels] = ask("classifier", "hello fox")
    assert sum(label["score"] for label in labels) == pytest.approx(1.0, abs=1e-4)
    fills = ask("filler", "the [MASK] fox", top_k=3)
    assert len(fills) == 3
    assert {"score", "token", "token_str", "sequence"} <= set(fills[0])
    assert "generated_text" in ask("chat", "hello", max_new_tokens=3)[0]
    assert len(ask("minilm", "hello")[0]) == 384
    pair = {"source_sentence": "a fox", "sentences": ["a quick fox", "tax law"]}
    near, far = ask("minilm", pair)
    assert near > far


def test_errors_reach_the_client_as_its_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.embeddings.create(model="nobody", input="x")
    with pytest.raises(openai.BadRequestError) as wrong_task:
        client.chat.completions.create(model="minilm", messages=HELLO)
    assert wrong_task.value.code == "task_not_supported"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.embeddings.create(model="minilm", input="fox " * 4000)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="minilm", input="")
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="chat", messages=[])


def test_a_client_that_hangs_up_stops_the_generation(
    running: Daemon, client: openai.OpenAI
) -> None:
    stream = client.chat.completions.create(
        model="chat", messages=HELLO, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    until(lambda: running.status("chat")["in_flight"] == 0, "the generation has stopped", 1)


def test_kill_9_of_a_worker_then_of_the_daemon_under_load(
    running: Daemon, client: openai.OpenAI
) -> None:
    ending, statuses = threading.Event(), []

    def load() -> None:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as one:
            while not ending.is_set():
                try:
                    one.embeddings.create(model="minilm", input="hello")
                    statuses.append(200)
                except openai.APIStatusError as error:
                    statuses.append(error.status_code)

    thread = threading.Thread(target=load)
    thread.start()
    victim = running.status("chat")["workers"][0]["pid"]
    os.kill(victim, 9)
    running_again = until(
        lambda: (
            (now := running.status("chat"))["ready"] == 1
            and now["workers"][0]["pid"] != victim
            and now
        ),
        "the killed worker is back",
        60,
    )
    ending.set()
    thread.join(20)
    assert running_again["workers"][0]["restarts"] == 1
    assert set(statuses) == {200}, "the other model has noticed"

    tree = running.tree()
    running.kill()
    until(lambda: not [one for one in tree if one.is_running()], "nothing is left", 5)
    running.start()
    for name in ("minilm", "chat", "classifier", "filler"):
        running.wait(name)
    assert len(client.embeddings.create(model="minilm", input="hello").data[0].embedding) == 384
    assert len(running.control.get("/deployments/chat/lives").json()["lives"]) == 3


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (models.without_config, "config.json"),
        (models.without_weights, "weights"),
        (models.garbage, "model.safetensors"),
        (models.only_pickle, "pickle"),
        (models.unknown_architecture, "architecture"),
        (models.remote_code, "code"),
    ],
)
def test_a_model_that_can_not_be_loaded_says_why_in_one_line(
    running: Daemon, made: Path, break_it: Any, sentence: str
) -> None:
    name = break_it.__name__.replace("_", "-")
    folder = break_it(made / name)
    said = tursi(running, "up", str(folder), "--name", name, status=5)
    assert sentence in said.strip().splitlines()[-1]
    assert "Traceback" not in said
    answer = running.client.post("/v1/embeddings", json={"model": name, "input": "x"})
    assert answer.status_code == 503
    assert answer.headers["x-should-retry"] == "false"
    assert sentence in answer.json()["error"]["message"]
    tursi(running, "down", name)


def test_a_task_that_the_model_can_not_do_is_refused(running: Daemon, made: Path) -> None:
    said = tursi(
        running, "up", str(made / "classifier"), "--name", "wrong", "--task", "chat", status=5
    )
    assert "text-generation" in said
    tursi(running, "down", "wrong")


def test_the_command_line_end_to_end(running: Daemon) -> None:
    assert "nothing to do" in tursi(running, "up", str(minilm_folder()), "--name", "minilm")
    listed = json.loads(tursi(running, "ps", "--json"))
    assert "minilm" in json.dumps(listed)
    assert "cosine" in tursi(running, "run", "minilm", "a fox", "a dog").lower()
    tursi(running, "logs", "minilm")
    tursi(running, "stats", "minilm")
    assert "create" in tursi(running, "events")
    tursi(running, "status", "--json")
    assert "nobody" in tursi(running, "down", "nobody", status=4)


def test_a_model_from_the_hub_is_fetched_with_progress_and_served(made: Path) -> None:
    with StandInHub() as hub:
        hub.add("team/tiny-chat", models.chat(made / "for-hub"))
        # So slow that somebody who looks sees it going on.
        hub.faults.append(Fault(r"model\.safetensors", "slow", seconds=0.5))
        environment = hub.environment(made / "home")
        with daemon() as running:
            running.stop()
            running.start(environment)
            said = tursi(running, "up", "team/tiny-chat")
            assert "fetch" in said or "download" in said
            status = running.wait("tiny-chat")
            assert len(status["commit"]) == 40
            with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
                answer = client.chat.completions.create(
                    model="team/tiny-chat", messages=HELLO, max_tokens=3
                )
                assert answer.choices[0].finish_reason
                assert client.models.retrieve("team/tiny-chat").id
            missing = tursi(running, "up", "team/no-such-model", status=5)
            assert "has no model team/no-such-model" in missing
            # Fetchers have come and gone; none is left.
            names = [" ".join(one.cmdline()) for one in running.tree()]
            assert not [name for name in names if "tursi.fetcher" in name]
            assert psutil.Process(running.process.pid if running.process else 0).is_running()
