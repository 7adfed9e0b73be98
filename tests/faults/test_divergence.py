"""F15: a loss or a gradient that is not finite on one rank, a spike, and too many of them. All ranks do the same about it.

The oracle is the run in which the same steps are passed over by hand: it never runs the model on them.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from scaletrain import checkpoint, dist
from scaletrain.config import decode
from scaletrain.engine import Engine
from scaletrain.recipes import finetune, pretrain
from scaletrain.train.metrics import read_jsonl
from tests import ranks, streams, tiny
from tests.faults.table import Add

EVERY, STEPS = 3, 16


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def settings(prepared: Path, output: Path, guard: dict[str, Any], engine: str = "zero3") -> dict[str, Any]:
    own = {"name": engine} | ({"persistence_threshold": 1000} if engine == "zero3" else {})
    changes = {"engine": own, "guard": guard, "checkpoint": {"every_steps": EVERY}, "evaluation": {"every_steps": 0}}
    return tiny.settings(prepared, output, steps=STEPS, **changes)


def run(tree: dict[str, Any], bad: dict[str, float], die_in: int = 0) -> list[int]:
    """One rank of a run in which rank 1 (or the only one) finds its gradient scaled by ``bad[step]``; the steps that it ran."""
    ran: list[int] = []
    forward, clip = Engine.forward, Engine.clip

    def seen(self: Engine, slot: Any) -> Any:
        if slot.step + 1 not in ran[-1:]:
            ran.append(slot.step + 1)
        return forward(self, slot)

    def spoilt(self: Engine, *arguments: Any) -> Any:
        if ran and ran[-1] == die_in:
            os.kill(os.getpid(), signal.SIGKILL)
        if ran and str(ran[-1]) in bad and dist.rank() == dist.world() - 1:
            max(self._gradients.values(), key=len).mul_(bad[str(ran[-1])])
        return clip(self, *arguments)

    Engine.forward, Engine.clip = seen, spoilt  # type: ignore[method-assign]  # in a process of its own
    pretrain.main(decode(pretrain.Config, tree))
    return ran


def files(output: Path) -> list[dict[str, Any]]:
    """Sizes and SHA-256 of all weights and moments at the end."""
    last = checkpoint.find(output / "checkpoints")[0]
    assert last.progress.step == STEPS
    return list(last.manifest["files"])


@functools.cache
def by_hand(prepared: Path, world: int, *bad: tuple[int, int]) -> tuple[list[dict[str, Any]], list[str]]:
    output = prepared.parent / f"by-hand-{world}-{bad}"
    tree = settings(prepared, output, {"pass_over": bad}, "zero3" if world > 1 else "local")
    for ran in ranks.run(run, world, {"tree": tree, "bad": {}}):
        assert ran == [step for step in range(1, STEPS + 1) if not any(first <= step <= last for first, last in bad)]
    return files(output), losses(output)


def losses(output: Path) -> list[str]:
    """Of the steps that were taken."""
    rows = [line for line in read_jsonl(output / "metrics.jsonl") if line["kind"] == "step"]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss_hex"] for row in rows if not row["skipped"]]


def events(output: Path, name: str) -> list[dict[str, Any]]:
    lines = read_jsonl(output / "metrics.jsonl")
    return [{"step": line["step"], **line["facts"]} for line in lines if line["kind"] == "event" and line["name"] == name]


def test_a_gradient_that_is_not_finite_on_one_rank_is_nobodys_step(prepared: Path, tmp_path: Path, fault: Add) -> None:
    tree = settings(prepared, tmp_path, {})
    ranks.run(run, 2, {"tree": tree, "bad": {"8": math.nan, "11": math.inf}})
    assert (files(tmp_path), losses(tmp_path)) == by_hand(prepared, 2, (8, 8), (11, 11))
    assert [each["step"] for each in events(tmp_path, "skipped")] == [8, 11]
    assert all(each["reason"].startswith("not finite: loss ") for each in events(tmp_path, "skipped"))
    assert checkpoint.find(tmp_path / "checkpoints")[0].progress.state["guard"]["skipped"] == [8, 11]
    for factor in ("nan", "inf"):
        injected = f"a gradient times {factor} on one rank of two"
        fault(fault="F15", injected=injected, outcome="no rank takes the step; exact", lost_steps=0)


def test_too_many_in_a_row_end_the_run_and_name_their_samples(prepared: Path, tmp_path: Path, fault: Add) -> None:
    tree = settings(prepared, tmp_path, {"consecutive": 2})
    for outcome in ranks.attempt(run, 2, {"tree": tree, "bad": {"8": math.nan, "9": math.nan}}):
        assert (outcome["type"], outcome["exit_code"]) == ("DivergedError", 72)
        assert "steps 8 to 9 could not be taken (not finite: loss " in outcome["error"]
    record = json.loads((tmp_path / "diverged.json").read_text())
    config = decode(pretrain.Config, tree)
    corpora = pretrain.Corpora(config.data, config.steps, config.seed, config.model.layout, None)
    assert record["steps"] == [8, 9]
    assert record["samples"] == {
        str(step): [f"prepared:{chunk}" for chunk in corpora.plan.picks(step - 1).chunk.tolist()] for step in (8, 9)
    }
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 72
    # Started again, it finds the same; with the steps left out, it goes on.
    assert [o["exit_code"] for o in ranks.attempt(run, 2, {"tree": tree, "bad": {"8": math.nan, "9": math.nan}})] == [72, 72]
    tree["guard"]["pass_over"] = [[8, 9]]
    ranks.run(run, 2, {"tree": tree, "bad": {"8": math.nan, "9": math.nan}})
    assert files(tmp_path)
    fault(fault="F15", injected="two steps in a row", outcome="exit 72 on all ranks, samples named", lost_steps=0)


@pytest.mark.parametrize("die_in", [0, 9, 12])
def test_a_run_that_is_rolled_back_equals_one_that_never_saw_those_steps(
    prepared: Path, tmp_path: Path, die_in: int, fault: Add
) -> None:
    """Also where it is killed before the roll-back, or between it and the first checkpoint after it."""
    world = 1 if die_in else 2
    tree = settings(prepared, tmp_path, {"on_divergence": "roll_back"}, "zero3" if world > 1 else "local")
    bad = dict.fromkeys(("8", "9", "10"), math.nan)
    if die_in:
        for outcome in ranks.attempt(run, world, {"tree": tree, "bad": bad, "die_in": die_in}):
            assert outcome["status"] == f"signal {signal.SIGKILL:d}"
    ran = ranks.run(run, world, {"tree": tree, "bad": bad})[0]
    if not die_in:
        assert ran == [*range(1, 11), 7, *range(11, STEPS + 1)]  # from the checkpoint of step 6
    assert (files(tmp_path), losses(tmp_path)) == by_hand(prepared, world, (8, 10))
    state = checkpoint.find(tmp_path / "checkpoints")[0].progress.state["guard"]
    assert (state["rolled_back"], state["skipped"], state["row"]) == ([[8, 10]], [], [])
    assert [each["step"] for each in events(tmp_path, "skipped")] == [8, 9, 10]
    when = "" if not die_in else f", killed in step {die_in}"
    fault(fault="F15", injected=f"three steps in a row, roll-back{when}", outcome="equal to passed over by hand", lost_steps=1)


def test_a_spike_is_left_out_and_the_window_outlives_a_kill(prepared: Path, tmp_path: Path, fault: Add) -> None:
    guard = {"spikes": "skip", "spike_window": 8, "spike_score": 50.0}
    tree, bad = settings(prepared, tmp_path, guard, "local"), {"14": 1000.0}
    ranks.attempt(run, 1, {"tree": tree, "bad": bad, "die_in": 11})
    ranks.run(run, 1, {"tree": tree, "bad": bad})
    assert (files(tmp_path), losses(tmp_path)) == by_hand(prepared, 1, (14, 14))
    (event,) = events(tmp_path, "skipped")
    assert event["reason"].startswith("spike: gradient norm ")
    fault(fault="F15", injected="a gradient norm times 1000 after a kill", outcome="left out; exact", lost_steps=0)


def test_without_a_checkpoint_to_go_back_to_the_run_ends(prepared: Path, tmp_path: Path) -> None:
    tree = settings(prepared, tmp_path, {"on_divergence": "roll_back", "consecutive": 1}, "local")
    (outcome,) = ranks.attempt(run, 1, {"tree": tree, "bad": {"2": math.nan}})
    assert (outcome["exit_code"], "There is no checkpoint from before them" in outcome["error"]) == (72, True)


def test_a_run_is_rolled_back_only_so_often(prepared: Path, tmp_path: Path) -> None:
    tree = settings(prepared, tmp_path, {"on_divergence": "roll_back", "consecutive": 1, "roll_backs": 1}, "local")
    (outcome,) = ranks.attempt(run, 1, {"tree": tree, "bad": {"5": math.nan, "11": math.nan}})
    assert (outcome["exit_code"], "rolled back 1 times before" in outcome["error"]) == (72, True)


def test_what_was_passed_over_cannot_be_changed_afterwards(prepared: Path, tmp_path: Path) -> None:
    tree = settings(prepared, tmp_path, {"pass_over": [[2, 3]]}, "local") | {"steps": 6}
    ranks.run(run, 1, {"tree": tree, "bad": {}})
    for ranges in ([[2, 2]], [], [[2, 3], [6, 6]]):
        (outcome,) = ranks.attempt(run, 1, {"tree": {**tree, "guard": {"pass_over": ranges}, "steps": 9}, "bad": {}})
        assert (outcome["exit_code"], "guard.pass_over: got " in outcome["error"]) == (65, True)
    later = {**tree, "guard": {"pass_over": [[2, 3], [7, 8]]}, "steps": 9}
    assert ranks.run(run, 1, {"tree": later, "bad": {}}) == [[9]]


def fine_tune(tree: dict[str, Any], bad: dict[str, float]) -> None:
    """A stage, as `run` is a pretraining run."""
    forward, clip, now = Engine.forward, Engine.clip, [0]

    def seen(self: Engine, slot: Any) -> Any:
        now[0] = slot.step + 1
        return forward(self, slot)

    def spoilt(self: Engine, *arguments: Any) -> Any:
        if str(now[0]) in bad:
            max(self._gradients.values(), key=len).mul_(bad[str(now[0])])
        return clip(self, *arguments)

    Engine.forward, Engine.clip = seen, spoilt  # type: ignore[method-assign]  # in a process of its own
    finetune.main(decode(finetune.Config, tree))


def test_a_stage_is_rolled_back_with_what_it_has_selected(tmp_path: Path, fault: Add) -> None:
    """What was evaluated after the checkpoint did not happen: the best step, model and figures are as with the steps left out."""
    encoder, task = streams.encoder(tmp_path / "encoder"), streams.task(tmp_path / "data", "fruit")
    found = []
    for name, guard, bad in (
        ("by-hand", {"pass_over": [[12, 14]]}, {}),
        ("run", {"on_divergence": "roll_back"}, dict.fromkeys(("12", "13", "14"), math.nan)),
    ):
        training = {**streams.STAGE, "guard": guard, "selection": {"every_steps": 3}}
        compute = {**streams.COMPUTE, "engine": {"name": "local"}}
        tree = streams.finetuning(encoder, tmp_path / name, task, training=training, compute=compute)
        ranks.run(fine_tune, 1, {"tree": tree, "bad": bad})
        last = checkpoint.find(tmp_path / name / "checkpoints")[0]
        report = json.loads((tmp_path / name / "report.json").read_text())
        model = (tmp_path / name / "model/model.safetensors").read_bytes()
        found.append((last.manifest["files"], last.progress.state["selection"], report, model))
    assert found[0] == found[1]
    (event,) = events(tmp_path / "run", "rolled back")
    assert (event["step"], event["before"]) == (10, 12)
    fault(
        fault="F15", injected="three steps in a row of a stage, roll-back", outcome="equal to passed over by hand", lost_steps=1
    )
