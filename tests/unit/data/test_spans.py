"""Spans: the paper's lengths, the budget of each chunk, and draws that know no other chunk."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scaletrain.data import keyed
from scaletrain.data.masking import Masked, MaskRule, mask
from scaletrain.data.spans import SpanConfig, Words, choose

SPECIAL = np.array([0, 1, 2, 3, 4])
STARTS = np.random.default_rng(0).random(1000) < 0.7
RULE = MaskRule(0.15, 0.8, 0.1, mask_id=4, vocab_size=1000, special=SPECIAL, starts_word=STARTS, spans=SpanConfig())


def keys(n: int, seed: int = 1) -> keyed.U64:
    return keyed.derive(seed, np.arange(n))


def chunks(*lengths: int) -> list[np.ndarray]:
    return [np.random.default_rng(seed).integers(3, 1000, n).astype(np.int32) for seed, n in enumerate(lengths)]


def words(n_chunks: int, n_words: int, largest: int = 1) -> Words:
    sizes = np.random.default_rng(2).integers(1, largest + 1, n_chunks * n_words)
    return Words(np.full(n_chunks, n_words), sizes)


def runs(hidden: np.ndarray) -> np.ndarray:
    """Lengths of the runs of True in each row, [n]."""
    edges = np.diff(np.pad(hidden, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    return np.argwhere(edges == -1)[:, 1] - np.argwhere(edges == 1)[:, 1]


def test_lengths_are_those_of_the_paper() -> None:
    """Where spans are too far apart to touch, each is whole: mean 3.8, and each length as often as its law has it."""
    hidden = choose(words(200, 4000), keys(200), 0.01, SpanConfig()).reshape(200, 4000) >= 0
    lengths = runs(hidden)
    assert len(lengths) > 1800
    assert lengths.mean() == pytest.approx(3.8, abs=4 * 2.7 / np.sqrt(len(lengths)) + 0.1)
    seen = np.bincount(lengths, minlength=11)[1:11]
    expected = SpanConfig().law() * len(lengths)
    assert ((seen - expected) ** 2 / expected).sum() < 9 + 6 * np.sqrt(18)


def test_the_law_is_a_geometric_one_cut_off() -> None:
    law = SpanConfig().law()
    assert law.sum() == pytest.approx(1)
    assert (law[1:] / law[:-1]).tolist() == pytest.approx([0.8] * 9)
    assert law @ np.arange(1, 11) == pytest.approx(3.797, abs=1e-3)
    assert SpanConfig(longest=1).law().tolist() == [1.0]


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.3, 0.6, 0.95])
def test_a_chunk_spends_its_budget_and_less_than_a_word_more(rate: float) -> None:
    some = words(500, 90, largest=4)
    spans = choose(some, keys(500), rate, SpanConfig()).reshape(500, 90)
    sizes = some.sizes.reshape(500, 90)
    spent, budget = (sizes * (spans >= 0)).sum(1), rate * sizes.sum(1)
    assert (spent > budget - 1).all()
    assert (spent < budget + 4).all()
    last = spans.max(1, keepdims=True)
    assert ((sizes * ((spans >= 0) & (spans < last))).sum(1) < budget + 1).all()  # at most one span is over it


def test_the_budget_is_rounded_without_bias() -> None:
    """Chunks of three words at 15 %: one in each second or third, not one in all of them."""
    hidden = choose(words(40_000, 3), keys(40_000), 0.15, SpanConfig()) >= 0
    assert hidden.mean() == pytest.approx(0.15, abs=0.004)


def test_every_word_starts_a_span_equally_often() -> None:
    spans = choose(words(40_000, 50), keys(40_000), 0.02, SpanConfig()).reshape(40_000, 50)
    starts = np.bincount((spans >= 0).argmax(1)[(spans >= 0).any(1)], minlength=50)
    assert ((starts - starts.mean()) ** 2 / starts.mean()).sum() < 49 + 5 * np.sqrt(98)


def one_by_one(some: Words, key: keyed.U64, rate: float, config: SpanConfig) -> list[int]:
    """The rule as the paper tells it: one span after the other, in one chunk."""

    def draw(kind: int, counter: int) -> float:
        return float(keyed.uniform(keyed.derive(key, kind), counter)[0])

    budget, spent, number, law = int(rate * some.sizes.sum() + draw(5, 0)), 0, 0, SpanConfig.law(config).cumsum()
    spans = [-1] * len(some.sizes)
    while spent < budget:
        first, length = int(draw(4, number) * len(spans)), int((law[:-1] <= draw(3, number)).sum()) + 1
        for word in range(first, min(first + length, len(spans))) if spans[first] < 0 else ():
            if spans[word] >= 0:
                continue
            if spent >= budget:
                break
            spans[word], spent = number, spent + int(some.sizes[word])
        number += 1
    return spans


@pytest.mark.parametrize("rate", [0.15, 0.5, 0.9])
def test_all_at_once_is_the_same_as_one_after_the_other(rate: float) -> None:
    parts = [words(1, n, largest=3) for n in (1, 2, 40, 7, 120)]
    together = Words(np.concatenate([p.in_chunk for p in parts]), np.concatenate([p.sizes for p in parts]))
    for seed in range(8):
        expected = [one_by_one(p, keys(5, seed)[n : n + 1], rate, SpanConfig()) for n, p in enumerate(parts)]
        assert choose(together, keys(5, seed), rate, SpanConfig()).tolist() == [span for part in expected for span in part]


def test_a_chunk_alone_is_masked_as_in_any_batch() -> None:
    parts, of_chunk = chunks(17, 1, 300, 64, 0), keys(5, 9)
    alone = [mask(part, np.array([len(part)]), key[None], RULE) for part, key in zip(parts, of_chunk, strict=True)]
    for order in ([0, 1, 2, 3, 4], [3, 4, 1, 0, 2], [2, 0]):
        lengths = np.array([len(parts[i]) for i in order])
        together = mask(np.concatenate([parts[i] for i in order]), lengths, of_chunk[order], RULE)
        begins = np.cumsum(lengths) - lengths
        assert together.tokens.tolist() == np.concatenate([alone[i].tokens for i in order]).tolist()
        selected = np.concatenate([alone[i].selected + b for i, b in zip(order, begins, strict=True)])
        assert together.selected.tolist() == selected.tolist()


@pytest.fixture(scope="module")
def large() -> tuple[np.ndarray, Masked]:
    tokens = np.random.default_rng(3).integers(5, 1000, 400_000).astype(np.int32)
    return tokens, mask(tokens, np.full(4000, 100), keys(4000), replace(RULE, rate=0.02))


def test_a_span_has_one_fate(large: tuple[np.ndarray, Masked]) -> None:
    """At a rate at which a chunk has one span: masks, random tokens or what was there, 80, 10 and 10 in a hundred spans."""
    _, masked = large
    now, chunk = masked.tokens[masked.selected], masked.selected // 100
    first_span = np.append(np.flatnonzero(np.diff(chunk, prepend=-1)), len(chunk))
    fates = np.add.reduceat(np.where(now == 4, 1, np.where(now == masked.labels, 1000, 1_000_000)), first_span[:-1])
    sizes = np.diff(first_span)
    hidden, kept, drawn = fates == sizes, fates == 1000 * sizes, fates == 1_000_000 * sizes
    # Some chunks have two spans; a random token may be the one that was there.
    assert (hidden | kept | drawn).mean() > 0.9
    for found, share in ((hidden, 0.8), (kept, 0.1), (drawn, 0.1)):
        assert found.sum() / (hidden | kept | drawn).sum() == pytest.approx(share, abs=0.03)


def test_whole_words_are_hidden_and_special_tokens_never() -> None:
    parts = chunks(*[80] * 50)
    tokens = np.concatenate(parts)
    masked = mask(tokens, np.full(50, 80), keys(50), replace(RULE, rate=0.3))
    assert masked.labels.min() >= 5
    chosen = np.isin(np.arange(len(tokens)), masked.selected)
    word = np.cumsum(STARTS[tokens] | (np.arange(len(tokens)) % 80 == 0))
    ordinary = tokens >= 5
    assert not set(word[chosen]) & set(word[ordinary & ~chosen])


def test_words_that_the_chunks_have_marked_are_hidden_whole() -> None:
    """Where the vocabulary has no word in sight, those of the chunk's own marks."""
    rule = replace(RULE, rate=0.3, starts_word=np.ones(1000, np.bool_))
    ids, starts = np.random.default_rng(5).integers(5, 1000, 4000), np.random.default_rng(6).random(4000) < 0.4
    marked = mask(np.where(starts, ids, ~ids), np.full(50, 80), keys(50), rule)
    chosen = np.isin(np.arange(4000), marked.selected)
    word = np.cumsum(starts | (np.arange(4000) % 80 == 0))
    assert not set(word[chosen]) & set(word[~chosen])
    assert marked.labels.tolist() == ids[chosen].tolist()


def test_spans_have_not_changed() -> None:
    """A run is continued with the masks that it began with."""
    masked = mask(np.arange(100, 130), np.array([30]), keys(1), replace(RULE, rate=0.3))
    assert masked.selected.tolist() == [6, 7, 8, 9, 20, 21, 22, 27, 28, 29]
    assert masked.tokens[masked.selected].tolist() == [4, 4, 4, 4, 4, 4, 4, 4, 4, 4]
