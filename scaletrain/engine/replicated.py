"""ZeRO stages 0, 1 and 2: whole weights on every rank, the optimizer's work shared out or not.

======  ==============================  ====================================  =======================
stage   gradients                       masters and moments                   a step ends with
======  ==============================  ====================================  =======================
0       whole, summed once a step       whole, alike on all ranks             nothing
1       whole, summed once a step       this rank's pieces                    a gather of the weights
2       pieces, summed in every slot    this rank's pieces                    a gather of the weights
======  ==============================  ====================================  =======================

In all of them a gradient is first reduced to its owner, where penalties and clipping change it. Stage 0 gathers it from there:
the two halves of an all-reduce, with what is done between them seen by all ranks.

DeepSpeed's own stages 1 and 2 are not used. They divide by the number of ranks, keep gradients in lists that are made anew in
each step, and reach weights and moments through fragments of flat groups that a parameter's piece may straddle or miss, so that
neither exact sums nor live shards can be had of them without rewriting their step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn

from scaletrain import dist
from scaletrain.engine.base import MOMENTS, Engine, Shard, build_optimizer, hooked, initial_state, set_learning_rate
from scaletrain.engine.exchange import Exchange, cut
from scaletrain.engine.local import add_to
from scaletrain.engine.settings import OptimizerConfig, ReplicatedConfig


class ReplicatedEngine(Engine):
    """The whole model on every rank, one rank included."""

    def __init__(
        self,
        config: ReplicatedConfig,
        module: nn.Module,
        groups: list[dict[str, Any]],
        optimizer: OptimizerConfig,
        device: torch.device,
    ) -> None:
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        exact = {name: p.detach().to(device, torch.float32).view(-1) for name, p in module.named_parameters()}
        super().__init__(module.to(device), device, debug=config.debug)
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)  # not the buffers: rotary frequencies do not bear rounding
        self._stage = config.stage
        self._parameters = dict(module.named_parameters())
        self._weights = {name: p.detach().view(-1) for name, p in self._parameters.items()}
        self._trainable = [name for name, p in self._parameters.items() if p.requires_grad]
        self._exchange = Exchange(device, config.bucket_elements)
        # A master is what is stepped and saved: a view of the weight itself where that is of the same type and place.
        home = torch.device("cpu") if config.offload == "cpu" else device
        self._apart = dtype != torch.float32 or config.offload == "cpu"
        source = exact if self._apart else self._weights
        self._masters = {name: flat if config.stage == 0 else _own(flat) for name, flat in source.items()}
        if self._apart:
            self._masters = {name: master.to(home, copy=True) for name, master in self._masters.items()}
        del exact, source
        self._gradients = {name: torch.zeros(cut(p.numel())[1], device=home) for name, p in self._of(self._weights)}
        self._wholes = {name: torch.zeros(p.numel(), device=device) for name, p in self._of(self._weights) if config.stage < 2}
        self._arrived = _Arrived(self._exchange)
        names = {id(p): name for name, p in self._parameters.items()}
        self._optimizer = build_optimizer(
            optimizer, [{**group, "params": [self._masters[names[id(p)]] for p in group["params"]]} for group in groups]
        )
        for name, master in self._of(self._masters):
            if config.stage == 0:
                master.grad = torch.zeros_like(master) if home != device else self._wholes[name]
            else:
                master.grad = self._gradients[name]
            self._optimizer.state[master] = initial_state(master)
            take = self._arrived.hook(self._gradients[name]) if config.stage == 2 else add_to(self._wholes[name])
            self._parameters[name].register_post_accumulate_grad_hook(take)
        self.publish(0)  # ranks that made the module differently would differ for good
        self.module.train()

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        if self._stage == 2:
            self._arrived.reduce()
        elif self._round == len(self._rounds):
            self._exchange.add_sums(list(self._wholes.values()), list(self._gradients.values()))

    def step(self, learning_rate: float) -> None:
        set_learning_rate(self._optimizer.param_groups, learning_rate)
        if self._stage == 0:
            wholes = [master.grad for _, master in self._of(self._masters) if master.grad is not None]
            self._exchange.gather(list(self._gradients.values()), wholes)
        self._optimizer.step()
        self.updates += 1
        self._follow_masters(self._trainable)

    def shards(self) -> Iterator[Shard]:
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            state = self._optimizer.state.get(master, {})
            moments = {moment: self._owned(state[moment]) for moment in MOMENTS if moment in state}
            start, _ = cut(parameter.numel())
            yield Shard(name, tuple(parameter.shape), start, self._owned(master), self._gradients.get(name), moments)

    def publish(self, updates: int) -> None:
        self.updates = updates
        for state in self._optimizer.state.values():
            state["step"].fill_(updates)
        if self._stage == 0:
            moments = [state[moment] for state in self._optimizer.state.values() for moment in MOMENTS]
            for kept in (list(self._masters.values()), moments):
                self._exchange.gather([_own(whole) for whole in kept], kept)
        self._follow_masters(list(self._parameters))

    def close(self) -> None:
        super().close()
        self._parameters, self._weights, self._masters, self._wholes = {}, {}, {}, {}
        del self._optimizer, self._arrived, self.module, self._model

    def _of(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Those of trainable parameters."""
        return ((name, tensors[name]) for name in self._trainable)

    def _owned(self, kept: Tensor) -> Tensor:
        """This rank's piece of a master or a moment."""
        return _own(kept) if self._stage == 0 else kept

    def _follow_masters(self, names: Iterable[str]) -> None:
        masters, weights = [self._masters[name] for name in names], [self._weights[name] for name in names]
        if self._stage > 0:
            self._exchange.gather(masters, weights)
        elif self._apart:
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)

    def _all_reduce(self, tensor: Tensor) -> None:
        with dist.peers():
            td.all_reduce(tensor)

    def _clear_gradients(self) -> None:
        torch._foreach_zero_([*self._gradients.values(), *self._wholes.values()])
        self._arrived.clear()

    def _transformed(self, transform: Callable[[Tensor], Tensor] | None) -> AbstractContextManager[None]:
        return hooked((self._parameters[name] for name in self._trainable), transform)


def _own(whole: Tensor) -> Tensor:
    start, length = cut(whole.numel())
    return whole[start : start + length]


class _Arrived:
    """Gradients of one backward pass that are not reduced yet. They come in autograd's order, which is that of all ranks.

    Like any hook it does not know the engine, which would never be let go of.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.clear()

    def clear(self) -> None:
        self._wholes: list[Tensor] = []
        self._pieces: list[Tensor] = []
        self._elements = 0

    def hook(self, piece: Tensor) -> Callable[[Tensor], None]:
        """A hook that takes a parameter's gradient away; a full bucket is reduced, and freed, while the pass goes on."""

        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._wholes.append(parameter.grad.view(-1))
            self._pieces.append(piece)
            self._elements += parameter.grad.numel()
            parameter.grad = None
            if self._elements >= self._exchange.bucket_elements:
                self.reduce()

        return take

    def reduce(self) -> None:
        """Adds them to their pieces."""
        self._exchange.add_sums(self._wholes, self._pieces)
        self.clear()
