"""What a user may get wrong when fine-tuning: each mistake is named, its exit code says whose it is, and nothing is lost."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from scaletrain import cli, dist
from scaletrain.config import decode
from scaletrain.recipes import pretrain
from tests import ranks, streams, tiny
from tests.behaviour.test_finetune import LOCAL, here, training
from tests.behaviour.test_pretrain import losses


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return streams.encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="module")
def done(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning run that has ended."""
    folder = tmp_path_factory.mktemp("done")
    task = streams.task(folder / "data", "fruit")
    here(streams.finetuning(encoder, folder / "run", task, compute=LOCAL, training=training(epochs=0.2)))
    return folder / "run"


def ended(argv: list[str]) -> tuple[int, str]:
    """The exit code of a command on one rank, and its message: what stands in stderr from "error: " on."""
    try:
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            code = cli.main(argv)
    finally:
        dist.stop()  # a command that failed leaves its process group to the end of the process, which here is that of all tests
    return code, stderr.getvalue().partition("error: ")[2].rstrip("\n")


def command(tree: dict[str, Any], *overrides: str) -> list[str]:
    file = Path(tree["output"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree))
    return ["finetune", "--config", str(file), *overrides]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a run folder but the record of how the last start ended."""
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in folder.rglob("*")
        if f.is_file() and not f.name.startswith(("exit.json", "lease-"))
    }


def refused(tree: dict[str, Any], *overrides: str) -> str:
    """The message of a run that ends with 65, is on record, and leaves the run folder as it was; its first line."""
    output = Path(tree["output"])
    before = contents(output)
    code, message = ended(command(tree, *overrides))
    assert code == 65, message
    assert contents(output) == before
    record = json.loads((output / "exit.json").read_text())
    first, *others = message.split("\n  ")
    assert (record["code"], record["reason"].splitlines()) == (65, [first, *others])
    return first


def fresh(encoder: Path, folder: Path) -> dict[str, Any]:
    """The settings of a run of two steps on a task of its own."""
    task = streams.task(folder / "data", "fruit")
    return streams.finetuning(encoder, folder / "run", task, compute=LOCAL, training=training(epochs=0.2))


ROWS = streams.examples(("apple", "pear"), 10, 3)


@pytest.mark.parametrize(
    ("split", "rows", "message"),
    [
        (
            "train",
            [row for row in ROWS if row["label"] == "apple"],
            "data.train: got 'apple'; a task has at least two labels, each with an example in train. "
            "Check data.columns.label, keep_ and drop_labels",
        ),
        (
            "test",
            [*ROWS, {"text": "bada", "label": "grape"}],
            "{test}, line 21: got 'grape'; no example of train has this label. "
            "Did you mean 'apple'? Or drop it with data.drop_labels",
        ),
        (
            "train",
            [*ROWS, {"text": " ", "label": "pear"}],
            "{train}, line 21: got ' '; a text is neither empty nor white space (1 of 21 examples here are). "
            "Fill it in, or set data.empty=drop",
        ),
        (
            "validation",
            [{"text": row["text"], "Labels": row["label"]} for row in ROWS],
            "{validation}, line 1: got 'columns text, Labels'; there is no column 'label' (data.columns.label). "
            "Set data.columns.label to 'Labels'",
        ),
    ],
    ids=["one class", "a label that was not learned", "an empty text", "another column"],
)
def test_examples_that_cannot_be_learned_are_refused_by_file_and_line(
    encoder: Path, tmp_path: Path, split: str, rows: list[dict[str, str]], message: str
) -> None:
    tree = fresh(encoder, tmp_path)
    files = {name: tree["task"]["data"][name][0] for name in ("train", "validation", "gate", "test")}
    streams.write(Path(files[split]), rows)
    assert refused(tree) == message.format(**files)
    assert contents(tmp_path / "run") == {}


def test_examples_that_cannot_be_learned_end_every_rank(encoder: Path, tmp_path: Path) -> None:
    tree = fresh(encoder, tmp_path) | {"compute": streams.COMPUTE}
    streams.write(Path(tree["task"]["data"]["test"][0]), [{"text": "bada", "label": "grape"}])
    first, second = ranks.run(ended, 2, {"argv": command(tree)})
    assert first[0] == second[0] == 65
    assert second[1] == f"reading the task's examples failed on rank 0: CorpusError: {first[1]}"


def test_duplicates_are_dropped_and_counted(encoder: Path, tmp_path: Path) -> None:
    """In the frozen data and in the record of the model; an evaluation text that was trained on is counted, with a warning."""
    tree = fresh(encoder, tmp_path)
    streams.write(Path(tree["task"]["data"]["train"][0]), [*ROWS, *ROWS[:4], ROWS[0]])
    rows = [*streams.examples(("apple", "pear"), 5, 4), {**ROWS[2], "text": f" {ROWS[2]['text'].upper()}"}]
    for split in ("validation", "gate", "test"):
        streams.write(Path(tree["task"]["data"][split][0]), rows)
    with pytest.warns(UserWarning, match=r"1 of 11 examples of data\.test stand in data\.train as well"):
        here(tree)
    counts = json.loads((tmp_path / "run" / "task" / "task.json").read_text())["report"]
    assert (counts["train"]["read"], counts["train"]["duplicates"], counts["train"]["examples"]) == (25, 5, 20)
    assert (counts["test"]["in_train"], counts["gate"]["in_validation"]) == (1, 11)
    assert json.loads((tmp_path / "run" / "model" / "MODEL.json").read_text())["facts"]["data"] == counts


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.selection.metric=f1",
            "training.selection.metric: got 'f1'; should be 'accuracy', 'macro_f1', 'weighted_f1' or 'loss'",
        ),
        ("task.data.columns.texts=a", "task.data.columns.texts: got 'a'; no such setting. Did you mean task.data.columns.text?"),
        ("training.epoch=2", "training.epoch: got 2; no such setting. Did you mean training.epochs?"),
    ],
)
def test_a_setting_that_cannot_be_read_ends_before_the_run_folder_is_made(
    encoder: Path, tmp_path: Path, override: str, message: str
) -> None:
    assert ended(command(fresh(encoder, tmp_path), override)) == (65, message)
    assert not (tmp_path / "run").exists()


def test_more_tokens_than_the_encoder_has_positions_are_refused(encoder: Path, tmp_path: Path) -> None:
    code, message = ended(command(fresh(encoder, tmp_path), "compute.max_tokens=41"))
    assert (code, message) == (65, "compute.max_tokens: got 41; the encoder has 40 positions. Set it to at most 40")


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_a_start_that_is_nothing_is_refused(encoder: Path, tmp_path: Path, kind: str) -> None:
    start = tmp_path / "start"
    if kind == "empty":
        start.mkdir()
    code, message = ended(command(fresh(encoder, tmp_path), f"model.start={start}"))
    assert code == 65
    assert message.startswith(f"model.start: got '{start}'; no configuration can be read: ")
    assert message.endswith("Check the folder or the name (HF_HUB_OFFLINE keeps to what is on disk)")


@pytest.mark.parametrize("file", ["model.safetensors", "head.safetensors", "head.json", "tokenizer.json", "MODEL.json"])
@pytest.mark.parametrize("of_run", [False, True])
def test_a_model_that_is_not_whole_is_refused_as_a_start(
    encoder: Path, done: Path, tmp_path: Path, file: str, of_run: bool
) -> None:
    """One bit of it, or all of its description; by its own folder and by that of its run."""
    start = Path(shutil.copytree(done, tmp_path / "start"))
    damaged = start / "model" / file
    if file == "MODEL.json":
        damaged.unlink()
    else:
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 1
        damaged.write_bytes(data)
    code, message = ended(command(fresh(encoder, tmp_path), f"model.start={start if of_run else start / 'model'}"))
    assert code == 65
    assert message.startswith(f"{damaged}: got ")
    if file != "MODEL.json":
        assert "got 'altered'; MODEL.json lists it with another content. Restore the folder, or write it again" in message


def test_a_fine_tuning_that_has_not_ended_is_no_start(encoder: Path, done: Path, tmp_path: Path) -> None:
    start = Path(shutil.copytree(done, tmp_path / "start"))
    shutil.rmtree(start / "model")
    assert ended(command(fresh(encoder, tmp_path), f"model.start={start}")) == (
        65,
        f"model.start: got '{start}'; it is a fine-tuning run without a model: it has not ended yet. "
        "The command that began it continues it; its end writes the model",
    )


ELSE = "Use the settings of that run, another output folder, or --fresh."


@pytest.fixture
def finished(encoder: Path, tmp_path: Path) -> dict[str, Any]:
    """The settings of a run that has taken both its steps."""
    tree = fresh(encoder, tmp_path)
    here(tree)
    return tree


@pytest.mark.parametrize(
    ("override", "mine", "theirs"),
    [
        ("seed=2", "'2'", "'1'"),
        ("training.batch_size=6", "'6'", "'12'"),
        ("training.selection.metric=loss", "'loss'", "'accuracy'"),
        ("training.selection.keep=last", "'last'", "'best'"),
        ("task.name=other", "'other'", "'fruit'"),
        ("task.data.limit_per_label=5", "'5'", "'None'"),
        ("task.data.conflicts=drop", """"'drop'\"""", """"'keep'\""""),
        ("model.pooling=first", "'first'", "'mean'"),
    ],
)
def test_a_run_that_was_started_with_other_settings_is_not_continued(
    finished: dict[str, Any], override: str, mine: str, theirs: str
) -> None:
    last = f"{finished['output']}/checkpoints/step-00000002"
    message = f"{override.partition('=')[0]}: got {mine}; the checkpoint {last} was written with {theirs}. {ELSE}"
    assert refused(finished, override) == message


@pytest.mark.parametrize(
    ("override", "mine", "theirs"),
    [
        ("compute.slots.micro_batch_tokens=64", "64", "128"),
        ("compute.slots.slot_multiple=8", "8", "4"),
        ("model.layout=unpadded", "'unpadded'", "'padded'"),
    ],
)
def test_what_a_slot_holds_stays_as_it_was_at_the_start(finished: dict[str, Any], override: str, mine: str, theirs: str) -> None:
    rule = f"this run was started with {theirs}, and what a slot holds follows from it"
    remedy = "Set it back, or start again in another folder"
    said = override.partition("=")[0].removeprefix("compute.")
    assert refused(finished, override) == f"{said}: got {mine}; {rule}. {remedy}"


def test_a_run_that_is_past_the_end_that_it_is_given_is_not_continued(finished: dict[str, Any]) -> None:
    rule = f"the run in {finished['output']} has taken 2 steps already, and these are 1"
    remedy = "Set more, another output folder, or --fresh."
    assert refused(finished, "training.epochs=0.1") == f"training.epochs: got 0.1; {rule}. {remedy}"


def test_a_run_that_was_started_from_another_encoder_is_not_continued(done: Path, finished: dict[str, Any]) -> None:
    pattern = r"model\.start: got '[0-9a-f]{64}'; the checkpoint .*step-00000002 was written with '[0-9a-f]{64}'\. "
    assert re.fullmatch(pattern + re.escape(ELSE), refused(finished, f"model.start={done}"))


def test_a_longer_run_continues_a_shorter_one(finished: dict[str, Any]) -> None:
    assert ended(command(finished, "training.epochs=0.4")) == (0, "")
    assert len(losses(Path(finished["output"]))) == 4


def test_fresh_starts_again_with_other_data_and_loses_nothing(finished: dict[str, Any]) -> None:
    output = Path(finished["output"])
    before = contents(output)
    assert ended([*command(finished, "seed=2", "task.data.limit_per_label=8"), "--fresh"]) == (0, "")
    aside = {name.replace(".before-fresh-1", ""): data for name, data in contents(output).items() if ".before-fresh-1" in name}
    del before["config.yaml"]
    assert aside == before
    assert len((output / "task" / "train.jsonl").read_text().splitlines()) == 24


def test_the_folder_of_a_pretraining_run_is_not_taken(encoder: Path, tmp_path: Path) -> None:
    settings = tiny.settings(tiny.corpus(tmp_path), tmp_path / "run", steps=1, engine={"name": "local"})
    try:
        pretrain.main(decode(pretrain.Config, settings))
    finally:
        dist.stop()
    message = f"output: got '{tmp_path / 'run'}'; it holds a run of another kind. Choose another output folder"
    assert refused(fresh(encoder, tmp_path)) == message


def test_examples_that_were_altered_after_they_were_frozen_are_not_learned_on(finished: dict[str, Any]) -> None:
    file = Path(finished["output"]) / "task" / "train.jsonl"
    file.write_text(file.read_text().replace("apple", "pear"))
    assert refused(finished).startswith(f"{file}: got ")
