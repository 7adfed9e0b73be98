"""Every architecture, through the whole recipe: under ZeRO-3 on two ranks it trains as plain PyTorch does in one process."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scaletrain import checkpoint, dist, model
from scaletrain.checkpoint import Checkpoint
from scaletrain.config import decode
from scaletrain.engine import Engine
from scaletrain.model import MaskedLanguageModel
from scaletrain.recipes import pretrain
from scaletrain.train.metrics import read_jsonl
from tests import ranks, tiny

pytestmark = pytest.mark.timeout(400)  # all runs are made in the set-up of the first test

ARCHITECTURES = ["bert", "roberta", "modernbert", "distilbert", "deberta-v2", "deberta-v3"]
UNPADDED = ["bert", "modernbert"]
STEPS = 3


def settings(
    prepared: Path, output: Path, architecture: str, engine: str, layout: str = "padded", dropout: float = 0.1
) -> dict[str, Any]:
    """The tree of a run of three steps, in which ModernBERT's window is shorter than most documents."""
    extra = {"local_attention": 8} if architecture == "modernbert" else {}
    encoder = {**tiny.MODEL, "architecture": architecture, "layout": layout, "dropout": dropout, "extra": extra}
    engines = {"local": {"name": "local"}, "zero3": {"name": "zero3", "persistence_threshold": 1000}}
    rates = {"name": "linear", "final_ratio": 0.5}  # by default the last step has the rate 0
    return tiny.settings(prepared, output, steps=STEPS, model=encoder, engine=engines[engine], schedule=rates)


def train(trees: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """One rank of several runs, one after the other in the same process; of every slot of each, what the head was given to do."""
    seen: list[list[dict[str, Any]]] = []
    head_rows: set[int] = set()
    build, forward = model.build, Engine.forward

    def watched(*arguments: Any, **named: Any) -> MaskedLanguageModel:
        built = build(*arguments, **named)
        encoder = set(built.network.base_model.modules())
        for module in built.network.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm) and module not in encoder:
                module.register_forward_hook(lambda _module, inputs, _output: head_rows.add(inputs[0].shape[:-1].numel()))
        return built

    def recorded(self: Engine, slot: Any) -> Any:
        head_rows.clear()
        logits = forward(self, slot)
        facts = {"head rows": sorted(head_rows), "masked": slot.counts["mlm"], "places": slot.padded_tokens}
        seen[-1].append({**facts, "vocabulary": logits.shape[-1]})
        return logits

    model.build, Engine.forward = watched, recorded  # type: ignore[assignment,method-assign]  # in a process of its own
    # DeepSpeed remembers its groups for the life of a process: all runs are in the one that the first has joined.
    dist.start(torch.device("cpu"))
    dist.start, dist.stop = (lambda *_: dist.place()), (lambda: None)
    for tree in trees:
        seen.append([])
        pretrain.main(decode(pretrain.Config, tree))
    return seen


class Runs:
    """The folders of all runs, trained in as few processes as there are world sizes."""

    def __init__(self, prepared: Path, folder: Path) -> None:
        self._folder = folder
        both = [(architecture, "padded", 0.1) for architecture in ARCHITECTURES]
        both += [(architecture, "unpadded", 0.1) for architecture in UNPADDED]
        no_dropout = [(architecture, layout, 0.0) for architecture in UNPADDED for layout in ("padded", "unpadded")]
        self.seen: dict[Path, list[dict[str, Any]]] = {}
        for engine, world, cases in (("local", 1, both), ("zero3", 2, both + no_dropout)):
            outputs = [self.output(architecture, engine, layout, dropout) for architecture, layout, dropout in cases]
            trees = [
                settings(prepared, output, architecture, engine, layout, dropout)
                for output, (architecture, layout, dropout) in zip(outputs, cases, strict=True)
            ]
            results = ranks.run(train, world, {"trees": trees}, timeout_s=170.0)
            self.seen |= {output: list(chain(*of_ranks)) for output, *of_ranks in zip(outputs, *results, strict=True)}

    def output(self, architecture: str, engine: str, layout: str = "padded", dropout: float = 0.1) -> Path:
        return self._folder / f"{architecture}-{engine}-{layout}-{dropout}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny.corpus(tmp_path_factory.mktemp("corpus")), tmp_path_factory.mktemp("runs"))


def losses(output: Path) -> torch.Tensor:
    """Loss of every step."""
    found = [float.fromhex(line["loss_hex"]) for line in read_jsonl(output / "metrics.jsonl") if line["kind"] == "step"]
    assert len(found) == STEPS
    return torch.tensor(found, dtype=torch.float64)


def saved(output: Path) -> Checkpoint:
    return checkpoint.find(output / "checkpoints")[0]


def assert_same(left: Path, right: Path) -> None:
    """Losses of all steps and every weight after the last one, to 1e-5."""
    torch.testing.assert_close(losses(left), losses(right), rtol=0, atol=1e-5)
    mine, theirs = checkpoint.weights(saved(left)), checkpoint.weights(saved(right))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_zero3_on_two_ranks_equals_plain_pytorch(runs: Runs, architecture: str) -> None:
    """Dropout 0.1, losses and all weights to 1e-5; the loss moves, or equality would say little."""
    left, right = runs.output(architecture, "zero3"), runs.output(architecture, "local")
    assert_same(left, right)
    assert (losses(right).diff().abs() > 1e-3).all()


@pytest.mark.parametrize("architecture", UNPADDED)
def test_zero3_equals_plain_pytorch_without_padding(runs: Runs, architecture: str) -> None:
    assert_same(runs.output(architecture, "zero3", "unpadded"), runs.output(architecture, "local", "unpadded"))


@pytest.mark.parametrize("architecture", UNPADDED)
def test_the_unpadded_layout_has_the_loss_of_the_padded_one(runs: Runs, architecture: str) -> None:
    """Without dropout: slots hold other sets of chunks, but what a step learns from is the same."""
    padded, unpadded = (runs.output(architecture, "zero3", layout, 0.0) for layout in ("padded", "unpadded"))
    assert_same(padded, unpadded)
    places = [sum(slot["places"] for slot in runs.seen[output]) for output in (padded, unpadded)]
    assert places[0] > places[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_predicts_the_masked_tokens_and_no_others(runs: Runs, architecture: str) -> None:
    """Every module of the head, in every slot on both ranks; a plain head would run at all places."""
    slots = runs.seen[runs.output(architecture, "zero3")]
    assert len(slots) >= 4 * STEPS
    assert [slot["head rows"] for slot in slots] == [[slot["masked"]] for slot in slots]
    assert sum(slot["masked"] for slot in slots) < 0.4 * sum(slot["places"] for slot in slots)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_is_tied_to_the_embedding(runs: Runs, architecture: str) -> None:
    """Of all parameters one alone has a row per token: the embedding, which the head then must use."""
    output = runs.output(architecture, "zero3")
    vocabulary = runs.seen[output][0]["vocabulary"]
    shapes = {name: facts["shape"] for name, facts in saved(output).manifest["parameters"].items()}
    matrices = [name for name, shape in shapes.items() if len(shape) == 2 and vocabulary in shape]
    assert len(matrices) == 1
    assert matrices[0].endswith(("embeddings.word_embeddings.weight", "embeddings.tok_embeddings.weight"))
