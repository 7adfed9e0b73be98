"""The other ranks: who they are, and the few things that are said between them on the host.

Everything here goes over a gloo group of CPU tensors, so that agreeing on a step never waits for a device. What travels is
numbers, bytes and JSON; objects are not pickled. This is the only module that reads the launcher's rank variables.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as td

from scaletrain.errors import ConfigError, DeviceError, PeerLostError, ScaletrainError


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands: its rank, the number of ranks, and its number on this machine."""

    rank: int
    world: int
    local_rank: int


def place() -> Place:
    """What the launcher said, or one rank alone where nothing launched this process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found:
        return Place(rank=0, world=1, local_rank=0)
    missing = [name for name in names if name not in found]
    if missing or not all(value.isdigit() for value in found.values()):
        rule = "the launcher sets RANK, WORLD_SIZE and LOCAL_RANK together, as whole numbers"
        raise ConfigError(
            "environment", found, rule, "Start through `scaletrain launch`, `deepspeed` or `torchrun`, or unset them."
        )
    return Place(rank=int(found["RANK"]), world=int(found["WORLD_SIZE"]), local_rank=int(found["LOCAL_RANK"]))


def device(name: str) -> torch.device:
    """The device of this rank for ``auto``, ``cpu`` or ``cuda``. Raises DeviceError for a GPU that is not there."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    local_rank = place().local_rank
    if local_rank >= available:
        rule = f"this rank needs GPU number {local_rank} of its machine, and torch sees {available}"
        raise DeviceError("device", name, rule, "Use device=cpu, fewer ranks per machine, or a CUDA build of torch.")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


_host_group: td.ProcessGroup | None = None


_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def start(device: torch.device, timeout_s: float = 1800.0) -> Place:
    """Joins the other ranks. Call it once, before an engine is made.

    One rank that nothing launched joins a group of its own in memory: no port is opened.
    """
    global _host_group
    here = place()
    limit = timedelta(seconds=timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    with peers():
        if here.world == 1 and "MASTER_ADDR" not in os.environ:
            os.environ.update(_ALONE)  # DeepSpeed asks for them even then
            td.init_process_group(backend, store=td.HashStore(), rank=0, world_size=1, timeout=limit)  # type: ignore[attr-defined]
        else:
            store = _store(here, limit)
            td.init_process_group(backend, store=store, rank=here.rank, world_size=here.world, timeout=limit)
        _host_group = td.group.WORLD if backend == "gloo" else td.new_group(backend="gloo", timeout=limit)
    return here


def _store(here: Place, timeout: timedelta) -> Any:
    """Where the ranks meet, listening at MASTER_ADDR alone; None leaves it to torch, whose store listens at every address.

    That is where a launcher keeps the store itself (torchrun), and where MASTER_ADDR is a name, or of no interface of this host
    (a service's address): a name may lead elsewhere on this machine than on the others.
    """
    name, number = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    address = "127.0.0.1" if name == "localhost" else name
    if "TORCHELASTIC_USE_AGENT_STORE" in os.environ or not number.isdigit():
        return None
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    except ValueError:
        return None
    door = None
    if here.rank == 0:
        try:
            with socket.create_server((address, int(number)), family=family, backlog=max(128, here.world)) as server:
                door = server.detach()
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise PeerLostError(f"rank 0 cannot listen at MASTER_ADDR {address}, MASTER_PORT {number}: {error}") from error
            warnings.warn(
                f"MASTER_ADDR {address} is of no interface of rank 0, so that it listens at every address", stacklevel=3
            )
    return td.TCPStore(address, int(number), here.world, here.rank == 0, timeout, multi_tenant=True, master_listen_fd=door)  # type: ignore[attr-defined]


def stop() -> None:
    """Leaves the group."""
    global _host_group
    if td.is_initialized():
        td.destroy_process_group()
    if "MASTER_ADDR" not in os.environ:
        for name in _ALONE:
            os.environ.pop(name, None)
    _host_group = None


def rank() -> int:
    return td.get_rank() if td.is_initialized() else 0


def world() -> int:
    return td.get_world_size() if td.is_initialized() else 1


@contextmanager
def peers() -> Iterator[None]:
    """Turns a broken or overdue collective into PeerLostError.

    torch reports both as a RuntimeError, which no ScaletrainError is.
    """
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(f"rank {rank()} of {world()} lost its peers in a collective: {error}") from error


def lost_peer(error: BaseException | None) -> PeerLostError | None:
    """The PeerLostError that stands behind a RuntimeError of a collective that a library called, if that is what it was."""
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs):
        return PeerLostError(f"rank {rank()} of {world()} lost its peers in a collective: {error}")
    return None


def barrier() -> None:
    if world() > 1:
        with peers():
            td.barrier(group=_host_group)


def sum_vector(values: Sequence[float]) -> list[float]:
    """The sum over all ranks, element by element, in float64 (whole numbers are exact up to 2**53)."""
    vector = torch.tensor(values, dtype=torch.float64)
    if world() > 1:
        with peers():
            td.all_reduce(vector, group=_host_group)
    return [float(value) for value in vector.tolist()]


def gather_bytes(data: bytes) -> list[bytes]:
    """What every rank gave, in rank order, on every rank."""
    return channel().gather_bytes(data)


def gather(tree: Any) -> list[Any]:
    """The JSON value that every rank gave, in rank order, on every rank."""
    return channel().gather(tree)


def gather_rows(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The rows [n, columns] of all ranks under each other; ``n`` may differ between ranks, the columns may not."""
    parts = gather_bytes(np.ascontiguousarray(rows, dtype=np.float64).tobytes())
    return np.concatenate([np.frombuffer(part, dtype=np.float64).reshape(-1, rows.shape[1]) for part in parts])


def broadcast(tree: Any) -> Any:
    """The JSON value of rank 0, on every rank."""
    return gather(tree if rank() == 0 else None)[0]


def from_first(what: str, work: Callable[[], Any]) -> Any:
    """What ``work``, run on rank 0 alone, returned (a JSON value), on every rank. A failure is shared like `raise_together`'s."""
    value, error = None, None
    if rank() == 0:
        try:
            value = work()
        except Exception as failure:
            error = failure
    raise_together(error, what)
    return broadcast(value)


def agree(what: str, value: str, kind: type[ScaletrainError] = ScaletrainError) -> None:
    """Raises an error of ``kind`` on every rank unless all ranks hold the same ``value``."""
    values = gather(value)
    if any(other != values[0] for other in values):
        listed = ", ".join(f"rank {number}: {other}" for number, other in enumerate(values))
        raise kind(f"the ranks do not agree on {what} ({listed}); they must read the same files and settings")


def raise_together(error: Exception | None, what: str) -> None:
    """Shares the outcome of a phase: no rank leaves it alone.

    A rank that failed raises its own error, the others one of the same exit code that names the failed rank.
    """
    channel().raise_together(error, what)


@dataclass(frozen=True, slots=True)
class Channel:
    """All ranks over one group. What a thread says to the others' threads needs a group, and a limit, of its own."""

    group: td.ProcessGroup | None

    @property
    def rank(self) -> int:
        return rank()

    @property
    def world(self) -> int:
        return world()

    def gather_bytes(self, data: bytes) -> list[bytes]:
        if world() == 1:
            return [data]
        with peers():
            sizes = torch.zeros(world(), dtype=torch.int64)
            sizes[rank()] = len(data)
            td.all_reduce(sizes, group=self.group)
            longest = max(1, int(sizes.max()))
            mine = torch.zeros(longest, dtype=torch.uint8)
            mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else mine[:0]
            parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(world())]
            td.all_gather(parts, mine, group=self.group)
        return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    def gather(self, tree: Any) -> list[Any]:
        return [json.loads(part) for part in self.gather_bytes(json.dumps(tree).encode())]

    def raise_together(self, error: Exception | None, what: str) -> None:
        mine = None if error is None else [type(error).__name__, str(error), getattr(error, "exit_code", 70)]
        outcomes = self.gather(mine)
        if error is not None:
            raise error
        for number, outcome in enumerate(outcomes):
            if outcome is not None:
                shared = ScaletrainError(f"{what} failed on rank {number}: {outcome[0]}: {outcome[1]}")
                shared.exit_code = outcome[2]
                raise shared

    def close(self) -> None:
        """Leaves a group that `open_channel` made."""
        if self.group is not None:
            td.destroy_process_group(self.group)


def channel() -> Channel:
    """The ranks over the group that everything here uses."""
    return Channel(_host_group)


def open_channel(timeout_s: float) -> Channel:
    """The ranks over a gloo group of its own, on which they wait at most so long for each other. Collective."""
    if world() == 1:
        return Channel(None)
    with peers():
        return Channel(td.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)))
