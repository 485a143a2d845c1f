from __future__ import annotations

import itertools
import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tursi.model import Usage
from tursi.wire import (
    MAX_FRAME,
    Ask,
    Decoder,
    End,
    Frame,
    Head,
    Kind,
    WireError,
    decode_ask,
    decode_end,
    decode_head,
    decode_tokens,
    encode,
    encode_ask,
    encode_end,
    encode_head,
    encode_tokens,
)

U32 = st.integers(0, 2**32 - 1)
IDS = st.integers(0, 2**64 - 1)
FRAMES = st.lists(st.builds(Frame, st.integers(0, 255), IDS, st.binary(max_size=300)), max_size=12)
ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=100)
FLOATS = st.floats(0, 1e9, width=32)
HEADS = st.builds(
    Head, st.integers(100, 599), ASCII, st.dictionaries(st.text(max_size=20), st.text(max_size=20))
)
ENDS = st.builds(End, st.builds(Usage, U32, U32, st.integers(0, 2**16 - 1), FLOATS, FLOATS), ASCII)
ASKS = st.builds(Ask, ASCII, ASCII, ASCII, FLOATS, st.binary(max_size=200))
TOKENS = st.lists(st.tuples(IDS, st.binary(max_size=50)), max_size=10)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """``data`` cut at the given places."""
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(places)]


# -- frames -------------------------------------------------------------------------


@given(FRAMES, st.lists(st.integers(0, 4000), max_size=30))
def test_frames_survive_any_chunking(frames: list[Frame], cuts: list[int]) -> None:
    decoder = Decoder()
    received: list[Frame] = []
    for piece in pieces(b"".join(encode(*frame) for frame in frames), cuts):
        received.extend(decoder.feed(piece))
    assert received == frames
    assert decoder.pending == 0


@given(FRAMES.filter(bool))
def test_frames_survive_byte_by_byte_and_come_as_soon_as_complete(frames: list[Frame]) -> None:
    decoder = Decoder()
    for frame in frames:
        encoded = encode(*frame)
        for number, byte in enumerate(encoded[:-1], 1):
            assert list(decoder.feed(bytes([byte]))) == []
            assert decoder.pending == number
        assert list(decoder.feed(encoded[-1:])) == [frame]


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_garbage_is_a_frame_or_refused_and_never_anything_else(
    data: bytes, cuts: list[int]
) -> None:
    decoder = Decoder(limit=100)
    try:
        for piece in pieces(data, cuts):
            for frame in decoder.feed(piece):
                assert len(frame.body) <= 100 - 9
            assert decoder.pending <= 4 + 100
    except WireError:
        pass


@pytest.mark.parametrize("length", [0, 8, MAX_FRAME + 1, 2**31, 2**32 - 1])
def test_a_length_out_of_bounds_is_refused_from_the_header_alone(length: int) -> None:
    header = struct.pack(">IBQ", length, Kind.BODY, 1)
    with pytest.raises(WireError, match=str(length)):
        list(Decoder().feed(header))


def test_the_largest_frame_and_one_more() -> None:
    body = bytes(MAX_FRAME - 9)
    (frame,) = Decoder().feed(encode(Kind.BODY, 1, body))
    assert frame.body == body
    with pytest.raises(WireError, match="over the limit"):
        encode(Kind.BODY, 1, body + b"x")


def test_a_large_frame_in_many_pieces_is_joined_once() -> None:
    # A decoder that joined at each piece would copy 8 GB here.
    body = bytes(8 * 1024 * 1024)
    decoder = Decoder()
    encoded = encode(Kind.REQUEST, 7, body)
    received: list[Frame] = []
    for start in range(0, len(encoded), 4096):
        received.extend(decoder.feed(encoded[start : start + 4096]))
    assert received == [Frame(Kind.REQUEST, 7, body)]


def test_a_memoryview_is_a_body() -> None:
    assert list(Decoder().feed(encode(Kind.BODY, 1, memoryview(b"abc")))) == [
        Frame(Kind.BODY, 1, b"abc")
    ]


def test_the_two_directions_share_no_kind() -> None:
    daemon = {Kind.LOAD, Kind.REQUEST, Kind.CANCEL, Kind.PING, Kind.SHUTDOWN}
    assert {kind for kind in Kind if kind < 16} == daemon


# -- bodies ---------------------------------------------------------------------------


@given(ASKS)
def test_ask(ask: Ask) -> None:
    assert decode_ask(encode_ask(ask)) == ask


@given(st.text(max_size=400), st.text(max_size=400))
def test_a_request_id_of_any_kind_is_cut_and_never_refused(
    request_id: str, content_type: str
) -> None:
    ask = decode_ask(encode_ask(Ask("openai.embeddings", request_id, content_type, 1.0, b"body")))
    assert ask.body == b"body"
    if len(request_id.encode()) <= 255:
        assert ask.request_id == request_id


@given(HEADS)
def test_head(head: Head) -> None:
    assert decode_head(encode_head(head)) == head


@given(ENDS)
def test_end(end: End) -> None:
    assert decode_end(encode_end(end)) == end


def test_counts_past_their_field_are_held_at_its_end() -> None:
    end = decode_end(encode_end(End(Usage(2**40, 2**40, 2**20, 0.0, 0.0), "")))
    assert end.usage == Usage(2**32 - 1, 2**32 - 1, 2**16 - 1, 0.0, 0.0)


@given(TOKENS)
def test_tokens(tokens: list[tuple[int, bytes]]) -> None:
    assert decode_tokens(encode_tokens(tokens)) == tokens


@given(st.binary(max_size=100))
def test_garbage_in_a_body_is_refused_or_read(data: bytes) -> None:
    for decode in (decode_ask, decode_head, decode_end, decode_tokens):
        try:
            decode(data)
        except WireError as error:
            assert "frame" in str(error)  # noqa: PT017 - what it says, where it is raised at all


@given(ASKS, HEADS, TOKENS)
def test_a_body_cut_short_is_refused_or_shorter(
    ask: Ask, head: Head, tokens: list[tuple[int, bytes]]
) -> None:
    encoded = encode_ask(ask)
    with pytest.raises(WireError):
        decode_ask(encoded[: len(encoded) - len(ask.body) - 1])
    with pytest.raises(WireError):
        decode_head(encode_head(head)[:2])
    with pytest.raises(WireError):
        decode_tokens(encode_tokens([*tokens, (1, b"abc")])[:-1])


def test_a_deadline_is_a_number_of_seconds() -> None:
    ask = decode_ask(encode_ask(Ask("r", "i", "t", 600.0, b"")))
    assert math.isclose(ask.seconds, 600.0)
