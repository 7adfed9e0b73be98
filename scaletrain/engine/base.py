"""What an engine promises, and the part of it that all engines share.

One step of training is always the same six calls::

    totals = engine.begin(rounds, header)        # one host all-reduce: what this step runs, and its counts
    for slot in slots:
        outputs = engine.forward(slot)
        engine.backward(loss_of(outputs, slot, totals))
    ...                                          # a continual method may change engine.shards() in place
    norm, sums = engine.clip(max_norm, sums)     # one device all-reduce: the gradient's norm, and the losses
    engine.step(learning_rate)

The gradient between ``backward`` and ``step`` is the plain *sum* over all slots of all ranks, in fp32. Nothing averages: a loss
that is divided by counts of the whole step gives the same gradient however its slots are spread over ranks.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scaletrain import dist, heartbeat
from scaletrain.engine.settings import OptimizerConfig
from scaletrain.errors import RoundsError


class MicroBatch(Protocol):
    """What an engine needs to know of a slot."""

    @property
    def signature(self) -> str:
        """Which modules it runs; equal on all ranks in a round."""

    @property
    def seed(self) -> int:
        """Of the torch generator, so that dropout does not depend on the rank."""

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """Keyword arguments of the module, on the host."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The piece of one parameter that this rank owns. The tensors are live, flat and fp32: written in place, they count."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """First element of the flattened parameter that is in the piece."""
    weight: Tensor
    gradient: Tensor | None
    """None for a frozen parameter."""
    moments: Mapping[str, Tensor]
    """The optimizer's state by name (``exp_avg``, ``exp_avg_sq``); empty for a frozen parameter."""


Loss = Callable[[Any, Any], Tensor]

NORM_BLOCK = 2**16
"""Gradient elements whose squares are summed in fp32."""


class Engine(ABC):
    """Forward, backward and step of one module, alike on one rank and on many."""

    updates: int = 0
    """Optimizer steps taken so far; AdamW's bias correction counts them."""
    _gradients: dict[str, Tensor]
    """This rank's pieces of the gradients of all trainable parameters, live, any padding in them zero."""

    def __init__(self, model: nn.Module, device: torch.device, *, module: nn.Module | None = None, debug: bool = False) -> None:
        """``module`` is what is called where that is not the ``model`` itself but a wrapper around it."""
        self.module = module or model
        self._model = model
        self.device = device
        self._debug = debug
        self._rounds: Sequence[str] = ()
        self._round = 0

    def begin(
        self, rounds: Sequence[str], header: Mapping[str, float] | None = None, failure: Exception | None = None
    ) -> dict[str, float]:
        """Opens a step or a pass of ``len(rounds)`` rounds: all ranks run ``rounds[i]`` in round i, or none runs anything.

        Under ZeRO-3 ranks that run different modules in the same round exchange each other's gradients without an error where
        the sizes happen to be equal. So the sequence is compared across ranks before the first module runs, in the same host
        all-reduce that sums ``header`` (counts, tokens, flags; the same keys on all ranks). Returns the sums.

        A rank that cannot take part gives its ``failure``, which all ranks then raise together, with its exit code. Raises
        RoundsError on every rank where the sequences differ.
        """
        header = header or {}
        plan = "\n".join(["rounds", *rounds, "header", *header])
        # 40 bits: the sum over up to 4,096 ranks stays exact in float64.
        digest = float(int.from_bytes(hashlib.blake2b(plan.encode(), digest_size=5).digest(), "little"))
        with heartbeat.section("reduce"):
            failures, total, *sums = dist.sum_vector([float(failure is not None), digest, *header.values()])
        if failures:
            dist.raise_together(failure, "reading the data")
        if total != digest * dist.world():
            raise RoundsError(
                f"rank {dist.rank()} was about to run {_counted(rounds)} and other ranks something else in the same rounds; "
                "nothing was run. Every rank needs the same signatures in the same order"
            )
        self._rounds, self._round = tuple(rounds), 0
        self._clear_gradients()
        return dict(zip(header, sums, strict=True))

    def forward(self, slot: MicroBatch) -> Any:
        """The module's output for one slot, with the generator seeded from the slot.

        Raises RoundsError, before the module runs, for a slot that is not the one announced in ``begin``.
        """
        if self._debug:
            dist.agree(f"the modules of round {self._round}", slot.signature, RoundsError)
        announced = self._rounds[self._round] if self._round < len(self._rounds) else "the end of the step"
        if slot.signature != announced:
            raise RoundsError(
                f"rank {dist.rank()}, round {self._round}: {slot.signature!r} was run where {announced!r} was announced"
            )
        torch.manual_seed(slot.seed)
        self._round += 1
        with heartbeat.section("forward"):
            return self._call({name: value.to(self.device, non_blocking=True) for name, value in slot.inputs.items()})

    def clip(self, max_norm: float | None, sums: Tensor) -> tuple[float, Tensor]:
        """Scales the gradient to a global L2 norm of at most ``max_norm`` (None: leaves it).

        ``sums`` [n] float64 on the device, such as this rank's losses, is summed over ranks in the same all-reduce. Returns the
        norm before scaling, the same float on every rank and not finite if any element was not, and the sums. This is the one
        place of a step where the host waits for the device.
        """
        norms = torch.stack(torch._foreach_norm(self._gradient_blocks, 2.0)).double()
        packed = torch.cat([norms.square().sum().reshape(1).to(self.device), sums.to(self.device)])  # shards may lie on the host
        with heartbeat.section("reduce"):
            self._all_reduce(packed)
            packed = packed.cpu()
        norm = float(packed[0].sqrt())
        if max_norm is not None and norm > max_norm:
            torch._foreach_mul_(list(self._gradients.values()), max_norm / norm)
        return norm, packed[1:]

    @cached_property
    def _gradient_blocks(self) -> list[Tensor]:
        """Views of all gradients in short blocks, whose squares are summed in fp32, and over blocks in float64.

        An fp32 sum of millions of squares is off by 2e-4, and by how much depends on the sharding; so it is off by 2e-7, in a
        ninth of the time that float64 alone takes on a CPU.
        """
        return [block for gradient in self._gradients.values() for block in gradient.split(NORM_BLOCK)]

    def gradients(
        self,
        slots: Iterable[MicroBatch],
        loss: Loss,
        transform: Callable[[Tensor], Tensor] | None = None,
        *,
        dropout: bool = True,
    ) -> None:
        """A gradient pass without a step: afterwards ``shards()`` hold the sum over slots and ranks of ``transform(gradient)``.

        ``transform`` sees the whole gradient of one parameter for one slot, before any reduction: with slots of one sample,
        ``torch.square`` gives the sum of per-sample squares (empirical Fisher). The next ``begin`` clears the result. Without
        ``dropout`` it is the gradient of the function that the model computes in evaluation; training goes on with it afterwards.
        """
        slots = list(slots)
        self.begin([slot.signature for slot in slots])
        with self._transformed(transform), nullcontext() if dropout else self._without_dropout():
            for slot in slots:
                value = loss(self.forward(slot), slot)
                with heartbeat.section("backward"):
                    self.backward(value)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """No dropout and no graph inside; training goes on as before after it."""
        with self._without_dropout(), torch.no_grad():
            yield

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        self.module.eval()
        try:
            yield
        finally:
            self.module.train()

    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers, live: what a model keeps beside its parameters."""
        found: dict[str, Tensor] = {}
        for prefix, module in self._model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    found[f"{prefix}.{name}" if prefix else name] = buffer
        return found

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of ``loss`` (a scalar: this slot's part of the step's loss) to the step's."""

    @abstractmethod
    def step(self, learning_rate: float) -> None:
        """One optimizer update with the gradient as it now stands in the shards.

        A parameter group with the key ``lr_factor`` takes ``learning_rate`` times that.
        """

    @abstractmethod
    def shards(self) -> Iterator[Shard]:
        """The pieces of all parameters that this rank owns, in the module's order; pieces may be empty.

        Gradients are valid between ``backward`` and ``step``, weights and moments always.
        """

    @abstractmethod
    def publish(self, updates: int) -> None:
        """Call after writing weights or moments of shards: the module computes with them from here on."""

    def close(self) -> None:
        """Lets go of the module and all state: a stream makes an engine for every stage. It is of no use afterwards."""
        self._gradients = {}
        self.__dict__.pop("_gradient_blocks", None)

    @abstractmethod
    def _clear_gradients(self) -> None: ...

    @abstractmethod
    def _transformed(self, transform: Callable[[Tensor], Tensor] | None) -> Any:
        """A context in which every parameter's gradient goes through ``transform`` before it is reduced."""

    def _call(self, inputs: Mapping[str, Tensor]) -> Any:
        return self.module(**inputs)

    @abstractmethod
    def _all_reduce(self, tensor: Tensor) -> None:
        """Sums ``tensor`` over ranks in place, on the device."""


@contextmanager
def hooked(parameters: Iterable[Tensor], hook: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """A context in which the gradient of every parameter goes through ``hook`` when it is made."""
    handles = [parameter.register_hook(hook) for parameter in parameters] if hook else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _counted(rounds: Sequence[str]) -> str:
    """``['a', 'a', 'b']`` as ``2 x a, 1 x b``."""
    return ", ".join(f"{rounds.count(name)} x {name}" for name in dict.fromkeys(rounds)) or "nothing"


def build_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW over ``groups``; fused, which is one pass over memory on CPU and CUDA alike."""
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, weight_decay=config.weight_decay, fused=True
    )


def set_learning_rate(groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    """Of every parameter group, times the group's own factor where it has one."""
    for group in groups:
        group["lr"] = learning_rate * group.get("lr_factor", 1.0)


MOMENTS = ("exp_avg", "exp_avg_sq")


def initial_state(weight: Tensor) -> dict[str, Tensor]:
    """AdamW's state before the first step. Made at the start, so that restoring a checkpoint finds it in place."""
    state = {name: torch.zeros_like(weight) for name in MOMENTS}
    return {"step": torch.zeros((), dtype=torch.float32, device=weight.device), **state}
