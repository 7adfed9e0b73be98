"""Pieces of flattened parameters in files, one file per rank: any range can be read back, whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scaletrain import dist, durable, outside
from scaletrain.checkpoint.manifest import file_digest
from scaletrain.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Piece:
    """What one rank holds of something that has an element for each element of a parameter."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """First element of the flattened parameter that is in the piece."""
    values: Tensor
    """Flat fp32; empty on a rank that holds none of it."""


def write_file(folder: Path, parts: Iterable[tuple[str, str, Piece]], whole: Mapping[str, Tensor]) -> dict[str, Any]:
    """This rank's file of (part, name, piece), and of tensors that are kept ``whole``; returns its entry of the manifest.

    All parts of one name lie at the same place.
    """
    file = folder / f"state-{dist.rank():05d}-of-{dist.world():05d}.safetensors"
    tensors = {name: value.detach().to("cpu", copy=True) for name, value in whole.items()}
    places: dict[str, tuple[int, int]] = {}
    for part, name, piece in parts:
        if piece.values.numel():
            places[name] = (piece.start, piece.values.numel())
            tensors[f"{part}/{name}"] = piece.values.detach().to("cpu", copy=True)
    save_file(tensors, file, metadata={"pieces": json.dumps(places)})
    durable.sync(file)
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": file_digest(file)}


class Pieces:
    """The pieces in all files that a manifest lists, read by range."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self._folder = folder
        self._index: dict[str, list[tuple[int, int, int]]] = {}
        try:
            self._files = [safe_open(outside.plain(folder, entry["name"]), framework="pt") for entry in manifest["files"]]
            for number, file in enumerate(self._files):
                for name, (start, length) in outside.parse_json(file.metadata()["pieces"]).items():
                    self._index.setdefault(name, []).append((start, length, number))
        except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
            rule = f"its files must be safetensors with a list of their pieces ({error})"
            raise CheckpointError(str(folder), "another content", rule, "Use another checkpoint.") from error

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def read(self, part: str, name: str, start: int, target: Tensor) -> None:
        """Fills ``target`` (flat) with the elements from ``start`` on of the flattened parameter."""
        end, filled = start + target.numel(), 0
        for first, length, number in self._index.get(name, []):
            low, high = max(start, first), min(end, first + length)
            if low < high:
                piece = self._files[number].get_slice(f"{part}/{name}")[low - first : high - first]
                target[low - start : high - start].copy_(piece)
                filled += high - low
        if filled != target.numel():
            rule = f"the files hold {filled} of {target.numel()} elements from {start} on"
            raise CheckpointError(f"{self._folder}: {part} of {name}", filled, rule, "Use another checkpoint.")

    def whole(self, name: str) -> Tensor:
        """A tensor that is in one piece; rank 0 wrote them."""
        value: Tensor = self._files[0].get_tensor(name)
        return value
