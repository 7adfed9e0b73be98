"""A checkpoint of DeepSpeed's own becomes a folder to start from: bit for bit, on permission only, and not in this process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

from scaletrain import cli, dist
from scaletrain.data.tokenizer import WordPieceConfig, train
from scaletrain.model import ClassifierConfig, start
from tests import ranks, streams

TIMEOUT_S = 100.0
SIZES = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a masked model with its tokenizer, of other weights than those that are saved."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("like")
    train(WordPieceConfig(vocab_size=300), lambda: [" ".join(streams.WORDS)] * 3, max_tokens=38).save_pretrained(folder)
    torch.manual_seed(1)
    BertForMaskedLM(BertConfig(vocab_size=300, max_position_embeddings=40, **SIZES)).save_pretrained(folder)
    return folder


def save(folder: str, like: str, stage: int) -> None:
    """Trains a step with DeepSpeed alone, saves its checkpoint, and beside it the weights as they are in its optimizer."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    dist.start(torch.device("cpu"))
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for longer than the test may take
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False)
    model = AutoModelForMaskedLM.from_pretrained(like)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    ids = torch.arange(10 + dist.rank(), 20 + dist.rank())[None]
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.save_checkpoint(folder, tag="step-1")
    whole = {name: safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}
    if dist.rank() == 0:
        save_file({name: value.detach().clone() for name, value in whole.items()}, Path(folder, "expected.safetensors"))
    dist.barrier()


def saved(folder: Path, like: Path, stage: int, world: int) -> Path:
    ranks.run(save, world, {"folder": str(folder), "like": str(like), "stage": stage}, timeout_s=TIMEOUT_S)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, like: Path) -> Path:
    """Of two ranks under ZeRO-3."""
    return saved(tmp_path_factory.mktemp("saved"), like, 3, 2)


def ended(*argv: str) -> tuple[int, str, str]:
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main(["import-deepspeed", *argv])
    return code, out.getvalue(), errors.getvalue()


def imported(checkpoint: Path, like: Path, output: Path, *more: str) -> tuple[int, str, str]:
    with pytest.warns(UserWarning, match="is unpickled: what its writer put there runs now"):
        return ended(str(checkpoint), f"like={like}", f"output={output}", "--trust", *more)


def expect_same(checkpoint: Path, output: Path) -> None:
    expected, found = load_file(checkpoint / "expected.safetensors"), load_file(output / "model.safetensors")
    assert expected.keys() <= found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_two_ranks_saved_is_imported_to_the_bit(checkpoint: Path, like: Path, tmp_path: Path) -> None:
    """And is what `pretrain` and `finetune` start from."""
    code, out, errors = imported(checkpoint, like, tmp_path / "model")
    assert code == 0, errors
    report = json.loads(out)
    assert (report["folder"], report["not_in_checkpoint"]) == (str(tmp_path / "model"), [])
    expect_same(checkpoint, tmp_path / "model")
    before, after = (load_file(folder / "model.safetensors") for folder in (like, tmp_path / "model"))
    name = "cls.predictions.bias"
    assert not torch.equal(before[name], after[name])
    encoder = start(ClassifierConfig(start=str(tmp_path / "model"))).classifier.state_dict()
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(encoder[f"encoder.{name}"], after[f"bert.{name}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(("stage", "world"), [(2, 2)])
def test_so_is_what_another_stage_saved(like: Path, tmp_path: Path, stage: int, world: int) -> None:
    folder = saved(tmp_path / "saved", like, stage, world)
    code, _, errors = imported(folder, like, tmp_path / "model", "tag=step-1")
    assert code == 0, errors
    expect_same(folder, tmp_path / "model")


class Canary:
    """When it is loaded it writes down the environment, and where it is."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        import subprocess

        return subprocess.call, (["sh", "-c", f"env > {self._file}; pwd >> {self._file}"],)


@pytest.fixture
def poisoned(checkpoint: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "poisoned"))
    for file in folder.rglob("*model_states.pt"):
        file.write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    return folder


def test_without_the_permission_nothing_is_unpickled(poisoned: Path, like: Path, tmp_path: Path) -> None:
    code, _, errors = ended(str(poisoned), f"like={like}", f"output={tmp_path / 'model'}")
    assert code == 65 and "reading it runs whatever its writer put into it" in errors and "--trust" in errors
    assert not (tmp_path / "canary").exists() and not (tmp_path / "model").exists()


def test_with_it_the_secrets_of_the_environment_stay_here(
    poisoned: Path, like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The canary shows what a checkpoint can do, and what it does not get to see."""
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "canary-9f3c1d")
    code, _, errors = imported(poisoned, like, tmp_path / "model")
    assert code == 65 and "DeepSpeed must be able to read it" in errors
    told = (tmp_path / "canary").read_text()
    assert "canary-9f3c1d" not in told and os.getcwd() not in told.splitlines() and "room" in told
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["prefix=model."], "every weight's name must start with it"),
        (["tag=../x"], "must be the name of a folder in the checkpoint"),
    ],
)
def test_what_does_not_fit_is_named(checkpoint: Path, like: Path, tmp_path: Path, more: list[str], said: str) -> None:
    code, _, errors = ended(str(checkpoint), f"like={like}", f"output={tmp_path / 'model'}", "--trust", *more)
    assert code == 65 and said in errors
    assert not (tmp_path / "model").exists()
