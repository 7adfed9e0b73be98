"""Words of a script that writes none: a segmenter says which characters belong together, and chunks carry what it said.

Whole-word masking of Chinese (Cui et al., arXiv 1906.08101) hides the characters of a word together, although each is a token
of its own. A vocabulary cannot say where such words start, so the chunk does, in the sign of its integers: an id is stored as it
is where the vocabulary's rule holds (``tokenizer.word_starts``), and as its complement ``~id``, which is negative, where the
opposite is true. Text in which the rule always holds is stored as before, and nothing but masking ever sees a sign.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from scaletrain.errors import ConfigError, ScaletrainError

Segmenter = Literal["none", "jieba"]
Cut = Callable[[str], Sequence[str]]
"""A text to its words, blanks and punctuation included: joined, they are the text."""

_SENTENCE_END = re.compile(r"[。！？!?…；]+[”’」』）)】》\"'\s]*")
_BLANKS = [code for code in range(0x3001) if chr(code).isspace()]
# Han ideographs: unified, extensions A and B onwards, compatibility forms, and the iteration mark and zero that stand among them.
_HAN = ((0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


def load(segmenter: Segmenter) -> Cut | None:
    """The function that cuts text into words; None for 'none'. Raises ConfigError where its library is not installed.

    'jieba' is jieba's dictionary and hidden Markov model through ``rjieba``, which compiles both in: fast, without a cache file
    that anyone may have written, and the same words for the same release.
    """
    if segmenter == "none":
        return None
    try:
        import rjieba
    except ImportError as error:
        rule = f"needs the package rjieba, which cannot be imported ({error})"
        remedy = "Run: pip install 'scaletrain[chinese]' (or: pip install rjieba), or set segmenter=none"
        raise ConfigError("segmenter", segmenter, rule, remedy) from error
    return rjieba.cut


def token_starts(text: str, offsets: Sequence[tuple[int, int]], cut: Cut, rule: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which tokens of ``text`` start a word, shape [tokens].

    ``offsets`` says which characters each token covers, ``rule`` [tokens] what the vocabulary says of it. A word that the
    segmenter found is never divided. It divides text only beside a Han character: elsewhere (it takes letters outside ASCII one
    by one) words start where the vocabulary says so too. Raises ScaletrainError for a segmenter that loses text.
    """
    lengths = np.array([len(word) for word in cut(text)], np.int64)
    if lengths.sum() != len(text):
        raise ScaletrainError(f"segmenter: its words have {lengths.sum()} characters, the text {len(text)}: {text[:40]!r}")
    if not offsets:
        return np.zeros(0, np.bool_)
    word, (han, blank) = np.repeat(np.arange(len(lengths)), lengths), _kinds(text)
    begin, end = np.array(offsets, np.int64).T
    last = np.clip(end - 1, begin, len(text) - 1)
    first = np.minimum(_next_solid(blank)[begin], last)  # byte-level tokens begin with the blank before them
    before = np.append(first[:1], last[:-1])
    divided: npt.NDArray[np.bool_] = (word[first] != word[before]) & (han[first] | han[before] | rule)
    divided[0] = True
    return divided


def sentence_starts(text: str, offsets: Sequence[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """Which tokens of ``text`` come right after a sentence (its end mark with closing quotes and blanks), shape [tokens]."""
    ends = np.array([found.end() for found in _SENTENCE_END.finditer(text)], np.int64)
    return np.isin(np.array([begin for begin, _ in offsets], np.int64), ends)


def mark(ids: npt.NDArray[Any], starts: npt.NDArray[np.bool_], rule: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """What is stored for signed ``ids``; of each token, ``starts`` says what is true and ``rule`` what the vocabulary says."""
    stored: npt.NDArray[Any] = np.where(starts == rule, ids, ~ids)
    return stored


def plain(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The ids in a stored chunk."""
    ids: npt.NDArray[Any] = np.maximum(stored, ~stored)
    return ids


def starts(stored: npt.NDArray[Any], starts_word: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which tokens of a stored chunk start a word, shape [tokens]; ``starts_word`` [vocabulary] is the vocabulary's rule."""
    marks: npt.NDArray[np.bool_] = starts_word[plain(stored)] ^ (stored < 0)
    return marks


def _kinds(text: str) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which characters are Han, and which are blanks."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    han = np.zeros(len(codes), np.bool_)
    for low, high in _HAN:
        han |= (codes >= low) & (codes <= high)
    return han, np.isin(codes, _BLANKS)


def _next_solid(blank: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The place of the next character from each place on that is no blank, shape [characters + 1]."""
    places = np.append(np.where(blank, len(blank), np.arange(len(blank))), len(blank))
    return np.minimum.accumulate(places[::-1])[::-1]
