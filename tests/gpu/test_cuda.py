"""On a GPU: ZeRO-3 is plain PyTorch there too, and the variable-length kernel computes the attention of padded rows.

Runs are processes of their own: a process that has used CUDA cannot be forked.
"""

from __future__ import annotations

import subprocess
import sys
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from scaletrain import checkpoint
from scaletrain.model import MaskedLanguageModel, ModelConfig, TokenIds, attention, build
from scaletrain.train.metrics import read_jsonl
from tests import tiny

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda"
LENGTHS = (20, 9, 15, 9)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def run(prepared: Path, output: Path, engine: dict[str, Any], **changes: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Twenty steps on one rank: the loss of each [20], and the weights after the last."""
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tiny.settings(prepared, output, device=DEVICE, engine=engine, **changes)))
    command = [sys.executable, "-m", "scaletrain", "launch", "--", "pretrain", "--config", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in read_jsonl(output / "metrics.jsonl") if line["kind"] == "step"]
    return torch.tensor(losses, dtype=torch.float64), checkpoint.weights(checkpoint.find(output / "checkpoints")[0])


def both(
    prepared: Path, folder: Path, precision: str, engine: dict[str, Any]
) -> tuple[tuple[Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]:
    """What `run` gives on the local engine and on another, with dropout 0.1 and unequal masked counts."""
    plain = {"name": "local", "precision": precision}
    return run(prepared, folder / "local", plain), run(prepared, folder / "zero", {**engine, "precision": precision})


ZERO3 = {"name": "zero3", "persistence_threshold": 1000}
ENGINES: list[dict[str, Any]] = [
    ZERO3,
    {**ZERO3, "offload": "cpu"},
    {"name": "zero0"},
    {"name": "zero1", "offload": "cpu"},
    {"name": "zero2", "bucket_elements": 1000},
]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: "-".join(map(str, engine.values())))
def test_an_engine_equals_plain_pytorch_in_fp32(prepared: Path, tmp_path: Path, engine: dict[str, Any]) -> None:
    """Losses and weights to 1e-4: CUDA adds up embedding gradients in no fixed order."""
    (expected, reference), (losses, weights) = both(prepared, tmp_path, "fp32", engine)
    assert len(expected) == 20
    assert expected[-1] < expected[0] - 0.3
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)
    assert weights.keys() == reference.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, reference[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", [{"name": "local"}, ZERO3], ids=lambda engine: str(engine["name"]))
def test_a_run_that_stopped_on_a_gpu_goes_on_as_if_it_had_not(prepared: Path, tmp_path: Path, engine: dict[str, Any]) -> None:
    """Saved beside the training, through pinned memory, and made longer in a process of its own: losses and weights to 1e-4."""
    saving = {
        "checkpoint": {"every_steps": 5, "asynchronous": True},
        "schedule": {"name": "wsd", "warmup_samples": 0, "decay_samples": 0},
    }
    expected, reference = run(prepared, tmp_path / "whole", engine, **saving)
    first, _ = run(prepared, tmp_path / "stopped", engine, **saving, steps=10)
    losses, weights = run(prepared, tmp_path / "stopped", engine, **saving)
    assert (len(first), len(losses)) == (10, 20)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)
    for name, value in weights.items():
        torch.testing.assert_close(value, reference[name], rtol=0, atol=1e-4)


def test_zero3_equals_plain_pytorch_in_bf16_to_its_rounding(prepared: Path, tmp_path: Path) -> None:
    """Losses only: AdamW makes steps of full size out of rounding noise where the true gradient is zero. Masters stay fp32."""
    (expected, _), (losses, weights) = both(prepared, tmp_path, "bf16", ZERO3)
    assert expected[-1] < expected[0] - 0.3
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=0)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in weights.values())


def test_logits_on_cuda_are_those_on_the_cpu_in_fp32() -> None:
    model = build(ModelConfig(**tiny.MODEL), TokenIds(vocab_size=120, pad=0, mask=4), seed=1).eval()
    batch, _ = batches()
    with torch.no_grad():
        expected = model(**batch)
        on_gpu = model.to(DEVICE)(**{name: value.to(DEVICE) for name, value in batch.items()})
    torch.testing.assert_close(on_gpu.cpu(), expected, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- layouts


def batches() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same documents as padded rows [4, 20] and as one row [1, 53]."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    ids = torch.randint(5, 120, mask.shape, generator=generator) * mask
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    unpadded = {"input_ids": ids[mask == 1][None], "position_ids": positions[None], "cu_seqlens": bounds}
    return {"input_ids": ids, "attention_mask": mask}, unpadded


def outcome(model: MaskedLanguageModel, batch: dict[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [tokens, vocabulary] of ``rows``, and the gradient that their mean square gives the first query projection."""
    inputs = {name: value if name == "cu_seqlens" else value.to(DEVICE) for name, value in batch.items()}
    logits = model(**inputs, rows=rows.to(DEVICE)).float()
    logits.square().mean().backward()
    name = next(name for name, _ in model.named_parameters() if name.endswith(("query.weight", "Wqkv.weight")))
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    return logits.detach().cpu(), gradient.float().cpu()


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_the_kernel_gives_the_logits_and_gradients_of_padded_rows(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 both stray from fp32; the kernel no further than twice as far as padded rows do. With a window in ModernBERT."""
    if attention.varlen_attn is None:
        pytest.skip("this build of torch has no torch.nn.attention.varlen")
    calls: list[int] = []
    kernel = attention.varlen_attn

    @wraps(kernel)  # whether it has a window is read from its signature
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return kernel(*args, **kwargs)

    extra = {"local_attention": 6} if architecture == "modernbert" else {}
    sizes: dict[str, Any] = {"layers": 4, "hidden": 128, "heads": 2, "max_positions": 24, "dropout": 0.0, "extra": extra}
    padded, unpadded = batches()
    tokens = torch.arange(sum(LENGTHS))
    places = padded["attention_mask"].flatten().nonzero()[:, 0]
    ids = TokenIds(vocab_size=120, pad=0, mask=4, begin=2, end=3)

    def made(layout: str, dtype: torch.dtype) -> MaskedLanguageModel:
        config = ModelConfig(**{"architecture": architecture, "layout": layout, **sizes})
        return build(config, ids, seed=1).to(device=DEVICE, dtype=dtype)

    exact = outcome(made("padded", torch.float32), padded, places)
    rounded = outcome(made("padded", torch.bfloat16), padded, places)
    monkeypatch.setattr(attention, "varlen_attn", counted)
    if extra and not attention._has_window():
        pytest.skip("varlen_attn of this torch has no window")
    packed = outcome(made("unpadded", torch.bfloat16), unpadded, tokens)
    assert len(calls) == sizes["layers"]
    for ours, theirs, reference in zip(packed, rounded, exact, strict=True):
        limit = 2 * float((theirs - reference).abs().max())
        assert 0 < limit < 0.2 * float(reference.abs().max())
        assert float((ours - reference).abs().max()) <= limit
