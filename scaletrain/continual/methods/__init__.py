"""Ways not to forget: one file per method, each a frozen config that overrides the seams of ``continual.method.Method``.

To add one, write a file with a config dataclass whose ``name`` is a new literal, and list it here. A stream has a tuple of
methods, which work side by side; an empty one is naive fine-tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from scaletrain.continual.methods.ewc import Ewc
from scaletrain.continual.methods.joint import Joint
from scaletrain.continual.methods.lwf import Lwf
from scaletrain.continual.methods.replay import Replay
from scaletrain.errors import ConfigError

MethodConfig = Annotated[Replay | Ewc | Lwf | Joint, Field(discriminator="name")]

__all__ = ["Ewc", "Joint", "Lwf", "MethodConfig", "Replay", "check_together"]


def check_together(methods: Sequence[Replay | Ewc | Lwf | Joint], field: str = "methods") -> None:
    """Raises ConfigError, naming the setting ``field``, for methods that cannot work side by side."""
    names = [method.name for method in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        rule = f"each method is listed at most once, and {', '.join(twice)} comes twice"
        raise ConfigError(field, names, rule, "Remove the second one.")
    if "joint" in names and len(names) > 1:
        rule = "`joint` stands alone: it trains on all tasks from the first encoder, so that there is nothing to keep"
        raise ConfigError(field, names, rule, "Use `joint` by itself for an upper bound, or leave it out.")
