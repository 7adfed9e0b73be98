"""A pretraining run is a function of its plan: the same at any world size, and the same after being killed."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from scaletrain import checkpoint, dist
from scaletrain.config import decode, load_tree
from scaletrain.data.dataset import Dataset
from scaletrain.errors import CorpusError, RequeueError
from scaletrain.recipes import pretrain
from scaletrain.train.metrics import read_jsonl
from tests import ranks, tiny
from tests.received import joined, losses, run, weights


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def test_one_two_and_four_ranks_equal_plain_pytorch(prepared: Path, tmp_path: Path) -> None:
    """Dropout 0.1, unequal masked counts: the inputs of every slot to the bit, losses and weights after 20 steps to 1e-5."""
    tree = tiny.settings(prepared, tmp_path / "local", engine={"name": "local"})
    expected = joined(ranks.run(run, 1, {"tree": tree}))
    loss = torch.tensor([float.fromhex(value) for value in losses(tmp_path / "local")])
    assert len(loss) == 20
    assert loss[-1] < loss[0] - 0.3
    reference = weights(tmp_path / "local")
    for world in (1, 2, 4):
        output = tmp_path / f"world-{world}"
        assert joined(ranks.run(run, world, {"tree": tiny.settings(prepared, output)})) == expected
        mine = torch.tensor([float.fromhex(value) for value in losses(output)])
        torch.testing.assert_close(mine, loss, rtol=0, atol=1e-5)
        for name, value in weights(output).items():
            torch.testing.assert_close(value, reference[name], rtol=0, atol=1e-5)


def test_every_stage_of_zero_takes_the_same_run(prepared: Path, tmp_path: Path) -> None:
    """Two ranks, dropout 0.1, an evaluation in it, and a resume of stage 1's run at stage 3."""
    evaluation = {"every_steps": 4, "chunks_per_pass": 24}
    changes: dict[str, Any] = {"steps": 8, "evaluation": evaluation, "checkpoint": {"every_steps": 4}}
    found = {}
    for name in ("zero3", "zero0", "zero1", "zero2"):
        output = tmp_path / name
        tree = tiny.settings(prepared, output, **changes) | ({"engine": {"name": name}} if name != "zero3" else {})
        outcomes = ranks.attempt(run, 2, {"tree": tree, "die_after": 5 if name == "zero1" else None})
        if name == "zero1":
            assert {outcome["status"] for outcome in outcomes} == {f"signal {signal.SIGKILL:d}"}
            outcomes = ranks.attempt(run, 2, {"tree": tiny.settings(prepared, output, **changes)})
        assert {outcome["status"] for outcome in outcomes} == {"ok"}
        held_out = [line["scores"]["loss"] for line in read_jsonl(output / "metrics.jsonl") if line["kind"] == "eval"]
        found[name] = [[float.fromhex(value) for value in losses(output)], held_out]
    assert [len(part) for part in found["zero3"]] == [8, 3]
    for name in ("zero0", "zero1", "zero2"):
        for mine, reference in zip(found[name], found["zero3"], strict=True):
            assert mine == pytest.approx(reference, abs=1e-5)


def test_a_world_size_that_does_not_divide_the_slots_changes_nothing_but_idle_slots(prepared: Path, tmp_path: Path) -> None:
    """Three ranks for slots in multiples of four: fillers run the whole model for nothing, and the loss is the same."""
    data = tiny.settings(prepared, tmp_path)["data"] | {"slots": {"micro_batch_tokens": 64, "slot_multiple": 4}}
    for world in (1, 3):
        output = tmp_path / f"world-{world}"
        ranks.run(run, world, {"tree": tiny.settings(prepared, output, data=data, steps=5)})
    one, three = ([float.fromhex(value) for value in losses(tmp_path / f"world-{world}")] for world in (1, 3))
    assert three == pytest.approx(one, abs=1e-5)
    assert any(line.get("filler_share", 0) > 0 for line in read_jsonl(tmp_path / "world-3" / "metrics.jsonl"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_at_an_arbitrary_step_and_resumed_equals_uninterrupted(prepared: Path, tmp_path: Path, precision: str) -> None:
    """SIGKILL of all ranks in the middle of step 8, saved every 3: bytes of weights and moments, losses, inputs, at step 26."""
    engine = {"name": "zero3", "precision": precision, "persistence_threshold": 1000}
    changes: dict[str, Any] = {"steps": 26, "engine": engine, "checkpoint": {"every_steps": 3, "keep": 3}}
    whole = tiny.settings(prepared, tmp_path / "whole", **changes)
    broken = tiny.settings(prepared, tmp_path / "broken", **changes)
    expected = joined(ranks.run(run, 2, {"tree": whole}))
    for outcome in ranks.attempt(run, 2, {"tree": broken, "die_after": 7}):
        assert outcome["status"] == f"signal {signal.SIGKILL:d}"
    received = joined(ranks.run(run, 2, {"tree": broken}))
    assert received == {key: value for key, value in expected.items() if int(key.split("/")[0]) >= 6}
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    left, right = (checkpoint.find(tmp_path / name / "checkpoints")[0] for name in ("whole", "broken"))
    assert left.progress.step == right.progress.step == 26
    assert left.manifest["files"] == right.manifest["files"]  # sizes and SHA-256


def test_the_loss_is_the_same_through_two_one_and_four_ranks(prepared: Path, tmp_path: Path) -> None:
    tree = tiny.settings(prepared, tmp_path / "whole", steps=15, engine={"name": "local"})
    ranks.run(run, 1, {"tree": tree})
    for world, stop_at in ((2, 5), (1, 10), (4, 15)):
        elastic = tiny.settings(prepared, tmp_path / "elastic", steps=15, checkpoint={"every_steps": 5})
        outcomes = ranks.attempt(run, world, {"tree": elastic, "die_after": stop_at})
        assert {outcome["status"] for outcome in outcomes} == ({"ok"} if stop_at == 15 else {f"signal {signal.SIGKILL:d}"})
    mine, theirs = ([float.fromhex(value) for value in losses(tmp_path / name)] for name in ("elastic", "whole"))
    assert mine == pytest.approx(theirs, abs=1e-5)
    reference = weights(tmp_path / "whole")
    for name, value in weights(tmp_path / "elastic").items():
        torch.testing.assert_close(value, reference[name], rtol=0, atol=1e-5)


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_loses_nothing(prepared: Path, tmp_path: Path) -> None:
    tree = tiny.settings(prepared, tmp_path / "run", steps=9)
    for outcome in ranks.attempt(run, 2, {"tree": tree, "stop_after": 3}):
        assert (outcome["type"], outcome["exit_code"]) == ("RequeueError", RequeueError.exit_code)
    left = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert left["code"] == 75
    assert checkpoint.find(tmp_path / "run" / "checkpoints")[0].progress.step == left["step"] == 5
    ranks.run(run, 2, {"tree": tree})
    assert len(losses(tmp_path / "run")) == 9
    assert json.loads((tmp_path / "run" / "exit.json").read_text()) == {"code": 0, "step": 9, "reason": "done", "lease": 2}


def test_a_rank_that_dies_in_a_forward_pass_is_said_to_be_lost(prepared: Path, tmp_path: Path) -> None:
    """The other rank is inside a collective of DeepSpeed then, not one of ours."""
    survivor, victim = ranks.attempt(run, 2, {"tree": tiny.settings(prepared, tmp_path / "run", steps=5), "lost_after": 2})
    assert victim["status"] == f"signal {signal.SIGKILL:d}"
    assert (survivor["type"], survivor["exit_code"]) == ("PeerLostError", 76)
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 76


def test_a_held_out_text_without_a_masked_token_is_no_perfect_score(prepared: Path, tmp_path: Path) -> None:
    task = {"evaluation_mask_rate": 1e-9}
    tree = tiny.settings(prepared, tmp_path / "run", steps=1, evaluation={"every_steps": 1}, task=task)
    for outcome in ranks.attempt(run, 2, {"tree": tree}):
        assert (outcome["type"], outcome["exit_code"]) == ("CorpusError", 65)


def unreadable(tree: dict[str, Any]) -> None:
    """Rank 1 cannot read its data in the third step."""
    read = Dataset.stored

    def refuse(self: Dataset, chunk: int) -> Any:
        if dist.rank() == 1 and threading.current_thread() is threading.main_thread():
            refuse.calls += 1  # type: ignore[attr-defined]
            if refuse.calls > 30:  # type: ignore[attr-defined]
                raise CorpusError("shard", "damaged", "it must be whole", "Prepare again")
        return read(self, chunk)

    refuse.calls = 0  # type: ignore[attr-defined]
    Dataset.stored = refuse  # type: ignore[method-assign]  # in a process of its own
    pretrain.main(decode(pretrain.Config, tree))


def test_data_that_one_rank_cannot_read_ends_all_ranks_with_its_exit_code(prepared: Path, tmp_path: Path) -> None:
    data = tiny.settings(prepared, tmp_path)["data"] | {"loader": {"workers": 0}}
    well, ill = ranks.attempt(unreadable, 2, {"tree": tiny.settings(prepared, tmp_path / "run", data=data)}, timeout_s=60)
    assert (ill["type"], ill["exit_code"]) == ("DataBudgetError", 66)
    assert well["exit_code"] == 66
    assert "rank 1: DataBudgetError: " in well["error"] and "in its place: shard: got 'damaged'" in well["error"]
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 66


def test_the_resolved_settings_in_the_run_folder_rerun_the_run(prepared: Path, tmp_path: Path) -> None:
    """On another number of ranks: what the first start decided is among them."""
    data = tiny.settings(prepared, tmp_path)["data"] | {"slots": {"micro_batch_tokens": 256}}
    first = joined(ranks.run(run, 4, {"tree": tiny.settings(prepared, tmp_path / "run", steps=3, data=data)}))
    tree = load_tree(tmp_path / "run" / "config.yaml", [f"output={tmp_path / 'again'}"])
    assert joined(ranks.run(run, 2, {"tree": tree})) == first
    mine, theirs = ([float.fromhex(value) for value in losses(tmp_path / name)] for name in ("again", "run"))
    assert mine == pytest.approx(theirs, abs=1e-5)


def evaluation(tree: dict[str, Any]) -> list[dict[str, Any]]:
    pretrain.main(decode(pretrain.Config, tree))
    return [line["scores_hex"] for line in read_jsonl(Path(tree["output"]) / "metrics.jsonl") if line["kind"] == "eval"]


def test_evaluation_gives_the_same_bits_on_any_number_of_ranks(prepared: Path, tmp_path: Path) -> None:
    """Same weights, each held-out chunk scored once wherever it falls, added up once."""
    first = {}
    for world in (1, 2, 4):
        tree = tiny.settings(prepared, tmp_path / str(world), steps=1, evaluation={"every_steps": 1, "chunks_per_pass": 50})
        first[world] = ranks.run(evaluation, world, {"tree": tree})[0][0]
    assert first[1] == first[2] == first[4]
