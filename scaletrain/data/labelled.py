"""A text classification task as data: its files read, checked and split.

Splits: ``train``; ``validation`` chooses the checkpoint; ``gate`` decides whether a model may replace another and is used for
nothing else; ``test`` is what is reported. One without a file is cut from train.
"""

from __future__ import annotations

import difflib
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from scaletrain.data import curate, tables
from scaletrain.data.curate import Row
from scaletrain.data.sources.files import expand
from scaletrain.data.tables import ColumnsConfig, Example
from scaletrain.errors import ConfigError, CorpusError

__all__ = ["SPLITS", "ColumnsConfig", "Example", "Labelled", "LabelledConfig", "read"]

SPLITS = ("train", "validation", "gate", "test")
_CUT_ORDER = ("test", "gate", "validation")
"""Where a label has too few examples for all, the split that figures come from is served first."""

Fraction = Annotated[float, Field(ge=0, le=0.5)]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledConfig:
    """The examples of a task: .jsonl, .json (a list), .csv, .tsv, also .gz, and .parquet."""

    train: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Files, globs, or folders that are searched whole."""
    validation: tuple[Path, ...] = ()
    """For early stopping and the best checkpoint. Empty: cut from train."""
    gate: tuple[Path, ...] = ()
    """For the gate alone. Empty: cut from train."""
    test: tuple[Path, ...] = ()
    """For the figures that are reported. Empty: cut from train."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """Which column holds what."""
    validation_fraction: Fraction = 0.1
    """Share of train that becomes validation where it has no file; 0: there is none."""
    gate_fraction: Fraction = 0.1
    """Share of train that becomes the gate's split where it has no file; 0: there is none."""
    test_fraction: Fraction = 0.1
    """Share of train that becomes test where it has no file; 0: there is none."""
    seed: int = 1
    """Chooses which examples are cut from train, and which are kept under `limit_per_label`."""
    keep_labels: tuple[str, ...] = ()
    """Only examples of these labels are used, in all splits. Empty: of all labels."""
    drop_labels: tuple[str, ...] = ()
    """Examples of these labels are left out of all splits."""
    empty: Literal["error", "drop"] = "error"
    """What to do with an example of which a text is empty or white space."""
    conflicts: Literal["error", "drop", "keep"] = "error"
    """What to do with examples of a split that have the same text and different labels."""
    limit_per_label: Annotated[int, Field(ge=1)] | None = None
    """At most so many examples of each label stay in train, after what is cut from it. Empty: all."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """The examples of a task."""

    splits: Mapping[str, tuple[Example, ...]]
    """All of ``SPLITS``, each in the order of its files; one that is not wanted is empty."""
    labels: tuple[str, ...]
    """The labels of train, sorted."""
    report: Mapping[str, Mapping[str, int]]
    """Split -> what became of its examples, in numbers. ``read`` from files, less those dropped for their ``label``, as
    ``empty``, as ``duplicates`` and for ``conflicts``, plus those ``cut`` from train (negative for train itself), less those
    beyond the ``limit``, are its ``examples``. Of these, ``contradicted`` share a text with another label; ``in_train`` and (of
    the gate) ``in_validation`` have a text that stands there too, but for case and white space."""

    def majority(self, split: str) -> float:
        """Accuracy on a split of always naming the most frequent label of train (the first by name of several).

        Raises CorpusError for a split without examples.
        """
        examples = self.splits[split]
        if not examples:
            raise CorpusError(f"data.{split}", "no examples", "an accuracy needs some", f"Give it a file, or a {split}_fraction")
        times = Counter(example.label for example in self.splits["train"])
        guess = min(times, key=lambda label: (-times[label], label))
        return sum(example.label == guess for example in examples) / len(examples)


def read(config: LabelledConfig) -> Labelled:
    """Read, check and split the files of a task; in whatever order rows stand, the same ones go to the same splits.

    Warns of evaluation examples that stand in train as well. Raises ConfigError for settings that contradict each other or name a
    label that is nowhere, and CorpusError, naming file and line, for examples that cannot be used.
    """
    _check_settings(config)
    rows = {split: _rows(split, config) for split in SPLITS if getattr(config, split)}
    _check_filters(config, rows)
    report = {split: dict.fromkeys(_COUNTS, 0) for split in SPLITS}
    used = {split: _use(own, config, report[split]) for split, own in rows.items()}
    labels = _check_labels(used)
    splits = _split(config, {split: [example for _, example in own] for split, own in used.items()}, report)
    _count_overlaps(splits, report)
    return Labelled(splits, labels, report)


_COUNTS = ("read", "label", "empty", "duplicates", "conflicts", "cut", "limit", "examples", "contradicted")


def _check_settings(config: LabelledConfig) -> None:
    for number, split in enumerate(SPLITS):
        for earlier in SPLITS[:number]:
            if common := set(getattr(config, split)) & set(getattr(config, earlier)):
                rule = f"data.{earlier} has it too, and an example belongs to one split"
                raise ConfigError(f"data.{split}", str(min(common)), rule, "Leave one empty: it is then cut from train")
    if common_labels := set(config.keep_labels) & set(config.drop_labels):
        raise ConfigError("data.drop_labels", min(common_labels), "data.keep_labels keeps it", "Name it in one of them")
    if (total := sum(_fractions(config).values())) >= 1:
        rule = "what is cut from train leaves some of it"
        raise ConfigError("the sum of data.*_fraction", round(total, 6), rule, "Lower them, or give files for some splits")


def _fractions(config: LabelledConfig) -> dict[str, float]:
    """Of the splits that are cut from train."""
    wanted = {split: getattr(config, f"{split}_fraction") for split in _CUT_ORDER if not getattr(config, split)}
    return {split: fraction for split, fraction in wanted.items() if fraction}


def _rows(split: str, config: LabelledConfig) -> list[Row]:
    files = expand([str(path) for path in getattr(config, split)], tables.SUFFIXES, f"data.{split}")
    rows = [row for file in files for row in tables.examples(file, config.columns)]
    if config.columns.key is not None:
        curate.check_keys(rows)
    return rows


def _check_filters(config: LabelledConfig, rows: Mapping[str, Sequence[Row]]) -> None:
    """A label that is kept stands in train and one that is dropped somewhere: anything else is a slip of the pen."""
    in_train = {example.label for _, example in rows["train"]}
    anywhere = {example.label for own in rows.values() for _, example in own}
    for name, known in (("keep_labels", in_train), ("drop_labels", anywhere)):
        for label in getattr(config, name):
            if label not in known:
                raise ConfigError(f"data.{name}", label, "no example has this label", _nearest(label, known))


def _nearest(label: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(label, sorted(known), n=1)
    return f"Did you mean {close[0]!r}?" if close else f"The labels here are: {', '.join(sorted(known)[:20])}"


def _use(rows: list[Row], config: LabelledConfig, counts: dict[str, int]) -> list[Row]:
    """The rows that are used, with the reasons for the others in ``counts``."""
    counts["read"] = len(rows)
    for reason, step in (
        ("label", lambda rows: curate.of_labels(rows, config.keep_labels, config.drop_labels)),
        ("empty", lambda rows: curate.with_text(rows, config.empty)),
        ("duplicates", curate.distinct),
        ("conflicts", lambda rows: curate.consistent(rows, config.conflicts)),
    ):
        kept = step(rows)
        counts[reason], rows = len(rows) - len(kept), kept
    return rows


def _check_labels(used: Mapping[str, Sequence[Row]]) -> tuple[str, ...]:
    """The labels of train, sorted."""
    labels = {example.label for _, example in used["train"]}
    if len(labels) < 2:
        rule = "a task has at least two labels, each with an example in train"
        raise CorpusError(
            "data.train", ", ".join(sorted(labels)) or "no label", rule, "Check data.columns.label, keep_ and drop_labels"
        )
    for split, rows in used.items():
        if not rows:
            rule = "none of its examples is left after data.keep_labels, drop_labels, empty and conflicts"
            raise CorpusError(
                f"data.{split}", "no examples", rule, "Change those settings, or leave it empty to cut it from train"
            )
        for where, example in rows:
            if example.label not in labels:
                remedy = f"{_nearest(example.label, labels)} Or drop it with data.drop_labels"
                raise CorpusError(where, example.label, "no example of train has this label", remedy)
    return tuple(sorted(labels))


def _split(
    config: LabelledConfig, used: Mapping[str, Sequence[Example]], report: Mapping[str, dict[str, int]]
) -> dict[str, tuple[Example, ...]]:
    """Cuts the splits that have no file, and limits what is left of train."""
    fractions = _fractions(config)
    split_of = curate.cut(used["train"], fractions, config.seed)
    pairs = list(zip(used["train"], split_of, strict=True))
    splits = {split: tuple(used.get(split, ())) for split in SPLITS}
    for split in ("train", *fractions):
        splits[split] = tuple(example for example, own in pairs if own == split)
        report[split]["cut"] = len(splits[split]) - len(used.get(split, ()))
        if not splits[split]:
            rule = f"of {len(pairs)} examples in train, this leaves none for {split}"
            remedy = f"Give more examples, or a file for it, or set data.{split}_fraction=0"
            raise CorpusError(f"data.{split}_fraction", fractions[split], rule, remedy)
    if config.limit_per_label is not None:
        before = splits["train"]
        splits["train"] = curate.lowest(before, config.limit_per_label, config.seed)
        report["train"]["limit"] = len(before) - len(splits["train"])
    return splits


def _count_overlaps(splits: Mapping[str, Sequence[Example]], report: Mapping[str, dict[str, int]]) -> None:
    """A text that was trained on says little in an evaluation, and one that chose the checkpoint little at the gate."""
    for split, examples in splits.items():
        report[split]["examples"] = len(examples)
        report[split]["contradicted"] = len(curate.conflicting([("", example) for example in examples]))
    report["gate"]["in_validation"] = 0
    for split, earlier in (*((split, "train") for split in SPLITS[1:]), ("gate", "validation")):
        found = report[split][f"in_{earlier}"] = curate.seen(splits[split], splits[earlier])
        if found:
            part = f"{found} of {len(splits[split])} examples of data.{split} stand in data.{earlier} as well"
            warnings.warn(f"{part}, but for case and white space: figures on them flatter the model", stacklevel=3)


# --------------------------------------------------------------------------------------------------------------- frozen folders
