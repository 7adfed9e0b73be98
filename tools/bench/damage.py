"""What damaged shards do: to webdataset, which is run on them, and to us; and thousands of hostile tars.

::

    python tools/bench/damage.py [--cases N] [--smoke]

A corpus of three shards with 200 samples each; the second is damaged in one way at a time. Of webdataset, with its default
handler and with the one that ignores errors: how many of the 600 samples came out, how many of those were not what was written,
and what error was raised. Of ours, one pass over the corpus: samples right, samples that another one stood in for, and the
rest, which is unaccounted for. Tars of two-part samples, damaged before they were indexed, are refused by name or read rightly.

Then the hostile tars of ``tests/hostile_tars.py``: how many were read and refused, the slowest case, the most memory.

The last line is one JSON object. ``--smoke``: 200 hostile tars.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
for name, value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false")):
    os.environ.setdefault(name, value)

import numpy as np  # noqa: E402
import webdataset  # noqa: E402

from scaletrain.data import index, npy  # noqa: E402
from scaletrain.data.collate import Frame, Slot, arrange  # noqa: E402
from scaletrain.data.dataset import Dataset  # noqa: E402
from scaletrain.data.foreign import TarSet  # noqa: E402
from scaletrain.data.loader import Loader, LoaderConfig  # noqa: E402
from scaletrain.data.plan import CorpusShape, PhaseShape, Picks, Plan  # noqa: E402
from scaletrain.data.reading import RetryConfig  # noqa: E402
from scaletrain.data.slots import Dealing, DealtPlan  # noqa: E402
from scaletrain.errors import CorpusError  # noqa: E402

SHARDS, SAMPLES, TOKENS = 3, 200, 40


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000, metavar="N", help="hostile tars; default 20,000")
    parser.add_argument("--smoke", action="store_true", help="does it still run?")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="scaletrain-bench-") as work:
        corpus = make_corpus(Path(work))
        rows = [damaged(what, damage, corpus, Path(work, "damaged")) for what, damage in DAMAGES.items()]
        rows += [refused(what, make, Path(work)) for what, make in TWO_PARTS.items()]
        for row in rows:
            print(json.dumps(row), flush=True)
        hostile = fuzz(200 if options.smoke else options.cases, Path(work, "inside"))
    checks = {
        "samples unaccounted for, ours": {"value": sum(row["ours"]["unaccounted"] for row in rows), "target": "<= 0"},
        "faults in which webdataset loses or changes samples without an error": {
            "value": sum(row["webdataset"]["silent"] for row in rows),
            "target": ">= 1",
        },
        "hostile tars read wrongly": {"value": hostile["wrong"], "target": "<= 0"},
        "slowest hostile tar, seconds": {"value": hostile["slowest_s"], "target": "<= 1"},
        "written outside": {"value": hostile["outside"], "target": "<= 0"},
    }
    command = " ".join(["python", "tools/bench/damage.py", *sys.argv[1:]])
    result = {"bench": "damage", "smoke": options.smoke, "checks": checks, "table": {"faults": rows, "hostile": hostile}}
    print(json.dumps({**result, "command": command}), flush=True)
    return 0


# --------------------------------------------------------------------------------------------------------------- damaged corpora


def make_corpus(work: Path) -> Path:
    from tools.bench import loader

    folder = loader.make_corpus(work / "corpus", loader.make_tokenizer(work), TOKENS, SHARDS * SAMPLES, SAMPLES)
    assert len(list(folder.glob("train/*.tar"))) == SHARDS
    return folder


def edit(change: Callable[[bytearray, Any], None]) -> Callable[[Path], None]:
    """A damage of the bytes of the second shard, told where its samples lie."""

    def damage(folder: Path) -> None:
        shard = folder / "train" / "000001.tar"
        data = bytearray(shard.read_bytes())
        change(data, index.load(shard.with_suffix(".idx")).records)
        shard.write_bytes(data)

    return damage


def cut(data: bytearray, at: int) -> None:
    del data[at:]


def flip(data: bytearray, at: int) -> None:
    data[at] ^= 1


def zero(data: bytearray, at: int, blocks: int) -> None:
    data[at : at + 512 * blocks] = bytes(512 * blocks)


def second(folder: Path) -> Path:
    return folder / "train" / "000001.tar"


DAMAGES: dict[str, Callable[[Path], None]] = {
    "nothing": lambda folder: None,
    "cut between two samples": edit(lambda data, at: cut(data, int(at["offset"][100]))),
    "cut inside a payload": edit(lambda data, at: cut(data, int(at["offset"][100]) + 600)),
    "cut inside a header": edit(lambda data, at: cut(data, int(at["offset"][100]) + 100)),
    "a bit of a header": edit(lambda data, at: flip(data, int(at["offset"][100]) + 5)),
    "a bit of a payload": edit(lambda data, at: flip(data, int(at["offset"][100]) + 512 + 130)),
    "a zeroed block": edit(lambda data, at: zero(data, int(at["offset"][100]), 1)),
    "two zeroed blocks": edit(lambda data, at: zero(data, int(at["offset"][100]), 2)),
    "an empty shard": lambda folder: os.truncate(second(folder), 0),
    "a missing shard": lambda folder: second(folder).unlink(),
    "another shard in its place": lambda folder: shutil.copy(folder / "train" / "000002.tar", second(folder)) and None,
}


def damaged(what: str, damage: Callable[[Path], None], corpus: Path, folder: Path) -> dict[str, Any]:
    """What becomes of the corpus with one damage, on both sides."""
    whole = Dataset.open(corpus)
    expected = [whole.read(chunk) for chunk in range(whole.chunks)]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(corpus, folder)
    damage(folder)
    urls = [str(folder / "train" / f"{number:06d}.tar") for number in range(SHARDS)]
    theirs = {
        name: webdataset_reads(urls, handler, expected)
        for name, handler in (("default", webdataset.reraise_exception), ("ignoring", webdataset.ignore_and_continue))
    }
    silent = any(each["error"] is None and (each["out"] != len(expected) or each["wrong"]) for each in theirs.values())
    return {"fault": what, "webdataset": {**theirs, "silent": silent}, "ours": we_read(folder, expected)}


def webdataset_reads(urls: list[str], handler: Callable[[Exception], bool], expected: list[Any]) -> dict[str, Any]:
    out, wrong, error, seen = 0, 0, None, Counter[str]()
    try:
        for sample in webdataset.WebDataset(urls, shardshuffle=False, handler=handler):
            out += 1
            seen[sample["__key__"]] += 1
            try:
                right = np.array_equal(npy.decode(sample["npy"]), expected[int(sample["__key__"].rsplit("/", 1)[-1])])
            except (KeyError, ValueError, IndexError):
                right = False
            wrong += not right or seen[sample["__key__"]] > 1
    except Exception as raised:
        error = type(raised).__name__
    return {"out": out, "wrong": wrong, "error": error}


def we_read(folder: Path, expected: list[Any]) -> dict[str, int]:
    """One pass in the plan's order, by the loader of a run, which reads each chunk once before it is given up."""
    data = Dataset.open(folder, tolerant=True)
    plan = Plan(1, [PhaseShape((CorpusShape(data.digest, data.chunks),), 50, data.chunks // 50)])
    read: list[tuple[int, bool]] = []

    def collate(step: int, number: int, samples: Picks, chunks: Sequence[Any]) -> Slot:
        read.extend((n, np.array_equal(tokens, expected[n])) for n, tokens in zip(samples.chunk.tolist(), chunks, strict=True))
        made = arrange(np.concatenate(chunks), np.array([len(chunk) for chunk in chunks]), Frame(1, 2, 0))
        return Slot(step, number, "", 1, made.inputs, {}, {}, samples, made.real_tokens, made.padded_tokens)

    config = LoaderConfig(workers=0, retry=RetryConfig(attempts=1))
    replaced: list[int] = []
    with Loader(
        DealtPlan(plan, [data.lengths], Dealing(50 * (TOKENS + 2), 1, 1, "padded")), [data], collate, 0, 1, config
    ) as loader:
        for batch in loader.batches():
            replaced += [each.chunk for each in batch.substitutions]
    right = sum(same for _, same in read)
    first = Counter(number for number, _ in read)
    missing = set(range(len(expected))) - set(first) - set(replaced)
    return {"right": right, "replaced": len(replaced), "unaccounted": len(expected) - right + len(missing)}


# ------------------------------------------------------------------------------------------------- tars that others damaged


def two_parts(order: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]], keep: float = 1.0) -> Callable[[Path], Path]:
    def make(work: Path) -> Path:
        from tests.tars import make_tar

        members = [(f"{n:03d}.{suffix}", f"{suffix} {n}".encode()) for n in range(20) for suffix in ("json", "txt")]
        tar = make_tar(work / "two.tar", order(members))
        if keep < 1:
            os.truncate(tar, int(40 * 1024 * keep))
        return tar

    return make


TWO_PARTS = {
    "parts interleaved": two_parts(lambda members: sorted(members, key=lambda member: member[0].split(".")[::-1])),
    "cut between the parts of a sample": two_parts(lambda members: members, keep=21 / 40),
    "a key that comes twice": two_parts(lambda members: [*members, members[0]]),
    "names that lead outside": two_parts(lambda members: [*members, ("../../outside.txt", b"x")]),
}


def refused(what: str, make: Callable[[Path], Path], work: Path) -> dict[str, Any]:
    """A tar of 20 samples of two parts each: what webdataset makes of it, and how we name what is wrong."""
    tar = make(work)
    out, broken, error = 0, 0, None
    try:
        for sample in webdataset.WebDataset([str(tar)], shardshuffle=False):
            out += 1
            broken += not {"json", "txt"} <= set(sample)
    except Exception as raised:
        error = type(raised).__name__
    tar.with_name(tar.name + ".stidx").unlink(missing_ok=True)
    try:
        ours: dict[str, Any] = {"samples": len(TarSet.open([tar])), "unaccounted": 1}  # none of these may be taken
    except CorpusError as problem:
        ours = {"refused": f"{problem.field.removeprefix(str(work))}: {problem.value}", "unaccounted": 0}
    theirs = {"out": out, "wrong": broken, "error": error, "silent": error is None and (out != 20 or broken > 0)}
    return {"fault": what, "webdataset": theirs, "ours": ours}


def fuzz(cases: int, folder: Path) -> dict[str, Any]:
    """Hostile tars, each compared with what the standard library reads of it."""
    from tests.unit.data.test_foreign import tried

    folder.mkdir()
    before = sorted(path.name for path in folder.parent.iterdir())
    outcomes: Counter[bool] = Counter()
    wrong, most, slowest, began = 0, 0, 0.0, time.perf_counter()
    for case in range(cases):
        at = time.perf_counter()
        try:
            _, read, peak = tried(case, folder)
            outcomes[read] += 1
            most = max(most, peak)
        except AssertionError as error:
            wrong += 1
            print(f"case {case}: {error}", flush=True)
        slowest = max(slowest, time.perf_counter() - at)
    outside = set(path.name for path in folder.parent.iterdir()) - set(before)
    outside |= set(path.name for path in folder.iterdir()) - {"case.tar"}
    return {
        "cases": cases,
        "read": outcomes[True],
        "refused": outcomes[False],
        "wrong": wrong,
        "slowest_s": round(slowest, 3),
        "most_memory_mb": round(most / 1e6, 2),
        "outside": len(outside),
        "seconds": round(time.perf_counter() - began, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
