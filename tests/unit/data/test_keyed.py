"""Keyed randomness: hashes, numbers and shuffles that are functions."""

from __future__ import annotations

import time

import numpy as np
import pytest

from scaletrain.data import keyed

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 1000, 4097]


def chi_square(observed: np.ndarray) -> float:
    expected = observed.sum() / len(observed)
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("size", SIZES)
def test_permute_is_a_bijection(size: int) -> None:
    assert sorted(keyed.permute(np.arange(size), size, key=11)) == list(range(size))


@pytest.mark.parametrize("size", [*SIZES, 10**9, 2**40])
def test_unpermute_is_the_inverse(size: int) -> None:
    positions = np.unique(np.linspace(0, size - 1, 500).astype(np.int64))
    assert np.array_equal(keyed.unpermute(keyed.permute(positions, size, 3), size, 3), positions)


def test_a_key_per_position_equals_one_key_at_a_time() -> None:
    keys = keyed.derive(5, np.arange(50))
    together = keyed.permute(np.arange(50), 50, keys)
    assert list(together) == [int(keyed.permute(place, 50, key)[0]) for place, key in enumerate(keys)]


def test_permute_refuses_positions_outside_the_range() -> None:
    for position in (-1, 10):
        with pytest.raises(ValueError, match=r"range\(10\)"):
            keyed.permute(position, 10, 0)


def test_all_orders_of_five_are_equally_likely_over_keys() -> None:
    keys = keyed.derive(1, np.arange(12_000))
    orders = np.stack([keyed.permute(np.full(len(keys), place), 5, keys) for place in range(5)], axis=1)
    counts = np.unique(orders @ 5 ** np.arange(5), return_counts=True)[1]
    assert len(counts) == 120
    assert chi_square(counts) < 119 + 4 * np.sqrt(2 * 119)


@pytest.mark.parametrize("size", [64, 1000])
def test_neighbours_are_carried_any_distance_apart(size: int) -> None:
    orders = np.stack([keyed.permute(np.arange(size), size, key) for key in keyed.derive(2, np.arange(200_000 // size))])
    distances = np.bincount((np.diff(orders, axis=1) % size).ravel(), minlength=size)[1:]
    assert chi_square(distances) < (size - 2) + 4 * np.sqrt(2 * (size - 2))


def test_a_shuffle_has_as_few_fixed_points_as_chance() -> None:
    fixed = [int((keyed.permute(np.arange(1000), 1000, key) == np.arange(1000)).sum()) for key in range(300)]
    assert np.mean(fixed) == pytest.approx(1.0, abs=0.25)


def test_a_step_of_a_billion_takes_milliseconds_and_no_table() -> None:
    began = time.process_time()
    image = keyed.permute(np.arange(500_000_000, 500_004_096), 10**9, key=9)
    assert len(set(image.tolist())) == 4096
    assert time.process_time() - began < 0.1


def test_uniform_is_uniform_and_below_one() -> None:
    numbers = keyed.uniform(4, np.arange(100_000))
    assert numbers.min() >= 0 and numbers.max() < 1
    assert chi_square(np.bincount((numbers * 100).astype(int), minlength=100)) < 99 + 4 * np.sqrt(2 * 99)


def test_numbers_of_neighbouring_keys_and_counters_are_unrelated() -> None:
    first, next_key, next_counter = (keyed.uniform(k, c + np.arange(100_000)) for k, c in ((4, 0), (5, 0), (4, 1)))
    assert abs(np.corrcoef(first, next_key)[0, 1]) < 0.015
    assert abs(np.corrcoef(first, next_counter)[0, 1]) < 0.015


def test_keys_tell_types_and_boundaries_apart() -> None:
    parts = [(1, 2), (12,), ("1", 2), ("12",), (2, 1), ("a", "bc"), ("ab", "c"), ("abc",), (), ("",), (-1, 2)]
    assert len({keyed.key(*each) for each in parts}) == len(parts)


def test_mix_is_splitmix64() -> None:
    """The generator seeded with 0 begins with this published number."""
    assert int(keyed.mix(0)[0]) == 0xE220A8397B1DCDAF


def test_the_functions_have_not_changed() -> None:
    """Runs are continued by other versions of the code: these values are part of the format of a checkpoint."""
    assert keyed.key(7, "order", "digest") == 5403111690046965925
    assert keyed.permute(np.arange(10), 10, key=7).tolist() == [6, 5, 2, 9, 3, 1, 8, 0, 7, 4]
    assert keyed.uniform(7, 3)[0] == 0.9082131990553513


def test_shortcuts_give_the_same_bits() -> None:
    keys, places = keyed.derive(3, np.arange(5000)), np.random.default_rng(1).integers(0, 700, 5000)
    hashes = keyed.derive_at(keys, places)
    assert np.array_equal(hashes, keyed.derive(keys, places))
    numbers = keyed.number(hashes)
    assert np.array_equal(numbers, keyed.uniform(keys, places))
    for share in (0.0, 1e-300, 0.15, float(numbers[7]), np.nextafter(float(numbers[7]), 1), np.nextafter(1.0, 0), 1.0):
        assert np.array_equal(keyed.below(hashes, share), numbers < share)


def test_long_arrays_are_mixed_as_short_ones() -> None:
    values = np.arange(50_000, dtype=np.uint64).reshape(5, 10_000)
    assert np.array_equal(keyed.mix(values), np.array([keyed.mix(row) for row in values]))
