"""WorkingSet: how much of a disk becomes dirty within a time.

Not the product of a rate and the time: a block that is written twice is dirty once. So the curve rises at the rate at
which guests write, and flattens as they write what they have written before:

    bytes                 ...............   a hot set that is written over and over
       |          .......
       |     ...
       |  ..
       | .
       +------------------------------------> time

Inside the first epoch, where nothing is measured, H bytes written at random at rate r are assumed: H (1 - exp(-rt/H)),
with H such that the curve meets what was measured for one epoch. Between epochs it is straight. Beyond the last it goes
on as in the last half, up to the size of the disk: curves of this kind flatten, so that is an upper bound.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class WorkingSet:
    """The curve of one disk; immutable."""

    def __init__(self, write_rate: float, epoch_s: float, distinct_bytes: Sequence[float], size: float) -> None:
        """Draw the curve.

        Args:
            write_rate: bytes per second that guests write, in whole blocks, repeats included.
            epoch_s: length of an epoch in seconds.
            distinct_bytes: of different blocks that are written in 1, 2, ... epochs, on average; ascending.
            size: of the disk: no more can be dirty.
        """
        self.write_rate = write_rate
        self._epoch_s = epoch_s
        self._size = size
        first = min(size, distinct_bytes[0] if distinct_bytes else write_rate * epoch_s)
        self._rate = min(write_rate, math.inf if not first else 1e6 * first / epoch_s) or first / epoch_s
        self._hot = _hot_set(self._rate * epoch_s, first)
        self._points = [first, *distinct_bytes[1:]]
        n = len(self._points)
        half = self._points[n // 2 - 1] if n > 1 else 0.0
        self._slope = (self._points[-1] - half) / (n - n // 2)
        """Bytes per epoch beyond the last."""
        # The integral up to each point:
        areas = [self._first_area(1.0)]
        for before, after in zip(self._points, self._points[1:], strict=False):
            areas.append(areas[-1] + (before + after) / 2)
        self._areas = areas

    def _first_bytes(self, epochs: float) -> float:
        if self._hot == math.inf:
            return self._points[0] * epochs
        return -self._hot * math.expm1(-self._rate * self._epoch_s * epochs / self._hot) if self._hot else 0.0

    def _first_area(self, epochs: float) -> float:
        if self._hot == math.inf:
            return self._points[0] * epochs * epochs / 2
        if not self._hot:
            return 0.0
        speed = self._rate * self._epoch_s / self._hot
        return self._hot * (epochs + math.expm1(-speed * epochs) / speed)

    def after(self, time_s: float) -> float:
        """Return how many bytes are dirty ``time_s`` seconds after none was."""
        epochs = time_s / self._epoch_s
        if epochs <= 1:
            return min(self._size, self._first_bytes(epochs))
        n = int(epochs)
        if n >= len(self._points):
            return min(self._size, self._points[-1] + self._slope * (epochs - len(self._points)))
        below, above = self._points[n - 1], self._points[n]
        return min(self._size, below + (above - below) * (epochs - n))

    def mean(self, start_s: float, stop_s: float) -> float:
        """Return the mean of `after` over times from ``start_s`` to ``stop_s``."""
        if abs(stop_s - start_s) < 1e-9:
            return self.after(start_s)
        return (self._area(stop_s) - self._area(start_s)) / (stop_s - start_s)

    def _area(self, time_s: float) -> float:
        """Return the integral of `after` from 0, in byte seconds."""
        epochs = time_s / self._epoch_s
        if epochs <= 1:
            return self._first_area(epochs) * self._epoch_s
        n, last = int(epochs), len(self._points)
        if n < last:
            below, rest = self._points[n - 1], epochs - n
            return (self._areas[n - 1] + rest * (below + (self._points[n] - below) * rest / 2)) * self._epoch_s
        rest = epochs - last
        rising = min(rest, (self._size - self._points[-1]) / self._slope) if self._slope > 0 else rest
        area = self._areas[-1] + rising * (self._points[-1] + self._slope * rising / 2)
        return (area + (rest - rising) * self._size) * self._epoch_s


def _hot_set(written: float, distinct: float) -> float:
    """Return how many bytes are written at random if ``written`` bytes dirty ``distinct`` of them; may be infinite."""
    if not distinct:
        return 0.0
    if distinct >= 0.999 * written:
        return math.inf
    low, high = distinct, distinct
    while -high * math.expm1(-written / high) < distinct:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if -middle * math.expm1(-written / middle) < distinct:
            low = middle
        else:
            high = middle
    return high
