"""Words of a script that writes none: a segmenter says which characters belong together, and chunks carry what it said.

Whole-word masking of Chinese (Cui et al., arXiv 1906.08101) hides the characters of a word together, although each is a token
of its own. A vocabulary cannot say where such words start, so the chunk does, in the sign of its integers: an id is stored as it
is where the vocabulary's rule holds (``tokenizer.word_starts``), and as its complement ``~id``, which is negative, where the
opposite is true. Text in which the rule always holds is stored as before, and nothing but masking ever sees a sign.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from scaletrain.errors import ConfigError, ScaletrainError

Segmenter = Literal["none", "jieba"]
Cut = Callable[[str], Sequence[str]]
"""A text to its words, blanks and punctuation included: joined, they are the text."""
Spans = npt.NDArray[np.int64]
"""First character of each token, and the one behind its last: shape [tokens, 2]."""

_SENTENCE_END = re.compile(r"[。！？!?…；]+[”’」』）)】》\"'\s]*")
_HAN, _BLANK = 1, 2


def _table() -> npt.NDArray[np.uint8]:
    """Kind of each character up to the last plane with ideographs, the rest as the last one of them."""
    kinds = np.zeros(1 << 18, np.uint8)
    # The iteration mark and the zero; extension A; unified; compatibility forms; extensions B onwards.
    for first, last in ((0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFD)):
        kinds[first : last + 1] = _HAN
    kinds[[code for code in range(0x3001) if chr(code).isspace()]] = _BLANK
    return kinds


_KINDS = _table()


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


def described(segmenter: Segmenter) -> str:
    """A segmenter with the release of its library, which may find other words than the next. Raises ConfigError as ``load``."""
    if load(segmenter) is None:
        return segmenter
    return f"{segmenter} (rjieba {importlib.metadata.version('rjieba')})"


def token_starts(text: str, spans: Spans, cut: Cut, rule: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which tokens of ``text`` start a word, shape [tokens].

    ``spans`` [tokens, 2] says which characters each token covers, ``rule`` [tokens] what the vocabulary says of it. A word that
    the segmenter found is never divided. It divides text only beside a Han character: elsewhere (it takes letters outside ASCII
    one by one) words start where the vocabulary says so too. Raises ScaletrainError for a segmenter that loses text.
    """
    lengths = np.array([len(word) for word in cut(text)], np.int64)
    if lengths.sum() != len(text):
        raise ScaletrainError(f"segmenter: its words have {lengths.sum()} characters, the text {len(text)}: {text[:40]!r}")
    if not len(spans):
        return np.zeros(0, np.bool_)
    word = np.repeat(np.arange(len(lengths)), lengths)
    kinds = _KINDS[np.minimum(np.frombuffer(text.encode("utf-32-le"), "<u4"), len(_KINDS) - 1)]
    begin, end = spans.T
    last = np.clip(end - 1, begin, len(text) - 1)
    first = np.minimum(_next_solid(kinds == _BLANK)[begin], last)  # byte-level tokens begin with the blank before them
    before = np.append(first[:1], last[:-1])
    han = (kinds[first] == _HAN) | (kinds[before] == _HAN)
    divided: npt.NDArray[np.bool_] = (word[first] != word[before]) & (han | rule)
    divided[0] = True
    return divided


def sentence_starts(text: str, spans: Spans) -> npt.NDArray[np.bool_]:
    """Which tokens of ``text`` come right after a sentence (its end mark with closing quotes and blanks), shape [tokens]."""
    follows = np.zeros(len(text) + 1, np.bool_)
    follows[[found.end() for found in _SENTENCE_END.finditer(text)]] = True
    return follows[spans[:, 0]]


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


def _next_solid(blank: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The place of the next character from each place on that is no blank, shape [characters + 1]."""
    places = np.append(np.where(blank, len(blank), np.arange(len(blank))), len(blank))
    return np.minimum.accumulate(places[::-1])[::-1]
