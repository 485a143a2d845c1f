"""Distributions of durations, of a bounded size, that can be added up.

A sketch counts values in bins whose bounds grow by a constant factor (as in
"DDSketch: A Fast and Fully-Mergeable Quantile Sketch with Relative-Error Guarantees",
Masson, Rim and Lee, 2019), so that every quantile is right within ``ACCURACY``, however
many sketches of however many machines were added up before it is asked for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate
from math import ceil, exp, log

ACCURACY = 0.01
"""The relative error of a quantile."""
LEAST = 1e-5
"""Seconds; what is shorter counts as nothing,"""
MOST = 1e5
"""and what is longer as that."""
_STEP = log((1 + ACCURACY) / (1 - ACCURACY))
SCALE = 1 / _STEP
ZERO = 1 - log(LEAST) * SCALE
"""``int(log(seconds) * SCALE + ZERO)`` is the bin of what is between the two."""
LAST = int(log(MOST) * SCALE + ZERO)
"""The highest bin; 0 is what counts as nothing. So many there are at most."""
_MIDDLE = log(LEAST) + log(1 - ACCURACY)
_END = 0
"""No bin comes this far after the one before it."""


class Sketch(dict[int, int]):
    """Counts by bin; those of 0 are left out."""

    __slots__ = ()

    def add(self, seconds: float) -> None:
        """Count a value."""
        number = bin_of(seconds)
        self[number] = self.get(number, 0) + 1

    def merge(self, other: Mapping[int, int]) -> None:
        """Count all that ``other`` has counted."""
        for number, count in other.items():
            self[number] = self.get(number, 0) + count

    @property
    def count(self) -> int:
        """How many values it has counted."""
        return sum(self.values())

    def quantiles(self, *shares: float) -> list[float]:
        """The least values that these shares (0 to 1) of all don't exceed; 0.0 if it is empty."""
        numbers = sorted(self)
        sums = list(accumulate(self[number] for number in numbers))
        found = []
        for share in shares:
            # The same one that sorting all values and taking one of them would give.
            rank = max(ceil(share * sums[-1]), 1) if sums else 0
            found.append(_value(numbers[bisect_left(sums, rank)]) if sums else 0.0)
        return found

    def encode(self) -> bytes:
        """Two or three bytes for each bin that has counted something, and one at the end.

        Put one after the other, encoded sketches are their sum.
        """
        out = bytearray()
        last = -1
        for number in sorted(self):
            _put(out, number - last)
            _put(out, self[number])
            last = number
        out.append(_END)
        return bytes(out)

    @classmethod
    def decode(cls, data: bytes) -> Sketch:
        """What has been encoded, one sketch or many; ``ValueError`` for anything else."""
        found, number = cls(), -1
        value = shift = gap = 0
        # One loop: a generator of the numbers would take twice as long.
        for byte in data:
            if byte > 0x7F:
                value |= (byte & 0x7F) << shift
                shift += 7
                continue
            value |= byte << shift
            if gap:
                number += gap
                if not value or number > LAST:
                    raise ValueError("no sketch")
                found[number] = found.get(number, 0) + value
                gap = 0
            elif value == _END:
                number = -1
            else:
                gap = value
            value = shift = 0
        if shift or gap or number != -1:
            raise ValueError("a sketch that is cut off")
        return found


def bin_of(seconds: float) -> int:
    """The bin that counts ``seconds``."""
    if seconds < LEAST:
        return 0
    return min(int(log(seconds) * SCALE + ZERO), LAST)


def _value(number: int) -> float:
    # In the middle between the bin's bounds, as far from both of them relative to each.
    return exp(_MIDDLE + number * _STEP) if number else 0.0


def _put(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
