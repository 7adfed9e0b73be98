"""Labelled files: what is read of each format, which examples are used, what is held out, and what a frozen folder promises."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaletrain import durable
from scaletrain.config import decode
from scaletrain.data import curate, labelled
from scaletrain.data.freeze import freeze, thaw
from scaletrain.data.labelled import SPLITS, Example, Labelled, LabelledConfig
from scaletrain.data.tables import content_key
from scaletrain.errors import ConfigError, CorpusError, StorageError

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ROWS = [{"text": f"what is {a} {sign} {b}?", "label": sign} for a in WORDS for b in WORDS for sign in ("plus", "minus")]
"""200 examples of two labels."""


def write(file: Path, rows: Iterable[Any]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


def config(train: Path, **asked: Any) -> LabelledConfig:
    files = {split: [str(asked.pop(split))] for split in SPLITS if split in asked}
    return decode(LabelledConfig, {"train": [str(train)], **files, **asked})


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., Labelled]:
    """``read`` on train rows, with the rows of other splits and settings by name."""

    def make(rows: Iterable[Any], **asked: Any) -> Labelled:
        files = {split: write(tmp_path / f"{split}.jsonl", asked.pop(split)) for split in SPLITS if split in asked}
        return labelled.read(config(write(tmp_path / "train.jsonl", rows), **files, **asked))

    return make


def whole(**asked: Any) -> dict[str, Any]:
    """Settings under which nothing is cut from train."""
    return {"validation_fraction": 0, "gate_fraction": 0, "test_fraction": 0} | asked


# --------------------------------------------------------------------------------------------------------------------- formats

QUOTED = [
    {"text": 'He said "no", twice', "label": "speech"},
    {"text": "a line\nand another", "label": "plain"},
    {"text": "Zürich 苏黎世", "label": "plain"},
]


def test_every_format_gives_the_same_examples(tmp_path: Path) -> None:
    """JSON Lines, a JSON list and CSV, plain and compressed, and Parquet."""
    import pyarrow
    import pyarrow.parquet

    write(tmp_path / "a.jsonl", QUOTED)
    write(tmp_path / "a.jsonl.gz", QUOTED)
    (tmp_path / "a.json").write_text(json.dumps(QUOTED, indent=2), encoding="utf-8-sig")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["label", "text"])
        writer.writeheader()
        writer.writerows(QUOTED)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(QUOTED), tmp_path / "a.parquet")
    wanted = tuple(Example(content_key(row["text"], None, row["label"]), row["text"], None, row["label"]) for row in QUOTED)
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.csv.gz", "a.parquet"):
        assert (name, labelled.read(config(tmp_path / name, **whole())).splits["train"]) == (name, wanted)


def test_a_quotation_mark_in_tsv_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('id\tlabel\tfirst\tsecond\n7\tyes\t"Left open\tand, so on\n8\tno\tplain\t"both"\n')
    columns = {"text": "first", "pair": "second", "key": "id"}
    assert labelled.read(config(tmp_path / "a.tsv", columns=columns, **whole())).splits["train"] == (
        Example("7", '"Left open', "and, so on", "yes"),
        Example("8", "plain", '"both"', "no"),
    )


def test_a_text_longer_than_the_csv_module_allows_is_read(tmp_path: Path) -> None:
    text = "long " * 100_000
    (tmp_path / "a.csv").write_text(f"text,label\n{text},a\nshort,b\n")
    assert labelled.read(config(tmp_path / "a.csv", **whole())).splits["train"][0].text == text


def test_numbers_and_truth_values_are_labels(task: Callable[..., Labelled]) -> None:
    rows = [{"text": str(n), "label": label} for n, label in enumerate((0, 1, True, "1"))]
    assert [one.label for one in task(rows, **whole()).splits["train"]] == ["0", "1", "True", "1"]


def test_a_folder_stands_for_the_files_in_it_and_their_rows_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "2.jsonl.gz", ROWS[2:4])
    write(tmp_path / "parts" / "1.jsonl", ROWS[:2])
    read = labelled.read(config(tmp_path / "parts", **whole()))
    assert [one.text for one in read.splits["train"]] == [row["text"] for row in ROWS[:4]]


GOOD = '{"text": "x", "label": "a"}\n'
BAD_FILES = [
    ("t.jsonl", "", r"t.jsonl: got 'no examples'; a file of examples holds at least one"),
    ("t.csv", "text,label\n", r"t.csv: got 'no examples'"),
    ("t.jsonl", GOOD + "{broken\n", r"t.jsonl, line 2: got '\{broken'; it is not valid JSON"),
    ("t.jsonl", GOOD + '["text"]\n', r"t.jsonl, line 2: got \['text'\]; an example is a JSON object"),
    ("t.jsonl", GOOD + '{"text": 3, "label": "a"}\n', r"t.jsonl, line 2: text: got 3; the column holds text"),
    ("t.jsonl", GOOD + '{"text": "y", "label": 0.5}\n', r"line 2: label: got 0.5; a label is text or a whole number"),
    ("t.jsonl", GOOD + '{"text": "y", "label": null}\n', r"line 2: label: got None; a label is text or a whole number"),
    ("t.jsonl", GOOD + '{"text": "y", "label": " "}\n', r"line 2: label: got ' '; a label is not empty"),
    ("t.jsonl", GOOD + '{"text": "\\ud800", "label": "b"}\n', r"line 2: text: got .*; half of a surrogate pair is no character"),
    ("t.jsonl", GOOD + '{"Sentence": 1, "label": 2}\n', r"there is no column 'text' .*Set data.columns.text to one of them"),
    ("t.csv", "TEXT,label\nx,a\n", r"t.csv, line 2: got 'columns TEXT, label'; .*Set data.columns.text to 'TEXT'"),
    ("t.csv", "text,labels\nx,a\n", r"there is no column 'label' \(data.columns.label\). Set data.columns.label to 'labels'"),
    ("t.csv", "text,label\nx,a\n\ny,b,c\n", r"t.csv, line 4: got '3 fields'; the header names 2 columns"),
    ("t.csv", 'text,label\n"x\ny",a\n"z\nz",b,c\n', r"t.csv, line 4: got '3 fields'"),
    ("t.csv", 'text,label\n"x\ny",a\n"open,b\n', r"t.csv, line 4: got 'unexpected end of data'; it is not valid CSV"),
    ("t.csv", "text,text\nx,a\n", r"t.csv, line 1: got 'text'; the header names every column once"),
    ("t.json", '{"text": "x"}', r"t.json: got 'dict'; a .json file holds one list of objects.*Name it .jsonl"),
    ("t.json", "[\n{}\n, ,]", r"t.json, line 3: got .*; it is not valid JSON"),
    ("t.parquet", "PAR1", r"t.parquet: got .*; a Parquet file that can be read"),
    ("t.txt", "text", r"t.txt: got '.txt'; its name ends in .jsonl, .jsonl.gz, .json"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_file_that_cannot_be_read_says_where_and_why(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=message):
        labelled.read(config(tmp_path / name))


def test_bytes_that_are_no_text_and_a_file_that_is_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"text,label\nx,a\n\xff\xfe,b\n")
    with pytest.raises(CorpusError, match=r"t.csv, after line \d: got .*; text is UTF-8"):
        labelled.read(config(tmp_path / "t.csv"))
    with pytest.raises(CorpusError, match=r"data.gate: got '.*none.jsonl'; an existing file"):
        labelled.read(config(write(tmp_path / "t.jsonl", ROWS), gate=tmp_path / "none.jsonl"))


# ---------------------------------------------------------------------------------------------------------- which rows are used


def test_labels_are_kept_and_dropped_in_all_splits_and_counted(task: Callable[..., Labelled]) -> None:
    rows = [*ROWS, {"text": "hello", "label": "oos"}, {"text": "rain", "label": "weather"}]
    test = [{"text": row["text"] + "!", "label": row["label"]} for row in ROWS[:4]]
    for asked in ({"keep_labels": ["plus", "minus"]}, {"drop_labels": ["weather", "oos"]}):
        read = task(rows, test=[*test, {"text": "bye", "label": "oos"}], validation_fraction=0, gate_fraction=0, **asked)
        assert read.labels == ("minus", "plus")
        assert [read.report[split]["label"] for split in ("train", "test")] == [2, 1]
        assert [len(read.splits[split]) for split in ("train", "test")] == [200, 4]


def test_an_empty_text_is_an_error_with_its_place_or_dropped(task: Callable[..., Labelled]) -> None:
    pairs = [{"text": "a", "text_pair": "b", "label": 0}, {"text": "a", "text_pair": "c", "label": 1}]
    rows = [*pairs, {"text": "a", "text_pair": " \t", "label": 0}, {"text": None, "text_pair": "d", "label": 0}]
    asked = whole(columns={"pair": "text_pair"})
    with pytest.raises(CorpusError, match=r"train.jsonl, line 3: got ' \\t'; a text is neither .*\(2 of 4 examples here are\)"):
        task(rows, **asked)
    read = task(rows, **asked, empty="drop")
    assert [one.pair for one in read.splits["train"]] == ["b", "c"]
    assert read.report["train"]["empty"] == 2


def test_exact_duplicates_of_a_split_count_once(task: Callable[..., Labelled]) -> None:
    read = task([*ROWS[:6], ROWS[2], ROWS[3]], test=[*ROWS[10:12], ROWS[10]], validation_fraction=0, gate_fraction=0)
    assert [one.text for one in read.splits["train"]] == [row["text"] for row in ROWS[:6]]
    assert (read.report["train"]["duplicates"], read.report["test"]["duplicates"]) == (2, 1)


CONFLICT = [{"text": "a", "label": 0}, {"text": "b", "label": 1}, {"text": "c", "label": 0}, {"text": "a", "label": 1}]


def test_a_text_with_two_labels_is_an_error_that_names_both_places(task: Callable[..., Labelled]) -> None:
    message = r"train.jsonl, line 4: got '1'; .*train.jsonl, line 1 gives the same text the label '0' \(2 examples"
    with pytest.raises(CorpusError, match=message):
        task(CONFLICT, **whole())


def test_a_text_with_two_labels_can_be_dropped_or_kept(task: Callable[..., Labelled]) -> None:
    dropped, kept = (task(CONFLICT, **whole(conflicts=way)) for way in ("drop", "keep"))
    assert [one.text for one in dropped.splits["train"]] == ["b", "c"]
    assert (dropped.report["train"]["conflicts"], dropped.report["train"]["contradicted"]) == (2, 0)
    assert [one.text for one in kept.splits["train"]] == ["a", "b", "c", "a"]
    assert (kept.report["train"]["conflicts"], kept.report["train"]["contradicted"]) == (0, 2)


def test_a_key_that_two_rows_of_a_split_have_is_refused(task: Callable[..., Labelled]) -> None:
    rows = [{"text": str(n), "label": n % 2, "id": n} for n in (1, 2, 3, 2)]
    with pytest.raises(CorpusError, match=r"train.jsonl, line 4: got '2'; .*train.jsonl, line 2 has this key as well"):
        task(rows, **whole(columns={"key": "id"}))
    with pytest.raises(CorpusError, match=r"line 1: id: got True; a key is text or a whole number"):
        task([{"text": "a", "label": 0, "id": True}], columns={"key": "id"})


def test_one_label_is_no_task(task: Callable[..., Labelled]) -> None:
    with pytest.raises(CorpusError, match=r"data.train: got 'plus'; a task has at least two labels"):
        task(ROWS[::2])


def test_a_label_that_train_does_not_have_is_named_with_its_place(task: Callable[..., Labelled]) -> None:
    rule = r"validation.jsonl, line 2: got 'pluss'; no example of train has this label. Did you mean 'plus'\?"
    with pytest.raises(CorpusError, match=rule):
        task(ROWS, validation=[ROWS[0], {"text": "x", "label": "pluss"}])


def test_a_file_of_which_nothing_is_left_is_refused(task: Callable[..., Labelled]) -> None:
    with pytest.raises(CorpusError, match=r"data.test: got 'no examples'; none of its examples is left"):
        task(ROWS, test=[{"text": "x", "label": "oos"}], drop_labels=["oos"])


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"keep_labels": ["plus", "minis"]}, r"data.keep_labels: got 'minis'; no example has this label. Did you mean 'minus'\?"),
    ({"drop_labels": ["oos"]}, r"data.drop_labels: got 'oos'; no example has this label. The labels here are: minus, plus"),
    ({"keep_labels": ["plus"], "drop_labels": ["plus"]}, r"data.drop_labels: got 'plus'; data.keep_labels keeps it"),
    (dict.fromkeys((f"{s}_fraction" for s in SPLITS[1:]), 0.4), r"the sum of data.\*_fraction: got 1.2; what is cut"),
    ({"gate_fraction": 0.6}, r"gate_fraction: got 0.6; should be less than or equal to 0.5"),
    ({"gate_fraction": 0.001}, r"data.gate_fraction: got 0.001; of 200 examples in train, this leaves none for gate"),
]


@pytest.mark.parametrize(("asked", "message"), BAD_SETTINGS)
def test_settings_that_cannot_be_meant_are_refused(asked: Mapping[str, Any], message: str, task: Callable[..., Labelled]) -> None:
    with pytest.raises((ConfigError, CorpusError), match=message):
        task(ROWS, **asked)


def test_one_file_for_two_splits_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"data.gate: got '.*t.jsonl'; data.train has it too"):
        labelled.read(config(file, gate=file))


def test_evaluation_examples_that_stand_in_train_are_counted_and_warned_about(task: Callable[..., Labelled]) -> None:
    alike = [{"text": row["text"].upper().replace(" ", "  "), "label": row["label"]} for row in ROWS[:3]]
    fresh = [{"text": f"is it {word}?", "label": "plus"} for word in WORDS]
    with pytest.warns(UserWarning) as caught:
        read = task(ROWS, validation=[*fresh, *alike], gate=[*fresh[:4], {"text": "new", "label": "minus"}], test_fraction=0)
    assert (read.report["validation"]["in_train"], len(read.splits["validation"])) == (3, 13)
    assert (read.report["gate"]["in_train"], read.report["gate"]["in_validation"]) == (0, 4)
    assert [str(one.message).partition(" as well")[0] for one in caught] == [
        "3 of 13 examples of data.validation stand in data.train",
        "4 of 5 examples of data.gate stand in data.validation",
    ]


# ------------------------------------------------------------------------------------------------------------ what is held out


def content(read: Labelled) -> dict[str, frozenset[Example]]:
    return {split: frozenset(examples) for split, examples in read.splits.items()}


def test_every_split_without_a_file_gets_its_share_of_every_label(task: Callable[..., Labelled]) -> None:
    read = task(ROWS, validation_fraction=0.05, gate_fraction=0.1, test_fraction=0.2)
    counted = {split: Counter(one.label for one in examples) for split, examples in read.splits.items()}
    assert counted == {
        split: {"plus": each, "minus": each} for split, each in {"train": 65, "validation": 5, "gate": 10, "test": 20}.items()
    }
    assert read.report["train"]["cut"] == -70
    assert len(set().union(*content(read).values())) == 200


def test_a_split_with_a_file_is_not_cut_and_one_with_share_0_is_empty(task: Callable[..., Labelled]) -> None:
    read = task(ROWS[:100], test=ROWS[100:110], gate_fraction=0, validation_fraction=0.1)
    assert {split: len(examples) for split, examples in read.splits.items()} == {
        "train": 90, "validation": 10, "gate": 0, "test": 10
    }  # fmt: skip


def test_the_order_of_the_files_decides_nothing_but_the_order(task: Callable[..., Labelled]) -> None:
    shuffled = random.Random(3).sample(ROWS, len(ROWS))
    asked = {"limit_per_label": 20}
    one, other = task(ROWS, **asked), task(shuffled, **asked)
    assert content(one) == content(other)
    assert [row["text"] for row in shuffled if row["text"] in {e.text for e in other.splits["train"]}] == [
        example.text for example in other.splits["train"]
    ]


def test_of_duplicates_with_keys_the_lowest_key_stays_in_any_order(task: Callable[..., Labelled]) -> None:
    rows = [{"text": text, "label": text, "id": number} for number, text in enumerate("abab")]
    read = [task(order, **whole(columns={"key": "id"})) for order in (rows, rows[::-1])]
    assert [{one.key for one in each.splits["train"]} for each in read] == [{"0", "1"}, {"0", "1"}]


def test_another_seed_holds_out_other_examples(task: Callable[..., Labelled]) -> None:
    one, same, other = (content(task(ROWS, seed=seed))["test"] for seed in (1, 1, 2))
    assert one == same
    assert len(one & other) < 10


def test_at_most_so_many_examples_of_each_label_stay_in_train(task: Callable[..., Labelled]) -> None:
    """What is held out is the same as without the limit, and a lower limit keeps a part of what a higher one keeps."""
    unlimited, many, few = (task(ROWS, limit_per_label=limit) for limit in (None, 30, 5))
    assert {split: content(few)[split] for split in SPLITS[1:]} == {split: content(unlimited)[split] for split in SPLITS[1:]}
    assert Counter(one.label for one in few.splits["train"]) == {"plus": 5, "minus": 5}
    assert content(few)["train"] < content(many)["train"] < content(unlimited)["train"]
    assert few.report["train"]["limit"] == 130


def test_the_report_adds_up(task: Callable[..., Labelled]) -> None:
    rows = [*ROWS, ROWS[0], {"text": " ", "label": "plus"}, {"text": "x", "label": "oos"}, *CONFLICT]
    read = task(rows, drop_labels=["oos"], empty="drop", conflicts="drop", limit_per_label=50, test=[ROWS[5]] * 2)
    for split, counts in read.report.items():
        left_out = sum(counts[reason] for reason in ("label", "empty", "duplicates", "conflicts", "limit"))
        assert counts["read"] - left_out + counts["cut"] == counts["examples"] == len(read.splits[split])


labels_and_twins = st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 25)), min_size=1, max_size=80, unique=True)
fraction = st.floats(0.01, 0.33)


@given(labels_and_twins, st.tuples(fraction, fraction, fraction), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_a_cut_leaves_every_label_in_train_and_every_twin_with_it(
    drawn: list[tuple[str, int]], shares: tuple[float, float, float], seed: int
) -> None:
    """Of any examples, in any order; and no label gives a split more than its share, rounded up."""
    examples = [Example(f"{label}{number}", f"Text {number % 20}", None, label) for label, number in drawn]
    fractions = dict(zip(SPLITS[1:], shares, strict=True))
    split = curate.cut(examples, fractions, seed)
    backwards = curate.cut(examples[::-1], fractions, seed)[::-1]
    assert backwards == split
    train = [one for one, own in zip(examples, split, strict=True) if own == "train"]
    held_out = [one for one, own in zip(examples, split, strict=True) if own != "train"]
    assert {one.label for one in train} == {one.label for one in examples}
    assert curate.seen(held_out, train) == 0
    sizes = Counter(label for label, _ in drawn)
    for (label, own), count in Counter((one.label, own) for one, own in zip(examples, split, strict=True)).items():
        assert own == "train" or count <= int(sizes[label] * fractions[own]) + 1


@given(st.lists(st.integers(3, 9), min_size=20, max_size=40), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_many_small_labels_give_the_whole_split_its_share(sizes: list[int], seed: int) -> None:
    """Though no label alone has a tenth of an example to give."""
    examples = [Example(f"{a}-{b}", f"{a} {b}", None, f"{a}") for a, size in enumerate(sizes) for b in range(size)]
    counted = Counter(curate.cut(examples, dict.fromkeys(SPLITS[1:], 0.1), seed))
    assert {split: counted[split] for split in SPLITS[1:]} == dict.fromkeys(SPLITS[1:], int(len(examples) / 10 + 0.5))


def numbered(label: str, count: int, text: str = "") -> list[Example]:
    return [Example(f"{label}-{number}", text or f"{label} {number}", None, label) for number in range(count)]


def test_small_labels_take_turns_in_giving_more_than_their_share() -> None:
    examples = [one for label in range(30) for one in numbered(f"{label}", 3)]
    split = curate.cut(examples, dict.fromkeys(SPLITS[1:], 0.1), 1)
    given_by = {name: {one.label for one, own in zip(examples, split, strict=True) if own == name} for name in SPLITS[1:]}
    assert all(len(given_by[one] & given_by[other]) < 9 for one, other in itertools.combinations(given_by, 2))


def test_others_make_up_for_a_label_that_has_nothing_to_give() -> None:
    """Twenty times the same text stays in train whole; ten labels of twelve give fourteen examples between them."""
    examples = [*numbered("same", 20, "Hello"), *(one for label in range(10) for one in numbered(f"{label}", 12))]
    split = curate.cut(examples, {"test": 0.1}, 1)
    assert (split[:20], split.count("test")) == (["train"] * 20, 14)


def test_what_a_limit_keeps_is_not_what_a_cut_would_take() -> None:
    examples = numbered("a", 100)
    taken = {one for one, own in zip(examples, curate.cut(examples, {"test": 0.2}, 1), strict=True) if own == "test"}
    assert len(taken) == 20
    assert len(taken & set(curate.lowest(examples, 20, 1))) < 12


def test_the_majority_is_that_of_train(task: Callable[..., Labelled]) -> None:
    train = [*ROWS[:20], {"text": "and", "label": "plus"}]
    read = task(train, test=[*ROWS[21:24], ROWS[25]], gate_fraction=0, validation_fraction=0)
    assert read.majority("test") == 0.25
    assert read.majority("train") == 11 / 21
    with pytest.raises(CorpusError, match=r"data.gate: got 'no examples'; an accuracy needs some"):
        read.majority("gate")


# -------------------------------------------------------------------------------------------------------------- frozen folders

awkward = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: text.strip() != "")


@given(drawn=st.lists(st.tuples(awkward, st.none() | awkward, st.sampled_from("ab")), max_size=8), number=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_freezing_and_thawing_changes_nothing(
    drawn: list[tuple[str, str | None, str]], number: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also texts with the line breaks of other alphabets, quotes and control characters."""
    examples = tuple(Example(content_key(*one), *one) for one in dict.fromkeys(drawn))
    task = Labelled({split: examples[place:] for place, split in enumerate(SPLITS)}, ("a", "b"), {"train": {"read": number}})
    folder = tmp_path_factory.mktemp("frozen") / "task"
    digest = freeze(task, folder)
    assert thaw(folder) == task
    assert freeze(thaw(folder), folder) == digest


@pytest.fixture
def frozen(task: Callable[..., Labelled], tmp_path: Path) -> tuple[Labelled, Path]:
    read = task(ROWS)
    freeze(read, tmp_path / "lineage" / "task")
    return read, tmp_path / "lineage" / "task"


def test_a_frozen_folder_is_text_that_people_can_read(frozen: tuple[Labelled, Path]) -> None:
    read, folder = frozen
    assert sorted(file.name for file in folder.iterdir()) == [
        "gate.jsonl", "task.json", "test.jsonl", "train.jsonl", "validation.jsonl"
    ]  # fmt: skip
    first = read.splits["train"][0]
    assert json.loads((folder / "train.jsonl").read_text().splitlines()[0]) == {
        "key": first.key, "text": first.text, "pair": None, "label": first.label
    }  # fmt: skip
    folder = folder.with_name("unicode")
    freeze(Labelled({**read.splits, "gate": (Example("k", "苏黎世 Zürich", None, "plus"),)}, read.labels, {}), folder)
    assert (folder / "gate.jsonl").read_text("utf-8") == '{"key": "k", "text": "苏黎世 Zürich", "pair": null, "label": "plus"}\n'


def test_freezing_the_same_again_writes_nothing(frozen: tuple[Labelled, Path]) -> None:
    read, folder = frozen
    before = {file: file.stat().st_mtime_ns for file in [folder, *folder.iterdir()]}
    freeze(read, folder)
    assert {file: file.stat().st_mtime_ns for file in [folder, *folder.iterdir()]} == before


def test_freezing_something_else_names_the_first_difference(frozen: tuple[Labelled, Path], task: Callable[..., Labelled]) -> None:
    read, folder = frozen
    gate = read.splits["gate"]
    other = Labelled({**read.splits, "gate": (*gate[:3], read.splits["test"][0], *gate[4:])}, read.labels, read.report)
    with pytest.raises(CorpusError, match=r"task/gate.jsonl, line 4: got Example\(.*the folder was frozen with Example\("):
        freeze(other, folder)
    shorter = Labelled({**read.splits, "gate": gate[:-1]}, read.labels, read.report)
    with pytest.raises(CorpusError, match=rf"task/gate.jsonl, line {len(gate)}: got None; the folder was frozen with Example"):
        freeze(shorter, folder)
    with pytest.raises(CorpusError, match=r"task/task.json: report: got .*'duplicates': 1"):
        freeze(task([*ROWS, ROWS[0]]), folder)
    assert thaw(folder) == read


@pytest.mark.parametrize("name", [*(f"{split}.jsonl" for split in SPLITS), "task.json"])
def test_thawing_names_a_file_that_was_altered_or_is_missing(name: str, frozen: tuple[Labelled, Path]) -> None:
    file = frozen[1] / name
    good = file.read_text()
    for altered in (good.replace("plus", "minus", 1), good[:-3], ""):
        file.write_text(altered)
        with pytest.raises(CorpusError, match=rf"{name}(: digest)?: got "):
            thaw(frozen[1])
    file.unlink()
    with pytest.raises(CorpusError, match=rf"{name}: got 'No such file or directory'; a frozen task has this file"):
        thaw(frozen[1])


def test_a_folder_frozen_by_another_format_is_refused(frozen: tuple[Labelled, Path]) -> None:
    file = frozen[1] / "task.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CorpusError, match=r"task.json: format: got 2; this program reads format 1"):
        thaw(frozen[1])


def test_a_freeze_that_fails_leaves_no_folder_and_the_next_one_starts_clean(
    frozen: tuple[Labelled, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, folder = frozen[0], frozen[1].with_name("another")
    write_file = durable.write

    def fail_late(path: Path, data: bytes) -> None:
        if path.name == "task.json":
            raise OSError(28, "No space left on device")
        write_file(path, data)

    monkeypatch.setattr(durable, "write", fail_late)
    with pytest.raises(StorageError, match=r"another: got 'No space left on device'"):
        freeze(read, folder)
    assert not folder.exists()
    monkeypatch.undo()
    freeze(read, folder)
    assert thaw(folder) == read
    assert sorted(path.name for path in folder.parent.iterdir()) == ["another", "task"]


# ------------------------------------------------------------------------------------------------------------------- real data


def test_clinc150_without_its_out_of_scope_examples(data_folder: Path, tmp_path: Path) -> None:
    folder = data_folder / "clinc150"
    files = {split: folder / f"{split}.jsonl.gz" for split in ("validation", "test")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = labelled.read(config(folder / "train.jsonl.gz", **files, drop_labels=["oos"], limit_per_label=40))
    assert (len(read.labels), len(read.splits["test"]), read.majority("test")) == (150, 3000, 1 / 150)
    assert set(Counter(one.label for one in read.splits["train"]).values()) == {40}
    assert set(Counter(one.label for one in read.splits["gate"]).values()) == {10}
    freeze(read, tmp_path / "clinc150")
    assert thaw(tmp_path / "clinc150") == read


def test_rte_is_a_task_of_pairs(data_folder: Path) -> None:
    read = labelled.read(config(data_folder / "rte" / "train.jsonl.gz", columns={"pair": "text_pair"}))
    rows = [json.loads(line) for line in gzip.decompress((data_folder / "rte" / "train.jsonl.gz").read_bytes()).splitlines()]
    by_key = {content_key(row["text"], row["text_pair"], row["label"]): row for row in rows}
    everything = [one for examples in read.splits.values() for one in examples]
    assert {one.key for one in everything} == set(by_key)
    assert all((one.text, one.pair) == (by_key[one.key]["text"], by_key[one.key]["text_pair"]) for one in everything)
    assert read.labels == ("entailment", "not_entailment")
