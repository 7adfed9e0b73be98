"""A module small enough for many ranks and steps: an embedding with dropout, and two heads of equal size, the first one tied.

Its slots hold different numbers of rows, so that averaging over ranks or slots anywhere would give another gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scaletrain import dist, engine
from scaletrain.engine import Engine, LocalConfig, OptimizerConfig, ReplicatedConfig, Shard, Zero3Config

CPU = torch.device("cpu")
ZERO = ["zero0", "zero1", "zero2", "zero3"]
"""The engines of many ranks, by the names that a configuration gives them."""
VOCABULARY, WIDTH, SLOTS = 50, 24, 4


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)
        self.first = nn.Linear(WIDTH, VOCABULARY)
        self.second = nn.Linear(WIDTH, VOCABULARY)
        self.first.weight = self.embedding.weight
        self.register_buffer("calls", torch.zeros(3))

    def forward(self, ids: Tensor, head: Tensor) -> Tensor:
        hidden = self.dropout(torch.relu(self.hidden(self.embedding(ids))))
        return self.second(hidden) if int(head) else self.first(hidden)


@dataclass(frozen=True)
class ToySlot:
    signature: str
    seed: int
    inputs: dict[str, Tensor]
    labels: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def count(self) -> int:
        return self.labels.numel()


def slot(step: int, number: int, head: int = 0) -> ToySlot:
    generator = torch.Generator().manual_seed(1000 * step + number)
    ids = torch.randint(0, VOCABULARY, (2 + number, 5), generator=generator)
    return ToySlot(f"head {head}", 1000 * step + number, {"ids": ids, "head": torch.tensor(head)}, ids.roll(1, 1))


def loss(outputs: Tensor, item: ToySlot) -> Tensor:
    """Summed, not averaged."""
    return functional.cross_entropy(outputs.float().flatten(0, 1), item.labels.flatten(), reduction="sum")


def model() -> Toy:
    torch.manual_seed(7)
    return Toy()


def config(name: str, **settings: Any) -> LocalConfig | ReplicatedConfig | Zero3Config:
    """Of the engine called ``name``, cut to the size of the toy: some parameters partitioned and some not, and a bucket that is
    full amid the second head's backward pass, with the embedding left over."""
    if name == "local":
        return LocalConfig(**settings)
    if name == "zero3":
        return Zero3Config(**{"persistence_threshold": 60, **settings})
    return ReplicatedConfig(**{"name": name, "bucket_elements": 1840, **settings})


def make(name: str, precision: str = "fp32", *, frozen: bool = False, **settings: Any) -> Engine:
    """The engine called ``name`` around a new Toy; joins the ranks if they are not joined."""
    dist.start(CPU)
    toy = model()
    toy.hidden.requires_grad_(not frozen)
    decayed = [p for p in toy.parameters() if p.requires_grad and p.dim() > 1]
    plain = [p for p in toy.parameters() if p.requires_grad and p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return engine.create(config(name, precision=precision, **settings), toy, groups, OptimizerConfig(learning_rate=1e-2), CPU)


def heads_by_slot(step: int, slots: int = SLOTS) -> list[int]:
    """Both heads in every other step, and one of them not in its first round; alike on all ranks where they divide ``slots``."""
    return [0] * slots + [1] * slots if step % 2 == 0 else [1] * slots


def steps(made: Engine, first: int, last: int, max_norm: float = 0.5, slots: int = SLOTS) -> Iterator[tuple[float, float]]:
    """Takes steps [first, last): the loss and the gradient norm of each."""
    for step in range(first, last):
        items = [slot(step, number, head) for number, head in enumerate(heads_by_slot(step, slots))]
        mine = items[dist.rank() :: dist.world()]
        totals = made.begin([item.signature for item in mine], {"count": sum(item.count for item in mine)})
        sums = torch.zeros(1, dtype=torch.float64)
        for item in mine:
            value = loss(made.forward(item), item)
            made.backward(value / totals["count"])
            sums += value.detach().double()
        norm, sums = made.clip(max_norm, sums)
        made.step(1e-2)
        yield float(sums) / totals["count"], norm


def pieces(made: Engine, of: Callable[[Shard], Tensor | None] = lambda shard: shard.weight) -> dict[str, list[Any]]:
    """``{name: [start, values]}`` of this rank, as JSON."""
    return {
        shard.name: [shard.start, (value if (value := of(shard)) is not None else torch.empty(0)).tolist()]
        for shard in made.shards()
    }


def whole(results: list[dict[str, list[Any]]]) -> dict[str, Tensor]:
    """The pieces of all ranks as flat tensors."""
    joined: dict[str, list[tuple[int, list[float]]]] = {}
    for result in results:
        for name, (start, values) in result.items():
            joined.setdefault(name, []).append((start, values))
    return {name: torch.tensor([value for _, values in sorted(parts) for value in values]) for name, parts in joined.items()}


def digest(made: Engine) -> str:
    """SHA-256 of all weights and moments of this rank."""
    state = hashlib.sha256()
    for shard in made.shards():
        for value in (shard.weight, *shard.moments.values()):
            state.update(value.detach().contiguous().numpy().tobytes())
    return state.hexdigest()


def furthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest absolute difference between two sets of tensors of the same names and sizes."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)
