"""Bins lose no point and no extreme."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaletrain.report.bins import Bin, between, binned, within

CURVES = st.lists(st.one_of(st.floats(-1e9, 1e9), st.just(math.nan)), min_size=1, max_size=200)


@given(CURVES, st.integers(1, 40))
def test_no_point_and_no_extreme_is_lost(y: list[float], bins: int) -> None:
    x = [float(3 * step) for step in range(len(y))]
    found = binned(x, y, bins)
    finite = [value for value in y if math.isfinite(value)]
    assert len(found) <= bins
    assert (sum(each.points for each in found), sum(each.finite for each in found)) == (len(y), len(finite))
    assert (found[0].first, found[-1].last) == (x[0], x[-1])
    if finite:
        assert min(each.low for each in found if each.finite) == min(finite)
        assert max(each.high for each in found if each.finite) == max(finite)
        total = math.fsum(each.mean * each.finite for each in found if each.finite)
        assert total == pytest.approx(math.fsum(finite), rel=1e-9, abs=1e-3)


def test_few_points_are_shown_as_they_are() -> None:
    assert binned([1, 2, 9], [5.0, math.inf, 7.0], 3)[::2] == [Bin(1, 1, 1, 1, 5.0, 5.0, 5.0), Bin(9, 9, 1, 1, 7.0, 7.0, 7.0)]


def test_values_at_one_place_share_a_bin() -> None:
    assert binned([1, 1, 1, 9], [5.0, 7.0, 9.0, 1.0], 2) == [Bin(1, 1, 3, 3, 5.0, 9.0, 7.0), Bin(9, 9, 1, 1, 1.0, 1.0, 1.0)]


def test_bins_have_equal_widths_and_empty_ones_are_left_out() -> None:
    found = binned([0, 1, 2, 90, 100], [1.0, 2.0, 6.0, 4.0, 8.0], 4)
    assert found == [Bin(0, 2, 3, 3, 1.0, 6.0, 3.0), Bin(90, 100, 2, 2, 4.0, 8.0, 6.0)]
    assert found[0].middle == 1.0


def test_a_bin_without_a_finite_value_says_so() -> None:
    (lost,) = between([1, 2], [math.nan, math.inf], [])
    assert (lost.points, lost.finite) == (2, 0) and math.isnan(lost.mean)


def test_a_point_on_an_edge_counts_to_the_right() -> None:
    assert [each.points for each in between([0, 1, 2, 3], [0.0] * 4, [2])] == [2, 2]


def test_within_includes_both_ends() -> None:
    x, y = [1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0]
    part = within(x, y, 2, 3)
    assert part is not None and (part.points, part.mean) == (2, 2.5)
    assert within(x, y, 2.1, 2.9) is None
