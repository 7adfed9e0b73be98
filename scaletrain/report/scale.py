"""Axes and the way numbers are written: where ticks stand, how many decimals they need, what fits a cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

LOG_FROM = 50.0
"""Highest over lowest value from which an axis that may be logarithmic is."""
TINY = 1e-290
"""Differences up to here are none: what is smaller is a denormal number, or becomes one when it is divided."""
LARGEST = 1e300
"""From here on a whole number is written as its order only: it may be more than a float can hold."""

_SUFFIXES = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))  # from which tick on, what it is divided by, how that is called


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values with ticks. ``share`` says how far along the range a value lies."""

    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """0 at ``low``, 1 at ``high``; outside of the range below 0 or above 1."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def exact(low: float, high: float) -> Axis:
    """An axis that ends where the values end, with ticks at round steps and at the last one; for steps. One step alone is seen
    from step 0.
    """
    if low == high:
        low, high = min(low, 0.0), max(high, 1.0)
    before = _whole_ticks(low, high - (high - low) / 7)  # clear of the last one's label
    return Axis(low, high, (*before, high), (*labels(before), short(high)))


def _whole_ticks(low: float, high: float) -> list[float]:
    """Whole multiples of 1, 2 or 5 times a power of ten from ``low`` to ``high``: at least three where there are so many, and at
    most eight.
    """
    power = 10.0 ** math.floor(math.log10(high - low))
    steps = [step for factor in (5, 2, 1, 0.5, 0.2, 0.1) if (step := factor * power) > 1] + [1.0]
    for step in steps:
        ticks = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
        if len(ticks) >= 3:
            break
    return ticks


def fitted(low: float, high: float, count: int, *, may_be_logarithmic: bool = False, shares: bool = False) -> Axis:
    """An axis that begins and ends on a tick, around the values; for what is measured. ``shares``: of values from 0 to 1."""
    if may_be_logarithmic and low > 1e-100 and high / low > LOG_FROM:
        return _logarithmic(low, high)
    if _same(low, high):
        low, high = _room_around(low, high, least=0.0 if low >= 0 else -math.inf, most=1.0 if shares and high <= 1 else math.inf)
    marks = tuple(round_ticks(low, high, count))
    return Axis(marks[0], marks[-1], marks, labels(marks))


def _room_around(low: float, high: float, *, least: float, most: float) -> tuple[float, float]:
    """A range around what is all but one value, where no value is under ``least`` or over ``most``."""
    room = abs(low) / 10 if abs(low) > TINY else 1.0
    return max(low - room, least), min(high + room, most)


def _same(low: float, high: float) -> bool:
    """Whether no axis could tell the two apart."""
    return high - low <= max(1e-9 * max(abs(low), abs(high)), TINY)


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about ``count`` of them, from at or below ``low`` to at or above ``high``."""
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def _logarithmic(low: float, high: float) -> Axis:
    """Powers of ten around the values; every second, third, ... of them where they are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = 1 + (last - first) // 6
    marks = tuple(10.0**power for power in range(first, last + 1, stride))
    return Axis(10.0**first, 10.0**last, marks, tuple(map(short, marks)), logarithmic=True)


def labels(ticks: Sequence[float]) -> tuple[str, ...]:
    """Ticks at equal distances, with one suffix and as many decimals as tell them apart: ``0, 0.5, 1`` or ``0, 200k, 400k``."""
    largest = max(map(abs, ticks), default=0.0)
    if 0 < largest < 1e-3:
        return tuple(short(tick) for tick in ticks)
    divisor, suffix = next(((d, s) for least, d, s in _SUFFIXES if largest >= least), (1.0, ""))
    step = min((b - a for a, b in pairwise(ticks)), default=largest or 1.0) / divisor
    decimals = next((d for d in range(13) if abs(round(step, d) - step) < 1e-6 * step), 13)
    return tuple("0" if tick == 0 else f"{tick / divisor:,.{decimals}f}{suffix}" for tick in ticks)


def short(value: float | None, digits: int = 4) -> str:
    """A number for people, to so many significant digits: ``2.314``, ``12,346``, ``1.5e-5``; a dash where there is none."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"over {short(LARGEST, 1)}" if value > 0 else f"under {short(-LARGEST, 1)}"
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}" if value is None else "not finite"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e9:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{_trimmed(mantissa)}e{int(exponent)}".replace("-", "\N{MINUS SIGN}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return _trimmed(f"{value:,.{decimals}f}").replace("-", "\N{MINUS SIGN}")


def _trimmed(written: str) -> str:
    """Without the zeros that end its decimals."""
    return written.rstrip("0").rstrip(".") if "." in written else written


def fixed(value: float | None, decimals: int = 3) -> str:
    """A number with a fixed number of decimals, for columns that are compared; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return short(value)
    return f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """A time in its two largest units: ``42 s``, ``2 min 13 s``, ``1 h 02 min``, ``3 d 01 h``."""
    whole = round(seconds)
    for unit, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part:02d} {below}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


def size(bytes_: float) -> str:
    """A number of bytes in decimal units, three digits: ``950 B``, ``1.72 GB``."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if bytes_ >= 10 ** (3 * power):
            return f"{bytes_ / 10 ** (3 * power):.3g} {unit}"
    return f"{bytes_:.0f} B"
