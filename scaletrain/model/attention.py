"""Attention of the unpadded layout: many documents in one row, each attending to itself only.

Transformers calls it by name through `AttentionInterface`. Two ways compute the same: PyTorch's variable-length kernel on CUDA,
and everywhere else scaled dot products over groups of documents of equal length (a group is an ordinary batch without padding).
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from scaletrain.errors import ModelError

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a build without it takes the other way
    varlen_attn = None

NAME = "scaletrain_unpadded"


class Documents:
    """Where the documents of one row begin and end; made once per forward pass and read by every layer."""

    def __init__(self, cu_seqlens: Tensor, tokens: int, device: torch.device) -> None:
        """`cu_seqlens` [documents + 1] is read on the host: if it lies on the CPU, the device is not waited for.

        Raises ModelError unless it ascends from 0 to `tokens`.
        """
        self._bounds: list[int] = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(self._bounds)]
        if not lengths or self._bounds[0] != 0 or self._bounds[-1] != tokens or min(lengths) < 0:
            raise ModelError("cu_seqlens", self._bounds, f"must ascend from 0 to the {tokens} tokens of the row", "Collate again")
        self.boundaries = cu_seqlens.to(device, torch.int32, non_blocking=True)
        self.longest = max(lengths)

    @cached_property
    def groups(self) -> tuple[Tensor, ...]:
        """Token positions of all documents of one length, int64 [documents, length], one tensor per length."""
        starts: dict[int, list[int]] = defaultdict(list)
        for start, end in pairwise(self._bounds):
            if end > start:
                starts[end - start].append(start)
        device = self.boundaries.device
        return tuple(
            torch.tensor(first, device=device)[:, None] + torch.arange(length, device=device)
            for length, first in sorted(starts.items())
        )


def register() -> None:
    """Makes the layout known to Transformers under NAME, with no mask: the boundaries say more than a mask would."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, no_mask)


def no_mask(*_args: Any, **_kwargs: Any) -> None:
    """Stands where Transformers would build a mask."""
    return None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    documents: Documents | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within documents: query, key, value [1, heads, tokens, head width] -> [1, tokens, heads, head width].

    `sliding_window` counts the token itself, as Transformers passes it: a token sees sliding_window - 1 neighbours on each side.
    Raises ModelError if the model did not hand the documents through: attention over the whole row would leak between them.
    """
    if documents is None:
        rule = "this release of Transformers does not pass the documents on to its attention"
        raise ModelError("model.layout", "unpadded", rule, "Set model.layout=padded or update transformers")
    reach = None if sliding_window is None else sliding_window - 1
    if _kernel_serves(query, dropout, scaling, reach):
        return by_kernel(query, key, value, documents, reach), None
    return by_groups(query, key, value, documents, reach, dropout, scaling), None


def by_groups(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, reach: int | None, dropout: float, scaling: float | None
) -> Tensor:
    """Documents of equal length as one batch after the other."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [tokens, heads, width]
    pieces = []
    for positions in documents.groups:
        q, k, v = (tensor[positions].transpose(1, 2) for tensor in (query, key, value))  # [documents, heads, length, width]
        mask = None if reach is None else _band(positions.shape[1], reach, query.device)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
        pieces.append(attended.transpose(1, 2).flatten(0, 1))
    order = torch.cat([positions.flatten() for positions in documents.groups])
    # Every token is in exactly one group, so that the inverse of the order puts each back in its place.
    return torch.cat(pieces)[torch.argsort(order)][None]


def by_kernel(query: Tensor, key: Tensor, value: Tensor, documents: Documents, reach: int | None) -> Tensor:
    """All documents in one call of PyTorch's variable-length attention (CUDA, half precision, no dropout)."""
    query, key, value = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    window = {} if reach is None else {"window_size": (reach, reach)}
    bounds, longest = documents.boundaries, documents.longest
    attended: Tensor = varlen_attn(query, key, value, bounds, bounds, longest, longest, **window)
    return attended[None]


def _kernel_serves(query: Tensor, dropout: float, scaling: float | None, reach: int | None) -> bool:
    if varlen_attn is None or not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if dropout > 0 or (scaling is not None and scaling != query.shape[-1] ** -0.5):
        return False  # the kernel has no dropout and, in older releases, only its own scale
    return reach is None or _has_window()


@cache
def _has_window() -> bool:
    return "window_size" in inspect.signature(varlen_attn).parameters


def _band(length: int, reach: int, device: torch.device) -> Tensor | None:
    """bool [length, length], true where two tokens are at most `reach` apart; none if that is everywhere."""
    if length <= reach + 1:
        return None
    place = torch.arange(length, device=device)
    return (place[:, None] - place[None, :]).abs() <= reach
