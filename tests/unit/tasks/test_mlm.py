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
from scaletrain.errors import ConfigError, CorpusError
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


# ------------------------------------------------------------------------------------------------------------------- pairs

PAIRS = [MlmConfig(pair="sop", pair_weight=0.5), MlmConfig(pair="nsp", pair_weight=0.5, spans=SpanConfig())]
APART = [50, 3, 25, 30]
"""Chunks whose numbers are far apart, but for the last."""


def paired(config: MlmConfig, layout: Layout = "padded", *, token_types: bool = True) -> MaskedLanguageModelling:
    return MaskedLanguageModelling(config, VOCABULARY, Dealing(4096, 1, 1, layout), ["train"], 1, token_types)


def rows_of(slot: Slot, name: str) -> list[list[int]]:
    """A tensor of the inputs by document, without padding."""
    values = slot.inputs[name]
    if "cu_seqlens" in slot.inputs:
        return [part.tolist() for part in values[0].split(slot.inputs["cu_seqlens"].diff().tolist())]
    return [row[ids != 0].tolist() for row, ids in zip(values, slot.inputs["input_ids"], strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", PAIRS, ids=["sop", "nsp"])
def test_a_pair_lies_between_its_special_tokens_and_its_types_tell_the_parts_apart(config: MlmConfig, layout: Layout) -> None:
    slot = slot_of(APART, paired(config, layout))
    slot.inputs["input_ids"].flatten()[slot.inputs["rows"]] = slot.targets["labels"]  # a view of it: what stood there
    for row, types, chunk in zip(rows_of(slot, "input_ids"), rows_of(slot, "token_type_ids"), APART, strict=True):
        between = row.index(102)
        assert (row[0], row[-1], row.count(102), len(row) <= len(CHUNKS[chunk]) + 2) == (101, 102, 2, True)
        assert types == [0] * (between + 1) + [1] * (len(row) - between - 1)
        assert between > 1 and len(row) - between > 2
    assert slot.counts["pair"] == (slot.targets["pair_labels"] >= 0).sum() == 4
    assert slot.signature == f"mlm+{config.pair}:{layout}"
    assert slot.counts.keys() == paired(config).weights.keys() == {"mlm", "pair"}
    assert slot.real_tokens == sum(map(len, rows_of(slot, "input_ids")))


@pytest.mark.parametrize("config", PAIRS, ids=["sop", "nsp"])
def test_layout_and_token_types_change_nothing_else(config: MlmConfig) -> None:
    first, *others = [slot_of(APART, paired(config, layout, token_types=types)) for layout in LAYOUTS for types in (True, False)]
    for other in others:
        assert hidden(other) == hidden(first)
        assert rows_of(other, "input_ids") == rows_of(first, "input_ids")
        assert other.targets["pair_labels"].tolist() == first.targets["pair_labels"].tolist()
    assert "token_type_ids" not in others[0].inputs
    assert "token_type_ids" not in slot_of(APART, paired(MlmConfig(), token_types=True)).inputs


def test_the_separator_between_the_parts_is_never_hidden() -> None:
    slot = slot_of(APART, paired(MlmConfig(pair="sop", mask_rate=0.999, whole_word=True)))
    assert all(row.count(102) == 2 for row in rows_of(slot, "input_ids"))
    assert 102 not in slot.targets["labels"].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunks", [[], [np.array([110, 111], np.int32)]])
def test_a_slot_without_a_pair_runs_the_pair_head_for_nothing(chunks: list[np.ndarray], layout: Layout) -> None:
    slot = paired(PAIRS[0], layout).collate(0, 7, picks(list(range(len(chunks)))), chunks)
    assert (slot.counts["pair"], slot.targets["pair_labels"].tolist()) == (0, [-100])
    weight = torch.randn(8, 2, requires_grad=True)
    terms = paired(PAIRS[0]).terms((torch.zeros(len(slot.inputs["rows"]), 300), torch.ones(1, 8) @ weight), slot)
    terms["pair"].backward()
    assert terms["pair"].item() == 0.0
    assert weight.grad is not None and not weight.grad.any()


def test_the_pair_term_is_a_sum_over_the_pairs_and_scores_are_kept_per_sample() -> None:
    of = paired(PAIRS[0])
    slot = of.collate(0, 0, picks([7, 8, 9]), [CHUNKS[40], np.array([110], np.int32), CHUNKS[20]])
    answers = torch.tensor([[3.0, 1.0], [9.0, 9.0], [0.5, 2.0]])
    outputs = (torch.randn(slot.counts["mlm"], 300), answers)
    labels = slot.targets["pair_labels"].tolist()
    each = [float(-torch.log_softmax(answers[row], 0)[labels[row]]) for row in (0, 2)]
    assert labels[1] == -100
    assert of.terms(outputs, slot)["pair"].item() == pytest.approx(sum(each), rel=1e-6)
    assert of.terms(outputs, slot)["mlm"].item() == pytest.approx(of.score(outputs, slot)[:, 0].sum(), rel=1e-6)
    scores = of.score(outputs, slot)
    correct = [float(labels[0] == 0), float(labels[2] == 1)]
    assert scores[:, 3].tolist() == pytest.approx([each[0], 0.0, each[1]], rel=1e-6)
    assert scores[:, 4:].tolist() == [[1.0, correct[0]], [0.0, 0.0], [1.0, correct[1]]]
    found = of.summary(scores)
    assert found["pair_accuracy"] == sum(correct) / 2
    assert found["pair_loss"] == pytest.approx(sum(each) / 2, rel=1e-6)
    assert task().summary(scores[:, :3]) == {name: found[name] for name in ("loss", "perplexity", "accuracy")}


def test_held_out_text_without_a_pair_is_no_perfect_score() -> None:
    with pytest.raises(CorpusError, match="none of its chunks makes a pair"):
        paired(PAIRS[1]).summary(np.array([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]))


def test_pairs_are_in_the_identity_where_there_are_any() -> None:
    assert MlmConfig(pair_weight=3.0).identity() == MlmConfig().identity()
    assert MlmConfig(pair="sop").identity().keys() - MlmConfig().identity().keys() == {"pair", "pair_weight"}
