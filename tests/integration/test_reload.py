"""Another configuration for a running daemon: what has changed is applied, or nothing."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest
from daemon import Daemon, daemon, free_port
from patience import until

BODY = {"model": "echo", "input": "hello"}


@pytest.fixture
def running() -> Iterator[Daemon]:
    with daemon(scripted=True) as one:
        yield one


def configure(running: Daemon, settings: str = "", *, port: int | None = None) -> None:
    running.configuration.write_text(
        "[[http.listeners]]\n"
        f'endpoint = "tcp:{port or running.port}:interface=127.0.0.1:backlog=1024"\n'
        f'roles = ["inference", "health", "metrics"]\n{settings}'
    )


def reload(running: Daemon) -> dict[str, list[str]]:
    answer = running.control.post("/reload")
    assert answer.status_code == 200, answer.text
    told: dict[str, list[str]] = answer.json()
    return told


def test_limits_and_hosts_hold_from_now_on_and_no_worker_notices(running: Daemon) -> None:
    running.deploy("echo", running.script(echo=True))
    before = running.wait("echo")
    assert reload(running) == {"changed": [], "rolled": []}
    assert running.client.get("/health", headers={"host": "my.example"}).status_code == 403
    configure(running, '[http]\nhosts = ["my.example"]\nmax_inference_body = 1024\n')
    told = {"changed": ["http.hosts", "http.max_inference_body"], "rolled": []}
    # In the order of the settings; listeners are the first of them.
    assert reload(running) == told
    assert running.client.get("/health", headers={"host": "my.example"}).status_code == 200
    large = {**BODY, "input": "x" * 2000}
    assert running.client.post("/v1/embeddings", json=large).status_code == 413
    assert running.client.post("/v1/embeddings", json=BODY).status_code == 200
    configure(running, "[requests]\nmax_in_flight = 3\n[workers]\nmax_failures = 9\n")
    changed = ["http.hosts", "http.max_inference_body", "requests.max_in_flight"]
    assert reload(running)["changed"] == [*changed, "workers.max_failures"]
    assert running.client.post("/v1/embeddings", json=large).status_code == 200
    assert running.wait("echo")["workers"][0]["pid"] == before["workers"][0]["pid"]


def test_listeners_move_and_open_connections_stay(running: Daemon) -> None:
    assert running.client.get("/health").status_code == 200
    port = free_port()
    configure(running, port=port)
    assert reload(running)["changed"] == ["http.listeners"]
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.url}/health")
    # Connected before.
    assert running.client.get("/health").status_code == 200
    listeners = [each["endpoint"] for each in running.control.get("/status").json()["listeners"]]
    assert listeners[1] == f"tcp:{port}:interface=127.0.0.1:backlog=1024"
    text = running.configuration.read_text()
    running.configuration.write_text(text.replace("1024", "64"))
    # The same port once more: the old one has to go first.
    assert reload(running)["changed"] == ["http.listeners"]
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    running.configuration.write_text(text.replace('"health", ', ""))
    reload(running)
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 403


@pytest.mark.parametrize(
    ("wrong", "status", "code"),
    [
        ("[http]\nmax_bdy = 1", 422, "configuration_error"),
        ("[http", 422, "configuration_error"),
        ("[[http.listeners]]\nendpoint = 'tcp:x'\nroles = []", 422, "configuration_error"),
        (
            "[[http.listeners]]\nendpoint = 'tcp:0:interface=0.0.0.0'\nroles = ['control']",
            422,
            "configuration_error",
        ),
        ("port", 409, "address_in_use"),
    ],
)
def test_what_is_wrong_leaves_everything_as_it_was(
    running: Daemon, wrong: str, status: int, code: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        if wrong == "port":
            port = taken.getsockname()[1]
            wrong = f"[[http.listeners]]\nendpoint = 'tcp:{port}:interface=127.0.0.1'\nroles = []\n"
        configure(running, f"{wrong}\n", port=free_port())
        answer = running.control.post("/reload")
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == code
    assert httpx.get(f"{running.url}/health").status_code == 200
    assert len(running.control.get("/status").json()["listeners"]) == 2
    configure(running)
    assert reload(running)["changed"] == []


def test_a_listener_that_is_there_twice_is_refused_as_at_a_start(running: Daemon) -> None:
    text = running.configuration.read_text()
    running.configuration.write_text(text + text)
    answer = running.control.post("/reload")
    assert answer.status_code == 422
    assert "is there twice" in answer.json()["error"]["message"]
    assert running.client.get("/live").status_code == 200


def test_a_reload_opens_nothing_when_the_daemon_stops(running: Daemon) -> None:
    running.deploy("echo", running.script(echo=True, delay=3.0))
    running.wait("echo")
    late: list[int] = []

    def ask() -> None:
        late.append(httpx.post(f"{running.url}/v1/embeddings", json=BODY, timeout=60).status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: running.status("echo")["in_flight"], "it is at it")
    configure(running, port=free_port())
    assert running.process is not None
    for _ in range(20):
        running.process.send_signal(signal.SIGHUP)
    running.process.send_signal(signal.SIGTERM)
    for _ in range(20):
        running.process.send_signal(signal.SIGHUP)
    until(lambda: "stopping because" in running.log.read_text(), "it stops")
    until(lambda: not listens(running), "nobody listens", 2)
    asking.join()
    assert late == [200]
    assert not listens(running)
    assert running.process.wait(30) == 0
    assert "Traceback" not in running.log.read_text()


def listens(running: Daemon) -> bool:
    assert running.process is not None
    try:
        found = psutil.Process(running.process.pid).net_connections()
    except psutil.NoSuchProcess:
        return False
    return any(each.status == psutil.CONN_LISTEN for each in found)


def test_what_workers_are_told_rolls_those_whom_it_concerns_and_no_request_is_lost(
    running: Daemon,
) -> None:
    script = running.script(echo=True, load_seconds=0.5)
    running.deploy("echo", script, replicas=2)
    running.deploy("own", script, limits={"threads": 1})
    before = {name: running.wait(name) for name in ("echo", "own")}
    answers: set[int] = set()
    over = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            while not over.is_set():
                answers.add(client.post("/v1/embeddings", json=BODY).status_code)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    configure(running, "[workers]\nthreads = 2\n")
    assert reload(running) == {"changed": ["workers.threads"], "rolled": ["echo"]}
    old = {each["pid"] for each in before["echo"]["workers"]}

    def rolled() -> bool:
        pids = {each["pid"] for each in running.status("echo")["workers"]}
        return len(pids) == 2 and not pids & old

    until(rolled, "two others serve")
    over.set()
    thread.join(60)
    assert answers == {200}
    after = {name: running.wait(name) for name in ("echo", "own")}
    assert after["own"]["workers"][0]["pid"] == before["own"]["workers"][0]["pid"]
    assert after["echo"]["generation"] == before["echo"]["generation"]


def test_a_sighup_is_audited_also_one_that_changes_nothing(running: Daemon) -> None:
    def audited() -> list[tuple[str, str, str | None]]:
        entries = running.control.get("/audit").json()["entries"]
        return [(each["by"], each["action"], each["code"]) for each in entries]

    assert running.process is not None
    running.process.send_signal(signal.SIGHUP)
    until(lambda: audited() == [("SIGHUP", "reload", None)], "the reload is audited")
    running.configuration.write_text("[http\n")
    running.process.send_signal(signal.SIGHUP)
    until(lambda: len(audited()) == 2, "the refused one too")
    assert audited()[1] == ("SIGHUP", "reload", "configuration_error")
    for _ in range(200):
        running.process.send_signal(signal.SIGHUP)
        time.sleep(0.005)
    running.configuration.write_text("[http\nlast = true\n")
    running.process.send_signal(signal.SIGHUP)
    # A storm is read as one a second; what was written last is.
    until(lambda: len(audited()) > 2, "it is read")
    sent = time.monotonic()
    until(lambda: len(audited()) > 3 or time.monotonic() - sent > 2, "and again")
    assert len(audited()) < 10
