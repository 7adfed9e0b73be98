"""Plain PyTorch in one process. Short enough to be trusted by eye: the other engines must give the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from scaletrain import dist
from scaletrain.engine.base import (
    MOMENTS,
    Engine,
    Shard,
    build_optimizer,
    hooked,
    initial_state,
    set_learning_rate,
)
from scaletrain.engine.settings import LocalConfig, OptimizerConfig
from scaletrain.errors import WorldSizeError


class LocalEngine(Engine):
    """One process, fp32 master weights and fp32 gradients, whatever the module computes in."""

    def __init__(
        self,
        config: LocalConfig,
        module: nn.Module,
        groups: list[dict[str, Any]],
        optimizer: OptimizerConfig,
        device: torch.device,
    ) -> None:
        if dist.world() != 1:
            rule = "the local engine is one process"
            raise WorldSizeError(
                "engine.name", f"local on {dist.world()} ranks", rule, "Use `engine: {name: zero3}`, or one rank."
            )
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        masters = {name: p.detach().to(device, torch.float32) for name, p in module.named_parameters()}
        super().__init__(module.to(device), device, debug=config.debug)
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)  # not the buffers: rotary frequencies do not bear rounding
        self._parameters = dict(module.named_parameters())
        # In fp32 the master is the parameter itself; in bf16 a copy that the parameter follows.
        self._masters = {
            name: (p.detach() if dtype == torch.float32 else masters[name].clone()).view(-1)
            for name, p in self._parameters.items()
        }
        names = {id(p): name for name, p in self._parameters.items()}
        self._trainable = [name for name, p in self._parameters.items() if p.requires_grad]
        self._gradients = {name: torch.zeros_like(self._masters[name]) for name in self._trainable}
        self._optimizer = build_optimizer(
            optimizer, [{**group, "params": [self._masters[names[id(p)]] for p in group["params"]]} for group in groups]
        )
        for name in self._trainable:
            self._masters[name].grad = self._gradients[name]
            self._optimizer.state[self._masters[name]] = initial_state(self._masters[name])
            self._parameters[name].register_post_accumulate_grad_hook(add_to(self._gradients[name]))
        self.module.train()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> None:
        set_learning_rate(self._optimizer.param_groups, learning_rate)
        self._optimizer.step()
        self.updates += 1
        self._follow_masters()

    def shards(self) -> Iterator[Shard]:
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            state = self._optimizer.state.get(master, {})
            moments = {moment: state[moment] for moment in MOMENTS if moment in state}
            yield Shard(name, tuple(parameter.shape), 0, master, self._gradients.get(name), moments)

    def publish(self, updates: int) -> None:
        self.updates = updates
        for state in self._optimizer.state.values():
            state["step"].fill_(updates)
        self._follow_masters()

    def _follow_masters(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                parameter.detach().view(-1).copy_(self._masters[name])

    def _all_reduce(self, tensor: Tensor) -> None:
        """One process has the sum."""

    def _clear_gradients(self) -> None:
        torch._foreach_zero_(list(self._gradients.values()))

    def _transformed(self, transform: Callable[[Tensor], Tensor] | None) -> AbstractContextManager[None]:
        return hooked((self._parameters[name] for name in self._trainable), transform)


def add_to(gradient: Tensor) -> Callable[[Tensor], None]:
    """A hook that moves a parameter's gradient into ``gradient``.

    It knows nothing else: torch keeps hooks out of the collector's sight, and an engine that one knew would never be let go of.
    """

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient.add_(parameter.grad.view(-1))
        parameter.grad = None

    return add
