"""Chunks laid out as rows: where every token ends up, in both layouts."""

from __future__ import annotations

import numpy as np
import torch

from scaletrain.data.collate import Frame, arrange, slot_seed

TOKENS, LENGTHS = np.array([11, 12, 13, 21, 31, 32], np.int32), np.array([3, 1, 2])


def test_padded_rows_are_as_long_as_the_longest_chunk() -> None:
    arranged = arrange(TOKENS, LENGTHS, Frame(1, 2, 0))
    assert arranged.inputs["input_ids"].tolist() == [[1, 11, 12, 13, 2], [1, 21, 2, 0, 0], [1, 31, 32, 2, 0]]
    assert arranged.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert arranged.inputs.keys() == {"input_ids", "attention_mask"}
    assert (arranged.real_tokens, arranged.padded_tokens) == (12, 15)


def test_rows_without_padding_need_no_mask() -> None:
    arranged = arrange(TOKENS[:4], np.array([2, 2]), Frame(1, 2, 0))
    assert arranged.inputs.keys() == {"input_ids"}
    assert arranged.inputs["input_ids"].tolist() == [[1, 11, 12, 2], [1, 13, 21, 2]]


def test_rows_are_padded_to_a_multiple() -> None:
    arranged = arrange(TOKENS, LENGTHS, Frame(1, 2, 9, pad_multiple=8))
    assert arranged.inputs["input_ids"].tolist()[1] == [1, 21, 2, 9, 9, 9, 9, 9]
    assert arranged.padded_tokens == 24


def test_the_unpadded_layout_is_one_row_with_boundaries() -> None:
    arranged = arrange(TOKENS, LENGTHS, Frame(1, 2, 0, "unpadded", pad_multiple=8))
    assert arranged.inputs["input_ids"].tolist() == [[1, 11, 12, 13, 2, 1, 21, 2, 1, 31, 32, 2]]
    assert arranged.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]]
    assert arranged.inputs["cu_seqlens"].tolist() == [0, 5, 8, 12]
    assert arranged.inputs["cu_seqlens"].dtype == torch.int32
    assert arranged.inputs.keys() == {"input_ids", "position_ids", "cu_seqlens"}
    assert arranged.real_tokens == arranged.padded_tokens == 12


def test_places_lead_to_the_tokens_in_both_layouts() -> None:
    for frame in (Frame(1, 2, 0), Frame(1, 2, 0, pad_multiple=8), Frame(1, 2, 0, "unpadded")):
        arranged = arrange(TOKENS, LENGTHS, frame)
        assert arranged.inputs["input_ids"].flatten()[arranged.places].tolist() == TOKENS.tolist()


def test_no_chunk_makes_one_empty_one_that_counts_no_real_token() -> None:
    nothing = np.empty(0, np.int32)
    for frame in (Frame(1, 2, 0), Frame(1, 2, 0, "unpadded")):
        arranged = arrange(nothing, nothing, frame)
        assert arranged.inputs["input_ids"].tolist() == [[1, 2]]
        assert (arranged.real_tokens, arranged.padded_tokens, len(arranged.places)) == (0, 2, 0)


def test_ids_are_int64_in_both_layouts() -> None:
    for frame in (Frame(1, 2, 0), Frame(1, 2, 0, "unpadded")):
        inputs = arrange(TOKENS, LENGTHS, frame).inputs
        assert {name: value.dtype for name, value in inputs.items() if name != "cu_seqlens"} == {
            name: torch.int64 for name in inputs if name != "cu_seqlens"
        }


def test_slot_seeds_follow_run_step_and_slot_and_suit_a_generator() -> None:
    seeds = {slot_seed(*each) for each in [(1, 2, 3), (1, 3, 2), (2, 1, 3), (1, 2, 4)]}
    assert len(seeds) == 4
    for seed in seeds:
        assert torch.Generator().manual_seed(seed).initial_seed() == seed < 2**63
