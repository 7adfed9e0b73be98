"""The methods as configs, the seams that they leave alone, and distillation against its formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scaletrain.config import decode, to_tree
from scaletrain.continual.memory import remember
from scaletrain.continual.method import Active, Beginning, Method, Past
from scaletrain.continual.methods import Ewc, Joint, Lwf, MethodConfig, Replay, check_together
from scaletrain.continual.methods.lwf import TEACHER, Distillation
from scaletrain.data.labelled import Example
from scaletrain.errors import ConfigError

RANDOM = np.random.default_rng(3)
LOGITS = RANDOM.normal(size=(6, 9)).astype(np.float32) * 3
"""The student's, of 6 samples: two old blocks of 3 and 2 columns, and a new one of 4."""
TAUGHT = RANDOM.normal(size=(6, 9)).astype(np.float32) * 3
OLD = (slice(0, 3), slice(3, 5))
TEN: dict[str, Any] = {"capacity": 10, "balance": "none", "seed": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    methods: tuple[MethodConfig, ...] = ()


def example(key: str) -> Example:
    return Example(key=key, text=f"text of {key}", pair=None, label="yes")


def beginning(*, old: tuple[slice, ...] = OLD, together: bool = True, has_state: bool = True) -> Beginning:
    """Of a stage with the teacher TAUGHT, and no engine: whoever asks for it fails."""

    def state(part: str, shard: Any) -> Tensor:
        raise AssertionError(f"{part} was asked for")

    engine: Any = None
    return Beginning(engine, lambda: TAUGHT, old, together, state, has_state)


def carrying(samples: Sequence[int], teacher: Any) -> Any:
    return SimpleNamespace(targets={TEACHER: torch.from_numpy(np.asarray(teacher)[list(samples)])})


# --- configs


def test_a_stream_decodes_its_methods_by_name_and_writes_them_back() -> None:
    methods = [{"name": "replay", "capacity": 50}, {"name": "ewc", "strength": 5.0, "gamma": 0.9}, {"name": "lwf"}]
    stream = decode(Stream, {"methods": methods})
    assert stream.methods == (Replay(capacity=50), Ewc(strength=5.0, gamma=0.9), Lwf())
    assert decode(Stream, to_tree(stream)) == stream
    assert decode(Stream, {"methods": [{"name": "joint"}]}).methods == (Joint(),)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "ewc", "gamma": 0.0},
        {"name": "ewc", "strength": -1.0},
        {"name": "ewc", "samples": 0},
        {"name": "lwf", "temperature": 0.0},
        {"name": "replay", "capacity": 0},
        {"name": "replay", "per_new": 0.0},
        {"name": "joint", "capacity": 10},
    ],
)
def test_settings_out_of_range_are_refused_by_their_path(method: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"methods\.0.*{list(method)[1]}"):
        decode(Stream, {"methods": [method]})


@pytest.mark.parametrize("methods", [(), (Joint(),), (Replay(), Ewc(), Lwf())])
def test_methods_that_work_side_by_side_pass(methods: tuple[Any, ...]) -> None:
    check_together(methods)


@pytest.mark.parametrize(
    ("methods", "rule"),
    [((Ewc(), Replay(), Ewc(strength=2.0)), "ewc comes twice"), ((Joint(), Replay()), "`joint` stands alone")],
)
def test_methods_that_contradict_each_other_are_refused(methods: tuple[Any, ...], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as caught:
        check_together(methods, "stream.methods")
    assert (caught.value.field, caught.value.value) == ("stream.methods", [method.name for method in methods])


# --- seams


@pytest.mark.parametrize("method", [Method(), Replay(), Ewc(), Lwf(), Joint()])
def test_a_seam_that_a_method_does_not_override_does_nothing(method: Method) -> None:
    nothing: Any = None
    past = Past(("a",), lambda: [("a", example("1"))], [])
    does = {
        "remember": lambda: method.remember([], "a", []) == [],
        "rehearse": lambda: method.rehearse(past) is None,
        "begin": lambda: method.begin(nothing) == Active(),
        "consolidate": lambda: method.consolidate(nothing) == {},
    }
    assert all(nothing_done() for seam, nothing_done in does.items() if seam not in vars(type(method)) or type(method) is Method)


def test_joint_trains_on_everything_from_the_first_encoder() -> None:
    past = Past(("a", "b"), lambda: [("a", example("1")), ("b", example("2"))], [])
    rehearsal = Joint().rehearse(past)
    assert rehearsal is not None
    assert (rehearsal.examples, rehearsal.per_new, rehearsal.afresh) == (past.train(), None, True)


def test_replay_fills_a_memory_of_its_capacity_and_rehearses_all_of_it() -> None:
    """Filled in two stages, whatever their order; the seed and the balance are its own."""
    replay = Replay(capacity=10, per_new=0.5, balance="none", seed=4)
    tasks = {task: [example(f"{task}{number}") for number in range(size)] for task, size in (("a", 90), ("b", 10))}
    memory = replay.remember(replay.remember((), "a", tasks["a"]), "b", tasks["b"])
    assert memory == remember(remember((), "b", tasks["b"], **TEN), "a", tasks["a"], **TEN)
    rehearsal = replay.rehearse(Past(("a", "b"), list, memory))
    assert rehearsal is not None
    assert rehearsal.examples == [(kept.task, kept.example) for kept in memory]
    assert (len(rehearsal.examples), rehearsal.per_new, rehearsal.afresh) == (10, 0.5, False)


def test_in_the_first_stage_nothing_is_rehearsed_and_no_old_example_is_read() -> None:
    def unread() -> Any:
        raise AssertionError("there is nothing to read")

    assert [method.rehearse(Past((), unread, [])) for method in (Joint(), Replay())] == [None, None]


# --- strength zero, or nothing to keep


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (Ewc(strength=0.0), beginning()),
        (Ewc(strength=2.0), beginning(has_state=False)),
        (Lwf(strength=0.0), beginning()),
        (Lwf(strength=2.0), beginning(old=())),
    ],
)
def test_without_strength_or_a_past_there_is_no_term_no_penalty_and_no_teacher(method: Method, told: Beginning) -> None:
    assert method.begin(told) == Active(terms={}, penalties=(), cached={})


def test_without_strength_no_fisher_information_is_computed() -> None:
    ending: Any = None
    assert Ewc(strength=0.0).consolidate(ending) == {}


# --- distillation


def softmax(row: Any) -> list[float]:
    exponents = [math.exp(float(value)) for value in row]
    return [value / math.fsum(exponents) for value in exponents]


def by_hand(student: Any, teacher: Any, temperature: float, choices: Sequence[Sequence[int]]) -> float:
    """The formula of the paper, in Python floats, one sample and one choice at a time."""
    total = 0.0
    for z, taught in zip(student, teacher, strict=True):
        for columns in choices:
            wanted, given = (softmax([row[c] / temperature for c in columns]) for row in (taught, z))
            total -= math.fsum(p * math.log(q) for p, q in zip(wanted, given, strict=True))
    return total


@pytest.mark.parametrize(("together", "choices"), [(True, [range(5)]), (False, [range(3), range(3, 5)])])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_its_formula_over_the_old_columns(together: bool, choices: Any, temperature: float) -> None:
    """In float arithmetic by hand: one softmax over all old columns, or one per block; no factor T^2."""
    active = Lwf(strength=0.7, temperature=temperature).begin(beginning(together=together))
    term = active.terms["distillation"]
    value = term.sum(torch.from_numpy(LOGITS), carrying(range(6), active.cached[TEACHER]))
    assert (term.weight, active.penalties) == (0.7, ())
    assert (value.dtype, value.shape) == (torch.float32, ())
    assert value.item() == pytest.approx(by_hand(LOGITS, TAUGHT, temperature, choices), rel=1e-5)


def test_distillation_pulls_the_old_columns_of_the_student_alone() -> None:
    """By (softmax(z/T) - softmax(z*/T)) / T; the columns of the new block get no gradient, and what teaches has no graph."""
    active = Lwf(temperature=2.0).begin(beginning())
    assert isinstance(active.cached[TEACHER], np.ndarray)
    outputs = torch.from_numpy(LOGITS).requires_grad_()
    active.terms["distillation"].sum(outputs, carrying(range(6), TAUGHT)).backward()
    assert outputs.grad is not None
    expected = [
        [(q - p) / 2 for q, p in zip(softmax(z[:5] / 2), softmax(taught[:5] / 2), strict=True)] + [0.0] * 4
        for z, taught in zip(LOGITS, TAUGHT, strict=True)
    ]
    torch.testing.assert_close(outputs.grad, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_a_students_own_logits_leave_it_where_it_is() -> None:
    outputs = torch.from_numpy(TAUGHT.copy()).requires_grad_()
    Distillation(1.0, 2.0, (OLD,)).sum(outputs, carrying(range(6), TAUGHT)).backward()
    assert outputs.grad is not None
    assert outputs.grad.abs().max() < 1e-6


def test_cached_rows_belong_to_their_samples_in_whatever_order_and_slot_these_come() -> None:
    """The sum over slots is that over samples; with another sample's row it is not."""
    active = Lwf().begin(beginning())
    term, cached = active.terms["distillation"], active.cached[TEACHER]
    assert cached.shape == (6, 9)
    dealt = [[4, 0, 5], [2], [3, 1]]
    total = sum(term.sum(torch.from_numpy(LOGITS[samples]), carrying(samples, cached)).item() for samples in dealt)
    assert total == pytest.approx(by_hand(LOGITS, TAUGHT, 2.0, [range(5)]), rel=1e-5)
    mixed = term.sum(torch.from_numpy(LOGITS), carrying([1, 2, 3, 4, 5, 0], cached)).item()
    assert abs(mixed - total) > 0.1


def test_rows_of_another_number_of_samples_are_an_error_not_a_broadcast() -> None:
    with pytest.raises((RuntimeError, ValueError)):
        Distillation(1.0, 2.0, (OLD,)).sum(torch.from_numpy(LOGITS), carrying([0], TAUGHT))


def test_bf16_logits_are_compared_in_fp32() -> None:
    outputs = torch.from_numpy(LOGITS).bfloat16()
    value = Distillation(1.0, 2.0, (OLD,)).sum(outputs, carrying(range(6), TAUGHT))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(by_hand(outputs.float().numpy(), TAUGHT, 2.0, [range(5)]), rel=1e-5)
