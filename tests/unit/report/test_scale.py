"""Ticks are round, labels tell them apart, numbers are short."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scaletrain.report.scale import duration, exact, fitted, fixed, labels, round_ticks, short, size

NUMBERS = st.floats(-1e100, 1e100, allow_nan=False)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 400, [0, 100, 200, 300, 400]),
        (4.87, 9.04, [4, 6, 8, 10]),
        (-0.13, 0.21, [-0.2, -0.1, 0.0, 0.1, 0.2, 0.3]),
        (1, 1e6, [0, 5e5, 1e6]),
        (0, 3e-5, [0, 1e-5, 2e-5, 3e-5]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, ticks: list[float]) -> None:
    assert round_ticks(low, high, 5) == ticks


@given(NUMBERS, NUMBERS, st.booleans())
@example(0.0, 5e-324, False)
@example(1e-310, 1e-310, True)
@example(5e-324, 1.0, True)
@example(1.0, 1.0 + 1e-15, False)
def test_any_two_values_have_an_axis_around_them(one: float, other: float, logarithmic: bool) -> None:
    low, high = sorted((one, other))
    axis = fitted(low, high, 5, may_be_logarithmic=logarithmic)
    assert -1e-6 <= axis.share(low) <= axis.share(high) <= 1 + 1e-6
    assert 2 <= len(axis.ticks) <= 12 and len(axis.labels) == len(axis.ticks)
    assert len(set(axis.labels)) == len(axis.labels)


@given(st.integers(0, 10**12), st.integers(0, 10**12))
def test_steps_end_where_the_run_ends(one: int, other: int) -> None:
    low, high = sorted((one, other))
    axis = exact(low, high)
    assert (axis.low, axis.high) == ((low, high) if low < high else (0, max(high, 1)))
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert axis.ticks[-1] == axis.high and 2 <= len(axis.ticks) <= 9 and len(set(axis.labels)) == len(axis.ticks)


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (1, 82, "20 40 60 82"),
        (1, 240, "50 100 150 200 240"),
        (0, 400, "0 100 200 300 400"),
        (0, 114, "0 20 40 60 80 114"),
        (1, 523_417, "100k 200k 300k 400k 523,417"),
        (1, 2, "1 2"),
        (1, 3, "1 2 3"),
        (1, 1, "0 1"),
        (0, 0, "0 1"),
        (7, 7, "0 2 4 6 7"),
        (1_000, 1_002, "1,000 1,001 1,002"),
    ],
)
def test_steps_have_round_ticks_and_the_last_step(low: int, high: int, shown: str) -> None:
    assert " ".join(exact(low, high).labels) == shown


def test_a_wide_range_of_positive_values_may_be_logarithmic() -> None:
    axis = fitted(0.3, 31.0, 5, may_be_logarithmic=True)
    assert (axis.labels, axis.logarithmic) == (("0.1", "1", "10", "100"), True)
    assert axis.share(1.0) == pytest.approx(1 / 3)
    assert not fitted(0.3, 31.0, 5).logarithmic
    assert not fitted(0.0, 31.0, 5, may_be_logarithmic=True).logarithmic
    assert not fitted(1.0, 31.0, 5, may_be_logarithmic=True).logarithmic


@pytest.mark.parametrize(
    ("ticks", "shown"),
    [
        ((0, 0.5, 1.0), ("0", "0.5", "1.0")),
        ((0, 2.5, 5.0), ("0", "2.5", "5.0")),
        ((0, 200_000, 400_000), ("0", "200k", "400k")),
        ((0, 5_000, 10_000), ("0", "5k", "10k")),
        ((9_000, 9_500, 10_000), ("9.0k", "9.5k", "10.0k")),
        ((0, 1e6, 2e6), ("0", "1M", "2M")),
        ((0, 1_000, 2_000), ("0", "1,000", "2,000")),
        ((0, 1e-5, 2e-5), ("0", "1e\N{MINUS SIGN}5", "2e\N{MINUS SIGN}5")),
    ],
)
def test_labels(ticks: tuple[float, ...], shown: tuple[str, ...]) -> None:
    assert labels(ticks) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "\N{EN DASH}"),
        (float("nan"), "not finite"),
        (float("-inf"), "not finite"),
        (0.0, "0"),
        (2.31449, "2.314"),
        (-0.5, "\N{MINUS SIGN}0.5"),
        (12345.6, "12,346"),
        (1_486_976, "1,486,976"),
        (0.001, "0.001"),
        (0.00012345, "1.234e\N{MINUS SIGN}4"),
        (1.2e9, "1.2e9"),
        (100, "100"),
        (9.99996, "10"),
    ],
)
def test_short_numbers(value: float | None, shown: str) -> None:
    assert short(value) == shown


def test_whole_numbers_that_no_float_holds() -> None:
    assert [short(10**400), short(-(10**400))] == ["over 1e300", "under \N{MINUS SIGN}1e300"]


def test_the_axis_around_one_value_does_not_go_below_0_where_the_value_does_not() -> None:
    assert [(axis.low, axis.high) for axis in (fitted(value, value, 5) for value in (0.0, -1.0))] == [(0.0, 1.0), (-1.1, -0.9)]


def test_numbers_to_fewer_digits() -> None:
    assert [short(value, 2) for value in (9.241e-39, 0.003149, 1.0, 123.0)] == ["9.2e\N{MINUS SIGN}39", "0.0031", "1", "123"]
    assert short(3e-5, 1) == "3e\N{MINUS SIGN}5"


def test_fixed_numbers() -> None:
    assert [fixed(value) for value in (None, 0.98765, -0.0125, 1)] == ["\N{EN DASH}", "0.988", "\N{MINUS SIGN}0.013", "1.000"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (42.4, "42 s"), (133, "2 min 13 s"), (3725, "1 h 02 min"), (90_000, "1 d 01 h"), (59.6, "1 min 00 s")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_sizes() -> None:
    assert [size(n) for n in (950, 1720, 1.72e9, 3e12)] == ["950 B", "1.72 kB", "1.72 GB", "3 TB"]
