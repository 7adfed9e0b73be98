"""Learning rate and cadence in closed form: functions of the samples consumed, so a resumed run needs no schedule state.

Counting samples instead of steps, a schedule keeps its shape when the batch size changes on the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig:
    """Up to the peak in a line, and down in a line to the end of the run."""

    name: Literal["linear"] = "linear"
    warmup_share: Share = 0.06
    """Share of the run's samples over which the rate rises from 0 to the peak."""
    warmup_samples: Annotated[int, Field(ge=0)] | None = None
    """The same in samples; it takes precedence over `warmup_share`."""
    final_ratio: Share = 0.0
    """Learning rate at the end of the run, relative to the peak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CosineConfig:
    """Up in a line, and down along half a cosine (Loshchilov and Hutter, arXiv 1608.03983, without restarts)."""

    name: Literal["cosine"] = "cosine"
    warmup_share: Share = 0.06
    """Share of the run's samples over which the rate rises from 0 to the peak."""
    warmup_samples: Annotated[int, Field(ge=0)] | None = None
    """The same in samples; it takes precedence over `warmup_share`."""
    final_ratio: Share = 0.1
    """Learning rate at the end of the run, relative to the peak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WsdConfig:
    """Warm-up, a stable stretch at the peak, and a decay in a line at the end (Hu et al., arXiv 2404.06395)."""

    name: Literal["wsd"] = "wsd"
    warmup_share: Share = 0.06
    """Share of the run's samples over which the rate rises from 0 to the peak."""
    warmup_samples: Annotated[int, Field(ge=0)] | None = None
    """The same in samples; it takes precedence over `warmup_share`."""
    decay_share: Share = 0.2
    """Share of the run's samples over which the rate falls at the end."""
    decay_samples: Annotated[int, Field(ge=0)] | None = None
    """The same in samples; it takes precedence over `decay_share`. Set it to lengthen a run without changing the decay."""
    final_ratio: Share = 0.0
    """Learning rate at the end of the run, relative to the peak."""


ScheduleConfig = Annotated[LinearConfig | CosineConfig | WsdConfig, Field(discriminator="name")]


def learning_rate(config: LinearConfig | CosineConfig | WsdConfig, peak: float, samples: int, total_samples: int) -> float:
    """The learning rate at sample number ``samples``, counted from 1, of ``total_samples`` in the run.

    A step takes the rate of its first sample, so that each one moves the weights. Beyond the end of the
    run the final rate stays. Where warm-up and decay overlap, the lower of the two holds.
    """
    warmup = _samples(config.warmup_samples, config.warmup_share, total_samples)
    rising = min(samples / warmup, 1.0) if warmup else 1.0
    if isinstance(config, WsdConfig):
        decay = _samples(config.decay_samples, config.decay_share, total_samples)
    else:
        decay = total_samples - warmup
    left = total_samples - samples
    remaining = min(max(left / decay, 0.0), 1.0) if decay > 0 else float(left >= 0)
    if isinstance(config, CosineConfig):
        remaining = (1 - math.cos(math.pi * remaining)) / 2
    falling = config.final_ratio + (1 - config.final_ratio) * remaining
    return peak * min(rising, falling)


def _samples(samples: int | None, share: float, total_samples: int) -> float:
    return share * total_samples if samples is None else float(samples)


def due(step: int, every: int) -> bool:
    """Whether something that happens every ``every`` steps (0: never) happens after ``step`` finished steps."""
    return every > 0 and step > 0 and step % every == 0
