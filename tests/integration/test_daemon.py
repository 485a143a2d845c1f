"""The daemon's promises on real processes, with scripted workers instead of models."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from daemon import TWISTD, Daemon, daemon
from patience import until

BODY = {"model": "echo", "input": "hello"}


@pytest.fixture
def running() -> Iterator[Daemon]:
    with daemon(scripted=True, settings="[workers]\nbackoff_initial = 0.2\n") as one:
        yield one


def worker_pid(running: Daemon, name: str) -> int:
    pid = running.status(name)["workers"][0]["pid"]
    assert isinstance(pid, int)
    return pid


def test_a_deployment_answers_and_unknown_names_do_not(running: Daemon) -> None:
    running.deploy("echo", running.script(echo=True))
    running.wait("echo")
    answer = running.client.post("/v1/embeddings", json=BODY, headers={"x-request-id": "abc"})
    assert (answer.status_code, answer.json()) == (200, BODY)
    assert answer.headers["x-request-id"] == "abc"
    unknown = running.client.post("/v1/embeddings", json={**BODY, "model": "nobody"})
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"
    assert "nobody" in unknown.json()["error"]["message"]
    assert running.client.get("/deployments").status_code == 403


def test_kill_9_of_a_worker_brings_a_new_one_and_others_never_notice(running: Daemon) -> None:
    running.deploy("echo", running.script(echo=True))
    running.deploy("other", running.script("other", echo=True))
    running.wait("echo")
    running.wait("other")
    failures: list[int] = []
    ending = threading.Event()

    def load() -> None:
        with httpx.Client(base_url=running.url, timeout=10) as client:
            while not ending.is_set():
                answer = client.post("/v1/embeddings", json={**BODY, "model": "other"})
                if answer.status_code != 200:
                    failures.append(answer.status_code)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        first = worker_pid(running, "echo")
        os.kill(first, 9)
        until(
            lambda: (
                (status := running.status("echo"))["ready"] == 1
                and status["workers"][0]["pid"] != first
            ),
            "a new worker is ready",
            20,
        )
        assert running.client.post("/v1/embeddings", json=BODY).status_code == 200
    finally:
        ending.set()
        thread.join()
    assert failures == []
    lives = running.control.get("/deployments/echo/lives").json()["lives"]
    ended = next(life for life in lives if life["ended_at"])
    assert (ended["signal"], ended["failure"]) == (9, "external-kill")
    kinds = [
        event["kind"] for event in running.control.get("/deployments/echo/events").json()["events"]
    ]
    assert "worker.backoff" in kinds


def test_a_request_that_two_workers_die_with_gets_502_at_once(running: Daemon) -> None:
    running.deploy("echo", running.script(echo=True, delay=30))
    running.wait("echo")
    pid = worker_pid(running, "echo")
    answers: list[tuple[int, float]] = []

    def ask() -> None:
        answer = httpx.post(f"{running.url}/v1/embeddings", json=BODY, timeout=20)
        answers.append((answer.status_code, time.monotonic()))

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: running.status("echo")["in_flight"] == 1, "the request is in flight")
    os.kill(pid, 9)
    # It is sent once more, to the worker that comes after.
    until(
        lambda: (
            (status := running.status("echo"))["in_flight"] == 1
            and status["workers"][0]["pid"] != pid
        ),
        "the request is in flight again",
    )
    os.kill(worker_pid(running, "echo"), 9)
    killed = time.monotonic()
    thread.join(10)
    [(status, answered)] = answers
    assert status == 502
    assert answered - killed < 1.0


def test_kill_9_of_the_daemon_leaves_nothing_and_a_restart_brings_all_back(
    running: Daemon,
) -> None:
    running.deploy("echo", running.script(echo=True, fork=3), replicas=2)
    running.deploy("stopped", running.script("stopped", echo=True))
    running.wait("echo")
    assert running.control.post("/deployments/stopped/stop").status_code == 202
    before = running.tree()
    assert len(before) >= 2
    running.kill()
    until(lambda: not [one for one in before if one.is_running()], "every process is gone", 5)
    running.start()
    assert running.wait("echo")["ready"] == 2
    assert running.client.post("/v1/embeddings", json=BODY).status_code == 200
    assert running.status("stopped")["phase"] == "stopped"
    lives = running.control.get("/deployments/echo/lives").json()["lives"]
    assert len(lives) == 4
    events = running.control.get("/deployments/echo/events").json()["events"]
    assert [event["kind"] for event in events].count("worker.ready") == 4


def test_sigterm_ends_everything_and_in_flight_work_is_answered(running: Daemon) -> None:
    running.deploy("echo", running.script(echo=True, delay=1.0))
    running.wait("echo")
    answers: list[int] = []
    thread = threading.Thread(
        target=lambda: answers.append(
            httpx.post(f"{running.url}/v1/embeddings", json=BODY, timeout=20).status_code
        )
    )
    thread.start()
    until(lambda: running.status("echo")["in_flight"] == 1, "the request is in flight")
    tree = running.tree()
    running.stop()
    thread.join(10)
    assert answers == [200]
    assert not [one for one in tree if one.is_running()]
    assert not (running.runtime / "control.sock").exists()


def test_a_request_waits_for_a_loading_model(running: Daemon) -> None:
    running.deploy("echo", running.script(echo=True, load_seconds=2.0))
    answer = running.client.post("/v1/embeddings", json=BODY)
    assert answer.status_code == 200


def test_a_load_longer_than_the_wait_and_a_full_queue_are_told_with_retry_after() -> None:
    settings = "[requests]\nload_wait_seconds = 1.0\nmax_queued = 2\n"
    with daemon(scripted=True, settings=settings) as running:
        running.deploy("echo", running.script(echo=True, load_seconds=30.0))
        until(lambda: running.status("echo")["phase"] == "loading", "it loads")
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(f"{running.url}/v1/embeddings", json=BODY, timeout=20))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: running.status("echo")["queued"] == 2, "two wait")
        full = running.client.post("/v1/embeddings", json=BODY)
        assert full.status_code == 429
        # When the load is over, as far as that is known.
        assert 1 <= int(full.headers["retry-after"]) <= 120
        assert full.json()["error"]["code"] == "queue_full"
        for thread in threads:
            thread.join(10)
        assert [answer.status_code for answer in answers] == [503, 503]
        assert all(1 <= int(answer.headers["retry-after"]) <= 120 for answer in answers)
        assert "(load, " in answers[0].json()["error"]["message"]


def test_a_client_that_disconnects_mid_stream_cancels_the_work(running: Daemon) -> None:
    running.deploy("stream", running.script(stream=10_000, interval=0.05))
    running.wait("stream")
    body = {"model": "stream", "prompt": "x", "stream": True}
    with running.client.stream("POST", "/v1/completions", json=body) as answer:
        # Kept in a name: a generator that is dropped closes its stream.
        pieces = answer.iter_raw()
        assert next(pieces)
        assert running.status("stream")["in_flight"] == 1
    until(lambda: running.status("stream")["in_flight"] == 0, "the work is cancelled", 1)


def test_scale_stop_start_and_remove(running: Daemon) -> None:
    running.deploy("echo", running.script(echo=True))
    running.wait("echo")
    scaled = running.control.post("/deployments/echo/scale", json={"replicas": 3})
    assert scaled.status_code == 202
    assert running.wait("echo")["ready"] == 3
    running.control.post("/deployments/echo/scale", json={"replicas": 1})
    until(lambda: len(running.status("echo")["workers"]) == 1, "two are retired")
    running.control.post("/deployments/echo/stop")
    until(lambda: running.status("echo")["phase"] == "stopped", "it has stopped")
    refused = running.client.post("/v1/embeddings", json=BODY)
    assert (refused.status_code, refused.headers["x-should-retry"]) == (503, "false")
    running.control.post("/deployments/echo/start")
    running.wait("echo")
    assert running.control.delete("/deployments/echo").status_code == 202
    until(
        lambda: running.control.get("/deployments/echo").status_code == 404, "it has been removed"
    )
    assert not running.tree()


def test_a_changed_deployment_is_a_new_generation_and_no_request_is_lost(running: Daemon) -> None:
    first = running.script("first", echo=True)
    second = running.script("second", echo=True, load_seconds=1.0)
    running.deploy("echo", first)
    running.wait("echo")
    assert running.control.put("/deployments/echo", json={"model": str(first)}).json()[
        "outcome"
    ] == ("unchanged")
    assert running.deploy("echo", second)["generation"] == 2
    seen = set()

    def switched() -> bool:
        seen.add(running.client.post("/v1/embeddings", json=BODY).status_code)
        now = running.status("echo")
        return now["ready"] == 1 and [each["generation"] for each in now["workers"]] == [2]

    until(switched, "only the second generation is there")
    assert seen == {200}


def test_a_new_generation_that_fails_leaves_the_old_one_serving(running: Daemon) -> None:
    running.deploy("echo", running.script(echo=True))
    running.wait("echo")
    broken = running.script("broken", fail="weights_corrupt:The weights are damaged.")
    running.deploy("echo", broken)
    status = until(
        lambda: (now := running.status("echo"))["phase"] == "failed" and now, "it has failed"
    )
    assert "The weights are damaged." in status["reason"]
    assert running.client.post("/v1/embeddings", json=BODY).status_code == 200


def test_logs_are_kept_by_life_and_followed(running: Daemon) -> None:
    running.deploy("echo", running.script(echo=True))
    running.wait("echo")
    until(
        lambda: running.control.get("/deployments/echo/logs").json()["lines"],
        "the worker has logged",
    )
    with running.control.stream("GET", "/deployments/echo/logs", params={"follow": 1}) as follow:
        events = follow.iter_lines()
        os.kill(worker_pid(running, "echo"), 9)
        assert any("data:" in line for line in events)


def test_a_second_daemon_on_the_same_state_is_refused(running: Daemon) -> None:
    second = subprocess.run(
        running.arguments("-n", "--pidfile="),
        env=running.environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert second.returncode == 75
    assert running.process is not None
    assert f"already running (pid {running.process.pid})" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("mode", [["-n", "--pidfile="], ["--pidfile=tursi.pid", "--logfile=t.log"]])
@pytest.mark.parametrize(
    ("case", "status", "sentence"),
    [
        ("port", 69, "already listens"),
        ("setting", 78, "unknown field `wrong`"),
        ("option", 64, "option --wrong not recognized"),
        ("database", 78, "database"),
    ],
)
def test_what_keeps_it_from_starting_is_one_line_and_an_exit_status(
    tmp_path: Path, mode: list[str], case: str, status: int, sentence: str
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    configuration = tmp_path / "tursi.toml"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1] if case == "port" else 0
        text = (
            "[[http.listeners]]\n"
            f'endpoint = "tcp:{port}:interface=127.0.0.1"\nroles = ["inference"]\n'
        )
        if case == "setting":
            text = "[http]\nwrong = 1\n"
        if case == "database":
            (state / "tursi.sqlite").write_bytes(b"This is no database." * 100)
        configuration.write_text(text)
        ended = subprocess.run(
            [
                str(TWISTD), *mode, "tursi",
                "--config", str(configuration), "--state", str(state), "--runtime", "/tmp/t-none",
                *(["--wrong"] if case == "option" else []),
            ],
            capture_output=True, text=True, timeout=30, cwd=tmp_path, check=False,
        )  # fmt: skip
    assert ended.returncode == status, ended
    assert sentence in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    if case == "database":
        assert (state / "tursi.sqlite").read_bytes().startswith(b"This is no database.")


def test_it_daemonizes_with_a_pid_file_and_a_log_file() -> None:
    with daemon(scripted=True) as foreground:
        # Only for its folder and configuration.
        foreground.stop()
        folder = foreground.folder
        started = subprocess.run(
            [
                str(TWISTD), "--pidfile", str(folder / "tursi.pid"),
                "--logfile", str(folder / "tursi.log"), "tursi",
                "--config", str(foreground.configuration),
                "--state", str(foreground.state), "--runtime", str(foreground.runtime),
            ],
            timeout=30, cwd=folder, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert started.returncode == 0
        process = psutil.Process(int((folder / "tursi.pid").read_text()))
        try:
            status = until(
                lambda: (answer := foreground.control.get("/status")).is_success and answer,
                "it answers on its socket",
                20,
            )
            assert status.json()["pid"] == process.pid
            assert "serves on" in (folder / "tursi.log").read_text()
        finally:
            process.terminate()
            gone, _ = psutil.wait_procs([process], timeout=20)
        assert gone
        assert not (folder / "tursi.pid").exists()
