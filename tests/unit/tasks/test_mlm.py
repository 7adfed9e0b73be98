"""Masked language modelling: what a slot asks for, and the sums that come out of it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from scaletrain.data.collate import Slot
from scaletrain.data.plan import Picks
from scaletrain.data.slots import Dealing, Layout
from scaletrain.data.spans import SpanConfig
from scaletrain.data.tokenizer import Vocabulary
from scaletrain.errors import ConfigError
from scaletrain.tasks import Task
from scaletrain.tasks.mlm import MaskedLanguageModelling, MlmConfig

STARTS = np.arange(300) % 3 == 0
VOCABULARY = Vocabulary(
    size=300, digest="v", cls=101, sep=102, pad=0, mask=103, special=np.array([0, 100, 101, 102, 103]), starts_word=STARTS
)
LAYOUTS: list[Layout] = ["padded", "unpadded"]
CHUNKS = [np.random.default_rng(n).integers(110, 300, n).astype(np.int32) for n in range(5, 60)]


def task(config: MlmConfig | None = None, layout: Layout = "padded", seed: int = 1) -> MaskedLanguageModelling:
    return MaskedLanguageModelling(config or MlmConfig(), VOCABULARY, Dealing(4096, 1, 1, layout), ["train"], seed)


def picks(chunks: list[int], corpus_pass: int = 0) -> Picks:
    return Picks(np.zeros(len(chunks), np.int16), np.full(len(chunks), corpus_pass), np.array(chunks, np.int64))


def slot_of(chunks: list[int], of: MaskedLanguageModelling | None = None, corpus_pass: int = 0) -> Slot:
    return (of or task()).collate(3, 2, picks(chunks, corpus_pass), [CHUNKS[chunk] for chunk in chunks])


def hidden(slot: Slot) -> dict[int, list[int]]:
    """Labels by chunk."""
    found: dict[int, list[int]] = {chunk: [] for chunk in slot.samples.chunk.tolist()}
    for row, label in zip(slot.targets["chunk_of_row"].tolist(), slot.targets["labels"].tolist(), strict=True):
        found[int(slot.samples.chunk[row])].append(label)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_putting_the_labels_back_at_the_rows_restores_the_text(layout: Layout) -> None:
    slot = slot_of([30, 4, 17], task(layout=layout))
    ids = slot.inputs["input_ids"].flatten().clone()
    ids[slot.inputs["rows"]] = slot.targets["labels"]
    text = [token for token in ids.tolist() if token not in (0, 101, 102)]
    assert text == np.concatenate([CHUNKS[30], CHUNKS[4], CHUNKS[17]]).tolist()
    assert slot.counts == {"mlm": len(slot.inputs["rows"])} and slot.counts["mlm"] > 3
    assert slot.signature == f"mlm:{layout}"


def test_both_layouts_hide_the_same_tokens() -> None:
    slots = [slot_of([30, 4, 17], task(layout=layout)) for layout in LAYOUTS]
    assert hidden(slots[0]) == hidden(slots[1])


def test_what_is_hidden_of_a_chunk_does_not_depend_on_its_neighbours() -> None:
    together = hidden(slot_of([30, 4, 17]))
    assert together == hidden(slot_of([17])) | hidden(slot_of([4, 30]))


def test_another_pass_or_seed_hides_other_tokens() -> None:
    first = hidden(slot_of([50]))
    assert hidden(slot_of([50], corpus_pass=1)) != first != hidden(slot_of([50], task(seed=2)))


def test_evaluation_has_its_own_rate_and_masks_that_no_seed_changes() -> None:
    chunks = list(range(len(CHUNKS)))
    slots = [slot_of(chunks, task(seed=seed).for_evaluation(["validation"])) for seed in (1, 2)]
    assert hidden(slots[0]) == hidden(slots[1])
    assert slots[0].counts["mlm"] / sum(map(len, CHUNKS)) == pytest.approx(0.15, abs=0.03)
    assert slot_of(chunks).counts["mlm"] / sum(map(len, CHUNKS)) == pytest.approx(0.30, abs=0.04)


def test_whole_words_are_hidden_together() -> None:
    slot = slot_of([54], task(MlmConfig(whole_word=True)))
    places = set((slot.inputs["rows"] - 1).tolist())
    words: list[list[int]] = []
    for place, token in enumerate(CHUNKS[54].tolist()):
        words = [*words, [place]] if STARTS[token] or not words else [*words[:-1], [*words[-1], place]]
    assert places == {place for word in words if word[0] in places for place in word}
    assert max(len(word) for word in words if word[0] in places) > 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunks", [[], [np.array([100, 101], np.int32)]])
def test_a_slot_with_nothing_to_learn_has_one_row_of_no_weight(chunks: list[np.ndarray], layout: Layout) -> None:
    slot = task(layout=layout).collate(0, 7, picks(list(range(len(chunks)))), chunks)
    assert (slot.counts, slot.inputs["rows"].tolist(), len(slot.targets["labels"])) == ({"mlm": 0}, [0], 1)
    weight = torch.randn(8, 300, requires_grad=True)
    loss = task().terms(torch.ones(1, 8) @ weight, slot)["mlm"]
    loss.backward()
    assert loss.item() == 0.0
    assert weight.grad is not None and not weight.grad.any()


def test_terms_are_the_sum_of_cross_entropies_in_fp32() -> None:
    slot = slot_of([20, 40])
    logits = torch.randn(slot.counts["mlm"], 300, dtype=torch.bfloat16)
    total = task().terms(logits, slot)["mlm"]
    expected = [-torch.log_softmax(row.double(), 0)[label] for row, label in zip(logits, slot.targets["labels"], strict=True)]
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(sum(float(each) for each in expected), rel=1e-6)


def test_sums_of_slots_add_up_to_the_sum_of_the_whole() -> None:
    """What makes a loss independent of the dealing: sums, not means."""
    model = torch.nn.Embedding(300, 300)
    logits = {label: model(torch.tensor(label)) for label in range(300)}

    def total(slot: Slot) -> float:
        rows = torch.stack([logits[label] for label in slot.targets["labels"].tolist()])
        return task().terms(rows, slot)["mlm"].item()

    assert total(slot_of([20, 40])) == pytest.approx(total(slot_of([20])) + total(slot_of([40])), rel=1e-6)


def test_scores_are_kept_per_sample_and_agree_with_the_terms() -> None:
    slot = slot_of([0, 20, 1, 40])
    logits = torch.randn(slot.counts["mlm"], 300)
    logits[::2].scatter_(1, slot.targets["labels"][::2, None], 50.0)
    scores = task().score(logits, slot)
    rows = slot.targets["chunk_of_row"]
    losses, counts, correct = scores.T
    assert scores.dtype == np.float64
    assert counts.tolist() == [int((rows == chunk).sum()) for chunk in range(4)]
    assert losses.sum() == pytest.approx(float(task().terms(logits, slot)["mlm"]), rel=1e-6)
    right = logits.argmax(1) == slot.targets["labels"]
    assert correct.tolist() == [int(right[rows == chunk].sum()) for chunk in range(4)]
    assert correct.sum() >= slot.counts["mlm"] // 2


def test_a_dummy_slot_scores_nothing_for_each_of_its_samples() -> None:
    slot = task().collate(0, 0, picks([0]), [np.array([100], np.int32)])
    scores = task().score(torch.randn(1, 300), slot)
    assert scores.tolist() == [[0.0, 0.0, 0.0]]


def test_tokens_are_counted_with_and_without_padding() -> None:
    slot = slot_of([0, 10])
    assert (slot.real_tokens, slot.padded_tokens) == (5 + 2 + 15 + 2, 2 * 17)


def test_seeds_follow_the_slot() -> None:
    seeds = [
        task(seed=seed).collate(step, index, picks([]), []).seed
        for seed, step, index in [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)]
    ]
    assert all(a != b for a, b in pairwise(sorted(seeds)))


def test_the_task_is_one() -> None:
    as_task: Task = task()
    assert as_task.weights == {"mlm": 1.0}
    assert as_task.weights.keys() == slot_of([3]).counts.keys()


def test_shares_above_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 1"):
        MlmConfig(masked_share=0.95, random_share=0.1)


def test_spans_are_runs_of_whole_words() -> None:
    """Every run that is hidden begins with a word and ends before one, or with the chunk."""
    slot = slot_of([54], task(MlmConfig(spans=SpanConfig())))
    places = set((slot.inputs["rows"] - 1).tolist())
    tokens = CHUNKS[54].tolist()
    starts = {place for place, token in enumerate(tokens) if STARTS[token] or place == 0}
    assert {place for place in places if place - 1 not in places} <= starts
    assert {place + 1 for place in places if place + 1 not in places} <= starts | {len(tokens)}
    longest_word = int(np.diff([*sorted(starts), len(tokens)]).max())
    assert -1 < slot.counts["mlm"] - 0.3 * len(tokens) < longest_word


def test_settings_that_came_later_are_in_the_identity_where_they_are_set() -> None:
    """Runs that were begun before there were any go on."""
    first = {"mask_rate", "evaluation_mask_rate", "masked_share", "random_share", "whole_word"}
    assert MlmConfig().identity().keys() == first
    spans = MlmConfig(spans=SpanConfig()).identity()
    assert spans.keys() == first | {"spans"}
    assert spans != MlmConfig(spans=SpanConfig(longest=5)).identity()
