"""Pairs: how their rows lie, that no row outgrows its chunk, and whose piece a second part is."""

from __future__ import annotations

import numpy as np
import pytest

from scaletrain.data import keyed
from scaletrain.data.pairs import NEAR, NO_QUESTION, Paired, PairKind, PairRule, pair
from scaletrain.data.plan import Picks

SEP = 2
KINDS: list[PairKind] = ["nsp", "sop"]
STARTS = np.ones(1_000_000, np.bool_)


def texts(*lengths: int) -> list[np.ndarray]:
    """Chunk n holds n * 1000 + 10, n * 1000 + 11, ...: each token says whose it is, and where it stood."""
    return [np.arange(n * 1000 + 10, n * 1000 + 10 + length, dtype=np.int32) for n, length in enumerate(lengths)]


def picks(n: int, apart: int = NEAR + 1, corpus: int = 0) -> Picks:
    return Picks(np.full(n, corpus, np.int16), np.zeros(n, np.int64), np.arange(n) * apart)


def paired(kind: PairKind, *lengths: int, seed: int = 1, apart: int = NEAR + 1, starts: np.ndarray = STARTS) -> Paired:
    rule = PairRule(kind, SEP, starts)
    return pair(texts(*lengths), picks(len(lengths), apart), keyed.derive(seed, np.arange(len(lengths))), rule)


def parts(found: Paired) -> list[tuple[list[int], list[int]]]:
    """Of each row its two parts; of one that is no pair the second is empty."""
    rows = np.split(found.tokens, np.cumsum(found.lengths)[:-1])
    split = [(row[:second].tolist(), row[second:].tolist()) for row, second in zip(rows, found.seconds.tolist(), strict=True)]
    assert all(one[-1] == SEP for one, two in split if two)
    return [(one[:-1], two) if two else (one, []) for one, two in split]


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_is_longer_than_its_chunk_and_its_last_token_is_given_up(kind: PairKind) -> None:
    lengths = [100, 99, 40, 7, 5, 4, 3]
    for seed in range(20):
        found = paired(kind, *lengths, seed=seed)
        assert (found.lengths <= lengths).all()
        for n, (one, two) in enumerate(parts(found)):
            assert one and two
            if found.labels[n] == 0:
                assert [*one, *two] == texts(*lengths)[n][:-1].tolist()
                assert found.lengths[n] == lengths[n]
            assert min(len(one), len(two)) >= (lengths[n] - 1) // 4 or kind == "nsp"


@pytest.mark.parametrize("kind", KINDS)
def test_too_short_to_be_cut_is_no_pair(kind: PairKind) -> None:
    found = paired(kind, 2, 1, 30, 30)
    assert found.labels[:2].tolist() == [NO_QUESTION] * 2
    assert parts(found)[:2] == [([10, 11], []), ([1010], [])]
    assert (found.labels[2:] >= 0).all()


def test_swapped_parts_are_both_whole() -> None:
    found = paired("sop", *[50] * 400)
    assert found.labels.mean() == pytest.approx(0.5, abs=4 * 0.025)
    for n, (one, two) in enumerate(parts(found)):
        assert [*one, *two] == sorted([*one, *two]) or found.labels[n] == 1
        assert sorted([*one, *two]) == texts(*[50] * 400)[n][:-1].tolist()


def test_half_of_the_second_parts_are_pieces_of_another_chunk_of_the_slot() -> None:
    found = paired("nsp", *[50] * 400)
    assert found.labels.mean() == pytest.approx(0.5, abs=4 * 0.025)
    partners = set()
    for n, (one, two) in enumerate(parts(found)):
        owners = {token // 1000 for token in two}
        assert len(owners) == 1
        assert (owners == {n}) == (found.labels[n] == 0)
        assert np.diff(two).tolist() == [1] * (len(two) - 1)
        assert len(one) + len(two) == 49
        partners |= owners - {n}
    assert len(partners) > 120  # of 200 draws from 400


def test_no_partner_has_a_number_near_by() -> None:
    for n, (_, two) in enumerate(parts(found := paired("nsp", *[50] * 100, apart=5))):
        partner = two[0] // 1000
        assert partner == n or abs(partner - n) * 5 > NEAR
        assert (partner == n) == (found.labels[n] == 0)


def test_a_chunk_of_another_corpus_is_never_near() -> None:
    corpora = Picks(np.array([0, 1, 0, 1], np.int16), np.zeros(4, np.int64), np.zeros(4, np.int64))
    for seed in range(20):
        found = pair(texts(*[20] * 4), corpora, keyed.derive(seed, np.arange(4)), PairRule("nsp", SEP, STARTS))
        for n, (_, two) in enumerate(parts(found)):
            assert found.labels[n] == 0 or (two[0] // 1000 - n) % 2 == 1


@pytest.mark.parametrize(("lengths", "apart"), [([50], 1), ([50, 50, 50], 1)])
def test_a_slot_without_another_text_asks_nothing(lengths: list[int], apart: int) -> None:
    found = paired("nsp", *lengths, apart=apart)
    assert found.labels.tolist() == [NO_QUESTION] * len(lengths)
    assert found.tokens.tolist() == np.concatenate(texts(*lengths)).tolist()
    assert found.seconds.tolist() == lengths
    assert (paired("sop", *lengths, apart=apart).labels >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_samples_give_no_rows(kind: PairKind) -> None:
    assert [len(part) for part in paired(kind)] == [0, 0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_part_begins_with_a_word_whoever_wrote_it(kind: PairKind) -> None:
    """Otherwise a piece of a word behind the separator would give the answer away."""
    starts = np.arange(1_000_000) % 10 % 3 == 1
    starts[10::1000] = True  # chunks begin with a word
    for _, two in parts(paired(kind, *[50] * 60, starts=starts)):
        assert starts[two[0]]


def test_words_that_a_chunk_has_marked_are_not_cut() -> None:
    starts = np.random.default_rng(3).random(50) < 0.3
    chunk = np.where(starts, ~texts(50)[0], texts(50)[0])  # the vocabulary says that none starts a word
    rule = PairRule("sop", SEP, np.zeros(1_000_000, np.bool_))
    for seed in range(20):
        found = pair([chunk], picks(1), keyed.derive(seed, np.arange(1)), rule)
        cut = found.tokens[found.seconds[0]] if found.labels[0] == 0 else found.tokens[0]
        assert cut < 0


def test_a_pair_follows_its_key_and_of_order_nothing_else() -> None:
    """Sentence order knows no other chunk."""
    whole = paired("sop", 30, 40, 50)
    keys = keyed.derive(1, np.arange(3))
    alone = [
        pair([chunk], picks(1), key[None], PairRule("sop", SEP, STARTS))
        for chunk, key in zip(texts(30, 40, 50), keys, strict=True)
    ]
    assert whole.tokens.tolist() == np.concatenate([each.tokens for each in alone]).tolist()
    assert whole.labels.tolist() == [int(each.labels[0]) for each in alone]
    assert paired("sop", 30, 40, 50, seed=2).tokens.tolist() != whole.tokens.tolist()
