"""What preparing a corpus costs beside its tokeniser, and what more processes, parts and near duplicates do to it.

::

    python tools/bench/prepare.py [--rounds N] [--work DIR] [--smoke]

The text is the training part of Standard Ebooks, under SCALETRAIN_DATA (default: ../shared/data), one paragraph a document;
with ``--smoke`` a little text that is made up, and the figures say nothing. Every round does each of these in turn, with a
WordPiece vocabulary that was learned before:

- raw: ``tokenizers``' ``encode_batch`` on the clean texts, which lie in memory, on one thread; nothing is kept
- raw_two: the same by two processes that know nothing of each other, each with half of the texts; what the machine admits
- one: ``prepare`` with one process: reading, cleaning, tokenising, exact duplicates, shards, indexes and report
- two: the same with two processes
- parts: two parts one after the other, and the merge
- minhash: ``prepare`` with one process and near duplicates

Seconds are of the clock and of the processor, the latter of all processes together, starting them included. A figure per core is
one per second of the processor. That two processes are faster shows in seconds of the clock, which need two idle cores: where
others use them, ``raw_two`` shows how much faster two processes can be.

The last line is one JSON object: ``checks`` are medians of the rounds' ratios, ``table`` has all figures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import statistics
import string
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
for name, value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("HF_HUB_OFFLINE", "1")):
    os.environ.setdefault(name, value)

import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
import tokenizers  # noqa: E402

from scaletrain import config  # noqa: E402
from scaletrain.data.clean import CleanConfig, clean, dropped  # noqa: E402
from scaletrain.data.duplicates import MinHashConfig, NearDuplicates  # noqa: E402
from scaletrain.data.journal import Log  # noqa: E402
from scaletrain.data.parts import Part, merge, prepare_part  # noqa: E402
from scaletrain.data.prepare import PrepareConfig, prepare  # noqa: E402
from scaletrain.data.tokenizer import PretrainedConfig, load  # noqa: E402

WAYS = ("raw", "raw_two", "one", "two", "parts", "minhash")
RAW_BATCH = 1000
CLEAN = CleanConfig(min_characters=20)
VOCABULARY = 16_384


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5; one more comes first and does not count")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the shards go (0.4 GB); default: the temporary folder")
    parser.add_argument("--smoke", action="store_true", help="does it still run?")
    options = parser.parse_args(argv)
    file = None if options.smoke else standard_ebooks()
    if file is not None and not file.exists():
        print(f"error: SCALETRAIN_DATA: got {str(file)!r}; no such file. Set it to the folder of the data sets", file=sys.stderr)
        return 65
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="scaletrain-bench-", dir=options.work) as work:
        bench = Bench(Path(work), file or made_up(Path(work)))
        rounds = []
        for number in range(1 if options.smoke else options.rounds + 1):
            rounds.append({way: bench.measure(way) for way in WAYS})
            print(json.dumps({"round": number, **rounds[-1]}), flush=True)
        index = near_duplicates(Path(work), 2_000 if options.smoke else 100_000)
    counted = rounds if options.smoke else rounds[1:]
    result = {"bench": "prepare", "smoke": options.smoke, "checks": checks(counted), "table": {**table(counted), "index": index}}
    machine = {"cores": len(os.sched_getaffinity(0)), "processor": platform.machine(), "load": [load_before, os.getloadavg()[0]]}
    command = " ".join(["python", "tools/bench/prepare.py", *sys.argv[1:]])
    print(json.dumps({**result, "command": command, "machine": machine}), flush=True)
    return 0


def standard_ebooks() -> Path:
    """The text, one paragraph a line."""
    data = os.environ.get("SCALETRAIN_DATA", ROOT.parent / "shared" / "data")
    return Path(data) / "standard_ebooks" / "train.txt.gz"


def made_up(work: Path) -> Path:
    """A little text of the same form."""
    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(3000)]
    (work / "text.txt").write_text("\n".join(" ".join(draw.choices(words, k=draw.randint(5, 200))) for _ in range(2000)))
    return work / "text.txt"


class Bench:
    """A corpus, a tokenizer for it, and the ways to deal with it."""

    def __init__(self, work: Path, file: Path) -> None:
        """``file`` has one document a line."""
        self._work, self._source = work, {"name": "text", "paths": [str(file)], "document": "line"}
        learned = self._settings("learned", tokenizer={"name": "wordpiece", "vocab_size": VOCABULARY}, processes=2)
        self._tokens = prepare(learned)["splits"]["train"]["tokens"]
        texts = (clean(document, CLEAN) for document in learned.source.documents())
        self._texts = list(dict.fromkeys(text for text in texts if dropped(text, CLEAN) is None))
        shutil.copytree(learned.output / "tokenizer", work / "tokenizer")
        load(PretrainedConfig(path=str(work / "tokenizer")))  # imports what the first way would otherwise pay for

    def _settings(self, name: str, **changes: Any) -> PrepareConfig:
        tree = {
            "output": str(self._work / name),
            "source": self._source,
            "clean": config.to_tree(CLEAN),
            "tokenizer": {"name": "pretrained", "path": str(self._work / "tokenizer")},
            "processes": 1,
        }
        return config.decode(PrepareConfig, {**tree, **changes})

    def measure(self, way: str) -> dict[str, float]:
        """Tokens, seconds of the clock, and seconds of the processor of this process and of those that it started."""
        shutil.rmtree(self._work / way, ignore_errors=True)
        before, began = processor_s(), time.perf_counter()
        tokens = getattr(self, f"_{way}")()
        wall = time.perf_counter() - began
        own, started = (after - start for after, start in zip(processor_s(), before, strict=True))
        return {"tokens": tokens, "wall_s": round(wall, 3), "own_cpu_s": round(own, 3), "cpu_s": round(own + started, 3)}

    def _raw(self) -> int:
        tokens = encode(self._work / "tokenizer", self._texts)
        assert tokens == self._tokens, "both sides have the same work"
        return tokens

    def _raw_two(self) -> int:
        """Forked, since the texts are in memory here and no thread of the tokenizer runs."""
        half = len(self._texts) // 2
        with multiprocessing.get_context("fork").Pool(2) as pool:
            tokens = pool.starmap(
                encode, [(self._work / "tokenizer", texts) for texts in (self._texts[:half], self._texts[half:])]
            )
            pool.close()
            pool.join()  # what they used of the processor counts once they have ended
        return sum(tokens)

    def _one(self) -> int:
        return self._prepare("one")

    def _two(self) -> int:
        return self._prepare("two", processes=2)

    def _minhash(self) -> int:
        self._prepare("minhash", deduplicate={"name": "minhash"})
        return int(self._tokens)  # what was tokenised; some of it was dropped

    def _prepare(self, name: str, **changes: Any) -> int:
        return int(prepare(self._settings(name, **changes))["splits"]["train"]["tokens"])

    def _parts(self) -> int:
        for number in (1, 2):
            prepare_part(self._settings("parts"), Part(number, 2))
        report = merge(self._settings("parts"))
        assert report["digest"] == json.loads((self._work / "one" / "manifest.json").read_bytes())["digest"]
        return int(report["splits"]["train"]["tokens"])


def encode(folder: Path, texts: Sequence[str]) -> int:
    """Has the library encode all texts; the tokens."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    batches = (texts[at : at + RAW_BATCH] for at in range(0, len(texts), RAW_BATCH))
    return sum(len(encoding) for batch in batches for encoding in tokenizer.encode_batch(batch, add_special_tokens=False))


def processor_s() -> tuple[float, float]:
    """Seconds of the processor: of this process, and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own, started = (each.ru_utime + each.ru_stime for each in used)
    return own, started


def near_duplicates(work: Path, documents: int) -> dict[str, float]:
    """What looking a document up and remembering it costs, with signatures of unlike documents."""
    signatures = np.random.default_rng(0).integers(0, 1 << 32, (documents, 128), np.uint32)
    began = time.process_time()
    fill(work, signatures)
    spent = time.process_time() - began
    tracemalloc.start()
    kept = fill(work, signatures)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return {
        "documents": documents,
        "bytes_per_document": round(grown / documents),
        "us_per_document": round(1e6 * spent / documents, 1),
    }


def fill(work: Path, signatures: npt.NDArray[np.uint32]) -> NearDuplicates:
    """An index that has seen these."""
    log = Log(work / "signatures.bin")
    index = NearDuplicates(MinHashConfig(), ("train",), log)
    for number, signature in enumerate(signatures):
        assert index.find("train", number, signature.tobytes()) is None
    log.sync()
    log.close()
    return index


def per_core(row: Mapping[str, float]) -> float:
    """Tokens for each second of the processor."""
    return row["tokens"] / row["cpu_s"]


RATIOS: dict[str, tuple[Callable[[Mapping[str, Mapping[str, float]]], float], str]] = {
    "tokens/s per core, prepare / raw encode_batch": (lambda round: per_core(round["one"]) / per_core(round["raw"]), ">= 0.85"),
    "tokens/s, two processes / one": (lambda round: round["one"]["wall_s"] / round["two"]["wall_s"], ">= 1.7"),
    "processor time, two parts and merge / no parts": (lambda round: round["parts"]["cpu_s"] / round["one"]["cpu_s"], "<= 1.25"),
}
"""What is computed of a round, and its target."""


def checks(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """Medians of the rounds' ratios, with the least and the largest. Pure."""
    found = {}
    for name, (ratio, target) in RATIOS.items():
        values = [round(ratio(each), 3) for each in rounds]
        found[name] = {"value": statistics.median(values), "target": target, "range": [min(values), max(values)]}
    return found


def table(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Each way's medians. Pure."""
    rows: dict[str, Any] = {}
    for way in rounds[0]:
        medians = {name: statistics.median(each[way][name] for each in rounds) for name in ("wall_s", "own_cpu_s", "cpu_s")}
        speeds = [round(each[way]["tokens"] / each[way]["cpu_s"]) for each in rounds]
        rows[way] = {**medians, "tokens_per_cpu_s": statistics.median(speeds), "range": [min(speeds), max(speeds)]}
    minhash = statistics.median(each["minhash"]["cpu_s"] / each["one"]["cpu_s"] for each in rounds)
    raw_two = statistics.median(each["raw"]["wall_s"] / each["raw_two"]["wall_s"] for each in rounds)
    ratios = {"processor time, minhash / exact": minhash, "tokens/s, two raw encode_batch at once / one": raw_two}
    return {**rows, **{name: round(value, 2) for name, value in ratios.items()}}


if __name__ == "__main__":
    sys.exit(main())
