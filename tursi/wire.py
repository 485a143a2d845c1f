"""Frames between the daemon and a worker, over one inherited socket pair.

A frame is ``length:u32 kind:u8 id:u64 body``, big-endian, where ``length``
counts what follows it. ``id`` names the request (0 where none is meant) and is
never reused within a life. Bodies of requests and answers are the HTTP bytes
themselves; the small structured bodies are msgpack.

A connection opens with HELLO from the worker (before it imports torch), then
LOAD from the daemon, then any number of PROGRESS and one READY or FAILED. An
answer is HEAD, any BODY or TOKS, END.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

import msgspec

from tursi.model import Usage

PROTOCOL_VERSION = 1
MAX_FRAME = 64 * 1024 * 1024
"""Largest ``length`` in bytes that either side accepts."""
MAX_PIECES = 4096
"""Streams that one TOKENS frame may add to."""


class Kind(IntEnum):
    """What a frame says. Below 16 from the daemon, from 16 on from the worker."""

    LOAD = 1
    REQUEST = 2
    CANCEL = 3
    PING = 4
    SHUTDOWN = 5

    HELLO = 16
    PROGRESS = 17
    READY = 18
    FAILED = 19
    HEAD = 20
    BODY = 21
    TOKENS = 22
    END = 23
    PONG = 24


class Frame(NamedTuple):
    """One frame, taken off the wire."""

    kind: int
    id: int
    body: bytes


class WireError(Exception):
    """The peer broke the protocol; the connection can't go on."""


class Hello(msgspec.Struct, frozen=True):
    """The worker's first words."""

    protocol: int
    pid: int
    start_time: int
    """Field 22 of ``/proc/PID/stat``: clock ticks since boot."""


class LastWords(msgspec.Struct, frozen=True):
    """Why a worker is about to exit by itself (FAILED)."""

    code: str
    message: str
    traceback: str = ""
    retry_after: int | None = None
    """Seconds that somebody else (the hub) asks to wait."""


class Ask(NamedTuple):
    """A request as the worker gets it."""

    route: str
    request_id: str
    content_type: str
    seconds: float
    """How long the daemon will wait from now on."""
    body: bytes


class Head(NamedTuple):
    """Status and headers of an answer."""

    status: int
    content_type: str
    headers: dict[str, str]


class End(NamedTuple):
    """The end of an answer: what it cost, and the error code if it failed midway."""

    usage: Usage
    error: str


NO_USAGE = Usage()
"""Of an answer that cost nothing, or nothing that is known."""

_HEADER = struct.Struct(">IBQ")
_ASK = struct.Struct(">fBBB")
_HEAD = struct.Struct(">HB")
_END = struct.Struct(">IIHff")
_TOKEN = struct.Struct(">QI")
_AFTER_LENGTH = _HEADER.size - 4


def encode(kind: int, id: int, body: bytes | memoryview = b"") -> bytes:  # noqa: A002 - the frame's own word
    """One frame as bytes; ``WireError`` if it would be larger than MAX_FRAME."""
    length = _AFTER_LENGTH + len(body)
    if length > MAX_FRAME:
        raise WireError(f"a frame of {length} bytes is over the limit of {MAX_FRAME}")
    return _HEADER.pack(length, kind, id) + bytes(body)


class Decoder:
    """Turns received bytes into frames; holds what is incomplete, touches no transport."""

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._need = 0
        self._limit = limit
        self._parts: list[bytes] = []

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield every frame that ``data`` completes; ``WireError`` on a length out of bounds.

        Consume the whole iterator: what it has not yielded is not kept.
        """
        if self._parts:
            # A large frame arrives in many pieces: joining them only once it
            # is complete keeps the cost linear.
            self._parts.append(data)
            self._need -= len(data)
            if self._need > 0:
                return
            data = b"".join(self._parts)
            self._parts = []
        position, end = 0, len(data)
        while end - position >= _HEADER.size:
            length, kind, id_ = _HEADER.unpack_from(data, position)
            if not _AFTER_LENGTH <= length <= self._limit:
                raise WireError(f"a frame announces {length} bytes")
            stop = position + 4 + length
            if stop > end:
                self._need = stop - end
                break
            yield Frame(kind, id_, data[position + _HEADER.size : stop])
            position = stop
        else:
            self._need = _HEADER.size - (end - position)
        if position < end:
            self._parts = [data[position:] if position else data]

    @property
    def pending(self) -> int:
        """Bytes held of a frame that isn't complete yet."""
        return sum(len(part) for part in self._parts)


def encode_ask(ask: Ask) -> bytes:
    """The body of a REQUEST frame."""
    route = ask.route.encode("ascii")
    request_id = ask.request_id.encode("utf-8")[:255]
    content_type = ask.content_type.encode("utf-8")[:255]
    return b"".join(
        (
            _ASK.pack(ask.seconds, len(route), len(request_id), len(content_type)),
            route,
            request_id,
            content_type,
            ask.body,
        )
    )


def decode_ask(body: bytes) -> Ask:
    """Read a REQUEST frame's body."""
    try:
        seconds, route_length, id_length, type_length = _ASK.unpack_from(body)
        route_end = _ASK.size + route_length
        id_end = route_end + id_length
        type_end = id_end + type_length
        if type_end > len(body):
            raise WireError("a REQUEST frame is cut short")
        return Ask(
            route=body[_ASK.size : route_end].decode("ascii"),
            request_id=body[route_end:id_end].decode("utf-8", "replace"),
            content_type=body[id_end:type_end].decode("utf-8", "replace"),
            seconds=seconds,
            body=body[type_end:],
        )
    except (struct.error, UnicodeDecodeError) as error:
        raise WireError(f"a REQUEST frame can't be read: {error}") from error


def encode_head(head: Head) -> bytes:
    """The body of a HEAD frame."""
    content_type = head.content_type.encode("ascii")
    headers = msgspec.msgpack.encode(head.headers) if head.headers else b""
    return _HEAD.pack(head.status, len(content_type)) + content_type + headers


def decode_head(body: bytes) -> Head:
    """Read a HEAD frame's body."""
    try:
        status, length = _HEAD.unpack_from(body)
        stop = _HEAD.size + length
        headers = body[stop:]
        return Head(
            status=status,
            content_type=body[_HEAD.size : stop].decode("ascii"),
            headers=msgspec.msgpack.decode(headers, type=dict[str, str]) if headers else {},
        )
    except (struct.error, UnicodeDecodeError, msgspec.MsgspecError) as error:
        raise WireError(f"a HEAD frame can't be read: {error}") from error


def encode_end(end: End) -> bytes:
    """The body of an END frame."""
    usage = end.usage
    return _END.pack(
        min(usage.prompt_tokens, 0xFFFFFFFF),
        min(usage.completion_tokens, 0xFFFFFFFF),
        min(usage.batch_size, 0xFFFF),
        usage.queue_seconds,
        usage.compute_seconds,
    ) + end.error.encode("ascii")


def decode_end(body: bytes) -> End:
    """Read an END frame's body."""
    try:
        prompt, completion, batch, queue, compute = _END.unpack_from(body)
        return End(
            Usage(prompt, completion, batch, queue, compute), body[_END.size :].decode("ascii")
        )
    except (struct.error, UnicodeDecodeError) as error:
        raise WireError(f"an END frame can't be read: {error}") from error


def encode_tokens(pieces: Iterable[tuple[int, bytes]]) -> bytes:
    """The body of a TOKENS frame: what one decode step adds to each stream."""
    return b"".join(_TOKEN.pack(id_, len(data)) + data for id_, data in pieces)


def decode_tokens(body: bytes) -> list[tuple[int, bytes]]:
    """Read a TOKENS frame's body."""
    pieces: list[tuple[int, bytes]] = []
    position = 0
    try:
        while position < len(body):
            id_, length = _TOKEN.unpack_from(body, position)
            start = position + _TOKEN.size
            position = start + length
            if position > len(body):
                raise WireError("a TOKENS frame is cut short")
            if len(pieces) == MAX_PIECES:
                raise WireError(f"a TOKENS frame has more than {MAX_PIECES} pieces")
            pieces.append((id_, body[start:position]))
    except struct.error as error:
        raise WireError(f"a TOKENS frame can't be read: {error}") from error
    return pieces
