"""The plan: order, mixture, phases, and the cursor that stands for all of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from scaletrain.data.plan import CorpusShape, Cursor, EvalPlan, Mixture, Order, OrderConfig, PhaseShape, Picks, Plan, tempered
from scaletrain.errors import ConfigError

ORDERS = [OrderConfig(), OrderConfig(block=8, window=1), OrderConfig(block=8, window=4)]


def one_corpus(chunks: int, chunks_per_step: int, steps: int, **kwargs: object) -> Plan:
    return Plan(1, [PhaseShape((CorpusShape("a", chunks),), chunks_per_step, steps)], **kwargs)  # type: ignore[arg-type]


def samples(plan: Plan | EvalPlan, steps: range) -> list[tuple[int, int, int]]:
    picked: list[tuple[int, int, int]] = []
    for step in steps:
        picks = plan.picks(step)
        picked += zip(picks.corpus.tolist(), picks.corpus_pass.tolist(), picks.chunk.tolist(), strict=True)
    return picked


@pytest.fixture
def phased() -> Plan:
    """Warm-up of the batch size, then a second corpus joins: every part of a plan is in play."""
    small, large = CorpusShape("a", 37, 1.0), CorpusShape("b", 101, 3.0)
    phases = [PhaseShape((small,), 5, 6), PhaseShape((small,), 9, 4), PhaseShape((large, small), 8, 20)]
    return Plan(3, phases, OrderConfig(block=4, window=3))


@pytest.mark.parametrize("config", ORDERS)
@pytest.mark.parametrize("chunks", [1, 2, 7, 8, 9, 31, 32, 33, 100])
def test_every_pass_holds_every_chunk_once(chunks: int, config: OrderConfig) -> None:
    order = Order(chunks, config, key=5)
    for number in range(3):
        assert sorted(order.chunk(np.full(chunks, number), np.arange(chunks))) == list(range(chunks))


@pytest.mark.parametrize("config", ORDERS)
def test_places_of_many_passes_together_equal_one_at_a_time(config: OrderConfig) -> None:
    order = Order(45, config, key=5)
    corpus_pass, place = np.divmod(np.arange(20, 160), 45)
    alone = [int(order.chunk(np.array([p]), np.array([q]))[0]) for p, q in zip(corpus_pass, place, strict=True)]
    assert order.chunk(corpus_pass, place).tolist() == alone


def test_passes_and_corpora_and_seeds_have_different_orders() -> None:
    orders = [Order(50, OrderConfig(), key).chunk(np.full(50, n), np.arange(50)).tolist() for key in (1, 2) for n in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_a_window_of_places_holds_whole_blocks_and_mixes_them() -> None:
    """Locality: 4 x 8 places touch 4 blocks (5 beside the short one), and the first 8 places are not one block."""
    order = Order(8 * 64, OrderConfig(block=8, window=4), key=5)
    blocks = order.chunk(np.zeros(512, np.int64), np.arange(512)).reshape(16, 32) // 8
    assert [len(set(window)) for window in blocks.tolist()] == [4] * 16
    assert all(len(set(window[:8])) > 1 for window in blocks.tolist())


def test_the_short_block_lands_anywhere() -> None:
    """Chunk 40 is alone in its block; over many passes it is at the beginning, in the middle and at the end."""
    order = Order(41, OrderConfig(block=8, window=1), key=5)
    passes = [order.chunk(np.full(41, n), np.arange(41)).tolist().index(40) for n in range(200)]
    assert set(passes) >= {0, 40} and len(set(passes)) > 6


@pytest.mark.parametrize("weights", [[1], [1, 1], [1, 3], [0.5, 0.25, 0.25], [2.0, 3.0, 5.0, 7.0], [0.1, np.pi, 5], [1, 1e-9]])
def test_a_mixture_keeps_to_its_shares_at_every_position(weights: list[float]) -> None:
    mixture = Mixture(weights)
    shares, n = mixture.quotas / mixture.cycle, len(weights)
    corpus, _ = mixture.deal(np.arange(10_000))
    given = np.cumsum(corpus[:, None] == np.arange(n), axis=0)
    assert (np.abs(given - shares * np.arange(1, 10_001)[:, None]) <= (1 + shares * n) / 2).all()


@pytest.mark.parametrize(("weights", "quotas"), [([4, 4], [1, 1]), ([0.1, 0.3], [1, 3]), ([1, 1e-9], [4095, 1])])
def test_a_mixture_cycle_is_the_shortest_that_is_exact(weights: list[float], quotas: list[int]) -> None:
    assert Mixture(weights).quotas.tolist() == quotas


def test_quotas_fill_the_longest_cycle_and_forget_nobody() -> None:
    weights = np.exp(np.random.default_rng(0).normal(0, 4, 300))
    quotas = Mixture(weights).quotas
    assert quotas.sum() == 4096 and quotas.min() == 1
    large = weights > 0.01 * weights.sum()
    assert np.allclose(quotas[large] / 4096, weights[large] / weights.sum(), rtol=0.1)


def test_the_running_index_of_a_corpus_has_no_gap() -> None:
    mixture = Mixture([2, 3, 0.7])
    corpus, index = mixture.deal(np.arange(5000))
    for number in range(3):
        assert index[corpus == number].tolist() == list(range((corpus == number).sum()))
    assert mixture.dealt(1234).tolist() == np.bincount(corpus[:1234], minlength=3).tolist()


def test_at_temperature_one_all_corpora_are_passed_over_equally_often() -> None:
    sizes = [700, 1500, 96, 5000]
    mixture = Mixture([tempered(1.0, size, 1.0) for size in sizes])
    assert (mixture.dealt(10 * sum(sizes)) / sizes).tolist() == pytest.approx([10.0] * 4, rel=0.01)


def test_a_temperature_flattens_the_shares_as_the_exponent_of_xlm_r_and_mt5_does() -> None:
    """p^0.3 over its sum, where p is the share by size; weights multiply."""
    sizes = np.array([700, 1500, 96, 5000])
    shares = (sizes / sizes.sum()) ** 0.3
    quotas = Mixture([tempered(1.0, int(size), 1 / 0.3) for size in sizes]).quotas
    assert (quotas / quotas.sum()).tolist() == pytest.approx((shares / shares.sum()).tolist(), abs=1 / 4096)
    tripled = Mixture([tempered(3.0 if size == 96 else 1.0, int(size), 1 / 0.3) for size in sizes]).quotas
    shares[2] *= 3
    assert (tripled / tripled.sum()).tolist() == pytest.approx((shares / shares.sum()).tolist(), abs=1 / 4096)


def test_an_infinite_temperature_is_the_weights_to_the_bit() -> None:
    assert [tempered(weight, 10**9 + 7, float("inf")) for weight in (0.1, 1.0, 3e17)] == [0.1, 1.0, 3e17]


def test_what_a_run_takes_of_each_corpus_is_what_its_steps_pick(phased: Plan) -> None:
    picked = [corpus for corpus, _, _ in samples(phased, range(phased.steps))]
    assert phased.samples_of_corpora().tolist() == [picked.count(0), picked.count(1)]


def test_a_pass_over_a_corpus_runs_across_step_and_phase_borders(phased: Plan) -> None:
    """No chunk comes a second time before all have come once, and (pass, chunk) never repeats."""
    everything = samples(phased, range(phased.steps))
    assert len(set(everything)) == len(everything) == 6 * 5 + 4 * 9 + 20 * 8
    for corpus, chunks in ((0, 37), (1, 101)):
        mine = [(corpus_pass, chunk) for number, corpus_pass, chunk in everything if number == corpus]
        for begin in range(0, len(mine) - chunks, chunks):
            assert Counter(mine[begin : begin + chunks]) == Counter((begin // chunks, chunk) for chunk in range(chunks))


def test_the_step_size_does_not_change_the_sample_stream() -> None:
    plans = [one_corpus(100, size, 240 // size) for size in (1, 8, 60, 240)]
    streams = [samples(plan, range(plan.steps)) for plan in plans]
    assert all(stream == streams[0] for stream in streams)


def test_another_seed_is_another_stream() -> None:
    streams = [samples(Plan(seed, [PhaseShape((CorpusShape("a", 30),), 10, 3)]), range(3)) for seed in (1, 2)]
    assert streams[0] != streams[1]
    assert sorted(streams[0]) == sorted(streams[1])


def test_another_corpus_in_the_mixture_does_not_change_the_order_of_one() -> None:
    alone = one_corpus(30, 10, 5)
    mixed = Plan(1, [PhaseShape((CorpusShape("b", 20), CorpusShape("a", 30)), 10, 10)])
    assert [s[1:] for s in samples(mixed, range(10)) if s[0] == 1] == [s[1:] for s in samples(alone, range(5))]


def test_from_every_cursor_the_remainder_is_the_tail_of_the_whole(phased: Plan) -> None:
    whole = [samples(phased, range(step, step + 1)) for step in range(phased.steps)]
    for step in range(phased.steps + 1):
        resumed = phased.step_at(phased.cursor(step))
        assert [samples(phased, range(s, s + 1)) for s in range(resumed, phased.steps)] == whole[step:]


def test_cursors_count_samples_within_a_phase(phased: Plan) -> None:
    assert [phased.cursor(step) for step in (0, 5, 6, 7, 10, 30)] == [(0, 0), (0, 25), (1, 0), (1, 9), (2, 0), (2, 160)]
    assert phased.step_at(Cursor(0, 30)) == phased.step_at(Cursor(1, 0)) == 6
    assert [phased.samples_before(step) for step in (0, 6, 7, 30)] == [0, 30, 39, 226]


@pytest.mark.parametrize("cursor", [Cursor(3, 0), Cursor(-1, 0), Cursor(1, 10), Cursor(0, 35), Cursor(0, -5)])
def test_a_cursor_that_is_not_on_a_step_is_refused(phased: Plan, cursor: Cursor) -> None:
    with pytest.raises(ConfigError, match=r"cursor\.(phase|samples)"):
        phased.step_at(cursor)


def test_steps_outside_the_plan_are_refused(phased: Plan) -> None:
    for step in (-1, phased.steps):
        with pytest.raises(IndexError, match="30 steps"):
            phased.picks(step)


def test_the_digest_follows_what_decides_the_order_and_nothing_else() -> None:
    def plan(seed: int = 1, digest: str = "a", chunks: int = 30, size: int = 10, steps: int = 5, block: int = 1) -> str:
        return Plan(seed, [PhaseShape((CorpusShape(digest, chunks),), size, steps)], OrderConfig(block=block)).digest

    different = [plan(), plan(seed=2), plan(digest="b"), plan(chunks=31), plan(size=11), plan(block=2)]
    assert len(set(different)) == len(different)
    assert plan(steps=500) == plan()


def test_weights_of_the_same_ratio_are_the_same_plan() -> None:
    def mixed(first: float, second: float) -> Plan:
        return Plan(1, [PhaseShape((CorpusShape("a", 30, first), CorpusShape("b", 20, second)), 10, 5)])

    assert mixed(1, 2).digest == mixed(10, 20).digest != mixed(2, 1).digest


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "phases: got"),
        ([PhaseShape((), 1, 1)], r"phases\.0\.corpora"),
        ([PhaseShape((CorpusShape("a", 9), CorpusShape("a", 9)), 1, 1)], "all different"),
        ([PhaseShape((CorpusShape("a", 0),), 1, 1)], "at least one chunk"),
        ([PhaseShape((CorpusShape("a", 9, 0.0),), 1, 1)], "weight above 0"),
        ([PhaseShape((CorpusShape("a", 9, float("nan")),), 1, 1)], "weight above 0"),
        ([PhaseShape((CorpusShape("a", 9),), 0, 1)], r"phases\.0\.chunks_per_step: got 0"),
        ([PhaseShape((CorpusShape("a", 9),), 1, 0)], r"phases\.0\.steps: got 0"),
        ([PhaseShape((CorpusShape("a", 9),), 1, 1), PhaseShape((CorpusShape("a", 8),), 1, 1)], "9 chunks in an earlier phase"),
    ],
)
def test_phases_that_cannot_be_trained_by_are_refused(phases: list[PhaseShape], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(1, phases)


def test_an_evaluation_sees_every_chunk_once_in_order_and_ends_short() -> None:
    plan = EvalPlan([CorpusShape("a", 7), CorpusShape("b", 4)], chunks_per_step=5)
    assert plan.steps == 3
    assert samples(plan, range(3)) == [(0, 0, chunk) for chunk in range(7)] + [(1, 0, chunk) for chunk in range(4)]
    assert [len(plan.picks(step)) for step in range(3)] == [5, 5, 1]
    assert [plan.samples_before(step) for step in range(4)] == [0, 5, 10, 11]


def test_picks_have_the_types_of_the_contract(phased: Plan) -> None:
    picks = phased.picks(12)
    assert [a.dtype.name for a in (picks.corpus, picks.corpus_pass, picks.chunk)] == ["int16", "int64", "int64"]
    assert isinstance(picks[:3], Picks) and len(picks[:3]) == 3


def test_the_order_has_not_changed() -> None:
    """Runs are continued by other versions of the code; a change of these values needs another ORDER_VERSION."""
    plan = Plan(7, [PhaseShape((CorpusShape("a", 20, 1.0), CorpusShape("b", 9, 2.0)), 6, 4)], OrderConfig(block=4, window=2))
    assert samples(plan, range(2, 3)) == [(1, 0, 3), (0, 0, 15), (1, 1, 3), (1, 1, 4), (0, 0, 13), (1, 1, 6)]
