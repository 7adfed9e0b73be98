"""DeepSpeed ZeRO-3: every weight, gradient and moment partitioned over all ranks, with the sums of plain PyTorch.

DeepSpeed divides gradients by the number of ranks and, by default, by the number of accumulation steps. Neither may stay: the
first is undone by scaling the loss, the second is switched off. Clipping and checkpoints are ours, so DeepSpeed's are not used.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
import torch.distributed as td
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
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
from scaletrain.engine.exchange import cut
from scaletrain.engine.settings import OptimizerConfig, Zero3Config
from scaletrain.errors import ConfigError


class Zero3Engine(Engine):
    """ZeRO-3 over all ranks of the job, one of them included."""

    def __init__(
        self,
        config: Zero3Config,
        module: nn.Module,
        groups: list[dict[str, Any]],
        optimizer: OptimizerConfig,
        device: torch.device,
    ) -> None:
        _start_deepspeed()
        self._parameters: dict[str, Any] = dict(module.named_parameters())  # DeepSpeed adds attributes to them
        self._trainable = [name for name, p in self._parameters.items() if p.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(optimizer, groups),
            config=settings(config, device, sum(p.numel() for p in self._parameters.values())),
            dist_init_required=False,
        )
        super().__init__(module, device, module=engine, debug=config.debug)
        self._engine: Any = engine
        self._zero = engine.optimizer
        # DeepSpeed makes the moments lazily, at the first step; a checkpoint is restored before it.
        for flat in self._zero.fp32_partitioned_groups_flat:
            self._zero.optimizer.state[flat] = initial_state(flat)
        # Live views: of the gradients, and of fp32 copies of what is frozen. `safe_get_local_grad` and its like would copy what
        # lies on the host to the device.
        self._offloaded = config.offload == "cpu"
        self._gradients = {name: self._own(name, self._zero._get_fp32_grad_state_partition) for name in self._trainable}
        self._frozen = {name: p.ds_tensor.detach().float() for name, p in self._parameters.items() if not p.requires_grad}
        self._world = float(dist.world())
        self.module.train()

    def backward(self, loss: Tensor) -> None:
        last = self._round == len(self._rounds)
        self._engine.set_gradient_accumulation_boundary(last and not self._offloaded)
        self._engine.backward(loss * self._world, scale_wrt_gas=False)
        if last and self._offloaded:
            self._take_sums()

    def step(self, learning_rate: float) -> None:
        set_learning_rate(self._zero.param_groups, learning_rate)
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()
        self.updates += 1

    def shards(self) -> Iterator[Shard]:
        for name, parameter in self._parameters.items():
            start, length = cut(parameter.ds_numel)
            shape = tuple(parameter.ds_shape)
            if name in self._frozen:
                yield Shard(name, shape, start, self._frozen[name].view(-1)[:length], None, {})
                continue
            weight = self._own(name, self._zero._get_fp32_opt_state_partition)
            moments = {key: self._own(name, self._zero._get_fp32_opt_state_partition, optim_state_key=key) for key in MOMENTS}
            yield Shard(name, shape, start, weight, self._gradients[name], moments)

    def publish(self, updates: int) -> None:
        self.updates = updates
        for state in self._zero.optimizer.state.values():
            state["step"].fill_(updates)
        # The module computes from ds_tensor and, for small parameters, from a whole copy kept on every rank.
        self._zero._partition_all_parameters()
        for shard in self.shards():
            self._parameters[shard.name].ds_tensor.data.view(-1)[: shard.weight.numel()].copy_(shard.weight)
        persistent = self._zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def close(self) -> None:
        super().close()
        self._engine.destroy()
        # Two things of DeepSpeed's outlive an engine and hold its module: a stack at whose bottom lies every module there ever
        # was, and the cache of a method, behind a decorator.
        FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not self._model]
        for method in vars(PartitionedParameterCoordinator).values():
            for cell in getattr(method, "__closure__", None) or ():
                if hasattr(cell.cell_contents, "cache_clear"):
                    cell.cell_contents.cache_clear()
        self._parameters, self._frozen = {}, {}
        del self._engine, self._zero, self.module, self._model

    def _clear_gradients(self) -> None:
        # zero_grad only makes the next reduction overwrite instead of add, and only for parameters that the first slot uses:
        # a head that a later slot uses would add to its gradient of the step before.
        self._zero.zero_grad()
        self._zero.grad_partitions_flat_buffer.zero_()
        torch._foreach_zero_(list(self._gradients.values()))

    def _take_sums(self) -> None:
        """Moves what the slots summed up to where the optimizer on the host looks for it.

        DeepSpeed would move, in the last slot, what that slot has a gradient for: not that of a head which only others use.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the sums come to the host without waiting
        sums = self._zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        for name, gradient in self._gradients.items():
            gradient.copy_(sums[self._parameters[name].ds_id].view(-1)[: gradient.numel()])

    def _own(self, name: str, get: Callable[..., tuple[Tensor, int]], **arguments: str) -> Tensor:
        """What ``get`` finds of this rank's piece: flat, live, without the padding that DeepSpeed puts at its end."""
        parameter = self._parameters[name]
        found, _ = get(parameter, release_swap_buffers=True, **arguments)
        return found.detach().view(-1)[: cut(parameter.ds_numel)[1]]

    def _all_reduce(self, tensor: Tensor) -> None:
        with dist.peers():
            td.all_reduce(tensor)

    def _transformed(self, transform: Callable[[Tensor], Tensor] | None) -> AbstractContextManager[None]:
        # backward() scales the loss by the world, and the reduction divides by it after the hook: the hook undoes both.
        def hook(gradient: Tensor) -> Tensor:
            assert transform is not None
            return transform(gradient / self._world) * self._world

        return hooked((self._parameters[name] for name in self._trainable), hook if transform else None)


def settings(config: Zero3Config, device: torch.device, elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a model of so many elements, derived. Raises ConfigError where ``extra`` contradicts it."""
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed counts with it, nothing else: slots are of any size
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device at every slot
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": min(config.reduce_bucket_elements, elements),  # the bucket is allocated whole
            "stage3_prefetch_bucket_size": config.prefetch_elements,
            "stage3_param_persistence_threshold": config.persistence_threshold,
        },
    }
    if config.offload == "cpu":
        # With torch's AdamW: DeepSpeed's own for the host needs a compiler on the machine.
        derived["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return _merge(derived, config.extra, "engine.extra")


FREE = frozenset(
    {
        *("comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "dump_state"),
        *("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_module_granularity_threshold", "leaf_module"),
        *("stage3_model_persistence_threshold", "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential"),
        *("sub_group_size", "log_trace_cache_warnings"),
    }
)
"""Keys that change how fast a step runs or what DeepSpeed logs of it. Others (offload, partitions of another shape, loss scaling,
a scheduler) would move or change what shards, sums and checkpoints are read from."""


def _merge(derived: dict[str, Any], extra: Mapping[str, Any], path: str) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in extra.items():
        known = derived.get(key)
        if isinstance(known, dict) and isinstance(value, Mapping):
            merged[key] = _merge(known, value, f"{path}.{key}")
        elif key in derived and value != known:
            rule = f"this key is derived from the other settings and is {known!r} here"
            raise ConfigError(f"{path}.{key}", value, rule, "Remove it from `extra`, or change the setting that it follows from.")
        elif key not in derived and key not in FREE:
            rule = "shards, sums and checkpoints rely on DeepSpeed's own setting of it"
            raise ConfigError(f"{path}.{key}", value, rule, f"Keys that can be passed on: {', '.join(sorted(FREE))}.")
        else:
            merged[key] = value
    return merged


def _start_deepspeed() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch 2.13 renames two collectives that DeepSpeed calls thousands of times a minute.
    warnings.filterwarnings(
        "ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).* is deprecated", category=FutureWarning
    )
    # The shared-memory op for CPU tensors is compiled at start, for tens of seconds, and fails the start where there is no
    # compiler. Gloo gives the same sums.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False)
