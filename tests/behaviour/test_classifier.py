"""A classifier in an engine: ZeRO-3 on any number of ranks trains it as plain PyTorch does, and a checkpoint becomes a model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from scaletrain import checkpoint, dist, engine
from scaletrain.checkpoint import Progress
from scaletrain.engine import Engine, LocalConfig, OptimizerConfig, Zero3Config
from scaletrain.model import (
    Block,
    Classifier,
    ClassifierConfig,
    ModelConfig,
    TokenIds,
    build,
    describe,
    grow,
    parameter_groups,
    start,
    write_model,
)
from tests import ranks, tiny, toy

STEPS, SLOTS, RATE, FACTOR = 5, 4, 2e-3, 10.0
BLOCKS = (Block("colours", ("blue", "green", "red")), Block("sizes", ("large", "small")))
TOKENS = TokenIds(vocab_size=90, pad=0, mask=4, begin=2, end=3)


@dataclass(frozen=True)
class Texts:
    """A slot of texts of unlike lengths; ``labels`` are columns."""

    seed: int
    inputs: dict[str, Tensor]
    labels: Tensor
    signature: str = "classification"


def texts(step: int, number: int, layout: str) -> Texts:
    """Slots of 1 to 4 texts, so that averaging over ranks or slots anywhere would give another gradient."""
    generator = torch.Generator().manual_seed(100 * step + number)
    lengths = torch.randint(3, 12, (number + 1,), generator=generator)
    rows = [torch.randint(5, 90, (int(length),), generator=generator) for length in lengths]
    labels = torch.randint(0, 5, (len(rows),), generator=generator)
    if layout == "unpadded":
        positions = torch.cat([torch.arange(len(row)) for row in rows])
        bounds = torch.tensor([0, *map(len, rows)]).cumsum(0)
        inputs = {"input_ids": torch.cat(rows)[None], "position_ids": positions[None], "cu_seqlens": bounds}
    else:
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    return Texts(100 * step + number, inputs, labels)


def loss(outputs: Tensor, slot: Texts) -> Tensor:
    return functional.cross_entropy(outputs.float(), slot.labels, reduction="sum")


def made(architecture: str, pooling: Any, layout: Any) -> Classifier:
    """Two blocks, dropout in the encoder and before the head."""
    sizes: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 2, "max_positions": 32}
    source = build(ModelConfig(architecture=architecture, **sizes), TOKENS, seed=1)  # type: ignore[arg-type]
    config = ClassifierConfig(start="run", pooling=pooling, layout=layout, dropout=0.1, encoder_dropout=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the pooler is new
        classifier = Classifier.from_masked_lm(config, describe(source)["hf_config"], dict(source.named_parameters()))
    for block in BLOCKS:
        grow(classifier, block, seed=1)
    return classifier


def engine_of(name: str, classifier: Classifier) -> Engine:
    config = LocalConfig() if name == "local" else Zero3Config(persistence_threshold=60)
    groups = parameter_groups(classifier, 0.1, FACTOR, idle={0})
    return engine.create(config, classifier, groups, OptimizerConfig(), toy.CPU)


def steps(running: Engine, layout: str, count: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    seen = []
    for step in range(count):
        slots = [texts(step, number, layout) for number in range(SLOTS)]
        mine = slots[dist.rank() :: dist.world()]
        totals = running.begin([slot.signature for slot in mine], {"count": sum(len(slot.labels) for slot in mine)})
        sums = torch.zeros(1, dtype=torch.float64)
        for slot in mine:
            value = loss(running.forward(slot), slot)
            running.backward(value / totals["count"])
            sums += value.detach().double()
        norm, sums = running.clip(0.5, sums)
        running.step(RATE)
        seen.append((float(sums) / totals["count"], norm))
    return seen


CASES = [("bert", "mean", "padded"), ("bert", "first", "unpadded"), ("modernbert", "mean", "unpadded")]
ENGINES = [("local", 1), ("zero3", 1), ("zero3", 2)]


def train(name: str) -> list[dict[str, Any]]:
    """All cases, one after the other in the same process."""
    dist.start(toy.CPU)
    results = []
    for case in CASES:
        running = engine_of(name, made(*case))
        results.append({"losses": steps(running, case[-1], STEPS), "weights": toy.pieces(running)})
    return results


@pytest.fixture(scope="module")
def trained() -> dict[tuple[str, int], list[list[dict[str, Any]]]]:
    """(engine, ranks) -> of every rank, the results of all cases."""
    return {(name, world): ranks.run(train, world, {"name": name}) for name, world in ENGINES}


@pytest.mark.parametrize(("name", "world"), ENGINES)
@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_an_engine_trains_a_classifier_as_plain_pytorch_does(trained: Any, case: int, name: str, world: int) -> None:
    """Losses, gradient norms and weights after five steps, against torch's own AdamW with a rate for each group."""
    losses, weights = trained_by_hand(*CASES[case])
    results = [of_rank[case] for of_rank in trained[name, world]]
    for result in results:
        assert torch.tensor(result["losses"]) == pytest.approx(torch.tensor(losses), abs=1e-5)
    assert toy.furthest(weights, toy.whole([result["weights"] for result in results])) < 1e-5


def trained_by_hand(architecture: str, pooling: str, layout: str) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Without an engine: the head learns ten times as fast, biases, norms and the idle block do not decay."""
    classifier = made(architecture, pooling, layout).train()
    settings = OptimizerConfig()
    groups: list[dict[str, Any]] = [
        {
            "params": [weight],
            "lr": RATE * (FACTOR if name.startswith("blocks.") else 1.0),
            "weight_decay": 0.0 if weight.dim() == 1 or name == "blocks.0.weight" else 0.1,
        }
        for name, weight in classifier.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.epsilon)
    seen = []
    for step in range(STEPS):
        slots = [texts(step, number, layout) for number in range(SLOTS)]
        count = sum(len(slot.labels) for slot in slots)
        optimizer.zero_grad()
        total = 0.0
        for slot in slots:
            torch.manual_seed(slot.seed)
            value = loss(classifier(**slot.inputs), slot) / count
            value.backward()
            total += float(value.detach())
        norm = nn.utils.clip_grad_norm_(classifier.parameters(), 0.5)
        optimizer.step()
        seen.append((total, float(norm)))
    return seen, {name: weight.detach().flatten() for name, weight in classifier.named_parameters()}


def train_and_write(folder: str, tokenizer_folder: str) -> list[list[float]]:
    """Three steps, a checkpoint, a model folder; the logits of the engine's own model without dropout."""
    dist.start(toy.CPU)
    classifier = made("bert", "mean", "padded")
    running = engine_of("zero3", classifier)
    steps(running, "padded", 3)
    checkpoint.save(Path(folder) / "checkpoints", running, Progress(3, {}, {}), keep=1)
    kept = checkpoint.newest(Path(folder) / "checkpoints")
    assert kept is not None
    if dist.rank() == 0:
        tree, state = describe(classifier)["hf_config"], checkpoint.weights(kept)
        write_model(
            Path(folder) / "model",
            hf_config=tree,
            head=classifier.head,
            state=state,
            tokenizer_folder=Path(tokenizer_folder),
            facts={},
        )
    slot = texts(9, 3, "padded")
    with running.inference():
        running.begin([slot.signature])
        logits: Tensor = running.forward(slot)
        return logits.tolist()


def test_what_two_ranks_trained_becomes_a_model_that_computes_the_same(tmp_path: Path) -> None:
    tokenizer_folder = tiny.corpus(tmp_path) / "tokenizer"
    expected = ranks.run(train_and_write, 2, {"folder": str(tmp_path), "tokenizer_folder": str(tokenizer_folder)})
    started = start(ClassifierConfig(start=str(tmp_path / "model")))
    with torch.no_grad():
        logits = started.classifier.eval()(**texts(9, 3, "padded").inputs)
    assert started.classifier.head.blocks == BLOCKS
    for found in expected:
        torch.testing.assert_close(logits, torch.tensor(found), atol=1e-6, rtol=1e-6)


def per_text_squares(name: str) -> dict[str, Any]:
    """A Fisher pass over a classifier: one text per slot."""
    dist.start(toy.CPU)
    running = engine_of(name, made("bert", "mean", "padded"))
    slots = [texts(step, 0, "padded") for step in range(4)]
    running.gradients(slots[dist.rank() :: dist.world()], loss, torch.square, dropout=False)
    return toy.pieces(running, lambda shard: shard.gradient)


def test_a_fisher_pass_over_a_classifier_is_that_of_plain_pytorch() -> None:
    """Every parameter, idle blocks included, on one and two ranks."""
    classifier = made("bert", "mean", "padded").eval()
    squares = {name: torch.zeros(weight.numel()) for name, weight in classifier.named_parameters()}
    for step in range(4):
        slot = texts(step, 0, "padded")
        classifier.zero_grad()
        loss(classifier(**slot.inputs), slot).backward()
        for name, weight in classifier.named_parameters():
            assert weight.grad is not None
            squares[name] += weight.grad.flatten().square()
    for name, world in (("local", 1), ("zero3", 2)):
        found = toy.whole(ranks.run(per_text_squares, world, {"name": name}))
        assert found.keys() == squares.keys()
        for key, value in found.items():
            torch.testing.assert_close(value, squares[key], rtol=1e-4, atol=1e-9)
