"""A classifier in a folder: plain Transformers and one linear layer compute from raw text what it computes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from scaletrain import model
from scaletrain.errors import ScaletrainError
from scaletrain.model import Block, ClassifierConfig
from scaletrain.recipes.starting import open_start
from tests import streams
from tests.behaviour.test_finetune import LOCAL, here, training
from tests.behaviour.test_predict import FRUIT, TOOLS, two_blocks, write, write_here, write_model


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return streams.encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="module")
def done(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning run that has ended."""
    folder = tmp_path_factory.mktemp("done")
    task = streams.task(folder / "data", "fruit")
    here(streams.finetuning(encoder, folder / "run", task, compute=LOCAL, training=training(epochs=0.5)))
    return folder / "run"


PLAIN = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

answer, text, *folders = sys.argv[1:]
logits = {}
for folder in folders:
    spec = json.loads(Path(folder, "classifier.json").read_text())
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    head = load_file(Path(folder, "classifier.safetensors"))
    with torch.no_grad():
        output = encoder(**tokenizer(text, return_tensors="pt"))
        mean, first = output.last_hidden_state.mean(1), output.last_hidden_state[:, 0]
        pooled = mean if spec["pooling"] == "mean" else output.pooler_output if spec["pooler"] else first
        logits[folder] = torch.nn.functional.linear(pooled, head["weight"], head["bias"])[0]
assert not [name for name in sys.modules if name.split(".")[0] in ("scaletrain", "deepspeed")]
save_file(logits, answer)
"""


@pytest.fixture(scope="module")
def two_tasks(done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_blocks(done, tmp_path_factory.mktemp("two") / "model")


@pytest.fixture(scope="module")
def classifiers(done: Path, two_tasks: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What can be exported: one block and several, mean and first pooling, with and without a pooler, and with token types."""
    folder = tmp_path_factory.mktemp("classifiers")
    found = {"run": done, "several blocks": two_tasks}
    with pytest.warns(UserWarning, match="has no pooler"):
        pooled = open_start(ClassifierConfig(start=str(encoder), pooling="first"), seed=3).classifier
    shutil.copytree(encoder, folder / "plain")
    sizes: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 2, "max_positions": 40}
    network: Any = model.build(model.ModelConfig(architecture="distilbert", **sizes), encoder, seed=3).network
    network.base_model.save_pretrained(folder / "plain")
    bare = open_start(ClassifierConfig(start=str(folder / "plain"), pooling="first")).classifier
    for name, classifier in (("first, through a pooler", pooled), ("first, bare", bare)):
        for block in (Block("fruit", tuple(FRUIT)), Block("tools", tuple(TOOLS))):
            model.grow(classifier, block, seed=5)
        with torch.no_grad():
            for linear in classifier.blocks:
                weight, bias = linear.parameters()
                weight.mul_(30)
                bias.add_(0.5)
        found[name] = write_model(classifier, encoder, folder / name)
    return found


def test_plain_transformers_computes_what_the_classifiers_compute(classifiers: dict[str, Path], tmp_path: Path) -> None:
    """From raw text, in a process that knows nothing of us."""
    text, ours, folders = "bada gubou mame tiatu", {}, {}
    for name, source in classifiers.items():
        origin = open_start(ClassifierConfig(start=str(source)))
        tokenizer: Any = AutoTokenizer.from_pretrained(origin.tokenizer_folder)
        with torch.no_grad():
            ours[name] = origin.classifier.eval()(tokenizer(text, return_tensors="pt")["input_ids"])[0]
        folders[name] = tmp_path / name
        report = write_here(source, folders[name])
        assert report["max_abs_diff"] < 1e-5
        labels = [label for block in origin.classifier.head.blocks for label in block.labels]
        assert report["labels"] == len(labels)
        spec = json.loads((folders[name] / "classifier.json").read_text())
        assert spec["labels"] == labels
        assert spec["tasks"] == ["fruit"] * 3 + ["tools"] * (len(labels) - 3)
    command = [sys.executable, "-P", "-c", PLAIN, str(tmp_path / "answer"), text, *map(str, folders.values())]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    found = load_file(tmp_path / "answer")
    for name, logits in ours.items():
        torch.testing.assert_close(found[str(folders[name])], logits, rtol=0, atol=1e-5)
        assert float(logits.std()) > 0.02


def test_an_export_is_proven_in_a_process_of_its_own(two_tasks: Path, tmp_path: Path) -> None:
    report = write(two_tasks, tmp_path / "exported")
    assert 0.0 <= report["max_abs_diff"] < 1e-5
    assert (report["labels"], report["probe_texts"]) == (5, 3)


def test_an_export_that_computes_something_else_does_not_count(done: Path, tmp_path: Path) -> None:
    with pytest.raises(ScaletrainError, match="logits of probe text 0 differ by"):
        write_here(done, tmp_path / "exported", error=1e-4)
    assert list(tmp_path.iterdir()) == []


def test_in_bfloat16_the_rounded_weights_are_proven(done: Path, tmp_path: Path) -> None:
    assert write_here(done, tmp_path / "exported", dtype="bfloat16")["max_abs_diff"] < 1e-5
    assert {value.dtype for value in load_file(tmp_path / "exported" / "model.safetensors").values()} == {torch.bfloat16}
    assert load_file(tmp_path / "exported" / "classifier.safetensors")["weight"].dtype == torch.bfloat16
