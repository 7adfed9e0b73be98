"""Near duplicates: found as their Jaccard similarity says, the first one stays, the same ones however the work is split."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaletrain import config
from scaletrain.data import encode
from scaletrain.data.dataset import Dataset
from scaletrain.data.duplicates import MinHashConfig, NearDuplicates, Signer, bands, shingles
from scaletrain.data.journal import Log
from scaletrain.data.parts import Part, merge, prepare_part
from scaletrain.data.prepare import PrepareConfig, prepare
from scaletrain.data.shards import ShardWriter
from scaletrain.errors import ConfigError, CorpusError
from scaletrain.recipes.prepare import summary
from tests.preparing import contents

REAL_RUN = encode.run
CHINESE = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈"


def text(seed: int, kind: str = "words") -> str:
    """80 words, or 120 Chinese characters."""
    chosen = random.Random(seed)
    if kind == "chinese":
        return "".join(chosen.choice(CHINESE) for _ in range(120))
    return " ".join("".join(chosen.choice("etaoinshrdlu") for _ in range(chosen.randint(2, 9))) for _ in range(80))


def changed(original: str, seed: int, share: float) -> str:
    """The text with a share of its characters, in one run, replaced by others."""
    chosen, count = random.Random(seed), round(share * len(original))
    at = chosen.randint(0, len(original) - count)
    return original[:at] + "".join(chosen.choice("xyzjq") for _ in range(count)) + original[at + count :]


def jaccard(one: str, other: str, size: int = 5) -> float:
    """Of the sets of runs of characters, without any hash."""
    sets = [{each.lower()[at : at + size] for at in range(len(each) - size + 1)} for each in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """150 originals, English and Chinese; of every third one a copy that is changed by 1, 4, 7, 10 or 30 %, further below."""
    originals = [text(number, "chinese" if number % 2 else "words") for number in range(150)]
    copies = [changed(original, 1, (0.01, 0.04, 0.07, 0.1, 0.3)[at % 5]) for at, original in enumerate(originals[::3])]
    (tmp_path / "corpus.txt").write_text("\n".join([*originals, *copies, originals[7], copies[3].upper()]))
    return tmp_path / "corpus.txt"


@pytest.fixture
def settings(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PrepareConfig]:
    """With small batches, which are encoded in this process."""

    def run(recipe: encode.Recipe, batches: Iterable[encode.Batch], processes: int) -> Iterator[encode.Encoded]:
        return map(encode.Encoder(recipe).encode, batches)

    monkeypatch.setattr(encode, "run", run)
    monkeypatch.setattr("scaletrain.data.splits.run", run)
    monkeypatch.setattr("scaletrain.data.batches._BATCH_DOCUMENTS", 13)

    def made(output: str, **changes: Any) -> PrepareConfig:
        tree: dict[str, Any] = {
            "source": {"name": "text", "paths": [str(corpus)], "document": "line"},
            "validation_fraction": 0.2,
            "deduplicate": {"name": "minhash"},
            "tokenizer": {"name": "wordpiece", "vocab_size": 300},
            "chunks_per_shard": 40,
        }
        return config.decode(PrepareConfig, tree | {"output": str(tmp_path / output)} | changes)

    return made


def dropped(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_bytes().splitlines()]


def test_near_duplicates_are_those_that_the_similarity_says(
    settings: Callable[..., PrepareConfig], corpus: Path, tmp_path: Path
) -> None:
    """Against the exact similarity of all pairs; what is close to the threshold may fall to either side."""
    report = prepare(settings("out"))
    texts, lines = corpus.read_text().splitlines(), dropped(tmp_path / "out")
    near = {line["document"]: line for line in lines if line["reason"] == "near_duplicate"}
    for number, line in near.items():
        similarity = jaccard(texts[number], texts[line["of"]["document"]])
        assert line["of"]["document"] < number or line["split"] == "validation"
        assert abs(line["jaccard"] - similarity) < 0.15
        assert line["jaccard"] >= 0.8
    pairs = {(3 * at, 150 + at) for at in range(50)} | {(9, 201)}
    similar = {pair: jaccard(texts[pair[0]], texts[pair[1]]) for pair in pairs}
    certain = {pair for pair, value in similar.items() if value > 0.9}
    unlike = {pair for pair, value in similar.items() if value < 0.6} - {(9, 201)}
    assert (len(certain) >= 15, len(unlike) >= 10) == (True, True)
    assert {pair for pair in certain if not near.keys() & set(pair)} == set()
    assert {pair for pair in unlike if near.keys() & set(pair)} == set()
    counts = [report["splits"][split]["documents"] for split in ("train", "validation")]
    assert sum(count["dropped"]["near_duplicate"] for count in counts) == len(near)
    assert [line["document"] for line in lines if line["reason"] == "duplicate"] == [200]
    splits = [Dataset.open(tmp_path / "out", split) for split in ("train", "validation")]
    kept = {int(data.key(chunk)[:9]) for data in splits for chunk in range(data.chunks)}
    assert kept == set(range(202)) - {line["document"] for line in lines}


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_drop_the_same_documents(settings: Callable[..., PrepareConfig], tmp_path: Path, parts: int) -> None:
    prepare(settings("whole"))
    for number in range(parts, 0, -1):
        prepare_part(settings("out"), Part(number, parts))
    merge(settings("out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("shards", [0, 1, 3, 5])
def test_an_interrupted_run_knows_what_it_has_seen(
    settings: Callable[..., PrepareConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    """Also one that merges parts, and after a kill that left more in the files than the journal accounts for."""
    prepare(settings("whole"))
    for number in (1, 2):
        prepare_part(settings("parts"), Part(number, 2))
    runs: dict[str, Callable[[], object]] = {"out": lambda: prepare(settings("out")), "parts": lambda: merge(settings("parts"))}
    for name, run in runs.items():
        finish, count = ShardWriter.finish, iter(range(shards))

        def failing(self: ShardWriter, finish: Any = finish, count: Iterator[int] = count) -> Any:
            if next(count, None) is None:
                raise KeyboardInterrupt
            return finish(self)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ShardWriter, "finish", failing)
            run()
        for log in ("signatures.bin", "dropped.jsonl"):
            with (tmp_path / name / log).open("ab") as stream:
                stream.write(b"x" * 1000)
        run()
        assert contents(tmp_path / name) == contents(tmp_path / "whole")


def test_the_processes_that_sign_are_real_ones_too(corpus: Path, tmp_path: Path, settings: Callable[..., PrepareConfig]) -> None:
    prepare(settings("here"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scaletrain.data.splits.run", REAL_RUN)
        prepare(settings("there", processes=2))
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_the_table_of_reasons_is_that_of_the_lines(settings: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    report = prepare(settings("out", clean={"min_characters": 121}))  # longer than the Chinese ones
    counted = {
        split: Counter(line["reason"] for line in dropped(tmp_path / "out") if line["split"] == split)
        for split in ("train", "validation")
    }
    for split, counts in counted.items():
        assert {reason: count for reason, count in report["splits"][split]["documents"]["dropped"].items() if count} == counts
    assert json.loads((tmp_path / "out/report.json").read_bytes()) == report
    table = {line[:34].strip(): line[34:].split() for line in summary(report) if line.startswith("    ")}
    expected = {
        reason.replace("_", " "): [str(counted[split][reason]) for split in counted] for reason in ("too_short", "near_duplicate")
    }
    assert table == expected


@pytest.mark.parametrize("name", ["exact", "none"])
def test_without_minhash_near_duplicates_stay(settings: Callable[..., PrepareConfig], tmp_path: Path, name: str) -> None:
    report = prepare(settings("out", deduplicate={"name": name}))
    assert sum(split["documents"]["kept"] for split in report["splits"].values()) == {"exact": 201, "none": 202}[name]


@pytest.mark.parametrize(("kind", "size"), [("characters", 5), ("characters", 1), ("words", 3), ("characters", 64)])
def test_signatures_estimate_the_similarity(kind: Any, size: int) -> None:
    """Within four standard deviations of an estimate from 256 permutations, for texts of all degrees of similarity."""
    signer = Signer(MinHashConfig(permutations=256, shingles=kind, shingle_size=size))
    for number in range(12):
        one = text(number)
        other = changed(one, number, number / 12)
        sets = [set(shingles(each, kind, size).tolist()) for each in (one, other)]
        exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        signatures = [np.frombuffer(signer.sign(each), "<u4") for each in (one, other)]
        assert float(np.mean(signatures[0] == signatures[1])) == pytest.approx(
            exact, abs=4 * (max(exact * (1 - exact), 0.01) / 256) ** 0.5
        )


def test_the_signature_of_a_long_text_is_that_of_its_set_of_shingles() -> None:
    """More than are hashed at once, with repeats: the least value of each permutation over all parts of the text."""
    signer = Signer(MinHashConfig())
    halves = ["".join(text(number) for number in range(first, first + 12)) for first in (0, 12)]
    whole = halves[0] + halves[1] + halves[0]
    pieces = [*halves, halves[0][-4:] + halves[1][:4], halves[1][-4:] + halves[0][:4]]
    least = np.min([np.frombuffer(signer.sign(piece), "<u4") for piece in pieces], axis=0)
    assert len(whole) > 3 * 4096
    assert signer.sign(whole) == least.tobytes()


def test_shingles_are_equal_exactly_when_the_runs_are() -> None:
    one = "".join(text(number, kind) for number, kind in ((1, "words"), (2, "chinese"), (3, "words")))
    runs = [one[at : at + 5] for at in range(len(one) - 4)]
    assert len(set(shingles(one, "characters", 5).tolist())) == len(set(runs))
    words = one.split()
    assert len(set(shingles(one, "words", 2).tolist())) == len({tuple(words[at : at + 2]) for at in range(len(words) - 1)})
    assert shingles("ABCDE", "characters", 5).tolist() == shingles("abcde", "characters", 5).tolist()
    assert len(shingles("abc", "characters", 5)) == len(shingles("one two", "words", 5)) == 1


def test_signatures_are_these_for_ever() -> None:
    """What decides the bytes of a folder must not change with a library."""
    signature = Signer(MinHashConfig(permutations=16)).sign("The quick brown fox jumps over the lazy dog")
    assert np.frombuffer(signature, "<u4")[:4].tolist() == [20721048, 220733919, 63987179, 50529635]


def test_the_most_similar_document_counts_of_equals_the_first_and_only_from_the_threshold_on(tmp_path: Path) -> None:
    """128 values at 0.8: 103 must agree. All of these agree in the first bands, so that they are compared."""
    values = np.random.default_rng(0).integers(0, 1 << 32, 128, np.uint32)

    def agreeing(count: int) -> bytes:
        return (
            np.where(np.arange(128) < count, values, values + np.random.default_rng(count).integers(1, 1 << 32, 128))
            .astype("<u4")
            .tobytes()
        )

    log = Log(tmp_path / "log")
    index = NearDuplicates(MinHashConfig(), ("train", "validation"), log)
    assert index.find("train", 5, agreeing(128)) is None
    assert index.find("train", 6, agreeing(102)) is None
    assert index.find("train", 7, agreeing(60)) is None
    of = {"split": "train", "document": 5}
    assert index.find("train", 8, agreeing(103)) == ("near_duplicate", {"of": of, "jaccard": round(103 / 128, 4)})
    again = np.frombuffer(agreeing(102), "<u4").copy()
    again[102:110] = values[102:110]  # 110 agree with document 5, 120 with document 6
    assert index.find("validation", 0, again.tobytes()) == (
        "near_duplicate",
        {"of": {"split": "train", "document": 6}, "jaccard": 0.9375},
    )
    assert index.find("validation", 1, bytes(512)) is None
    log.sync()
    continued = NearDuplicates(MinHashConfig(), ("train", "validation"), log)
    assert continued.find("validation", 2, bytes(512)) == (
        "near_duplicate",
        {"of": {"split": "validation", "document": 1}, "jaccard": 1.0},
    )
    assert continued.find("validation", 3, agreeing(103)) == ("near_duplicate", {"of": of, "jaccard": round(103 / 128, 4)})


@pytest.mark.parametrize("content", [b"\xff" * (12 + 512), b"x"], ids=["another split", "half a record"])
def test_signatures_that_are_something_else_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "signatures.bin").write_bytes(content)
    with pytest.raises(CorpusError, match=r"signatures.bin: got 'another content'; .* Prepare again with --fresh"):
        NearDuplicates(MinHashConfig(), ("train",), Log(tmp_path / "signatures.bin", len(content)))


def test_without_the_library_the_command_that_installs_it_is_named(
    settings: Callable[..., PrepareConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(
        ConfigError, match=r"^deduplicate.name: got 'minhash'; .*not installed. pip install 'scaletrain\[minhash\]'$"
    ):
        prepare(settings("out"))
    assert not (tmp_path / "out").exists()
    prepare(settings("out", deduplicate={"name": "exact"}))


@pytest.mark.parametrize("permutations", [16, 128, 1024])
def test_a_threshold_is_used_or_refused_before_anything_is_written(
    settings: Callable[..., PrepareConfig], tmp_path: Path, permutations: int
) -> None:
    assert bands(MinHashConfig(threshold=0.3, permutations=permutations))[0] >= 2
    with pytest.raises(ConfigError, match=rf"deduplicate.threshold: got 1.0; too close to 1 for {permutations} permutations"):
        prepare(settings("out", deduplicate={"name": "minhash", "threshold": 1.0, "permutations": permutations}))
    assert not (tmp_path / "out").exists()
