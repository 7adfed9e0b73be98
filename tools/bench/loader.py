"""What reading costs: our loader beside webdataset and Hugging Face datasets, on the same tars, in one process and one thread.

::

    python tools/bench/loader.py [--rounds N] [--work DIR] [--smoke]

Tars of token arrays, 2 KB and 64 KB a sample, in the page cache. Every round reads them with each way in turn:

- bytes: samples delivered as bytes. Ours in the plan's shuffled order, each checked against its CRC-32; webdataset and datasets
  as they lie in the tars, one after the other, checked against nothing
- batches: the same samples, decoded and put through the same collate function (masks of 15 %, padded rows), 8 samples a slot.
  webdataset's and datasets' in the order of the tars
- first: seconds until a new reader gives its first batch

Then a million samples: seconds until the first batch of a run that starts at step 0, and of one that goes on at 90 %, for ours
and for the others, which have to skip. And the plan alone, for 1e9 chunks: memory, and microseconds for a step of 4,096.

The last line is one JSON object: ``checks`` are medians of the rounds' ratios, ``table`` has all figures. ``--smoke``: small
tars, one round.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
for name, value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("HF_HUB_OFFLINE", "1")):
    os.environ.setdefault(name, value)

import numpy as np  # noqa: E402

from scaletrain.data import dataset, shards  # noqa: E402
from scaletrain.data.dataset import Dataset  # noqa: E402
from scaletrain.data.foreign import TarSet  # noqa: E402
from scaletrain.data.index import RECORD  # noqa: E402
from scaletrain.data.loader import Loader, LoaderConfig  # noqa: E402
from scaletrain.data.plan import CorpusShape, OrderConfig, PhaseShape, Picks, Plan  # noqa: E402
from scaletrain.data.slots import Dealing, DealtPlan  # noqa: E402
from scaletrain.data.tokenizer import Vocabulary  # noqa: E402
from scaletrain.tasks.mlm import MaskedLanguageModelling, MlmConfig  # noqa: E402

BATCH = 8
CHUNKS_PER_STEP = 256
WAYS = ("ours", "webdataset", "datasets")
SIZES = {"2 KB": (1000, 40_000), "64 KB": (32_000, 3_000)}
"""Tokens of a sample, at two bytes each, and how many samples there are."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5; one more comes first and does not count")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the tars go (1.7 GB); default: the temporary folder")
    parser.add_argument("--smoke", action="store_true", help="does it still run?")
    options = parser.parse_args(argv)
    rounds, part = (1, 40) if options.smoke else (options.rounds, 1)
    checks: dict[str, Any] = {}
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="scaletrain-bench-", dir=options.work) as work:
        tokenizer = make_tokenizer(Path(work))
        for size, (tokens, samples) in SIZES.items():
            folder = make_corpus(Path(work, size.replace(" ", "")), tokenizer, tokens, samples // part)
            table[size] = compare(folder, rounds, warm=not options.smoke)
            for what, target in (("bytes", 3.0), ("batches", 1.3)):
                ratio = statistics.median(table[size][what]["ours / webdataset, by round"])
                checks[f"{what} a second, {size}, ours / webdataset"] = {"value": round(ratio, 2), "target": f">= {target}"}
            shutil.rmtree(folder)
        folder = make_corpus(Path(work, "million"), tokenizer, 60, 1_000_000 // (part * 2 if options.smoke else 1))
        table["resume"] = resume(folder, rounds)
        table["memory of a million chunks, bytes each"] = memory(folder)
        checks["memory, bytes a chunk"] = {"value": table["memory of a million chunks, bytes each"], "target": "<= 4"}
        at_90, at_0 = table["resume"]["ours"]["at 90 %"], table["resume"]["ours"]["at 0"]
        checks["steps at 90 % that are not those of a run that came there"] = {
            "value": 0 if table["resume"]["equal"] else 1,
            "target": "<= 0",
        }
        checks["first batch at 90 % - at 0, seconds"] = {"value": round(at_90 - at_0, 4), "target": "<= 0.05"}
    table["plan of 1e9 chunks"] = plan_alone()
    checks["plan of 1e9 chunks, MB"] = {"value": table["plan of 1e9 chunks"]["megabytes"], "target": "<= 16"}
    command = " ".join(["python", "tools/bench/loader.py", *sys.argv[1:]])
    machine = {"cores": len(os.sched_getaffinity(0)), "load_after": os.getloadavg()[0]}
    result = {"bench": "loader", "smoke": options.smoke, "checks": checks, "table": table}
    print(json.dumps({**result, "command": command, "machine": machine}), flush=True)
    return 0


# ------------------------------------------------------------------------------------------------------------------ the corpora


def make_tokenizer(work: Path) -> Path:
    """A tokenizer's folder; its vocabulary bounds the tokens below."""
    from tests import tiny

    (work / "text").mkdir()
    return tiny.corpus(work / "text") / "tokenizer"


def make_corpus(folder: Path, tokenizer: Path, tokens: int, samples: int, per_shard: int = 20_000) -> Path:
    """A prepared folder of random tokens; its tars are what all sides read."""
    shutil.copytree(tokenizer, folder / "tokenizer")
    vocabulary = Vocabulary.open(folder / "tokenizer")
    draw, written = np.random.default_rng(1), []
    per_shard = max(1, min(per_shard, samples // 3))
    ordinary = draw.integers(10, vocabulary.size, (997, tokens)).astype("<u2")
    for shard in range(samples // per_shard):
        writer = shards.ShardWriter(folder, f"train/{shard:06d}")
        for first in range(0, per_shard, 500):
            numbers = range(shard * per_shard + first, shard * per_shard + min(first + 500, per_shard))
            made = [shards.sample(f"{number:09d}", ordinary[number % 997]) for number in numbers]
            records = np.zeros(len(made), RECORD)
            records["length"] = [len(each) for each in made]
            records["offset"][1:] = np.cumsum(records["length"], dtype=np.uint64)[:-1]
            records["crc32"], records["tokens"] = [shards.crc(each) for each in made], tokens
            writer.add(b"".join(made), records)
        done = writer.finish()
        written.append({name: getattr(done, name) for name in ("file", "bytes", "sha256", "chunks", "tokens", "index_sha256")})
    digest = dataset.split_digest(written, vocabulary.digest, tokens)
    totals = {name: sum(each[name] for each in written) for name in ("chunks", "tokens")}
    manifest = {
        "format": dataset.FORMAT,
        "max_tokens": tokens,
        "tokenizer": {"digest": vocabulary.digest, "vocab_size": vocabulary.size},
        "splits": {"train": {"digest": digest, **totals, "shards": written}},
    }
    shards.write_json(folder / "manifest.json", {"digest": dataset.canonical_digest(manifest), **manifest})
    return folder


# ------------------------------------------------------------------------------------------------------------------- the readers


class Ours:
    """The corpus under a plan of one pass."""

    def __init__(self, folder: Path) -> None:
        self.data = Dataset.open(folder)
        self._folder = folder
        shape = CorpusShape(self.data.digest, self.data.chunks)
        self.chunks_per_step = min(CHUNKS_PER_STEP, self.data.chunks)
        self.plan = Plan(1, [PhaseShape((shape,), self.chunks_per_step, self.data.chunks // self.chunks_per_step)])
        self.dealing = Dealing((self.data.max_tokens + 2) * BATCH, 1, 1, "padded")
        self.task = MaskedLanguageModelling(
            MlmConfig(), Vocabulary.open(folder / "tokenizer"), self.dealing, [self.data.digest], seed=1
        )

    def bytes(self) -> Iterator[int]:
        tars = TarSet.open(sorted(self._folder.glob("train/*.tar")))
        for step in range(self.plan.steps):
            for chunk in self.plan.picks(step).chunk.tolist():
                yield len(tars.span(chunk))

    def batches(self, start: int = 0) -> Iterator[int]:
        dealt = DealtPlan(self.plan, [self.data.lengths], self.dealing)
        with Loader(dealt, [self.data], self.task.collate, 0, 1, LoaderConfig(workers=0, read_ahead_steps=1)) as loader:
            for batch in loader.batches(start):
                yield from (len(slot.samples) for slot in batch.slots)

    def slots(self, start: int) -> Iterator[tuple[int, bytes]]:
        """(step, everything that the model would receive) of each slot of five steps."""
        dealt = DealtPlan(self.plan, [self.data.lengths], self.dealing)
        with Loader(dealt, [self.data], self.task.collate, 0, 1) as loader:
            for batch in loader.batches(start, min(start + 5, self.plan.steps)):
                for slot in batch.slots:
                    yield (
                        slot.step,
                        b"".join(value.numpy().tobytes() for value in (*slot.inputs.values(), *slot.targets.values())),
                    )


def webdataset_samples(folder: Path) -> Iterator[dict[str, Any]]:
    import webdataset

    yield from webdataset.WebDataset([str(tar) for tar in sorted(folder.glob("train/*.tar"))], shardshuffle=False)


def datasets_samples(folder: Path) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    files = {"train": [str(tar) for tar in sorted(folder.glob("train/*.tar"))]}
    yield from load_dataset("webdataset", data_files=files, streaming=True, split="train")


SAMPLES: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {"webdataset": webdataset_samples, "datasets": datasets_samples}


def tokens_of(sample: dict[str, Any]) -> Any:
    array = sample["npy"]
    if isinstance(array, bytes):
        array = np.load(io.BytesIO(array), allow_pickle=False)
    return np.asarray(array).astype(np.int32)


def bytes_of(way: str, folder: Path) -> Iterator[int]:
    if way == "ours":
        return Ours(folder).bytes()
    return (len(sample["npy"]) for sample in SAMPLES[way](folder))


def batches_of(way: str, folder: Path, skip: int = 0) -> Iterator[int]:
    if way == "ours":
        yield from Ours(folder).batches(skip // CHUNKS_PER_STEP)
        return
    task, arrays, numbers = Ours(folder).task, [], []
    if way == "datasets" and skip:
        from datasets import load_dataset

        files = {"train": [str(tar) for tar in sorted(folder.glob("train/*.tar"))]}
        stream: Any = load_dataset("webdataset", data_files=files, streaming=True, split="train").skip(skip)
        skip = 0
    else:
        stream = SAMPLES[way](folder)
    for number, sample in enumerate(stream):
        if number < skip:
            continue
        arrays.append(tokens_of(sample))
        numbers.append(int(sample["__key__"].rsplit("/", 1)[-1]))
        if len(arrays) == BATCH:
            zeros = np.zeros(BATCH, np.int64)
            slot = task.collate(number // BATCH, 0, Picks(zeros.astype(np.int16), zeros, np.array(numbers)), arrays)
            yield len(slot.samples)
            arrays, numbers = [], []


# ------------------------------------------------------------------------------------------------------------------- measuring


def timed(stream: Iterator[int]) -> dict[str, float]:
    """Samples, seconds, CPU seconds, and seconds to the first item."""
    wall, cpu = time.perf_counter(), time.process_time()
    first = next(stream)
    to_first = time.perf_counter() - wall
    rest = sum(1 for _ in stream) + 1
    return {
        "items": rest,
        "first": first,
        "first_s": to_first,
        "s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
    }


def compare(folder: Path, rounds: int, *, warm: bool) -> dict[str, Any]:
    """Each way in turn, ``rounds`` times: medians, spreads and ratios by round."""
    kinds: dict[str, Callable[[str], Iterator[int]]] = {
        "bytes": lambda way: bytes_of(way, folder),
        "batches": lambda way: batches_of(way, folder),
    }
    found: dict[str, dict[str, list[dict[str, float]]]] = {what: {way: [] for way in WAYS} for what in kinds}
    for number in range(rounds + warm):
        order = WAYS if number % 2 else WAYS[::-1]
        for what, read in kinds.items():
            for way in order:
                measured = timed(read(way))
                if number >= warm:
                    found[what][way].append(measured)
        print(f"{folder.name}: round {number + 1} of {rounds + warm}", flush=True)
    table: dict[str, Any] = {}
    for what, ways in found.items():
        each = BATCH if what == "batches" else 1
        table[what] = {
            way: {
                "samples_per_s": [round(each * run["items"] / run["s"]) for run in runs],
                "samples_per_cpu_s": round(statistics.median(each * run["items"] / run["cpu_s"] for run in runs)),
                "first_s": round(statistics.median(run["first_s"] for run in runs), 4),
            }
            for way, runs in ways.items()
        }
        for rival in WAYS[1:]:
            pairs = zip(table[what]["ours"]["samples_per_s"], table[what][rival]["samples_per_s"], strict=True)
            table[what][f"ours / {rival}, by round"] = [round(ours / theirs, 2) for ours, theirs in pairs]
    return table


def resume(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds to the first batch of a new reader, at the start and at 90 %; the rivals' in at most two rounds, as they skip.

    And whether ours is then what a run that came there has: its next steps, to the bit.
    """
    samples = Dataset.open(folder).chunks
    at = samples * 9 // 10 // CHUNKS_PER_STEP * CHUNKS_PER_STEP
    table: dict[str, Any] = {"samples": samples}
    for way in WAYS:
        table[way] = {}
        for name, skip in (("at 0", 0), ("at 90 %", at)):
            taken = []
            for _ in range(rounds if way == "ours" else min(rounds, 2)):
                began = time.perf_counter()
                next(batches_of(way, folder, skip))
                taken.append(time.perf_counter() - began)
            table[way][name] = round(statistics.median(taken), 4)
        print(f"{way}: first batch after {table[way]['at 0']} s, at 90 % after {table[way]['at 90 %']} s", flush=True)
    came, resumed = (Ours(folder).slots(step) for step in (at // CHUNKS_PER_STEP - 2, at // CHUNKS_PER_STEP))
    kept = [slot for slot in came if slot[0] >= at // CHUNKS_PER_STEP]
    table["steps compared"] = len({slot[0] for slot in kept})
    table["equal"] = bool(kept) and kept == list(itertools.islice(resumed, len(kept)))
    return table


def memory(folder: Path) -> float:
    """What a rank allocates for an open corpus, per chunk; the indexes are mapped, and shared."""
    tracemalloc.start()
    ours = Ours(folder)
    next(ours.batches())
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return round(taken / ours.data.chunks, 2)


def plan_alone() -> dict[str, float]:
    """A plan over 1e9 chunks: the memory that it takes, and the time of a step of 4,096 anywhere in it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    digest = hashlib.sha256(b"a corpus").hexdigest()
    tracemalloc.start()
    found: dict[str, float] = {}
    for block in (1, 256):
        plan = Plan(1, [PhaseShape((CorpusShape(digest, 10**9),), 4096, 10**6)], OrderConfig(block=block))
        steps = np.random.default_rng(1).integers(0, plan.steps, 50).tolist()
        for step in steps:
            plan.picks(step)
        found["megabytes"] = max(found.get("megabytes", 0), round(tracemalloc.get_traced_memory()[1] / 1e6, 2))
    tracemalloc.stop()
    for block in (1, 256):
        plan = Plan(1, [PhaseShape((CorpusShape(digest, 10**9),), 4096, 10**6)], OrderConfig(block=block))
        began = time.perf_counter()
        for step in steps:
            plan.picks(step)
        found[f"us a step, blocks of {block}"] = round((time.perf_counter() - began) / len(steps) * 1e6)
    found["megabytes resident"] = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3, 1)
    return found


if __name__ == "__main__":
    sys.exit(main())
