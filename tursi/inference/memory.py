"""The memory that this process has had by the end of each stage of a load."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from tursi.model import Peaks

_STATUS = Path("/proc/self/status")


class Meter:
    """Call ``loaded`` when the weights are there and ``warm`` when the model has answered once."""

    def __init__(self, status: Path = _STATUS) -> None:
        self._status = status
        self.host = Peaks()
        self.gpus: dict[str, Peaks] = {}
        """Without what the driver itself takes."""

    def loaded(self) -> None:
        """The weights are where they shall be."""
        self.host = Peaks(load=self._highest())
        for index in _gpus():
            self.gpus[f"cuda:{index}"] = Peaks(load=torch.cuda.max_memory_reserved(index))
            torch.cuda.reset_peak_memory_stats(index)

    def warm(self) -> None:
        """A first computation has been made."""
        highest = self._highest()
        # The kernel keeps one peak for all: if it has not risen, what there is now counts.
        rose = highest is not None and highest > (self.host.load or 0)
        self.host |= Peaks(warm=highest if rose else self._present())
        for index in _gpus():
            name = f"cuda:{index}"
            measured = Peaks(warm=torch.cuda.max_memory_reserved(index))
            self.gpus[name] = self.gpus.get(name, Peaks()) | measured

    def _highest(self) -> int | None:
        return self._field("VmHWM") or _maxrss() + _unified()

    def _present(self) -> int | None:
        found = self._field("VmRSS")
        return found if found is None else found + _unified()

    def _field(self, name: str) -> int | None:
        try:
            for line in self._status.read_text("ascii", "replace").splitlines():
                if line.startswith(f"{name}:"):
                    return int(line.split()[1]) * 1024
        except (OSError, ValueError, IndexError):
            pass
        return None


def _maxrss() -> int:
    # Kilobytes, but for Apple.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _unified() -> int:
    """What an Apple GPU has of the host's memory."""
    return int(torch.mps.driver_allocated_memory()) if torch.backends.mps.is_available() else 0


def _gpus() -> list[int]:
    """Those that this process has memory of."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return []
    return [
        index for index in range(torch.cuda.device_count()) if torch.cuda.max_memory_reserved(index)
    ]
