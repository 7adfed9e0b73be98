"""What a checkpoint costs: ours, waiting and beside the training, against DeepSpeed's and torch's, of the same model.

::

    python tools/bench/checkpoint.py [--rounds N] [--work DIR] [--smoke]

A model of BERT-base's shapes (110 M parameters) under ZeRO-3 on two ranks over gloo: fp32 weights and both moments, 1.3 GB. Every
round saves with each way in turn and loads what it has saved, so that what else the machine does meets all of them; the order
changes from round to round. Files that were just written are in the page cache when they are loaded. Seconds:

- blocking: until the training goes on
- durable: until everything is on the disk. DeepSpeed and torch sync nothing by themselves (torch's ``sync_files`` is on): their
  files are synced after the save, by both ranks, and that counts
- load: of a fresh engine's state; ours with every file's SHA-256 verified, theirs with none

The last line is one JSON object: ``checks`` are the medians' ratios with a target, ``table`` has all figures. ``--smoke``: a tiny
model, one round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the two ranks share two cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

WAYS = ("ours", "ours, asynchronous", "deepspeed", "torch DCP", "torch DCP, asynchronous")
BASE = {"layers": 12, "hidden": 768, "vocabulary": 30522, "positions": 512}
TINY = {"layers": 2, "hidden": 32, "vocabulary": 512, "positions": 64}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5; one more comes first and does not count")
    parser.add_argument("--work", type=Path, metavar="DIR", help="on the disk to be measured; default: the temporary folder")
    parser.add_argument("--smoke", action="store_true", help="does it still run?")
    options = parser.parse_args(argv)
    rounds = 1 if options.smoke else options.rounds
    from tests import ranks
    from tools.bench import checkpoint as script  # under a name by which the ranks find it too

    with tempfile.TemporaryDirectory(prefix="scaletrain-bench-", dir=options.work) as folder:
        arguments = {"shape": TINY if options.smoke else BASE, "rounds": rounds + (not options.smoke), "folder": folder}
        first, second = ranks.run(script.measure, 2, arguments, timeout_s=3000)
    counted = slice(0 if options.smoke else 1, None)
    table = {
        way: {
            name: summary([max(pair) for pair in zip(first[way][name][counted], second[way][name][counted], strict=True)])
            for name in first[way]
        }
        for way in WAYS
    }
    for way, row in table.items():
        print(f"{way:24}" + "  ".join(f"{name} {value['median']:.3g}" for name, value in row.items()), flush=True)

    def ratio(way: str, name: str, rival: str = "deepspeed") -> float:
        return round(table[way][name]["median"] / table[rival][name]["median"], 3)

    checks = {
        "blocking, asynchronous / deepspeed": {"value": ratio("ours, asynchronous", "blocking_s"), "target": "<= 0.3"},
        "durable / deepspeed + fsync": {"value": ratio("ours", "durable_s"), "target": "<= 1.2"},
        "load, verified / deepspeed": {"value": ratio("ours", "load_s"), "target": "<= 1.2"},
    }
    command = " ".join(["python", "tools/bench/checkpoint.py", *sys.argv[1:]])
    machine = {"cores": len(os.sched_getaffinity(0)), "load_after": os.getloadavg()[0]}
    result = {"bench": "checkpoint", "smoke": options.smoke, "checks": checks, "table": table}
    print(json.dumps({**result, "command": command, "machine": machine}), flush=True)
    return 0


def summary(values: Sequence[float]) -> dict[str, float]:
    """Of the slower rank, over the rounds."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# ------------------------------------------------------------------------------------------------------------ on each rank


def measure(shape: dict[str, int], rounds: int, folder: str) -> dict[str, dict[str, list[float]]]:
    """Way -> what is measured -> this rank's value of every round."""
    import torch

    from scaletrain import dist

    dist.start(torch.device("cpu"))
    engine = engine_of(shape)
    step(engine, shape)
    ways: dict[str, Way] = {
        "ours": Ours(engine, asynchronous=False),
        "ours, asynchronous": Ours(engine, asynchronous=True),
        "deepspeed": Deepspeed(engine),
        "torch DCP": Dcp(engine, asynchronous=False),
        "torch DCP, asynchronous": Dcp(engine, asynchronous=True),
    }
    figures: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    for number in range(rounds):
        for way in [*WAYS[number % len(WAYS) :], *WAYS[: number % len(WAYS)]]:
            place = Path(folder, f"{number}-{WAYS.index(way)}")
            for name, value in of_one(ways[way], place).items():
                figures[way].setdefault(name, []).append(value)
            if dist.rank() == 0:
                print(
                    f"round {number}: {way}: { ({name: round(each[-1], 3) for name, each in figures[way].items()}) }", flush=True
                )
                shutil.rmtree(place)
            dist.barrier()
    return figures


def of_one(way: Way, place: Path) -> dict[str, float]:
    """One save and one load."""
    from scaletrain import dist

    if dist.rank() == 0:
        place.mkdir()
    dist.barrier()
    peak, held = Peak(), way.held_mb()
    cpu, began = cpu_s(), time.perf_counter()
    way.begin(place)
    blocking = time.perf_counter() - began
    way.settle(place)
    dist.barrier()
    durable, used = time.perf_counter() - began, cpu_s() - cpu
    more = peak.more_mb() + held
    written = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    way.forget()
    dist.barrier()
    cpu, began = cpu_s(), time.perf_counter()
    way.load(place)
    dist.barrier()
    return {
        "blocking_s": blocking,
        "durable_s": durable,
        "save_cpu_s": used,
        "load_s": time.perf_counter() - began,
        "load_cpu_s": cpu_s() - cpu,
        "bytes": float(written),
        "peak_mb": more,
    }


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Peak:
    """How much more memory this process takes at its highest than it does now."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
        self._before = self._kb("VmRSS")

    def more_mb(self) -> float:
        return max(0.0, (self._kb("VmHWM") - self._before) / 1024)

    @staticmethod
    def _kb(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))


def engine_of(shape: dict[str, int]) -> Any:
    """BERT's shapes as plain modules under ZeRO-3: what is measured are bytes."""
    import torch
    from torch import nn

    from scaletrain import engine
    from scaletrain.engine import OptimizerConfig, Zero3Config

    hidden = shape["hidden"]

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(shape["vocabulary"], hidden)
            self.positions = nn.Embedding(shape["positions"], hidden)
            self.layers = nn.ModuleList(
                nn.ModuleList(
                    [*(nn.Linear(hidden, hidden) for _ in range(4)), nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)]
                )
                for _ in range(shape["layers"])
            )

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            values = self.words(ids) + self.positions(ids)
            for query, key, value, out, up, down in self.layers:
                values = values + out(query(values) + key(values) + value(values))
                values = values + down(up(values))
            return values

    torch.manual_seed(1)
    module = Layers()
    groups = [{"params": list(module.parameters())}]
    return engine.create(Zero3Config(), module, groups, OptimizerConfig(learning_rate=1e-4), torch.device("cpu"))


def step(engine: Any, shape: dict[str, int]) -> None:
    """One, after which no moment is zero everywhere."""
    import torch

    from tests.toy import ToySlot

    slot = ToySlot("all", 1, {"ids": torch.arange(shape["positions"]).remainder(shape["positions"])[None, :32]})
    engine.begin([slot.signature])
    engine.backward(engine.forward(slot).square().mean())
    engine.clip(1.0, torch.zeros(1, dtype=torch.float64))
    engine.step(1e-4)


class Way:
    """One way to save and load an engine's state."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def begin(self, place: Path) -> None:
        """Returns when the training may go on."""

    def settle(self, place: Path) -> None:
        """Returns when everything is on the disk."""

    def held_mb(self) -> float:
        """What it keeps from one save to the next, which counts as its memory too."""
        return 0.0

    def forget(self) -> None:
        """Another state, so that loading has something to do."""
        for shard in self.engine.shards():
            shard.weight.zero_()
            for moment in shard.moments.values():
                moment.zero_()

    def load(self, place: Path) -> None: ...


class Ours(Way):
    def __init__(self, engine: Any, *, asynchronous: bool) -> None:
        super().__init__(engine)
        from scaletrain.checkpoint import CheckpointConfig, Saver

        config = CheckpointConfig(asynchronous=asynchronous)
        self._saver: Callable[[Path], Any] = lambda place: Saver(place, engine, config)
        self._made: Any = None

    def begin(self, place: Path) -> None:
        from scaletrain.checkpoint import Progress

        if self._made is None:
            self._made = self._saver(place)
        self._made._folder = place  # a run has one folder, and one buffer for all of its saves
        assert self._made.save(Progress(1, {"phase": 0, "samples": 1}, {}))

    def settle(self, place: Path) -> None:
        self._made.settle()

    def held_mb(self) -> float:
        return 0.0 if self._made is None or self._made._copy is None else self._made._copy.nbytes / 2**20

    def load(self, place: Path) -> None:
        from scaletrain import checkpoint

        last = checkpoint.newest(place)
        assert last is not None
        checkpoint.restore(last, self.engine, {})


def synced(place: Path, mine: Callable[[str], bool]) -> None:
    """Brings to the disk what the others leave to the kernel."""
    for file in [path for path in place.rglob("*") if path.is_file() and mine(path.name)]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class Deepspeed(Way):
    """``save_checkpoint`` and ``load_checkpoint``, with an explicit tag."""

    def begin(self, place: Path) -> None:
        self.engine._engine.save_checkpoint(str(place), tag="one")

    def settle(self, place: Path) -> None:
        from scaletrain import dist

        synced(place, lambda name: f"rank_{dist.rank()}_" in name or (dist.rank() == 0 and "rank_" not in name))

    def load(self, place: Path) -> None:
        self.engine._engine.load_checkpoint(str(place), tag="one")


class Dcp(Way):
    """torch.distributed.checkpoint over tensors that it takes for the shards of one tensor each, as FSDP would give it."""

    def __init__(self, engine: Any, *, asynchronous: bool) -> None:
        super().__init__(engine)
        self._asynchronous = asynchronous
        self._future: Any = None

    def _state(self) -> dict[str, Any]:
        from scaletrain import dist

        state = {}
        for shard in self.engine.shards():
            for part, values in (("weight", shard.weight), *shard.moments.items()):
                state[f"{part}/{shard.name}/{dist.rank()}"] = values
        return state

    def begin(self, place: Path) -> None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(place, sync_files=True)
        if self._asynchronous:
            self._future = dcp.async_save(self._state(), storage_writer=writer)
        else:
            dcp.save(self._state(), storage_writer=writer)

    def settle(self, place: Path) -> None:
        if self._asynchronous:
            self._future.result()

    def load(self, place: Path) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(self._state(), storage_reader=dcp.FileSystemReader(place))


if __name__ == "__main__":
    sys.exit(main())
