"""The hot path answers as the ordinary one does, whatever comes and in whatever pieces."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
from conversation import House, Transport, parse
from fake_fleet import End, Head
from hypothesis import given, settings
from hypothesis import strategies as st

from tursi.api.channel import Channel
from tursi.api.hot import HotChannel
from tursi.config import Http
from tursi.errors import QueueFull, WorkerLost
from tursi.fleet import Work
from tursi.model import Role

BODY = {"model": "small", "input": "hello"}
JSON = b'{"model":"small"}'
EVENTS = Head(200, "text/event-stream", {"x-note": "1", "content-length": "7"})
LIMIT = 1024


def post(
    *fields: bytes,
    body: bytes = JSON,
    line: bytes = b"POST /v1/embeddings HTTP/1.1",
    host: bytes = b"Host: localhost",
) -> bytes:
    """A request with these header lines, and no Content-Length but by them."""
    return b"\r\n".join((line, *(each for each in (host, *fields) if each), b"", body))


LENGTH = b"Content-Length: %d" % len(JSON)
PLAIN = post(LENGTH)
CHUNKED = b"Transfer-Encoding: chunked"
CHUNKS = b"5\r\n" + JSON[:5] + b"\r\nc\r\n" + JSON[5:] + b"\r\n0\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"

CONVERSATIONS = {
    "plain": PLAIN,
    "with everything that is usual": post(
        b"Connection: keep-alive", b"Accept: */*", b"content-type: application/json",
        b"X-Request-Id:  probe-1 \t", LENGTH,
    ),
    "an id that could do harm": post(b"X-Request-Id: <script>", LENGTH),
    "two ids": post(b"X-Request-Id: a", b"X-Request-Id: b", LENGTH),
    "not JSON": post(b"Content-Type: text/plain", LENGTH),
    "two types": post(b"Content-Type: application/json", b"Content-Type: text/plain", LENGTH),
    "unknown model": post(b"Content-Length: 13", body=b'{"model":"x"}'),
    "a query": post(LENGTH, line=b"POST /v1/embeddings?a=b HTTP/1.1"),
    "a name in the path": post(LENGTH, line=b"POST /models/org%2Fsmall HTTP/1.1"),
    "a space in the path": post(LENGTH, line=b"POST /models/a b HTTP/1.1"),
    "no UTF-8 in the path": post(LENGTH, line=b"POST /models/%ff HTTP/1.1"),
    "a fragment": post(LENGTH, line=b"POST /models/small#x HTTP/1.1"),
    # -- one after the other
    "two at once": PLAIN + PLAIN,
    "many at once": PLAIN * 8,
    "a GET behind": PLAIN + GET,
    "a GET between": PLAIN + GET + PLAIN,
    "chunks between": PLAIN + post(CHUNKED, body=CHUNKS) + PLAIN,
    "refusals in a row": post(b"Content-Length: 2", body=b"{}") * 8 + PLAIN,
    "an empty line between": PLAIN + b"\r\n" + PLAIN,
    "two empty lines between": PLAIN + b"\r\n\r\n" + PLAIN,
    "garbage behind": PLAIN + b"\x00\xff garbage\r\n\r\n",
    "half a request behind": PLAIN + PLAIN[:30],
    "half a body": PLAIN[:-3],
    "half a head": PLAIN[:40],
    "too much body": post(b"Content-Length: 5") + PLAIN,
    "a client that wants to close": post(b"Connection: close", LENGTH) + PLAIN,
    "a client that wants both": post(b"Connection: keep-alive, close", LENGTH) + PLAIN,
    # -- the request line
    "two spaces": post(LENGTH, line=b"POST  /v1/embeddings HTTP/1.1"),
    "a space at the end": post(LENGTH, line=b"POST /v1/embeddings HTTP/1.1 "),
    "a tab": post(LENGTH, line=b"POST\t/v1/embeddings HTTP/1.1"),
    "lower case": post(LENGTH, line=b"post /v1/embeddings HTTP/1.1"),
    "HTTP/1.0": post(LENGTH, line=b"POST /v1/embeddings HTTP/1.0"),
    "HTTP/1.2": post(LENGTH, line=b"POST /v1/embeddings HTTP/1.2"),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "absolute form": post(LENGTH, line=b"POST http://localhost/v1/embeddings HTTP/1.1"),
    "two slashes": post(LENGTH, line=b"POST //v1/embeddings HTTP/1.1"),
    "control characters": post(LENGTH, line=b"POST /models/a\x01b HTTP/1.1"),
    "eight bits": post(LENGTH, line=b"POST /models/\xe4 HTTP/1.1"),
    "a long path": post(LENGTH, line=b"POST /models/" + b"x" * 20000 + b" HTTP/1.1"),
    # -- Host and where it comes from
    "no host": post(LENGTH, host=b""),
    "two hosts": post(b"Host: localhost", LENGTH),
    "another host": post(LENGTH, host=b"Host: evil.example"),
    "a host with a space": post(LENGTH, host=b"Host: local host"),
    "a host in upper case": post(LENGTH, host=b"HOST: LOCALHOST:80"),
    "an origin": post(b"Origin: http://localhost", LENGTH),
    "an origin without a value": post(b"Origin:", LENGTH),
    "cross-site": post(b"Sec-Fetch-Site: cross-site", LENGTH),
    "same-origin": post(b"Sec-Fetch-Site: same-origin", LENGTH),
    # -- where the body ends
    "no length": post(body=b"") + PLAIN,
    "nothing": post(b"Content-Length: 0", body=b"") + PLAIN,
    "two lengths": post(LENGTH, LENGTH) + PLAIN,
    "two different lengths": post(LENGTH, b"Content-Length: 5") + PLAIN,
    "a list of lengths": post(b"Content-Length: 17, 17") + PLAIN,
    "an empty length": post(b"Content-Length:", body=b"") + PLAIN,
    "zeros before": post(b"Content-Length: 0017") + PLAIN,
    "blanks around": post(b"Content-Length: \t 17 \t ") + PLAIN,
    "a sign": post(b"Content-Length: +17") + PLAIN,
    "negative": post(b"Content-Length: -17") + PLAIN,
    "hexadecimal": post(b"Content-Length: 0x11") + PLAIN,
    "an underscore": post(b"Content-Length: 1_7") + PLAIN,
    "digits of another script": post(b"Content-Length: \xd9\xa1\xd9\xa7") + PLAIN,
    "huge": post(b"Content-Length: 18446744073709551633") + PLAIN,
    "more digits than there is room for": post(b"Content-Length: " + b"9" * 5000),
    "over the limit": post(b"Content-Length: %d" % (LIMIT + 1)) + PLAIN,
    "at the limit": post(b"Content-Length: %d" % LIMIT, body=JSON.ljust(LIMIT)) + PLAIN,
    "chunks": post(CHUNKED, body=CHUNKS) + PLAIN,
    "chunks and a length": post(LENGTH, CHUNKED, body=CHUNKS) + PLAIN,
    "a length and chunks": post(CHUNKED, LENGTH, body=CHUNKS) + PLAIN,
    "a length and an unknown coding": post(LENGTH, b"Transfer-Encoding: xchunked") + PLAIN,
    "a length and identity": post(LENGTH, b"Transfer-Encoding: identity") + PLAIN,
    "a hidden coding": post(LENGTH, b"Transfer-Encoding : chunked", body=CHUNKS) + PLAIN,
    "a folded coding": post(LENGTH, b"X: y\r\n Transfer-Encoding: chunked") + PLAIN,
    "a coding behind a bare line feed": post(LENGTH, b"X: y\nTransfer-Encoding: chunked") + PLAIN,
    "a coding behind a carriage return": post(LENGTH, b"X: y\rTransfer-Encoding: chunked") + PLAIN,
    "chunk extensions": post(CHUNKED, body=CHUNKS.replace(b"5\r", b"5;a=b\r")) + PLAIN,
    "trailers": post(CHUNKED, body=CHUNKS[:-2] + b"Host: evil\r\n\r\n") + PLAIN,
    "a chunk of bad size": post(CHUNKED, body=b"-1\r\nx\r\n0\r\n\r\n") + PLAIN,
    "a chunk of huge size": post(CHUNKED, body=b"ffffffffffffffff1\r\nx\r\n0\r\n\r\n") + PLAIN,
    "a chunk that is too long": post(CHUNKED, body=b"2\r\nxxx\r\n0\r\n\r\n") + PLAIN,
    # -- lines
    "folded": post(b"X: a\r\n b", LENGTH) + PLAIN,
    "folded with a tab": post(b"X: a\r\n\tb", LENGTH) + PLAIN,
    "a folded length": post(b"Content-Length:\r\n 17") + PLAIN,
    "folded at once": post(LENGTH, line=b"POST /v1/embeddings HTTP/1.1\r\n X: y"),
    "bare line feeds": PLAIN.replace(b"\r\n", b"\n"),
    "a bare line feed at the end": PLAIN.replace(b"\r\n\r\n", b"\r\n\n"),
    "NUL in a value": post(b"X: a\x00b", LENGTH) + PLAIN,
    "NUL in a name": post(b"X\x00: b", LENGTH) + PLAIN,
    "a control character in a value": post(b"X: a\x01\x7fb", LENGTH) + PLAIN,
    "eight bits in a value": post(b"X: \xe4\xff", LENGTH) + PLAIN,
    "a space in a name": post(b"X y: b", LENGTH) + PLAIN,
    "no colon": post(b"X", LENGTH) + PLAIN,
    "no name": post(b": x", LENGTH) + PLAIN,
    "no value": post(b"X:", LENGTH) + PLAIN,
    "the same twice": post(b"X: a", b"X: b", LENGTH) + PLAIN,
    "100 headers": post(*([b"X: y"] * 98), LENGTH),
    "101 headers": post(*([b"X: y"] * 99), LENGTH),
    "100 names": post(*(b"X%d: y" % i for i in range(98)), LENGTH),
    "101 names": post(*(b"X%d: y" % i for i in range(99)), LENGTH),
    "16 KiB of headers": post(b"X: " + b"x" * 16250, LENGTH),
    "more than 16 KiB": post(b"X: " + b"x" * 16384, LENGTH),
    # -- what asks for more
    "asks first": post(b"Expect: 100-continue", LENGTH) + PLAIN,
    "expects something else": post(b"Expect: 200-ok", LENGTH) + PLAIN,
    "another protocol": post(b"Connection: Upgrade", b"Upgrade: h2c", LENGTH) + PLAIN,
    "another method": post(LENGTH, line=b"PUT /v1/embeddings HTTP/1.1") + PLAIN,
    "no method of ours": post(LENGTH, line=b"GET /v1/embeddings HTTP/1.1") + PLAIN,
    "HEAD": post(line=b"HEAD /v1/embeddings HTTP/1.1", body=b"") + PLAIN,
    "CONNECT": post(line=b"CONNECT localhost:80 HTTP/1.1", body=b"") + PLAIN,
    "another route": post(LENGTH, line=b"POST /deployments HTTP/1.1") + PLAIN,
    "no route": post(LENGTH, line=b"POST /nothing HTTP/1.1") + PLAIN,
}  # fmt: skip


class Seen(NamedTuple):
    """What the client and the fleet see of a conversation."""

    answers: list[tuple[list[bytes], bytes]]
    closed: tuple[bool, ...]
    asked: list[tuple[str, Work]]


def answers(data: bytes) -> list[tuple[list[bytes], bytes]]:
    """Heads, with sorted headers and without the date, and bodies."""
    found = []
    for each in re.split(rb"(?=HTTP/1\.[01] \d{3} )", data)[1:]:
        head, _, body = each.partition(b"\r\n\r\n")
        line, *fields = head.split(b"\r\n")
        kept = sorted(field for field in fields if not field.startswith(b"Date: "))
        found.append(([line, *kept], body))
    return found


class Pair:
    """The same house twice, with the hot path and without."""

    def __init__(self) -> None:
        http = Http(header_seconds=4, body_seconds=8, idle_seconds=20, max_inference_body=LIMIT)
        self.houses = [House(http=http, hot=hot) for hot in (True, False)]
        self.sites = [house.front.site(tuple(Role)) for house in self.houses]

    def compare(self, pieces: Iterable[bytes], *, seconds: int, stream: bool = False) -> Seen:
        """Hold the conversation with both; what both saw."""
        pieces = list(pieces)
        hot, ordinary = (
            self._hold(house, site, pieces, seconds, stream)
            for house, site in zip(self.houses, self.sites, strict=True)
        )
        assert hot == ordinary, pieces
        return hot

    def _hold(
        self, house: House, site: Any, pieces: list[bytes], seconds: int, stream: bool
    ) -> Seen:
        house.fleet.passages.clear()
        channel = house.accept(site)
        assert channel is not None
        for piece in pieces:
            channel.dataReceived(piece)
        answered = 0
        while answered < len(house.fleet.passages):
            passage = house.fleet.passages[answered]
            answered += 1
            if stream:
                passage.sink.head(EVENTS)
                passage.sink.body(b"data: 1\n\n")
                passage.sink.body(b"")
                if answered % 2:
                    passage.sink.end(End())
                else:
                    passage.sink.failed(WorkerLost())
            else:
                head = Head() if answered % 2 else Head(200, "text/plain", {"x-note": "a\r\nb"})
                passage.answer(b'{"number":%d}' % answered, head)
        house.clock.pump([0.5] * seconds)
        transport = channel.transport
        seen = Seen(
            answers(transport.value()),
            (transport.half_closed, transport.disconnecting, transport.aborted),
            [(each.model, each.work) for each in house.fleet.passages],
        )
        transport.leave()
        return seen


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_both_ways_answer_alike(pair: Pair, name: str, stream: bool) -> None:
    data = CONVERSATIONS[name]
    pair.compare([data], seconds=0, stream=stream)
    pair.compare([data], seconds=60, stream=stream)
    pair.compare([bytes([byte]) for byte in data[:2000]] + [data[2000:]], seconds=60, stream=stream)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_both_ways_answer_alike_wherever_it_is_cut(pair: Pair, name: str) -> None:
    data = CONVERSATIONS[name]
    for cut in range(1, min(len(data), 500)):
        pair.compare([data[:cut], data[cut:]], seconds=0)


@pytest.mark.parametrize(
    "name",
    [
        "two spaces", "two hosts", "no host", "two lengths", "two different lengths",
        "a list of lengths", "an empty length", "a sign", "negative", "hexadecimal",
        "an underscore", "digits of another script", "chunks and a length", "a length and chunks",
        "a length and an unknown coding", "a hidden coding", "a coding behind a bare line feed",
        "a coding behind a carriage return", "a chunk of bad size", "NUL in a value",
        "NUL in a name", "a space in a name", "no colon", "no name", "101 headers", "101 names",
        "more than 16 KiB",
    ],
)  # fmt: skip
def test_nothing_is_smuggled_behind_what_can_be_read_two_ways(pair: Pair, name: str) -> None:
    seen = pair.compare([CONVERSATIONS[name]], seconds=0)
    assert [head[0] for head, _ in seen.answers] == [b"HTTP/1.1 400 Bad Request"]
    assert not seen.asked
    assert seen.closed[0]


_MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, 2 * len(PLAIN)),
        st.integers(0, 3),
        st.sampled_from(
            [
                b"", b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"\x00", b"\xff", b"0", b"9",
                LENGTH + b"\r\n", CHUNKED + b"\r\n", b"\r\n\r\n", b"\r\n ", PLAIN, GET, b"-",
                b"Connection: close\r\n", b"Host: localhost\r\n",
            ]
        ),
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip


@settings(max_examples=300)
@given(changes=_MUTATIONS, cut=st.integers(0, 3 * len(PLAIN)), stream=st.booleans())
def test_both_ways_answer_alike_what_nobody_thought_of(
    changes: list[tuple[int, int, bytes]], cut: int, stream: bool
) -> None:
    data = PLAIN + PLAIN
    for where, length, what in changes:
        data = data[:where] + what + data[where + length :]
    _PAIR.compare([data[:cut], data[cut:]], seconds=0, stream=stream)


_PAIR = Pair()


# -- what only the hot path has --------------------------------------------------------------


def hot_connection(house: House) -> tuple[HotChannel, Transport]:
    channel, transport = house.connect()
    assert isinstance(channel, HotChannel)
    return channel, transport


@pytest.mark.parametrize(
    ("name", "hot"),
    [
        ("plain", True),
        ("with everything that is usual", True),
        ("two at once", True),
        ("refusals in a row", True),
        ("half a body", True),
        ("half a head", False),
        ("an origin", False),
        ("chunks", False),
        ("a client that wants to close", False),
    ],
)
def test_what_is_plain_stays_on_the_hot_path(name: str, hot: bool) -> None:
    house = House(hot=True)
    channel, _ = hot_connection(house)
    channel.dataReceived(CONVERSATIONS[name])
    for passage in house.fleet.passages:
        passage.answer(b"{}")
    assert channel._hot is hot


def test_it_can_be_turned_off() -> None:
    channel, _ = House(hot=False).connect()
    assert type(channel) is Channel


def test_a_client_that_sends_ahead_is_stopped_at_a_bound() -> None:
    house = House(hot=True)
    channel, transport = hot_connection(house)
    channel.dataReceived(PLAIN)
    channel.dataReceived(PLAIN * 10)
    assert transport.producerState == "producing"
    channel.dataReceived(PLAIN * 300)
    assert transport.producerState == "paused"
    answered = 0
    while answered < len(house.fleet.passages):
        house.fleet.passages[answered].answer(b"{}")
        answered += 1
    assert answered == 311
    assert transport.producerState == "producing"
    assert transport.value().count(b"HTTP/1.1 200 OK") == 311


@pytest.mark.parametrize("hot", [True, False])
def test_a_client_that_does_not_read_its_answers_gets_no_more_of_them(hot: bool) -> None:
    house = House(hot=hot)
    channel, transport = house.connect()
    channel.dataReceived(PLAIN * 3)
    channel.pauseProducing()
    house.fleet.passages[0].answer(b"{}")
    assert len(house.fleet.passages) == 1
    assert transport.producerState == "paused"
    channel.resumeProducing()
    assert transport.producerState == "producing"
    assert len(house.fleet.passages) == 2
    house.fleet.passages[1].answer(b"{}")
    house.fleet.passages[2].answer(b"{}")
    assert transport.value().count(b"HTTP/1.1 200 OK") == 3


@pytest.mark.parametrize("hot", [True, False])
@pytest.mark.parametrize("data", [PLAIN, GET])
def test_answers_that_are_there_at_once_wait_for_who_reads_them_too(hot: bool, data: bytes) -> None:
    house = House(hot=hot)
    channel, transport = house.connect()
    house.fleet.refuse = QueueFull(retry_after=1)
    channel.pauseProducing()
    channel.dataReceived(data * 3)
    # The first of those that twisted.web parses is begun before it looks.
    assert transport.value().count(b"HTTP/1.1 ") <= 1
    assert transport.producerState == "paused"
    channel.resumeProducing()
    assert transport.value().count(b"HTTP/1.1 ") == 3
    assert transport.producerState == "producing"


def test_a_request_and_its_answer_leave_nothing_to_the_collector() -> None:
    house = House(hot=True)
    channel, _ = hot_connection(house)
    for answer in (Head(), EVENTS):
        gc.collect()
        gc.disable()
        try:
            channel.dataReceived(PLAIN)
            house.fleet.passages.pop().answer(b"{}", answer)
            assert not channel.requests
            assert gc.collect() == 0
        finally:
            gc.enable()


def test_a_defect_on_the_way_is_an_incident(
    logged_failures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(hot=True)
    channel, transport = hot_connection(house)
    monkeypatch.setattr(channel.site, "inference", None)
    channel.dataReceived(PLAIN)
    reply = parse(transport.value(), "POST")
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    assert logged_failures.flush(AttributeError)
