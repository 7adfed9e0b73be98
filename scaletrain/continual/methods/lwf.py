"""Learning without forgetting: on the new samples, the old outputs are to stay what they were.

The teacher is the model that the stage starts from, and it is never loaded beside the student: its logits are computed once per
sample before the first step, by the sharded engine itself, and travel with the samples. So a logit always meets the sample it was
computed of, in whatever order, slot or rank that sample comes again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from scaletrain.continual.method import Active, Beginning, Method
from scaletrain.data.collate import Slot

TEACHER = "teacher_logits"
"""Name under which slots carry the teacher's logits, fp32 [samples, columns]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lwf(Method):
    """Learning without forgetting (Li and Hoiem, arXiv 1606.09282).

    Adds ``strength * KD`` to the loss, with KD the mean over the samples of the step of
    ``- sum_c softmax(z*/T)_c * log softmax(z/T)_c`` over old columns c: z the logits, z* those under the weights that the stage
    starts from, T the temperature. Where the old columns are one choice (class-incremental) the softmax runs over all of them,
    else over each old task's own, and KD is the sum over old tasks, as in the paper. There is no factor T^2 (Hinton et al., arXiv
    1503.02531, have one): the gradient shrinks as 1/T^2. It is a cross-entropy: at its least it is the teacher's entropy, not 0.
    """

    name: Literal["lwf"] = "lwf"
    strength: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the term beside the classification loss (lambda_o in the paper). 0: no term, and no pass of the teacher."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """T: above 1 the smaller probabilities count for more."""

    def begin(self, beginning: Beginning) -> Active:
        if not (self.strength and beginning.old):
            return Active()
        choices = (beginning.old,) if beginning.together else tuple((block,) for block in beginning.old)
        term = Distillation(self.strength, self.temperature, choices)
        return Active(terms={"distillation": term}, cached={TEACHER: beginning.teacher()})


@dataclass(frozen=True, slots=True)
class Distillation:
    """The term of the loss: cross-entropy of the student's softened choices against the teacher's, which the slot carries."""

    weight: float
    temperature: float
    choices: tuple[tuple[slice, ...], ...]
    """Each the columns that one softmax runs over."""

    def sum(self, outputs: Tensor, slot: Slot) -> Tensor:
        """An fp32 scalar: summed over the rows of ``outputs`` [samples, columns] and over the choices."""
        teacher = slot.targets[TEACHER].to(outputs.device, non_blocking=True)
        parts = []
        for columns in self.choices:
            wanted = functional.softmax(_of(teacher, columns) / self.temperature, dim=1)
            parts.append(functional.cross_entropy(_of(outputs, columns) / self.temperature, wanted, reduction="sum"))
        return torch.stack(parts).sum()


def _of(logits: Tensor, columns: tuple[slice, ...]) -> Tensor:
    """Those columns side by side, fp32."""
    return torch.cat([logits[:, block] for block in columns], dim=1).float()
