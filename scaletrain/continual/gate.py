"""The gate: whether a candidate may take the place of the published model, task by task, from what both got right.

Both models answer the same examples of a task, so that only those on which they differ say anything: ``lost`` ones were right and
are wrong now, ``gained`` ones the other way round. The *drop* is the fall in accuracy, (lost - gained) / pairs, and has a limit.
Two one-sided tests are made of every task that the published model knows::

    held      rejects "the drop is the limit or more"     the task is shown to be well (non-inferiority)
    broken    rejects "the drop is the limit or less"     the task is shown to be damaged
    open      neither: too few examples to tell

All held: accept. Any broken: refuse. Else undecidable: a test that finds no difference has not shown that there is none.

Holm's correction (1979) keeps the chance of any wrong statement about a task below ``alpha``, for "held" and for "broken" each. A
rightful *accept* needs less: it says that every task is held, and by the intersection-union principle (Berger 1982) each may then
be tested at ``alpha`` itself. The gate is stricter on purpose. What it says of a single task goes into the ledger and the report
and is read by itself, also under a verdict that is not accept, and the same tasks are judged again at every later stage.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import NormalDist
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from scaletrain.errors import ConfigError, CorpusError, RefusedError, UndecidedError

Outcomes = Mapping[str, bool]
"""Key of an example -> whether the model got it right."""
Decision = Literal["accept", "refuse", "undecidable"]
Status = Literal["held", "broken", "open"]

_NORMAL = NormalDist()


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskLimit:
    """What one task may lose; what is not given is as for all tasks."""

    max_drop: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Largest fall in accuracy against the published model (0.02: two points)."""
    floor: Annotated[float | None, Field(ge=0, le=1)] = None
    """Lowest accuracy that is published, whatever it was before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """What a candidate must show before it is published."""

    max_drop: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Largest fall in accuracy on a task against the published model (0.02: two points); that it is smaller must be shown."""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Chance that any task is called held that is not, and that any is called broken that is not."""
    floor: Annotated[float | None, Field(ge=0, le=1)] = None
    """Lowest accuracy on any task that is published, the new one included; none: no floor."""
    tasks: dict[str, TaskLimit] = field(default_factory=dict)
    """Limits of single tasks, by name."""

    def limits(self, task: str) -> tuple[float, float | None]:
        """(largest drop, floor) of a task."""
        own = self.tasks.get(task, TaskLimit())
        return own.max_drop or self.max_drop, self.floor if own.floor is None else own.floor


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskVerdict:
    """What the gate found about one task. A new one can be compared with nothing: its fields from ``limit`` on are None."""

    task: str
    status: Status
    reason: str
    """Why, for people."""
    pairs: int
    """Examples answered."""
    accuracy: float
    """Of the candidate."""
    floor: float | None
    limit: float | None = None
    lost: int | None = None
    gained: int | None = None
    drop: float | None = None
    p_held: float | None = None
    """Chance of a drop as small as this one if the true one were the limit."""
    p_broken: float | None = None
    """Chance of a drop as large as this one if the true one were the limit."""
    adjusted_held: float | None = None
    """``p_held`` after Holm's correction over the tasks: held where it is at most alpha."""
    adjusted_broken: float | None = None
    needed: int | None = None
    """Examples that would decide an open task at the observed rates; None where no number would."""

    @property
    def line(self) -> str:
        """One line for people."""
        said = f"{self.status}, {self.reason}"
        if self.drop is None:  # nothing was compared, so that nothing was shown to hold either
            said = self.reason if self.status == "held" else said
            return f"task {self.task}: {self.pairs:,} examples, accuracy {self.accuracy:.4f}: {said}"
        compared = f" ({self.lost} lost, {self.gained} gained), drop {self.drop:.4f} [limit {self.limit:g}]"
        compared += f", p held {self.adjusted_held:.3g}, p broken {self.adjusted_broken:.3g}"
        return f"task {self.task}: {self.pairs:,} pairs{compared}, accuracy {self.accuracy:.4f}: {said}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says of a candidate."""

    decision: Decision
    """``refuse`` if any task is broken, else ``undecidable`` if any is open, else ``accept``."""
    tasks: tuple[TaskVerdict, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """For people: the decision, then one line per task."""
        return (f"gate: {self.decision}", *(task.line for task in self.tasks))

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the ledger and the report."""
        return {"decision": self.decision, "tasks": [asdict(task) for task in self.tasks], "lines": list(self.lines)}

    def require_accepted(self) -> None:
        """Raises RefusedError or UndecidedError, with the lines, for a candidate that is not accepted."""
        if self.decision == "refuse":
            raise RefusedError("\n".join(self.lines))
        if self.decision == "undecidable":
            raise UndecidedError("\n".join(self.lines))


def judge(config: GateConfig, baseline: Mapping[str, Outcomes], candidate: Mapping[str, Outcomes]) -> Verdict:
    """The verdict on a candidate, from its outcomes and the published model's on the gate split of every live task.

    ``candidate`` answers every task of ``baseline`` on the same examples, and may know further ones, which have nothing but a
    floor to keep. Raises CorpusError where a task is missing or has no examples, or where the two did not answer the same ones.
    """
    pairs = {task: _paired(task, baseline.get(task), candidate.get(task)) for task in dict.fromkeys([*baseline, *candidate])}
    scores = {task: score(pairs[task], config.limits(task)[0]) for task in baseline}
    held = holm({task: _upper_tail(-z) for task, z in scores.items()})
    broken = holm({task: _upper_tail(z) for task, z in scores.items()})
    found = []
    for task, counts in pairs.items():
        right = sum(map(bool, candidate[task].values())) / counts.pairs
        floor = config.limits(task)[1]
        reason = "new, has no floor to keep" if floor is None else "new, not below its floor"
        verdict = TaskVerdict(task=task, status="held", reason=reason, pairs=counts.pairs, accuracy=right, floor=floor)
        if task in baseline:
            verdict = _compare(verdict, config, counts, held[task], broken[task])
        found.append(_guard(verdict))
    statuses = {verdict.status for verdict in found}
    return Verdict("refuse" if "broken" in statuses else "undecidable" if "open" in statuses else "accept", tuple(found))


def require_decisive(config: GateConfig, sizes: Mapping[str, int]) -> None:
    """Raises ConfigError for gate splits so small that not even an unchanged model would be accepted.

    ``sizes``: task -> examples in its gate split, of the tasks that a candidate will be compared on. To be called before anything
    is trained.
    """
    unchanged = {task: dict.fromkeys(map(str, range(size)), True) for task, size in sizes.items()}
    for verdict in judge(config, unchanged, unchanged).tasks:
        if verdict.status == "open" and (verdict.needed or 0) > verdict.pairs:
            rule = f"not even an unchanged model could be shown to drop by less than {verdict.limit:g} on so few"
            over = f"alpha {config.alpha:g} over {len(sizes)} {'task' if len(sizes) == 1 else 'tasks'}"
            remedy = f"Give it {verdict.needed:,} ({over}), or a larger gate.max_drop"
            raise ConfigError(f"gate split of task {verdict.task}", f"{verdict.pairs} examples", rule, remedy)


def require_known(config: GateConfig, tasks: Collection[str]) -> None:
    """Raises ConfigError where the gate has a limit for a task that there is not, which would guard nothing."""
    for name in config.tasks:
        if name not in tasks:
            close = difflib.get_close_matches(name, tasks, n=1)
            remedy = f"Did you mean {close[0]}?" if close else f"The tasks here are: {', '.join(tasks)}"
            raise ConfigError(f"gate.tasks.{name}", name, "no task has this name", remedy)


# ---------------------------------------------------------------------------------------------------------------- the statistics


class Pairs(NamedTuple):
    """What two models made of one task's examples."""

    pairs: int
    lost: int
    gained: int


class Corrected(NamedTuple):
    """A p-value among others."""

    p: float
    factor: int
    """How many times smaller than alpha Holm's procedure wants ``p`` to be, at its place in the order."""
    adjusted: float


def score(counts: Pairs, limit: float) -> float:
    """How many standard errors the drop lies above ``limit``: standard normal where the true drop is the limit (0 < limit < 1).

    The score test of Tango (1998, Statistics in Medicine 17:891-908). Its standard error is the one under the hypothesis, with
    the chance of a gain at its maximum likelihood given that the drop is the limit. So not a single example lost or gained is no
    certainty: the score is then -sqrt(pairs limit / (1 - limit)). The normal approximation is close also for few pairs: on 10 to
    300 of them, and limits of 0.02 to 0.1, a drop of exactly the limit is called held at a nominal 0.05 in at most 0.07 of all
    cases, by enumeration.
    """
    variance = 2 * gain_rate(counts, limit) + limit - limit**2
    return (counts.lost - counts.gained - counts.pairs * limit) / math.sqrt(counts.pairs * variance)


def gain_rate(counts: Pairs, limit: float) -> float:
    """Maximum likelihood of the chance q of a gain where that of a loss is q + limit (Tango 1998).

    The root in [0, (1 - limit) / 2] of 2 pairs q^2 + b q - gained limit (1 - limit), which is what the derivative of
    lost log(q + limit) + gained log q + rest log(1 - 2 q - limit) comes down to.
    """
    pairs, lost, gained = counts
    b = (2 * pairs - lost + gained) * limit - lost - gained
    return (math.sqrt(b**2 + 8 * pairs * gained * limit * (1 - limit)) - b) / (4 * pairs)


def holm(p_values: Mapping[str, float]) -> dict[str, Corrected]:
    """P-values adjusted so that each may be compared with alpha (Holm 1979, "A simple sequentially rejective multiple test
    procedure"): the k-th smallest of m becomes m - k + 1 times as large, at least the one before, at most 1.
    """
    corrected: dict[str, Corrected] = {}
    before = 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        factor = len(p_values) - place
        before = max(before, min(1.0, p_values[name] * factor))
        corrected[name] = Corrected(p_values[name], factor, before)
    return corrected


def examples_needed(counts: Pairs, limit: float, alpha: float) -> int | None:
    """The smallest number of examples that would put the drop on one side of the limit at ``alpha``, at the observed rates; None
    where the observed drop is the limit, so that no number would.

    With the rates kept, ``gain_rate`` stays and the score grows with the square root of the number: nothing has to be searched.
    """
    if math.isclose(counts.lost - counts.gained, counts.pairs * limit, rel_tol=1e-9):
        return None
    return math.ceil(counts.pairs * (_NORMAL.inv_cdf(alpha) / score(counts, limit)) ** 2)


def smallest_decisive(limit: float, alpha: float, tasks: int) -> int:
    """Fewest examples per task on which ``tasks`` tasks of an unchanged model would all be called held: the smallest n with
    sqrt(n limit / (1 - limit)) at or above the normal quantile of 1 - alpha / tasks.
    """
    return math.ceil(_NORMAL.inv_cdf(alpha / tasks) ** 2 * (1 - limit) / limit)


def _upper_tail(z: float) -> float:
    """Of the standard normal distribution, also where it is far below the rounding of 1."""
    return math.erfc(z / math.sqrt(2)) / 2


# ------------------------------------------------------------------------------------------------------------------- one task


def _paired(task: str, before: Outcomes | None, now: Outcomes | None) -> Pairs:
    """Counts one task. Raises CorpusError."""
    where = f"gate split of task {task}"
    if now is None:
        raise CorpusError(where, "no outcomes", "the candidate must answer every task that the published model knows")
    if not now:
        raise CorpusError(where, "no examples", "a task is judged by some", "Give it a gate split")
    if before is None:
        return Pairs(len(now), 0, 0)
    if before.keys() != now.keys():
        odd = sorted(before.keys() ^ now.keys())
        rule = f"published model and candidate must answer the same ones; {len(odd)} have one answer only, {odd[0]!r} first"
        raise CorpusError(where, f"{len(before)} and {len(now)} examples", rule, "Evaluate both on the same frozen data")
    lost = sum(1 for key, right in before.items() if right and not now[key])
    gained = sum(1 for key, right in before.items() if now[key] and not right)
    return Pairs(len(now), lost, gained)


def _compare(verdict: TaskVerdict, config: GateConfig, counts: Pairs, held: Corrected, broken: Corrected) -> TaskVerdict:
    """Adds what the two tests say."""
    limit = config.limits(verdict.task)[0]
    status: Status = "open"
    needed: int | None = None
    if held.adjusted <= config.alpha:
        status, reason = "held", "the drop is shown to be below the limit"
    elif broken.adjusted <= config.alpha:
        status, reason = "broken", "the drop is shown to be above the limit"
    else:
        needed = examples_needed(counts, limit, config.alpha / min(held, broken).factor)
        if needed is None:
            reason = "no number of examples would decide at these rates: the drop is the limit"
        elif needed > counts.pairs:
            reason = f"needs about {needed:,} examples"
        else:
            reason = "enough examples, but other tasks have to be decided first"
    return replace(
        verdict,
        status=status,
        reason=reason,
        limit=limit,
        lost=counts.lost,
        gained=counts.gained,
        drop=(counts.lost - counts.gained) / counts.pairs,
        p_held=held.p,
        p_broken=broken.p,
        adjusted_held=held.adjusted,
        adjusted_broken=broken.adjusted,
        needed=needed,
    )


def _guard(verdict: TaskVerdict) -> TaskVerdict:
    """A task below its floor is broken, whatever it was before."""
    if verdict.floor is None or verdict.accuracy >= verdict.floor:
        return verdict
    reason = f"accuracy {verdict.accuracy:.4f} is below the floor {verdict.floor:g}"
    return replace(verdict, status="broken", reason=reason, needed=None)
