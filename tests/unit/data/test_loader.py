"""The loader: the same slots at any world size, by any number of threads, from any step; and what it says when reading fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
import torch

from scaletrain.data.collate import Frame, Slot, arrange, slot_seed
from scaletrain.data.loader import Batch, Loader, LoaderConfig
from scaletrain.data.plan import CorpusShape, EvalPlan, PhaseShape, Picks, Plan
from scaletrain.data.reading import RetryConfig
from scaletrain.data.slots import Dealing, DealtPlan
from scaletrain.errors import ConfigError, CorpusError, StorageError


class Texts:
    """A corpus in memory: chunk c is 3 to 30 tokens that tell the corpus and the chunk."""

    def __init__(self, digest: str, chunks: int, first_id: int) -> None:
        self.digest, self.first_id = digest, first_id
        self.lengths = np.random.default_rng(first_id).integers(3, 31, chunks).astype(np.int32)

    def read(self, chunk: int) -> np.ndarray:
        return np.full(self.lengths[chunk], self.first_id + chunk, np.int32)


class Damaged(Texts):
    def read(self, chunk: int) -> np.ndarray:
        if chunk == 13:
            raise CorpusError("000000.tar", "crc 1", "the index says crc 2", "Prepare the data again")
        return super().read(chunk)


class Stuck(Texts):
    """A disk that answers no more, until the test lets go."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.released = threading.Event()

    def read(self, chunk: int) -> np.ndarray:
        if chunk == 13:
            self.released.wait(20)
        return super().read(chunk)


def collate(step: int, index: int, samples: Picks, chunks: Sequence[np.ndarray]) -> Slot:
    """Learns from every token: the count of a slot is its number of tokens."""
    lengths = np.array([len(chunk) for chunk in chunks], np.int64)
    arranged = arrange(np.concatenate([*chunks, np.empty(0, np.int32)]), lengths, Frame(1, 2, 0))
    counts = {"all": int(lengths.sum())}
    return Slot(
        step,
        index,
        "toy",
        slot_seed(5, step, index),
        arranged.inputs,
        {},
        counts,
        samples,
        arranged.real_tokens,
        arranged.padded_tokens,
    )


DATA = [Texts("a", 50, 100), Texts("b", 70, 1000)]
DEALING = Dealing(200, 4, 1, "padded")


def dealt(datasets: Sequence[Texts] = DATA, steps: int = 6, dealing: Dealing = DEALING) -> DealtPlan:
    corpora = tuple(CorpusShape(data.digest, len(data.lengths)) for data in datasets)
    return DealtPlan(Plan(1, [PhaseShape(corpora, 24, steps)]), [data.lengths for data in datasets], dealing)


def whole(datasets: Sequence[Texts]) -> DealtPlan:
    """Every chunk once, 24 in a step: an evaluation, where nothing may stand in for a chunk."""
    shapes = [CorpusShape(data.digest, len(data.lengths)) for data in datasets]
    return DealtPlan(EvalPlan(shapes, 24), [data.lengths for data in datasets], DEALING)


ONCE = RetryConfig(attempts=1)


def run(rank: int = 0, world: int = 1, start: int = 0, **config: int) -> list[Batch]:
    with Loader(dealt(), DATA, collate, rank, world, LoaderConfig(**config)) as loader:
        return list(loader.batches(start))


Content = tuple[int, int, str, int, list[list[int]], dict[str, int], list[int]]


def content(slot: Slot) -> Content:
    ids = slot.inputs["input_ids"].tolist()
    return slot.step, slot.index, slot.signature, slot.seed, ids, slot.counts, slot.samples.chunk.tolist()


def contents(batches: Iterable[Batch]) -> list[Content]:
    return [content(slot) for batch in batches for slot in batch.slots]


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_what_a_slot_holds_does_not_depend_on_the_world_size(world: int) -> None:
    alone = {each[:2]: each for each in contents(run())}
    ranks = [run(rank, world) for rank in range(world)]
    real = [each for each in contents(batch for rank in ranks for batch in rank) if each[6]]
    assert sorted(each[:2] for each in real) == sorted(alone)
    assert all(each == alone[each[:2]] for each in real)


@pytest.mark.parametrize("world", [1, 3, 8])
def test_ranks_have_equal_rounds_and_count_every_token_once(world: int) -> None:
    for step in zip(*(run(rank, world) for rank in range(world)), strict=True):
        assert len({tuple(batch.rounds) for batch in step}) == 1
        tokens = [
            DATA[c].lengths[k] for c, k in zip(*(lambda p: (p.corpus, p.chunk))(dealt().plan.picks(step[0].step)), strict=True)
        ]
        assert sum(batch.counts["all"] for batch in step) == sum(tokens)
        assert sum(batch.real_tokens for batch in step) == sum(tokens) + 2 * 24
        assert {batch.fillers for batch in step} == {sum(len(s.samples) == 0 for batch in step for s in batch.slots)}


def test_a_filler_runs_the_same_modules_for_nothing() -> None:
    fillers = [slot for rank in range(8) for batch in run(rank, 8) for slot in batch.slots if not len(slot.samples)]
    assert fillers
    assert {(slot.signature, slot.counts["all"], slot.real_tokens) for slot in fillers} == {("toy", 0, 0)}


@pytest.mark.parametrize(("workers", "read_ahead_steps"), [(0, 1), (1, 1), (1, 5), (4, 2), (4, 50)])
def test_threads_and_read_ahead_do_not_change_a_batch(workers: int, read_ahead_steps: int) -> None:
    assert contents(run(workers=workers, read_ahead_steps=read_ahead_steps)) == contents(run(workers=0))


@pytest.mark.parametrize("start", range(7))
def test_from_any_step_the_rest_is_the_tail_of_the_whole(start: int) -> None:
    assert contents(run(start=start)) == [each for each in contents(run()) if each[0] >= start]


def test_two_passes_of_one_loader_are_equal() -> None:
    with Loader(dealt(), DATA, collate, 0, 1) as loader:
        assert contents(loader.batches()) == contents(loader.batches())
        assert [batch.step for batch in loader.batches(2, 4)] == [2, 3]


def test_a_batch_says_how_many_samples_the_run_has_consumed() -> None:
    assert [(batch.step, batch.samples_after) for batch in run(1, 2, 3)] == [(3, 96), (4, 120), (5, 144)]


def test_an_evaluation_reads_every_chunk_once() -> None:
    seen: list[tuple[int, int]] = []
    for rank in range(3):
        with Loader(whole(DATA), DATA, collate, rank, 3) as loader:
            for batch in loader.batches():
                for slot in batch.slots:
                    seen += zip(slot.samples.corpus.tolist(), slot.samples.chunk.tolist(), strict=True)
    assert sorted(seen) == [(0, chunk) for chunk in range(50)] + [(1, chunk) for chunk in range(70)]


def test_chunks_reach_the_place_of_their_sample() -> None:
    for batch in run():
        for slot in batch.slots:
            firsts = [DATA[c].first_id + k for c, k in zip(slot.samples.corpus, slot.samples.chunk, strict=True)]
            assert slot.inputs["input_ids"][: len(firsts), 1].tolist() == firsts


def test_only_the_own_chunks_are_read() -> None:
    read: list[int] = []

    class Counting(Texts):
        def read(self, chunk: int) -> np.ndarray:
            read.append(chunk)
            return super().read(chunk)

    data = [Counting("a", 50, 100)]
    with Loader(dealt(data), data, collate, 1, 4) as loader:
        slots = [slot for batch in loader.batches() for slot in batch.slots]
    assert sorted(read) == sorted(chunk for slot in slots for chunk in slot.samples.chunk.tolist())


def test_reading_stays_the_set_number_of_steps_ahead() -> None:
    collated: set[int] = set()

    def noting(step: int, index: int, samples: Picks, chunks: Sequence[np.ndarray]) -> Slot:
        collated.add(step)
        return collate(step, index, samples, chunks)

    with Loader(dealt(steps=100), DATA, noting, 0, 1, LoaderConfig(workers=2, read_ahead_steps=3)) as loader:
        batches = loader.batches()
        assert [next(batches).step for _ in range(5)] == list(range(5))
        deadline = time.monotonic() + 10
        while len(collated) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # long enough for a step too many to be seen
        assert collated == set(range(8))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_reading_reaches_the_loop_with_its_step(workers: int) -> None:
    data = [Damaged("a", 50, 100)]
    step, seen = 0, []
    config = LoaderConfig(workers=workers, retry=ONCE)
    with Loader(whole(data), data, collate, 0, 1, config) as loader, pytest.raises(CorpusError) as caught:
        for batch in loader.batches():
            seen.append(batch.step)
    assert seen == list(range(step))
    assert caught.value.__notes__ == [f"while the data of step {step} was made ready, reading chunk 13 of corpus 0 (a)"]


def test_an_error_in_collating_reaches_the_loop_with_its_step() -> None:
    def broken(step: int, index: int, samples: Picks, chunks: Sequence[np.ndarray]) -> Slot:
        if step == 2:
            raise KeyError("rows")
        return collate(step, index, samples, chunks)

    with Loader(dealt(), DATA, broken, 0, 1) as loader, pytest.raises(KeyError) as caught:
        list(loader.batches())
    assert caught.value.__notes__ == ["while the data of step 2 was made ready, collating"]


def test_a_read_that_hangs_is_named_when_the_time_is_up() -> None:
    data = [Stuck("a", 50, 100)]
    plan = dealt(data)
    step = next(s for s in range(6) if 13 in plan.plan.picks(s).chunk)
    config = LoaderConfig(workers=2, timeout_s=0.2)
    with (
        Loader(plan, data, collate, 0, 1, config) as loader,
        pytest.raises(
            StorageError, match=rf"step {step}: .* 0\.2 s \(data\.loader\.timeout_s\), still reading chunk 13 of corpus 0 \(a\)"
        ),
    ):
        list(loader.batches())
    data[0].released.set()


def test_a_time_limit_inside_reading_is_not_taken_for_that_of_the_loader() -> None:
    class Slow(Texts):
        def read(self, chunk: int) -> np.ndarray:
            raise TimeoutError("the file server gave up")

    data = [Slow("a", 50, 100)]
    with (
        Loader(whole(data), data, collate, 0, 1, LoaderConfig(retry=ONCE)) as loader,
        pytest.raises(TimeoutError, match="the file server gave up"),
    ):
        list(loader.batches())


def test_closing_ends_the_threads_in_the_middle_of_a_run() -> None:
    before = threading.active_count()
    loader = Loader(dealt(), DATA, collate, 0, 1, LoaderConfig(workers=3))
    batches = loader.batches()
    next(batches)
    assert threading.active_count() == before + 3
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_a_process_can_end_while_a_read_hangs() -> None:
    with Loader(dealt(), DATA, collate, 0, 1, LoaderConfig(workers=2)):
        mine = [thread for thread in threading.enumerate() if thread.name.startswith("loader-")]
        assert len(mine) == 2 and all(thread.daemon for thread in mine)


def test_a_chunk_that_fits_no_slot_is_refused_before_the_first_step() -> None:
    with pytest.raises(ConfigError, match=r"^slots\.micro_batch_tokens: got 20"):
        Loader(dealt(dealing=Dealing(20, 1, 1, "padded")), DATA, collate, 0, 1)


def test_datasets_that_are_not_the_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="1 datasets for a plan of 2 corpora"):
        Loader(dealt(), DATA[:1], collate, 0, 1)


def test_collating_in_a_thread_leaves_the_torch_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    run(workers=2)
    assert torch.equal(torch.rand(1), expected)
