"""A fine-tuning run is a function of its plan: at any world size, after a kill, from any start; what it ends with is the best."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from scaletrain import checkpoint, dist
from scaletrain.config import decode, load_tree
from scaletrain.engine import Engine
from scaletrain.errors import CheckpointError, RequeueError
from scaletrain.recipes import finetune
from scaletrain.train.metrics import read_jsonl
from tests import ranks, streams
from tests.behaviour.test_pretrain import joined, losses, weights

LOCAL = {**streams.COMPUTE, "engine": {"name": "local"}}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return streams.encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="module")
def fruit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A task of three labels: 120 texts to learn from, ten steps per pass."""
    return streams.task(tmp_path_factory.mktemp("fruit"), "fruit")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Whether two texts are about the same thing."""
    folder, files = tmp_path_factory.mktemp("pairs"), {}
    for number, (split, each) in enumerate({"train": 20, "validation": 5, "gate": 5, "test": 10}.items()):
        left, right = (streams.examples(streams.TASKS["fruit"], each, 100 + 2 * number + side) for side in (0, 1))
        rows = [
            {"first": one["text"], "second": other["text"], "alike": str(one["label"] == other["label"])}
            for one, other in zip(left, right, strict=True)
        ]
        files[split] = [str(streams.write(folder / f"{split}.jsonl", rows))]
    columns = {"text": "first", "pair": "second", "label": "alike"}
    return {"name": "pairs", "data": {**files, "columns": columns}}


def run(tree: dict[str, Any], die_after: int | None = None, stop_after: int | None = None) -> dict[str, str]:
    """One rank of a run; returns the hash of what ``engine.forward`` received in training, by step and slot."""
    received: dict[str, str] = {}
    forward, clip = Engine.forward, Engine.clip

    def recorded(self: Engine, slot: Any) -> Any:
        if torch.is_grad_enabled():  # evaluations number their steps afresh
            content = hashlib.sha256(repr(slot.seed).encode())
            for name, value in sorted({**slot.inputs, **slot.targets}.items()):
                content.update(name.encode() + repr(tuple(value.shape)).encode() + value.numpy().tobytes())
            received[f"{slot.step}/{slot.index}"] = content.hexdigest()
        return forward(self, slot)

    def interrupted(self: Engine, *arguments: Any) -> Any:
        if self.updates == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.updates == stop_after and dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(self, *arguments)

    Engine.forward, Engine.clip = recorded, interrupted  # type: ignore[method-assign, assignment]  # a process of its own
    try:
        finetune.main(decode(finetune.Config, tree))
    finally:
        Engine.forward, Engine.clip = forward, clip  # type: ignore[method-assign]
    return received


def here(tree: dict[str, Any]) -> dict[str, Any]:
    """A run of one rank in this process: its figures."""
    try:
        result = finetune.main(decode(finetune.Config, tree))
    finally:
        dist.stop()
    assert result is not None
    return result


def training(**changes: Any) -> dict[str, Any]:
    return {**streams.STAGE, **changes}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the lease, and the record of the end, which names it."""
    passing = ("exit.json", "lease-")
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(passing)]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def report(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "report.json").read_text())
    return found


def evaluations(output: Path) -> dict[int, dict[str, float]]:
    """Scores on the validation split by step."""
    return {line["step"]: line["scores"] for line in read_jsonl(output / "metrics.jsonl") if line["kind"] == "eval"}


def assert_same_to_1e5(output: Path, other: Path) -> None:
    """Losses of all steps, scores of all evaluations, weights at the end."""
    mine, theirs = (torch.tensor([float.fromhex(loss) for loss in losses(folder)]) for folder in (output, other))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert evaluations(output).keys() == evaluations(other).keys()
    for step, scores in evaluations(output).items():
        assert scores == pytest.approx(evaluations(other)[step], abs=1e-5)
    reference = weights(other)
    for name, value in weights(output).items():
        torch.testing.assert_close(value, reference[name], rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- any world size


@pytest.fixture(scope="module")
def local(encoder: Path, fruit: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A run by plain PyTorch, and what its model received."""
    output = tmp_path_factory.mktemp("local") / "run"
    return output, joined(ranks.run(run, 1, {"tree": streams.finetuning(encoder, output, fruit, compute=LOCAL)}))


@pytest.fixture(scope="module")
def whole(encoder: Path, fruit: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The same run under ZeRO-3 on two ranks."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return output, joined(ranks.run(run, 2, {"tree": streams.finetuning(encoder, output, fruit)}))


def test_two_ranks_equal_plain_pytorch(local: tuple[Path, dict[str, str]], whole: tuple[Path, dict[str, str]]) -> None:
    """Dropout 0.1 in the encoder and before the head; the inputs and labels of every slot to the bit."""
    (output, expected), (mine, received) = local, whole
    assert len(losses(output)) == 20
    assert float.fromhex(losses(output)[-1]) < float.fromhex(losses(output)[0]) - 0.1
    assert received == expected
    assert_same_to_1e5(mine, output)


@pytest.mark.parametrize("world", [1, 4])
def test_one_and_four_ranks_equal_plain_pytorch(
    encoder: Path, fruit: dict[str, Any], local: tuple[Path, dict[str, str]], tmp_path: Path, world: int
) -> None:
    tree = streams.finetuning(encoder, tmp_path / "run", fruit)
    assert joined(ranks.run(run, world, {"tree": tree})) == local[1]
    assert_same_to_1e5(tmp_path / "run", local[0])
    assert report(tmp_path / "run")["accuracy"] == report(local[0])["accuracy"]


def test_pairs_with_token_types_in_one_row_equal_plain_pytorch(encoder: Path, pairs: dict[str, Any], tmp_path: Path) -> None:
    """Texts end to end, each pair's second text of another type: inputs to the bit, losses and weights to 1e-5."""
    model = {"start": str(encoder), "layout": "unpadded", "pooling": "first"}
    changes = {"model": model, "training": training(epochs=1)}
    tree = streams.finetuning(encoder, tmp_path / "local", pairs, compute=LOCAL, **changes)
    expected = joined(ranks.run(run, 1, {"tree": tree}))
    tree = streams.finetuning(encoder, tmp_path / "zero3", pairs, **changes)
    assert joined(ranks.run(run, 2, {"tree": tree})) == expected
    assert_same_to_1e5(tmp_path / "zero3", tmp_path / "local")


def test_a_pair_reaches_the_model_as_the_tokenizer_alone_would_give_it(
    encoder: Path, pairs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids and token types of every sample of the first step, beside those of plain Transformers."""
    rows: set[tuple[tuple[int, ...], tuple[int, ...], int]] = set()
    forward = Engine.forward

    def recorded(self: Engine, slot: Any) -> Any:
        if torch.is_grad_enabled():
            inputs = [slot.inputs[name] for name in ("input_ids", "token_type_ids", "attention_mask")]
            for ids, types, mask, label in zip(*inputs, slot.targets["labels"], strict=True):
                rows.add((tuple(ids[mask > 0].tolist()), tuple(types[mask > 0].tolist()), int(label)))
        return forward(self, slot)

    monkeypatch.setattr(Engine, "forward", recorded)
    here(streams.finetuning(encoder, tmp_path / "run", pairs, compute=LOCAL, training=training(epochs=1)))
    tokenizer: Any = AutoTokenizer.from_pretrained(encoder)
    examples = [json.loads(line) for line in Path(pairs["data"]["train"][0]).read_text().splitlines()]
    expected = set()
    for example in examples:
        texts = example["first"], example["second"]
        encoded = tokenizer(*texts, truncation=True, max_length=40, return_token_type_ids=True)
        labels = ["False", "True"].index(example["alike"])
        expected.add((tuple(encoded["input_ids"]), tuple(encoded["token_type_ids"]), labels))
    assert rows == expected
    assert any(1 in types for _, types, _ in rows)


@pytest.mark.parametrize("task", ["fruit", "pairs"])
def test_without_dropout_one_row_equals_padded_rows(
    encoder: Path, task: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Slots hold other samples and masks are drawn differently then, but a step's loss and gradient are sums over samples."""
    for layout in ("padded", "unpadded"):
        model = {"start": str(encoder), "layout": layout, "dropout": 0.0, "encoder_dropout": 0.0}
        tree = request.getfixturevalue(task)
        here(streams.finetuning(encoder, tmp_path / layout, tree, compute=LOCAL, model=model, training=training(epochs=1)))
    assert_same_to_1e5(tmp_path / "unpadded", tmp_path / "padded")


def test_the_resolved_settings_in_the_run_folder_rerun_the_run(encoder: Path, fruit: dict[str, Any], tmp_path: Path) -> None:
    """On another number of ranks: what the first start decided is among them."""
    compute = {**streams.COMPUTE, "slots": {"micro_batch_tokens": 512}}
    tree = streams.finetuning(encoder, tmp_path / "run", fruit, compute=compute, training=training(epochs=0.5))
    first = joined(ranks.run(run, 2, {"tree": tree}))
    again = load_tree(tmp_path / "run" / "config.yaml", [f"output={tmp_path / 'again'}"])
    assert joined(ranks.run(run, 1, {"tree": again})) == first
    assert_same_to_1e5(tmp_path / "again", tmp_path / "run")


# -------------------------------------------------------------------------------------------------------------- after a kill


def killed(world: int, tree: dict[str, Any], after: int) -> None:
    """SIGKILL of all ranks in the middle of a step."""
    outcomes = ranks.attempt(run, world, {"tree": tree, "die_after": after})
    assert {outcome["status"] for outcome in outcomes} == {f"signal {signal.SIGKILL:d}"}


def assert_same_bytes(output: Path, other: Path) -> None:
    """The last checkpoint, the model with its record, the report, and every loss and score on the way."""
    mine, theirs = (checkpoint.find(folder / "checkpoints")[0] for folder in (output, other))
    assert mine.progress == theirs.progress
    assert mine.manifest["files"] == theirs.manifest["files"]  # sizes and SHA-256
    assert digests(output / "model") == digests(other / "model")
    assert (output / "report.json").read_bytes() == (other / "report.json").read_bytes()
    assert losses(output) == losses(other)
    assert evaluations(output) == evaluations(other)


def test_a_run_that_is_interrupted_in_every_way_equals_an_uninterrupted_one(
    encoder: Path, fruit: dict[str, Any], whole: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """Killed in step 3, before there is a checkpoint; stopped by a signal to one rank; killed between two checkpoints."""
    output = tmp_path / "run"
    tree = streams.finetuning(encoder, output, fruit)
    killed(2, tree, 2)
    for outcome in ranks.attempt(run, 2, {"tree": tree, "stop_after": 6}):
        assert (outcome["type"], outcome["exit_code"]) == ("RequeueError", RequeueError.exit_code)
    stopped = json.loads((output / "exit.json").read_text())
    assert (stopped["code"], stopped["step"]) == (75, checkpoint.find(output / "checkpoints")[0].progress.step)
    assert not (output / "model").exists()
    killed(2, tree, 13)
    received = joined(ranks.run(run, 2, {"tree": tree}))
    assert received == {key: value for key, value in whole[1].items() if int(key.split("/")[0]) >= 10}
    assert_same_bytes(output, whole[0])
    assert json.loads((output / "exit.json").read_text()) == {"code": 0, "step": 20, "reason": "done", "lease": 4}


def test_killed_before_the_model_is_written_and_started_again_writes_the_same_one(
    encoder: Path, fruit: dict[str, Any], whole: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """On another number of ranks: nothing is trained then, and the same slots are evaluated."""
    output = Path(shutil.copytree(whole[0], tmp_path / "run"))
    shutil.rmtree(output / "model")
    (output / "report.json").unlink()
    assert ranks.run(run, 1, {"tree": streams.finetuning(encoder, output, fruit)}) == [{}]
    assert_same_bytes(output, whole[0])


def test_the_run_is_the_same_through_two_one_and_four_ranks(
    encoder: Path, fruit: dict[str, Any], whole: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    tree = streams.finetuning(encoder, tmp_path / "run", fruit)
    killed(2, tree, 6)
    killed(1, tree, 13)
    ranks.run(run, 4, {"tree": tree})
    assert_same_to_1e5(tmp_path / "run", whole[0])
    mine, theirs = (load_file(output / "model" / "model.safetensors") for output in (tmp_path / "run", whole[0]))
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-5)


def test_task_files_that_change_after_the_start_do_not_change_the_run(encoder: Path, tmp_path: Path) -> None:
    """What was read at the start is what the run learns to its end."""
    for name in ("whole", "broken"):
        task = streams.task(tmp_path / name / "data", "tools")
        tree = streams.finetuning(encoder, tmp_path / name / "run", task, compute=LOCAL)
        if name == "broken":
            killed(1, tree, 8)
            streams.write(Path(task["data"]["train"][0]), streams.examples(("hammer", "saw", "plane"), 30, 77))
            Path(task["data"]["test"][0]).unlink()
        ranks.run(run, 1, {"tree": tree})
    mine, theirs = (tmp_path / name / "run" for name in ("broken", "whole"))
    assert losses(mine) == losses(theirs)
    assert digests(mine / "model") == digests(theirs / "model")
    assert digests(mine / "task") == digests(theirs / "task")


def test_before_the_first_checkpoint_a_corrected_task_file_is_read_again(encoder: Path, tmp_path: Path) -> None:
    task = streams.task(tmp_path / "data", "tools")
    tree = streams.finetuning(encoder, tmp_path / "run", task, compute=LOCAL)
    killed(1, tree, 2)
    task["data"]["limit_per_label"] = 30
    assert here(tree)["steps"] == 10
    assert len((tmp_path / "run" / "task" / "train.jsonl").read_text().splitlines()) == 60


# ------------------------------------------------------------------------------------------- early stopping, the best weights


@pytest.fixture(scope="module")
def misled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A task whose validation split has every label wrong: the more is learned of train, the worse it gets."""
    folder = tmp_path_factory.mktemp("misled")
    tree = streams.task(folder, "fruit")
    wrong = {"apple": "pear", "pear": "plum", "plum": "apple"}
    file = Path(tree["data"]["validation"][0])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    streams.write(file, [{**row, "label": wrong[row["label"]]} for row in rows])
    return tree


STOPPING = {"every_steps": 3, "metric": "loss", "patience": 2}


@pytest.fixture(scope="module")
def to_the_end(encoder: Path, misled: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps its last weights, and the checkpoint of every step."""
    output = tmp_path_factory.mktemp("to_the_end") / "run"
    selection = {"every_steps": 3, "metric": "loss", "keep": "last"}
    settings = training(selection=selection, checkpoint={"every_steps": 1, "keep": 100})
    ranks.run(run, 2, {"tree": streams.finetuning(encoder, output, misled, training=settings)})
    return output


@pytest.fixture(scope="module")
def turn(to_the_end: Path) -> int:
    """The step after which it gets worse, for good."""
    scores = {step: score["loss"] for step, score in evaluations(to_the_end).items()}
    best = min(scores, key=lambda step: scores[step])
    assert best < 12
    assert scores[best] < scores[best + 3] < scores[best + 6]
    return best


def of_step(output: Path, step: int) -> dict[str, Tensor]:
    return checkpoint.weights(next(each for each in checkpoint.find(output / "checkpoints") if each.progress.step == step))


def assert_model_is(output: Path, expected: Mapping[str, Tensor]) -> None:
    """RUN/model holds these weights, to the byte, and no others."""
    found = {f"encoder.{name}": value for name, value in load_file(output / "model" / "model.safetensors").items()}
    found |= {f"blocks.{name}": value for name, value in load_file(output / "model" / "head.safetensors").items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_run_that_gets_worse_stops_early_with_its_best_weights(
    encoder: Path, misled: dict[str, Any], to_the_end: Path, turn: int, tmp_path: Path
) -> None:
    """Both ranks stop at the second evaluation that is worse. Started again, nothing is trained and the same is kept.

    With one checkpoint to keep beside the best, the best one is still there at the end.
    """
    settings = training(selection=STOPPING, checkpoint={"every_steps": 1, "keep": 1})
    tree = streams.finetuning(encoder, tmp_path / "run", misled, training=settings)
    received = ranks.run(run, 2, {"tree": tree})
    end = turn + 6
    assert [max(int(key.split("/")[0]) for key in each) for each in received] == [end - 1] * 2
    assert max(evaluations(tmp_path / "run")) == end
    assert (report(tmp_path / "run")["step"], report(tmp_path / "run")["steps"]) == (turn, end)
    assert [each.progress.step for each in checkpoint.find(tmp_path / "run" / "checkpoints")] == [end, turn]
    assert_model_is(tmp_path / "run", of_step(to_the_end, turn))
    assert json.loads((tmp_path / "run" / "exit.json").read_text()) == {"code": 0, "step": end, "reason": "done", "lease": 1}
    before = digests(tmp_path / "run")
    assert ranks.run(run, 2, {"tree": tree}) == [{}, {}]
    after = digests(tmp_path / "run")
    del before["metrics.jsonl"], after["metrics.jsonl"]  # it says that the run was started again
    assert after == before


def test_without_selection_a_run_ends_with_its_last_weights(to_the_end: Path) -> None:
    assert len(losses(to_the_end)) == report(to_the_end)["step"] == 20
    assert_model_is(to_the_end, of_step(to_the_end, 20))


@pytest.mark.parametrize("later", [1, 4])
def test_a_run_killed_while_it_gets_worse_stops_where_it_would_have_stopped(
    encoder: Path, misled: dict[str, Any], to_the_end: Path, turn: int, tmp_path: Path, later: int
) -> None:
    """After the best evaluation, and after the first that was worse: what was found before the kill counts."""
    settings = training(selection=STOPPING, checkpoint={"every_steps": 1})
    tree = streams.finetuning(encoder, tmp_path / "run", misled, training=settings)
    killed(2, tree, turn + later)
    received = ranks.run(run, 2, {"tree": tree})
    end = turn + 6
    assert [sorted({int(key.split("/")[0]) for key in each}) for each in received] == [list(range(turn + later, end))] * 2
    assert losses(tmp_path / "run") == losses(to_the_end)[:end]
    assert (report(tmp_path / "run")["step"], report(tmp_path / "run")["steps"]) == (turn, end)
    assert_model_is(tmp_path / "run", of_step(to_the_end, turn))


def test_a_run_whose_best_checkpoint_is_gone_does_not_end_with_other_weights(
    encoder: Path, misled: dict[str, Any], turn: int, tmp_path: Path
) -> None:
    settings = training(selection=STOPPING, checkpoint={"every_steps": 1})
    tree = streams.finetuning(encoder, tmp_path / "run", misled, compute=LOCAL, training=settings)
    here(tree)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{turn:08d}")
    before = digests(tmp_path / "run" / "model")
    with pytest.raises(CheckpointError) as error:
        here(tree)
    rule = f"the best weights are those of step {turn}, and their checkpoint is gone or damaged"
    remedy = "Restore it from a backup, or start again with --fresh."
    assert str(error.value) == f"{tmp_path / 'run'}: got {[turn + 5, turn + 6]}; {rule}. {remedy}"
    assert digests(tmp_path / "run" / "model") == before


def test_a_best_checkpoint_with_a_flipped_bit_is_as_good_as_gone(
    encoder: Path, misled: dict[str, Any], turn: int, tmp_path: Path
) -> None:
    """It is older than the newest, which is the one that a start verifies."""
    settings = training(selection=STOPPING, checkpoint={"every_steps": 1})
    tree = streams.finetuning(encoder, tmp_path / "run", misled, compute=LOCAL, training=settings)
    here(tree)
    (file,) = (tmp_path / "run" / "checkpoints" / f"step-{turn:08d}").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    before = digests(tmp_path / "run" / "model")
    with pytest.raises(CheckpointError, match=f"best weights are those of step {turn}, and their checkpoint is gone or damaged"):
        here(tree)
    assert digests(tmp_path / "run" / "model") == before


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "weighted_f1", "loss"])
def test_the_best_checkpoint_is_that_of_the_metric_that_is_named(
    encoder: Path, misled: dict[str, Any], to_the_end: Path, tmp_path: Path, metric: str
) -> None:
    """The earliest of equals, among the evaluations that another run has recorded."""
    settings = training(selection={"every_steps": 3, "metric": metric}, checkpoint={"every_steps": 20, "keep": 1})
    found = here(streams.finetuning(encoder, tmp_path / "run", misled, compute=LOCAL, training=settings))
    sign = -1 if metric == "loss" else 1
    scores = {step: sign * score[metric] for step, score in evaluations(to_the_end).items()}
    assert found["step"] == min(scores, key=lambda step: (-scores[step], step))
    mine, theirs = ({step: score[metric] for step, score in evaluations(each).items()} for each in (tmp_path / "run", to_the_end))
    assert mine == pytest.approx(theirs, abs=1e-5)
    for name, value in of_step(tmp_path / "run", found["step"]).items():
        torch.testing.assert_close(value, of_step(to_the_end, found["step"])[name], rtol=0, atol=1e-5)


def test_the_report_has_the_figures_of_the_test_split_by_label(encoder: Path, misled: dict[str, Any], tmp_path: Path) -> None:
    """Beside that of always naming the most frequent label."""
    found = here(streams.finetuning(encoder, tmp_path / "run", misled, compute=LOCAL, training=training(epochs=0.5)))
    assert found["majority_baseline"] == pytest.approx(1 / 3)
    assert found.items() <= report(tmp_path / "run").items()
    assert sum(row["support"] for row in report(tmp_path / "run")["labels"]) == found["examples"] == 60
    recalled = sum(row["recall"] * row["support"] for row in report(tmp_path / "run")["labels"])
    assert recalled / 60 == pytest.approx(found["accuracy"])
