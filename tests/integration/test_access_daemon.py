"""Who may do what, on a daemon that runs: keys, other users, TLS, floods, and what is logged."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from daemon import Daemon, daemon, free_port
from patience import until
from self_signed import certificate, common_name, handshake

TURSI = Path(sys.executable).with_name("tursi")
NOBODY = 65534


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with daemon(scripted=True) as one:
        one.deploy("echo", one.script(echo=True))
        one.wait("echo")
        yield one


def make_key(one: Daemon, name: str, *scopes: str, **fields: Any) -> str:
    answer = one.control.post("/keys", json={"name": name, "scopes": scopes, **fields})
    assert answer.status_code == 201, answer.text
    secret: str = answer.json()["secret"]
    return secret


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def infer(client: httpx.Client, **headers: str) -> int:
    body = {"model": "echo", "input": "hello"}
    return client.post("/v1/embeddings", json=body, headers=headers).status_code


# -- keys ---------------------------------------------------------------------------------


def test_keys_by_the_command_line_over_tcp_and_what_is_left_of_them(running: Daemon) -> None:
    environment = {**os.environ, "TURSI_SOCKET": str(running.runtime / "control.sock")}

    def tursi(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(TURSI), *arguments],
            env={**environment, **more},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    made = tursi("keys", "create", "laptop", "--scope", "admin")
    assert made.returncode == 0, made.stderr
    token = made.stdout.strip()
    assert token.startswith("tursi_")
    # Inference on loopback needs none; a wrong one of ours is refused all the same.
    assert infer(running.client) == 200
    assert infer(running.client, **bearer("unused")) == 200
    assert infer(running.client, **bearer(token)) == 200
    assert infer(running.client, **bearer(token[:-1] + "x")) == 401
    assert infer(running.client, **{"X-Api-Key": token}) == 200
    for refused in (token.replace("_", "-"), f"{token}0", token[:20]):
        running.client.get("/v1/models", headers=bearer(refused))
    assert running.client.get(f"/v1/models?api_key={token}").status_code == 400
    listed = tursi("keys", "list", "--json")
    (one,) = [each for each in json.loads(listed.stdout)["keys"] if each["name"] == "laptop"]
    assert one["last_used_at"] is not None
    assert "laptop" in tursi("keys", "list").stdout
    # The listener has no role control, and says so.
    over = tursi("--url", running.url, "ps", TURSI_API_KEY=token)
    assert (over.returncode, "control" in over.stderr) == (1, True)
    assert tursi("keys", "revoke", "laptop").returncode == 0
    assert infer(running.client, **bearer(token)) == 401
    secret = token.rpartition("_")[2]
    for file in running.folder.rglob("*"):
        if file.is_file():
            assert secret.encode() not in file.read_bytes(), file


def test_control_over_tcp_needs_an_admin_key_and_keys_outlive_the_daemon() -> None:
    with daemon(scripted=True) as one:
        port = free_port()
        text = one.configuration.read_text()
        one.configuration.write_text(
            text + f'[[http.listeners]]\nendpoint = "tcp:{port}:interface=127.0.0.1"\n'
            'roles = ["control", "inference"]\n[http]\nrequire_keys = true\n'
        )
        one.stop()
        one.start()
        keys = {scope: make_key(one, scope, scope) for scope in ("infer", "read", "admin")}
        doomed = make_key(one, "doomed", "admin")
        assert one.control.delete("/keys/doomed").status_code == 200
        one.kill()
        one.start()
        folder = one.script(echo=True)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            assert client.get("/deployments").status_code == 401
            body = {"model": str(folder)}

            def put(token: str) -> int:
                answer = client.put("/deployments/echo", json=body, headers=bearer(token))
                return answer.status_code

            assert client.put("/deployments/echo", json=body).status_code == 401
            assert [put(each) for each in (keys["infer"], keys["read"])] == [403, 403]
            assert put(doomed) == 401
            assert put(keys["admin"]) == 201
            assert client.get("/deployments", headers=bearer(keys["read"])).status_code == 200
            one.wait("echo")
            assert infer(client) == 401
            assert infer(client, **bearer("unused")) == 401
            assert infer(client, **bearer(keys["infer"])) == 200
            generations = one.control.get("/deployments/echo/generations").json()
            assert generations["generations"][0]["created_by"] == "key 3 (admin)"
        tursi = [str(TURSI), "--url", f"http://127.0.0.1:{port}", "ps"]
        for token, status in ((keys["read"], 0), (keys["infer"], 1), ("", 1)):
            done = subprocess.run(
                tursi,
                env={**os.environ, "TURSI_API_KEY": token},
                capture_output=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == status, done.stderr


@pytest.mark.parametrize(
    "name", ["%00", "a%00b", "..", "%2e%2e", "a%5Cb", "C:%5C", "%2Fetc", "x" * 4096, "%E2%88%95"]
)
def test_a_name_that_is_none_names_nothing(running: Daemon, name: str) -> None:
    body = {"model": str(running.script(echo=True))}
    assert running.control.put(f"/deployments/{name}", json=body).status_code in {400, 404, 405}
    assert running.client.get(f"/models/{name}/info").status_code in {400, 404, 405}
    names = [one["name"] for one in running.control.get("/deployments").json()["deployments"]]
    assert names == ["echo"]


# -- the control socket -------------------------------------------------------------------

_ASK = """
import os, socket, sys
if os.getuid() == 0:
    os.setgroups([int(each) for each in sys.argv[3].split(",") if each])
    os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
one = socket.socket(socket.AF_UNIX)
try:
    one.connect(sys.argv[1])
except PermissionError:
    print("denied")
else:
    one.sendall(b"GET /status HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n")
    print(one.recv(12).decode())
"""


def ask_as(path: Path, uid: int, *groups: int) -> str:
    """What the control socket says to another user."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _ASK, path, str(uid), ",".join(map(str, groups))],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


def test_the_control_socket_is_closed_to_other_users_twice(running: Daemon) -> None:
    path = running.runtime / "control.sock"
    assert path.stat().st_mode & 0o777 == 0o660
    assert path.parent.stat().st_mode & 0o7777 == 0o750
    assert ask_as(path, os.getuid()) == "HTTP/1.1 200"
    if os.getuid() != 0:
        return
    assert ask_as(path, NOBODY) == "denied"
    # Were its mode and its folder's wrong, the daemon would still look who asks.
    modes = [(each, each.stat().st_mode) for each in (running.folder, path.parent, path)]
    for each, mode in modes:
        each.chmod(mode | 0o777)
    try:
        assert ask_as(path, NOBODY) == "HTTP/1.1 403"
        assert ask_as(path, NOBODY, 0) == "HTTP/1.1 403"
        assert ask_as(path, 0) == "HTTP/1.1 200"
    finally:
        for each, mode in modes:
            each.chmod(mode)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_members_of_the_control_group_get_in() -> None:
    import grp

    group = grp.getgrgid(NOBODY) if _exists(NOBODY) else grp.getgrnam("users")
    with daemon(scripted=True, settings=f'[http]\ncontrol_group = "{group.gr_name}"\n') as one:
        one.folder.chmod(0o755)
        path = one.runtime / "control.sock"
        assert {path.stat().st_gid, path.parent.stat().st_gid} == {group.gr_gid}
        assert ask_as(path, 4242, group.gr_gid) == "HTTP/1.1 200"
        assert ask_as(path, 4242) == "denied"
        text = one.configuration.read_text()
        one.configuration.write_text(text.replace(group.gr_name, ""))
        assert one.control.post("/reload").json()["changed"] == ["http.control_group"]
        assert path.stat().st_gid == os.getgid()
        assert ask_as(path, 4242, group.gr_gid) == "denied"
        one.configuration.write_text(text.replace(group.gr_name, "nobody-knows-it"))
        assert one.control.post("/reload").status_code == 422
        one.configuration.write_text(text)
        assert one.control.post("/reload").status_code == 200
        assert ask_as(path, 4242, group.gr_gid) == "HTTP/1.1 200"


def _exists(gid: int) -> bool:
    import grp

    return any(each.gr_gid == gid for each in grp.getgrall())


# -- TLS and other machines -----------------------------------------------------------------


def fresh_name(port: int) -> str:
    with handshake(port) as secured:
        return common_name(secured)


def get(secured: ssl.SSLSocket, path: str, token: str = "") -> bytes:
    authorization = f"Authorization: Bearer {token}\r\n" if token else ""
    head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{authorization}\r\n"
    secured.sendall(head.encode())
    return secured.recv(65536)


def test_a_listener_with_tls_needs_keys_outside_and_takes_new_certificates(
    tmp_path: Path,
) -> None:
    certificate(tmp_path, "first")
    port, outside = free_port(), free_port()
    files = f"privateKey={tmp_path}/key.pem:certKey={tmp_path}/cert.pem"
    settings = "".join(
        f'[[http.listeners]]\nendpoint = "ssl:{where}:{files}"\nroles = ["control", "health"]\n'
        for where in (f"{port}:interface=127.0.0.1", outside)
    )
    with daemon(scripted=True, settings=settings) as one:
        token = make_key(one, "remote", "admin")
        early = handshake(port)
        assert common_name(early) == "first"
        assert early.version() in {"TLSv1.2", "TLSv1.3"}
        assert get(early, "/deployments", token).startswith(b"HTTP/1.1 200")
        with handshake(outside) as other:
            assert get(other, "/health").startswith(b"HTTP/1.1 200")
        with handshake(outside) as other:
            assert get(other, "/deployments").startswith(b"HTTP/1.1 401")
        with handshake(outside) as other:
            other.sendall(b"GET /health HTTP/1.1\r\nHost: evil\r\n\r\n")
            assert other.recv(65536).startswith(b"HTTP/1.1 403")
            # Refused while it arrives: TLS ends first, then the connection.
            other.unwrap()
        with handshake(outside) as other:
            assert get(other, "/deployments", token).startswith(b"HTTP/1.1 200")
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings(action="ignore"):
            old.minimum_version = ssl.TLSVersion.TLSv1
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(OSError, match=r"(?i)alert|protocol|version|EOF|reset"):
            handshake(port, old)
        # A reload takes new certificates; who is connected stays so.
        certificate(tmp_path, "second")
        assert one.process is not None
        one.process.send_signal(signal.SIGHUP)
        until(lambda: fresh_name(port) == "second", "the new certificate is used")
        assert one.control.post("/reload").json()["changed"] == []
        certificate(tmp_path, "third")
        assert one.control.post("/reload").json()["changed"] == ["certificates"]
        assert fresh_name(port) == "third"
        assert get(early, "/deployments", token).startswith(b"HTTP/1.1 200")
        (tmp_path / "cert.pem").write_text("garbage")
        assert one.control.post("/reload").status_code == 422
        assert fresh_name(port) == "third"
        early.close()
        assert "Unhandled Error" not in one.log.read_text()


@pytest.mark.parametrize(
    ("listener", "words"),
    [
        ('endpoint = "tcp:{port}"', "behind_proxy = true"),
        ('endpoint = "tcp:{port}"', 'endpoint = "ssl:{port}:privateKey=KEY.pem'),
        ('endpoint = "tcp:{port}:interface=0.0.0.0"', "without TLS"),
        ('endpoint = "tcp6:{port}:interface=\\\\:\\\\:"', "without TLS"),
        ('endpoint = "ssl:{port}:privateKey=/nowhere.pem"', "/nowhere.pem"),
        ('endpoint = "tcp:{port}"\nbehind_proxy = true', ""),
    ],
)
def test_a_listener_for_other_machines_is_refused_unless_it_is_safe(
    tmp_path: Path, listener: str, words: str
) -> None:
    port = free_port()
    file = tmp_path / "tursi.toml"
    file.write_text(
        "[[http.listeners]]\n" + listener.format(port=port) + '\nroles = ["inference"]\n'
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from tursi.tap import Options; Options().parseOptions(sys.argv[1:])",
            "--config",
            file,
            "--state",
            tmp_path / "state",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if not words:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 78
    assert words.format(port=port) in done.stderr
    assert done.stderr.count("\n") == 1
