"""Words of Chinese: where the segmenter says they start, how a chunk carries it, and that no model reads a mark."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import rjieba
from hypothesis import given, settings
from hypothesis import strategies as st

from scaletrain.data import index, npy, tokenizer, words
from scaletrain.data.clean import CleanConfig
from scaletrain.data.collate import Frame, arrange
from scaletrain.data.encode import Batch, Encoder, Recipe, split
from scaletrain.data.masking import MaskRule, mask
from scaletrain.data.tokenizer import ByteLevelConfig, WordPieceConfig
from scaletrain.errors import ConfigError, ScaletrainError

TEXT = "我们昨天去了北京大学。“很好！”他说，用 Python3 写程序，圆周率约为３.14。"
TEXTS = [TEXT, "他说 café 的咖啡很好喝，привет！", "人工智能改变世界，机器学习与深度学习都属于人工智能。"]
CONFIGS: dict[str, WordPieceConfig | ByteLevelConfig] = {
    "wordpiece": WordPieceConfig(vocab_size=400, min_frequency=1),
    "bpe": ByteLevelConfig(vocab_size=500),
}
SIGNED = st.integers(-(1 << 15), (1 << 15) - 1)


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(str(request.param))
    tokenizer.train(CONFIGS[str(request.param)], lambda: TEXTS * 3, max_tokens=126).save_pretrained(made)
    return made


def cut() -> words.Cut:
    found = words.load("jieba")
    assert found is not None
    return found


def groups(folder: Path, text: str) -> list[tuple[int, int]]:
    """First and last character of every group of tokens that are masked together, blanks before it left out."""
    encoding = tokenizer.encoder(folder).encode(text, add_special_tokens=False)
    rule = tokenizer.word_starts(folder)[np.array(encoding.ids)]
    starts = words.token_starts(text, np.array(encoding.offsets), cut(), rule)
    found: list[tuple[int, int]] = []
    for (begin, end), start in zip(encoding.offsets, starts, strict=True):
        begin = min(end - 1, begin + len(text[begin:end]) - len(text[begin:end].lstrip()))
        found[len(found) if start else -1 :] = [(begin if start else found[-1][0], end)]
    return found


@pytest.mark.parametrize("text", TEXTS, ids=["mixed", "scripts", "chinese"])
def test_no_word_of_the_segmenter_is_divided(folder: Path, text: str) -> None:
    """Every word lies in one group, whatever the tokens are."""
    at, together = 0, groups(folder, text)
    for word in rjieba.cut(text):
        if word.strip():
            assert sum(begin < at + len(word) and at < end for begin, end in together) == 1, word
        at += len(word)


@pytest.mark.parametrize("folder", ["wordpiece"], indirect=True)
def test_words_of_han_characters_are_groups_of_their_own(folder: Path) -> None:
    """Tokens of a byte-level vocabulary may span two words, and then keep them together."""
    found = [TEXT[begin:end] for begin, end in groups(folder, TEXT)]
    assert found == ["我们", "昨天", "去", "了", "北京大学", "。", "“", "很", "好", "！", "”", "他", "说", "，", "用", "Python3",
                     "写", "程序", "，", "圆周率", "约", "为", "３", ".", "14", "。"]  # fmt: skip


def test_words_of_other_scripts_are_those_of_the_vocabulary(folder: Path) -> None:
    """The segmenter takes Cyrillic letter by letter, and the vocabulary has no token for the whole word."""
    text = "他说 виртет 很好"
    assert len(tokenizer.encoder(folder).encode("виртет", add_special_tokens=False).ids) > 2
    assert "виртет" in [text[begin:end].strip() for begin, end in groups(folder, text)]


def test_a_segmenter_that_loses_text_is_an_error() -> None:
    with pytest.raises(ScaletrainError, match="its words have 2 characters, the text 3"):
        words.token_starts("我们去", np.array([(0, 1), (1, 2), (2, 3)]), lambda text: [text[:2]], np.ones(3, np.bool_))


@settings(deadline=None)
@given(st.text())
def test_the_library_loses_no_text(text: str) -> None:
    assert "".join(rjieba.cut(text)) == text


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rjieba", None)
    assert words.load("none") is None
    with pytest.raises(ConfigError, match=r"segmenter: got 'jieba'.*pip install 'scaletrain\[chinese\]'"):
        words.load("jieba")


# ------------------------------------------------------------------------------------------------------------- marks in a chunk


@given(st.lists(st.tuples(st.integers(0, (1 << 15) - 1), st.booleans())), st.sampled_from(["<i2", "<i4"]))
def test_ids_and_starts_survive_storing(tokens: list[tuple[int, bool]], dtype: str) -> None:
    ids, starts = np.array([token for token, _ in tokens], dtype), np.array([start for _, start in tokens], np.bool_)
    vocabulary = np.random.default_rng(0).random(1 << 15) < 0.5
    stored = words.mark(ids, starts, vocabulary[ids])
    assert stored.dtype == dtype
    read = npy.decode(npy.header(len(stored), stored.dtype.str) + stored.tobytes())
    np.testing.assert_array_equal(words.plain(read), ids)
    np.testing.assert_array_equal(words.starts(read, vocabulary), starts)


def test_text_that_follows_the_vocabulary_carries_no_mark() -> None:
    ids, rule = np.arange(50, dtype=np.int16), np.arange(50) % 3 == 0
    assert words.mark(ids, rule, rule).tolist() == list(range(50))
    assert words.starts(ids, rule).tolist() == rule.tolist()


@given(st.lists(SIGNED, min_size=1))
def test_a_marked_id_never_reaches_a_model(stored: list[int]) -> None:
    """Masking takes the marks off, also of what it does not choose; what has not been through it is refused."""
    chunk, lengths = np.array(stored, np.int32), np.array([len(stored)])
    for starts in (None, np.ones(1 << 15, np.bool_)):
        rule = MaskRule(
            rate=0.3, masked=0.5, randomised=0.2, mask_id=1, vocab_size=1 << 15, special=np.array([0]), starts_word=starts
        )
        masked = mask(chunk, lengths, np.array([7], np.uint64), rule)
        assert masked.tokens.min() >= 0 and masked.labels.min(initial=0) >= 0
        np.testing.assert_array_equal(masked.labels, words.plain(chunk)[masked.selected])
        assert arrange(masked.tokens, lengths, Frame(2, 3, 0)).inputs["input_ids"].min() >= 0
    if chunk.min() < 0:
        with pytest.raises(ScaletrainError, match="a model reads ids from 0"):
            arrange(chunk, lengths, Frame(2, 3, 0))


@pytest.mark.parametrize(("entries", "dtype"), [(1 << 15, "<i2"), ((1 << 15) + 1, "<i4")])
@pytest.mark.parametrize("folder", ["wordpiece"], indirect=True)
def test_integers_are_as_wide_as_the_largest_id_and_its_mark_need(folder: Path, tmp_path: Path, entries: int, dtype: str) -> None:
    """The last id of a vocabulary, inside a word."""
    shutil.copytree(folder, tmp_path / "large")
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tree["model"]["vocab"]
    vocabulary |= {f"[filler {number}]": number for number in range(len(vocabulary), entries - 1)} | {"鑫": entries - 1}
    (tmp_path / "large" / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    recipe = Recipe(
        tokenizer=str(tmp_path / "large"),
        max_tokens=32,
        clean=CleanConfig(),
        held_out=0,
        seed=0,
        validation=False,
        segmenter="jieba",
    )
    encoded = Encoder(recipe).encode(Batch(0, ["我们金鑫"])).data  # jieba: 我们 / 金鑫
    member = next(index.members(lambda at, count: encoded[at : at + count], len(encoded), ""))
    array = encoded[member.data : member.data + member.size]
    assert f"'descr': '{dtype}'".encode() in array
    assert npy.decode(array).tolist()[-1] == -entries
    assert words.plain(npy.decode(array)).tolist()[-1] == entries - 1


def test_masks_follow_the_marks_and_not_the_vocabulary() -> None:
    """Two characters each: every pair is masked whole or not at all."""
    starts = np.arange(4000) % 2 == 0
    stored = words.mark(np.arange(4000, dtype=np.int32), starts, np.ones(4000, np.bool_))
    rule = MaskRule(
        rate=0.3, masked=1, randomised=0, mask_id=0, vocab_size=4000, special=np.array([0]), starts_word=np.ones(4000, np.bool_)
    )
    hidden = np.zeros(4000, np.bool_)
    hidden[mask(stored, np.full(40, 100), np.arange(40, dtype=np.uint64), rule).selected] = True
    assert 0.25 < hidden.mean() < 0.35
    np.testing.assert_array_equal(hidden[2::2], hidden[3::2])


# --------------------------------------------------------------------------------------------------------------------------- cuts


def test_a_document_is_cut_before_a_sentence_if_one_is_near_else_before_a_word() -> None:
    text = "一二三四五六七。八九十。” 百千万亿"
    offsets = np.array([(place, place + 1) for place, char in enumerate(text) if not char.isspace()])
    sentences = words.sentence_starts(text, offsets)
    assert np.flatnonzero(sentences).tolist() == [8, 13]
    ids, starts = np.arange(len(offsets), dtype=np.int16), np.arange(len(offsets)) % 2 == 0
    assert [len(piece) for piece in split(ids, 8, starts, sentences)] == [8, 5, 4]
    assert [len(piece) for piece in split(ids, 10, starts, np.zeros_like(sentences))] == [10, 7]
    assert [len(piece) for piece in split(ids, 7, starts, np.zeros_like(sentences))] == [6, 6, 5]
