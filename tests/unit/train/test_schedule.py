"""Schedules at their corners."""

from __future__ import annotations

import math

import pytest
from pydantic import TypeAdapter

from scaletrain.train.schedule import CosineConfig, LinearConfig, ScheduleConfig, WsdConfig, due, learning_rate

ALL = [LinearConfig(), CosineConfig(), WsdConfig()]


@pytest.mark.parametrize("config", ALL)
def test_the_peak_is_reached_at_the_end_of_the_warm_up_in_a_line(config: LinearConfig | CosineConfig | WsdConfig) -> None:
    rates = [learning_rate(config, 2.0, samples, 1000) for samples in (0, 15, 30, 60)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 2.0])


@pytest.mark.parametrize("config", [LinearConfig(final_ratio=0.25), CosineConfig(final_ratio=0.25), WsdConfig(final_ratio=0.25)])
def test_the_end_has_the_final_ratio_and_keeps_it(config: LinearConfig | CosineConfig | WsdConfig) -> None:
    assert learning_rate(config, 2.0, 1000, 1000) == learning_rate(config, 2.0, 5000, 1000) == 0.5


def test_linear_is_halfway_down_at_half_of_what_follows_the_warm_up() -> None:
    config = LinearConfig(warmup_samples=200, final_ratio=0.5)
    assert learning_rate(config, 1.0, 600, 1000) == pytest.approx(0.75)


def test_cosine_follows_half_a_cosine() -> None:
    config = CosineConfig(warmup_samples=200, final_ratio=0.0)
    for samples in (200, 400, 600, 900):
        expected = (1 + math.cos(math.pi * (samples - 200) / 800)) / 2
        assert learning_rate(config, 1.0, samples, 1000) == pytest.approx(expected)


def test_wsd_is_stable_and_then_falls_in_a_line() -> None:
    config = WsdConfig(warmup_samples=100, decay_share=0.2)
    assert [learning_rate(config, 1.0, samples, 1000) for samples in (100, 500, 800)] == [1.0, 1.0, 1.0]
    assert learning_rate(config, 1.0, 900, 1000) == pytest.approx(0.5)


def test_a_wsd_run_made_longer_keeps_what_came_before_its_decay() -> None:
    config = WsdConfig(warmup_samples=100, decay_samples=50)
    assert [learning_rate(config, 1.0, s, 1000) for s in (50, 500, 950)] == [
        learning_rate(config, 1.0, s, 9000) for s in (50, 500, 950)
    ]


def test_samples_take_precedence_over_shares() -> None:
    assert learning_rate(LinearConfig(warmup_share=0.5, warmup_samples=10), 1.0, 5, 1000) == 0.5


@pytest.mark.parametrize("config", [LinearConfig(warmup_share=0.0), CosineConfig(warmup_samples=0), WsdConfig(warmup_share=0.0)])
def test_without_warm_up_the_first_sample_has_the_peak(config: LinearConfig | CosineConfig | WsdConfig) -> None:
    assert learning_rate(config, 1.0, 0, 1000) == pytest.approx(1.0)


def test_a_warm_up_as_long_as_the_run_ends_at_the_peak() -> None:
    for config in (LinearConfig(warmup_share=1.0), CosineConfig(warmup_share=1.0)):
        assert learning_rate(config, 1.0, 500, 1000) == 0.5
        assert learning_rate(config, 1.0, 1000, 1000) == 1.0


def test_where_warm_up_and_decay_overlap_the_lower_holds() -> None:
    config = WsdConfig(warmup_share=0.8, decay_share=0.8)
    assert learning_rate(config, 1.0, 400, 1000) == pytest.approx(0.5)
    assert learning_rate(config, 1.0, 600, 1000) == pytest.approx(0.5)


@pytest.mark.parametrize("config", ALL)
def test_a_schedule_never_rises_after_the_peak(config: LinearConfig | CosineConfig | WsdConfig) -> None:
    rates = [learning_rate(config, 1.0, samples, 1000) for samples in range(60, 1001)]
    assert rates == sorted(rates, reverse=True)
    assert all(0 <= rate <= 1 for rate in rates)


def test_the_name_picks_the_schedule() -> None:
    adapter: TypeAdapter[object] = TypeAdapter(ScheduleConfig)
    assert adapter.validate_python({"name": "wsd", "decay_share": 0.3}) == WsdConfig(decay_share=0.3)
    assert adapter.validate_python({"name": "cosine"}) == CosineConfig()


@pytest.mark.parametrize(
    ("step", "every", "expected"), [(0, 5, False), (5, 5, True), (6, 5, False), (10, 5, True), (3, 0, False), (1, 1, True)]
)
def test_due(step: int, every: int, expected: bool) -> None:
    assert due(step, every) is expected
