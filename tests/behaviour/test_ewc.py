"""Elastic weight consolidation on shards: gradient, Fisher information and what is carried over are those of plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from scaletrain import dist, engine
from scaletrain.checkpoint import Piece, read_state, state_shapes, write_state
from scaletrain.continual.method import Beginning, Ending, State
from scaletrain.continual.methods import Ewc
from scaletrain.continual.methods.ewc import FISHER, QuadraticPenalty
from scaletrain.data import keyed
from scaletrain.data.slots import rounds, slots_of_rank
from scaletrain.engine import Engine, OptimizerConfig, Shard
from tests import ranks, toy

VOCABULARY, WIDTH, LABELS = 30, 14, (3, 4, 2)
SAMPLES = 13
"""Of a task: neither 2 nor 4 ranks divide it."""
RATE, STRENGTH, GAMMA = 0.1, 3.0, 0.5
ENGINES = [("local", 1), *((name, 2) for name in toy.ZERO), ("zero0", 4), ("zero3", 1), ("zero3", 4)]


class Small(nn.Module):
    """A classifier with dropout and one block of labels per task."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, labels) for labels in LABELS[:blocks])
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(noise("weight", name, parameter.numel()).view_as(parameter))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.dropout(torch.tanh(self.hidden(self.embedding(ids).mean(1))))
        return torch.cat([block(hidden) for block in self.blocks], dim=1)


@dataclass(frozen=True)
class Rows:
    """A slot; label -1 in one that only fills up."""

    seed: int
    inputs: dict[str, Tensor]
    labels: Tensor
    signature: str = "small"


def noise(*key: str | int) -> Tensor:
    """The same normal numbers for the same key, on any rank; the last part of the key is how many."""
    return torch.randn(int(key[-1]), generator=torch.Generator().manual_seed(keyed.key(*key) >> 1)) * 0.3


def importance(name: str, elements: int) -> Tensor:
    return noise("importance", name, elements).abs()


def rows(task: int, first: int, last: int) -> Rows:
    """Samples [first, last) of a task, with labels of its own block and those before it."""
    draws = [torch.Generator().manual_seed(1000 * task + number) for number in range(first, last)]
    ids = torch.stack([torch.randint(0, VOCABULARY, (5,), generator=draw) for draw in draws])
    labels = torch.stack([torch.randint(0, sum(LABELS[: task + 1]), (), generator=draw) for draw in draws])
    return Rows(1000 * task + first, {"ids": ids}, labels)


def loss(outputs: Tensor, item: Rows) -> Tensor:
    return functional.cross_entropy(outputs.float(), item.labels, ignore_index=-1, reduction="sum")


def make(name: str, blocks: int = 2) -> Engine:
    dist.start(toy.CPU)
    model = Small(blocks)
    return engine.create(toy.config(name), model, [{"params": list(model.parameters())}], OptimizerConfig(), toy.CPU)


def move(made: Engine, where: str) -> None:
    """Every weight by its own share of noise, as training would."""
    for shard in made.shards():
        shard.weight.add_(cut(noise(where, shard.name, elements(shard)), shard))
    made.publish(0)


def elements(shard: Shard) -> int:
    return torch.Size(shard.shape).numel()


def cut(whole: Tensor, shard: Shard) -> Tensor:
    return whole[shard.start : shard.start + shard.weight.numel()]


def of_pieces(found: dict[str, Tensor], made: Engine) -> dict[str, list[Any]]:
    return {shard.name: [shard.start, found[shard.name].tolist()] for shard in made.shards()}


def nothing_stored(part: str, shard: Shard) -> Tensor:
    return torch.zeros(shard.weight.numel())


def beginning(made: Engine, state: State) -> Beginning:
    def teacher() -> Any:
        raise AssertionError("nobody asked for a teacher")

    return Beginning(made, teacher, old=(), together=True, state=state, has_state=True)


def ending(made: Engine, task: int, state: State) -> Ending:
    """Slots of one sample each, dealt over the ranks and filled up."""

    def slots(samples: int) -> Sequence[Any]:
        filler = Rows(0, {"ids": torch.zeros(1, 5, dtype=torch.int64)}, torch.tensor([-1]))
        samples = min(samples, SAMPLES)
        mine = slots_of_rank(samples, dist.rank(), dist.world())
        return [rows(task, number, number + 1) if number < samples else filler for number in mine]

    return Ending(made, slots, loss, lambda samples: min(samples, SAMPLES), state)


def plain(blocks: int = 2, moves: Sequence[str] = ()) -> Small:
    model = Small(blocks)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for where in moves:
                parameter += noise(where, name, parameter.numel()).view_as(parameter)
    return model


def flat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().flatten() for name, value in tensors.items()}


# --- the penalty


def penalised_step(name: str) -> dict[str, Any]:
    """A step of plain gradient descent on shards, some way off the weights that the stage started from."""
    made = make(name)
    active = Ewc(strength=STRENGTH, gamma=GAMMA).begin(
        beginning(made, lambda part, shard: cut(importance(shard.name, elements(shard)), shard))
    )
    move(made, "on the way")
    items = [rows(1, first, first + 3) for first in (0, 3, 6, 9)]
    made.begin(["small"] * (4 // dist.world()))
    for item in items[dist.rank() :: dist.world()]:
        made.backward(loss(made.forward(item), item) / 12)
    (penalty,) = active.penalties
    value = penalty.apply(made.shards())
    gradients = toy.pieces(made, lambda shard: shard.gradient)
    for shard in made.shards():
        assert shard.gradient is not None
        shard.weight.sub_(RATE * shard.gradient)
    made.publish(1)
    with made.inference():
        made.begin(["small"])
        logits = made.forward(rows(1, 0, 12))
    facts = {"name": penalty.name, "value": value.item(), "dtype": str(value.dtype), "logits": logits.tolist()}
    return {**facts, "gradients": gradients, "weights": toy.pieces(made)}


@pytest.mark.parametrize(("name", "world"), ENGINES)
def test_one_descent_step_equals_autograd_of_the_penalty_on_full_weights(name: str, world: int) -> None:
    """Value, gradient, weights after the step, and what the module then computes; with dropout in the data's part of the loss."""
    model, anchors = plain(moves=["on the way"]), {name: p.detach() for name, p in plain().named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    data = torch.zeros(())
    for first in (0, 3, 6, 9):
        item = rows(1, first, first + 3)
        torch.manual_seed(item.seed)
        data = data + functional.cross_entropy(model(**item.inputs), item.labels, reduction="sum") / 12
    penalty = sum(
        STRENGTH / 2 * (GAMMA * importance(key, p.numel()).view_as(p) * (p - anchors[key]) ** 2).sum()
        for key, p in model.named_parameters()
    )
    assert isinstance(penalty, Tensor)
    (data + penalty).backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    optimizer.step()

    results = ranks.run(penalised_step, world, {"name": name})
    assert {(result["name"], result["dtype"]) for result in results} == {("ewc", "torch.float64")}
    assert sum(result["value"] for result in results) == pytest.approx(penalty.item(), rel=1e-6)
    assert toy.furthest(toy.whole([result["gradients"] for result in results]), flat(gradients)) < 1e-6
    assert toy.furthest(toy.whole([result["weights"] for result in results]), flat(dict(model.named_parameters()))) < 1e-6
    expected = model.eval()(rows(1, 0, 12).inputs["ids"])
    for result in results:
        torch.testing.assert_close(torch.tensor(result["logits"]), expected.detach(), rtol=0, atol=1e-5)


def test_a_piece_longer_than_a_block_is_pulled_to_its_last_element(monkeypatch: pytest.MonkeyPatch) -> None:
    """And frozen parameters are left alone."""
    monkeypatch.setattr("scaletrain.continual.methods.ewc.BLOCK_ELEMENTS", 64)
    weight = torch.linspace(-1, 1, 1000)
    shards = [Shard("a", (1000,), 0, weight, torch.ones(1000), {}), Shard("frozen", (2,), 0, torch.ones(2), None, {})]
    penalty = QuadraticPenalty("p", 2.0, lambda shard: torch.arange(1000.0), shards)
    weight += 0.5
    assert penalty.apply(shards).item() == pytest.approx(2.0 / 2 * sum(range(1000)) * 0.25)
    assert shards[0].gradient is not None
    torch.testing.assert_close(shards[0].gradient, 1 + 2.0 * torch.arange(1000.0) * 0.5)


# --- the Fisher information


def consolidated(name: str, samples: int) -> dict[str, Any]:
    made = make(name)
    found = Ewc(strength=1.0, samples=samples).consolidate(ending(made, 1, nothing_stored))
    assert list(found) == [FISHER]
    before = of_pieces(dict(found[FISHER]), made)
    made.begin([])  # clears the gradients, and nothing that was returned
    return {"fisher": before, "same": of_pieces(dict(found[FISHER]), made) == before, "training": made.module.training}


def per_sample_gradients(model: nn.Module, item: Rows) -> dict[str, Tensor]:
    """[samples, elements] of every parameter."""
    model.eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def of_one(parameters: dict[str, Tensor], ids: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (ids[None],))
        return functional.cross_entropy(logits, label[None])

    gradients = vmap(grad(of_one), in_dims=(None, 0, 0))(parameters, item.inputs["ids"], item.labels)
    return {name: value.flatten(1) for name, value in gradients.items()}


def fisher(model: nn.Module, item: Rows) -> dict[str, Tensor]:
    return {name: value.square().mean(0) for name, value in per_sample_gradients(model, item).items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("name", "world"), ENGINES)
def test_fisher_information_is_the_mean_of_per_sample_squares_at_any_number_of_ranks(name: str, world: int) -> None:
    """Against vmap(grad) on the whole model; 13 samples leave fillers on 2 and 4 ranks, and dropout is off for the pass only."""
    assert rounds(SAMPLES, world).fillers == {1: 0, 2: 1, 4: 3}[world]
    results = ranks.run(consolidated, world, {"name": name, "samples": SAMPLES})
    found = toy.whole([result["fisher"] for result in results])
    assert_close(found, fisher(plain(), rows(1, 0, SAMPLES)))
    assert all(result["same"] and result["training"] for result in results)

    batched = {key: value.mean(0).square() for key, value in per_sample_gradients(plain(), rows(1, 0, SAMPLES)).items()}
    assert sum(value.sum() for value in found.values()) > 3 * sum(value.sum() for value in batched.values())


@pytest.mark.parametrize(("samples", "counted"), [(5, 5), (1000, SAMPLES)])
def test_fisher_information_divides_by_the_samples_that_there_were(samples: int, counted: int) -> None:
    results = ranks.run(consolidated, 2, {"name": "zero3", "samples": samples})
    assert_close(toy.whole([result["fisher"] for result in results]), fisher(plain(), rows(1, 0, counted)))


# --- one task after the other


def stored(folder: Path, made: Engine) -> State:
    """What `write_state` left there, cut to the shards of this rank; zeros for what it does not hold."""
    shapes = state_shapes(folder, FISHER)
    pieces = {s.name: Piece(s.shape, s.start, torch.zeros(s.weight.numel())) for s in made.shards()}
    read_state(folder, FISHER, {name: piece for name, piece in pieces.items() if name in shapes})
    return lambda part, shard: pieces[shard.name].values


def keep(folder: Path, made: Engine, task: int, state: State) -> None:
    found = Ewc(strength=STRENGTH, gamma=GAMMA, samples=SAMPLES).consolidate(ending(made, task, state))
    pieces = {shard.name: Piece(shard.shape, shard.start, found[FISHER][shard.name]) for shard in made.shards()}
    folder.mkdir(exist_ok=True)
    write_state(folder, FISHER, pieces)


def learn_two_tasks(folder: str) -> None:
    made = make("zero3")
    keep(Path(folder, "one"), made, 0, nothing_stored)
    move(made, "second task")
    keep(Path(folder, "two"), made, 1, stored(Path(folder, "one"), made))


def pulled(name: str, folder: str) -> dict[str, Any]:
    """The penalty of a third task, whose block is new."""
    made = make(name, blocks=3)
    move(made, "second task")
    active = Ewc(strength=STRENGTH, gamma=GAMMA).begin(beginning(made, stored(Path(folder, "two"), made)))
    move(made, "third task")
    made.begin([])
    value = active.penalties[0].apply(made.shards())
    return {"value": value.item(), "gradients": toy.pieces(made, lambda shard: shard.gradient)}


def test_importance_is_carried_from_task_to_task_and_to_any_number_of_ranks(tmp_path: Path) -> None:
    """Computed and written by 2 ranks, read by 1 and 4; F~ is gamma F_1 + F_2, and a new block is free."""
    ranks.run(learn_two_tasks, 2, {"folder": str(tmp_path)})
    first, second = fisher(plain(), rows(0, 0, SAMPLES)), fisher(plain(moves=["second task"]), rows(1, 0, SAMPLES))
    expected, value = {}, 0.0
    for name, parameter in plain(blocks=3).named_parameters():
        moved = noise("third task", name, parameter.numel())
        accumulated = GAMMA * first[name] + second[name] if name in first else torch.zeros_like(moved)
        expected[name] = STRENGTH * GAMMA * accumulated * moved
        value += float((STRENGTH / 2 * GAMMA * accumulated * moved**2).sum())
    assert not expected["blocks.2.weight"].any()
    alone = ranks.run(pulled, 1, {"name": "local", "folder": str(tmp_path)})
    four = ranks.run(pulled, 4, {"name": "zero3", "folder": str(tmp_path)})
    assert [sum(result["value"] for result in results) for results in (alone, four)] == pytest.approx([value, value], rel=1e-4)
    gradients = [toy.whole([result["gradients"] for result in results]) for results in (alone, four)]
    assert_close(gradients[0], expected)
    assert toy.furthest(*gradients) == 0.0
