"""Padding, and how unlike the work of the ranks is: our dealing beside the ways in which Hugging Face's Trainer makes batches.

::

    python tools/bench/padding.py [--work DIR] [--smoke]

Arithmetic on the lengths of real chunks, without a model: SCALETRAIN_DATA/standard_ebooks/train.txt.gz, one paragraph a document,
cut at 126 and at 510 tokens. For 2, 4 and 8 ranks, padded and unpadded, and for steps of 64k and 256k places (if all rows were
full), every way takes the same number of chunks a step:

- ours: slots of at most 8,192 tokens, as few as hold a step, in multiples of 8, whatever the number of ranks
- ours_as_many: the same with as many slots as the others have batches (`slots.slot_multiple`), which pads less in more rounds
- random: batches of as many rows as fit at full length, in random order, padded to their longest (the Trainer's default)
- group_by_length: the Trainer's sampler of that name, which sorts across steps: a step has rows of one length, and is no random
  sample any more
- batch_rebalance: its newer one, which sorts within a step and moves rows until batches are alike, as ours does

Ranks wait for each other in every round (ZeRO gathers parameters there), so what a round costs is its costliest rank. Of each
way, over all steps:

- rounds: micro-batches that each rank runs in a step
- padding: share of computed tokens that are none
- round, step: how much more the costliest rank computes than the mean, over rounds, and over whole steps
- worst: the same of the worst round
- attention: like round, in squares of lengths, which is what attention costs
- useful: real tokens over the tokens that all ranks could have computed in that time
- drift: the standard deviation of a step's real tokens over their mean: what random samples have, or more

The last line is one JSON object: ``checks`` are the figures with a target, ``table`` has them all. ``--smoke``: the help topics
of Python, few steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
for name, value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("HF_HUB_OFFLINE", "1")):
    os.environ.setdefault(name, value)

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from scaletrain.config import decode  # noqa: E402
from scaletrain.data.dataset import Dataset  # noqa: E402
from scaletrain.data.plan import CorpusShape, PhaseShape, Plan  # noqa: E402
from scaletrain.data.prepare import PrepareConfig, prepare  # noqa: E402
from scaletrain.data.slots import SPECIAL_TOKENS, Dealing, Layout, SlotConfig, deal  # noqa: E402
from scaletrain.errors import CorpusError, ScaletrainError  # noqa: E402

MICRO_BATCH_TOKENS = 8192
SLOT_MULTIPLE = 8
WORLDS = (2, 4, 8)
LAYOUTS: tuple[Layout, ...] = ("padded", "unpadded")
STEPS = {1 << 16: 100, 1 << 18: 25}
"""Tokens of a step if all its rows were of full length (8 full slots, or 32) -> how many such steps."""
RIVALS = ("random", "batch_rebalance")
"""Ways whose steps are random samples, as ours are."""
FIGURES = ("padding", "round", "step", "worst", "attention", "useful", "drift")
SEED = 1

Rows = NDArray[np.int64]
"""Tokens of each row of a micro-batch, special tokens included; int64 [rows]."""
Step = list[list[Rows]]
"""Rounds of a step, each with a micro-batch for every rank."""


@dataclass(frozen=True)
class Job:
    """What all ways are given."""

    rows: Rows
    """Of the whole corpus."""
    longest: int
    world: int
    step_tokens: int
    steps: int
    layout: Layout

    @property
    def chunks_per_step(self) -> int:
        return self.step_tokens // self.longest

    @property
    def batch_rows(self) -> int:
        """What fits a device whatever the lengths."""
        return MICRO_BATCH_TOKENS // self.longest

    @property
    def rounds(self) -> int:
        """Batches that each rank accumulates for a step."""
        return self.chunks_per_step // (self.batch_rows * self.world)


# ------------------------------------------------------------------------------------------------------------------ the ways


def ours(job: Job) -> Iterator[Step]:
    """Step by step of the plan, dealt by the rule of a run that starts now."""
    yield from _dealt(job, SLOT_MULTIPLE)


def ours_as_many(job: Job) -> Iterator[Step]:
    """The same, with as many slots as there are batches in a step."""
    yield from _dealt(job, job.rounds * job.world)


def _dealt(job: Job, slot_multiple: int) -> Iterator[Step]:
    plan = Plan(SEED, [PhaseShape((CorpusShape("corpus", len(job.rows)),), job.chunks_per_step, job.steps)])
    config = SlotConfig(micro_batch_tokens=MICRO_BATCH_TOKENS, slot_multiple=slot_multiple)
    dealing = Dealing.of(config, job.layout, job.world)
    for step in range(job.steps):
        rows = job.rows[plan.picks(step).chunk]
        slots = [rows[places] for places in deal(rows - SPECIAL_TOKENS, dealing)]
        yield [slots[first : first + job.world] for first in range(0, len(slots), job.world)]


def random(job: Job) -> Iterator[Step]:
    """The Trainer's RandomSampler; accelerate gives every rank one batch after the other."""
    yield from _in_batches(job, np.random.default_rng(SEED).permutation(len(job.rows)))


def group_by_length(job: Job) -> Iterator[Step]:
    """As `Trainer._get_train_sampler` makes it for `train_sampling_strategy="group_by_length"`."""
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    generator = torch.Generator()
    generator.manual_seed(SEED)
    sampler = LengthGroupedSampler(job.batch_rows * job.rounds, lengths=job.rows.tolist(), generator=generator)
    yield from _in_batches(job, np.array(list(sampler)))


def batch_rebalance(job: Job) -> Iterator[Step]:
    """As `Trainer._get_train_sampler` makes it for `train_sampling_strategy="batch_rebalance"`, which newer versions have."""
    from transformers.trainer_pt_utils import BatchRebalanceSampler

    few = job.rows[np.random.default_rng(SEED).permutation(len(job.rows))[: job.steps * job.chunks_per_step]]
    ranks = [
        iter(BatchRebalanceSampler(few.tolist(), job.chunks_per_step, job.world, job.rounds, seed=SEED, rank=rank))
        for rank in range(job.world)
    ]
    for _ in range(len(few) // job.chunks_per_step):
        yield [[few[np.array(next(rank))] for rank in ranks] for _ in range(job.rounds)]


def _in_batches(job: Job, order: NDArray[Any]) -> Iterator[Step]:
    per_step = job.chunks_per_step
    for step in range(min(job.steps, len(order) // per_step)):
        rows = job.rows[order[step * per_step : (step + 1) * per_step]]
        batches = list(rows.reshape(-1, job.batch_rows))
        yield [batches[first : first + job.world] for first in range(0, len(batches), job.world)]


def ways() -> dict[str, Callable[[Job], Iterator[Step]]]:
    """Those that the installed versions have."""
    from transformers import trainer_pt_utils

    found: dict[str, Callable[[Job], Iterator[Step]]] = {
        "ours": ours,
        "ours_as_many": ours_as_many,
        "random": random,
        "group_by_length": group_by_length,
    }
    return found | ({"batch_rebalance": batch_rebalance} if hasattr(trainer_pt_utils, "BatchRebalanceSampler") else {})


# -------------------------------------------------------------------------------------------------------------------- figures


def measure(steps: Sequence[Step], layout: Layout) -> dict[str, float]:
    """The figures of a way; every step has as many micro-batches in each of its rounds."""
    real = np.array([sum(int(rows.sum()) for batches in step for rows in batches) for step in steps])
    costs = [np.array([[_cost(rows, layout) for rows in batches] for batches in step]) for step in steps]
    squares = [np.array([[_attention(rows, layout) for rows in batches] for batches in step]) for step in steps]
    world = costs[0].shape[1]
    computed = sum(cost.sum() for cost in costs)
    waited = sum(cost.max(axis=1).sum() for cost in costs)
    return {
        "rounds": sum(len(step) for step in steps) / len(steps),
        "padding": 1 - float(real.sum() / computed),
        "round": _excess(costs),
        "step": _excess([cost.sum(axis=0, keepdims=True) for cost in costs]),
        "worst": max(float((cost.max(axis=1) / cost.mean(axis=1)).max()) for cost in costs) - 1,
        "attention": _excess(squares),
        "useful": float(real.sum() / (world * waited)),
        "drift": float(real.std() / real.mean()),
    }


def _cost(rows: Rows, layout: Layout) -> int:
    if not len(rows):
        return 0
    return int(len(rows) * rows.max() if layout == "padded" else rows.sum())


def _attention(rows: Rows, layout: Layout) -> int:
    if not len(rows):
        return 0
    return int(len(rows) * rows.max() ** 2 if layout == "padded" else (rows**2).sum())


def _excess(costs: Sequence[NDArray[Any]]) -> float:
    """What the costliest ranks compute over what the mean does, less 1; of costs [rounds, ranks]."""
    return float(sum(cost.max(axis=1).sum() for cost in costs) / sum(cost.mean(axis=1).sum() for cost in costs)) - 1


def figures(table: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The checks: at the largest number of ranks, where they are the least alike, beside ways whose steps are random samples."""
    checks: dict[str, dict[str, Any]] = {}
    cases: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in table:
        if row["world"] == max(each["world"] for each in table):
            cases.setdefault((row["longest"], row["layout"], row["step_tokens"], row["world"]), {})[row["way"]] = row
    for (longest, layout, step_tokens, world), rows in cases.items():
        own, others = rows["ours_as_many"]["useful"], [rows[way]["useful"] for way in RIVALS if way in rows]
        where = f"{longest} {layout}, {step_tokens >> 10}k a step, {world} ranks"
        checks[f"{where}: useful, ours_as_many - best of random and batch_rebalance"] = {
            "value": own - max(others),
            "target": ">= 0",
        }
        checks[f"{where}: costliest rank over mean, ours, in a round"] = {"value": rows["ours"]["round"], "target": "<= 0.02"}
    return checks


def met(check: Mapping[str, Any]) -> bool:
    """Whether a value keeps to its target, '<= x' or '>= x'."""
    relation, bound = check["target"].split()
    return bool(check["value"] >= float(bound) if relation == ">=" else check["value"] <= float(bound))


# ------------------------------------------------------------------------------------------------------------------- the bench


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the corpora here; default: a folder that is removed")
    parser.add_argument("--smoke", action="store_true", help="few steps on little text: does it still run?")
    options = parser.parse_args(argv)
    try:
        with work_folder(options.work) as work:
            result = bench(work, options.smoke)
    except ScaletrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(report(result))
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
    """Prepares the corpora and goes through all ways. Raises CorpusError without the text."""
    text, document = (topics(work), "paragraph") if smoke else (ebooks(), "line")
    table = []
    worlds, sizes = (WORLDS[::2], {1 << 16: 2}) if smoke else (WORLDS, STEPS)
    for longest in (128, 512):
        rows = lengths(work, text, document, longest)
        for layout, world, (step_tokens, steps) in itertools.product(LAYOUTS, worlds, sizes.items()):
            job = Job(rows, longest, world, step_tokens, min(steps, len(rows) * longest // step_tokens), layout)
            case = {"longest": longest, "layout": layout, "step_tokens": step_tokens, "world": world}
            table += [{**case, "way": way, **measure(list(make(job)), layout)} for way, make in ways().items()]
    return {"bench": "padding", "smoke": smoke, "checks": figures(table), "table": table}


def topics(work: Path) -> Path:
    """The help topics that ship with Python."""
    from pydoc_data.topics import topics as found

    file = work / "topics.txt"
    file.write_text("\n\n".join(found[name] for name in sorted(found)))
    return file


def ebooks() -> Path:
    """The real text. Raises CorpusError."""
    file = Path(os.environ.get("SCALETRAIN_DATA", ROOT.parent / "shared" / "data")) / "standard_ebooks" / "train.txt.gz"
    if not file.is_file():
        raise CorpusError("SCALETRAIN_DATA", str(file), "no such file", "Set it to the folder that has standard_ebooks/")
    return file


def lengths(work: Path, text: Path, document: str, longest: int) -> Rows:
    """Of every chunk of the text, cut at so many tokens with its special ones; by one vocabulary for all lengths."""
    first = work / "128" / "tokenizer"
    tokenizer = {"name": "pretrained", "path": str(first)} if longest > 128 else {"name": "wordpiece", "vocab_size": 8192}
    tree = {
        "output": str(work / str(longest)),
        "source": {"name": "text", "paths": [str(text)], "document": document},
        "tokenizer": tokenizer,
        "max_tokens": longest - SPECIAL_TOKENS,
        "processes": 1,
    }
    prepare(decode(PrepareConfig, tree))
    return Dataset.open(work / str(longest)).lengths.astype(np.int64) + SPECIAL_TOKENS


def report(result: Mapping[str, Any]) -> str:
    """What was measured, for people."""
    head = f"{'rows':>4} {'layout':<9}{'a step':>6}{'ranks':>6}  {'way':<16}{'rounds':>7}"
    lines = [head + "".join(f"{name:>10}" for name in FIGURES)]
    for row in result["table"]:
        case = f"{row['longest']:>4} {row['layout']:<9}{row['step_tokens'] >> 10:>5}k{row['world']:>6}  {row['way']:<16}"
        lines.append(f"{case}{row['rounds']:>7.1f}" + "".join(f"{row[name]:>10.2%}" for name in FIGURES))
    lines.append("")
    for name, check in result["checks"].items():
        lines.append(f"{name:<98}{check['value']:>9.4f}   {check['target']:<8}{'met' if met(check) else 'MISSED'}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
