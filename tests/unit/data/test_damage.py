"""Data that cannot be read: another chunk takes its place, the same on any number of ranks, and every one is accounted for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from scaletrain.data.ledger import (
    DIGEST_BITS,
    DamageConfig,
    Entry,
    Ledger,
    Substitution,
    digest_of_sum,
    replaced,
    sample_digest,
    samples_of,
)
from scaletrain.data.loader import Batch, Loader, LoaderConfig
from scaletrain.data.plan import MAX_SUBSTITUTES
from scaletrain.data.reading import RetryConfig
from scaletrain.errors import CorpusError, DataBudgetError, StorageError
from tests.unit.data.test_loader import Texts, collate, content, contents, dealt, whole

NOW = RetryConfig(attempts=3, pause_s=0.001, read_timeout_s=0.15)
BAD = {3, 13, 40}


class Failing(Texts):
    """A corpus whose ``bad`` chunks fail, for the first ``times`` reads of each."""

    def __init__(self, bad: set[int], times: float = float("inf"), make: Callable[[int], Exception] | None = None) -> None:
        super().__init__("a", 50, 100)
        self.bad, self.times, self.reads = bad, times, dict.fromkeys(bad, 0)
        self._make = make or (lambda chunk: CorpusError("000000.tar", f"CRC of {chunk}", "the index says another", "Restore it"))

    def read(self, chunk: int) -> np.ndarray:
        if chunk in self.bad:
            self.reads[chunk] += 1
            if self.reads[chunk] <= self.times:
                raise self._make(chunk)
        return super().read(chunk)


def run(data: Sequence[Texts], rank: int = 0, world: int = 1, **config: object) -> list[Batch]:
    with Loader(dealt(data), data, collate, rank, world, LoaderConfig(**{"retry": NOW, **config})) as loader:  # type: ignore[arg-type]
        return list(loader.batches())


def test_what_cannot_be_read_is_replaced_and_nothing_else_changes() -> None:
    expected, batches = run([Texts("a", 50, 100)]), run([Failing(BAD)])
    plan, seen = dealt([Texts("a", 50, 100)]).plan, set()
    for healthy, batch in zip(expected, batches, strict=True):
        hit = {each.chunk: each.substitute for each in batch.substitutions}
        assert set(hit) == BAD.intersection(plan.picks(batch.step).chunk.tolist())
        seen |= set(hit)
        for before, after in zip(healthy.slots, batch.slots, strict=True):
            wanted = [hit.get(chunk, chunk) for chunk in before.samples.chunk.tolist()]
            assert after.samples.chunk.tolist() == wanted
            tokens = after.inputs["input_ids"][: len(wanted), 1].tolist()
            assert tokens == [100 + chunk for chunk in wanted]
            unhurt = [n for n, chunk in enumerate(before.samples.chunk.tolist()) if chunk not in hit]
            assert [after.inputs["input_ids"][n].sum() for n in unhurt] == [before.inputs["input_ids"][n].sum() for n in unhurt]
    assert seen == BAD


def test_a_substitute_is_no_longer_than_what_it_stands_in_for() -> None:
    data = Failing(BAD)
    for batch in run([data]):
        for each in batch.substitutions:
            slot = next(slot for slot in batch.slots if each.substitute in slot.samples.chunk)
            row = slot.samples.chunk.tolist().index(each.substitute)
            length = int((slot.inputs["input_ids"][row] == 100 + each.substitute).sum())
            assert length == min(data.lengths[each.chunk], data.lengths[each.substitute])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_substitutes_do_not_depend_on_ranks_or_threads(world: int, workers: int) -> None:
    alone = contents(run([Failing(BAD)], workers=0))
    ranks = [run([Failing(BAD)], rank, world, workers=workers) for rank in range(world)]
    assert sorted(content(s) for rank in ranks for b in rank for s in b.slots if len(s.samples)) == sorted(alone)
    for step in zip(*ranks, strict=True):
        picks = dealt([Texts("a", 50, 100)]).plan.picks(step[0].step)
        given = [each for batch in step for each in batch.substitutions]
        total = float(sum(batch.digest for batch in step))
        assert digest_of_sum(total) == digest_of_sum(sample_digest(["a"], replaced(picks, given)))


def test_a_failure_that_passes_is_only_a_retry() -> None:
    batches = run([Failing(BAD, times=2)])
    assert contents(batches) == contents(run([Texts("a", 50, 100)]))
    assert not any(batch.substitutions for batch in batches)
    assert sum(batch.retried for batch in batches) == 2 * len(BAD)


@pytest.mark.parametrize("error", [StorageError("a disk error"), OSError(5, "Input/output error"), TimeoutError("gone")])
def test_any_failure_of_storage_counts(error: Exception) -> None:
    batches = run([Failing({13}, make=lambda _: error)])
    (said,) = {each.reason for batch in batches for each in batch.substitutions}
    assert said == str(error)


def test_a_bug_is_not_taken_for_damage() -> None:
    with pytest.raises(ZeroDivisionError):
        run([Failing({13}, make=lambda _: ZeroDivisionError())])


def test_a_corpus_that_cannot_be_read_at_all_is_an_error() -> None:
    with pytest.raises(DataBudgetError, match=r"and none of 8 others in its place: .*CRC of"):
        run([Failing(set(range(50)))])


def test_an_evaluation_has_no_substitutes() -> None:
    data = [Failing({13})]
    with (
        Loader(whole(data), data, collate, 0, 1, LoaderConfig(retry=NOW)) as loader,
        pytest.raises(CorpusError, match="CRC of 13"),
    ):
        list(loader.batches())
    assert data[0].reads[13] == NOW.attempts


def test_substitutes_are_chunks_of_the_same_corpus_each_once() -> None:
    plan = dealt([Texts("a", 50, 100)]).plan
    found = plan.substitutes(0, 2, 13)
    assert len(set(found)) == len(found) == MAX_SUBSTITUTES and 13 not in found and set(found) <= set(range(50))
    assert found == plan.substitutes(0, 2, 13) != plan.substitutes(0, 3, 13)


# -------------------------------------------------------------------------------------------------------------- hanging


class Hanging(Texts):
    """Reads of chunk 13 hang: the first ``times`` of them, until the test lets go."""

    def __init__(self, times: float = float("inf")) -> None:
        super().__init__("a", 50, 100)
        self.times, self.hung, self.released = times, 0, threading.Event()

    def read(self, chunk: int) -> np.ndarray:
        if chunk == 13 and self.hung < self.times:
            self.hung += 1
            self.released.wait(20)
        return super().read(chunk)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_thread_that_hangs_is_replaced(workers: int) -> None:
    data = Hanging(times=2)
    try:
        with pytest.warns(
            UserWarning, match=r"step \d: reading chunk 13 of corpus 0 \(a\) has taken over 0\.15 s .* another one reads"
        ):
            batches = run([data], workers=workers)
    finally:
        data.released.set()
    assert contents(batches) == contents(run([Texts("a", 50, 100)]))
    assert (data.hung, sum(batch.retried for batch in batches)) == (2, 2)


def test_a_chunk_that_always_hangs_is_replaced_by_another() -> None:
    data = Hanging()
    before = threading.active_count()
    try:
        batches = run([data], workers=2)
    finally:
        data.released.set()
    hit = [each for batch in batches for each in batch.substitutions]
    assert len(hit) > 1 and {each.chunk for each in hit} == {13}
    assert NOW.attempts <= data.hung <= len(hit) * NOW.attempts  # once it is known, it is tried once
    assert hit[0].reason == "chunk 13 of corpus 0 (a): no answer within 0.15 s, 3 times. Check the storage"
    assert contents(batches) == contents(run([Failing({13})]))
    ends = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < ends:
        time.sleep(0.01)
    assert threading.active_count() <= before  # those left behind have ended too


def test_a_substitute_that_hangs_is_given_up_too() -> None:
    plan = dealt([Texts("a", 50, 100)]).plan
    first = {int(chunk): plan.substitutes(0, 0, int(chunk)) for chunk in plan.picks(0).chunk}
    bad, (hanging, wanted, *_) = next((chunk, found) for chunk, found in first.items() if chunk not in plan.picks(1).chunk)

    class Both(Failing):
        released = threading.Event()

        def read(self, chunk: int) -> np.ndarray:
            if chunk == hanging:
                self.released.wait(20)
            return super().read(chunk)

    data = Both({bad})
    try:
        with Loader(dealt([data], steps=1), [data], collate, 0, 1, LoaderConfig(retry=NOW, workers=2)) as loader:
            (batch,) = list(loader.batches())
    finally:
        data.released.set()
    assert {each.chunk: each.substitute for each in batch.substitutions}[bad] == wanted


# ------------------------------------------------------------------------------------------------------------------ outages


class Away(Texts):
    """Storage that answers nothing for a while."""

    def __init__(self, seconds: float) -> None:
        super().__init__("a", 50, 100)
        self.until = time.monotonic() + seconds

    def read(self, chunk: int) -> np.ndarray:
        if time.monotonic() < self.until:
            raise OSError(116, "Stale file handle")
        return super().read(chunk)


def test_an_outage_is_waited_for_and_replaces_nothing() -> None:
    batches = run([Away(0.5)])
    assert contents(batches) == contents(run([Texts("a", 50, 100)]))
    assert not any(batch.substitutions for batch in batches) and sum(batch.retried for batch in batches) > 0


def test_an_outage_that_lasts_ends_with_the_code_of_storage() -> None:
    with pytest.raises(StorageError, match=r"nothing of corpus 0 could be read for 0\.3 s .*Stale file handle"):
        run([Away(60)], retry=RetryConfig(attempts=2, pause_s=0.001, outage_s=0.3))


def test_a_shard_that_is_gone_costs_its_pauses_once() -> None:
    class Sharded(Failing):
        def shard_of(self, chunk: int) -> int:
            return chunk // 25

    batches = run([Sharded(set(range(25)))], workers=1)
    assert sum(len(batch.substitutions) for batch in batches) > 25
    assert sum(batch.retried for batch in batches) == NOW.attempts - 1


# --------------------------------------------------------------------------------------------------------------- ledger


def entry(sample: int) -> Entry:
    return Entry(1 + sample // 24, sample, Substitution(0, 0, sample, sample + 1, "CRC"))


def test_the_budget_is_a_share_of_what_was_consumed() -> None:
    ledger = Ledger(DamageConfig(fraction=0.001))
    ledger.add(entry(sample) for sample in range(0, 20, 2))
    assert ledger.exceeded(24) is None  # 10 of at least 10,000
    ledger.add([entry(30)])
    assert ledger.exceeded(10_999) == (
        "11 of 10999 samples could not be read; 10 may (data.damage.fraction is 0.001, of at least 10000 samples)"
    )
    assert ledger.exceeded(11_000) is None


def test_a_row_of_samples_is_too_many_whatever_its_share() -> None:
    ledger = Ledger(DamageConfig(fraction=1, consecutive=4))
    ledger.add(entry(sample) for sample in (1, 2, 3, 5, 6, 7))
    assert ledger.exceeded(24) is None
    ledger.add([entry(8)])
    assert ledger.exceeded(24) == "4 samples in a row could not be read (data.damage.consecutive is 4)"


def test_a_ledger_comes_back_from_a_checkpoint() -> None:
    ledger, again = Ledger(DamageConfig()), Ledger(DamageConfig())
    ledger.add([entry(7), entry(2)])
    again.restore(ledger.state())
    assert again.entries == ledger.entries == [entry(2), entry(7)]


def test_a_digest_tells_samples_apart_and_not_their_order() -> None:
    picks = dealt([Texts("a", 50, 100)]).plan.picks(1)
    whole_step = sample_digest(["a"], picks)
    assert whole_step == sample_digest(["a"], picks[np.arange(24)[::-1]])
    assert whole_step == (sample_digest(["a"], picks[:7]) + sample_digest(["a"], picks[7:])) % (1 << DIGEST_BITS)
    assert whole_step != sample_digest(["b"], picks)
    swapped = replaced(picks, [Substitution(0, int(picks.corpus_pass[3]), int(picks.chunk[3]), 49, "")])
    assert whole_step != sample_digest(["a"], swapped)
    assert sample_digest(["a"], picks[:0]) == 0


def test_a_replaced_sample_is_found_in_its_step() -> None:
    picks = dealt([Texts("a", 50, 100)]).plan.picks(1)
    gone = Substitution(0, int(picks.corpus_pass[5]), int(picks.chunk[5]), 1, "")
    assert list(samples_of([gone], picks, 24)) == [(29, gone)]
