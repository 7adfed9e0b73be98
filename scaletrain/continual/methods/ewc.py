"""Elastic weight consolidation: what the old tasks depend on is held where it was, each weight as firmly as it matters to them.

How much a weight matters is the diagonal of the empirical Fisher information, the mean over samples of the *square of each
sample's own* gradient. The square of a batch's mean gradient, which many implementations take instead, is smaller by about the
size of the batch (van de Ven, arXiv 2502.11756): with it the same strength means something else on another number of ranks.

Fisher information and anchor are fp32 shards that lie as the weights do, 8 bytes per parameter over the number of ranks. Nothing
is gathered, and the penalty is not in the graph: its gradient is known in closed form and added to the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from scaletrain.continual.method import Active, Beginning, Ending, Method, Pieces
from scaletrain.engine import Shard

FISHER = "fisher"
"""The part under which the Fisher information is stored."""

BLOCK_ELEMENTS = 2**18
"""Elements that a penalty works on at a time: what stands between two operations stays in the cache, and needs no memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ewc(Method):
    """Online elastic weight consolidation (Kirkpatrick et al., arXiv 1612.00796; online: Schwarz et al., arXiv 1805.06370).

    Stage t adds ``strength/2 * sum_i gamma * F~_i * (theta_i - theta*_i)^2`` to the loss, with F~ = F~_{t-1} of the stage before,
    and theta* the weights that the stage starts from. After it, ``F~_t = gamma * F~_{t-1} + F_t``. F_t is the empirical Fisher
    information at the new weights: the mean, over `samples` training examples of the new task, of the squared gradient of that
    example's own classification loss, with its true label, without dropout and without any other term.
    """

    name: Literal["ewc"] = "ewc"
    strength: Annotated[float, Field(ge=0)] = 1000.0
    """Lambda. It weighs squared gradients of single samples, which are small near an optimum: usual values are 10 to 100,000.
    Clipping bounds the pull of a strong penalty too. 0: no penalty, and no Fisher information is computed or kept."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """What is left, one stage later, of the importance of all stages before. It weighs the penalty as well (see the formula)."""
    samples: Annotated[int, Field(ge=1)] = 256
    """Training examples of a task that its Fisher information is the mean over; all of them where there are fewer."""

    def begin(self, beginning: Beginning) -> Active:
        if not (self.strength and beginning.has_state):
            return Active()
        importance = partial(beginning.state, FISHER)
        penalty = QuadraticPenalty("ewc", self.strength * self.gamma, importance, beginning.engine.shards())
        return Active(penalties=(penalty,))

    def consolidate(self, ending: Ending) -> Pieces:
        if not self.strength:
            return {}
        ending.engine.gradients(ending.slots(self.samples), ending.loss, torch.square, dropout=False)
        count = ending.samples(self.samples)
        fisher = {}
        for shard in ending.engine.shards():
            if shard.gradient is not None:
                before = ending.state(FISHER, shard).to(shard.gradient)
                fisher[shard.name] = (shard.gradient / count).add_(before, alpha=self.gamma)
        return {FISHER: fisher}


class QuadraticPenalty:
    """``strength/2 * sum_i importance_i * (theta_i - theta*_i)^2``, with theta* the weights at the time that it is made.

    ``importance`` gives this rank's piece of it for a shard, flat. Frozen parameters are left out.
    """

    def __init__(self, name: str, strength: float, importance: Callable[[Shard], Tensor], shards: Iterable[Shard]) -> None:
        self.name = name
        # Of the root, one product serves both: r (theta - theta*) squared is the value, and times r the gradient.
        self._roots: dict[str, Tensor] = {}
        self._anchors: dict[str, Tensor] = {}
        for shard in shards:
            if shard.gradient is not None:
                self._roots[shard.name] = (importance(shard).to(shard.weight.device) * strength).sqrt_()
                self._anchors[shard.name] = shard.weight.clone()

    def apply(self, shards: Iterable[Shard]) -> Tensor:
        """Adds ``strength * importance_i * (theta_i - theta*_i)`` to the gradients; this rank's part of the value."""
        value = torch.zeros((), dtype=torch.float64)
        for shard in shards:
            if shard.gradient is not None:
                whole = (shard.weight, shard.gradient, self._roots[shard.name], self._anchors[shard.name])
                for weight, gradient, root, anchor in zip(*(piece.split(BLOCK_ELEMENTS) for piece in whole), strict=True):
                    pull = torch.sub(weight, anchor).mul_(root)
                    gradient.addcmul_(root, pull)
                    value = value + pull.square_().sum()  # pairwise inside a block, over blocks in float64
        return value / 2
