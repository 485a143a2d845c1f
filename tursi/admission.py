"""Who may load now, and on which GPUs: decided purely from what is free.

A load begins where it fits: in host memory, and on its device. What is smaller may pass
what waits for memory, but not for ever: who has waited for ``patience`` seconds keeps
what gets free from the others for as long, then lets them pass for as long again, so
that neither waits for the other without end. Who has nothing to hope for keeps nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tursi.footprint import CONTEXT

K = TypeVar("K")

ANY = frozenset({"auto", "cuda"})
"""Devices as asked for that leave the choice of the GPU to us."""
_UNEVEN = 1.1
"""Layers are whole: GPUs that share a model don't share it evenly."""


@dataclass(frozen=True, slots=True)
class Free:
    """What loads may still take, in bytes."""

    host: int | None = None
    """``None``: nothing is known, and whatever comes is let in."""
    gpus: Mapping[str, int] = field(default_factory=dict)
    suspects: Collection[str] = ()
    """GPUs that are only chosen where there is no other."""
    machine: int | None = None
    """What the host has, whatever the models may take together."""

    @property
    def is_limited(self) -> bool:
        """Whether it is what models may take together that leaves no more of the host."""
        return self.host is not None and (self.machine is None or self.host < self.machine)


@dataclass(frozen=True, slots=True)
class Candidate(Generic[K]):
    """A worker that is queued."""

    key: K
    host: int
    """Bytes of host memory that it needs to load."""
    gpu: int = 0
    """Bytes that it needs of a GPU, or of several together; 0 if it uses none."""
    device: str = "auto"
    """As asked for."""
    waited: float = 0.0
    """Seconds."""
    first: bool = False
    """Whether others make room for it just now."""
    hopes: bool = True
    """Whether there would be room if everything went that may."""


def admit(
    candidates: Sequence[Candidate[K]],
    free: Free,
    slots: int,
    loading: Collection[str] = (),
    patience: float = 30.0,
) -> list[tuple[K, str]]:
    """Who may load, each with its device: at most ``slots``, and one on each GPU.

    ``loading`` names GPUs on which something is being loaded already.
    """
    host, gpus, taken = free.host, dict(free.gpus), set(loading)
    suspects = set(free.suspects) if set(gpus) - set(free.suspects) else set()
    admitted: list[tuple[K, str]] = []
    for one in sorted(candidates, key=lambda each: _turn(each, patience)):
        if len(admitted) >= slots:
            break
        fits = host is None or one.host <= host
        avoided = taken | suspects if one.device in ANY else taken
        device = place(one, {name: size for name, size in gpus.items() if name not in avoided})
        if fits and device is not None:
            admitted.append((one.key, device))
            if host is not None:
                host -= one.host
            if one.gpu:
                used = [name for name in device.split(",") if name in gpus]
                taken.update(used)
                gpus.update(_shared(one, used, gpus))
        elif one.first or (one.hopes and holds(one.waited, patience)):
            if not fits:
                host = 0
            for name in _hoped_for(one, gpus):
                gpus[name] = 0
    return admitted


def holds(waited: float, patience: float) -> bool:
    """Whether who has waited so long keeps what gets free from others."""
    return int(waited / patience) % 2 == 1


def place(one: Candidate[K], gpus: Mapping[str, int]) -> str | None:
    """The device for it, such as ``cuda:1`` or ``cuda:0,cuda:1``; ``None``: it fits nowhere."""
    if not one.gpu:
        return one.device
    if one.device not in ANY:
        named = one.device.split(",")
        if not all(name in gpus for name in named):
            return None
        return one.device if all(size >= 0 for size in _left(one, named, gpus)) else None
    # Where the least is left over, so that what is larger still finds room.
    alone = [name for name, size in gpus.items() if size >= one.gpu]
    if alone:
        return min(alone, key=lambda name: (gpus[name], name))
    together: list[str] = []
    for name in sorted(gpus, key=lambda name: (-gpus[name], name)):
        together.append(name)
        if len(together) > 1 and sum(gpus[each] for each in together) >= shared(
            one.gpu, len(together)
        ):
            return ",".join(sorted(together, key=_number))
    return None


def shared(gpu: int, count: int) -> int:
    """What so many GPUs need together for what one would need ``gpu`` for."""
    return gpu if count == 1 else int(gpu * _UNEVEN) + (count - 1) * CONTEXT


def _turn(one: Candidate[K], patience: float) -> tuple[int, float]:
    """Who comes first sorts first; those that haven't waited long stay in their order."""
    if one.first:
        return (0, 0.0)
    return (1, -one.waited) if one.waited >= patience else (2, 0.0)


def _left(one: Candidate[K], names: Sequence[str], gpus: Mapping[str, int]) -> Iterable[int]:
    return _shared(one, names, gpus).values()


def _shared(one: Candidate[K], names: Sequence[str], gpus: Mapping[str, int]) -> dict[str, int]:
    """What is left on each once it is there; by what each has free, as a loader shares it out."""
    if not names:
        return {}
    needed, available = shared(one.gpu, len(names)), sum(max(gpus[name], 0) for name in names)
    if len(names) == 1 or not available:
        return {name: gpus[name] - needed for name in names}
    return {name: gpus[name] - needed * max(gpus[name], 0) // available for name in names}


def _hoped_for(one: Candidate[K], gpus: Mapping[str, int]) -> list[str]:
    """The GPUs that are kept for what can't be loaded yet."""
    if not one.gpu or not gpus:
        return []
    if one.device in ANY:
        return [max(gpus, key=lambda name: gpus[name])]
    return [name for name in one.device.split(",") if name in gpus]


def _number(device: str) -> int:
    _, _, number = device.partition(":")
    return int(number) if number.isdecimal() else 0
