"""The way to the daemon: HTTP over its control socket, and what can go wrong on it."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn
from urllib.parse import quote

import click

from tursi.cli.terminal import safe

if TYPE_CHECKING:
    import httpx

SOCKET_PATH_LIMIT = 107
"""Bytes in the path of a Unix socket on Linux (``sockaddr_un``, without its final NUL)."""
ANSWER_SECONDS = 60.0
INFERENCE_SECONDS = 660.0
"""A little more than the daemon's own deadline for a request."""
_CONNECT_SECONDS = 5.0
_URL = re.compile(r"https?://[A-Za-z0-9.\[\]:_-]+/?")
_MAX_LINE = 16 * 1024 * 1024
"""Bytes in one line of an event stream."""


class Exit(IntEnum):
    """Exit codes, for scripts."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NO_DAEMON = 3
    NOT_FOUND = 4
    DEPLOYMENT_FAILED = 5
    TRY_LATER = 6
    INTERRUPTED = 130


_EXIT_BY_CODE: Mapping[str, Exit] = {
    "model_not_found": Exit.NOT_FOUND,
    "deployment_not_found": Exit.NOT_FOUND,
    "crash_not_found": Exit.NOT_FOUND,
    "generation_not_found": Exit.NOT_FOUND,
    "pull_not_found": Exit.NOT_FOUND,
    "catalogue_entry_not_found": Exit.NOT_FOUND,
    "deployment_unavailable": Exit.DEPLOYMENT_FAILED,
    "shutting_down": Exit.NO_DAEMON,
}


class Failure(click.ClickException):
    """One line for the user, and the exit code; ``code`` is the API's error code."""

    def __init__(self, message: str, status: Exit = Exit.FAILED, code: str = "") -> None:
        super().__init__(safe(message))
        self.exit_code = int(status)  # type: ignore[misc] # click says how, not its annotation
        self.code = code

    def show(self, file: IO[Any] | None = None) -> None:
        """Write the line to stderr."""
        click.echo(f"tursi: {self.message}", file=file, err=file is None)


class Answer(NamedTuple):
    """A successful answer."""

    status: int
    body: Any
    headers: Mapping[str, str]


class Fields(dict[str, Any]):
    """An object of an answer; one that lacks a field comes from a daemon of another version."""

    def __missing__(self, name: str) -> NoReturn:
        raise Failure(
            f"The daemon's answer has no {name!r}: it is of another version than this command. "
            "`tursi version` shows both, and `tursi restart` starts this one."
        )

    def __or__(self, other: Mapping[str, Any]) -> Fields:  # type: ignore[override] # to such only
        return Fields({**self, **other})


class StreamEvent(NamedTuple):
    """One server-sent event."""

    id: str | None
    data: str


class Connection:
    """Speaks to the daemon behind ``socket``, or at ``url``; connects when first used.

    ``key`` is an API key, which a daemon at a URL asks for.
    """

    def __init__(self, socket: Path, url: str = "", key: str = "") -> None:
        self.socket = socket
        self.url = url
        self._key = key
        self._network: Any = None
        """The connection that uploads use,"""
        self._heard = False
        """and whether an answer has come by it."""

    @property
    def place(self) -> str:
        """Where the daemon is looked for."""
        return self.url or str(self.socket)

    def get(self, path: str, **parameters: object) -> Any:
        """The body of ``GET path``."""
        return self.call("GET", path, parameters=parameters).body

    def call(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        parameters: Mapping[str, object] | None = None,
        seconds: float = ANSWER_SECONDS,
    ) -> Answer:
        """Ask and wait for the whole answer; ``Failure`` for everything but success."""
        with self._explained(seconds):
            response = self._client.send(self._request(method, path, body, parameters, seconds))
        _check(response)
        return Answer(response.status_code, _decoded(response), response.headers)

    @contextmanager
    def stream(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        parameters: Mapping[str, object] | None = None,
        seconds: float | None = None,
    ) -> Iterator[Iterator[StreamEvent]]:
        """Server-sent events as they come; leaving the context ends the stream.

        ``seconds`` bounds the silence between two of them.
        """
        with self._explained(seconds):
            request = self._request(method, path, body, parameters, seconds)
            response = self._client.send(request, stream=True)
            try:
                if response.is_error:
                    response.read()
                _check(response)
                yield _events(response.iter_bytes())
            finally:
                response.close()

    def upload(
        self,
        path: str,
        pieces: Iterator[bytes],
        content_type: str,
        *,
        parameters: Mapping[str, object],
        seconds: float,
    ) -> Any:
        """Send a body of any length; the body of the answer.

        No more is sent once there is an answer: who is refused in the middle would
        otherwise send all the rest, and never read why. That can be told only on a
        connection by which an answer has come before.
        """
        with self._explained(seconds):
            request = self._request("POST", path, None, parameters, seconds, pieces=pieces)
            request.headers["content-type"] = content_type
            request.extensions["trace"] = self._remember
            response = self._client.send(request)
        self._heard = True
        _check(response)
        return _decoded(response)

    def _remember(self, event: str, information: Mapping[str, Any]) -> None:
        if event.startswith("connection.") and event.endswith(".complete"):
            # Of a connection by TLS the encrypted one, which comes last.
            self._network, self._heard = information["return_value"], False

    def _unless_answered(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            # The first that comes over TLS is no answer.
            if self._heard and self._network.get_extra_info("is_readable"):
                return
            yield piece

    def download(
        self,
        method: str,
        path: str,
        file: IO[bytes],
        *,
        seconds: float,
        advanced: Callable[[int, int | None], None] | None = None,
    ) -> None:
        """Write the whole answer to ``file``; ``seconds`` bounds the silence in it.

        ``advanced`` is told how many bytes have come, of how many.
        """
        with self._explained(seconds):
            response = self._client.send(
                self._request(method, path, None, None, seconds), stream=True
            )
            try:
                if response.is_error:
                    response.read()
                _check(response)
                length = response.headers.get("content-length", "")
                total, done = int(length) if length.isdecimal() else None, 0
                for piece in _unbroken(response.iter_raw()):
                    file.write(piece)
                    done += len(piece)
                    if advanced is not None:
                        advanced(done, total)
            finally:
                response.close()

    def close(self) -> None:
        """Hang up."""
        self._client.close()

    @cached_property
    def _client(self) -> httpx.Client:
        # Imported late: it takes longer than all the rest of a command's start.
        import httpx

        headers = {"user-agent": "tursi-cli"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        if self.url:
            return self._over_tcp(headers)
        if len(os.fsencode(self.socket)) > SOCKET_PATH_LIMIT:
            raise Failure(
                f"The socket's path {self.socket} is over {SOCKET_PATH_LIMIT} bytes, which no "
                "Unix socket can have; choose a shorter runtime folder (twistd tursi --runtime) "
                "and name it with --socket.",
                Exit.USAGE,
            )
        return httpx.Client(
            # No TLS on it: loading the certificates would only take time.
            transport=httpx.HTTPTransport(uds=str(self.socket), verify=False),
            base_url="http://localhost",
            headers=headers,
            # Proxies and .netrc have no say on a local socket.
            trust_env=False,
        )

    def _over_tcp(self, headers: Mapping[str, str]) -> httpx.Client:
        import httpx

        if not _URL.fullmatch(self.url):
            raise Failure(
                "The daemon's URL isn't one; write it like https://models.example.org:8430, and "
                "the key into TURSI_API_KEY.",
                Exit.USAGE,
            )
        return httpx.Client(base_url=self.url, headers=headers)

    def _request(
        self,
        method: str,
        path: str,
        body: object,
        parameters: Mapping[str, object] | None,
        seconds: float | None,
        *,
        pieces: Iterator[bytes] | None = None,
    ) -> httpx.Request:
        import httpx

        given = {
            name: str(value) for name, value in (parameters or {}).items() if value is not None
        }
        with _utf8():
            return self._client.build_request(
                method,
                path,
                json=body,
                content=None if pieces is None else self._unless_answered(pieces),
                params=given or None,
                timeout=httpx.Timeout(seconds, connect=_CONNECT_SECONDS),
            )

    @contextmanager
    def _explained(self, seconds: float | None) -> Iterator[None]:
        import httpx

        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            self._unreachable(error)
        except httpx.TimeoutException:
            raise Failure(
                f"The daemon has not answered within {seconds:.0f} s.", Exit.TRY_LATER
            ) from None
        except httpx.RemoteProtocolError as error:
            raise Failure(
                f"The connection to the daemon at {self.place} broke: {error}", Exit.NO_DAEMON
            ) from None
        except httpx.TransportError as error:
            raise Failure(
                f"The connection to the daemon at {self.place} broke: "
                f"{error or type(error).__name__}",
                Exit.NO_DAEMON,
            ) from None

    def _unreachable(self, error: BaseException) -> NoReturn:
        number = _errno(error)
        if self.url and "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise Failure(
                f"The certificate of {self.url} isn't trusted here ({error}); name the file of "
                "who has signed it in SSL_CERT_FILE.",
                Exit.NO_DAEMON,
            ) from None
        if self.url:
            raise Failure(
                f"No daemon answers at {self.url} ({error or 'no answer'}).", Exit.NO_DAEMON
            ) from None
        if number in {errno.EACCES, errno.EPERM}:
            raise Failure(
                f"You may not use the control socket {self.socket} (permission denied); run this "
                "as the daemon's user or as a member of the socket's group.",
                Exit.NO_DAEMON,
            ) from None
        why = {
            errno.ENOENT: "there is no such socket",
            errno.ENOTDIR: "there is no such socket",
            errno.ECONNREFUSED: "nobody listens on it",
        }.get(number or 0, str(error) or "no answer")
        raise Failure(
            f"No daemon answers at {self.place} ({why}). Start one with `tursi start`, or "
            "name its socket with --socket or TURSI_SOCKET.",
            Exit.NO_DAEMON,
        ) from None


def path(*segments: str) -> str:
    """A URL path of these segments, each percent-encoded."""
    if "" in segments:
        raise Failure("The name is empty.", Exit.USAGE)
    with _utf8():
        return "".join("/" + quote(segment, safe="") for segment in segments)


@contextmanager
def _utf8() -> Iterator[None]:
    """Bytes of the command line or the input that are no text came in as lone surrogates."""
    try:
        yield
    except UnicodeEncodeError as error:
        # Named as it was given, not as part of what was to be sent.
        bad = ascii(error.object[error.start : error.end]).replace("\\udc", "\\x")
        raise Failure(f"What was given isn't valid UTF-8 (at {bad}).", Exit.USAGE) from None


def failure(body: Any, status: int) -> Failure:
    """The failure that an error body tells of, in the shape of whichever route it came from."""
    found = body.get("error") if isinstance(body, dict) else None
    # Hugging Face's shape has the sentence itself there, and the rest beside it.
    error = found if isinstance(found, dict) else body if isinstance(body, dict) else {}
    message = found if isinstance(found, str) else error.get("message")
    code = str(error.get("code") or "")
    text = str(message or f"The daemon answered with status {status}.")
    if code == "api_key_required":
        text = "The daemon needs an API key; put it into TURSI_API_KEY."
    if error.get("incident"):
        text = f"{text} (incident {error['incident']})"
    outcome = _EXIT_BY_CODE.get(code, Exit.NOT_FOUND if status == 404 else Exit.FAILED)
    if error.get("retry_after") is not None:
        text = f"{text} (try again in {error['retry_after']} s)"
        outcome = _EXIT_BY_CODE.get(code, Exit.TRY_LATER)
    return Failure(text, outcome, code)


def _check(response: httpx.Response) -> None:
    if not response.is_success:
        raise failure(_decoded(response, strict=False), response.status_code)


def _unbroken(pieces: Iterator[bytes]) -> Iterator[bytes]:
    import httpx

    try:
        yield from pieces
    except httpx.RemoteProtocolError:
        raise Failure(
            "The daemon has broken off in the middle; if it still runs, its log says why.",
            Exit.NO_DAEMON,
        ) from None


def _decoded(response: httpx.Response, *, strict: bool = True) -> Any:
    try:
        return json.loads(response.content, object_hook=Fields)
    except ValueError:
        if strict:
            raise Failure("The daemon's answer isn't JSON; is it Tursi's socket?") from None
        return None


def _events(chunks: Iterator[bytes]) -> Iterator[StreamEvent]:
    identity: str | None = None
    data: list[str] = []
    for text in _lines(chunks):
        field, _, value = text.partition(":")
        value = value.removeprefix(" ")
        if field == "id":
            identity = value
        elif field == "data":
            data.append(value)
        elif not text and data:
            yield StreamEvent(identity, "\n".join(data))
            data = []


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    # httpx would also end lines at U+2028 and its like, which JSON has unescaped.
    held = b""
    for chunk in chunks:
        *complete, held = (held + chunk).split(b"\n")
        if len(held) > _MAX_LINE:
            raise Failure("The daemon's stream has a line that is too long.")
        for each in complete:
            yield each.removesuffix(b"\r").decode("utf-8", "replace")


def _errno(error: BaseException | None) -> int | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__ or error.__context__
    return None
