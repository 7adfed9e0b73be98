"""What a fine-tuned classifier says: evaluated on any number of ranks, asked line by line, exported; always the same."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import scaletrain.export as exporting
from scaletrain import cli, dist, model
from scaletrain.config import decode
from scaletrain.data.freeze import freeze, thaw
from scaletrain.model import Block, Classifier, ClassifierConfig
from scaletrain.recipes import evaluate, export
from scaletrain.recipes.starting import open_start
from scaletrain.recipes.student import Student
from tests import ranks, streams
from tests.behaviour.test_finetune import LOCAL, here

FRUIT, TOOLS = ["apple", "pear", "plum"], ["hammer", "saw"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return streams.encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="module")
def fruit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return streams.task(tmp_path_factory.mktemp("fruit"), "fruit")


@pytest.fixture(scope="module")
def test_file(fruit: dict[str, Any]) -> Path:
    """60 labelled texts."""
    return Path(fruit["data"]["test"][0])


@pytest.fixture(scope="module")
def rows(test_file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in test_file.read_text().splitlines()]


@pytest.fixture(scope="module")
def done(encoder: Path, fruit: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning run that has ended, right about most of the test split and not about all."""
    output = tmp_path_factory.mktemp("done") / "run"
    found = here(streams.finetuning(encoder, output, fruit, compute=LOCAL))
    assert 0.5 < found["accuracy"] < 1
    return output


def write_model(classifier: Classifier, tokenizer_folder: Path, folder: Path) -> Path:
    state = {name: weight.detach() for name, weight in classifier.named_parameters()}
    tree = model.describe(classifier)["hf_config"]
    model.write_model(
        folder, hf_config=tree, head=classifier.head, state=state, tokenizer_folder=tokenizer_folder, facts={"made": "by hand"}
    )
    return folder


def two_blocks(source: Path, folder: Path) -> Path:
    """The model folder of a classifier that tells fruit apart, and tools by chance."""
    classifier = open_start(ClassifierConfig(start=str(source))).classifier
    model.grow(classifier, Block("tools", tuple(TOOLS)), seed=5)
    with torch.no_grad():  # an initial block hardly tells texts apart
        next(classifier.blocks[1].parameters()).mul_(30)
    return write_model(classifier, source / "model", folder)


@pytest.fixture(scope="module")
def two_tasks(done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_blocks(done, tmp_path_factory.mktemp("two") / "model")


def plain(folder: Path, texts: Sequence[tuple[str, ...]]) -> list[Tensor]:
    """Logits of each text or pair by itself, from an exported folder, with nothing of ours."""
    spec = json.loads((folder / "classifier.json").read_text())
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    network: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    head = {name: value.float() for name, value in load_file(folder / "classifier.safetensors").items()}
    logits = []
    for text in texts:
        encoded = tokenizer(*text, return_tensors="pt", truncation=True)
        with torch.no_grad():
            output = network(**encoded)
        pooled = output.last_hidden_state.mean(1) if spec["pooling"] == "mean" else output.last_hidden_state[:, 0]
        if spec["pooling"] == "first" and spec["pooler"]:
            pooled = output.pooler_output
        logits.append((pooled @ head["weight"].T + head["bias"])[0])
    return logits


def write(source: Path, output: Path, **changes: Any) -> dict[str, Any]:
    probes = ["bada gubou", "mame", " ".join(streams.WORDS)]
    return export.main(decode(export.Config, {"run": str(source), "output": str(output), "probe_texts": probes, **changes}))


def write_here(source: Path, output: Path, error: float = 0.0, **changes: Any) -> dict[str, Any]:
    """The same without the process that reloads the folder, which takes seconds to start. ``error`` is added to its answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            exporting.proof, "reload", lambda folder, claim: [each + error for each in plain(folder, [(t,) for t in claim.texts])]
        )
        return write(source, output, **changes)


@pytest.fixture(scope="module")
def exported(done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    write_here(done, folder)
    return folder


# ------------------------------------------------------------------------------------------------------------------ evaluation


def evaluation(tree: dict[str, Any]) -> dict[str, Any]:
    """One rank of an evaluation: its figures, and the table of all samples to the bit."""
    tables: list[Any] = []
    score = Student.score

    def recorded(self: Student, examples: Any) -> Any:
        tables.append(score(self, examples))
        return tables[-1]

    Student.score = recorded  # type: ignore[method-assign]
    try:
        result = evaluate.main(decode(evaluate.Config, tree))
    finally:
        Student.score = score  # type: ignore[method-assign]
        dist.stop()
    return {"result": result, "table": tables[0].tobytes().hex()}


def evaluating(source: Path, files: Sequence[Path], output: Path, **changes: Any) -> dict[str, Any]:
    compute = {**streams.COMPUTE, "samples_per_pass": 25}
    tree = {"model": str(source), "files": [str(file) for file in files], "output": str(output), "compute": compute}
    return {**tree, **changes}


def table_of(found: dict[str, Any]) -> Any:
    """[samples, 4]: loss, label, prediction, probability."""
    return np.frombuffer(bytes.fromhex(found["table"])).reshape(-1, 4)


@pytest.fixture(scope="module")
def alone(done: Path, test_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An evaluation by plain PyTorch in one process."""
    compute = {**LOCAL, "samples_per_pass": 25}
    return evaluation(evaluating(done, [test_file], tmp_path_factory.mktemp("alone"), compute=compute))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_an_evaluation_gives_the_same_bits_on_any_number_of_ranks(
    done: Path, test_file: Path, alone: dict[str, Any], tmp_path: Path, world: int
) -> None:
    """Every sample's loss, prediction and probability, under ZeRO-3; on three ranks slots without a sample fill up."""
    first, *others = ranks.run(evaluation, world, {"tree": evaluating(done, [test_file], tmp_path)})
    assert first == alone
    assert others == [{"result": None, "table": alone["table"]}] * (world - 1)


def test_the_scores_are_those_that_plain_transformers_gives(
    rows: list[dict[str, str]], alone: dict[str, Any], exported: Path
) -> None:
    """Each text by itself, the scores counted by hand."""
    logits = plain(exported, [(row["text"],) for row in rows])
    true, said = [row["label"] for row in rows], [FRUIT[int(each.argmax())] for each in logits]
    table = table_of(alone)
    assert [FRUIT[int(column)] for column in table[:, 1]] == true
    assert [FRUIT[int(column)] for column in table[:, 2]] == said
    for row, each, label in zip(table, logits, true, strict=True):
        chances = each.double().softmax(0)
        assert row[0] == pytest.approx(-math.log(chances[FRUIT.index(label)]), abs=1e-5)
        assert row[3] == pytest.approx(float(chances.max()), abs=1e-5)
    f1 = {}
    for label in FRUIT:
        hits = sum(one == other == label for one, other in zip(true, said, strict=True))
        f1[label] = 2 * hits / (true.count(label) + said.count(label))
    accuracy = sum(one == other for one, other in zip(true, said, strict=True)) / len(rows)
    expected = {"accuracy": accuracy, "macro_f1": sum(f1.values()) / 3, "loss": float(table[:, 0].mean())}
    expected["weighted_f1"] = sum(f1[label] * true.count(label) for label in FRUIT) / len(rows)
    assert {name: alone["result"][name] for name in expected} == pytest.approx(expected)


def test_an_evaluation_finds_what_the_run_reported(done: Path, alone: dict[str, Any]) -> None:
    reported = json.loads((done / "report.json").read_text())
    names = ("accuracy", "macro_f1", "weighted_f1", "loss", "examples")
    assert {name: reported[name] for name in names} == pytest.approx({name: alone["result"][name] for name in names})


def test_without_a_slot_multiple_the_predictions_are_the_same(
    done: Path, test_file: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    """Each number of ranks deals its own slots then, and padding differs: so do the last digits."""
    compute = {**streams.COMPUTE, "slots": {"micro_batch_tokens": 256}}
    found = ranks.run(evaluation, 2, {"tree": evaluating(done, [test_file], tmp_path, compute=compute)})[0]
    np.testing.assert_allclose(table_of(found), table_of(alone), rtol=0, atol=1e-5)
    assert (table_of(found)[:, 1:3] == table_of(alone)[:, 1:3]).all()


def in_lineage(done: Path, folder: Path) -> Path:
    """The model and the data of a run where a lineage keeps them, as those of its second task."""
    shutil.copytree(done / "task", folder / "tasks" / "apples")
    data = thaw(done / "task")
    freeze(replace(data, splits={**data.splits, "train": ()}), folder / "tasks" / "fruit")
    found = Path(shutil.copytree(done / "model", folder / "versions" / "0002-fruit" / "model"))
    (found.parent / "evaluation.json").write_text(json.dumps({"tasks": ["apples", "fruit"]}))
    return found


@pytest.mark.parametrize("place", ["run", "model", "lineage", "relative"])
def test_texts_that_the_model_was_trained_on_are_counted_with_a_warning(
    done: Path, fruit: dict[str, Any], test_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """But for case and white space; whether the run, its model folder or a version of a lineage is named."""
    trained = [json.loads(line) for line in Path(fruit["data"]["train"][0]).read_text().splitlines()][:7]
    again = streams.write(tmp_path / "again.jsonl", [{**row, "text": f" {row['text'].title()} "} for row in trained])
    source = {"run": done, "model": done / "model", "lineage": in_lineage(done, tmp_path / "lineage"), "relative": Path("model")}
    monkeypatch.chdir(done)
    tree = evaluating(source[place], [test_file, again], tmp_path / "out", compute=LOCAL)
    with pytest.warns(UserWarning, match=r"^7 of 67 texts stand in the model's training data: they flatter it$"):
        found = evaluation(tree)["result"]
    assert (found["in_train"], found["examples"]) == (7, 67)


def test_a_model_without_its_data_beside_it_cannot_tell(
    done: Path, test_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even right below the root of what can be named."""
    shutil.copytree(done / "model", tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    assert evaluation(evaluating(Path("m"), [test_file], tmp_path / "out", compute=LOCAL))["result"]["in_train"] is None


def test_duplicates_are_evaluated_once_and_counted(
    done: Path, test_file: Path, rows: list[dict[str, str]], alone: dict[str, Any], tmp_path: Path
) -> None:
    again = streams.write(tmp_path / "again.jsonl", rows[:9])
    found = evaluation(evaluating(done, [test_file, again], tmp_path / "out", compute={**LOCAL, "samples_per_pass": 25}))
    assert found["table"] == alone["table"]
    assert found["result"] == {**alone["result"], "duplicates": 9}


def test_the_report_of_an_evaluation_has_every_label_and_the_mistakes(
    done: Path, test_file: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    evaluation(evaluating(done, [test_file], tmp_path, compute=LOCAL))
    report, table = json.loads((tmp_path / "report.json").read_text()), table_of(alone)
    wrong = table[table[:, 1] != table[:, 2]]
    assert sum(mistake["count"] for mistake in report["mistakes"]) == len(wrong) > 0
    for number, row in enumerate(report["labels"]):
        here, said = table[:, 1] == number, table[:, 2] == number
        assert row["label"] == FRUIT[number]
        assert row["support"] == int(here.sum())
        assert (row["precision"], row["recall"]) == pytest.approx(
            ((here & said).sum() / said.sum(), (here & said).sum() / here.sum())
        )


@pytest.mark.parametrize(("scenario", "columns"), [("task", {0, 1, 2}), ("class", {0, 1, 2, 3, 4})])
def test_of_several_tasks_the_scenario_says_which_labels_may_be_predicted(
    two_tasks: Path, test_file: Path, tmp_path: Path, scenario: str, columns: set[int]
) -> None:
    tree = evaluating(two_tasks, [test_file], tmp_path, compute=LOCAL, task="fruit", scenario=scenario)
    assert set(table_of(evaluation(tree))[:, 2].astype(int).tolist()) <= columns
    if scenario == "class":
        assert set(table_of(evaluation(tree))[:, 2].astype(int).tolist()) & {3, 4}


# ------------------------------------------------------------------------------------------------------------------ prediction


def ask(source: Path, *overrides: str, stdin: bytes = b"") -> tuple[int, list[dict[str, Any]], str]:
    """``scaletrain predict``: its exit code, its answers on standard output, and its message."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii"))
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
            code = cli.main(["predict", str(source), *overrides])
    message = errors.getvalue().partition("error: ")[2].rstrip("\n")
    return code, [json.loads(line) for line in out.getvalue().splitlines()], message


def lines(rows: Sequence[dict[str, str]]) -> bytes:
    return "".join(row["text"] + "\n" for row in rows).encode()


def json_lines(rows: Sequence[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def written(file: Path, rows: Sequence[dict[str, str]]) -> Path:
    """The texts, in the format of the file's name."""
    if file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            table = csv.DictWriter(stream, ["id", "text"])
            table.writeheader()
            table.writerows({"id": str(number), "text": row["text"]} for number, row in enumerate(rows))
    else:
        file.write_bytes(lines(rows) if file.suffix == ".txt" else json_lines([{"text": row["text"]} for row in rows]))
    return file


@pytest.fixture(scope="module")
def expected(rows: list[dict[str, str]], alone: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Text, label and probability, as an evaluation has them."""
    table = table_of(alone)
    return [(row["text"], FRUIT[int(said)], chance) for row, said, chance in zip(rows, table[:, 2], table[:, 3], strict=True)]


def assert_says(answers: Sequence[dict[str, Any]], expected: Sequence[tuple[str, str, float]]) -> None:
    assert [(answer["text"], answer["label"]) for answer in answers] == [(text, label) for text, label, _ in expected]
    assert [answer["probability"] for answer in answers] == pytest.approx([chance for *_, chance in expected], abs=1e-5)
    assert all(answer.keys() == {"text", "label", "probability"} for answer in answers)


@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl", "texts.csv"])
def test_the_texts_of_a_file_get_the_labels_that_an_evaluation_finds(
    done: Path, rows: list[dict[str, str]], expected: list[tuple[str, str, float]], tmp_path: Path, name: str
) -> None:
    code, answers, _ = ask(done, f"input={written(tmp_path / name, rows)}")
    assert code == 0
    assert_says(answers, expected)


def test_so_do_the_lines_of_standard_input(
    done: Path, rows: list[dict[str, str]], expected: list[tuple[str, str, float]]
) -> None:
    """As texts, and as JSON objects with a column named otherwise."""
    _, answers, _ = ask(done, stdin=lines(rows))
    assert_says(answers, expected)
    renamed = json_lines([{"sentence": row["text"], "text": "another"} for row in rows])
    _, answers, _ = ask(done, "lines=json", "columns.text=sentence", stdin=renamed)
    assert_says(answers, expected)


def test_and_those_that_are_written_to_a_file(
    done: Path, rows: list[dict[str, str]], expected: list[tuple[str, str, float]], tmp_path: Path
) -> None:
    code, said, _ = ask(done / "model", f"output={tmp_path / 'new' / 'answers.jsonl'}", stdin=lines(rows))
    assert (code, said) == (0, [])
    assert_says([json.loads(line) for line in (tmp_path / "new" / "answers.jsonl").read_text().splitlines()], expected)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["answers.jsonl"]


@pytest.mark.parametrize("size", [1, 7, 60, 100])
def test_the_size_of_a_batch_does_not_change_the_answers(
    done: Path, rows: list[dict[str, str]], expected: list[tuple[str, str, float]], size: int
) -> None:
    assert_says(ask(done, f"batch_size={size}", stdin=lines(rows))[1], expected)


def test_the_most_probable_labels_come_in_order_and_sum_to_one(done: Path, rows: list[dict[str, str]], exported: Path) -> None:
    """``top`` beyond the number of labels gives all of them."""
    chances = [each.softmax(0).tolist() for each in plain(exported, [(row["text"],) for row in rows[:5]])]
    for top in (2, 9):
        for answer, values in zip(ask(done, f"top={top}", stdin=lines(rows[:5]))[1], chances, strict=True):
            found = [(each["label"], each["probability"]) for each in (answer, *answer["others"])]
            best = sorted(zip(FRUIT, values, strict=True), key=lambda pair: -pair[1])[:top]
            assert [label for label, _ in found] == [label for label, _ in best]
            assert [chance for _, chance in found] == pytest.approx([chance for _, chance in best], abs=1e-5)


def test_no_line_is_no_answer(done: Path) -> None:
    assert ask(done) == (0, [], "")


def test_a_text_that_is_longer_than_the_model_is_cut(done: Path, exported: Path) -> None:
    long = " ".join(streams.WORDS)
    (logits,) = plain(exported, [(long,)])
    (answer,) = ask(done, stdin=f"{long}\n".encode())[1]
    assert answer["label"] == FRUIT[int(logits.argmax())]
    assert answer["probability"] == pytest.approx(float(logits.softmax(0).max()), abs=1e-5)


@pytest.fixture(scope="module")
def of_pairs(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """A run on pairs whose order matters, and rows to ask about."""
    folder, files = tmp_path_factory.mktemp("pairs"), {}
    for number, (split, each) in enumerate({"train": 60, "validation": 5, "gate": 5, "test": 10}.items()):
        left, right = (streams.examples(FRUIT, each, 200 + 2 * number + side) for side in (0, 1))
        found = [
            {"first": one["text"], "second": other["text"], "label": one["label"]} for one, other in zip(left, right, strict=True)
        ]
        files[split] = [str(streams.write(folder / f"{split}.jsonl", found))]
    task = {"name": "pairs", "data": {**files, "columns": {"text": "first", "pair": "second"}}}
    here(streams.finetuning(encoder, folder / "run", task, compute=LOCAL))
    return folder / "run", [json.loads(line) for line in Path(files["test"][0]).read_text().splitlines()]


def test_pairs_are_asked_with_both_columns(of_pairs: tuple[Path, list[dict[str, str]]], tmp_path: Path) -> None:
    """From a file and line by line; as the export says, and as an evaluation."""
    source, rows = of_pairs
    write_here(source, tmp_path / "exported")
    logits = plain(tmp_path / "exported", [(row["first"], row["second"]) for row in rows])
    columns = ("columns.text=first", "columns.pair=second")
    table = streams.write(tmp_path / "rows.jsonl", rows)
    tree = evaluating(source, [table], tmp_path / "out", compute=LOCAL, columns={"text": "first", "pair": "second"})
    scored = table_of(evaluation(tree))
    for overrides, stdin in (((f"input={table}",), b""), (("lines=json",), json_lines(rows))):
        _, answers, _ = ask(source, *columns, *overrides, stdin=stdin)
        assert [(answer["text"], answer["pair"]) for answer in answers] == [(row["first"], row["second"]) for row in rows]
        assert [answer["label"] for answer in answers] == [FRUIT[int(each.argmax())] for each in logits]
        assert [answer["label"] for answer in answers] == [FRUIT[int(column)] for column in scored[:, 2]]
        chances = [float(each.softmax(0).max()) for each in logits]
        assert [answer["probability"] for answer in answers] == pytest.approx(chances, abs=1e-5)


def test_of_several_tasks_all_labels_compete_unless_the_task_is_said(two_tasks: Path, rows: list[dict[str, str]]) -> None:
    """The probability is that among the labels that may be the answer."""
    _, everything, _ = ask(two_tasks, "top=5", stdin=lines(rows[:8]))
    for task, labels in (("fruit", FRUIT), ("tools", TOOLS)):
        _, own, _ = ask(two_tasks, "scenario=task", f"task={task}", "top=5", stdin=lines(rows[:8]))
        for answer, whole in zip(own, everything, strict=True):
            every = {(each["task"], each["label"]): each["probability"] for each in (whole, *whole["others"])}
            mine = {each["label"]: each["probability"] for each in (answer, *answer["others"])}
            assert {each["task"] for each in (answer, *answer["others"])} == {task}
            assert mine.keys() == set(labels) and len(every) == 5
            share = sum(every[task, label] for label in labels)
            assert mine == pytest.approx({label: every[task, label] / share for label in labels}, abs=1e-4)
