"""A model learns Chinese: from text whose words are hidden whole, and from the titles of news."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rjieba

from scaletrain import dist
from scaletrain.config import decode
from scaletrain.data import tokenizer
from scaletrain.data.clean import CleanConfig, clean
from scaletrain.data.dataset import AsStored, Dataset
from scaletrain.data.plan import Picks
from scaletrain.data.prepare import PrepareConfig, prepare
from scaletrain.data.slots import Dealing
from scaletrain.data.spans import SpanConfig
from scaletrain.data.tokenizer import Vocabulary
from scaletrain.recipes import finetune, pretrain
from scaletrain.recipes.quickstart import unigram_entropy
from scaletrain.tasks.mlm import MaskedLanguageModelling, MlmConfig
from scaletrain.train.metrics import read_jsonl
from tests.behaviour.test_chinese import PARAGRAPHS

WHOLE = MlmConfig(whole_word=True, masked_share=1.0, random_share=0.0, mask_rate=0.3)


def corpus(output: Path, train: Path, validation: Path, character_sets: tuple[str, ...] = ("ascii", "gb2312")) -> Path:
    """Prepares a text with one document per line as configs/prepare/chinese.yaml does, in chunks of half the length."""
    sources = {
        split: {"name": "text", "paths": [str(file)], "document": "line"}
        for split, file in (("source", train), ("validation", validation))
    }
    wordpiece = {"name": "wordpiece", "vocab_size": 21128, "alphabet": 20000, "nfkc": True, "character_sets": character_sets}
    tree = {"tokenizer": wordpiece, "segmenter": "jieba", "max_tokens": 62, "processes": 1, "clean": {"min_characters": 10}}
    prepare(decode(PrepareConfig, {"output": str(output), **sources, **tree}))
    return output


def learned(prepared: Path, output: Path, steps: int) -> tuple[float, float]:
    """Held-out loss before and after some steps of a tiny BERT, words hidden whole."""
    tree: dict[str, Any] = {
        "output": str(output),
        "steps": steps,
        "seed": 1,
        "device": "cpu",
        "engine": {"name": "local"},
        "model": {"architecture": "bert", "layers": 1, "hidden": 64, "heads": 2, "max_positions": 64, "dropout": 0.0},
        "task": {"whole_word": True},
        "data": {"corpora": [{"path": str(prepared)}], "chunks_per_step": 32, "slots": {"micro_batch_tokens": 2048}},
        "optimizer": {"learning_rate": 5e-3},
        "schedule": {"name": "linear", "warmup_share": 0.1},
        "evaluation": {"every_steps": steps, "chunks_per_pass": 128},
        "checkpoint": {"every_steps": steps},
        "metrics": {"console": "off", "tensorboard": False},
    }
    try:
        pretrain.main(decode(pretrain.Config, tree))
    finally:
        dist.stop()
    first, last = (line["scores"]["loss"] for line in read_jsonl(output / "metrics.jsonl") if line["kind"] == "eval")
    return first, last


def test_what_surrounds_a_word_tells_which_it_is(tmp_path: Path) -> None:
    """Sentences of eight paragraphs in any order: below what the frequencies of characters alone could tell."""
    sentences = [part + "。" for paragraph in PARAGRAPHS for part in paragraph.split("。") if len(part) > 8]
    for split, seed, documents in (("train", 0, 400), ("validation", 1, 40)):
        order = np.random.default_rng(seed)
        lines = ["".join(order.permutation(sentences)[:4]) for _ in range(documents)]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")
    prepared = corpus(tmp_path / "prepared", tmp_path / "train.txt", tmp_path / "validation.txt", ("ascii",))
    first, last = learned(prepared, tmp_path / "run", steps=160)
    assert last < unigram_entropy(Dataset.open(prepared, "validation")) - 0.5 < first - 1


# ------------------------------------------------------------------------------------------------------------------ on real text


@pytest.fixture(scope="module")
def d2l(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A textbook on deep learning: modern Chinese with Latin words, digits and formulas."""
    texts = data_folder / "zh_d2l"
    return corpus(tmp_path_factory.mktemp("d2l") / "prepared", texts / "train.txt.gz", texts / "validation.txt.gz")


def hidden(data: Dataset, config: MlmConfig) -> dict[int, list[bool]]:
    """Number of a document -> which of its tokens the task hides."""
    vocabulary = Vocabulary.open(data.tokenizer_folder)
    task = MaskedLanguageModelling(config, vocabulary, Dealing(4096, 1, 1, "padded"), [data.digest], 3)
    found: dict[int, list[bool]] = {}
    for chunk in range(data.chunks):
        picks = Picks(np.zeros(1, np.int16), np.zeros(1, np.int64), np.array([chunk]))
        inputs = task.collate(0, 0, picks, [AsStored(data).read(chunk)]).inputs["input_ids"][0, 1:-1]
        masked = (inputs == vocabulary.mask).tolist()
        np.testing.assert_array_equal(np.where(masked, 0, inputs.numpy()), np.where(masked, 0, data.read(chunk)))
        found.setdefault(int(data.key(chunk)[:9]), []).extend(masked)
    return found


@pytest.mark.parametrize(
    "config", [WHOLE, MlmConfig(spans=SpanConfig(), masked_share=1.0, random_share=0.0)], ids=["words", "spans"]
)
def test_words_of_real_text_are_hidden_whole_and_never_in_part(data_folder: Path, d2l: Path, config: MlmConfig) -> None:
    """Against the library on the documents themselves; a word holds its tokens by the characters that they cover."""
    data, encoder = Dataset.open(d2l, "validation"), tokenizer.encoder(d2l / "tokenizer")
    special = set(Vocabulary.open(d2l / "tokenizer").special.tolist())
    with gzip.open(data_folder / "zh_d2l" / "validation.txt.gz", "rt", encoding="utf-8") as stream:
        texts = [clean(line, CleanConfig()) for line in stream]
    words = whole = 0
    for number, masked in hidden(data, config).items():
        encoding = encoder.encode(texts[number], add_special_tokens=False)
        assert len(encoding.ids) == len(masked)
        tokens_at: list[list[int]] = [[] for _ in texts[number]]
        for token, (begin, end) in enumerate(encoding.offsets):
            for place in range(begin, end):
                tokens_at[place].append(token)
        at = 0
        for word in rjieba.cut(texts[number]):
            tokens = {token for place in range(at, at + len(word)) for token in tokens_at[place]}
            states = {masked[token] for token in tokens if encoding.ids[token] not in special}
            assert len(states) <= 1, (texts[number], word)
            words, whole, at = words + (len(tokens) > 1), whole + (len(tokens) > 1 and states == {True}), at + len(word)
    assert words > 8000 and 0.2 < whole / words < 0.4


def test_a_model_that_read_a_textbook_learns_to_tell_news_by_their_titles(data_folder: Path, d2l: Path, tmp_path: Path) -> None:
    first, last = learned(d2l, tmp_path / "run", steps=80)
    assert last < first - 1.5
    titles = data_folder / "thucnews_titles_zh"
    files = {"train": [str(titles / "train.jsonl.gz")], "test": [str(titles / "validation.jsonl.gz")]}
    tree = {
        "output": str(tmp_path / "titles"),
        "seed": 1,
        "compute": {"device": "cpu", "engine": {"name": "local"}, "max_tokens": 64},
        "model": {"start": str(tmp_path / "run")},
        "task": {"name": "titles", "data": {**files, "validation_fraction": 0, "conflicts": "keep"}},
        "training": {"epochs": 0.6, "batch_size": 32, "optimizer": {"learning_rate": 2e-3}, "selection": {"keep": "last"}}
        | {"metrics": {"console": "off", "tensorboard": False}},
    }
    try:
        result = finetune.main(decode(finetune.Config, tree))
    finally:
        dist.stop()
    assert result is not None
    assert result["accuracy"] > 0.5 > 4 * result["majority_baseline"]
    with gzip.open(titles / "train.jsonl.gz", "rt", encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line in stream]
    encodings = tokenizer.encoder(d2l / "tokenizer").encode_batch_fast(texts, add_special_tokens=False)
    ids = np.concatenate([encoding.ids for encoding in encodings])
    assert np.mean(ids == tokenizer.encoder(d2l / "tokenizer").token_to_id("[UNK]")) < 0.01
