from __future__ import annotations

import os
import struct
import tempfile
import threading
import time
from collections.abc import Iterator

import pytest

from tursi.heartbeat import SIZE, Beat, Operation, Pulse, Reader, Writer, share


@pytest.fixture
def page() -> Iterator[tuple[Writer, Reader, int]]:
    writer, descriptor = share()
    assert descriptor is not None
    reader = Reader(os.dup(descriptor))
    yield writer, reader, descriptor
    reader.close()
    os.close(descriptor)


def test_what_is_written_is_read(page: tuple[Writer, Reader, int]) -> None:
    writer, reader, _ = page
    assert reader.read() == Beat(0, 0.0, Operation.IDLE, 0.0, 0)
    before = time.monotonic()
    writer.beat(1.5)
    writer.begin(Operation.DECODE)
    writer.advance(3)
    writer.advance()
    beat = reader.read()
    assert beat is not None
    assert (beat.count, beat.processor, beat.operation, beat.progress) == (
        1, 1.5, Operation.DECODE, 4,
    )  # fmt: skip
    assert before <= beat.started <= time.monotonic()


def test_a_page_that_is_cut_off_or_garbled_says_nothing(page: tuple[Writer, Reader, int]) -> None:
    _, reader, descriptor = page
    os.pwrite(descriptor, struct.pack("=Q", 99), 16)
    assert reader.read() is None
    os.ftruncate(descriptor, 0)
    assert reader.read() is None
    os.ftruncate(descriptor, 10 * SIZE)
    assert reader.read() is not None
    reader.close()
    reader.close()
    assert reader.read() is None


def test_only_memory_is_read() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    with pytest.raises(OSError, match="Invalid"):
        Reader(reading)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(reading)
    with tempfile.TemporaryFile(dir=os.path.dirname(__file__)) as file, pytest.raises(OSError):  # noqa: PT011, PTH120 - its message is the system's
        Reader(os.dup(file.fileno()))


def test_it_beats_and_tells_the_processor_time_of_who_is_watched(
    page: tuple[Writer, Reader, int],
) -> None:
    writer, reader, _ = page
    pulse = Pulse(writer, 60)
    pulse.start()
    pulse.beat_every(0.01)
    go, done = threading.Event(), threading.Event()

    def compute() -> None:
        pulse.watch()
        begun = time.thread_time()
        while time.thread_time() - begun < 0.05:
            pass
        done.set()
        go.wait(10)

    thread = threading.Thread(target=compute)
    thread.start()
    done.wait(10)
    seen = beats_after(reader, 3)
    assert 0.05 <= seen.processor < 5
    # Blocked, it uses nothing; gone, it still beats.
    assert beats_after(reader, 5).processor == pytest.approx(seen.processor, abs=0.001)
    go.set()
    thread.join()
    assert beats_after(reader, 3).count > seen.count


def beats_after(reader: Reader, beats: int) -> Beat:
    first = reader.read()
    assert first is not None
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        beat = reader.read()
        assert beat is not None
        if beat.count >= first.count + beats:
            return beat
        time.sleep(0.002)
    raise AssertionError("it doesn't beat")
