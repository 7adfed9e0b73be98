"""Which chunks a training step sees: a pure function of the plan and the step, in closed form.

::

    step ─ phase ─► sample ─ mixture ─► corpus and its running index ─► pass and place ─ order ─► chunk

Nothing is drawn, buffered or counted while training goes on, so a position is reached in O(1) from a cursor of two integers, on
any number of ranks, and the sample stream cannot depend on who reads it. No table of a corpus is ever built.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from scaletrain.data import keyed
from scaletrain.errors import ConfigError

ORDER_VERSION = 1
"""Part of every plan's digest: raised when the same plan would give another order, so that old runs refuse instead of
diverging."""

MAX_CYCLE = 4096
"""Places in the longest cycle of a mixture: shares are exact to 1/4096, whatever the weights."""

MAX_SUBSTITUTES = 8
"""Chunks that are tried in the place of one that cannot be read: where none of them can, it is the storage that is broken."""

I64 = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderConfig:
    """How far apart a shuffle carries neighbouring chunks."""

    block: Annotated[int, Field(ge=1)] = 1
    """Consecutive chunks that stay near each other; 1 shuffles single chunks, a few hundred suit disks that dislike random
    reads."""
    window: Annotated[int, Field(ge=1)] = 64
    """Blocks whose chunks are mixed with each other, so that a step does not consist of whole blocks. Unused when `block` is
    1."""


@dataclass(frozen=True, slots=True)
class CorpusShape:
    """What a plan knows about a corpus: who it is, its number of chunks, and its share of the samples relative to the others."""

    digest: str
    chunks: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class PhaseShape:
    """A stretch of steps of one size over one mixture; warming up the batch size or the sequence length is a list of these."""

    corpora: tuple[CorpusShape, ...]
    chunks_per_step: int
    steps: int


class Cursor(NamedTuple):
    """Where a run stands: the phase, and the samples that it has consumed of that phase."""

    phase: int
    samples: int


@dataclass(frozen=True, slots=True, eq=False)
class Picks:
    """n samples: the number of the corpus (int16[n]), which pass over it (int64[n]), and the chunk in it (int64[n])."""

    corpus: NDArray[np.int16]
    corpus_pass: I64
    chunk: I64

    def __len__(self) -> int:
        return len(self.chunk)

    def __getitem__(self, places: I64 | slice) -> Picks:
        return Picks(self.corpus[places], self.corpus_pass[places], self.chunk[places])


class StepPlan(Protocol):
    """What the rest of the data layer needs of a plan: that of a training run, or that of an evaluation."""

    @property
    def steps(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def picks(self, step: int) -> Picks: ...

    def samples_before(self, step: int) -> int: ...

    def substitutes(self, corpus: int, corpus_pass: int, chunk: int) -> list[int]: ...


class Order:
    """A shuffle of one corpus for every pass over it: a bijection of `range(chunks)`, evaluated at any place without a table.

    Blocks of consecutive chunks are laid out in a shuffled order; then places are shuffled inside windows of several blocks.
    Only the last block is short: where it lands follows from the inverse bijection, and with it where every other one begins.
    """

    def __init__(self, chunks: int, config: OrderConfig, key: int) -> None:
        self._chunks, self._block, self._key = chunks, config.block, key
        self._blocks = -(-chunks // config.block)
        self._window = config.block * config.window if config.block > 1 else 1

    def chunk(self, corpus_pass: I64, place: I64) -> I64:
        """The chunk at each `place` (in `range(chunks)`) of each pass; int64, one per place."""
        passes, pass_of_place = np.unique(corpus_pass, return_inverse=True)
        block_keys, window_keys = keyed.derive(keyed.derive(self._key, passes), np.arange(2)[:, None])
        if self._window > 1:
            place = self._shuffle_windows(window_keys[pass_of_place], place)
        return self._lay_blocks(block_keys, pass_of_place, place)

    def _shuffle_windows(self, keys: keyed.U64, place: I64) -> I64:
        window, offset = np.divmod(place, self._window)
        keys, shuffled = keyed.derive(keys, window), np.empty_like(place)
        full_windows, rest = divmod(self._chunks, self._window)
        for size, inside in ((self._window, window < full_windows), (rest, window == full_windows)):
            if inside.any():
                shuffled[inside] = keyed.permute(offset[inside], size, keys[inside])
        return window * self._window + shuffled

    def _lay_blocks(self, pass_keys: keyed.U64, pass_of_place: I64, place: I64) -> I64:
        missing = self._blocks * self._block - self._chunks
        if missing:
            short_slot = keyed.unpermute(np.full(len(pass_keys), self._blocks - 1), self._blocks, pass_keys)
            short_end = (short_slot + 1) * self._block - missing
            # After the short block every block begins `missing` places early: put the gap back, and all blocks have one length.
            place = place + np.where(place >= short_end[pass_of_place], missing, 0)
        slot, offset = np.divmod(place, self._block)
        keys = pass_keys if len(pass_keys) == 1 else pass_keys[pass_of_place]
        return keyed.permute(slot, self._blocks, keys) * self._block + offset


def tempered(weight: float, chunks: int, temperature: float) -> float:
    """The weight of a corpus of ``chunks`` chunks in a mixture of this temperature: ``weight * chunks ** (1 / temperature)``.

    Sampling by an exponent of the size, as for the languages of XLM-R (Conneau et al., arXiv 1911.02116: 0.3) and mT5
    (Xue et al., arXiv 2010.11934: 0.3), written as a temperature as in Arivazhagan et al., arXiv 1907.05019. As there, a size is
    counted in what is dealt. At 1 and with equal weights all corpora are passed over equally often, as if they were one; at
    infinity the weights alone count.
    """
    return weight * math.pow(chunks, 1.0 / temperature)


class Mixture:
    """Samples dealt to corpora by integer quotas over a cycle of places, each corpus spread evenly over the cycle.

    At every position, not only on average, what a corpus with share s of n corpora has given is within (1 + s n) / 2 of its
    share.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.quotas = _quotas(np.asarray(weights, dtype=np.float64))
        self.cycle = int(self.quotas.sum())
        corpus = np.repeat(np.arange(len(self.quotas)), self.quotas)
        turn = np.concatenate([np.arange(quota) for quota in self.quotas])
        # Turn k of q comes in the middle of the k-th of q equal parts of the cycle.
        order = np.argsort((2 * turn + 1) / (2 * self.quotas[corpus]), kind="stable")
        self._corpus, self._turn = corpus[order], turn[order]

    def deal(self, sample: I64) -> tuple[I64, I64]:
        """For each sample, the corpus it comes from and how many samples of that corpus came before it."""
        cycle, place = np.divmod(sample, self.cycle)
        corpus = self._corpus[place]
        return corpus, cycle * self.quotas[corpus] + self._turn[place]

    def dealt(self, samples: int) -> I64:
        """How many of the first `samples` came from each corpus: int64, one per corpus."""
        cycles, rest = divmod(samples, self.cycle)
        return cycles * self.quotas + np.bincount(self._corpus[:rest], minlength=len(self.quotas))


def _quotas(weights: NDArray[np.float64]) -> I64:
    """Whole places per corpus, by the largest remainder, in the shortest cycle that has the weights exactly, else the longest."""
    shares = weights / weights.sum()
    exact = np.arange(1, MAX_CYCLE + 1)[:, None] * shares
    fits = ((np.abs(exact - np.rint(exact)) < 1e-9) & (exact > 0.5)).all(axis=1)
    if fits.any():
        quotas: I64 = np.rint(exact[int(np.argmax(fits))]).astype(np.int64)
        return quotas
    # One place each first, so that the smallest weight is not rounded away; the remainders share out what is left.
    wanted = np.maximum(exact[-1], 1.0)
    wanted = 1 + (wanted - 1) * (MAX_CYCLE - len(shares)) / (wanted - 1).sum()
    quotas = np.floor(wanted).astype(np.int64)
    quotas[np.argsort(quotas - wanted, kind="stable")[: MAX_CYCLE - quotas.sum()]] += 1
    return quotas


@dataclass(frozen=True, slots=True)
class _Phase:
    """A phase made ready: its mixture, the plan's number of each of its corpora, and what each had given before the phase."""

    shape: PhaseShape
    mixture: Mixture
    corpus_number: I64
    given_before: I64
    first_step: int
    first_sample: int


class Plan:
    """The sample stream of a training run.

    A corpus is known by its digest, and its passes are counted over the whole run: a phase takes up each corpus where the phases
    before it left off, so no chunk comes a second time before all have come once. Neither the other corpora of a mixture nor the
    size of the steps changes the order of one. Raises ConfigError for phases that cannot be trained by.
    """

    def __init__(self, seed: int, phases: Sequence[PhaseShape], order: OrderConfig | None = None) -> None:
        _check(phases)
        order, self._seed = order or OrderConfig(), seed
        known = {corpus.digest: corpus for phase in phases for corpus in phase.corpora}
        self.corpora = tuple(known.values())
        """What `Picks.corpus` counts in: every corpus of every phase once, by first appearance."""
        self._orders = [Order(corpus.chunks, order, keyed.key(seed, "order", corpus.digest)) for corpus in self.corpora]
        self._chunks = np.array([corpus.chunks for corpus in self.corpora])
        self._phases = _ready(phases, list(known))
        self._order = order
        self.steps = sum(phase.steps for phase in phases)
        self.digest = _digest(seed, order, self._phases)

    def described(self) -> dict[str, Any]:
        """All that the plan follows from, as JSON: without the corpora's files `of` makes the same plan of it."""
        return {"seed": self._seed, "order": asdict(self._order), "phases": [asdict(phase.shape) for phase in self._phases]}

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Plan:
        """The inverse of `described`."""
        phases = [
            PhaseShape(tuple(CorpusShape(**corpus) for corpus in each["corpora"]), each["chunks_per_step"], each["steps"])
            for each in described["phases"]
        ]
        return cls(described["seed"], phases, OrderConfig(**described["order"]))

    def picks(self, step: int) -> Picks:
        """The samples of step `step`, in their order; raises IndexError outside `range(steps)`."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is outside the plan's {self.steps} steps")
        phase = self._phases[self.cursor(step).phase]
        size = phase.shape.chunks_per_step
        local, index = phase.mixture.deal((step - phase.first_step) * size + np.arange(size))
        number = phase.corpus_number[local]
        corpus_pass, place = np.divmod(phase.given_before[local] + index, self._chunks[number])
        chunk = np.empty_like(place)
        for corpus in np.unique(number):
            mine = number == corpus
            chunk[mine] = self._orders[corpus].chunk(corpus_pass[mine], place[mine])
        return Picks(number.astype(np.int16), corpus_pass, chunk)

    def samples_of_corpora(self) -> I64:
        """Samples of the whole run that come from each of `corpora`; int64, one per corpus."""
        given = np.zeros(len(self.corpora), dtype=np.int64)
        for phase in self._phases:
            given[phase.corpus_number] += phase.mixture.dealt(phase.shape.steps * phase.shape.chunks_per_step)
        return given

    def cursor(self, step: int) -> Cursor:
        """The cursor of a run that has finished `step` steps and is about to take step `step`."""
        number = max(i for i, phase in enumerate(self._phases) if phase.first_step <= step)
        phase = self._phases[number]
        return Cursor(number, (step - phase.first_step) * phase.shape.chunks_per_step)

    def step_at(self, cursor: Cursor) -> int:
        """The step that a run at `cursor` takes next, the inverse of `cursor`; ConfigError for a cursor that is not on a step."""
        number, samples = cursor
        if not 0 <= number < len(self._phases):
            raise ConfigError("cursor.phase", number, f"the plan has {len(self._phases)} phases", "Give the run's phases back")
        phase = self._phases[number]
        steps, rest = divmod(samples, phase.shape.chunks_per_step)
        if rest or not 0 <= steps <= phase.shape.steps:
            rule = f"phase {number} has {phase.shape.steps} steps of {phase.shape.chunks_per_step} samples"
            raise ConfigError("cursor.samples", samples, rule, "Another step size begins with a phase of its own")
        return phase.first_step + steps

    def samples_before(self, step: int) -> int:
        """Samples that the steps before `step` consume, over all phases: what schedules are functions of."""
        number, samples = self.cursor(step)
        return self._phases[number].first_sample + samples

    def substitutes(self, corpus: int, corpus_pass: int, chunk: int) -> list[int]:
        """Chunks of the same corpus that stand in for one that cannot be read, in the order in which they are tried.

        From a keyed shuffle of the whole corpus: neighbours, which lie in the same shard, are often as damaged as the chunk.
        """
        chunks = int(self._chunks[corpus])
        key = keyed.key(self._seed, "substitute", self.corpora[corpus].digest, corpus_pass, chunk)
        candidates = keyed.permute(np.arange(min(chunks, MAX_SUBSTITUTES + 1)), chunks, key).tolist()
        return [candidate for candidate in candidates if candidate != chunk][:MAX_SUBSTITUTES]


class EvalPlan:
    """Every chunk of every corpus exactly once, in order, in steps of `chunks_per_step` of which the last may be short."""

    def __init__(self, corpora: Sequence[CorpusShape], chunks_per_step: int) -> None:
        self.corpora = tuple(corpora)
        self._begin = np.cumsum([0, *(corpus.chunks for corpus in corpora)])
        self._chunks_per_step = chunks_per_step
        self.samples = int(self._begin[-1])
        self.steps = -(-self.samples // chunks_per_step)
        shapes = [[corpus.digest, corpus.chunks] for corpus in corpora]
        self.digest = _hash({"evaluation": shapes, "chunks_per_step": chunks_per_step})

    def picks(self, step: int) -> Picks:
        """The samples of step `step`, all of pass 0; raises IndexError outside `range(steps)`."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is outside the plan's {self.steps} steps")
        sample = np.arange(self.samples_before(step), self.samples_before(step + 1))
        corpus = np.searchsorted(self._begin, sample, side="right") - 1
        return Picks(corpus.astype(np.int16), np.zeros_like(sample), sample - self._begin[corpus])

    def samples_before(self, step: int) -> int:
        """Chunks in the steps before `step`."""
        return min(step * self._chunks_per_step, self.samples)

    def substitutes(self, corpus: int, corpus_pass: int, chunk: int) -> list[int]:
        """None: a score over other samples than those of the data set would be another score."""
        return []


def _ready(phases: Sequence[PhaseShape], digests: list[str]) -> list[_Phase]:
    given, step, sample = np.zeros(len(digests), dtype=np.int64), 0, 0
    ready = []
    for shape in phases:
        mixture = Mixture([corpus.weight for corpus in shape.corpora])
        number = np.array([digests.index(corpus.digest) for corpus in shape.corpora])
        ready.append(_Phase(shape, mixture, number, given[number], step, sample))
        given[number] += mixture.dealt(shape.steps * shape.chunks_per_step)
        step, sample = step + shape.steps, sample + shape.steps * shape.chunks_per_step
    return ready


def _digest(seed: int, order: OrderConfig, phases: Sequence[_Phase]) -> str:
    """The last phase's number of steps is left out: a run may be made longer without changing what came before."""
    shapes = [
        {
            "corpora": [[c.digest, c.chunks, int(q)] for c, q in zip(phase.shape.corpora, phase.mixture.quotas, strict=True)],
            "chunks_per_step": phase.shape.chunks_per_step,
            "steps": phase.shape.steps if phase is not phases[-1] else None,
        }
        for phase in phases
    ]
    return _hash({"version": ORDER_VERSION, "seed": seed, "order": asdict(order), "phases": shapes})


def _hash(tree: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _check(phases: Sequence[PhaseShape]) -> None:
    if not phases:
        raise ConfigError("phases", [], "a plan needs at least one phase", "Give steps, chunks_per_step and a corpus")
    sizes: dict[str, int] = {}
    for number, phase in enumerate(phases):
        where = f"phases.{number}"
        digests = [corpus.digest for corpus in phase.corpora]
        if not 1 <= len(set(digests)) == len(digests) <= MAX_CYCLE:
            rule = f"a mixture has 1 to {MAX_CYCLE} corpora, all different"
            raise ConfigError(f"{where}.corpora", digests, rule, "Name each corpus once and give it the summed weight")
        for name, value in (("chunks_per_step", phase.chunks_per_step), ("steps", phase.steps)):
            if value < 1:
                raise ConfigError(f"{where}.{name}", value, "it must be at least 1", "Leave the phase out instead")
        for corpus in phase.corpora:
            if corpus.chunks < 1 or not 0 < corpus.weight < float("inf"):
                rule = "a corpus of a mixture has at least one chunk and a finite weight above 0"
                raise ConfigError(f"{where}.corpora", corpus, rule, "Leave the corpus out instead")
            if sizes.setdefault(corpus.digest, corpus.chunks) != corpus.chunks:
                rule = f"the same corpus has {sizes[corpus.digest]} chunks in an earlier phase"
                raise ConfigError(f"{where}.corpora", corpus, rule, "Take both shapes from the same prepared folder")
