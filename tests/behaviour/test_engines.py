"""The engine contract: every stage of ZeRO on any number of ranks gives the sums of plain PyTorch, and no rank runs another's
modules."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch

from scaletrain import dist
from scaletrain.engine import OptimizerConfig, Zero3Config, create
from scaletrain.errors import ConfigError, RoundsError
from scaletrain.model import ModelConfig, TokenIds, build, parameter_groups
from tests import ranks, toy


def train_twenty_steps(name: str, precision: str = "fp32") -> dict[str, Any]:
    made = toy.make(name, precision)
    losses = list(toy.steps(made, 0, 20))
    return {"losses": losses, "weights": toy.pieces(made)}


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    """Plain PyTorch in one process."""
    found: dict[str, Any] = ranks.run(train_twenty_steps, 1, {"name": "local"})[0]
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", toy.ZERO)
def test_an_engine_equals_plain_pytorch_after_twenty_steps(oracle: dict[str, Any], name: str, world: int) -> None:
    """Tied weights, dropout, unequal counts, clipping, decay groups, and a head that not every slot uses."""
    expected = oracle
    results = ranks.run(train_twenty_steps, world, {"name": name})
    for result in results:
        assert torch.tensor(result["losses"]) == pytest.approx(torch.tensor(expected["losses"]), abs=1e-5)
    weights = toy.whole([result["weights"] for result in results])
    assert toy.furthest(toy.whole([expected["weights"]]), weights) < 1e-5


@pytest.mark.parametrize("name", toy.ZERO)
def test_bf16_keeps_masters_in_fp32_on_every_engine(name: str) -> None:
    """They differ by bf16 rounding in the forward pass only."""
    expected = ranks.run(train_twenty_steps, 1, {"name": "local", "precision": "bf16"})[0]
    results = ranks.run(train_twenty_steps, 2, {"name": name, "precision": "bf16"})
    assert results[0]["losses"][-1][0] == pytest.approx(expected["losses"][-1][0], rel=2e-2)
    weights = toy.whole([result["weights"] for result in results])
    assert any((value != value.bfloat16().float()).any() for value in weights.values())


def write_frozen(name: str, precision: str) -> dict[str, Any]:
    made = toy.make(name, precision, frozen=True)
    made.inference().__enter__()
    item = toy.slot(0, 0)
    before = {shard.name: shard.weight.clone() for shard in made.shards()}
    for shard in made.shards():
        if shard.name == "hidden.bias":
            shard.weight.add_(1.0)
    made.publish(0)
    made.begin([item.signature])
    shifted = made.forward(item)
    for shard in made.shards():
        shard.weight.copy_(before[shard.name])
    made.publish(0)
    made.begin([item.signature])
    return {"shifted": shifted.float().sum().item(), "back": made.forward(item).float().sum().item()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", toy.ZERO)
def test_frozen_weights_written_through_shards_are_computed_with(name: str, precision: str) -> None:
    """On all engines alike: a checkpoint is restored this way."""
    found = ranks.run(write_frozen, 2, {"name": name, "precision": precision})
    plain = ranks.run(write_frozen, 1, {"name": "local", "precision": precision})[0]
    assert abs(plain["shifted"] - plain["back"]) > 1
    assert found[0] == found[1] == pytest.approx(plain, rel=2e-2 if precision == "bf16" else 1e-5)


def train_a_part(name: str, **settings: Any) -> dict[str, Any]:
    """A frozen layer, a bias that belongs to no group, a group without parameters; and what lies in the shards of it."""
    dist.start(toy.CPU)
    model = toy.model()
    model.hidden.requires_grad_(False)
    model.calls.fill_(3)
    groups = [{"params": [model.embedding.weight, model.second.weight, model.first.bias]}, {"params": [], "lr_factor": 2.0}]
    made = create(toy.config(name, **settings), model, groups, OptimizerConfig(), toy.CPU)
    losses = list(toy.steps(made, 0, 4))
    facts = {
        s.name: [list(s.shape), s.gradient is None, sorted(s.moments), s.weight.dtype == torch.float32] for s in made.shards()
    }
    lengths = {s.name: {s.weight.numel(), *(value.numel() for value in s.moments.values())} for s in made.shards()}
    assert all(len(found) == 1 for found in lengths.values())
    buffers = {key: value.tolist() for key, value in made.buffers().items()}
    return {"losses": losses, "facts": facts, "weights": toy.pieces(made), "buffers": buffers}


@pytest.mark.parametrize("name", toy.ZERO)
def test_what_is_not_trained_stays_as_it_was_and_is_in_the_shards(name: str) -> None:
    """On four ranks, so that of a bias of 50 elements the last one has a shorter piece."""
    expected = ranks.run(train_a_part, 1, {"name": "local"})[0]
    results = ranks.run(train_a_part, 4, {"name": name})
    whole = toy.whole([result["weights"] for result in results])
    assert toy.furthest(whole, toy.whole([expected["weights"]])) < 1e-5
    before = dict(toy.model().named_parameters())
    for key in ("hidden.weight", "hidden.bias", "second.bias"):
        assert torch.equal(whole[key], before[key].detach().flatten())
        assert expected["facts"][key][1:3] == [True, []]
    for result in results:
        assert torch.tensor(result["losses"]) == pytest.approx(torch.tensor(expected["losses"]), abs=1e-5)
        assert (result["facts"], result["buffers"]) == (expected["facts"], {"calls": [3.0] * 3})


def pulled(name: str, **settings: Any) -> dict[str, Any]:
    """Steps whose gradients are changed on the shards, as a penalty does; and what the module then computes."""
    made = toy.make(name, **settings)
    clip = made.clip

    def changed(*arguments: Any) -> Any:
        for shard in made.shards():
            assert shard.gradient is not None
            shard.gradient.add_(shard.weight, alpha=0.3)
        return clip(*arguments)

    made.clip = changed  # type: ignore[method-assign]  # in a process of its own
    losses = list(toy.steps(made, 0, 3))
    item = toy.slot(5, 1)
    with made.inference():
        made.begin([item.signature])
        outputs = made.forward(item).flatten()[:50].tolist()
    return {"losses": losses, "outputs": outputs, "weights": toy.pieces(made)}


@pytest.mark.parametrize("name", toy.ZERO)
def test_what_is_added_to_a_gradient_on_its_owner_counts_on_every_rank(name: str) -> None:
    """Before clipping: norms, weights and outputs are those of plain PyTorch, also with the optimizer on the host."""
    expected = ranks.run(pulled, 1, {"name": "local"})[0]
    results = ranks.run(pulled, 2, {"name": name, "offload": "cpu"})
    assert results[0]["outputs"] == results[1]["outputs"] == pytest.approx(expected["outputs"], abs=1e-5)
    assert torch.tensor(results[0]["losses"]) == pytest.approx(torch.tensor(expected["losses"]), abs=1e-5)
    weights = toy.whole([result["weights"] for result in results])
    assert toy.furthest(weights, toy.whole([expected["weights"]])) < 1e-5


WIDTH, PARAMETERS = 64, 64 * 64


def held(cases: list[list[str]]) -> list[list[float]]:
    """What a rank holds between two steps of a model of one matrix, and after the engine's end, as multiples of its size."""

    def sizes() -> float:
        return min(at_once() for _ in range(10))  # gloo's threads let go of the last bucket a little later

    def at_once() -> float:
        time.sleep(0.02)
        gc.collect()
        found = [value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter)]
        return sum({s.data_ptr(): s.nbytes() for s in (value.untyped_storage() for value in found)}.values()) / 4 / PARAMETERS

    dist.start(toy.CPU)
    gc.freeze()  # what there was before is not looked at
    results = []
    for name, precision in cases:
        wide = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        config = toy.config(name, precision=precision)
        made = create(config, wide, [{"params": [wide.weight]}], OptimizerConfig(), toy.CPU)
        item = toy.ToySlot("wide", 0, {"input": torch.ones(1, WIDTH, dtype=wide.weight.dtype)})
        for _ in range(2):
            made.begin(["wide"])
            made.backward(made.forward(item).square().sum())
            made.clip(1.0, torch.zeros(0, dtype=torch.float64))
            made.step(0.1)
        results.append([sizes()])
        made.close()
        del made, wide, item
        results[-1].append(sizes())
    return results


def test_each_stage_holds_its_share_and_nothing_after_its_end() -> None:
    """Between two steps on four ranks, in units of the fp32 model."""
    expected = {
        ("zero0", "fp32"): 1 + 1 + 2 + 1 / 4,  # weights, gradients, moments, this rank's piece of the summed gradient
        ("zero1", "fp32"): 1 + 1 + (2 + 1) / 4,
        ("zero2", "fp32"): 1 + (2 + 1) / 4,
        ("zero0", "bf16"): 1 / 2 + 1 + 1 + 2 + 1 / 4,  # and fp32 masters
        ("zero1", "bf16"): 1 / 2 + 1 + (1 + 2 + 1) / 4,
        ("zero2", "bf16"): 1 / 2 + (1 + 2 + 1) / 4,
    }
    for results in ranks.run(held, 4, {"cases": list(expected)}):
        assert [running for running, _ in results] == pytest.approx(list(expected.values()), abs=0.05)
        assert [after for _, after in results] == pytest.approx([0] * len(results), abs=0.01)


def rotary(name: str) -> str:
    dist.start(toy.CPU)
    config = ModelConfig(architecture="modernbert", layers=1, hidden=32, heads=2, max_positions=64)
    network = build(config, TokenIds(vocab_size=64, pad=0, mask=1), seed=1)
    create(toy.config(name, precision="bf16"), network, parameter_groups(network, 0.0), OptimizerConfig(), toy.CPU)
    return str({buffer: (str(value.dtype), value.double().sum().item()) for buffer, value in network.named_buffers()})


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_bf16_leaves_rotary_frequencies_in_fp32_on_every_engine(name: str) -> None:
    plain = ranks.run(rotary, 1, {"name": "local"})[0]
    assert "torch.float32" in plain
    assert ranks.run(rotary, 2, {"name": name}) == [plain, plain]


RATE = 1e-2
FACTORS = {"first": 0.0, "second": 5.0}
"""Of a head's learning rate relative to the rest's, by its name; ``first`` has only its bias, its weight is the embedding."""


def groups_with_factors(model: toy.Toy) -> list[dict[str, Any]]:
    """One group for what follows the step's rate, and one per head."""
    heads = {name: list(getattr(model, name).named_parameters()) for name in FACTORS}
    own = {name: [p for _, p in found if p is not model.embedding.weight] for name, found in heads.items()}
    taken = {id(p) for found in own.values() for p in found}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [{"params": rest}, *({"params": own[name], "lr_factor": factor} for name, factor in FACTORS.items())]


def train_with_factors(name: str) -> dict[str, Any]:
    dist.start(toy.CPU)
    model = toy.model()
    made = create(toy.config(name), model, groups_with_factors(model), OptimizerConfig(weight_decay=0.1), toy.CPU)
    list(toy.steps(made, 0, 6))
    return toy.pieces(made)


@pytest.mark.parametrize(("name", "world"), [("local", 1), ("zero3", 1), *((name, 2) for name in toy.ZERO)])
def test_a_group_with_a_factor_learns_at_that_times_the_rate(name: str, world: int) -> None:
    """Six steps against torch's own AdamW with a rate per group; the factor 0 leaves its bias as it was made."""
    reference = toy.model()
    groups = [{**group, "lr": RATE * group.pop("lr_factor", 1.0)} for group in groups_with_factors(reference)]
    settings = OptimizerConfig()
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.epsilon, weight_decay=0.1)
    for step in range(6):
        items = [toy.slot(step, number, head) for number, head in enumerate(toy.heads_by_slot(step))]
        optimizer.zero_grad()
        for item in items:
            torch.manual_seed(item.seed)
            (toy.loss(reference(**item.inputs), item) / sum(item.count for item in items)).backward()
        for parameter in reference.parameters():  # the engines step where there is no gradient: decay, and moments that fade
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
    expected = {key: parameter.detach().flatten() for key, parameter in reference.named_parameters()}
    weights = toy.whole(ranks.run(train_with_factors, world, {"name": name}))
    assert toy.furthest(expected, weights) < 1e-5
    assert torch.equal(weights["first.bias"], toy.model().first.bias.detach())
    assert not torch.equal(weights["second.bias"], toy.model().second.bias.detach())


def gradients_without_dropout(name: str) -> dict[str, Any]:
    made = toy.make(name)
    list(toy.steps(made, 0, 1))
    item = toy.slot(3, 1)
    made.gradients([item], toy.loss, torch.square, dropout=False)
    first = toy.pieces(made, lambda shard: shard.gradient)
    weights = toy.pieces(made)
    losses = list(toy.steps(made, 1, 3))
    return {"gradient": first, "weights": weights, "losses": losses, "training": made._model.training}


@pytest.mark.parametrize(("name", "world"), [("local", 1), ("zero3", 1), *((name, 2) for name in toy.ZERO)])
def test_a_gradient_pass_without_dropout_is_of_the_evaluated_function_and_training_keeps_it(name: str, world: int) -> None:
    """Against autograd of the module in evaluation mode; later losses are those of a run that never made the pass."""
    results = ranks.run(gradients_without_dropout, world, {"name": name})
    weights = toy.whole([result["weights"] for result in results])
    reference, item = toy.model().eval(), toy.slot(3, 1)
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            parameter.copy_(weights[key].view_as(parameter))
    toy.loss(reference(**item.inputs), item).backward()
    for key, value in toy.whole([result["gradient"] for result in results]).items():
        expected = dict(reference.named_parameters())[key].grad
        square = torch.zeros_like(value) if expected is None else expected.flatten().square() * world  # every rank ran the slot
        torch.testing.assert_close(value, square, rtol=1e-4, atol=1e-6)
    losses = ranks.run(train_twenty_steps, world, {"name": name})[0]["losses"][1:3]
    assert [result["losses"] for result in results] == [losses] * world
    assert all(result["training"] for result in results)


def sum_of_squares(name: str) -> dict[str, Any]:
    made = toy.make(name)
    list(toy.steps(made, 0, 1))
    made.module.eval()
    samples = [toy.slot(9, number) for number in range(8)]
    made.gradients(samples[dist.rank() :: dist.world()], toy.loss, torch.square)
    squares = toy.pieces(made, lambda shard: shard.gradient)
    made.gradients(samples[dist.rank() :: dist.world()], toy.loss)
    return {"squares": squares, "plain": toy.pieces(made, lambda shard: shard.gradient), "weights": toy.pieces(made)}


@pytest.mark.parametrize(
    ("name", "world"), [("local", 1), ("zero3", 1), *((name, world) for name in toy.ZERO for world in (2, 4))]
)
def test_a_gradient_pass_gives_per_slot_squares_and_leaves_nothing_behind(name: str, world: int) -> None:
    """Against autograd on the same weights, one slot at a time; the pass after it is not touched by it."""
    results = ranks.run(sum_of_squares, world, {"name": name})
    weights = toy.whole([result["weights"] for result in results])
    reference = toy.model().eval()
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            parameter.copy_(weights[key].view_as(parameter))
    squares = {key: torch.zeros(p.numel()) for key, p in reference.named_parameters()}
    plain = {key: torch.zeros(p.numel()) for key, p in reference.named_parameters()}
    for number in range(8):
        item = toy.slot(9, number)
        reference.zero_grad()
        toy.loss(reference(**item.inputs), item).backward()
        for key, parameter in reference.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            squares[key] += gradient.flatten().square()
            plain[key] += gradient.flatten()
    for key, value in toy.whole([result["squares"] for result in results]).items():
        torch.testing.assert_close(value, squares[key], rtol=1e-4, atol=1e-6)
    for key, value in toy.whole([result["plain"] for result in results]).items():
        torch.testing.assert_close(value, plain[key], rtol=1e-4, atol=1e-5)


def skewed(name: str, debug: bool, announced: bool) -> dict[str, Any]:
    """Rank 1 runs the other head of the same size; where ``announced`` is false it says it would run the same."""
    made = toy.make(name, debug=debug)
    before = toy.digest(made)
    head = dist.rank() % 2
    item = toy.slot(0, 0, head)
    try:
        made.begin([item.signature if announced else "head 0"])
        toy.loss(made.forward(item), item)
    except Exception as error:
        return {
            "raised": type(error).__name__,
            "message": str(error),
            "updates": made.updates,
            "same": toy.digest(made) == before,
        }
    return {"raised": None}


@pytest.mark.parametrize("name", toy.ZERO)
def test_heads_skewed_between_ranks_raise_on_every_rank_before_anything_runs(name: str) -> None:
    for result in ranks.run(skewed, 2, {"name": name, "debug": False, "announced": True}):
        assert result["raised"] == RoundsError.__name__
        assert "head" in result["message"]
        assert (result["updates"], result["same"]) == (0, True)


def test_debug_finds_a_module_that_was_not_announced_on_every_rank() -> None:
    for result in ranks.run(skewed, 2, {"name": "zero3", "debug": True, "announced": False}):
        assert result["raised"] == RoundsError.__name__
        assert (result["updates"], result["same"]) == (0, True)


def test_a_slot_that_was_not_announced_raises_before_the_module_runs() -> None:
    made = toy.make("local")
    try:
        made.begin(["head 0"])
        with pytest.raises(RoundsError, match="'head 1' was run where 'head 0' was announced"):
            made.forward(toy.slot(0, 0, head=1))
    finally:
        dist.stop()


@pytest.mark.parametrize(
    "extra",
    [
        {"fp16": {"enabled": True}},
        {"gradient_clipping": 1.0},
        {"scheduler": {"type": "WarmupLR"}},
        {"zero_optimization": {"stage": 2}},
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        {"zero_optimization": {"zero_hpz_partition_size": 2}},
    ],
)
def test_deepspeed_settings_that_would_break_the_sums_are_refused(extra: dict[str, Any]) -> None:
    from scaletrain.engine.zero3 import settings

    key = next(iter(extra.get("zero_optimization", extra)))
    with pytest.raises(ConfigError, match=rf"engine\.extra\.(zero_optimization\.)?{key}"):
        settings(Zero3Config(extra=extra), toy.CPU, 1000)


def test_deepspeed_settings_that_change_speed_only_are_passed_on() -> None:
    from scaletrain.engine.zero3 import settings

    passed = settings(Zero3Config(extra={"zero_optimization": {"sub_group_size": 7}, "dump_state": True}), toy.CPU, 1000)
    assert (passed["zero_optimization"]["sub_group_size"], passed["dump_state"]) == (7, True)


def norm_of_many(name: str) -> float:
    """Of a gradient of one million elements in one parameter, most of them small beside a few."""
    dist.start(toy.CPU)
    wide = torch.nn.Linear(1000, 1000, bias=False)
    made = create(toy.config(name), wide, [{"params": [wide.weight]}], OptimizerConfig(), toy.CPU)
    made.begin([])
    pattern = torch.linspace(0, 1, 1_000_000).pow(8)
    for shard in made.shards():
        assert shard.gradient is not None
        shard.gradient.copy_(pattern[shard.start : shard.start + shard.gradient.numel()])
    return made.clip(None, torch.zeros(0, dtype=torch.float64))[0]


def test_the_gradient_norm_does_not_depend_on_how_it_is_sharded() -> None:
    """To the digits of fp32: summed in fp32 as a whole it is off by 2e-4, and clips differently at another world size."""
    expected = float(torch.linspace(0, 1, 1_000_000).pow(8).double().norm())
    assert ranks.run(norm_of_many, 1, {"name": "local"})[0] == pytest.approx(expected, rel=1e-6)
    for name in ("zero0", "zero2", "zero3"):
        assert ranks.run(norm_of_many, 3, {"name": name}) == pytest.approx([expected] * 3, rel=1e-6)
