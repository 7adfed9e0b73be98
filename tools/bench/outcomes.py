"""What the runs of a bench on CLINC150 amount to: checks against targets, and a table. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaletrain.continual.metrics import average_accuracy, forgetting, recovery

STREAM_METHODS = ("naive", "replay", "protected", "joint")

Check = dict[str, Any]
"""`value`, `target` ('<= x' or '>= x') and perhaps `spread`."""


@dataclass(frozen=True, slots=True)
class Run:
    """One process."""

    method: str
    side: str
    """`ours` or `rival`."""
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.side}-{self.seed}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a process found, and what it took."""

    run: Run
    results: Sequence[Sequence[float]]
    """R of a stream, by rows; of anything else the one accuracy."""
    samples: int
    """Trained on, old ones and repetitions included."""
    step_cpu_s: Sequence[Sequence[float]]
    """Of every step of every stage; empty where it was not measured."""
    cpu_s: float
    wall_s: float

    @property
    def accuracy(self) -> float:
        return average_accuracy(self.results) if len(self.results) > 1 else statistics.fmean(self.results[0])


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Checks and table. Accuracies and seconds are means over rounds, spreads their least and greatest."""
    found: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault((outcome.run.method, outcome.run.side), []).append(outcome)
    accuracy = {key: statistics.fmean(each.accuracy for each in own) for key, own in found.items()}
    table = [row_of(own, accuracy) for own in found.values()]
    checks: dict[str, Check] = {}
    if ("finetune", "rival") in found:
        points = 100 * (accuracy["finetune", "ours"] - accuracy["finetune", "rival"])
        checks["fine-tuned accuracy, ours - Trainer (points)"] = {"value": points, "target": ">= -1"}
    if ("replay", "rival") in found:
        ours, rival = accuracy["replay", "ours"], accuracy["replay", "rival"]
        checks["replay, average accuracy"] = {"value": ours, "target": ">= 0.83"}
        checks["replay, average accuracy, ours - plain loop (points)"] = {"value": 100 * (ours - rival), "target": ">= 0"}
        ratios = step_ratios(found["replay", "ours"], found["replay", "rival"])
        checks["replay, CPU seconds of a step, ours / plain loop"] = {
            "value": statistics.median(ratios),
            "target": "<= 1.1",
            "spread": statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios,
        }
    for row in table:
        if (row["method"], row["side"]) == ("replay", "ours") and row["recovery"] is not None:
            checks["replay, recovery"] = {"value": row["recovery"], "target": ">= 0.89"}
    return {"checks": checks, "table": table}


def row_of(own: Sequence[Outcome], accuracy: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """A line of the table: a method on one side, over all rounds."""
    method, side = own[0].run.method, own[0].run.side
    mean = accuracy[method, side]
    naive, joint = accuracy.get(("naive", side)), accuracy.get(("joint", side))
    between = method in STREAM_METHODS and naive is not None and joint is not None and naive < joint
    steps = [step for each in own for stage in rehearsing(each) for step in stage]
    return {
        "method": method,
        "side": side,
        "accuracy": mean,
        "accuracy_spread": [min(each.accuracy for each in own), max(each.accuracy for each in own)],
        "forgetting": statistics.fmean(forgetting(each.results) for each in own) if len(own[0].results) > 1 else None,
        "recovery": recovery(mean, naive, joint) if between else None,
        "cpu_s": statistics.fmean(each.cpu_s for each in own),
        "cpu_s_spread": [min(each.cpu_s for each in own), max(each.cpu_s for each in own)],
        "wall_s": statistics.fmean(each.wall_s for each in own),
        "samples_per_cpu_s": sum(each.samples for each in own) / sum(each.cpu_s for each in own),
        "step_cpu_s": statistics.fmean(steps) if steps else None,
    }


def rehearsing(outcome: Outcome) -> Sequence[Sequence[float]]:
    """CPU seconds of the steps of all stages but the first, which has nothing to rehearse; of a single stage, of that one."""
    return outcome.step_cpu_s[1:] or outcome.step_cpu_s


def step_ratios(ours: Sequence[Outcome], rivals: Sequence[Outcome]) -> list[float]:
    """CPU seconds of a step, ours over the rival's: one value per stage that rehearses, of every round."""
    return [
        statistics.fmean(mine) / statistics.fmean(theirs)
        for each, other in zip(ours, rivals, strict=True)
        for mine, theirs in zip(rehearsing(each), rehearsing(other), strict=True)
    ]


def met(check: Check) -> bool:
    """Whether a value keeps to its target, '<= x' or '>= x'."""
    relation, bound = check["target"].split()
    value: float = check["value"]
    return value <= float(bound) if relation == "<=" else value >= float(bound)
