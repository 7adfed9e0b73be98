"""How parameters are cut into pieces, one per rank, and what moves between the two forms: sums one way, copies the other.

Every rank owns a piece of every parameter, as ZeRO-3 cuts them: a reduce-scatter and an all-gather then carry equal shares to
all ranks whatever is in a bucket, and shards of all engines lie alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

from scaletrain import dist


def cut(elements: int) -> tuple[int, int]:
    """(start, length) of this rank's piece of a flattened parameter: equal pieces, the last ones short or empty."""
    size = _longest(elements)
    start = min(dist.rank() * size, elements)
    return start, min(size, elements - start)


def _longest(elements: int) -> int:
    return -(-elements // dist.world())


@dataclass(frozen=True, slots=True)
class Exchange:
    """Collectives on flat tensors. All ranks call them with the same tensors in the same order."""

    device: torch.device
    """Where the collectives run; the tensors may lie elsewhere."""
    bucket_elements: int

    def add_sums(self, wholes: Sequence[Tensor], pieces: Sequence[Tensor]) -> None:
        """Adds to every piece this rank's part of the sum of ``wholes`` over ranks, in fp32."""
        for run in self._buckets(wholes):
            block, columns = self._block(wholes[run], torch.float32)
            for whole, column in zip(wholes[run], columns, strict=True):
                for mine, theirs in _faces(whole, column):
                    theirs.copy_(mine)
            summed = block.new_empty(block.shape[1])
            with dist.peers():
                _reduce_scatter(summed, block.view(-1))
            for piece, own in zip(pieces[run], summed.split([column.shape[1] for column in columns]), strict=True):
                piece.add_(own[: piece.numel()].to(piece.device))

    def gather(self, pieces: Sequence[Tensor], wholes: Sequence[Tensor]) -> None:
        """Fills every whole from the pieces of all ranks, which travel in the type of the whole."""
        for run in self._buckets(wholes):
            block, columns = self._block(wholes[run], wholes[run][0].dtype)
            own = block.new_zeros(block.shape[1])
            for piece, place in zip(pieces[run], own.split([column.shape[1] for column in columns]), strict=True):
                place[: piece.numel()].copy_(piece)
            with dist.peers():
                _all_gather(block.view(-1), own)
            for whole, column in zip(wholes[run], columns, strict=True):
                for mine, theirs in _faces(whole, column):
                    mine.copy_(theirs)

    def _buckets(self, wholes: Sequence[Tensor]) -> Iterator[slice]:
        first = elements = 0
        for number, whole in enumerate(wholes):
            if number > first and elements + whole.numel() > self.bucket_elements:
                yield slice(first, number)
                first, elements = number, 0
            elements += whole.numel()
        if first < len(wholes):
            yield slice(first, len(wholes))

    def _block(self, wholes: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Sequence[Tensor]]:
        """[ranks, elements of a rank], with zeros where a parameter ends; and the columns of each of ``wholes`` in it."""
        widths = [_longest(whole.numel()) for whole in wholes]
        block = torch.zeros(dist.world(), sum(widths), dtype=dtype, device=self.device)
        return block, block.split(widths, dim=1)


def _faces(whole: Tensor, column: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Which part of a flat tensor lies where in its ``column`` [ranks, longest piece]: the full rows, then the short one."""
    if whole.numel():
        rows, rest = divmod(whole.numel(), column.shape[1])
        full = whole.numel() - rest
        yield whole[:full].view(rows, -1), column[:rows]
        if rest:
            yield whole[full:], column[rows, :rest]


# Renamed in torch 2.13, which warns of the old names.
_reduce_scatter: Any = getattr(td, "reduce_scatter_single", None) or td.reduce_scatter_tensor
_all_gather: Any = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor
