"""From a ZeRO-3 run to a folder: plain Transformers computes from raw text what the partitioned model computed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer

import scaletrain.export as exporting
from scaletrain import checkpoint, dist, model
from scaletrain.config import decode
from scaletrain.errors import CheckpointError
from scaletrain.recipes import export, pretrain
from tests import ranks, tiny

pytestmark = pytest.mark.timeout(400)  # all runs are made in the set-up of the first test

ARCHITECTURES = ["bert", "roberta", "modernbert", "distilbert", "deberta-v2", "deberta-v3"]
TEXTS = [
    "The with statement wraps a block in the methods of a context manager.",
    "Names refer to objects: see [MASK] below.",
    "Naïve?",
]
STEPS = 2


def train(trees: list[dict[str, Any]]) -> None:
    """One rank of several runs; what the model under ZeRO-3 computes for TEXTS is left beside every checkpoint."""
    save = pretrain.Run.save

    def recorded(self: pretrain.Run, step: int) -> None:
        save(self, step)
        output = self._config.output
        tokenizer: Any = AutoTokenizer.from_pretrained(output / "tokenizer")
        with self.engine.inference():
            logits = [self.engine.module(tokenizer(text, return_tensors="pt")["input_ids"]) for text in TEXTS]
        if dist.rank() == 0:
            save_file({str(number): one.contiguous() for number, one in enumerate(logits)}, output / f"logits-{step}.safetensors")

    pretrain.Run.save = recorded  # type: ignore[method-assign]  # in a process of its own
    # DeepSpeed remembers its groups for the life of a process: all runs are in the one that the first has joined.
    dist.start(torch.device("cpu"))
    dist.start, dist.stop = (lambda *_: dist.place()), (lambda: None)
    for tree in trees:
        pretrain.main(decode(pretrain.Config, tree))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of every architecture, each with the checkpoints of two steps."""
    prepared, folder = tiny.corpus(tmp_path_factory.mktemp("corpus")), tmp_path_factory.mktemp("runs")
    trees = [
        tiny.settings(
            prepared,
            folder / architecture,
            steps=STEPS,
            model={**tiny.MODEL, "architecture": architecture},
            schedule={"name": "linear", "final_ratio": 0.5},  # by default the last step has the rate 0
            checkpoint={"every_steps": 1, "keep": 2},
        )
        for architecture in ARCHITECTURES
    ]
    ranks.run(train, 2, {"trees": trees}, timeout_s=170.0)
    return folder


def recorded(run: Path, step: int = STEPS) -> list[Tensor]:
    """What the model computed for TEXTS after ``step`` steps, while it was partitioned over two ranks."""
    found = load_file(run / f"logits-{step}.safetensors")
    return [found[str(number)] for number in range(len(TEXTS))]


def furthest(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Largest absolute difference between logits of the same texts."""
    assert [one.shape for one in left] == [one.shape for one in right]
    return max(float((one - other).abs().max()) for one, other in zip(left, right, strict=True))


def write(run: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return export.main(decode(export.Config, {"run": str(run), "output": str(output), "probe_texts": TEXTS, **changes}))


def reload_here(folder: Path, claim: exporting.proof.Claim) -> list[Tensor]:
    """What the export's own process does, without the seconds that it takes to start one for every folder."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    network: Any = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    encoded = [tokenizer(text, return_tensors="pt", truncation=True, max_length=claim.max_positions) for text in claim.texts]
    with torch.no_grad():
        return [network(**one).logits[0] for one in encoded]


PLAIN = """
import sys
from safetensors.torch import save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

answer, texts, *folders = sys.argv[1:]
logits = {}
for folder in folders:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder)
    for number, text in enumerate(texts.split("|")):
        logits[f"{folder} {number}"] = model(**tokenizer(text, return_tensors="pt")).logits[0].detach().contiguous()
assert not [name for name in sys.modules if name.split(".")[0] in ("scaletrain", "deepspeed")]
save_file(logits, answer)
"""


def plain(folders: Sequence[Path], answer: Path) -> list[list[Tensor]]:
    """Logits of TEXTS from each folder, by one process that imports Transformers and knows nothing of scaletrain."""
    command = [sys.executable, "-P", "-c", PLAIN, str(answer), "|".join(TEXTS), *map(str, folders)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, env=environment, cwd=answer.parent, check=True)
    found = load_file(answer)
    return [[found[f"{folder} {number}"] for number in range(len(TEXTS))] for folder in folders]


@pytest.fixture(scope="module")
def exported(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Tensor], dict[str, Any]]]:
    """Architecture -> logits by plain Transformers, and what the export reported."""
    folder = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting.proof, "reload", reload_here)
        reports = [write(runs / architecture, folder / architecture) for architecture in ARCHITECTURES]
    logits = plain([folder / architecture for architecture in ARCHITECTURES], folder / "answer")
    return dict(zip(ARCHITECTURES, zip(logits, reports, strict=True), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_transformers_computes_the_logits_of_the_partitioned_model(runs: Path, exported: Any, architecture: str) -> None:
    """From raw text, to 1e-5 of those recorded under ZeRO-3 before there was an export."""
    logits, _ = exported[architecture]
    assert furthest(logits, recorded(runs / architecture)) <= 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_rebuilt_from_the_checkpoint_computes_them_too(runs: Path, architecture: str) -> None:
    last = checkpoint.find(runs / architecture / "checkpoints")[0]
    rebuilt = model.rebuild(last.progress.fixed["hf_config"], checkpoint.weights(last)).eval()
    logits = exporting.probe_logits(rebuilt, runs / architecture / "tokenizer", TEXTS)
    assert furthest(logits, recorded(runs / architecture)) <= 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_report_says_how_close_the_reloaded_folder_came(exported: Any, architecture: str) -> None:
    _, report = exported[architecture]
    assert 0.0 <= report["max_abs_diff"] <= 1e-5
    assert (report["step"], report["probe_texts"]) == (STEPS, len(TEXTS))
    assert Path(report["folder"]).name == architecture


def test_training_moved_the_logits_far_beyond_the_tolerance(runs: Path) -> None:
    """Otherwise the export of an untrained model would pass for that of a trained one."""
    for architecture in ARCHITECTURES:
        assert furthest(recorded(runs / architecture, STEPS - 1), recorded(runs / architecture)) > 1e-3


def test_another_step_can_be_chosen_and_replaces_the_export_before(runs: Path, tmp_path: Path) -> None:
    """The newest, then an earlier one over it, each proven by the export's own process; nothing else is left behind."""
    newest = write(runs / "bert", tmp_path / "model")
    earlier = write(runs / "bert", tmp_path / "model", step=STEPS - 1)
    assert (newest["step"], earlier["step"]) == (STEPS, STEPS - 1)
    [logits] = plain([tmp_path / "model"], tmp_path / "answer")
    assert furthest(logits, recorded(runs / "bert", STEPS - 1)) <= 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer", "model"]


def test_a_step_without_a_checkpoint_is_refused_with_those_there_are(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step: got 7; .* has checkpoints of the steps \[1, 2\]"):
        write(runs / "bert", tmp_path / "model", step=7)
    assert list(tmp_path.iterdir()) == []
