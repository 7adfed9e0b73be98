"""Masks: the 80/10/10 rule, and that a chunk is masked as if it were alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scaletrain.data import keyed
from scaletrain.data.masking import Masked, MaskRule, chunk_keys, mask
from scaletrain.data.plan import Picks

SPECIAL = np.array([0, 1, 2, 3, 4])
RULE = MaskRule(rate=0.3, masked=0.8, randomised=0.1, mask_id=4, vocab_size=1000, special=SPECIAL)


def text(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 1000, n).astype(np.int32)


def chunks(*lengths: int) -> list[np.ndarray]:
    return [text(n, seed) for seed, n in enumerate(lengths)]


@pytest.fixture(scope="module")
def large() -> tuple[np.ndarray, Masked]:
    tokens = text(400_000)
    return tokens, mask(tokens, np.full(4000, 100), keyed.derive(1, np.arange(4000)), RULE)


def within(share: float, expected: float, n: int) -> bool:
    """Within four standard errors of a binomial share."""
    return abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n)


def test_the_rate_is_that_of_the_rule(large: tuple[np.ndarray, Masked]) -> None:
    assert within(len(large[1].selected) / 400_000, 0.3, 400_000)


def test_of_the_chosen_80_become_the_mask_10_a_random_token_and_10_stay(large: tuple[np.ndarray, Masked]) -> None:
    _, masked = large
    now, n = masked.tokens[masked.selected], len(masked.selected)
    same = now == masked.labels
    assert within((now == 4).mean(), 0.8, n)
    assert within(((now != 4) & ~same).mean(), 0.1 * (1 - 1 / 995), n)
    assert within(same.mean(), 0.1 * (1 + 1 / 995), n)


def test_random_tokens_are_uniform_over_the_ordinary_ones(large: tuple[np.ndarray, Masked]) -> None:
    _, masked = large
    now = masked.tokens[masked.selected]
    drawn = np.bincount(now[(now != 4) & (now != masked.labels)], minlength=1000)
    assert drawn[:5].sum() == 0
    expected = drawn.sum() / 995
    assert ((drawn[5:] - expected) ** 2 / expected).sum() < 994 + 4 * np.sqrt(2 * 994)


def test_what_is_not_chosen_is_untouched_and_labels_are_the_original(large: tuple[np.ndarray, Masked]) -> None:
    tokens, masked = large
    restored = masked.tokens.copy()
    restored[masked.selected] = masked.labels
    assert np.array_equal(restored, tokens)
    assert (np.diff(masked.selected) > 0).all()


def test_every_place_in_a_chunk_is_chosen_equally_often(large: tuple[np.ndarray, Masked]) -> None:
    per_place = np.bincount(large[1].selected % 100, minlength=100)
    assert ((per_place - 1200) ** 2 / (1200 * 0.7)).sum() < 99 + 4 * np.sqrt(2 * 99)


@pytest.mark.parametrize("whole_word", [False, True])
def test_a_chunk_alone_is_masked_as_in_any_batch(whole_word: bool) -> None:
    starts = np.random.default_rng(1).random(1000) < 0.2
    rule = replace(RULE, starts_word=starts if whole_word else None)
    parts, keys = chunks(17, 1, 300, 64), keyed.derive(9, np.arange(4))
    alone = [mask(part, np.array([len(part)]), key[None], rule) for part, key in zip(parts, keys, strict=True)]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 0]):
        lengths = np.array([len(parts[i]) for i in order])
        together = mask(np.concatenate([parts[i] for i in order]), lengths, keys[order], rule)
        assert together.tokens.tolist() == np.concatenate([alone[i].tokens for i in order]).tolist()
        assert together.labels.tolist() == np.concatenate([alone[i].labels for i in order]).tolist()
        begins = np.cumsum(lengths) - lengths
        assert (
            together.selected.tolist()
            == np.concatenate([alone[i].selected + b for i, b in zip(order, begins, strict=True)]).tolist()
        )


def test_special_tokens_are_never_chosen() -> None:
    tokens = np.tile(np.array([1, 7], np.int32), 500)
    masked = mask(tokens, np.array([1000]), keyed.derive(0, 1), replace(RULE, rate=0.999))
    assert set(masked.labels) == {7}
    assert len(masked.selected) > 480


def test_whole_words_are_chosen_or_left() -> None:
    starts = np.zeros(1000, np.bool_)
    starts[:500] = True
    tokens, lengths = text(200_000), np.full(2000, 100)
    masked = mask(tokens, lengths, keyed.derive(1, np.arange(2000)), replace(RULE, starts_word=starts))
    word = np.cumsum(starts[tokens] | (np.arange(200_000) % 100 == 0))
    chosen = np.zeros(200_000, np.bool_)
    chosen[masked.selected] = True
    for value in (chosen, ~chosen):
        assert len(np.unique(word[value])) + len(np.unique(word[~value])) == len(np.unique(word))
    assert abs(chosen.mean() - 0.3) < 0.01


def test_a_word_does_not_reach_into_the_next_chunk() -> None:
    """Pieces of long documents begin anywhere: with no word start in sight, every chunk is one word and chosen as alone."""
    rule, keys = replace(RULE, starts_word=np.zeros(1000, np.bool_)), keyed.derive(2, np.arange(200))
    together = mask(text(1000), np.full(200, 5), keys, rule)
    alone = [len(mask(text(5), np.array([5]), key[None], rule).selected) for key in keys]
    assert np.bincount(together.selected // 5, minlength=200).tolist() == alone
    assert set(alone) == {0, 5}


def test_masks_follow_seed_corpus_pass_and_chunk() -> None:
    picks = Picks(np.array([0, 1, 0, 0], np.int16), np.array([0, 0, 1, 0]), np.array([5, 5, 5, 6]))
    keys = chunk_keys(1, ["a", "b"], picks)
    assert len({*keys.tolist(), *chunk_keys(2, ["a", "b"], picks).tolist()}) == 8


def test_masks_know_a_corpus_by_its_digest_not_by_its_number() -> None:
    first = chunk_keys(1, ["a", "b"], Picks(np.array([1], np.int16), np.array([3]), np.array([5])))
    second = chunk_keys(1, ["b"], Picks(np.array([0], np.int16), np.array([3]), np.array([5])))
    assert first.tolist() == second.tolist()


def test_no_chunk_gives_no_mask() -> None:
    nothing = Picks(np.empty(0, np.int16), np.empty(0, np.int64), np.empty(0, np.int64))
    masked = mask(np.empty(0, np.int32), np.empty(0, np.int64), chunk_keys(1, ["a"], nothing), RULE)
    assert [len(part) for part in masked] == [0, 0, 0]


def test_masks_have_not_changed() -> None:
    """A run is continued with the masks that it began with."""
    keys = chunk_keys(1, ["a"], Picks(np.array([0], np.int16), np.array([0]), np.array([3])))
    masked = mask(np.arange(100, 112), np.array([12]), keys, RULE)
    assert masked.selected.tolist() == [2, 4, 6, 7, 11]
    assert masked.tokens[masked.selected].tolist() == [4, 4, 4, 4, 4]
