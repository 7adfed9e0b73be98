"""Pretraining on real prose, measured: a 4-layer, 256-wide BERT on Standard Ebooks, ZeRO-3 on two local ranks, 400 steps.

::

    python tools/bench/standard_ebooks.py [--work DIR] [--smoke]

Reads SCALETRAIN_DATA/standard_ebooks/{train,validation}.txt.gz (UTF-8, one paragraph per line), with the settings of
configs/prepare/standard_ebooks.yaml and configs/pretrain/standard_ebooks.yaml. Takes about half an hour on two cores; `--smoke`
takes less than a minute: a few steps on a slice of that text or, where it is missing, of the text that ships with Python. The
last line is one JSON object: ``checks`` are the figures with a target, ``table`` holds the rest.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from scaletrain.data.dataset import Dataset
from scaletrain.data.sources import StdlibConfig
from scaletrain.errors import CorpusError, InputError, ScaletrainError
from scaletrain.recipes.quickstart import unigram_entropy
from scaletrain.train.metrics import read_jsonl

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
SPLITS = ("train", "validation")
SMOKE_LINES = {"train": 1500, "validation": 60}
SMOKE_PREPARE = ("tokenizer.vocab_size=2048",)
SMOKE_PRETRAIN = ("steps=8", "data.chunks_per_step=24", "evaluation.every_steps=4", "metrics.log_every=2")

Check = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep corpus and run here; default: a folder that is removed")
    parser.add_argument("--smoke", action="store_true", help="a few steps on little text: does it still run?")
    options = parser.parse_args(argv)
    try:
        with work_folder(options.work) as work:
            result = bench(work, options.smoke)
    except ScaletrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(report(result), flush=True)
    print(json.dumps(result), flush=True)
    return 0


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """The folder asked for, or one that is removed."""
    if given is None:
        with tempfile.TemporaryDirectory(prefix="scaletrain-bench-") as folder:
            yield Path(folder)
    else:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()


def bench(work: Path, smoke: bool) -> dict[str, Any]:
    """Prepares, pretrains and sums up. Raises CorpusError without the text, ScaletrainError with the code of a failed stage."""
    texts = smoke_texts(work / "text") if smoke else ebooks()
    corpus, run = work / "corpus", work / "run"
    prepare = [f"output={corpus}", f"source.paths.0={texts['train']}", f"validation.paths.0={texts['validation']}"]
    pretrain = [f"output={run}", f"data.corpora.0.path={corpus}"]
    if smoke:
        prepare, pretrain = [*prepare, *SMOKE_PREPARE], [*pretrain, *SMOKE_PRETRAIN]
    stage("prepare", "--config", "configs/prepare/standard_ebooks.yaml", *prepare)

    load, began, cpu_began = os.getloadavg()[0], time.monotonic(), cpu_seconds()
    job = ["pretrain", "--fresh", "--config", "configs/pretrain/standard_ebooks.yaml", *pretrain]
    stage("launch", f"backend.ranks={RANKS}", "--", *job)
    spent = {"wall_s": time.monotonic() - began, "cpu_s": cpu_seconds() - cpu_began}
    measured = figures(list(read_jsonl(run / "metrics.jsonl")), unigram_entropy(Dataset.open(corpus, "validation")), spent)
    machine = {"load_before": load, "load_after": os.getloadavg()[0], **describe_machine()}
    return {"bench": "standard_ebooks", "smoke": smoke, **measured, "machine": machine}


def figures(run: Sequence[Mapping[str, Any]], entropy: float, spent: Mapping[str, float]) -> dict[str, Any]:
    """Checks and table from the lines of a ``metrics.jsonl``, the held-out text's unigram entropy, and the time of the stage."""
    steps = [line for line in run if line["kind"] == "step"]
    held_out = [line for line in run if line["kind"] == "eval"]
    first, last = held_out[0]["scores"]["loss"], held_out[-1]["scores"]["loss"]
    tokens = sum(step["real_tokens"] for step in steps)
    computed = sum(step["real_tokens"] / (1 - step["padding_share"]) for step in steps)
    step_s = sum(step["step_s"] for step in steps)
    checks: dict[str, Check] = {
        "validation loss falls, last - first (nats)": {"value": last - first, "target": "< 0"},
        "data wait, share of step time": {"value": sum(step["data_wait_s"] for step in steps) / step_s, "target": "<= 0.01"},
        "padding, share of computed tokens": {"value": 1 - tokens / computed, "target": "<= 0.15"},
        "filler, largest share of a step's slots": {"value": max(step["filler_share"] for step in steps), "target": "<= 0"},
    }
    table = {
        "validation": [[line["step"], line["scores"]["loss"], line["scores"]["accuracy"]] for line in held_out],
        "unigram_entropy": entropy,
        "steps": len(steps),
        "real_tokens": tokens,
        "real_tokens_per_second_median": statistics.median(step["real_tokens"] / step["step_s"] for step in steps),
        "step_s_median": statistics.median(step["step_s"] for step in steps),
        "memory_bytes": max(step["memory_bytes"] for step in steps),
        # Start, evaluations and checkpoints included: what the job cost, not what its steps did.
        "wall_s": spent["wall_s"],
        "cpu_s": spent["cpu_s"],
        "cpu_s_per_1000_real_tokens": spent["cpu_s"] / tokens * 1000,
    }
    return {"checks": checks, "table": table}


def met(check: Check) -> bool:
    """Whether a value keeps to its target, '< x' or '<= x'."""
    relation, bound = check["target"].split()
    value: float = check["value"]
    return value < float(bound) if relation == "<" else value <= float(bound)


def report(result: Mapping[str, Any]) -> str:
    """What was measured, for people."""
    table = dict(result["table"])
    lines = ["", "  step   validation loss   accuracy"]
    lines += [f"{step:6d} {loss:17.3f} {accuracy:10.1%}" for step, loss, accuracy in table.pop("validation")]
    lines += ["", *(f"{name:<48}{value:>16,.3f}" for name, value in table.items()), ""]
    for name, check in result["checks"].items():
        lines.append(f"{name:<48}{check['value']:>16.4f}   {check['target']:<8}{'met' if met(check) else 'MISSED'}")
    return "\n".join([*lines, "", ", ".join(f"{name} {value}" for name, value in result["machine"].items())])


def ebooks() -> dict[str, Path]:
    """The files of both splits. Raises CorpusError where one is missing."""
    folder = Path(os.environ.get("SCALETRAIN_DATA", ROOT.parent / "shared" / "data")) / "standard_ebooks"
    files = {split: folder / f"{split}.txt.gz" for split in SPLITS}
    for file in files.values():
        if not file.is_file():
            rule = "this bench reads standard_ebooks/train.txt.gz and validation.txt.gz, one paragraph per line"
            raise CorpusError("SCALETRAIN_DATA", str(file), f"no such file; {rule}", "Set it to the folder above, or try --smoke")
    return files


def smoke_texts(folder: Path) -> dict[str, Path]:
    """The first lines of both splits or, where the text is missing, some of what ships with Python."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        whole = ebooks()
    except InputError:
        documents = StdlibConfig().documents()
        lines = {split: [" ".join(text.split()) for text in islice(documents, SMOKE_LINES[split])] for split in SPLITS}
    else:
        lines = {split: list(_first_lines(whole[split], SMOKE_LINES[split])) for split in SPLITS}
    files = {split: folder / f"{split}.txt" for split in SPLITS}
    for split, file in files.items():
        file.write_text("\n".join(lines[split]) + "\n", encoding="utf-8")
    return files


def _first_lines(file: Path, count: int) -> Iterator[str]:
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        for line in islice(stream, count):
            yield line.rstrip("\n")


def stage(*arguments: str) -> None:
    """One command of scaletrain, its output shown. Raises ScaletrainError with its exit code."""
    print(f"\n$ scaletrain {' '.join(arguments)}", flush=True)
    # From here, so that the checkout is what is measured even where another version is installed.
    code = subprocess.run([sys.executable, "-m", "scaletrain", *arguments], cwd=ROOT, check=False).returncode
    if code:
        error = ScaletrainError(f"`scaletrain {arguments[0]}` ended with exit code {code}; its message is above")
        error.exit_code = code
        raise error


def cpu_seconds() -> float:
    """Of all processes that this one has started and that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def describe_machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    packages = {package: version(package) for package in ("torch", "deepspeed", "transformers")}
    return {"cores": cores, "python": platform.python_version(), **packages}


if __name__ == "__main__":
    sys.exit(main())
