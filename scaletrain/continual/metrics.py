"""What a stream of tasks did to accuracy, from the matrix of results.

``R[t][i]`` is the accuracy on task ``i`` after training on task ``t``. Row ``t`` has at least the tasks up to ``t``; what it has
beyond them says how well later tasks did before they were trained on. In the formulas tasks are counted from 1 to T, as in the
papers; in the code from 0.

The same word means different things in different libraries (some report as forgetting what is called backward transfer here,
with the sign turned), so that a number is never printed without its formula: ``FORMULAS``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

Results = Sequence[Sequence[float]]
"""R, by rows."""

FORMULAS: Mapping[str, str] = {
    "average_accuracy": "1/T sum_i R[T][i]",
    "average_incremental_accuracy": "1/T sum_t (1/t sum_{i<=t} R[t][i])",
    "forgetting": "1/(T-1) sum_{i<T} (max_{t<T} R[t][i] - R[T][i])",
    "backward_transfer": "1/(T-1) sum_{i<T} (R[T][i] - R[i][i])",
    "forward_transfer": "1/(T-1) sum_{i>=2} (R[i-1][i] - b[i]), b: accuracy of random weights",
    "intransigence": "a* - R[T][T], a*: accuracy on task T of a model trained on tasks 1..T together",
    "recovery": "(A - A_naive) / (A_joint - A_naive), A: average_accuracy",
}
"""Metric -> its formula, to be shown beside the number."""


def average_accuracy(results: Results) -> float:
    """Mean accuracy over all tasks at the end: ACC of Lopez-Paz and Ranzato, "Gradient episodic memory", 2017."""
    _check(results)
    return fmean(results[-1][: len(results)])


def average_incremental_accuracy(results: Results) -> float:
    """Mean over the stages of the mean accuracy over the tasks known by then (Rebuffi et al., "iCaRL", 2017)."""
    _check(results)
    return fmean(fmean(row[: stage + 1]) for stage, row in enumerate(results))


def forgetting(results: Results) -> float:
    """How far the tasks before the last one fell from their best (Chaudhry et al., "Riemannian walk", 2018, section 3.1).

    The best is over all stages but the last, those before the task's own included where R has them: negative when the last
    stage made old tasks better than they ever were. Raises ValueError for a single task.
    """
    last = _last_of_several(results)
    return fmean(max(row[task] for row in results[:-1] if task < len(row)) - last[task] for task in range(len(results) - 1))


def backward_transfer(results: Results) -> float:
    """What later stages did to tasks since they were trained on: BWT of Lopez-Paz and Ranzato, 2017. Usually negative.

    Raises ValueError for a single task.
    """
    last = _last_of_several(results)
    return fmean(last[task] - results[task][task] for task in range(len(results) - 1))


def forward_transfer(results: Results, untrained: Sequence[float]) -> float:
    """What earlier stages did for tasks not yet trained on: FWT of Lopez-Paz and Ranzato, 2017.

    ``untrained``: the accuracy of random weights on every task. Raises ValueError for a single task, and for rows that do not
    reach the next task.
    """
    _last_of_several(results)
    tasks = range(1, len(results))
    if len(untrained) < len(results) or any(len(results[task - 1]) <= task for task in tasks):
        raise ValueError(
            "forward transfer needs every task's accuracy after the stage before its own, and that of random weights"
        )
    return fmean(results[task - 1][task] - untrained[task] for task in tasks)


def intransigence(results: Results, joint: float) -> float:
    """How much worse the last task was learned than by a joint model (Chaudhry et al., 2018, section 3.2).

    ``joint``: accuracy on the last task of a model trained on all tasks together.
    """
    _check(results)
    return joint - results[-1][len(results) - 1]


def recovery(method: float, naive: float, joint: float) -> float:
    """The share of what naive training loses against joint training that a method keeps; of three average accuracies.

    1 is as good as joint training, 0 no better than none. Raises ValueError where naive training loses nothing.
    """
    if joint <= naive:
        raise ValueError(f"nothing to recover: joint training reaches {joint:.4f}, naive training {naive:.4f}")
    return (method - naive) / (joint - naive)


def summary(results: Results) -> dict[str, float]:
    """The metrics that R alone defines, by their names in ``FORMULAS``."""
    found = {
        "average_accuracy": average_accuracy(results),
        "average_incremental_accuracy": average_incremental_accuracy(results),
    }
    if len(results) > 1:
        found |= {"forgetting": forgetting(results), "backward_transfer": backward_transfer(results)}
    return found


def table(results: Results, tasks: Sequence[str]) -> str:
    """R and what follows from it as text: a row per stage, a column per task, then each metric with its formula."""
    _check(results)
    if len(tasks) < max(map(len, results)):
        raise ValueError(f"{len(tasks)} names for {max(map(len, results))} tasks")
    after = [f"after {tasks[stage]}" for stage in range(len(results))]
    first = max(map(len, after))
    widths = [max(6, len(task)) for task in tasks]
    lines = [" " * first + "".join(f"  {task:>{width}}" for task, width in zip(tasks, widths, strict=True))]
    for stage, row in zip(after, results, strict=True):
        lines.append(f"{stage:<{first}}" + "".join(f"  {value:>{width}.4f}" for value, width in zip(row, widths, strict=False)))
    metrics = summary(results)
    name_width = max(map(len, metrics))
    lines += ["", *(f"{name:<{name_width}}  {value:>7.4f}  = {FORMULAS[name]}" for name, value in metrics.items())]
    return "\n".join(line.rstrip() for line in lines)


def _check(results: Results) -> None:
    if not results:
        raise ValueError("R has no rows: no task was trained on yet")
    for stage, row in enumerate(results):
        if len(row) <= stage:
            raise ValueError(f"row {stage} of R has {len(row)} tasks; it needs those up to its own, {stage + 1}")


def _last_of_several(results: Results) -> Sequence[float]:
    _check(results)
    if len(results) < 2:
        raise ValueError("needs a task before the last one: R has a single row")
    return results[-1]
