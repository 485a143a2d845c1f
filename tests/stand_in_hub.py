"""A small Hugging Face hub on loopback, for the unmodified huggingface_hub.

``HF_ENDPOINT`` names it to a client, which also needs ``HF_HUB_DISABLE_XET=1``
(there is no xet storage here) and no ``HF_HUB_OFFLINE``. It serves folders as
repositories: model information, HEAD and GET of files with ranges, and
redirects to a content host of another origin, as the real hub does for large
files. Faults are served on order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import unquote, urlsplit

LFS_FROM = 1024
"""Files of this size in bytes are large ones, served from the content host."""

_API = re.compile(r"/api/models/(?P<repository>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


@dataclass
class Fault:
    """What to do instead of answering well, the next ``times`` times."""

    path: str
    """Regular expression, searched in the request's path."""
    kind: Literal[
        "status", "truncate", "stall", "slow", "garbage", "corrupt", "hold", "whole", "short"
    ] = "status"
    """``whole`` ignores a Range, ``short`` says a smaller Content-Length than there is."""
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    method: str = ""
    times: int = 1_000_000
    seconds: float = 0.0
    """Of ``slow``: between two pieces of the body."""
    at: float = 0.5
    """Of ``hold``: the part of the body that goes first; 0.0 holds back the whole answer."""
    reached: threading.Event = field(default_factory=threading.Event)
    """Of ``hold``: it has come to that."""
    released: threading.Event = field(default_factory=threading.Event)
    """Of ``hold``: it may go on."""


class Seen(NamedTuple):
    """A request that came."""

    method: str
    host: str
    path: str
    token: str | None
    range: str | None


@dataclass
class Snapshot:
    """A repository at one commit."""

    folder: Path
    commit: str
    sizes: dict[str, int] = field(default_factory=dict)
    """Sizes to lie about in the listing."""

    def names(self) -> list[str]:
        paths = (p for p in self.folder.rglob("*") if p.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in paths)

    def data(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


class StandInHub:
    """The hub; a context manager that serves while it is open."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Snapshot]] = {}
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.sent: Counter[str] = Counter()
        """Bytes of files that went out, by path."""
        self.token: str | None = None
        """The only token that is let in; None lets everyone in."""
        self.names_alone = False
        """Whether files are listed as some mirrors do: without sizes and hashes."""
        self.closed = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined] # http.server knows no other way
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def content_host(self) -> str:
        # The same server under another name is another origin to the client.
        return f"http://localhost:{self._server.server_port}"

    def add(self, repository: str, folder: Path, revision: str = "main") -> Snapshot:
        """Serve ``folder`` as ``repository`` at ``revision``."""
        snapshot = Snapshot(folder, "")
        digest = hashlib.sha1(repository.encode())
        for name in snapshot.names():
            digest.update(name.encode() + b"\0" + snapshot.data(name))
        snapshot.commit = digest.hexdigest()
        revisions = self.repositories.setdefault(repository, {})
        revisions[revision] = revisions[snapshot.commit] = snapshot
        return snapshot

    def environment(self, home: Path) -> dict[str, str]:
        """What the client needs in its environment."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}

    def downloads(self) -> list[str]:
        """The paths of files that were asked for, in order."""
        return [s.path for s in self.seen if s.method == "GET" and not s.path.startswith("/api/")]

    def fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.path, path) and fault.method in ("", method):
                    fault.times -= 1
                    return fault
        return None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closed.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> StandInHub:
        hub: StandInHub = self.server.hub  # type: ignore[attr-defined] # see StandInHub
        return hub

    def handle(self) -> None:
        # Clients are killed in the midst of everything.
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        pass

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        host = self.headers["Host"] or ""
        self.hub.seen.append(Seen(self.command, host, path, token, self.headers["Range"]))
        fault = self.hub.fault(self.command, path)
        if fault is not None and fault.kind == "hold" and not fault.at:
            self._hold(fault)
            fault = None
        if fault is None or not self._fail(fault):
            self._answer(path, token, fault)

    def _fail(self, fault: Fault) -> bool:
        """Whether that is all the answer."""
        if fault.kind == "status":
            self._refuse(fault.status, **fault.headers)
        elif fault.kind == "garbage":
            self._send(200, b"<html>Welcome to the hotel's network</html>", {})
        return fault.kind in {"status", "garbage"}

    def _answer(self, path: str, token: str | None, fault: Fault | None) -> None:
        if path.startswith("/content/"):
            _, _, repository, commit, name = path.split("/", 4)
            snapshot = self.hub.repositories[repository.replace("--", "/")][commit]
            self._send_file(snapshot, name, fault, redirect=False)
        elif self.hub.token is not None and token != self.hub.token:
            if token is None:
                self._refuse(401, X_Error_Code="RepoNotFound")
            else:
                self._refuse(401, X_Error_Message="Invalid credentials in Authorization header")
        elif match := _FILE.fullmatch(path):
            snapshot_ = self._find(match)
            if snapshot_ is not None:
                self._send_file(snapshot_, match["name"], fault, redirect=True)
        elif match := _API.fullmatch(path):
            snapshot_ = self._find(match)
            if snapshot_ is not None:
                self._send(200, _information(match["repository"], snapshot_, self.hub), {}, fault)
        else:
            self._refuse(404)

    def _find(self, match: re.Match[str]) -> Snapshot | None:
        revisions = self.hub.repositories.get(match["repository"])
        if revisions is None:
            # The real hub says so for what doesn't exist and for what is private.
            self._refuse(401, X_Error_Code="RepoNotFound")
            return None
        snapshot = revisions.get(match["revision"] or "main")
        if snapshot is None:
            self._refuse(404, X_Error_Code="RevisionNotFound")
        return snapshot

    def _send_file(
        self, snapshot: Snapshot, name: str, fault: Fault | None, *, redirect: bool
    ) -> None:
        if name not in snapshot.names():
            self._refuse(404, X_Error_Code="EntryNotFound")
            return
        data = snapshot.data(name)
        headers = {"X-Repo-Commit": snapshot.commit, "Accept-Ranges": "bytes"}
        if len(data) >= LFS_FROM and redirect:
            repository = next(
                key for key, revisions in self.hub.repositories.items()
                if snapshot in revisions.values()
            ).replace("/", "--")  # fmt: skip
            headers["Location"] = (
                f"{self.hub.content_host}/content/{repository}/{snapshot.commit}/{name}"
            )
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(data))
            self._send(302, b"", headers)
            return
        headers["ETag"] = f'"{_blob(data)}"'
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if fault is not None and fault.kind == "whole":
            wanted = fault = None
        if wanted and (start := int(wanted[1])) < len(data):
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(206, data[start:], headers, fault)
        else:
            self._send(200, data, headers, fault)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], fault: Fault | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        short = fault is not None and fault.kind == "short"
        self.send_header("Content-Length", str(len(body) - 7 if short else len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is None or short:
            self._write(body)
            self.close_connection = self.close_connection or short
            return
        if fault.kind == "corrupt":
            self._write(body[:-1] + bytes([body[-1] ^ 1]))
            return
        half = int(len(body) * fault.at)
        self._write(body[:half])
        self.wfile.flush()
        if fault.kind == "hold":
            self._hold(fault)
            self._write(body[half:])
            return
        if fault.kind == "slow":
            for start in range(half, len(body), 64 * 1024):
                if self.hub.closed.wait(fault.seconds):
                    break
                self._write(body[start : start + 64 * 1024])
            return
        if fault.kind == "stall":
            self.hub.closed.wait(60)
        self.close_connection = True

    def _hold(self, fault: Fault) -> None:
        fault.reached.set()
        while not fault.released.wait(0.05) and not self.hub.closed.is_set():
            pass

    def _write(self, data: bytes) -> None:
        # Who has been killed meanwhile takes no more.
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data)
            self.hub.sent[unquote(urlsplit(self.path).path)] += len(data)

    def _refuse(self, status: int, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._send(status, b'{"error": "refused"}', named)


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _information(repository: str, snapshot: Snapshot, hub: StandInHub) -> bytes:
    siblings: list[dict[str, object]] = []
    for name in snapshot.names():
        data = snapshot.data(name)
        size = snapshot.sizes.get(name, len(data))
        sibling: dict[str, object] = {"rfilename": name, "size": size, "blobId": _blob(data)}
        if len(data) >= LFS_FROM:
            sha256 = hashlib.sha256(data).hexdigest()
            sibling["lfs"] = {"size": size, "sha256": sha256, "pointerSize": 130}
        siblings.append({"rfilename": name} if hub.names_alone else sibling)
    return json.dumps(
        {
            "_id": "1",
            "id": repository,
            "modelId": repository,
            "sha": snapshot.commit,
            "private": False,
            "disabled": False,
            "gated": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
    ).encode()
