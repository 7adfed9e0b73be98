"""What the model receives of a mixture of corpora in several phases: the same whoever reads it, and wherever it was stopped."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaletrain import checkpoint
from scaletrain.config import decode
from scaletrain.data.dataset import Dataset
from scaletrain.errors import ConfigError
from scaletrain.recipes import pretrain
from scaletrain.recipes.corpora import Corpora
from scaletrain.train.metrics import read_jsonl
from tests import ranks, tiny
from tests.received import joined, losses, noted, run

STEPS, WARM_UP = 5, 2
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Three corpora with one tokenizer: two texts in long rows, and one of them in short rows."""
    long = tiny.corpus(tmp_path_factory.mktemp("long"))
    other = tiny.corpus(tmp_path_factory.mktemp("other"), tokenizer=long / "tokenizer", skip=250_000)
    short = tiny.corpus(tmp_path_factory.mktemp("short"), max_tokens=14, tokenizer=long / "tokenizer", skip=100_000)
    return {"long": long, "other": other, "short": short}


def settings(corpora: Folders, output: Path, *, workers: int = 2, **changes: Any) -> dict[str, Any]:
    """Short rows of two corpora in small steps, then all three in larger ones; unequal weights, flattened sizes, whole words."""
    long, other, short = (str(folder) for folder in corpora.values())
    data = tiny.settings(corpora["long"], output)["data"] | {
        "corpora": [{"path": long, "weight": 3}, {"path": other, "weight": 2}, {"path": short}],
        "temperature": 2.0,
        "warm_up": [
            {"steps": WARM_UP, "chunks_per_step": 16, "corpora": [{"path": short, "weight": 5}, {"path": other, "weight": 2}]}
        ],
        "slots": {"micro_batch_tokens": 192, "slot_multiple": 12},
        "loader": {"workers": workers},
    }
    given: dict[str, Any] = {
        "steps": STEPS,
        "data": data,
        "task": {"whole_word": True},
        "checkpoint": {"every_steps": 1, "asynchronous": False},
    }
    given |= changes
    return tiny.settings(corpora["long"], output, **given)


@pytest.fixture(scope="module")
def uninterrupted(corpora: Folders, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    """What plain PyTorch receives in one process that reads in between steps, and the run's folder."""
    output = tmp_path_factory.mktemp("uninterrupted")
    return joined(ranks.run(run, 1, {"tree": settings(corpora, output, workers=0, engine={"name": "local"})})), output


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (2, 2), (4, 0), (4, 2)])
def test_any_number_of_ranks_and_workers_receives_the_same(
    world: int, workers: int, corpora: Folders, uninterrupted: tuple[dict[str, str], Path], tmp_path: Path
) -> None:
    """Token ids, attention masks, what is hidden and what it was, seeds of dropout: of every slot, by hash."""
    expected, _ = uninterrupted
    assert {int(key.split("/")[0]) for key in expected} == set(range(STEPS))
    tree = settings(corpora, tmp_path, workers=workers, checkpoint={"every_steps": 1000})
    assert joined(ranks.run(run, world, {"tree": tree})) == expected


def test_without_padding_two_ranks_receive_what_one_does(corpora: Folders, tmp_path: Path) -> None:
    """Where chunks are spread over the slots one by one."""
    model = {**tiny.MODEL, "layout": "unpadded"}
    trees = [settings(corpora, tmp_path / str(world), model=model, checkpoint={"every_steps": 1000}) for world in (1, 2)]
    one, two = (joined(ranks.run(run, world, {"tree": tree})) for world, tree in zip((1, 2), trees, strict=True))
    assert (one, len(one)) == (two, 12 * STEPS)


def test_killed_in_each_phase_and_at_their_border_it_goes_on_with_the_same_stream(
    corpora: Folders, uninterrupted: tuple[dict[str, str], Path], tmp_path: Path
) -> None:
    """SIGKILL of 4, 2 and 3 ranks; each leg starts in one of the phases or exactly between them."""
    expected, reference = uninterrupted
    legs = {4: range(0, 2), 2: range(1, 3), 3: range(WARM_UP, 4), 1: range(3, STEPS)}
    for world, steps in legs.items():
        notes, dies = tmp_path / f"notes-{world}", steps.stop < STEPS
        notes.mkdir()
        arguments = {"tree": settings(corpora, tmp_path / "run"), "notes": str(notes)}
        outcomes = ranks.attempt(run, world, arguments | ({"die_after": steps.stop - 1} if dies else {}))
        assert {outcome["status"] for outcome in outcomes} == ({f"signal {signal.SIGKILL:d}"} if dies else {"ok"})
        assert noted(notes) == {key: value for key, value in expected.items() if int(key.split("/")[0]) in steps}
    mine, theirs = ([float.fromhex(value) for value in losses(folder)] for folder in (tmp_path / "run", reference))
    assert mine == pytest.approx(theirs, abs=1e-5)
    last = checkpoint.find(tmp_path / "run" / "checkpoints")[0].progress
    assert (last.step, dict(last.cursor)) == (STEPS, {"phase": 1, "samples": (STEPS - WARM_UP) * 24})


def test_a_run_says_at_its_start_what_it_takes_of_each_corpus(
    corpora: Folders, uninterrupted: tuple[dict[str, str], Path]
) -> None:
    """By the formula: 16 samples in each of 2 steps, 24 in each of 3, dealt to within a sample of weight * chunks^(1/2)."""
    _, output = uninterrupted
    told = {line["facts"]["path"]: line["facts"] for line in read_jsonl(output / "metrics.jsonl") if line.get("name") == "corpus"}
    chunks = {name: Dataset.open(folder).chunks for name, folder in corpora.items()}
    root = {name: np.sqrt(count) for name, count in chunks.items()}
    first = np.array([0.0, 2 * root["other"], 5 * root["short"]])
    second = np.array([3 * root["long"], 2 * root["other"], root["short"]])
    expected = 32 * first / first.sum() + 72 * second / second.sum()
    for (name, folder), samples in zip(corpora.items(), expected, strict=True):
        found = told[str(folder)]
        assert found["samples"] == pytest.approx(samples, abs=2.5)
        assert found["share"] == round(found["samples"] / 104, 4)
        assert found["passes"] == round(found["samples"] / chunks[name], 3)
    assert sum(found["samples"] for found in told.values()) == 104


@pytest.mark.parametrize("temperature", [0.5, 0, -1, float("nan"), "warm"])
def test_a_temperature_below_one_is_refused(temperature: Any, corpora: Folders, tmp_path: Path) -> None:
    tree = settings(corpora, tmp_path)
    tree["data"]["temperature"] = temperature
    with pytest.raises(ConfigError, match=r"^data\.temperature: got"):
        decode(pretrain.Config, tree)


@pytest.mark.parametrize("weight", [0, -2, float("inf"), float("nan")])
def test_a_weight_that_is_none_is_refused(weight: float, corpora: Folders, tmp_path: Path) -> None:
    tree = settings(corpora, tmp_path)
    tree["data"]["corpora"][1]["weight"] = weight
    with pytest.raises(ConfigError, match=r"^data\.corpora\.1\.weight: got"):
        decode(pretrain.Config, tree)


def test_a_warm_up_as_long_as_the_run_is_refused(corpora: Folders, tmp_path: Path) -> None:
    config = decode(pretrain.Config, settings(corpora, tmp_path, steps=WARM_UP))
    with pytest.raises(ConfigError, match=r"^steps: got 2; data\.warm_up takes 2 of them"):
        Corpora(config.data, config.steps, config.seed, "padded", None)
