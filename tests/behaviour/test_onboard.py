"""One more task onto a lineage, from the command line: what can go wrong is named, and what is published stays whole."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from scaletrain import cli, dist
from scaletrain.continual.store import Store
from scaletrain.recipes.onboarding import Onboarding
from tests import ranks, streams

COMPUTE = {**streams.COMPUTE, "engine": {"name": "local"}, "slots": {"micro_batch_tokens": 1024}}
EVENTS = ["begun", "trained", "committed", "evaluated", "judged"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, the data of tasks, and in ``lineage`` what a stream of two of them has made, without doing anything against
    forgetting: both published by a gate that lets much pass."""
    folder = tmp_path_factory.mktemp("onboard")
    streams.encoder(folder / "encoder")
    assert run("continual", stream(folder, folder / "lineage"))[0] == 0
    return folder


@pytest.fixture
def lineage(root: Path, tmp_path: Path) -> Path:
    """A copy of it to be changed."""
    return Path(shutil.copytree(root / "lineage", tmp_path / "lineage"))


def stream(root: Path, output: Path, *names: str, **changes: Any) -> Path:
    """The settings of a stream of tasks, as a file."""
    tasks = [streams.task(root / "data", name) for name in names or ("fruit", "tools")]
    changes = {"compute": COMPUTE, "gate": {"max_drop": 0.9}, **changes}
    return written(output.with_suffix(".yaml"), streams.stream(root / "encoder", output, tasks, **changes))


def written(file: Path, tree: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(tree))
    return file


def birds(root: Path, folder: Path, **changes: Any) -> Path:
    """The third task, as a file."""
    return written(folder / "birds.yaml", {**streams.task(root / "data", "birds"), **changes})


def run(verb: str, *words: str | Path) -> tuple[int, str]:
    """A command in this process: its exit code, and what it said (of a failure, the message)."""
    given = [*(["--config"] if verb == "continual" else []), *map(str, words)]
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()) as stdout:
        try:
            code = cli.main([verb, *given])
        finally:
            dist.stop()  # which a command that failed leaves to the end of the process
    return code, stdout.getvalue() if code == 0 else stderr.getvalue().partition("error: ")[2].rstrip("\n")


def answer(said: str) -> dict[str, Any]:
    """The JSON line at the end."""
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def events(lineage: Path) -> list[str]:
    return [entry["event"] for entry in Store(lineage).entries()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the record of how the last command ended, and who held the lineage last."""
    passing = ("exit.json", "lease-")
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and not f.name.startswith(passing)
    }


def refused(lineage: Path, verb: str, *words: str | Path) -> str:
    """The message of a command that ends with 65, says so in exit.json, and leaves the lineage as it was."""
    before = contents(lineage)
    code, message = run(verb, *words)
    assert code == 65, message
    assert contents(lineage) == before
    record = json.loads((lineage / "exit.json").read_text())
    assert (record["code"], record["reason"]) == (65, message)
    return message


# ----------------------------------------------------------------------------------------------------------- a task and a verdict


def test_a_task_is_learned_once_however_often_it_is_onboarded(root: Path, lineage: Path, tmp_path: Path) -> None:
    task = birds(root, tmp_path)
    code, said = run("onboard", lineage, "--task", task)
    assert code == 0
    found = answer(said)
    assert (found["task"], found["outcome"], found["published"]) == ("birds", "published", "0003-birds")
    assert list(found["test"]) == ["fruit", "tools", "birds"]
    assert events(lineage) == [*EVENTS, "published"] * 3
    assert json.loads((lineage / "exit.json").read_text())["code"] == 0
    before = contents(lineage)
    code, again = run("onboard", lineage, "--task", task)
    assert (code, answer(again)) == (0, found)
    assert contents(lineage) == before
    assert not list(lineage.glob("work/*/checkpoints"))


def test_refused_then_undecided_then_published(root: Path, tmp_path: Path) -> None:
    """Naive training forgets. With the limit where the drop is nothing can be shown; above it, the candidate passes."""
    lineage = tmp_path / "lineage"
    config = stream(root, lineage, gate={"max_drop": 0.05})
    code, message = run("continual", config)
    assert code == 77
    assert "gate: refuse" in message
    assert "tools was not published" in message
    record = json.loads((lineage / "exit.json").read_text())
    assert (record["code"], record["reason"]) == (77, message)
    assert Store(lineage).published() == "0001-fruit"

    before = contents(lineage)
    assert run("continual", config) == (77, message)  # it says it again, and trains nothing
    assert contents(lineage) == before

    drop = Store(lineage).entries()[-2]["verdict"]["tasks"][0]["drop"]
    code, message = run("continual", config, "--retry", f"gate.max_drop={drop}")
    assert (code, json.loads((lineage / "exit.json").read_text())["code"]) == (78, 78)
    assert "gate: undecidable" in message
    assert Store(lineage).published() == "0001-fruit"

    code, said = run("continual", config, "--retry", "gate.max_drop=0.99")
    assert (code, answer(said)["published"]) == (0, "0004-tools")
    entries = Store(lineage).entries()
    assert [entry["base"] for entry in entries if entry["event"] == "begun"] == [None, "0001-fruit", "0001-fruit", "0001-fruit"]
    assert [entry["uses"] for entry in entries if entry["event"] == "judged"][1:] == [
        {"fruit": number, "tools": number - 1} for number in (2, 3, 4)
    ]
    assert len({entry["row"][0] for entry in entries if entry["event"] == "evaluated" and len(entry["row"]) == 2}) == 1


def test_with_on_refusal_continue_the_next_task_builds_on_what_was_refused(root: Path, tmp_path: Path) -> None:
    lineage = tmp_path / "lineage"
    config = stream(root, lineage, "fruit", "tools", "birds", gate={"max_drop": 0.05}, on_refusal="continue")
    code, said = run("continual", config)
    assert code == 0
    found = answer(said)
    assert found["gate"] == {"fruit": "published", "tools": "refused", "birds": "refused"}
    assert [len(row) for row in found["R"]] == [1, 2, 3]
    begun = [entry for entry in Store(lineage).entries() if entry["event"] == "begun"]
    assert [entry["base"] for entry in begun] == [None, "0001-fruit", "0002-tools"]
    assert Store(lineage).published() == found["published"] == "0001-fruit"
    before = contents(lineage)
    assert (run("continual", config)[0], contents(lineage)) == (0, before)
    # What a version has learned is not learned again, and its data stays what it was.
    streams.task(root / "data", "tools", each=50)
    message = refused(lineage, "continual", config, "--retry")
    assert message.startswith("task.name: got 'tools'; version 0003-birds has learned it already")


def test_a_gate_that_comes_later_judges_what_was_published_without_one(root: Path, tmp_path: Path) -> None:
    lineage = tmp_path / "lineage"
    assert run("continual", stream(root, lineage, "fruit", gate=None))[0] == 0
    assert run("continual", stream(root, lineage, gate={"max_drop": 0.05}))[0] == 77
    assert Store(lineage).published() == "0001-fruit"


def test_history_says_what_happened_in_its_order(lineage: Path) -> None:
    code, said = run("history", lineage)
    *lines, result = said.splitlines()
    assert code == 0
    assert [line.split()[1] for line in lines] == events(lineage)
    assert "0002-tools" in lines[6]
    assert "on 0001-fruit" in lines[6]
    assert json.loads(result) == {"published": "0002-tools", "versions": 2}


# --------------------------------------------------------------------------------------------------------------------- going back


def test_a_refused_task_is_tried_again_on_what_it_was_tried_on_before(root: Path, tmp_path: Path) -> None:
    """With ``on_refusal: continue`` the newest candidate is otherwise built on, and that one has learned the task."""
    lineage = tmp_path / "lineage"
    config = stream(root, lineage, gate={"max_drop": 0.05}, on_refusal="continue")
    assert answer(run("continual", config)[1])["gate"] == {"fruit": "published", "tools": "refused"}
    code, said = run("continual", config, "--retry", "gate.max_drop=0.99")
    assert (code, said and answer(said)["published"]) == (0, "0003-tools")
    assert [entry["base"] for entry in Store(lineage).entries() if entry["event"] == "begun"] == [
        None,
        "0001-fruit",
        "0001-fruit",
    ]


def test_a_candidate_that_was_altered_is_not_built_on(root: Path, tmp_path: Path) -> None:
    """It was refused, so that nobody looks at it but the next task."""
    lineage = tmp_path / "lineage"
    settings = {"gate": {"max_drop": 0.05}, "on_refusal": "continue"}
    assert run("continual", stream(root, lineage, **settings))[0] == 0
    assert Store(lineage).published() == "0001-fruit"
    flip(lineage / "versions/0002-tools/model/model.safetensors")
    code, message = run("continual", stream(root, lineage, "fruit", "tools", "birds", **settings))
    assert (code, "0002-tools/model/model.safetensors: got 'another" in message) == (65, True), message
    assert Store(lineage).published() == "0001-fruit"


def test_after_a_rollback_the_next_task_builds_on_what_is_published_again(root: Path, lineage: Path, tmp_path: Path) -> None:
    code, said = run("rollback", lineage)
    assert (code, answer(said)) == (0, {"published": "0001-fruit"})
    code, said = run("onboard", lineage, "--task", birds(root, tmp_path))
    assert (code, answer(said)["published"]) == (0, "0003-birds")
    begun = [entry for entry in Store(lineage).entries() if entry["event"] == "begun"]
    assert begun[-1]["base"] == "0001-fruit"
    head = json.loads((lineage / "versions/0003-birds/model/head.json").read_text())
    assert [block["task"] for block in head["blocks"]] == ["fruit", "birds"]

    # The stream that the lineage began with has nothing left to learn; of R there is what the last model knows.
    code, said = run("continual", stream(root, lineage, "fruit", "tools", "birds"))
    assert code == 0
    found = answer(said)
    assert found["published"] == "0003-birds"
    assert found["tasks"] == ["fruit", "birds"]
    assert [len(row) for row in found["R"]] == [1, 2]
    assert found["R"][1] == begun_row(lineage, "0003-birds")


def begun_row(lineage: Path, version: str) -> list[float]:
    """Accuracy on each task, as the ledger has it of a version."""
    (row,) = (entry["row"] for entry in Store(lineage).entries() if entry["event"] == "evaluated" and entry["version"] == version)
    return list(row)


def test_any_version_that_was_published_can_be_rolled_back_to(lineage: Path) -> None:
    assert answer(run("rollback", lineage)[1]) == {"published": "0001-fruit"}
    code, said = run("rollback", lineage, "--version", "0002-tools")
    assert (code, answer(said)) == (0, {"published": "0002-tools"})
    assert events(lineage)[-2:] == ["rolled back", "rolled back"]
    before = contents(lineage)
    code, message = run("rollback", lineage, "--version", "0003-birds")
    assert (code, message.startswith("version: got '0003-birds'; it must have been published before. 0001-fruit, 0002")) == (
        65,
        True,
    )
    assert contents(lineage) == before


def test_a_rollback_counts_also_where_the_next_task_builds_on_what_was_evaluated_last(root: Path, tmp_path: Path) -> None:
    lineage = tmp_path / "lineage"
    assert run("continual", stream(root, lineage, on_refusal="continue"))[0] == 0
    assert run("rollback", lineage)[0] == 0
    assert run("onboard", lineage, "--task", birds(root, tmp_path))[0] == 0
    begun = [entry for entry in Store(lineage).entries() if entry["event"] == "begun"]
    assert begun[-1]["base"] == "0001-fruit"


def test_what_was_under_way_when_the_lineage_was_rolled_back_is_begun_anew(
    root: Path, lineage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what was rolled back would come back with the next task."""
    task = birds(root, tmp_path)
    interrupt(monkeypatch, "onboard", lineage, "--task", task)
    assert run("rollback", lineage)[0] == 0
    assert run("onboard", lineage, "--task", task)[0] == 0
    begun = [entry for entry in Store(lineage).entries() if entry["event"] == "begun"]
    assert [entry["version"] for entry in begun[-2:]] == ["0003-birds", "0004-birds"]
    assert [entry["base"] for entry in begun[-2:]] == ["0002-tools", "0001-fruit"]
    assert Store(lineage).published() == "0004-birds"
    assert not list(lineage.glob("work/*/checkpoints"))


def interrupt(monkeypatch: pytest.MonkeyPatch, *command: str | Path) -> None:
    """Ctrl-C at the end of the training, before the ledger knows of it."""
    train = Onboarding.train

    def interrupted(self: Onboarding) -> dict[str, Any]:
        train(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Onboarding, "train", interrupted)
        assert run(*map(str, command))[0] == 130  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------------ one at a time


def test_an_onboarding_that_is_under_way_is_finished_with_its_own_settings_only(
    root: Path, lineage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own command, also after others were refused."""
    task = birds(root, tmp_path)
    interrupt(monkeypatch, "onboard", lineage, "--task", task)
    both = stream(root, lineage, "fruit", "tools", "birds")
    for setting in ("training.optimizer.learning_rate=1e-3", "compute.max_tokens=20"):
        message = refused(lineage, "continual", both, setting)
        assert "other settings or data is under way as version 0003-birds" in message
    other = written(tmp_path / "gems.yaml", streams.task(root / "data", "gems", ("ruby", "opal")))
    assert "the task 'birds' is under way as version 0003-birds" in refused(lineage, "onboard", lineage, "--task", other)
    assert run("onboard", lineage, "--task", task)[0] == 0
    assert events(lineage) == [*EVENTS, "published"] * 3


def test_a_first_task_under_way_is_finished_from_the_weights_that_it_began_with(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights under the same path would make another model than the one that its checkpoints are of."""
    encoder, lineage = Path(shutil.copytree(root / "encoder", tmp_path / "encoder")), tmp_path / "lineage"
    config = stream(root, lineage, "fruit", model={"start": str(encoder)})
    interrupt(monkeypatch, "continual", config)
    weights = load_file(encoder / "model.safetensors")
    save_file({**weights, "embeddings.LayerNorm.bias": weights["embeddings.LayerNorm.bias"] + 1}, encoder / "model.safetensors")
    assert refused(lineage, "continual", config).startswith("model.start: got '")
    save_file(weights, encoder / "model.safetensors")
    assert run("continual", config)[0] == 0


def test_an_onboarding_that_is_given_up_makes_way(
    root: Path, lineage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, "onboard", lineage, "--task", birds(root, tmp_path))
    other = written(tmp_path / "gems.yaml", streams.task(root / "data", "gems", ("ruby", "opal")))
    code, said = run("onboard", lineage, "--task", other, "--abandon")
    assert (code, answer(said)["published"]) == (0, "0004-gems")
    code, said = run("onboard", lineage, "--task", birds(root, tmp_path))
    assert (code, answer(said)["published"]) == (0, "0005-birds")
    assert not list(lineage.glob("work/*/checkpoints"))


def onboard_slowly(lineage: str, task: str, gate: str) -> int:
    """An onboarding that says when it trains, and goes on when it is told to."""
    train = Onboarding.train

    def slowly(self: Onboarding) -> dict[str, Any]:
        Path(gate).with_suffix(".reached").touch()
        while not Path(gate).exists():
            time.sleep(0.01)
        return train(self)

    Onboarding.train = slowly  # type: ignore[method-assign]  # in a process of its own
    return os.getpid() if cli.main(["onboard", lineage, "--task", task]) == 0 else 0


def test_a_second_onboarding_is_told_who_is_at_it_and_since_when(root: Path, lineage: Path, tmp_path: Path) -> None:
    """Two processes. The first goes on undisturbed."""
    go, first = tmp_path / "go", []
    arguments = {"lineage": str(lineage), "task": str(birds(root, tmp_path)), "gate": str(go)}
    thread = threading.Thread(target=lambda: first.extend(ranks.run(onboard_slowly, 1, arguments)))
    thread.start()
    try:
        while thread.is_alive() and not go.with_suffix(".reached").exists():
            time.sleep(0.01)
        other = written(tmp_path / "gems.yaml", streams.task(root / "data", "gems", ("ruby", "opal")))
        before = contents(lineage)
        code, message = run("onboard", lineage, "--task", other)
        assert code == 65
        assert run("rollback", lineage) == (65, message.replace("output: ", "lineage: "))
        assert run("history", lineage)[0] == 0
        assert contents(lineage) == before
        assert not (lineage / "exit.json").exists()  # that of the first is still to come
    finally:
        go.touch()
        thread.join()
    assert f"(pid {first[0]}, since 20" in message
    assert "only one job at a time" in message
    assert Store(lineage).published() == "0003-birds"


# ---------------------------------------------------------------------------------------------------------------------- bad input


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda at: flip(at / "versions/0002-tools/model/model.safetensors"), "0002-tools/model/model.safetensors: got 'another"),
        (lambda at: shutil.rmtree(at / "versions/0002-tools/model"), "0002-tools/model/"),
        (lambda at: shutil.rmtree(at / "versions/0002-tools"), "0002-tools: got 'No such file or directory'"),
        (lambda at: (at / "published").unlink(), "published: got 'no such file'; the ledger says that 0002-tools is published"),
        (lambda at: flip(at / "ledger.jsonl"), "ledger.jsonl:"),
        (lambda at: flip(at / "tasks/fruit/gate.jsonl"), "tasks/fruit/gate.jsonl: got "),
    ],
)
def test_a_lineage_that_is_not_whole_is_refused_naming_the_file(
    root: Path, lineage: Path, tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    """By all that would build on it, before anything is changed."""
    damage(lineage)
    before = contents(lineage)
    for words in (
        ["onboard", lineage, "--task", birds(root, tmp_path)],
        ["continual", stream(root, lineage, "fruit", "tools", "birds")],
    ):
        code, message = run(*map(str, words))
        assert (code, named in message) == (65, True), message
    if "tasks/" not in named:
        code, message = run("predict", lineage, f"input={written(tmp_path / 'texts.txt', {})}")
        assert (code, named in message) == (65, True), message
    assert contents(lineage) == before


@pytest.mark.parametrize("kind", ["nothing", "an empty folder", "a fine-tuning run"])
def test_a_folder_that_is_no_lineage_is_not_onboarded_onto(root: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "no-lineage"
    if kind != "nothing":
        folder.mkdir()
    if kind == "a fine-tuning run":
        written(folder / "config.yaml", streams.finetuning(root / "encoder", folder, {"name": "birds", "data": {}}))
    before = contents(folder)
    code, message = run("onboard", folder, "--task", birds(root, tmp_path))
    assert code == 65
    assert message.startswith(f"lineage: got '{folder}'; a lineage is a folder with a ledger.jsonl")
    assert contents(folder) == before
    assert folder.exists() == (kind != "nothing")


def test_a_gate_split_that_cannot_decide_is_refused_before_training_and_may_be_mended(
    root: Path, lineage: Path, tmp_path: Path
) -> None:
    """It would leave every later task undecided. With more examples in the same file, the same command goes on."""
    gate = streams.write(tmp_path / "gate.jsonl", streams.examples(("crow", "owl"), 1, seed=5))
    tree = streams.task(root / "data", "birds")
    task = written(tmp_path / "birds.yaml", {**tree, "data": {**tree["data"], "gate": [str(gate)]}})
    (lineage / "config.yaml").write_text((lineage / "config.yaml").read_text().replace("max_drop: 0.9", "max_drop: 0.5"))
    before = contents(lineage / "versions"), events(lineage)
    code, message = run("onboard", lineage, "--task", task)
    assert code == 65
    assert "gate split of task birds: got '2 examples'" in message
    assert "Give it 3 " in message
    assert (contents(lineage / "versions"), events(lineage)) == before
    assert not (lineage / "work/0003-birds").exists()
    streams.write(gate, streams.examples(("crow", "owl", "wren"), 20, seed=5))
    code, message = run("onboard", lineage, "--task", task)
    assert events(lineage)[len(before[1]) :][:4] == EVENTS[:4], message


@pytest.mark.parametrize("split", ["validation", "gate", "test"])
def test_labels_that_training_has_not_are_named_with_file_and_line(root: Path, lineage: Path, tmp_path: Path, split: str) -> None:
    tree = streams.task(root / "data", "birds")
    foreign = streams.write(tmp_path / "foreign.jsonl", [*streams.examples(("crow",), 3, 1), {"text": "ba be", "label": "eagle"}])
    task = written(tmp_path / "birds.yaml", {**tree, "data": {**tree["data"], split: [str(foreign)]}})
    message = refused(lineage, "onboard", lineage, "--task", task)
    assert "eagle" in message
    assert "foreign.jsonl" in message
    assert "4" in message.partition("foreign.jsonl")[2][:12]


def test_tasks_of_one_domain_have_one_set_of_labels(root: Path, tmp_path: Path) -> None:
    """Said before the first of them is trained."""
    lineage = tmp_path / "lineage"
    code, message = run("continual", stream(root, lineage, scenario="domain"))
    assert code == 65
    assert "hammer" in message
    assert events(lineage) == []
    assert not (lineage / "versions").exists()


def test_one_name_is_one_task(root: Path, lineage: Path, tmp_path: Path) -> None:
    code, message = run("continual", stream(root, tmp_path / "twice", "fruit", "tools", "fruit"))
    assert (code, message.startswith("tasks.2.name: got 'fruit'; another task of the stream has it")) == (65, True), message
    assert not (tmp_path / "twice").exists()
    # A name that the lineage knows is that task, whatever is in the files by now.
    other = written(tmp_path / "fruit.yaml", streams.task(tmp_path / "data", "fruit", ("date", "fig")))
    before = contents(lineage)
    code, said = run("onboard", lineage, "--task", other)
    assert (code, answer(said)["outcome"]) == (0, "published")
    assert said.startswith("fruit: published before; nothing is trained\n")
    assert contents(lineage) == before


def test_what_was_rolled_back_can_be_learned_again(root: Path, lineage: Path) -> None:
    """As a new version, and only where that is asked for."""
    assert run("rollback", lineage)[0] == 0
    command = ("onboard", lineage, "--task", written(lineage.parent / "tools.yaml", streams.task(root / "data", "tools")))
    code, said = run(*command)
    assert code == 0
    assert said.startswith(
        "tools: published before, but it was rolled back since (--retry learns it again); nothing is trained\n"
    )
    code, said = run(*command, "--retry")
    assert (code, answer(said)["published"]) == (0, "0003-tools")
    # What is published has learned it now: there is nothing to try again.
    before = contents(lineage)
    code, said = run(*command, "--retry")
    assert (code, said.partition("\n")[0]) == (0, "tools: published before; nothing is trained")
    assert contents(lineage) == before


def test_methods_that_cannot_work_together_are_refused_by_every_verb(root: Path, lineage: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load((lineage / "config.yaml").read_text())
    written(lineage / "config.yaml", {**tree, "methods": [{"name": "joint"}, {"name": "replay", "capacity": 10}]})
    before = contents(lineage)
    code, message = run("onboard", lineage, "--task", birds(root, tmp_path))
    assert (code, "`joint` stands alone" in message) == (65, True), message
    assert contents(lineage) == before


@pytest.mark.parametrize(("setting", "was"), [("scenario=task", "'class'"), ("model.pooling=first", "None")])
def test_what_the_versions_of_a_lineage_have_in_common_cannot_change(root: Path, lineage: Path, setting: str, was: str) -> None:
    message = refused(lineage, "continual", stream(root, lineage, "fruit", "tools", "birds"), setting)
    assert f"this lineage was begun with {was}" in message


def test_a_fine_tuned_model_is_adopted_by_a_new_lineage_only(root: Path, lineage: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(lineage / "tasks/tools", run_folder / "task")
    shutil.copytree(lineage / "versions/0001-fruit/model", run_folder / "model")
    written(run_folder / "config.yaml", {"task": {"name": "nuts"}})
    message = refused(lineage, "continual", stream(root, lineage, "fruit", "tools", "birds"), f"model.start={run_folder}")
    assert message.startswith(f"model.start: got '{run_folder}'; it has learned 'nuts', and this lineage was begun with 'fruit'")


def test_a_limit_of_the_gate_is_on_a_task_that_there_is(root: Path, lineage: Path, tmp_path: Path) -> None:
    """Of the stream, or of the lineage: a misspelt one would guard nothing."""
    config = stream(root, lineage, "tools", "birds", gate={"max_drop": 0.9, "tasks": {"fruits": {"floor": 0.1}}})
    message = refused(lineage, "continual", config)
    assert message == "gate.tasks.fruits: got 'fruits'; no task has this name. Did you mean fruit?"
    limits = {"fruit": {"max_drop": 0.95}, "birds": {"floor": 0.01}}
    code, said = run("continual", stream(root, lineage, "tools", "birds", gate={"max_drop": 0.9, "tasks": limits}))
    assert (code, answer(said)["published"]) == (0, "0003-birds")
    # A limit on a task that comes later in the stream is no obstacle to another one.
    assert run("rollback", lineage)[0] == 0
    text = (lineage / "config.yaml").read_text()
    (lineage / "config.yaml").write_text(text.replace("    birds:", "    cats:"))
    other = written(tmp_path / "gems.yaml", streams.task(root / "data", "gems", ("ruby", "opal")))
    assert run("onboard", lineage, "--task", other)[0] == 0


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Texts of these tasks are made of few words, and some stand in two splits."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*stand in.*")
        yield
