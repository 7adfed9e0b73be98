"""Chinese from raw text to a trained model: what prepare writes, and that masks hide the segmenter's words whole."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rjieba

from scaletrain import config
from scaletrain.data import index, words
from scaletrain.data.dataset import AsStored, Dataset, read_manifest
from scaletrain.data.parts import Part, merge, prepare_part
from scaletrain.data.plan import Picks
from scaletrain.data.prepare import PrepareConfig, prepare
from scaletrain.data.prepare import settings as described
from scaletrain.data.slots import Dealing
from scaletrain.data.survey import check, stretches
from scaletrain.data.tokenizer import Vocabulary
from scaletrain.errors import ConfigError
from scaletrain.recipes.corpora import Corpora, DataConfig
from scaletrain.tasks.mlm import MaskedLanguageModelling, MlmConfig

PARAGRAPHS = [
    "北京大学是中国最著名的大学之一，每年有许多优秀的学生从这里毕业。图书馆里的灯光常常亮到深夜。",
    "春天来了，公园里的桃花开得非常漂亮！孩子们在草地上放风筝，老人们坐在长椅上聊天。",
    "人工智能正在改变我们的生活：机器翻译、语音识别和自动驾驶都已经成为现实。你觉得未来会怎样？",
    "他说：“明天上午我们去火车站接朋友，然后一起吃午饭。”她点点头，没有回答。",
    "上海的夏天又热又湿，大家都喜欢喝冰镇的绿豆汤。冬天虽然不下雪，可是屋子里很冷。",
    "用 Python3 写的程序在 １３ 号楼发布，支持中文和英文，运行速度提高了 35%。",
    "历史学家认为，丝绸之路不仅是贸易的道路，也是文化交流的桥梁。商人、僧侣和旅行家都曾经走过这条路。",
    "医生建议病人多喝水、多休息，并且按时吃药。如果发烧超过三天，就应该马上到医院检查。",
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PrepareConfig]:
    """A configuration around documents of several paragraphs each, with some settings replaced."""
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    turns = [PARAGRAPHS[number % 8 :] + PARAGRAPHS[: number % 8] for number in range(40)]
    corpus.write_text("\n\n".join(f"第{number}章\n" + "\n".join(turn) for number, turn in enumerate(turns)), encoding="utf-8")

    def made(output: Path, **changes: Any) -> PrepareConfig:
        tree: dict[str, Any] = {
            "source": {"name": "text", "paths": [str(corpus)], "document": "paragraph"},
            "validation_fraction": 0.2,
            "tokenizer": {"name": "wordpiece", "vocab_size": 512, "nfkc": True, "character_sets": ["ascii"]},
            "segmenter": "jieba",
            "max_tokens": 64,
            "chunks_per_shard": 40,
            "processes": 1,
        }
        return config.decode(PrepareConfig, tree | {"output": str(output)} | changes)

    return made


@pytest.fixture(scope="module")
def prepared(settings: Callable[..., PrepareConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "jieba"
    prepare(settings(folder))
    return folder


@pytest.fixture(scope="module")
def unsegmented(settings: Callable[..., PrepareConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "none"
    prepare(settings(folder, segmenter="none"))
    return folder


def documents(data: Dataset) -> dict[str, list[int]]:
    """Number of a document -> its ids, over all its chunks."""
    found: dict[str, list[int]] = {}
    for chunk in range(data.chunks):
        found.setdefault(data.key(chunk)[:9], []).extend(data.read(chunk).tolist())
    return found


def test_the_model_reads_the_same_ids_with_and_without_a_segmenter(prepared: Path, unsegmented: Path) -> None:
    for split in ("train", "validation"):
        assert documents(Dataset.open(prepared, split)) == documents(Dataset.open(unsegmented, split))


def test_what_the_segmenter_said_is_part_of_the_digest(prepared: Path, unsegmented: Path) -> None:
    marked, plain = Dataset.open(prepared), Dataset.open(unsegmented)
    assert marked.tokenizer_digest == plain.tokenizer_digest and marked.digest != plain.digest
    assert any(marked.stored(chunk).min() < 0 for chunk in range(marked.chunks))
    assert all(plain.stored(chunk).min() >= 0 for chunk in range(plain.chunks))


def test_a_survey_counts_the_characters_and_not_the_marks(prepared: Path) -> None:
    data = Dataset.open(prepared)
    expected = np.bincount(np.concatenate([data.read(chunk) for chunk in range(data.chunks)]), minlength=data.vocab_size)
    counted = np.zeros(data.vocab_size, np.int64)
    for tar in sorted((prepared / "train").glob("*.tar")):
        for stretch in stretches(tar, 0, index.load(tar.with_suffix(".idx")).records):
            checked = check(stretch, data.vocab_size)
            assert not checked.damaged
            counted += checked.occurrences
    np.testing.assert_array_equal(counted, expected)


def test_settings_that_change_nothing_are_not_in_a_folder_as_before_there_were_any(prepared: Path, unsegmented: Path) -> None:
    later = {"segmenter", "unwrap", "nfkc", "character_sets"}
    tree = described(config.decode(PrepareConfig, {"output": "folder"}))
    assert not later & {*tree, *tree["clean"], *tree["tokenizer"]}
    tree = read_manifest(unsegmented)["config"]
    assert later & {*tree, *tree["clean"], *tree["tokenizer"]} == {"nfkc", "character_sets"}
    release = importlib.metadata.version("rjieba")
    assert read_manifest(prepared)["config"]["segmenter"] == f"jieba (rjieba {release})"


def test_the_bytes_do_not_depend_on_the_processes(prepared: Path, settings: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    prepare(settings(tmp_path / "two", processes=2))
    assert read_manifest(tmp_path / "two") == read_manifest(prepared)


def test_the_bytes_do_not_depend_on_the_parts(prepared: Path, settings: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    for number in (1, 2):
        prepare_part(settings(tmp_path / "parts"), Part(number, 2))
    merge(settings(tmp_path / "parts"))
    assert read_manifest(tmp_path / "parts") == read_manifest(prepared)


def test_chunks_begin_with_a_word_and_after_a_sentence_if_one_ended_near(prepared: Path) -> None:
    from transformers import AutoTokenizer

    data, loaded = Dataset.open(prepared), AutoTokenizer.from_pretrained(prepared / "tokenizer")
    rule = Vocabulary.open(prepared / "tokenizer").starts_word
    assert all(words.starts(data.stored(chunk), rule)[0] for chunk in range(data.chunks))
    texts = ["".join(loaded.convert_ids_to_tokens(data.read(chunk).tolist())) for chunk in range(data.chunks)]
    whole = [text for text, key in zip(texts, map(data.key, range(data.chunks)), strict=True) if key.endswith("0000")]
    assert sum(text[-1] in "。!?”" for text in whole) > 0.3 * len(whole)
    assert data.lengths.max() <= 64 and np.mean(data.lengths) > 40


def test_no_document_of_ordinary_text_has_an_unknown_character(prepared: Path) -> None:
    ids = np.concatenate([Dataset.open(prepared).read(chunk) for chunk in range(Dataset.open(prepared).chunks)])
    assert not np.isin(ids, Vocabulary.open(prepared / "tokenizer").special).any()


def hidden_characters(folder: Path, whole_word: bool) -> list[tuple[str, list[bool]]]:
    """Text and hidden characters of every document, by way of the task: one token is one character but for Latin words."""
    data = Dataset.open(folder)
    vocabulary, stored = Vocabulary.open(folder / "tokenizer"), AsStored(data)
    settings = MlmConfig(whole_word=whole_word, masked_share=1.0, random_share=0.0, mask_rate=0.3)
    task = MaskedLanguageModelling(settings, vocabulary, Dealing(4096, 1, 1, "padded"), [data.digest], 3)
    found: dict[str, tuple[str, list[bool]]] = {}
    tokens = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    names = {number: token.removeprefix("##") for token, number in tokens.items()}
    for chunk in range(data.chunks):
        picks = Picks(np.zeros(1, np.int16), np.zeros(1, np.int64), np.array([chunk]))
        slot = task.collate(0, 0, picks, [stored.read(chunk)])
        row = slot.inputs["input_ids"][0, 1:-1]
        ids = data.read(chunk)
        masked = [token == vocabulary.mask for token in row.tolist()]
        np.testing.assert_array_equal(np.where(masked, ids, row.numpy()), ids)
        pairs = [(names[token], hide) for token, hide in zip(ids.tolist(), masked, strict=True)]
        text, hidden = found.get(data.key(chunk)[:9], ("", []))
        hidden = hidden + [hide for name, hide in pairs for _ in name]
        found[data.key(chunk)[:9]] = (text + "".join(name for name, _ in pairs), hidden)
    return list(found.values())


def parts(chunks: list[tuple[str, list[bool]]]) -> tuple[int, int]:
    """How many words of two or more characters are hidden whole, and how many in part."""
    whole = part = 0
    for text, hidden in chunks:
        at = 0
        for word in rjieba.cut(text):
            share = np.mean(hidden[at : at + len(word)])
            whole += int(len(word) > 1 and share == 1)
            part += int(len(word) > 1 and 0 < share < 1)
            at += len(word)
    return whole, part


def test_words_are_hidden_whole_and_never_in_part(prepared: Path, unsegmented: Path) -> None:
    whole, part = parts(hidden_characters(prepared, whole_word=True))
    assert whole > 500 and part == 0
    assert parts(hidden_characters(unsegmented, whole_word=True))[1] > 500  # the vocabulary alone knows only characters
    assert parts(hidden_characters(prepared, whole_word=False))[1] > 500


def test_a_run_and_its_evaluation_mask_by_the_marks(prepared: Path) -> None:
    """What their loaders give is what the task makes of the chunks as they are stored, and not of plain ids."""
    data = config.decode(DataConfig, {"corpora": [{"path": str(prepared)}], "chunks_per_step": 16})
    corpora = Corpora(data, 2, 1, "padded", None)
    task = corpora.task(MlmConfig(whole_word=True), 1, token_types=False)
    held_out = corpora.held_out(64)
    evaluation, seen = held_out.task(task), 0
    for loader, by, dataset in (
        (corpora.loader(task), task, Dataset.open(prepared)),
        (held_out.loader(evaluation), evaluation, Dataset.open(prepared, "validation")),
    ):
        with loader:
            slots = [slot for batch in loader.batches() for slot in batch.slots if len(slot.samples)]
        for slot in slots:
            numbers = slot.samples.chunk.tolist()
            expected = by.collate(slot.step, slot.index, slot.samples, [dataset.stored(number) for number in numbers])
            unmarked = by.collate(slot.step, slot.index, slot.samples, [dataset.read(number) for number in numbers])
            assert slot.inputs["input_ids"].tolist() == expected.inputs["input_ids"].tolist()
            assert slot.inputs["input_ids"].tolist() != unmarked.inputs["input_ids"].tolist()
            seen += len(numbers)
    assert seen == 32 + Dataset.open(prepared, "validation").chunks


def test_prepare_without_the_library_says_what_to_install(
    settings: Callable[..., PrepareConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rjieba", None)
    with pytest.raises(ConfigError, match=r"pip install 'scaletrain\[chinese\]'"):
        prepare(settings(tmp_path / "folder"))
    assert not (tmp_path / "folder").exists()
