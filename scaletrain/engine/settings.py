"""The settings of engines and of the optimizer, which are read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

Precision = Literal["fp32", "bf16"]
Offload = Literal["none", "cpu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), state and update in fp32."""

    name: Literal["adamw"] = "adamw"
    """Elementwise optimizers only: the state lives on flat shards."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """The peak that the schedule scales."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    """Decay of the running mean of the gradient and of its square."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Of weight matrices and embeddings; biases and norms are never decayed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalConfig:
    """Plain PyTorch in one process: the oracle that the other engines are tested against."""

    name: Literal["local"] = "local"
    precision: Precision = "fp32"
    """``bf16`` computes in bfloat16 on fp32 master weights."""
    debug: bool = False
    """Check the rounds across ranks at every forward, not once a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicatedConfig:
    """ZeRO stages 0 to 2: whole weights on every rank. The stage says what of the rest is partitioned; needs no DeepSpeed."""

    name: Literal["zero0", "zero1", "zero2"] = "zero1"
    """``zero0``: nothing is partitioned (plain data parallel). ``zero1``: master weights and optimizer state. ``zero2``:
    gradients too, reduced to their owners during every backward pass: less memory, more traffic where a step has many slots."""
    precision: Precision = "fp32"
    """``bf16`` computes in bfloat16 on fp32 master weights; gradients are reduced and summed in fp32."""
    offload: Offload = "none"
    """``cpu`` keeps master weights, gradients and optimizer state of this rank in host memory, and steps there."""
    bucket_elements: Annotated[int, Field(ge=1)] = 50_000_000
    """How many elements are exchanged together. A larger tensor is exchanged by itself."""
    debug: bool = False
    """Check the rounds across ranks at every forward, not once a step."""

    @property
    def stage(self) -> int:
        return int(self.name.removeprefix("zero"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Zero3Config:
    """DeepSpeed ZeRO-3: weights, gradients and optimizer state partitioned over all ranks."""

    name: Literal["zero3"] = "zero3"
    precision: Precision = "fp32"
    """``bf16`` computes in bfloat16 on fp32 master shards; gradients are reduced and summed in fp32."""
    offload: Offload = "none"
    """``cpu`` keeps master weights, gradients and optimizer state of this rank in host memory, and steps there."""
    persistence_threshold: Annotated[int, Field(ge=0)] = 100_000
    """Parameters of fewer elements than this stay whole on every rank. Above the largest tensor, ZeRO-3 gathers once per step."""
    prefetch_elements: Annotated[int, Field(ge=0)] = 50_000_000
    """How many elements are gathered ahead of their use."""
    reduce_bucket_elements: Annotated[int, Field(ge=1)] = 50_000_000
    """How many gradient elements are reduced together."""
    debug: bool = False
    """Check the rounds across ranks at every forward, not once a step."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's configuration. A key that contradicts a derived one is an error."""
