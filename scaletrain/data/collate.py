"""Chunks to tensors: one slot as padded rows, or as a single row without padding.

Chunks are stored without special tokens; here each gets its first and its last one. What is learned from a slot is the task's
business: it says which token ids go in, which places are predicted, and what they should have been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaletrain.data import keyed
from scaletrain.data.plan import I64, Picks
from scaletrain.data.slots import Layout
from scaletrain.errors import ScaletrainError


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One micro-batch, ready to run. All tensors are on the host."""

    step: int
    index: int
    """Number of the slot in its step; from K on it only fills up a round."""
    signature: str
    """Which modules run: equal on all ranks in a round."""
    seed: int
    """Of the torch generator while the slot runs, so that dropout is the same on any rank."""
    inputs: dict[str, Tensor]
    """What the module receives: `input_ids`, `rows`, and what its layout needs."""
    targets: dict[str, Tensor]
    """What the loss needs: `labels` [rows] and `chunk_of_row` [rows], the number in `samples` that a row belongs to."""
    counts: dict[str, int]
    """Term of the loss -> number of things that its sum runs over; 0 in a slot with nothing to learn."""
    samples: Picks
    real_tokens: int
    """Tokens of the text, special tokens included."""
    padded_tokens: int
    """Places that the model computes, padding included; in a slot without samples those of the dummy row."""


class Collate(Protocol):
    """What the loader asks of a task: slot ``index`` of ``step`` out of its samples and their token arrays, perhaps none."""

    def __call__(self, step: int, index: int, samples: Picks, chunks: Sequence[NDArray[np.int32]]) -> Slot: ...


@dataclass(frozen=True, slots=True)
class Frame:
    """How tokens become inputs: the ids that stand before, behind and beside a chunk, and the layout."""

    first_id: int
    last_id: int
    pad_id: int
    layout: Layout = "padded"
    pad_multiple: int = 1
    token_types: bool = False
    """Whether the model tells the second part of a pair by `token_type_ids`."""


@dataclass(frozen=True, slots=True, eq=False)
class Arranged:
    """Inputs of the module, and where among its flattened places the n tokens of the chunks went: int64 [n]."""

    inputs: dict[str, Tensor]
    places: I64
    real_tokens: int
    padded_tokens: int


def arrange(tokens: NDArray[Any], lengths: NDArray[Any], frame: Frame, seconds: NDArray[Any] | None = None) -> Arranged:
    """Lays out chunks that stand end to end in ``tokens`` [n], with ``lengths`` per chunk, between their special tokens.

    Padded: `input_ids` int64 [chunks, longest], and `attention_mask` of the same shape (1 for a token) unless no row is padded.
    Unpadded: `input_ids` and `position_ids` int64 [1, tokens], the positions starting over in each chunk, and `cu_seqlens` int32
    [chunks + 1], the boundaries. No chunk at all gives one empty one: every slot runs the whole model.

    ``seconds`` per chunk counts the tokens before the second part of a pair, and is the chunk's length where there is none.
    Frames that ask for it get `token_type_ids`, of the shape of `input_ids`: 1 in second parts and the token that ends them.
    Raises ScaletrainError for a negative id, which is how a chunk marks words (``words``) and no row of an embedding.
    """
    if np.min(tokens, initial=0) < 0:
        raise ScaletrainError(f"tokens: got {np.min(tokens)}; a model reads ids from 0. Take words.plain of what a chunk stores")
    real = int(np.sum(lengths)) + 2 * len(lengths)
    if not len(lengths):
        lengths = np.zeros(1, dtype=np.int64)
    rows = np.asarray(lengths, dtype=np.int64) + 2
    if frame.layout == "unpadded":
        begins, total = np.cumsum(rows) - rows, int(rows.sum())
    else:
        width = -(-int(rows.max()) // frame.pad_multiple) * frame.pad_multiple
        begins, total = np.arange(len(rows)) * width, len(rows) * width
    inner = rows - 2
    places = np.arange(len(tokens)) + np.repeat(begins + 1 - (np.cumsum(inner) - inner), inner)

    ids = np.full(total, frame.pad_id, dtype=np.int64)
    ids[places] = tokens
    ids[begins] = frame.first_id
    ids[begins + rows - 1] = frame.last_id
    inputs = {"input_ids": torch.from_numpy(ids)}
    if frame.token_types:
        types = np.zeros(total, dtype=np.int64)
        seconds = inner[:0] if seconds is None else seconds
        for row in np.flatnonzero(seconds < inner[: len(seconds)]):
            types[begins[row] + 1 + seconds[row] : begins[row] + rows[row]] = 1
        inputs["token_type_ids"] = torch.from_numpy(types)
    if frame.layout == "unpadded":
        inputs["position_ids"] = torch.from_numpy(np.arange(total) - np.repeat(begins, rows))
        inputs = {name: value[None] for name, value in inputs.items()}
        inputs["cu_seqlens"] = torch.from_numpy(np.append(begins, total).astype(np.int32))
    else:
        inputs = {name: value.view(len(rows), width) for name, value in inputs.items()}
        if total > rows.sum():
            inputs["attention_mask"] = torch.from_numpy((np.arange(width) < rows[:, None]).astype(np.int64))
    return Arranged(inputs, places, real, total)


def slot_seed(seed: int, step: int, index: int) -> int:
    """Seed of the torch generator for one slot: of the run, the step and the slot, never of the rank; 63 bits."""
    return keyed.key(seed, "dropout", step, index) & (2**63 - 1)
