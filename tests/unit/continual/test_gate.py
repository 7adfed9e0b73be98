"""The gate's statistics against brute force, and what it says of candidates whose fate is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scaletrain.config import decode
from scaletrain.continual.gate import (
    GateConfig,
    Outcomes,
    Pairs,
    TaskLimit,
    TaskVerdict,
    Verdict,
    examples_needed,
    gain_rate,
    holm,
    judge,
    require_decisive,
    require_known,
    score,
    smallest_decisive,
)
from scaletrain.errors import ConfigError, CorpusError, RefusedError, ScaletrainError, UndecidedError

COUNTS = [
    Pairs(20, 0, 0),
    Pairs(20, 3, 1),
    Pairs(44, 1, 0),
    Pairs(300, 6, 2),
    Pairs(300, 0, 9),
    Pairs(50, 50, 0),
    Pairs(50, 0, 50),
]
LIMITS = [0.01, 0.02, 0.1, 0.5]


def answers(right: int, of: int) -> dict[str, bool]:
    """The first ``right`` of so many examples are right, the others are not."""
    return {str(number): number < right for number in range(of)}


def differing(of: int, *, lost: int, gained: int, wrong: int = 0) -> tuple[Outcomes, Outcomes]:
    """Outcomes of two models: so many lost, gained, and wrong with both."""
    before = {str(n): not lost <= n < lost + gained + wrong for n in range(of)}
    now = {str(n): n >= lost and not lost + gained <= n < lost + gained + wrong for n in range(of)}
    return before, now


def only(verdict: Verdict) -> TaskVerdict:
    (task,) = verdict.tasks
    return task


# --- the score test


def likelihood(counts: Pairs, limit: float, gain: float) -> float:
    """Log-likelihood of the three kinds of pairs, with the chance of a loss ``gain + limit``."""
    chances = (gain + limit, gain, 1 - 2 * gain - limit)
    numbers = (counts.lost, counts.gained, counts.pairs - counts.lost - counts.gained)
    return sum(n * (math.log(p) if p > 0 else -math.inf) for n, p in zip(numbers, chances, strict=True) if n)


def maximum(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a concave function is largest, by thirds."""
    for _ in range(200):
        third = (high - low) / 3
        if function(low + third) < function(high - third):
            low += third
        else:
            high -= third
    return (low + high) / 2


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("limit", LIMITS)
def test_the_gain_rate_maximises_the_trinomial_likelihood(counts: Pairs, limit: float) -> None:
    best = maximum(lambda gain: likelihood(counts, limit, gain), 0.0, (1 - limit) / 2)
    assert gain_rate(counts, limit) == pytest.approx(best, abs=1e-6)


def test_the_score_of_the_example_that_the_test_was_published_with() -> None:
    # Tango 1998: two ways to disinfect contact lenses, 44 pairs of which 1 differs, a limit of 0.1.
    assert score(Pairs(44, 1, 0), 0.1) == pytest.approx(-1.709, abs=5e-4)


def test_against_a_vanishing_limit_it_is_mcnemars_test() -> None:
    assert score(Pairs(300, 21, 9), 1e-12) == pytest.approx((21 - 9) / math.sqrt(21 + 9), rel=1e-6)


def test_no_difference_at_all_is_no_certainty() -> None:
    assert score(Pairs(20, 0, 0), 0.02) == pytest.approx(-math.sqrt(20 * 0.02 / 0.98))


def test_more_lost_examples_never_make_a_smaller_score() -> None:
    for limit in LIMITS:
        scores = [score(Pairs(100, lost, 5), limit) for lost in range(96)]
        assert scores == sorted(scores)


def rejections(pairs: int, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Chance of calling a task held, and broken, at 0.05, whose drop is exactly the limit: for 60 chances of a gain, by
    enumeration of everything that may be observed.
    """
    gains = np.linspace(1e-9, min(0.3, (1 - limit) / 2 - 1e-9), 60)
    held, broken = np.zeros_like(gains), np.zeros_like(gains)
    for lost in range(pairs + 1):
        for gained in range(pairs + 1 - lost):
            z, same = score(Pairs(pairs, lost, gained), limit), pairs - lost - gained
            if abs(z) >= 1.6448536269514722:
                ways = math.lgamma(pairs + 1) - math.lgamma(lost + 1) - math.lgamma(gained + 1) - math.lgamma(same + 1)
                logs = lost * np.log(gains + limit) + gained * np.log(gains) + same * np.log1p(-2 * gains - limit)
                (held if z < 0 else broken)[:] += np.exp(ways + logs)
    return held, broken


@pytest.mark.parametrize(("pairs", "limit"), [(20, 0.02), (20, 0.1), (60, 0.05), (133, 0.02)])
def test_a_drop_of_exactly_the_limit_is_rarely_called_held_or_broken(pairs: int, limit: float) -> None:
    held, broken = rejections(pairs, limit)
    assert held.max() <= 0.07
    assert broken.max() <= 0.09
    # Nor is the test merely shy: where many pairs differ, the approximation is at its nominal level.
    assert held[-1] == pytest.approx(0.05, abs=0.01)
    assert broken[-1] == pytest.approx(0.05, abs=0.01)


# --- how many examples


def rejected(lost: float, gained: float, pairs: int, limit: float, alpha: float) -> bool:
    """Whether rates of lost and gained examples would decide, with a gain rate found by maximisation; either side."""

    def value(gain: float) -> float:
        rest = 1 - 2 * gain - limit
        parts = ((lost, gain + limit), (gained, gain), (1 - lost - gained, rest))
        return sum(share * (math.log(p) if p > 0 else -math.inf) for share, p in parts if share)

    gain = maximum(value, 0.0, (1 - limit) / 2)
    z = (lost - gained - limit) * math.sqrt(pairs) / math.sqrt(2 * gain + limit - limit**2)
    return 0.5 * math.erfc(abs(z) / math.sqrt(2)) <= alpha


def searched(lost: float, gained: float, limit: float, alpha: float) -> int:
    """The smallest number of pairs that decides, by doubling and halving."""
    high = 1
    while not rejected(lost, gained, high, limit, alpha):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if rejected(lost, gained, middle, limit, alpha) else (middle, high)
    return high


@pytest.mark.parametrize(
    ("counts", "limit", "alpha"),
    [
        (Pairs(300, 4, 0), 0.02, 0.05),
        (Pairs(300, 9, 5), 0.02, 0.05 / 3),
        (Pairs(300, 8, 1), 0.02, 0.05),
        (Pairs(20, 0, 0), 0.02, 0.05),
        (Pairs(40, 2, 3), 0.05, 0.01),
    ],
)
def test_the_number_of_examples_needed_is_the_one_a_search_finds(counts: Pairs, limit: float, alpha: float) -> None:
    found = examples_needed(counts, limit, alpha)
    assert found == searched(counts.lost / counts.pairs, counts.gained / counts.pairs, limit, alpha)


def test_no_number_of_examples_decides_a_drop_that_is_the_limit() -> None:
    assert examples_needed(Pairs(300, 9, 3), 0.02, 0.05) is None
    assert examples_needed(Pairs(100, 7, 0), 0.07, 0.05) is None  # 100 * 0.07 is 7.000000000000001


@pytest.mark.parametrize("limit", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("tasks", [1, 3])
def test_an_unchanged_model_is_accepted_from_the_smallest_decisive_number_on(limit: float, tasks: int) -> None:
    enough = smallest_decisive(limit, 0.05, tasks)
    config = GateConfig(max_drop=limit)

    def unchanged(pairs: int) -> Verdict:
        same = {f"task {number}": answers(pairs // 2, pairs) for number in range(tasks)}
        return judge(config, same, same)

    assert unchanged(enough).decision == "accept"
    assert unchanged(enough - 1).decision == "undecidable"
    assert {task.needed for task in unchanged(enough - 1).tasks} >= {enough}


def test_the_smallest_decisive_number_in_closed_form() -> None:
    # 1.6449^2 * 0.98 / 0.02 = 132.57, and with alpha / 3 2.1280^2 * 49 = 221.89
    assert [smallest_decisive(0.02, 0.05, 1), smallest_decisive(0.02, 0.05, 3)] == [133, 222]


# --- Holm


def test_holm_by_hand() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert {name: one.factor for name, one in found.items()} == {"d": 4, "a": 3, "c": 2, "b": 1}
    adjusted = {name: one.adjusted for name, one in found.items()}
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})


def test_holm_stays_within_one_and_leaves_a_single_test_alone() -> None:
    assert holm({"a": 0.9, "b": 0.6})["b"].adjusted == 1
    assert holm({"a": 0.04})["a"].adjusted == 0.04


def test_more_tasks_make_the_gate_stricter() -> None:
    same = answers(150, 150)
    assert judge(GateConfig(), {"a": same}, {"a": same}).decision == "accept"
    assert judge(GateConfig(), {"a": same, "b": same}, {"a": same, "b": same}).decision == "undecidable"


# --- verdicts


def test_a_damaged_candidate_is_refused() -> None:
    verdict = judge(GateConfig(), {"csv": answers(280, 300)}, {"csv": answers(120, 300)})
    assert (verdict.decision, only(verdict).status, only(verdict).drop) == ("refuse", "broken", pytest.approx(160 / 300))
    with pytest.raises(
        RefusedError, match=r"task csv: 300 pairs \(160 lost, 0 gained\), drop 0\.5333 \[limit 0\.02\].*broken"
    ) as caught:
        verdict.require_accepted()
    assert caught.value.exit_code == 77


def test_one_regressed_task_is_refused_whatever_the_others_gain() -> None:
    before = {"a": answers(200, 400), "b": answers(200, 400), "c": answers(380, 400)}
    now = {"a": answers(300, 400), "b": answers(300, 400), "c": answers(340, 400)}
    verdict = judge(GateConfig(), before, now)
    assert sum(sum(task.values()) for task in now.values()) > sum(sum(task.values()) for task in before.values())
    assert verdict.decision == "refuse"
    assert {task.task: task.status for task in verdict.tasks} == {"a": "held", "b": "held", "c": "broken"}


def test_twenty_examples_decide_nothing() -> None:
    verdict = judge(GateConfig(), {"csv": answers(19, 20)}, {"csv": answers(19, 20)})
    assert (verdict.decision, only(verdict).status, only(verdict).needed) == ("undecidable", "open", 133)
    with pytest.raises(UndecidedError, match="needs about 133 examples") as caught:
        verdict.require_accepted()
    assert caught.value.exit_code == 78


def test_a_candidate_that_kept_everything_is_accepted() -> None:
    before, now = differing(400, lost=2, gained=9, wrong=30)
    verdict = judge(GateConfig(), {"csv": before}, {"csv": now, "new": answers(1, 20)})
    assert verdict.decision == "accept"
    assert (verdict.tasks[0].lost, verdict.tasks[0].gained, verdict.tasks[0].accuracy) == (2, 9, 368 / 400)
    verdict.require_accepted()


def test_both_sides_of_each_test_belong_together() -> None:
    before, now = differing(300, lost=9, gained=5)
    task = only(judge(GateConfig(), {"csv": before}, {"csv": now}))
    assert task.p_held is not None and task.p_broken is not None
    assert task.p_held + task.p_broken == pytest.approx(1)
    assert task.p_held == pytest.approx(0.5 * math.erfc(-score(Pairs(300, 9, 5), 0.02) / math.sqrt(2)))


def test_a_drop_of_the_limit_is_open_for_good() -> None:
    before, now = differing(300, lost=6, gained=0)
    task = only(judge(GateConfig(), {"csv": before}, {"csv": now}))
    assert (task.status, task.needed) == ("open", None)
    assert task.reason == "no number of examples would decide at these rates: the drop is the limit"


def test_a_task_with_enough_examples_waits_for_the_others() -> None:
    tasks = {"small": answers(133, 133), "large": answers(160, 160)}
    small, large = judge(GateConfig(), tasks, tasks).tasks
    assert (large.status, large.reason) == ("open", f"needs about {smallest_decisive(0.02, 0.05, 2):,} examples")
    assert (small.status, small.reason) == ("open", "enough examples, but other tasks have to be decided first")


def test_a_task_has_its_own_limit() -> None:
    before, now = differing(400, lost=20, gained=0)
    loose = GateConfig(tasks={"b": TaskLimit(max_drop=0.2)})
    verdict = judge(loose, {"a": before, "b": before}, {"a": now, "b": now})
    assert [(task.status, task.limit) for task in verdict.tasks] == [("broken", 0.02), ("held", 0.2)]


def test_a_task_below_its_floor_is_broken_though_it_lost_nothing() -> None:
    same = answers(240, 400)
    task = only(judge(GateConfig(floor=0.7), {"csv": same}, {"csv": same}))
    assert (task.status, task.reason) == ("broken", "accuracy 0.6000 is below the floor 0.7")
    assert only(judge(GateConfig(floor=0.6), {"csv": same}, {"csv": same})).status == "held"


def test_the_floor_is_all_that_a_new_task_has_to_keep() -> None:
    config = GateConfig(floor=0.9, tasks={"easy": TaskLimit(floor=0.0)})
    verdict = judge(config, {}, {"new": answers(17, 20), "easy": answers(0, 20)})
    assert [task.status for task in verdict.tasks] == ["broken", "held"]
    assert verdict.tasks[0].limit is None and verdict.tasks[0].p_held is None
    assert judge(GateConfig(), {}, {"new": answers(0, 20)}).decision == "accept"


def test_truth_values_of_an_array_do_as_well() -> None:
    before = dict(zip("abcd", np.array([True, True, False, False]), strict=True))
    now = dict(zip("abcd", np.array([True, False, True, False]), strict=True))
    verdict = judge(GateConfig(), {"csv": before}, {"csv": now})
    assert (only(verdict).lost, only(verdict).gained) == (1, 1)
    assert json.loads(json.dumps(verdict.to_json()))["tasks"][0]["accuracy"] == 0.5


def test_the_verdict_in_words() -> None:
    before, now = differing(300, lost=4, gained=0, wrong=26)
    verdict = judge(GateConfig(), {"csv": before}, {"csv": now, "json": answers(9, 10)})
    assert verdict.lines == (
        "gate: undecidable",
        "task csv: 300 pairs (4 lost, 0 gained), drop 0.0133 [limit 0.02], p held 0.205, p broken 0.795, accuracy 0.9000: "
        "open, needs about 1,194 examples",
        "task json: 10 examples, accuracy 0.9000: new, has no floor to keep",
    )


def test_the_verdict_as_json() -> None:
    before, now = differing(300, lost=4, gained=0)
    verdict = judge(GateConfig(floor=0.5), {"csv": before}, {"csv": now})
    tree = verdict.to_json()
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree
    assert (tree["decision"], tree["lines"]) == ("undecidable", list(verdict.lines))
    assert TaskVerdict(**tree["tasks"][0]) == only(verdict)


# --- what cannot be judged


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"a": answers(5, 10)}, {"a": answers(5, 11)}, "gate split of task a: got '10 and 11 examples'.*'10' first"),
        ({"a": answers(5, 10)}, {"b": answers(5, 10)}, "task a: got 'no outcomes'"),
        ({"a": {}}, {"a": {}}, "task a: got 'no examples'"),
        ({}, {"a": {}}, "task a: got 'no examples'"),
    ],
)
def test_outcomes_that_do_not_pair_are_an_error(before: Any, now: Any, said: str) -> None:
    with pytest.raises(CorpusError, match=said):
        judge(GateConfig(), before, now)


def test_a_gate_split_too_small_for_any_model_is_refused_before_training() -> None:
    require_decisive(GateConfig(), {"a": 133})
    with pytest.raises(ConfigError, match=r"gate split of task a: got '132 examples'.*Give it 133 \(alpha 0.05 over 1 task\)"):
        require_decisive(GateConfig(), {"a": 132})
    with pytest.raises(ConfigError, match=r"task b: got '100 examples'.*over 2 tasks"):
        require_decisive(GateConfig(), {"a": 1000, "b": 100})
    require_decisive(GateConfig(tasks={"b": TaskLimit(max_drop=0.05)}), {"a": 1000, "b": 100})


def test_a_limit_for_a_task_that_there_is_not_guards_nothing() -> None:
    config = GateConfig(tasks={"jsn": TaskLimit(max_drop=0.01)})
    with pytest.raises(ConfigError, match=r"gate\.tasks\.jsn: .*Did you mean json\?"):
        require_known(config, ["csv", "json"])
    require_known(config, ["jsn"])


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"max_drop": 0}, "max_drop"),
        ({"alpha": 0.5}, "alpha"),
        ({"floor": 1.5}, "floor"),
        ({"tasks": {"csv": {"max_drop": 1.0}}}, "tasks.csv.max_drop"),
        ({"tasks": {"csv": {"flor": 0.5}}}, "tasks.csv.flor"),
    ],
)
def test_settings_without_sense_are_refused(tree: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode(GateConfig, tree)
    assert caught.value.field == path


def test_settings_of_a_task_fall_back_on_those_of_all() -> None:
    config = decode(GateConfig, {"max_drop": 0.03, "floor": 0.5, "tasks": {"csv": {"floor": 0.0}, "json": {"max_drop": 0.1}}})
    assert [config.limits(task) for task in ("csv", "json", "re")] == [(0.03, 0.0), (0.1, 0.5), (0.03, 0.5)]


def test_the_gates_errors_are_no_bugs() -> None:
    assert {RefusedError.exit_code, UndecidedError.exit_code}.isdisjoint({ScaletrainError.exit_code, 65})
