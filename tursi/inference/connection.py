"""The worker's end of the data socket."""

from __future__ import annotations

import os
import socket
import threading

from tursi.wire import Decoder, Frame

_READ = 256 * 1024
_SEND_BUFFER = 1024 * 1024


class Connection:
    """Frames in, bytes out; ``send`` may be called from any thread."""

    def __init__(self, data: socket.socket) -> None:
        data.setblocking(True)
        data.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._socket = data
        self._decoder = Decoder()
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._socket.fileno()

    def greet(self, data: bytes, descriptor: int | None) -> None:
        """The first words, with the descriptor beside them, which is closed here."""
        if descriptor is None:
            self.send(data)
            return
        try:
            socket.send_fds(self._socket, [data], [descriptor])
        except ConnectionError:
            os._exit(0)
        finally:
            os.close(descriptor)

    def send(self, data: bytes) -> None:
        """Write everything. A blocking write is the worker's back-pressure: the daemon reads.

        Ends the process if the daemon is gone: nobody wants an answer, and a
        model in the middle of a computation can't be asked to stop.
        """
        try:
            with self._lock:
                self._socket.sendall(data)
        except ConnectionError:
            os._exit(0)

    def receive(self) -> list[Frame] | None:
        """The frames that can be read now; ``None`` at the end of the stream.

        Raises ``WireError`` on a frame that can't be.
        """
        try:
            data = self._socket.recv(_READ, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except ConnectionError:
            return None
        return list(self._decoder.feed(data)) if data else None
