"""Which of the rows of a task are used, and in which split: pure functions of the examples.

What is held out follows from a hash of the seed and an example's key, so it stays when a file is reordered or prepared again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from scaletrain.data import keyed
from scaletrain.data.tables import Example
from scaletrain.errors import CorpusError

Row = tuple[str, Example]
"""Where an example stands (file and line), and the example."""

Reading = tuple[str, str | None]


def reading(example: Example) -> Reading:
    """The text or texts without case and white space: equal for two examples that only look different."""
    return _plain(example.text), None if example.pair is None else _plain(example.pair)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


# ------------------------------------------------------------------------------------------------------------- rows that are used


def of_labels(rows: Sequence[Row], keep: Collection[str], drop: Collection[str]) -> list[Row]:
    """Rows with a label in ``keep`` (if any is) that is not in ``drop``."""
    return [row for row in rows if (not keep or row[1].label in keep) and row[1].label not in drop]


def with_text(rows: Sequence[Row], empty: Literal["error", "drop"]) -> list[Row]:
    """Rows with something to read in each text. Raises CorpusError at the first other one, unless those are dropped."""
    bare = [row for row in rows if not all(text is None or text.strip() for text in (row[1].text, row[1].pair))]
    if bare and empty == "error":
        where, example = bare[0]
        rule = f"a text is neither empty nor white space ({len(bare)} of {len(rows):,} examples here are)"
        raise CorpusError(
            where, example.pair if example.text.strip() else example.text, rule, "Fill it in, or set data.empty=drop"
        )
    left_out = {where for where, _ in bare}
    return [row for row in rows if row[0] not in left_out]


def distinct(rows: Sequence[Row]) -> list[Row]:
    """One row for each text and label; of several the one with the lowest key, in the place of the first."""
    kept: dict[tuple[str, str | None, str], Row] = {}
    for row in rows:
        content = (row[1].text, row[1].pair, row[1].label)
        if content not in kept or row[1].key < kept[content][1].key:
            kept[content] = row
    return list(kept.values())


def consistent(rows: Sequence[Row], conflicts: Literal["error", "drop", "keep"]) -> list[Row]:
    """Of ``distinct`` rows those whose text has one label only. Raises CorpusError at the first other one if ``error``."""
    if conflicts == "keep":
        return list(rows)
    contradicting = conflicting(rows)
    if contradicting and conflicts == "error":
        (first, one), (where, other), *_ = [row for row in rows if _texts(row[1]) == _texts(contradicting[0][1])]
        rule = f"{first} gives the same text the label {one.label!r} ({len(contradicting)} examples here contradict another)"
        raise CorpusError(where, other.label, rule, "Correct the labels, or set data.conflicts to drop or keep")
    left_out = {where for where, _ in contradicting}
    return [row for row in rows if row[0] not in left_out]


def _texts(example: Example) -> tuple[str, str | None]:
    return example.text, example.pair


def conflicting(rows: Sequence[Row]) -> list[Row]:
    """Rows whose text also has another label."""
    labels: defaultdict[tuple[str, str | None], set[str]] = defaultdict(set)
    for _, example in rows:
        labels[_texts(example)].add(example.label)
    return [row for row in rows if len(labels[_texts(row[1])]) > 1]


def check_keys(rows: Sequence[Row]) -> None:
    """Raises CorpusError for a key that two rows of a split have."""
    places: dict[str, str] = {}
    for where, example in rows:
        first = places.setdefault(example.key, where)
        if first != where:
            rule = f"{first} has this key as well, and keys tell the examples of a split apart"
            raise CorpusError(
                where, example.key, rule, "Give each its own, or leave data.columns.key empty: a hash of the content"
            )


# -------------------------------------------------------------------------------------------------------- splits cut from train


def cut(examples: Sequence[Example], fractions: Mapping[str, float], seed: int) -> list[str]:
    """The split of each example: a name in ``fractions``, or 'train'.

    Every label gives its share to every split, to within one example. Each label keeps at least one example in train, and so does
    a text that occurs more than once: its twin would have shown the answer.
    """
    split = ["train"] * len(examples)
    places, times = _by_label(examples), Counter(map(reading, examples))
    sizes = {label: len(own) for label, own in places.items()}
    free = {}
    for label, own in places.items():
        single = [place for place in own if times[reading(examples[place])] == 1]
        free[label] = _ranked(single, examples, seed, "split")[: len(own) - 1]
    for name, fraction in fractions.items():
        room = {label: len(own) for label, own in free.items()}
        for label, share in _shares(sizes, room, fraction, keyed.key(seed, name)).items():
            for place in free[label][:share]:
                split[place] = name
            free[label] = free[label][share:]
    return split


def _shares(sizes: Mapping[str, int], room: Mapping[str, int], fraction: float, key: int) -> dict[str, int]:
    """How many examples each label gives to a split, so that the split has its share of all of them.

    By the largest remainder: thirty labels of three examples give a tenth together, though none has a tenth of one to give.
    Among equal ones a hash decides, so that it is not the same labels for every split.
    """
    shares = {label: min(int(size * fraction), room[label]) for label, size in sizes.items()}
    missing = int(sum(sizes.values()) * fraction + 0.5) - sum(shares.values())
    able = [label for label in sizes if shares[label] < room[label]]
    able.sort(key=lambda label: (int(sizes[label] * fraction) - sizes[label] * fraction, keyed.key(key, label)))
    for label in able[: max(missing, 0)]:
        shares[label] += 1
    return shares


def lowest(examples: Sequence[Example], per_label: int, seed: int) -> tuple[Example, ...]:
    """At most ``per_label`` examples of each label, those of the lowest keyed hashes, in the order given."""
    kept = {place for own in _by_label(examples).values() for place in _ranked(own, examples, seed, "limit")[:per_label]}
    return tuple(example for place, example in enumerate(examples) if place in kept)


def seen(examples: Sequence[Example], earlier: Sequence[Example]) -> int:
    """How many of the examples have a text that also stands in ``earlier``, but for case and white space."""
    known = set(map(reading, earlier))
    return sum(reading(example) in known for example in examples)


def _by_label(examples: Sequence[Example]) -> dict[str, list[int]]:
    places: defaultdict[str, list[int]] = defaultdict(list)
    for place, example in enumerate(examples):
        places[example.label].append(place)
    return dict(sorted(places.items()))


def _ranked(places: Sequence[int], examples: Sequence[Example], seed: int, purpose: str) -> list[int]:
    """Places by a hash of their example's key, and by the key itself where hashes are equal."""
    return sorted(places, key=lambda place: (keyed.key(seed, purpose, examples[place].key), examples[place].key))
