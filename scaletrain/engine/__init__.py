"""Engines run one step of a plan: the same numbers from plain PyTorch on one process and from every stage of ZeRO on many.

``name`` picks one. The classes themselves are imported by :func:`create`, so that a configuration can be read without torch
extensions and a single-process run does not import DeepSpeed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from scaletrain.engine.base import Engine, MicroBatch, Shard
from scaletrain.engine.settings import LocalConfig, OptimizerConfig, ReplicatedConfig, Zero3Config

if TYPE_CHECKING:
    import torch
    from torch import nn

EngineConfig = Annotated[LocalConfig | ReplicatedConfig | Zero3Config, Field(discriminator="name")]


def create(
    config: LocalConfig | ReplicatedConfig | Zero3Config,
    module: nn.Module,
    groups: list[dict[str, Any]],
    optimizer: OptimizerConfig,
    device: torch.device,
) -> Engine:
    """An engine around ``module``; ``groups`` are the optimizer's parameter groups, as torch takes them.

    A parameter that belongs to no group is frozen, since nothing would step it; groups without parameters are passed over.
    """
    groups = [group for group in groups if group["params"]]
    stepped = {id(parameter) for group in groups for parameter in group["params"]}
    for parameter in module.parameters():
        if id(parameter) not in stepped:
            parameter.requires_grad_(False)
    if isinstance(config, LocalConfig):
        from scaletrain.engine.local import LocalEngine

        return LocalEngine(config, module, groups, optimizer, device)
    if isinstance(config, ReplicatedConfig):
        from scaletrain.engine.replicated import ReplicatedEngine

        return ReplicatedEngine(config, module, groups, optimizer, device)
    if device.type == "cpu":
        # DeepSpeed settles on an accelerator when it is first imported, and would take a GPU that the run is not to use.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from scaletrain.engine.zero3 import Zero3Engine

    return Zero3Engine(config, module, groups, optimizer, device)


__all__ = [
    "Engine",
    "EngineConfig",
    "LocalConfig",
    "MicroBatch",
    "OptimizerConfig",
    "ReplicatedConfig",
    "Shard",
    "Zero3Config",
    "create",
]
