"""Pieces of flattened parameters in files, some files per rank: any range can be read back, whoever wrote it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scaletrain import dist, outside
from scaletrain.commit import File
from scaletrain.errors import CheckpointError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """What one rank holds of something that has an element for each element of a parameter."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """First element of the flattened parameter that is in the piece."""
    values: Tensor
    """Flat fp32; empty on a rank that holds none of it."""


@dataclass(slots=True)
class _Planned:
    """One file before it is written."""

    tensors: list[tuple[str, Tensor]] = field(default_factory=list)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    size: int = 0

    def add(self, key: str, value: Tensor) -> None:
        self.tensors.append((key, value))
        self.size += value.nbytes


def files(parts: Iterable[tuple[str, str, Piece]], whole: Mapping[str, Tensor], max_bytes: int = 2**32) -> list[File]:
    """This rank's files of (part, name, piece), and of tensors that are kept ``whole``.

    All parts of one name lie at the same place. A file holds at most ``max_bytes`` of pieces; a name that has more is cut by
    ranges, of one element at least. The tensors are read when the files are written, one at a time.
    """
    planned = [_Planned()]
    for name, value in sorted(whole.items(), key=lambda item: -item[1].element_size()):  # so that all of them are aligned
        planned[0].add(name, value)
    for name, pieces in _by_name(parts).items():
        start, length = next((piece.start, piece.values.numel()) for piece in pieces.values())
        bytes_per_element = sum(piece.values.element_size() for piece in pieces.values())
        most = max(1, max_bytes // bytes_per_element)
        for first in range(0, length, most):
            count = min(most, length - first)
            if planned[-1].size and planned[-1].size + count * bytes_per_element > max_bytes:
                planned.append(_Planned())
            planned[-1].places[name] = (start + first, count)
            for part, piece in pieces.items():
                planned[-1].add(f"{part}/{name}", piece.values[first : first + count])
    return [_file(number, each) for number, each in enumerate(planned)]


def _by_name(parts: Iterable[tuple[str, str, Piece]]) -> dict[str, dict[str, Piece]]:
    found: dict[str, dict[str, Piece]] = {}
    for part, name, piece in parts:
        if piece.values.numel():
            found.setdefault(name, {})[part] = piece
    return found


def _file(number: int, planned: _Planned) -> File:
    """As safetensors defines it: the header's length, the header, and the tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": {"pieces": json.dumps(planned.places)}}
    offset = 0
    for key, value in planned.tensors:
        header[key] = {"dtype": _DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, offset + value.nbytes]}
        offset += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rank = f"state-{dist.rank():05d}-of-{dist.world():05d}"
    name = f"{rank}.safetensors" if number == 0 else f"{rank}-{number:05d}.safetensors"

    def parts() -> Iterator[Any]:
        yield struct.pack("<Q", len(text)) + text
        for _, value in planned.tensors:
            yield _bytes(value)

    return File(name, 8 + len(text) + offset, parts())


def _bytes(value: Tensor) -> npt.NDArray[np.uint8]:
    array: npt.NDArray[np.uint8] = value.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy()
    return array


class Pieces:
    """The pieces in all files that a manifest lists, read by range. Raises CheckpointError for a file that is none."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self._folder = folder
        self._index: dict[str, list[tuple[int, int, int]]] = {}
        self._bytes = ExitStack()
        try:
            paths = [outside.plain(folder, entry["name"]) for entry in manifest["files"]]
            self._files = [safe_open(path, framework="pt") for path in paths]
            self._raw = [_Raw(path, self._bytes) for path in paths]
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
        self._bytes.close()

    def read(self, part: str, name: str, start: int, target: Tensor) -> None:
        """Fills ``target`` (flat) with the elements from ``start`` on of the flattened parameter."""
        try:
            filled = self._fill(part, name, start, target)
        except (ValueError, KeyError, TypeError) as error:
            rule = f"its files must be safetensors with a list of their pieces ({error})"
            raise CheckpointError(str(self._folder), "another content", rule, "Use another checkpoint.") from error
        if filled != target.numel():
            rule = f"the files hold {filled} of {target.numel()} elements from {start} on"
            raise CheckpointError(f"{self._folder}: {part} of {name}", filled, rule, "Use another checkpoint.")

    def _fill(self, part: str, name: str, start: int, target: Tensor) -> int:
        """How many elements of ``target`` the files had."""
        end, filled = start + target.numel(), 0
        for first, length, number in self._index.get(name, []):
            low, high = max(start, first), min(end, first + length)
            if low < high:
                self._raw[number].read(f"{part}/{name}", low - first, target[low - start : high - start])
                filled += high - low
        return filled

    def whole(self, name: str) -> Tensor:
        """A tensor that is in one piece; they are in rank 0's first file."""
        value: Tensor = self._files[0].get_tensor(name)
        return value


class _Raw:
    """The fp32 tensors of one file, read straight into their place: ``safe_open`` has found its header sound."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._stream = stack.enter_context(path.open("rb", buffering=0))
        (size,) = struct.unpack("<Q", self._stream.read(8))
        self._header = outside.parse_json(self._stream.read(size))
        self._start = 8 + size

    def read(self, key: str, first: int, target: Tensor) -> None:
        """Fills ``target`` (flat) with the elements of tensor ``key`` from ``first`` on."""
        entry = self._header[key]
        if entry["dtype"] != "F32":
            raise ValueError(f"{key} is {entry['dtype']} and not F32")
        place = target if target.device.type == "cpu" and target.dtype == torch.float32 else torch.empty(target.numel())
        left = place.detach().view(torch.uint8).numpy().data
        offset = self._start + entry["data_offsets"][0] + 4 * first
        if 4 * first + len(left) > entry["data_offsets"][1] - entry["data_offsets"][0]:
            raise ValueError(f"{key} is shorter than its list of pieces says")
        while left:
            count = os.preadv(self._stream.fileno(), [left], offset)
            if count == 0:
                raise ValueError(f"{key} is cut off")
            left, offset = left[count:], offset + count
        if place is not target:
            target.copy_(place)
