"""Duplicates: which documents repeat another one, word for word or nearly.

Two texts are near duplicates when their sets of shingles (short runs of characters or words) have a Jaccard similarity of at
least a threshold. It is estimated by MinHash signatures (Broder 1997), which ``datasketch`` computes, and candidates are found by
locality-sensitive hashing: signatures that agree in all values of a band (Leskovec, Rajaraman, Ullman 2014, chapter 3). The first
document in the order of the source stays, train before validation; a document is compared with those that stayed.

Signatures are a pure function of the text, so they are computed in the tokenising processes; looking for candidates is done in
one place and is cheap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt
from pydantic import Field

from scaletrain.data.journal import Log
from scaletrain.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    from datasketch import MinHash

Signatures = npt.NDArray[np.uint32]

_HASH_BYTES = 16
_SEED = 1  # of the permutations: what decides which documents are dropped is nobody's to choose
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, 2^64 over the golden ratio: its powers spread well
_AT_ONCE = 1 << 12


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactConfig:
    """Drop documents whose clean text occurred before, in validation also those that occur in train."""

    name: Literal["exact"] = "exact"


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepConfig:
    """Keep all documents."""

    name: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class MinHashConfig:
    """Drop exact duplicates, and documents that nearly repeat an earlier one; needs ``pip install 'scaletrain[minhash]'``.

    Holds in memory, for each document that stays, 4 bytes per permutation and about 100 per band: some 1.5 kB as preset.
    """

    name: Literal["minhash"] = "minhash"
    threshold: Annotated[float, Field(ge=0.3, le=1)] = 0.8
    """Jaccard similarity, as estimated, from which on a document is a near duplicate."""
    permutations: Annotated[int, Field(ge=16, le=1024)] = 128
    """Values of a signature: the estimate is off by about sqrt(J (1 - J) / permutations)."""
    shingles: Literal["characters", "words"] = "characters"
    """What texts are compared by: runs of characters, for any language, or of words between white space. Case is ignored."""
    shingle_size: Annotated[int, Field(ge=1, le=64)] = 5
    """Characters or words in a run; a shorter text is one run."""


DeduplicateConfig = Annotated[ExactConfig | MinHashConfig | KeepConfig, Field(discriminator="name")]


def require_usable(config: DeduplicateConfig) -> None:
    """Raise ConfigError when near duplicates are asked for and cannot be found: no library, or no bands for the threshold."""
    if isinstance(config, MinHashConfig):
        try:
            bands(config)
        except ImportError:
            rule = "near duplicates are found through datasketch, which is not installed"
            raise ConfigError("deduplicate.name", config.name, rule, "pip install 'scaletrain[minhash]'") from None


def bands(config: MinHashConfig) -> tuple[int, int]:
    """(bands, values in each): those that err least often at the threshold, missed and needless candidates taken together."""
    from datasketch import MinHashLSH

    try:
        index = MinHashLSH(threshold=config.threshold, num_perm=config.permutations)
    except ValueError:
        rule = f"too close to 1 for {config.permutations} permutations"
        remedy = "Lower it, or raise deduplicate.permutations"
        raise ConfigError("deduplicate.threshold", config.threshold, rule, remedy) from None
    return int(index.b), int(index.r)


class Signer:
    """Computes signatures."""

    def __init__(self, config: MinHashConfig) -> None:
        from datasketch import MinHash

        self._config = config
        self._empty = MinHash(num_perm=config.permutations, seed=_SEED, hashfunc=int, scheme="affine32")

    def sign(self, text: str) -> bytes:
        """The signature of a text: ``permutations`` u32."""
        made: MinHash = self._empty.copy()
        hashes = shingles(text, self._config.shingles, self._config.shingle_size)
        if len(hashes) > _AT_ONCE:  # a set; in a short text, repeats cost less than looking for them
            hashes = np.unique(hashes)
        for at in range(0, len(hashes), _AT_ONCE):  # the library needs 4 bytes for each of them and each permutation
            made.update_batch(hashes[at : at + _AT_ONCE].tolist())
        return np.asarray(made.hashvalues, "<u4").tobytes()


def shingles(text: str, kind: str, size: int) -> npt.NDArray[np.uint32]:
    """A hash of each run of ``size`` characters or words of a text in lower case; of the whole text when it is shorter."""
    text = text.lower()
    if kind == "words":
        units = np.array([crc32(word.encode()) for word in text.split()], np.uint64)
    else:
        units = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.uint64)
    size = min(size, len(units))
    runs = np.zeros(len(units) - size + 1, np.uint64)
    for place in range(size):  # a polynomial modulo 2^64, whose upper half depends on every bit of every unit
        runs = runs * np.uint64(_MULTIPLIER) + units[place : len(units) - size + 1 + place] + np.uint64(1)
    return (runs * np.uint64(_MULTIPLIER) >> np.uint64(32)).astype(np.uint32)


class Repeat(NamedTuple):
    """Why a document is not used."""

    reason: Literal["duplicate", "near_duplicate"]
    details: dict[str, Any]
    """Of a near duplicate: the document that it repeats, and their similarity as estimated."""


class NearDuplicates:
    """The signatures of the documents that stayed, and where to look for those that agree with a new one."""

    def __init__(self, config: MinHashConfig, splits: Sequence[str], log: Log) -> None:
        """Takes up what ``log`` has of an interrupted run. Raises CorpusError when that is something else."""
        self._threshold, self._splits, self._log = config.threshold, tuple(splits), log
        self._bands, self._rows = bands(config)
        # The library's own index has a set for every bucket: 3 kB a document, where these have 0.9.
        self._buckets: list[dict[int, int | tuple[int, ...]]] = [{} for _ in range(self._bands)]
        self._powers = np.array([pow(_MULTIPLIER, place + 1, 1 << 64) for place in range(self._rows)], np.uint64)
        self._record = np.dtype([("split", "<u4"), ("document", "<u8"), ("signature", "<u4", config.permutations)])
        self._stored: list[Any] = []  # blocks of records, so that growing copies nothing
        self._count = 0
        for data in log.read(self._record.itemsize) if log.size else ():
            if len(data) % self._record.itemsize or any(np.frombuffer(data, self._record)["split"] >= len(self._splits)):
                rule = "it holds the signatures of an interrupted prepare"
                raise CorpusError(str(log.file), "another content", rule, "Prepare again with --fresh")
            for record in np.frombuffer(data, self._record):
                self._store(record, self._keys(record["signature"]))

    def find(self, split: str, document: int, signature: bytes) -> Repeat | None:
        """The document that this one nearly repeats: the most similar one, of equals the first. None: this one stays."""
        values: Signatures = np.frombuffer(signature, "<u4")
        keys = self._keys(values)
        candidates = sorted(set(self._candidates(keys)))
        if candidates:
            stored = np.stack([self._stored[there // _AT_ONCE][there % _AT_ONCE] for there in candidates])
            agreeing = np.count_nonzero(stored["signature"] == values, axis=1)
            best = int(np.argmax(agreeing))
            jaccard = int(agreeing[best]) / len(values)
            if jaccard >= self._threshold:
                of = {"split": self._splits[stored[best]["split"]], "document": int(stored[best]["document"])}
                return Repeat("near_duplicate", {"of": of, "jaccard": round(jaccard, 4)})
        record = np.zeros(1, self._record)
        record["split"], record["document"], record["signature"] = self._splits.index(split), document, values
        self._log.add(record.tobytes())
        self._store(record[0], keys)
        return None

    def _keys(self, values: Signatures) -> list[int]:
        """A hash of each band; two bands that share one by chance are told apart by the estimate."""
        bands = values[: self._bands * self._rows].reshape(self._bands, self._rows).astype(np.uint64)
        keys: list[int] = (bands * self._powers).sum(1).tolist()
        return keys

    def _candidates(self, keys: list[int]) -> Iterator[int]:
        for bucket, key in zip(self._buckets, keys, strict=True):
            found = bucket.get(key)
            if found is not None:
                yield from (found,) if isinstance(found, int) else found

    def _store(self, record: Any, keys: list[int]) -> None:
        if self._count == len(self._stored) * _AT_ONCE:
            self._stored.append(np.empty(_AT_ONCE, self._record))
        self._stored[-1][self._count % _AT_ONCE] = record
        for bucket, key in zip(self._buckets, keys, strict=True):
            there = bucket.setdefault(key, self._count)
            if there != self._count:
                bucket[key] = (*((there,) if isinstance(there, int) else there), self._count)
        self._count += 1


class Known:
    """The documents of all splits that were used so far: what the next one must not repeat."""

    def __init__(self, config: DeduplicateConfig, logs: Mapping[str, Log], splits: Sequence[str]) -> None:
        """Takes up what the logs have of an interrupted run. About 100 bytes a document for exact duplicates."""
        self._off = isinstance(config, KeepConfig)
        self._log = logs["seen.bin"]
        self._seen: set[bytes] = set()
        for data in self._log.read(_HASH_BYTES) if self._log.size else ():
            self._seen.update(data[at : at + _HASH_BYTES] for at in range(0, len(data), _HASH_BYTES))
        self._near: NearDuplicates | None = None
        if isinstance(config, MinHashConfig):
            self._near = NearDuplicates(config, splits, logs["signatures.bin"])

    def judge(self, split: str, document: int, hashed: bytes, signature: bytes) -> Repeat | None:
        """Whether a document repeats an earlier one; None: it does not, and is remembered."""
        if self._off:
            return None
        if hashed in self._seen:
            return Repeat("duplicate", {})
        self._seen.add(hashed)
        self._log.add(hashed)
        return self._near.find(split, document, signature) if self._near is not None else None
