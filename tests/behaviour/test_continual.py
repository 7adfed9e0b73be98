"""A stream of tasks on real ranks: killed anywhere it ends as if it had not been, and on any number of ranks it ends alike."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scaletrain import checkpoint, dist
from scaletrain.config import decode
from scaletrain.continual.memory import draw, load_memory
from scaletrain.continual.methods.ewc import FISHER
from scaletrain.continual.store import Store
from scaletrain.data.freeze import thaw
from scaletrain.recipes import continual, finetune, predict
from scaletrain.recipes.stream import Stream
from scaletrain.train.metrics import read_jsonl
from tests import ranks, streams
from tests.faults.table import Add

METHODS: list[dict[str, Any]] = [
    {"name": "replay", "capacity": 40},
    {"name": "ewc", "strength": 100.0, "samples": 9},  # on two ranks, one slot of the Fisher pass only fills up
    {"name": "lwf"},
]
TEXTS = ("ba be bi", "fa fe fi fo", "zou zia")
VERSIONS = ("0001-fruit", "0002-tools", "0003-birds")


def task(folder: Path, name: str, labels: Sequence[str] | None = None, *, each: int = 16, seed: int = 1) -> dict[str, Any]:
    """The tree of a task that is learned in a few steps: ``each`` examples of a label."""
    labels, files = labels or streams.TASKS[name], {}
    for number, (split, count) in enumerate({"train": each, "validation": 3, "gate": 8, "test": 6}.items()):
        file = streams.write(folder / name / f"{split}.jsonl", streams.examples(labels, count, 10 * seed + number))
        files[split] = [str(file)]
    return {"name": name, "data": {**files, "conflicts": "keep"}}


def settings(root: Path, output: Path, *tasks: str | dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The tree of a stream, of three tasks if none are given, that has everything in it: replay, EWC and distillation."""
    trees = [task(root / "data", each) if isinstance(each, str) else each for each in tasks or streams.TASKS]
    training = {**streams.STAGE, "optimizer": {"learning_rate": 5e-3}, "checkpoint": {"every_steps": 2}}
    compute = {**streams.COMPUTE, "slots": {"micro_batch_tokens": 256, "slot_multiple": 4}, "samples_per_pass": 8}
    changes = {"training": training, "compute": compute, "methods": METHODS, "gate": {"max_drop": 0.95}, **changes}
    return streams.stream(root / "encoder", output, trees, **changes)


LOCAL = {**streams.COMPUTE, "engine": {"name": "local"}, "slots": {"micro_batch_tokens": 256, "slot_multiple": 4}}


@dataclass(frozen=True)
class Point:
    """Where a rank is stopped: before its ``count``-th call of a function, of those that another one makes."""

    entry: str
    """The last one in the ledger then."""
    call: str
    inside: str = "recipes.continual:main"
    count: int = 1
    ranks: tuple[int, ...] = (0, 1)
    signal: int = signal.SIGKILL

    @property
    def asks(self) -> bool:
        """Whether the rank is only asked to stop."""
        return self.signal != signal.SIGKILL

    def arm(self, note: Path) -> None:
        """In this process, which is a rank's own. The time when it happens goes into ``note``."""
        depth, left = 0, self.count

        def outer(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **named: Any) -> Any:
                nonlocal depth
                depth += 1
                try:
                    return function(*arguments, **named)
                finally:
                    depth -= 1

            return run

        def inner(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **named: Any) -> Any:
                nonlocal left
                left -= depth > 0
                if left == 0 and depth and dist.rank() in self.ranks:
                    left = -1
                    note.write_text(str(time.monotonic()))
                    os.kill(os.getpid(), self.signal)
                return function(*arguments, **named)

            return run

        replace(self.inside, outer)
        replace(self.call, inner)


def replace(name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Puts a wrapper in the place of ``module:function``."""
    module, _, path = name.partition(":")
    *owners, last = path.split(".")
    owner = reduce(getattr, owners, import_module(module if module == "pathlib" else f"scaletrain.{module}"))
    setattr(owner, last, wrap(getattr(owner, last)))


POINTS = {
    "before the first checkpoint": Point("begun", "engine.base:Engine.clip", count=2),
    "asked to stop": Point("begun", "engine.base:Engine.clip", count=3, ranks=(1,), signal=signal.SIGTERM),
    "the teacher's pass": Point("begun", "engine.base:Engine.forward", "recipes.onboarding:Onboarding._begin", count=2),
    "a step, one rank": Point("begun", "engine.base:Engine.forward", "recipes.stage:Stage.run", 14, (1,)),
    "validation": Point("begun", "engine.base:Engine.forward", "recipes.stage:Stage._evaluate"),
    "the teacher's pass, asked": Point(
        "begun", "engine.base:Engine.forward", "recipes.onboarding:Onboarding._begin", 2, (1,), signal.SIGTERM
    ),
    "validation, asked": Point("begun", "engine.base:Engine.forward", "recipes.stage:Stage._evaluate", 2, (1,), signal.SIGUSR1),
    "Fisher information": Point("trained", "engine.base:Engine.forward", "engine.base:Engine.gradients", count=3),
    "Fisher information, asked": Point(
        "trained", "engine.base:Engine.forward", "engine.base:Engine.gradients", 3, (1,), signal.SIGTERM
    ),
    "evaluation, asked": Point(
        "trained", "engine.base:Engine.forward", "recipes.onboarding:Onboarding._evaluate", 3, (0,), signal.SIGINT
    ),
    "Fisher information, one rank": Point("trained", "engine.base:Engine.forward", "engine.base:Engine.gradients", 3, (1,)),
    "evaluation": Point("trained", "engine.base:Engine.forward", "recipes.onboarding:Onboarding._evaluate", count=3),
    "writing": Point("trained", "recipes.onboarding:save_memory", ranks=(0,)),
    "committing, no name": Point("trained", "pathlib:Path.rename", "continual.store:Store.commit_version", ranks=(0,)),
    "committing, no entry": Point("trained", "continual.store:Store._append", "continual.store:Store.commit_version", ranks=(0,)),
    "judging": Point("evaluated", "continual.lifecycle:judge", ranks=(0,)),
    "judging, no entry": Point("evaluated", "continual.lifecycle:Lifecycle._append", "continual.lifecycle:Lifecycle.conclude"),
    "publishing, no entry": Point("judged", "continual.store:Store.publish", ranks=(0,)),
    "publishing, no pointer": Point("published", "continual.store:Store._point", "continual.store:Store.publish", ranks=(0,)),
}


def run(tree: dict[str, Any], point: str | None = None, copies: str | None = None) -> dict[str, Any] | None:
    """One rank of a stream. ``copies``: where the lineage is copied to, as it is after each task."""
    settle = Stream._settle

    def copied(self: Stream, attempt: Any) -> None:
        settle(self, attempt)
        if dist.rank() == 0 and copies is not None:
            shutil.copytree(tree["output"], Path(copies) / attempt.version)

    Stream._settle = copied  # type: ignore[method-assign]  # in a process of its own
    if point is not None:
        POINTS[point].arm(Path(f"{tree['output']}.note"))
    return continual.main(decode(continual.Config, tree))


def run_all(trees: list[dict[str, Any]]) -> None:
    """Streams one after the other in one process."""
    for tree in trees:
        continual.main(decode(continual.Config, tree))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``encoder``, ``data``, the lineage ``whole`` that two ranks made without a break, and in ``after/VERSION`` what it was
    when that version was published."""
    folder = tmp_path_factory.mktemp("continual")
    streams.encoder(folder / "encoder")
    ranks.run(run, 2, {"tree": settings(folder, folder / "whole"), "copies": str(folder / "after")})
    return folder


def ledger(lineage: Path) -> list[dict[str, Any]]:
    """Without the times."""
    return [{key: value for key, value in entry.items() if key != "at"} for entry in Store(lineage).entries()]


def manifests(lineage: Path) -> dict[str, bytes]:
    """Version -> sizes and SHA-256 of all its files."""
    return {version: (lineage / "versions" / version / "MANIFEST.json").read_bytes() for version in VERSIONS}


def losses(lineage: Path, version: str) -> list[str]:
    """Of every step of a stage, to the bit."""
    return [line["loss_hex"] for line in steps(lineage, version)]


def steps(lineage: Path, version: str) -> list[dict[str, Any]]:
    return [line for line in read_jsonl(lineage / "work" / version / "metrics.jsonl") if line["kind"] == "step"]


def weights(lineage: Path, version: str) -> dict[str, torch.Tensor]:
    folder = lineage / "versions" / version / "model"
    head = {f"blocks.{name}": value for name, value in load_file(folder / "head.safetensors").items()}
    return load_file(folder / "model.safetensors") | head


def fisher(version: Path) -> dict[str, torch.Tensor]:
    """What EWC has stored with a version, whole."""
    shapes = checkpoint.state_shapes(version / "state", FISHER)
    pieces = {name: checkpoint.Piece(shape, 0, torch.zeros(math.prod(shape))) for name, shape in shapes.items()}
    checkpoint.read_state(version / "state", FISHER, pieces)
    assert pieces
    return {name: piece.values for name, piece in pieces.items()}


def answers(lineage: Path, texts: Sequence[str], **options: Any) -> list[str]:
    """What the published model says, text by text in plain PyTorch."""
    config = decode(predict.Config, {"model": str(lineage), "device": "cpu", **options})
    return [answer["label"] for answer in predict.Predictor(config).answers([(text, None) for text in texts])]


# --------------------------------------------------------------------------------------------------------------- stopped anywhere


def test_killed_in_every_phase_of_an_onboarding_it_ends_as_if_it_had_not_been(root: Path, tmp_path: Path, fault: Add) -> None:
    """All ranks, or one of them, again and again while the third task is learned: the same ledger, the same bytes of every
    version, the same losses. All the while the model of before is published, whole, and answers."""
    broken, whole = tmp_path / "broken", ledger(root / "whole")
    shutil.copytree(root / "after" / "0002-tools", broken)
    tree = settings(root, broken)
    killed, lost, asked = (f"signal {signal.SIGKILL:d}", None), ("PeerLostError", 76), ("RequeueError", 75)
    for name, point in POINTS.items():
        for rank, outcome in enumerate(ranks.attempt(run, 2, {"tree": tree, "point": name})):
            left = (outcome.get("type", outcome["status"]), outcome.get("exit_code"))
            if point.asks:
                assert left == asked, (name, outcome)
            elif rank == point.ranks[0]:
                assert left == killed, (name, outcome)
            else:  # was killed as well, or noticed that the first one was
                assert left == lost or (rank in point.ranks and left == killed), (name, outcome)
        if point.asks:
            passed_s = time.monotonic() - float((tmp_path / "broken.note").read_text())
            assert passed_s < 10
            fault(fault="F9", injected=f"a signal to one rank of two, {name}", outcome="75, then exact", detect_s=passed_s)
        found = ledger(broken)
        assert found == whole[: len(found)], name
        assert found[-1]["event"] == point.entry, name
        assert Store(broken).published() == "0002-tools", name
        assert set(answers(broken, TEXTS)) <= {*streams.TASKS["fruit"], *streams.TASKS["tools"]}
    assert found == whole  # all but the pointer
    results = ranks.run(run, 2, {"tree": tree})
    assert results[0]["published"] == Store(broken).published() == "0003-birds"
    assert ledger(broken) == whole
    assert manifests(broken) == manifests(root / "whole")
    assert losses(broken, "0003-birds") == losses(root / "whole", "0003-birds")
    assert not list(broken.glob("work/*/checkpoints"))


# ----------------------------------------------------------------------------------------------------------- any number of ranks


def require_alike(lineage: Path, whole: Path, versions: Sequence[str]) -> None:
    """The same entries with the same accuracies, the same memory, weights within 1e-5, and the Fisher information at them."""
    mine, theirs = ledger(lineage), ledger(whole)
    assert [(entry["event"], entry.get("version"), entry.get("row")) for entry in mine] == [
        (entry["event"], entry.get("version"), entry.get("row")) for entry in theirs
    ]
    for version in versions:
        left, right = (folder / "versions" / version for folder in (lineage, whole))
        assert (left / "memory.jsonl").read_bytes() == (right / "memory.jsonl").read_bytes()
        reference = weights(whole, version)
        for name, value in weights(lineage, version).items():
            torch.testing.assert_close(value, reference[name], rtol=0, atol=1e-5)
        known = fisher(right)
        for name, value in fisher(left).items():
            torch.testing.assert_close(value, known[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("world", [1, 4])
def test_one_and_four_ranks_make_the_candidate_that_two_make(root: Path, tmp_path: Path, world: int) -> None:
    """Its weights, with dropout, replay, penalty and distillation; what it remembers; what it gets right."""
    lineage = Path(shutil.copytree(root / "after" / "0002-tools", tmp_path / "lineage"))
    ranks.run(run, world, {"tree": settings(root, lineage)})
    require_alike(lineage, root / "whole", VERSIONS[2:])


def test_a_stream_begun_on_two_ranks_goes_on_on_four_and_then_on_one(root: Path, tmp_path: Path) -> None:
    """Killed on four ranks inside the training of the second task, and on one in the Fisher pass of the third."""
    lineage = Path(shutil.copytree(root / "after" / "0001-fruit", tmp_path / "lineage"))
    for world, point in ((4, "asked to stop"), (1, None)):
        ranks.attempt(run, world, {"tree": settings(root, lineage), "point": point})
        if world == 4:
            assert [entry["event"] for entry in ledger(lineage)][6:] == ["begun"]
            assert list((lineage / "work" / "0002-tools" / "checkpoints").iterdir())
    require_alike(lineage, root / "whole", VERSIONS[1:])


def test_a_memory_holds_of_every_label_the_examples_that_drew_lowest(root: Path) -> None:
    """Five of each of the eight, whether its task is the first one or the last."""
    kept = {(each.task, each.example.key) for each in load_memory(root / "whole/versions/0003-birds")}
    assert len(kept) == 40
    for name, names in streams.TASKS.items():
        trained = thaw(root / "whole/tasks" / name).splits["train"]
        for label in names:
            lowest = sorted((draw(1, name, each.key), each.key) for each in trained if each.label == label)[:5]
            assert {(name, key) for _, key in lowest} <= kept


# ------------------------------------------------------------------------------------------------------------------ the scenarios


def accuracy(lineage: Path, data: dict[str, Any], **options: Any) -> float:
    """Of the published model on a task's test split, in plain PyTorch."""
    rows = [json.loads(line) for line in Path(data["data"]["test"][0]).read_text().splitlines()]
    found = answers(lineage, [row["text"] for row in rows], **options)
    return sum(label == row["label"] for label, row in zip(found, rows, strict=True)) / len(rows)


def blocks(lineage: Path, version: str) -> list[tuple[str, list[str]]]:
    head = json.loads((lineage / "versions" / version / "model" / "head.json").read_text())
    return [(block["task"], block["labels"]) for block in head["blocks"]]


def test_class_incremental_any_label_may_be_the_answer(root: Path) -> None:
    whole, tree = root / "whole", settings(root, root / "whole")
    assert blocks(whole, "0003-birds") == [(name, sorted(labels)) for name, labels in streams.TASKS.items()]
    row = next(entry["row"] for entry in ledger(whole) if entry["event"] == "evaluated" and len(entry["row"]) == 3)
    assert [accuracy(whole, each) for each in tree["tasks"]] == row
    texts = [json.loads(line)["text"] for line in Path(tree["tasks"][0]["data"]["test"][0]).read_text().splitlines()]
    assert set(answers(whole, texts)) - set(streams.TASKS["fruit"])  # some are mistaken for another task's


def test_task_incremental_a_sample_competes_among_its_own_labels(root: Path, tmp_path: Path) -> None:
    lineage = tmp_path / "lineage"
    tree = settings(root, lineage, "fruit", "tools", scenario="task")
    (result, _) = ranks.run(run, 2, {"tree": tree})
    assert result["published"] == "0002-tools"
    assert blocks(lineage, "0002-tools") == [(name, sorted(streams.TASKS[name])) for name in ("fruit", "tools")]
    for each, expected in zip(tree["tasks"], result["R"][1], strict=True):
        assert accuracy(lineage, each, scenario="task", task=each["name"]) == expected
        found = answers(lineage, TEXTS, scenario="task", task=each["name"])
        assert set(found) <= set(streams.TASKS[each["name"]])
    assert {"classification", "ewc", "distillation"} <= terms(lineage, "0002-tools")


def test_task_incremental_a_block_that_no_sample_is_of_stays_as_it_is(root: Path, tmp_path: Path) -> None:
    """To the bit: neither another task's loss nor weight decay moves it. Class-incremental, every loss does."""
    trees = [
        settings(root, tmp_path / scenario, "fruit", "tools", scenario=scenario, methods=[], compute=LOCAL)
        for scenario in ("task", "class")
    ]
    ranks.run(run_all, 1, {"trees": trees})
    for scenario, stays in (("task", True), ("class", False)):
        before, after = (weights(tmp_path / scenario, version) for version in VERSIONS[:2])
        same = {name: torch.equal(after[name], value) for name, value in before.items()}
        assert (same["blocks.0.weight"], same["blocks.0.bias"]) == (stays, stays)
        assert not same["encoder.layer.0.attention.self.query.weight"]


def test_domain_incremental_one_block_learns_every_task(root: Path, tmp_path: Path) -> None:
    lineage, names = tmp_path / "lineage", ("good", "bad", "mixed")
    tasks = [task(tmp_path / "data", name, names, seed=seed) for seed, name in enumerate(("books", "films"), start=3)]
    tree = settings(root, lineage, *tasks, scenario="domain")
    (result, _) = ranks.run(run, 2, {"tree": tree})
    assert blocks(lineage, "0002-films") == [("books", sorted(names))]
    assert [accuracy(lineage, each) for each in tasks] == result["R"][1]
    before, after = weights(lineage, "0001-books"), weights(lineage, "0002-films")
    assert before.keys() == after.keys()
    assert not torch.equal(before["blocks.0.weight"], after["blocks.0.weight"])
    assert {"classification", "ewc", "distillation"} <= terms(lineage, "0002-films")
    assert {json.loads(line)["task"] for line in (lineage / "versions/0002-films/memory.jsonl").read_text().splitlines()} == {
        "books",
        "films",
    }


# -------------------------------------------------------------------------------------------------------------------- the methods


def terms(lineage: Path, version: str) -> set[str]:
    """Parts of the loss that are not zero in some step of a stage."""
    return {name for line in steps(lineage, version) for name, value in line["terms"].items() if value}


def test_penalty_and_distillation_are_in_the_loss_from_the_second_task_on(root: Path, tmp_path: Path) -> None:
    assert terms(root / "whole", "0001-fruit") == {"classification"}
    for version in VERSIONS[1:]:
        assert terms(root / "whole", version) == {"classification", "ewc", "distillation"}
        first, *_, last = steps(root / "whole", version)
        assert first["terms"]["ewc"] == 0 < last["terms"]["ewc"]  # it holds the weights that the stage starts from
    (begun,) = [line for line in read_jsonl(root / "whole/work/0003-birds/metrics.jsonl") if line.get("name") == "start"]
    assert (begun["facts"]["new"], begun["facts"]["old"]) == (48, 40)


def test_naive_training_has_one_term_and_strong_consolidation_holds_the_encoder(root: Path, tmp_path: Path) -> None:
    """The same stage from the same weights, without methods and with a penalty that outweighs everything else.

    Not clipped, which would scale both down together and leave the weights that matter less to the other ones' overshoot.
    """
    trees, moved = [], {}
    for name, methods in {"naive": [], "held": [{"name": "ewc", "strength": 1e8}]}.items():
        lineage = shutil.copytree(root / "after" / "0001-fruit", tmp_path / name)
        tree = settings(root, lineage, "fruit", "tools", methods=methods, compute=LOCAL)
        tree["training"] = {**tree["training"], "epochs": 8, "clip_norm": None, "selection": {"keep": "last"}}
        trees.append(tree)
    ranks.run(run_all, 1, {"trees": trees})
    for name in ("naive", "held"):
        before, after = (weights(tmp_path / name, version) for version in VERSIONS[:2])
        change = torch.cat([(after[key] - before[key]).flatten() for key in before if ".layer." in key])
        moved[name] = float(change.abs().mean())
    assert moved["held"] < 0.03 * moved["naive"]
    assert terms(tmp_path / "naive", "0002-tools") == {"classification"}
    assert terms(tmp_path / "held", "0002-tools") == {"classification", "ewc"}


def test_joint_training_starts_from_the_first_encoder_with_all_that_there_was_to_learn(root: Path, tmp_path: Path) -> None:
    """So that nothing of the version before is in it, however that was trained; without it, all of it is."""
    other = settings(root, tmp_path / "other", "fruit", compute=LOCAL)
    other["training"] = {**other["training"], "optimizer": {"learning_rate": 1e-4}}
    ranks.run(run_all, 1, {"trees": [other]})
    lineages, trees = {}, []
    for method in ("joint", "naive"):
        for before in (root / "after" / "0001-fruit", tmp_path / "other"):
            lineage = Path(shutil.copytree(before, tmp_path / method / before.name))
            lineages[method, before.name] = lineage
            methods = [{"name": "joint"}] if method == "joint" else []
            trees.append(settings(root, lineage, "fruit", "tools", methods=methods, compute=LOCAL))
    ranks.run(run_all, 1, {"trees": trees})
    for method, same, examples in (("joint", True, 48 + 32), ("naive", False, 32)):
        one, two = (lineages[method, name] for name in ("0001-fruit", "other"))
        left, right = weights(one, "0002-tools"), weights(two, "0002-tools")
        assert {torch.equal(value, right[name]) for name, value in left.items()} == {same}
        assert [entry["steps"] for entry in ledger(one) if entry["event"] == "trained"][1] == 2 * -(-examples // 12)


# ------------------------------------------------------------------------------------------------------ from fine-tuning, and on


def finetuned(tree: dict[str, Any]) -> dict[str, Any] | None:
    return finetune.main(decode(finetune.Config, tree))


def test_a_fine_tuned_model_is_the_first_version_of_a_stream(root: Path, tmp_path: Path) -> None:
    """Its files as they are, with what the methods of the second task need of the first."""
    lineage, run_folder = tmp_path / "lineage", tmp_path / "run"
    shared = {name: settings(root, lineage)[name] for name in ("training", "compute")}
    tree = streams.finetuning(root / "encoder", run_folder, task(root / "data", "fruit"), **shared)
    (said, _) = ranks.run(finetuned, 2, {"tree": tree})
    (result, _) = ranks.run(run, 2, {"tree": settings(root, lineage, "tools", model={"start": str(run_folder)})})
    entries = ledger(lineage)
    assert (entries[0]["version"], entries[0]["base"], entries[1]["steps"]) == ("0001-fruit", None, 0)
    model = lineage / "versions" / "0001-fruit" / "model"
    assert {file.name: file.read_bytes() for file in model.iterdir()} == {
        file.name: file.read_bytes() for file in (run_folder / "model").iterdir()
    }
    assert result["tasks"] == ["fruit", "tools"]
    assert result["R"][0] == [said["accuracy"]]
    assert terms(lineage, "0002-tools") == {"classification", "ewc", "distillation"}
    assert blocks(lineage, "0002-tools") == [(name, sorted(streams.TASKS[name])) for name in ("fruit", "tools")]


def live(tree: dict[str, Any]) -> list[list[int]]:
    """After each task: engines that are alive, and elements of tensors."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    settle, seen = Stream._settle, []

    def counted(self: Stream, attempt: Any) -> None:
        settle(self, attempt)
        gc.collect()
        engines = [each for each in gc.get_objects() if isinstance(each, DeepSpeedEngine)]
        tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
        seen.append([len(engines), len(tensors), sum(storages.values())])

    Stream._settle = counted  # type: ignore[method-assign]  # in a process of its own
    continual.main(decode(continual.Config, tree))
    return seen


def test_nothing_of_a_stage_is_left_in_memory_when_the_next_one_begins(root: Path, tmp_path: Path) -> None:
    """Six tasks in one process under ZeRO-3."""
    names = [f"task-{number}" for number in range(6)]
    tasks = [task(tmp_path / "data", name, (f"{name}-a", f"{name}-b"), each=6) for name in names]
    compute = {**streams.COMPUTE, "slots": {"micro_batch_tokens": 2048}}
    (seen,) = ranks.run(live, 1, {"tree": settings(root, tmp_path / "lineage", *tasks, gate=None, compute=compute)})
    assert [engines for engines, _, _ in seen] == [0] * 6
    assert seen[5] == seen[1]
