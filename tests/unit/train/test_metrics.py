"""The record of a step: exact figures under a clock of our own, and what stands in the files after a kill."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pty
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scaletrain.errors import ConfigError
from scaletrain.train.console import Console, Terminal, Writers, count, curve, duration, open_writers
from scaletrain.train.metrics import (
    Fact,
    Jsonl,
    Meter,
    MetricsConfig,
    StepRecord,
    StepTotals,
    TensorBoard,
    device_peak,
    read_jsonl,
)


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def totals(step: int, real_tokens: int = 300, padded_tokens: int = 400) -> StepTotals:
    return StepTotals(
        step=step, samples=32 * step, real_tokens=real_tokens, padded_tokens=padded_tokens, rounds=3, filler_share=0.25
    )


def run_step(meter: Meter, clock: Clock, step: int, work_s: float, real_tokens: int = 300, wait_s: float = 0.0) -> StepRecord:
    meter.begin()
    clock.sleep(work_s)
    return meter.record(
        totals(step, real_tokens), loss=7.5, terms={"mlm": 7.5}, learning_rate=1e-4, gradient_norm=2.0, wait_s=wait_s
    )


RECORD = StepRecord(
    step=1,
    samples=32,
    loss=7.1,
    terms={"mlm": 7.1},
    learning_rate=1e-4,
    gradient_norm=0.3,
    real_tokens=300,
    real_tokens_per_second=12_430.0,
    padding_share=0.25,
    step_s=2.0,
    data_wait_s=0.5,
    eta_s=133.0,
    mfu=0.125,
    memory_bytes=1_230_000_000,
    rounds=3,
    filler_share=0.0,
)


# Meter


def test_a_record_holds_the_exact_figures_of_its_step() -> None:
    clock = Clock()
    meter = Meter(10, memory_bytes=lambda: 4096, flops_per_token=6.0, peak_flops=7200.0, clock=clock)
    assert run_step(meter, clock, 1, work_s=2.0, wait_s=0.5) == StepRecord(
        step=1,
        samples=32,
        loss=7.5,
        terms={"mlm": 7.5},
        learning_rate=1e-4,
        gradient_norm=2.0,
        real_tokens=300,
        real_tokens_per_second=150.0,
        padding_share=0.25,
        step_s=2.0,
        data_wait_s=0.5,
        eta_s=18.0,
        mfu=0.125,
        memory_bytes=4096,
        rounds=3,
        filler_share=0.25,
    )


def test_pace_and_eta_are_those_of_the_last_window() -> None:
    clock = Clock()
    meter = Meter(10, memory_bytes=lambda: 0, window_steps=2, clock=clock)
    run_step(meter, clock, 1, work_s=100.0)
    run_step(meter, clock, 2, work_s=1.0, real_tokens=300)
    record = run_step(meter, clock, 3, work_s=3.0, real_tokens=100)
    assert (record.real_tokens_per_second, record.eta_s) == (100.0, 7 * 2.0)


def test_time_between_two_steps_belongs_to_neither() -> None:
    clock = Clock()
    meter = Meter(10, memory_bytes=lambda: 0, clock=clock)
    first = run_step(meter, clock, 1, work_s=2.0)
    clock.sleep(60.0)  # an evaluation
    second = run_step(meter, clock, 2, work_s=2.0)
    assert [(r.step_s, r.real_tokens_per_second) for r in (first, second)] == [(2.0, 150.0)] * 2


def test_mfu_is_none_without_a_peak() -> None:
    clock = Clock()
    assert run_step(Meter(1, lambda: 0, flops_per_token=6.0, clock=clock), clock, 1, work_s=1.0).mfu is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 790.0),
        ("NVIDIA GH200 480GB", 990.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A10G", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        (None, None),
    ],
)
def test_the_assumed_peak_follows_from_the_whole_words_of_the_gpu_name(name: str | None, tflops: float | None) -> None:
    peak = device_peak(MetricsConfig(), name)
    assert (peak and peak.tflops) == tflops


def test_the_assumption_names_figure_origin_and_device() -> None:
    peak = device_peak(MetricsConfig(), "NVIDIA H200")
    assert peak is not None
    assert peak.assumption == "790 TFLOP/s per device, measured, dense bf16 on H200 (this is: NVIDIA H200)"


def test_a_configured_peak_comes_before_the_known_one() -> None:
    peak = device_peak(MetricsConfig(peak_tflops=0.5), "NVIDIA H200")
    assert peak is not None and (peak.tflops, peak.assumption) == (0.5, "0.5 TFLOP/s per device, from metrics.peak_tflops")


def test_memory_on_cpu_is_the_peak_in_bytes() -> None:
    program = (  # Linux hands the peak of the process that started this one down to it: the block goes above that
        "from scaletrain.train.metrics import peak_memory_bytes as peak\n"
        "size = peak('cpu') + 200_000_000; block = b'x' * size; del block; print(peak('cpu') - size)"
    )
    rest = int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert 0 < rest < 100_000_000  # what Python and the imports need


def test_reading_the_config_does_not_import_torch() -> None:
    program = "import sys, scaletrain.train.metrics, scaletrain.train.console; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"


# metrics.jsonl


def lines(path: Path) -> list[dict[str, object]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_step_is_one_line_with_exact_losses(tmp_path: Path) -> None:
    writer = Jsonl(tmp_path / "metrics.jsonl", start_step=0)
    writer.step(replace(RECORD, loss=0.1 + 0.2, terms={"mlm": 0.1 + 0.2}))
    (row,) = lines(tmp_path / "metrics.jsonl")
    assert (row["kind"], row["step"], row["terms"]) == ("step", 1, {"mlm": 0.1 + 0.2})
    assert float.fromhex(str(row["loss_hex"])) == row["loss"] == 0.1 + 0.2
    assert row["gradient_norm_hex"] == (0.3).hex()


def test_evaluations_and_events_are_lines_of_their_own_kind(tmp_path: Path) -> None:
    writer = Jsonl(tmp_path / "metrics.jsonl", start_step=0)
    writer.evaluation(4, {"loss": 1.5})
    writer.event(5, "checkpoint", {"folder": "step-5", "bytes": 12})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"kind": "eval", "step": 4, "scores": {"loss": 1.5}, "scores_hex": {"loss": "0x1.8000000000000p+0"}},
        {"kind": "event", "step": 5, "name": "checkpoint", "facts": {"folder": "step-5", "bytes": 12}},
    ]


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_what_is_not_finite_is_null_in_the_number_and_named_in_its_twin(tmp_path: Path, value: float, text: str) -> None:
    writer = Jsonl(tmp_path / "metrics.jsonl", start_step=0)
    writer.step(replace(RECORD, loss=value, terms={"mlm": value}))
    (row,) = lines(tmp_path / "metrics.jsonl")
    assert (row["loss"], row["loss_hex"], row["terms"]) == (None, text, {"mlm": None})


def killed_run(path: Path, steps: int) -> None:
    writer = Jsonl(path, start_step=0)
    for step in range(1, steps + 1):
        writer.step(replace(RECORD, step=step, loss=float(step)))
        writer.evaluation(step, {"loss": float(step)})


def test_after_a_resume_each_step_stands_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    killed_run(path, steps=5)
    resumed = Jsonl(path, start_step=3)
    for step in (4, 5, 6):
        resumed.step(replace(RECORD, step=step, loss=10.0 * step))
    steps = [(row["step"], row["loss"]) for row in read_jsonl(path) if row["kind"] == "step"]
    assert steps == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]
    assert [row["step"] for row in read_jsonl(path) if row["kind"] == "eval"] == [1, 2, 3]


def test_lines_that_stay_keep_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    killed_run(path, steps=2)
    kept = path.read_bytes()
    killed_run_of_four = tmp_path / "four.jsonl"
    killed_run(killed_run_of_four, steps=4)
    Jsonl(killed_run_of_four, start_step=2)
    assert killed_run_of_four.read_bytes() == kept


@pytest.mark.parametrize("torn_bytes", [1, 2, 40])
def test_a_torn_last_line_is_passed_over_and_dropped(tmp_path: Path, torn_bytes: int) -> None:
    path = tmp_path / "metrics.jsonl"
    killed_run(path, steps=2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-torn_bytes])
    complete = 4 if torn_bytes == 1 else 3  # where only the line end is missing, nothing is lost
    assert len(list(read_jsonl(path))) == complete
    Jsonl(path, start_step=2).event(2, "resumed", {})
    assert [row["kind"] for row in lines(path)] == [*["step", "eval", "step", "eval"][:complete], "event"]


def test_a_fresh_start_leaves_nothing_of_the_run_before(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    Jsonl(path, start_step=0).evaluation(0, {"loss": 9.0})
    Jsonl(path, start_step=0)
    assert path.read_bytes() == b""


def test_a_disk_that_is_full_while_cutting_back_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    killed_run(path, steps=3)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Jsonl(path, start_step=1)
    assert path.read_bytes() == before


# TensorBoard


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    writer = TensorBoard(tmp_path, start_step=0)
    writer.step(RECORD)
    writer.step(replace(RECORD, step=2, loss=6.9))
    writer.evaluation(2, {"loss": 6.5})
    writer.close()
    assert scalars(tmp_path, "train/loss") == [(1, np.float32(7.1)), (2, np.float32(6.9))]
    assert scalars(tmp_path, "train/learning_rate") == [(1, np.float32(1e-4)), (2, np.float32(1e-4))]
    assert scalars(tmp_path, "pace/real_tokens_per_second") == [(1, 12430.0), (2, 12430.0)]
    assert scalars(tmp_path, "pace/data_wait_s") == [(1, 0.5), (2, 0.5)]
    assert scalars(tmp_path, "eval/loss") == [(2, 6.5)]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    killed = TensorBoard(tmp_path, start_step=0)
    for step in (1, 2, 3, 4):
        killed.step(replace(RECORD, step=step, loss=float(step)))
    killed.flush()
    killed.close()
    for file in tmp_path.iterdir():
        file.rename(file.with_name(file.name.replace("tfevents.", "tfevents.0")))  # the reader sorts by name: this one first
    resumed = TensorBoard(tmp_path, start_step=2)
    for step in (3, 4):
        resumed.step(replace(RECORD, step=step, loss=10.0 * step))
    resumed.close()
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]


def test_no_peak_means_no_mfu_scalar(tmp_path: Path) -> None:
    writer = TensorBoard(tmp_path, start_step=0)
    writer.step(replace(RECORD, mfu=None))
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert "pace/mfu" not in events.Tags()["scalars"]


def test_tensorboard_that_is_not_installed_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ConfigError, match=r"metrics\.tensorboard: got True; needs the tensorboard package .*set metrics.tensorboard=false"
    ):
        open_writers(MetricsConfig(console="off"), tmp_path, start_step=0, total_steps=1)


# Console


def printed(mode: str, steps: range, total_steps: int, log_every: int = 10) -> str:
    stream = io.StringIO()
    console = Console(Terminal(mode, total_steps, stream), log_every, total_steps)  # type: ignore[arg-type]
    for step in steps:
        console.step(replace(RECORD, step=step))
    console.evaluation(steps[-1], {"loss": 6.5, "accuracy": 0.125})
    console.close()
    return stream.getvalue()


def test_a_plain_line_says_what_matters() -> None:
    assert printed("lines", range(10, 11), 400).splitlines() == [
        "step  10/400  loss 7.1000  lr 1.0e-04  norm 0.3  12.4k tok/s  pad 25.0%  wait 25.0%  mfu 12.5%  mem 1.23GB  eta 2:13",
        "eval at step 10:  loss 6.5000  accuracy 0.1250",
    ]


def test_lines_come_every_log_every_steps_and_at_the_last() -> None:
    text = printed("lines", range(1, 26), total_steps=25, log_every=10)
    assert [line.split()[1] for line in text.splitlines() if line.startswith("step")] == ["10/25", "20/25", "25/25"]


def test_a_stream_that_is_no_terminal_gets_lines() -> None:
    assert printed("auto", range(1, 26), 25) == printed("lines", range(1, 26), 25)


def test_the_bar_is_one_line_that_is_redrawn_and_an_evaluation_stands_above_it() -> None:
    text = printed("bar", range(1, 5), total_steps=4)
    above, below = text.split("eval at step 4:  loss 6.5000  accuracy 0.1250\n")
    shown = "loss 7.1000  lr 1.0e-04  12.4k tok/s  pad 25.0%  wait 25.0%  eta 2:13"
    assert "\n" not in above
    assert above.split("\r")[-2].isspace()  # the bar was wiped away before the line was printed
    assert [frame.split()[0] for frame in above.split("\r") if shown in frame] == ["1/4", "2/4", "3/4", "4/4"]
    assert below.rstrip("\n").split("\r")[-1].startswith("4/4 ") and below.endswith("\n")


@pytest.mark.parametrize(("size", "has_bar"), [((30, 100), True), ((0, 0), False)])
def test_auto_draws_a_bar_on_a_terminal_that_knows_its_size(
    size: tuple[int, int], has_bar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import termios

    monkeypatch.setenv("TERM", "xterm")
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, size)
    with os.fdopen(follower, "w") as stream, os.fdopen(leader):
        assert Terminal("auto", 10, stream).has_bar is has_bar


def test_counts_and_durations_are_short() -> None:
    assert [count(n) for n in (7, 950, 999.6, 12_430, 99_960, 1.5e6, 2e9)] == [
        "7",
        "950",
        "1.00k",
        "12.4k",
        "100k",
        "1.50M",
        "2.00G",
    ]
    assert [duration(s) for s in (0, 59.6, 133, 3733, 90_000)] == ["0:00", "1:00", "2:13", "1:02:13", "1d 01:00"]


# Writers


class Failing:
    """A writer whose every call fails, and counts."""

    def __init__(self, error: Exception) -> None:
        self.error, self.calls = error, 0

    def step(self, record: StepRecord) -> None:
        self.calls += 1
        raise self.error

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        self.step(RECORD)

    def event(self, step: int, name: str, facts: Mapping[str, Fact]) -> None:
        self.step(RECORD)

    def flush(self) -> None:
        self.step(RECORD)

    def close(self) -> None:
        self.step(RECORD)


def test_a_writer_that_fails_is_reported_once_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failing = Failing(OSError(errno.ENOSPC, "No space left on device"))
    path = tmp_path / "metrics.jsonl"
    writers = Writers({"disk": lambda _: failing, "metrics.jsonl": lambda start: Jsonl(path, start)})
    for step in (1, 2, 3):
        writers.step(replace(RECORD, step=step))
    writers.close()
    warning = "warning: disk is switched off for the rest of this run: [Errno 28] No space left on device\n"
    assert (failing.calls, capsys.readouterr().err) == (1, warning)
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3]


def test_a_run_folder_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    writers = open_writers(MetricsConfig(console="off"), tmp_path / "run", start_step=0, total_steps=1)
    writers.step(RECORD)
    writers.close()
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split(" is switched off")[0] for line in warnings] == ["warning: metrics.jsonl", "warning: tensorboard"]


def test_an_error_that_is_not_the_systems_passes() -> None:
    writers = Writers({"bug": lambda _: Failing(KeyError("loss"))})
    with pytest.raises(KeyError):
        writers.step(RECORD)


def test_a_stderr_that_is_gone_does_not_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Gone())
    failing = Failing(OSError(errno.EIO, "Input/output error"))
    writers = Writers({"console": lambda _: failing})
    writers.step(RECORD)
    writers.step(RECORD)
    assert failing.calls == 1


@pytest.mark.parametrize(
    ("config", "files"),
    [
        (MetricsConfig(console="off"), ["metrics.jsonl", "tensorboard"]),
        (MetricsConfig(console="off", tensorboard=False), ["metrics.jsonl"]),
        (MetricsConfig(console="off", jsonl=False, tensorboard=False), []),
    ],
)
def test_the_config_decides_which_files_there_are(tmp_path: Path, config: MetricsConfig, files: list[str]) -> None:
    open_writers(config, tmp_path, start_step=0, total_steps=1).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == files


# curve


def test_a_falling_line_is_drawn_dot_by_dot() -> None:
    falling = curve([4.0, 3.0, 2.0, 1.0], width=2, height=1)
    assert falling.splitlines()[0] == f"1.00 ┤{chr(0x2800 + 0x01 + 0x10)}{chr(0x2800 + 0x04 + 0x80)}"


def test_the_axes_name_the_losses_and_the_steps() -> None:
    assert curve([4.0, 3.0, 2.0, 1.0], width=12, height=3).splitlines() == [
        "4.00 ┤⠉⠒⠤⣀",
        "2.50 ┤    ⠉⠒⠤⣀",
        "1.00 ┤        ⠉⠒⠤⣀",
        "     └────────────",
        "      1     step 4",
    ]


def test_more_losses_than_dots_are_shown_by_their_means() -> None:
    noisy = [level + noise for level in (3.0, 2.0, 1.0, 1.0) for noise in (-0.5, 0.5)]
    assert curve(noisy, width=2, height=3).splitlines()[:3] == curve([3.0, 2.0, 1.0, 1.0], width=2, height=3).splitlines()[:3]


def test_what_is_not_finite_leaves_a_gap() -> None:
    broken = curve([2.0, 2.0, math.nan, math.nan, 1.0, 1.0], width=3, height=1)
    assert broken.splitlines()[0] == "1.00 ┤⠉ ⣀"


@pytest.mark.parametrize("losses", [[], [math.nan]])
def test_nothing_to_draw_is_said(losses: list[float]) -> None:
    assert curve(losses) == "(no finite loss to draw)"


@pytest.mark.parametrize("steps", [2, 79, 80, 81, 1000])
def test_a_curve_is_as_wide_as_was_asked_for(steps: int) -> None:
    rows = curve([9.0 / (1 + step) for step in range(steps)], width=40, height=8).splitlines()
    assert max(len(row) for row in rows) == len("9.00 ┤") + 40
