"""Exports: what plain Transformers computes from the folder, which places are refused, and what an error leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

import scaletrain.export as exporting
from scaletrain.errors import InputError, ModelError, ScaletrainError, StorageError, TokenizerError
from scaletrain.export import MARKER, export, fill_masks
from scaletrain.model import MaskedLanguageModel, ModelConfig, build, describe

ARCHITECTURES = ["bert", "roberta", "modernbert", "distilbert", "deberta-v2", "deberta-v3"]
TEXTS = ["The quick brown fox jumps over the lazy dog.", "A tokenizer, a model and a mask: what else is there?", "Fox!"]


def train_tokenizer(folder: Path) -> Path:
    """A small WordPiece tokenizer folder whose ids [PAD] and [MASK] are 0 and 4."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(TEXTS * 3, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    ends = [("[CLS]", tokenizer.token_to_id("[CLS]")), ("[SEP]", tokenizer.token_to_id("[SEP]"))]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", ends)
    names = dict(zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def trained(tokenizer_folder: Path, architecture: str = "bert") -> MaskedLanguageModel:
    """A model none of whose weights has the value that a new model gives it: a weight that is not exported shows."""
    config: Any = {"architecture": architecture, "layers": 2, "hidden": 32, "heads": 2, "max_positions": 24}
    model = build(ModelConfig(**config), tokenizer_folder, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return model


def weights(model: MaskedLanguageModel) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def run(model: MaskedLanguageModel, tokenizer_folder: Path, output: Path, **settings: Any) -> exporting.ExportReport:
    hf_config = json.loads(json.dumps(describe(model)["hf_config"]))  # as it comes back from a checkpoint's manifest
    return export(weights(model), hf_config, tokenizer_folder, output, **{"probe_texts": TEXTS, **settings})


def reload_here(folder: Path, claim: exporting.proof.Claim) -> list[Tensor]:
    """What `reload` does, without the seconds that a process of its own takes."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    network: Any = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    encoded = [tokenizer(text, return_tensors="pt", truncation=True, max_length=claim.max_positions) for text in claim.texts]
    with torch.no_grad():
        return [network(**one).logits[0] for one in encoded]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """For claims that are not about the process that reloads."""
    monkeypatch.setattr(exporting.proof, "reload", reload_here)


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
assert not [name for name in sys.modules if name.startswith("scaletrain")]
save_file(logits, answer)
"""


def test_plain_transformers_computes_the_recorded_logits_from_raw_text(
    tokenizer_folder: Path, tmp_path: Path, in_process: None
) -> None:
    """Every architecture, in one process that imports only Transformers and is given only the folders and the texts."""
    recorded: dict[str, Tensor] = {}
    for architecture in ARCHITECTURES:
        model = trained(tokenizer_folder, architecture)
        logits = exporting.probe_logits(model, tokenizer_folder, TEXTS)
        recorded |= {f"{tmp_path / architecture} {number}": one for number, one in enumerate(logits)}
        run(model, tokenizer_folder, tmp_path / architecture)
    folders = [str(tmp_path / architecture) for architecture in ARCHITECTURES]
    command = [sys.executable, "-P", "-c", PLAIN, str(tmp_path / "answer"), "|".join(TEXTS), *folders]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    reloaded = load_file(tmp_path / "answer")
    differences = {key: float((recorded[key] - reloaded[key]).abs().max()) for key in recorded}
    assert {key: value for key, value in differences.items() if not value <= 1e-5} == {}
    assert len(differences) == len(ARCHITECTURES) * len(TEXTS)


def test_the_exporter_reloads_in_a_process_of_its_own(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its report has the largest difference, the folder the marker, nothing else is left beside it; the path is relative."""
    monkeypatch.chdir(tmp_path)
    model = trained(tokenizer_folder, "deberta-v3")
    report = run(model, tokenizer_folder, Path("out"), source={"step": 10})
    marker = json.loads((tmp_path / "out" / MARKER).read_text())
    assert report.max_abs_diff <= 1e-5
    assert marker == {"format": "scaletrain-export", "version": 1, "max_abs_diff": report.max_abs_diff, "source": {"step": 10}}
    assert report.bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_does_not_load_exports_nothing(tokenizer_folder: Path, tmp_path: Path) -> None:
    """The error carries what the other process said."""
    model = trained(tokenizer_folder)
    write = exporting.masked._write

    def write_without_a_config(*arguments: Any) -> None:
        write(*arguments)
        (arguments[2] / "config.json").write_text("{}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting.masked, "_write", write_without_a_config)
        with pytest.raises(ScaletrainError, match=r"(?s)does not load in a process of its own \(exit 1\).*Unrecognized model"):
            run(model, tokenizer_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_long_text_is_cut_where_the_model_ends(tokenizer_folder: Path, tmp_path: Path, in_process: None) -> None:
    """Plain Transformers reads the limit from the exported tokenizer."""
    report = run(trained(tokenizer_folder, "roberta"), tokenizer_folder, tmp_path / "out", probe_texts=[" ".join(TEXTS * 5)])
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (saved["model_max_length"], report.max_abs_diff <= 1e-5) == (24, True)


def test_bfloat16_weights_reload_as_the_rounded_ones(tokenizer_folder: Path, tmp_path: Path, in_process: None) -> None:
    """Half the bytes; the logits compared are those of the rounded weights."""
    model = trained(tokenizer_folder)
    report = run(model, tokenizer_folder, tmp_path / "out", dtype="bfloat16")
    network: Any = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert network.dtype == torch.bfloat16
    assert report.max_abs_diff <= 1e-5
    expected = model.network.get_input_embeddings().weight.bfloat16()
    assert torch.equal(network.get_input_embeddings().weight, expected)


def test_an_export_of_ours_is_replaced_by_the_next(tokenizer_folder: Path, tmp_path: Path, in_process: None) -> None:
    """And the folder says which checkpoint it is from."""
    model = trained(tokenizer_folder)
    run(model, tokenizer_folder, tmp_path / "out", source={"step": 10})
    run(model, tokenizer_folder, tmp_path / "out", source={"step": 20})
    assert json.loads((tmp_path / "out" / MARKER).read_text())["source"] == {"step": 20}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_somebody_else_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Exit code 65, and the folder keeps what it had."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("all of it")
    with pytest.raises(InputError, match="no export of scaletrain wrote"):
        run(trained(tokenizer_folder), tokenizer_folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_reload_that_differs_exports_nothing(
    tokenizer_folder: Path, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One written weight is off by 0.01: the older export stays, nothing lies about."""
    model = trained(tokenizer_folder)
    run(model, tokenizer_folder, tmp_path / "out", source={"step": 10})
    write = exporting.masked._write

    def write_another(damaged: MaskedLanguageModel, *rest: Any) -> None:
        with torch.no_grad():
            damaged.network.get_output_embeddings().bias[7] += 0.01  # type: ignore[no-untyped-call]
        write(damaged, *rest)

    monkeypatch.setattr(exporting.masked, "_write", write_another)
    with pytest.raises(ScaletrainError, match=r"differ by 0\.0\d+ after reloading"):
        run(model, tokenizer_folder, tmp_path / "out", source={"step": 20})
    assert json.loads((tmp_path / "out" / MARKER).read_text())["source"] == {"step": 10}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_that_are_not_numbers_are_not_exported(tokenizer_folder: Path, tmp_path: Path, in_process: None) -> None:
    """A difference of NaN is no small difference."""
    model = trained(tokenizer_folder)
    with torch.no_grad():
        next(model.parameters())[5] = torch.nan
    with pytest.raises(ScaletrainError, match="differ by nan"):
        run(model, tokenizer_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_model_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    """The error names the first parameter that only one of the two has, or that has another shape."""
    model = trained(tokenizer_folder)
    state, hf_config = weights(model), describe(model)["hf_config"]
    lost = state.pop("network.bert.embeddings.LayerNorm.weight")
    with pytest.raises(ModelError, match=r"'network\.bert\.embeddings\.LayerNorm\.weight'"):
        export(state, hf_config, tokenizer_folder, tmp_path / "out", probe_texts=TEXTS)
    state["network.bert.embeddings.LayerNorm.weight"] = lost[:5]
    with pytest.raises(ModelError, match=r"got \(5,\); must be \(32,\)"):
        export(state, hf_config, tokenizer_folder, tmp_path / "out", probe_texts=TEXTS)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Its last ids would have no embedding."""
    model = trained(tokenizer_folder)
    larger = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    larger.add_tokens(["platypus"])
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(TokenizerError, match="the model has embeddings for"):
        run(model, tmp_path / "larger", tmp_path / "out")


def test_an_export_needs_a_probe_text(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Without one nothing would be compared."""
    with pytest.raises(InputError, match="probe_texts"):
        run(trained(tokenizer_folder), tokenizer_folder, tmp_path / "out", probe_texts=[])


def test_a_disk_that_refuses_is_a_storage_error(
    tokenizer_folder: Path, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 74, and no partial folder is left."""

    def full(_path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting.proof.durable, "sync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        run(trained(tokenizer_folder), tokenizer_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_output_under_a_file_is_a_storage_error(tokenizer_folder: Path, tmp_path: Path) -> None:
    """The parent cannot be made."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        run(trained(tokenizer_folder), tokenizer_folder, tmp_path / "file" / "out")


def test_the_exported_folder_is_private(tokenizer_folder: Path, tmp_path: Path, in_process: None) -> None:
    """Whom else it is for, its owner says with chmod."""
    run(trained(tokenizer_folder), tokenizer_folder, tmp_path / "out")
    assert os.stat(tmp_path / "out").st_mode & 0o777 == 0o700


def test_fill_masks_gives_one_entry_per_mask(tokenizer_folder: Path, tmp_path: Path, in_process: None) -> None:
    """In order, the most probable token first; a model whose output bias favours one token fills it in."""
    model = trained(tokenizer_folder)
    fox = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).convert_tokens_to_ids("fox")
    with torch.no_grad():
        model.network.get_output_embeddings().bias[fox] += 50.0  # type: ignore[no-untyped-call]
    run(model, tokenizer_folder, tmp_path / "out")
    filled = fill_masks(tmp_path / "out", ["The quick [MASK] jumps over the [MASK].", "A [MASK]!"], top_k=3)
    assert [entry.text for entry in filled] == ["The quick [MASK] jumps over the [MASK]."] * 2 + ["A [MASK]!"]
    assert [entry.guesses[0][0] for entry in filled] == ["fox"] * 3
    assert all(len(entry.guesses) == 3 and entry.guesses[0][1] > 0.99 for entry in filled)
