"""Long curves in few numbers: a million steps become the mean and the extremes of some hundred bins."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bin:
    """What lies between two steps, ends included. Extremes and mean are of the finite values; nan where there are none."""

    first: float
    last: float
    points: int
    finite: int
    low: float
    high: float
    mean: float

    @property
    def middle(self) -> float:
        return (self.first + self.last) / 2


def binned(x: Sequence[float], y: Sequence[float], bins: int) -> list[Bin]:
    """``y`` over ``x`` (ascending) in at most ``bins`` bins of equal width; those without a point are left out.

    With no more places than bins every place is a bin of its own, so that nothing is averaged that can be shown.
    """
    places = sorted(set(x))
    if len(places) <= bins:
        return list(between(x, y, places[1:]))
    edges = [x[0] + (x[-1] - x[0]) * k / bins for k in range(1, bins)]
    return list(between(x, y, edges))


def between(x: Sequence[float], y: Sequence[float], edges: Sequence[float]) -> Iterator[Bin]:
    """One bin for each stretch between two ``edges`` (ascending) that holds a point; a point on an edge counts to the right."""
    start = 0
    for edge in (*edges, math.inf):
        stop = bisect_left(x, edge, start) if edge < math.inf else len(x)
        if stop > start:
            yield _bin(x, y, start, stop)
        start = stop


def within(x: Sequence[float], y: Sequence[float], first: float, last: float) -> Bin | None:
    """The points from ``first`` to ``last``, both included."""
    start, stop = bisect_left(x, first), bisect_right(x, last)
    return _bin(x, y, start, stop) if stop > start else None


def _bin(x: Sequence[float], y: Sequence[float], start: int, stop: int) -> Bin:
    values = y[start:stop]
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (math.nan, math.nan)
    # max and min: rounding may carry a mean of equal values past them
    mean = min(max(math.fsum(finite) / len(finite), low), high) if finite else math.nan
    return Bin(x[start], x[stop - 1], stop - start, len(finite), low, high, mean)
