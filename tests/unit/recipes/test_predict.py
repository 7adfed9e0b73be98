"""What a user may get wrong when asking or measuring a classifier: each mistake is named, and nothing is lost."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from scaletrain import cli, dist
from tests import streams
from tests.behaviour.test_finetune import LOCAL, digests, here, training
from tests.behaviour.test_predict import ask, evaluating, json_lines, two_blocks, write_here

ROWS = streams.examples(streams.TASKS["fruit"], 4, 9)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return streams.encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="module")
def done(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning run that has ended."""
    folder = tmp_path_factory.mktemp("done")
    task = streams.task(folder / "data", "fruit")
    here(streams.finetuning(encoder, folder / "run", task, compute=LOCAL, training=training(epochs=0.5)))
    return folder / "run"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"text": "bada"', 'standard input, line 7: got \'{{"text": "bada"\'; it is not valid JSON ('),
        (b'["bada"]', "standard input, line 7: got '[\"bada\"]'; a line is a JSON object."),
        (
            b'{"txt": "bada", "id": 3}',
            "standard input, line 7: got 'columns txt, id'; there is no column 'text' (columns.text). Set columns.text to 'txt'",
        ),
        (b'{"text": " "}', "standard input, line 7: got ' '; the column 'text' holds a text to label."),
        (b'{"text": 3}', "standard input, line 7: got 3; the column 'text' holds a text to label."),
        (b'{"text": "\\ud800"}', "standard input, line 7: got '\\ud800'; the column 'text' holds a text to label."),
        (b'{"text": "\xff"}', "standard input, line 7: got b'\\xff\"}}"),
        (b"[" * 100_000, "standard input, line 7: got '[[["),
    ],
    ids=["no JSON", "no object", "no such column", "no text", "a number", "half a character", "no UTF-8", "too deep"],
)
def test_a_line_that_cannot_be_read_ends_it_before_its_batch_is_answered(done: Path, bad: bytes, message: str) -> None:
    """The first batch of four was answered, and of the second, in which line 7 is, nothing."""
    code, answers, said = ask(done, "lines=json", "batch_size=4", stdin=json_lines(ROWS[:6]) + bad + b"\n" + json_lines(ROWS[7:]))
    assert code == 65
    assert said.startswith(message.format())
    assert answers == ask(done, "batch_size=4", "lines=json", stdin=json_lines(ROWS[:4]))[1]
    assert len(answers) == 4


def test_an_output_file_is_whole_or_as_it_was(done: Path, tmp_path: Path) -> None:
    """Even where it is the input."""
    file = streams.write(tmp_path / "texts.jsonl", [*ROWS, {"text": ""}])
    before = digests(tmp_path)
    code, _, message = ask(done, f"input={file}", f"output={file}")
    assert (code, message.partition(";")[0]) == (65, f"{file}, line 13: got ''")
    assert digests(tmp_path) == before
    streams.write(file, ROWS)
    assert ask(done, f"input={file}", f"output={file}")[0] == 0
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()] == [row["text"] for row in ROWS]


def test_an_input_that_is_not_there_and_an_output_that_cannot_be(done: Path, tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        code, _, message = ask(done, f"input={tmp_path / name}")
        assert (code, message.partition(";")[0]) == (65, f"{tmp_path / name}: got 'No such file or directory'")
    (tmp_path / "file").write_text("")
    code, _, message = ask(done, f"output={tmp_path / 'file' / 'answers.jsonl'}", stdin=b"bada\n")
    assert code == 74
    assert message.startswith(f"output: got '{tmp_path / 'file' / 'answers.jsonl'}'; it cannot be written (")


@pytest.mark.parametrize("kind", ["nothing", "an encoder", "a run that has not ended", "an export"])
def test_what_is_no_classifier_is_refused(done: Path, encoder: Path, tmp_path: Path, kind: str) -> None:
    """By both verbs."""
    going = Path(shutil.copytree(done, tmp_path / "going"))
    shutil.rmtree(going / "model")
    write_here(done, tmp_path / "exported")
    file = streams.write(tmp_path / "rows.jsonl", ROWS)
    places = {
        "nothing": tmp_path / "nowhere",
        "an encoder": encoder,
        "a run that has not ended": going,
        "an export": tmp_path / "exported",
    }
    remedy = "Give a model folder, a fine-tuning run that has ended, or a lineage"
    message = f"model: got '{places[kind]}'; no classifier is there. {remedy}"
    assert ask(places[kind], stdin=b"bada\n") == (65, [], message)
    assert evaluated(evaluating(places[kind], [file], tmp_path / "out", compute=LOCAL)) == (65, message)


def test_a_model_that_is_not_whole_says_nothing(done: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(done, tmp_path / "run"))
    file = run / "model" / "head.safetensors"
    state = load_file(file)
    save_file({**state, "0.bias": state["0.bias"] + 1}, file)
    code, answers, message = ask(run, stdin=b"bada\n")
    assert (code, answers) == (65, [])
    assert message.startswith(f"{file}: got 'altered'; MODEL.json lists it with another content.")


def evaluated(tree: dict[str, Any]) -> tuple[int, str]:
    """The exit code of ``scaletrain evaluate`` on one rank, and its message."""
    file = Path(tree["output"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree))
    try:
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            code = cli.main(["evaluate", "--config", str(file)])
    finally:
        dist.stop()
    return code, stderr.getvalue().partition("error: ")[2].rstrip("\n")


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        (
            {"text": "bada", "label": "appel"},
            {},
            "{file}, line 2: got 'appel'; fruit has been learned with 3 labels: apple, pear, plum. Did you mean 'apple'?",
        ),
        (
            {"text": "bada", "Label": "apple"},
            {},
            "{file}, line 2: got 'columns text, Label'; there is no column 'label' (data.columns.label). "
            "Set data.columns.label to 'Label'",
        ),
        (
            {"text": "bada", "label": "apple"},
            {"task": "fruits"},
            "task: got 'fruits'; the model knows fruit. Name the one that the texts are of",
        ),
        (
            {"text": "bada", "label": "apple"},
            {"compute": {**LOCAL, "max_tokens": 64}},
            "compute.max_tokens: got 64; the encoder has 40 positions. Set it to at most 40",
        ),
    ],
    ids=["a label that was not learned", "another column", "another task", "too many tokens"],
)
def test_what_cannot_be_evaluated_is_refused(
    done: Path, tmp_path: Path, row: dict[str, str], changes: dict[str, Any], message: str
) -> None:
    file = streams.write(tmp_path / "rows.jsonl", [{"text": "mame", "label": "pear"}, row])
    tree = evaluating(done, [file], tmp_path / "out", **{"compute": LOCAL, **changes})
    assert evaluated(tree) == (65, message.format(file=file))
    record = json.loads((tmp_path / "out" / "exit.json").read_text())
    assert (record["code"], record["reason"]) == (65, message.format(file=file))
    assert not (tmp_path / "out" / "report.json").exists()


def test_of_several_tasks_one_must_be_named(done: Path, tmp_path: Path) -> None:
    message = "task: got None; the model knows fruit, tools. Name the one that the texts are of"
    two, file = two_blocks(done, tmp_path / "model"), streams.write(tmp_path / "rows.jsonl", ROWS)
    assert evaluated(evaluating(two, [file], tmp_path / "out", compute=LOCAL)) == (65, message)
    assert ask(two, "scenario=task", stdin=b"bada\n") == (65, [], message)


def test_an_evaluation_does_not_overwrite_what_a_run_has_reported(done: Path, tmp_path: Path) -> None:
    file = streams.write(tmp_path / "rows.jsonl", ROWS)
    before = digests(done)
    code, message = evaluated(evaluating(done, [file], done, compute=LOCAL))
    assert (code, message.partition(";")[0]) == (65, f"output: got '{done}'")
    assert digests(done) == before
