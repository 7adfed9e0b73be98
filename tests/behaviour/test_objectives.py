"""What a masked language model is asked for beside single tokens: the same on any number of ranks, and after being killed."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM

from scaletrain import checkpoint
from scaletrain.config import decode
from scaletrain.data.collate import Slot
from scaletrain.data.plan import Picks
from scaletrain.data.slots import Dealing
from scaletrain.data.tokenizer import Vocabulary
from scaletrain.model import ClassifierConfig, ModelConfig, TokenIds, build
from scaletrain.recipes import export, pretrain
from scaletrain.recipes.starting import open_start
from scaletrain.tasks.mlm import MaskedLanguageModelling, MlmConfig
from scaletrain.train.metrics import read_jsonl
from tests import ranks, tiny
from tests.behaviour.test_pretrain import joined, run


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def terms(output: Path) -> list[dict[str, float]]:
    """The terms of the loss of every step."""
    return [line["terms"] for line in read_jsonl(output / "metrics.jsonl") if line["kind"] == "step"]


TASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "order, with token types, in padded rows": ({"pair": "sop", "whole_word": True}, {}),
    "next and spans, without types, in one row": (
        {"pair": "nsp", "spans": {}},
        {"architecture": "roberta", "layout": "unpadded"},
    ),
}
"""The task, and changes of the model."""


@pytest.mark.parametrize("name", TASKS)
def test_killed_on_two_ranks_and_resumed_on_three_it_equals_plain_pytorch(prepared: Path, tmp_path: Path, name: str) -> None:
    """The inputs of every slot to the bit, every term of the loss to 1e-5. Three ranks need slots that only fill a round."""
    task, shape = TASKS[name]
    changes: dict[str, Any] = {"steps": 6, "task": task, "checkpoint": {"every_steps": 3}, "model": {**tiny.MODEL, **shape}}
    slots = {"micro_batch_tokens": 100, "slot_multiple": 4}
    changes["data"] = {"corpora": [{"path": str(prepared)}], "chunks_per_step": 40, "slots": slots}
    local = tiny.settings(prepared, tmp_path / "local", engine={"name": "local"}, **changes)
    expected = joined(ranks.run(run, 1, {"tree": local}))
    tree = tiny.settings(prepared, tmp_path / "more", **changes)
    for outcome in ranks.attempt(run, 2, {"tree": tree, "die_after": 4}):
        assert outcome["status"] == f"signal {signal.SIGKILL:d}"
    received = joined(ranks.run(run, 3, {"tree": tree}))
    real = {key: value for key, value in expected.items() if int(key.split("/")[0]) >= 3}
    assert real.items() <= received.items()
    assert len(received) > len(real)
    mine, theirs = terms(tmp_path / "more"), terms(tmp_path / "local")
    assert len(mine) == len(theirs) == 6
    assert mine == [pytest.approx(step, abs=1e-5) for step in theirs]
    assert mine[0].keys() == {"mlm", "pair"}
    (other,) = ranks.attempt(run, 1, {"tree": tree | {"task": {}, "steps": 7}})
    assert (other["type"], other["exit_code"]) == ("CheckpointError", 65)


def evaluated_and_used(tree: dict[str, Any]) -> dict[str, Any]:
    """One rank: a run of one step; its first held-out scores, and what a classifier that starts from it has for an encoder."""
    pretrain.main(decode(pretrain.Config, tree))
    output = Path(tree["output"])
    origin = open_start(ClassifierConfig(start=str(output)))
    states = checkpoint.weights(checkpoint.find(output / "checkpoints")[0])
    encoder = {name.removeprefix("encoder."): weight for name, weight in origin.classifier.named_parameters()}
    same = [torch.equal(weight, states[f"network.bert.{name}"]) for name, weight in encoder.items()]
    scores = [line["scores_hex"] for line in read_jsonl(output / "metrics.jsonl") if line["kind"] == "eval"]
    return {"scores": scores[0], "same": all(same), "parameters": len(same), "heads": [n for n in states if "pair." in n]}


def test_a_run_with_pairs_is_scored_alike_on_any_ranks_and_exported_and_fine_tuned_as_without(
    prepared: Path, tmp_path: Path
) -> None:
    """What plain Transformers loads is the encoder with its language-model head; the pair head is passed over."""
    tree = {"steps": 1, "task": {"pair": "sop"}, "evaluation": {"every_steps": 1, "chunks_per_pass": 40}}
    one, two = [ranks.run(evaluated_and_used, n, {"tree": tiny.settings(prepared, tmp_path / f"{n}", **tree)})[0] for n in (1, 2)]
    assert one["scores"] == two["scores"]
    assert one["scores"].keys() == {"loss", "perplexity", "accuracy", "pair_loss", "pair_accuracy"}
    assert float.fromhex(one["scores"]["pair_loss"]) == pytest.approx(math.log(2), abs=0.05)
    assert one["same"] and one["parameters"] > 20 and len(one["heads"]) == 4
    export.main(export.Config(run=tmp_path / "1", output=tmp_path / "exported"))
    network: Any = AutoModelForMaskedLM.from_pretrained(str(tmp_path / "exported"))
    assert not [name for name in network.state_dict() if "pair" in name]


DRAW = np.random.default_rng(0)
TEXTS = {
    "sop": [np.sort(DRAW.choice(np.arange(10, 70), 15, replace=False)).astype(np.int32) for _ in range(40)],
    "nsp": [DRAW.integers(10, 20, 15).astype(np.int32) + 10 * (number % 6) for number in range(40)],
}
"""Numbers that rise; and texts on one of six subjects each, with a vocabulary of its own."""


@pytest.mark.parametrize(("kind", "steps", "least"), [("sop", 120, 0.9), ("nsp", 240, 0.75)])
def test_a_tiny_model_learns_to_answer(kind: Any, steps: int, least: float) -> None:
    """Chance is 0.5, and the best that can be told of six subjects is 0.92: a sixth of the strange parts is on the same one."""
    special, starts = np.arange(5), np.ones(70, np.bool_)
    vocabulary = Vocabulary(size=70, digest="v", cls=2, sep=3, pad=0, mask=4, special=special, starts_word=starts)
    config = ModelConfig(architecture="bert", layers=1, hidden=32, heads=2, max_positions=20, dropout=0.0)
    network = build(config, TokenIds(vocab_size=70, pad=0, mask=4, begin=2, end=3), seed=1, pair=True)
    task = MaskedLanguageModelling(MlmConfig(pair=kind), vocabulary, Dealing(800, 1, 1, "padded"), ["text"], 1, True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)

    def slot(corpus_pass: int) -> Slot:
        chunks = np.arange(len(TEXTS[kind]))
        samples = Picks(np.zeros_like(chunks, np.int16), np.full_like(chunks, corpus_pass), chunks * 100)
        return task.collate(corpus_pass, 0, samples, TEXTS[kind])

    for step in range(steps):
        seen = slot(step)
        terms = task.terms(network(**seen.inputs), seen)
        sum(task.weights[name] * term / seen.counts[name] for name, term in terms.items()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        tables = [task.score(network(**each.inputs), each) for each in map(slot, range(1000, 1010))]
    assert task.summary(np.concatenate(tables))["pair_accuracy"] > least
