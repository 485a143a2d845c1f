"""How far a model is that whoever asks it waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tursi.cli.connection import Connection, Failure, path
from tursi.cli.progress import POLL_SECONDS, Verdict, display, look

PATIENCE_SECONDS = 1.0
"""An answer that comes sooner needs no progress."""
_LEAVE_SECONDS = 2.0


@contextmanager
def shown_loading(connection: Connection, name: str) -> Iterator[Callable[[], None]]:
    """Show how the model is loaded until that is over, the context is left or its value called."""
    over = threading.Event()
    thread = threading.Thread(target=_show, args=(connection, name, over), daemon=True)

    def end() -> None:
        over.set()
        thread.join(_LEAVE_SECONDS)

    thread.start()
    try:
        yield end
    finally:
        end()


def _show(connection: Connection, name: str, over: threading.Event) -> None:
    if over.wait(PATIENCE_SECONDS):
        return
    try:
        seen = look(connection.get(path("deployments", name)))
        if seen.verdict is not Verdict.COMING:
            return
        with display() as shown:
            while seen.verdict is Verdict.COMING:
                shown.show(name, seen)
                if over.wait(POLL_SECONDS):
                    return
                seen = look(connection.get(path("deployments", name)))
    except Failure:
        # Not everybody may look; what is wrong, the answer tells.
        return
