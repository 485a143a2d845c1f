"""Run one download and say on descriptor 3 how it goes."""

from __future__ import annotations

import os
import socket
import sys
import threading
import traceback
from pathlib import Path

import msgspec
from huggingface_hub import constants

from tursi import wire
from tursi.errors import FetchError
from tursi.fetcher.destinations import confine
from tursi.fetcher.download import Download
from tursi.model import Progress, Trust

_DATA_SOCKET = 3


def main(arguments: list[str]) -> int:
    """Download ``REPOSITORY REVISION CACHE [--allow-pickle] [--trust-remote-code] [--look]``.

    An empty revision is the default branch. With ``--look`` it is only said what there is.
    """
    repository, revision, cache, *options = arguments
    trust = Trust("--allow-pickle" in options, "--trust-remote-code" in options)
    channel = socket.socket(fileno=_DATA_SOCKET)
    channel.set_inheritable(False)
    lock = threading.Lock()

    def say(kind: wire.Kind, value: object) -> None:
        with lock:
            channel.sendall(wire.encode(kind, 0, msgspec.msgpack.encode(value)))

    def tell(progress: Progress) -> None:
        say(wire.Kind.PROGRESS, progress)

    confine(constants.ENDPOINT)
    try:
        download = Download(repository, revision or None, Path(cache), tell, trust)
        resolution = download.look() if "--look" in options else download.run()
    except FetchError as error:
        words = wire.LastWords(error.code, error.message, retry_after=error.retry_after)
        say(wire.Kind.FAILED, words)
        return error.exit_status
    except Exception as error:  # noqa: BLE001 - whatever it is, the daemon is to hear of it
        sentence = f"{repository} could not be downloaded: {type(error).__name__}: {error}"
        words = wire.LastWords(FetchError.code, sentence[:500], traceback.format_exc()[-16_384:])
        say(wire.Kind.FAILED, words)
        return FetchError.exit_status
    say(wire.Kind.READY, resolution)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    # Other files may still be downloading after the first that failed: don't wait for them.
    os._exit(status)
