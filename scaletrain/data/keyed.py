"""Randomness as a function: the same key and the same counter give the same number, anywhere, at once and in any order.

Nothing here has a state, so nothing has to be saved, replayed or handed to a worker. Arithmetic is on ``uint64`` and wraps
around. A hash and a bijection are all that the rest of the data layer needs: which chunk comes when (``permute``), which token
is masked (``uniform``), which seed a micro-batch has (``key``).
"""

from __future__ import annotations

import functools
import hashlib
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

U64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_BLOCK = 1 << 13
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)


def key(*parts: int | str) -> int:
    """A 64-bit key for a tuple of integers and strings; different tuples (types and boundaries count) have different keys."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = str(part).encode()
        digest.update(f"{type(part).__name__}{len(data)}:".encode() + data)
    return int.from_bytes(digest.digest(), "little")


def mix(value: ArrayLike) -> U64:
    """Hash every 64-bit integer to another one, all 64 output bits depending on all input bits; a bijection of ``uint64``.

    The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    word = np.array(value, dtype=np.uint64, ndmin=1)
    flat = word.reshape(-1)
    for begin in range(0, len(flat), _BLOCK):  # what stays in the processor's cache takes half the time
        block = flat[begin : begin + _BLOCK]
        block += _GOLDEN
        block ^= block >> _S30
        block *= _FIRST
        block ^= block >> _S27
        block *= _SECOND
        block ^= block >> _S31
    return word


@functools.lru_cache(maxsize=1)
def _mixed_counters(count: int) -> U64:
    return mix(np.arange(count, dtype=np.uint64))


def derive_at(keys: U64, places: NDArray[np.int64]) -> U64:
    """What ``derive`` gives, for counters that are small and come again and again: their first half is a table."""
    most = int(places.max(initial=0)) + 1
    return mix(_mixed_counters(1 << most.bit_length())[places] ^ keys)


def below(hashes: U64, share: float) -> NDArray[np.bool_]:
    """Whether the number that each hash stands for is less than ``share``, without making it."""
    limit = math.ceil(share * 2**53)
    return hashes < np.uint64(limit << 11) if limit < 2**53 else np.ones(hashes.shape, np.bool_)


def derive(key: ArrayLike, counter: ArrayLike) -> U64:
    """One key per counter out of a key: ``uint64``, of the broadcast shape of the two (at least one-dimensional)."""
    return mix(mix(counter) ^ np.asarray(key, dtype=np.uint64))


def uniform(key: ArrayLike, counter: ArrayLike) -> NDArray[np.float64]:
    """Number ``counter`` of the random sequence named ``key``: ``float64`` in [0, 1), a multiple of 2**-53."""
    return number(derive(key, counter))


def number(hashes: U64) -> NDArray[np.float64]:
    """The number in [0, 1) that a hash stands for."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(position: ArrayLike, size: int, key: ArrayLike) -> NDArray[np.int64]:
    """Where a shuffle of ``range(size)`` puts each position, without the table of the shuffle: O(1) memory and time in ``size``.

    A Feistel network on the smallest number of bits that holds ``size``; a result outside the range goes through it again until
    it is inside (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), less than twice on average.
    ``key`` is one key or one per position. Raises ValueError for a position outside ``range(size)``.
    """
    return _walk(position, size, key, backwards=False)


def unpermute(image: ArrayLike, size: int, key: ArrayLike) -> NDArray[np.int64]:
    """The inverse of ``permute``: the position that it sends to ``image``."""
    return _walk(image, size, key, backwards=True)


def _walk(start: ArrayLike, size: int, key: ArrayLike, *, backwards: bool) -> NDArray[np.int64]:
    place = np.atleast_1d(np.asarray(start, dtype=np.int64))
    if place.size and (place.min() < 0 or place.max() >= size):
        raise ValueError(f"positions {place.min()} to {place.max()} are not all inside range({size})")
    if size <= 1:
        return place.copy()
    bits = (size - 1).bit_length()
    # Halves of a few bits need more turns than wide ones before a chi-square test of neighbours passes.
    turn_keys = derive(key, np.arange(6 + 48 // bits)[:, None])
    values = _feistel(place.astype(np.uint64), bits, turn_keys, backwards)
    outside = np.flatnonzero(values >= np.uint64(size))
    while outside.size:
        again = _feistel(values[outside], bits, turn_keys[:, outside] if turn_keys.shape[1] > 1 else turn_keys, backwards)
        values[outside] = again
        outside = outside[again >= np.uint64(size)]
    return values.astype(np.int64)


def _feistel(values: U64, bits: int, turn_keys: U64, backwards: bool) -> U64:
    """Mix the two halves into each other in turn; when ``bits`` is odd the low one is a bit wider.

    Four turns make a pseudorandom permutation of wide halves (Luby and Rackoff, "How to construct pseudorandom permutations",
    1988).
    """
    low_bits, high_bits = (bits + 1) // 2, bits // 2
    low, high = values & np.uint64((1 << low_bits) - 1), values >> np.uint64(low_bits)
    turns = list(enumerate(turn_keys))
    for turn, keys in reversed(turns) if backwards else turns:
        if turn % 2 == 0:
            low ^= _scramble(high ^ keys, low_bits)
        elif high_bits:
            high ^= _scramble(low ^ keys, high_bits)
    return (high << np.uint64(low_bits)) | low


def _scramble(word: U64, bits: int) -> U64:
    """The top ``bits`` of a shorter hash than ``mix``: half the time, and the top bits depend on all input bits."""
    word *= _FIRST
    word ^= word >> _S31
    word *= _SECOND
    return word >> np.uint64(64 - bits)
