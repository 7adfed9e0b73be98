"""The record of a training step: how it is measured, and where it is written.

::

    Meter               times and totals of a step -> StepRecord     pure: its clock is given to it
    Jsonl, TensorBoard  StepRecord -> files in the run folder        on the first rank only

A step is numbered by how many steps are complete after it: the first is 1, and a checkpoint "of step s" holds what the steps
1 .. s did. On starting from it, what a killed run wrote about later steps is dropped, so that every step is recorded once.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from scaletrain import durable
from scaletrain.errors import ConfigError

ConsoleMode = Literal["auto", "bar", "lines", "off"]
Fact = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """What is recorded of a run, and where."""

    log_every: Annotated[int, Field(gt=0)] = 10
    """Steps between two plain console lines. A bar and the files get every step."""
    console: ConsoleMode = "auto"
    """`auto`: a progress bar on a terminal, lines elsewhere."""
    jsonl: bool = True
    """Append every step to `metrics.jsonl` in the run folder."""
    tensorboard: bool = True
    """Write TensorBoard events into `tensorboard/` in the run folder."""
    peak_tflops: Annotated[float | None, Field(gt=0)] = None
    """Peak of one device in TFLOP/s that MFU is a share of; when not given, the one known for the GPU's name, if any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTotals:
    """What one step consumed, summed over all ranks."""

    step: int  # steps complete after this one
    samples: int  # that the run has consumed after this step
    real_tokens: int
    padded_tokens: int  # token positions computed: the real tokens and the padding
    rounds: int  # slots that each rank ran one after the other
    filler_share: float  # zero-weight slots over all slots of the step
    digest: str = ""  # of its samples, as `data.ledger` makes it
    substituted: int = 0  # samples that could not be read, and that others stand in for
    retried: int = 0  # reads that had to be tried again


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One training step. Tokens are those of all ranks; times and memory are those of the rank that writes. Shares are 0 .. 1."""

    step: int
    samples: int
    loss: float
    terms: Mapping[str, float]
    learning_rate: float
    gradient_norm: float  # global, before clipping
    real_tokens: int
    real_tokens_per_second: float  # over the meter's window; evaluations and checkpoints between steps do not count
    padding_share: float  # padding over all token positions of the step
    step_s: float
    data_wait_s: float  # the part of step_s in which the step waited for its data
    eta_s: float  # of stepping left, at the window's pace
    mfu: float | None  # model FLOP utilisation of the assumed peak of all devices; None when no peak is known
    memory_bytes: int  # highest so far: allocated by torch on a GPU, resident memory of the process on CPU
    rounds: int
    filler_share: float
    skipped: str | None = None  # why the step was not taken
    digest: str = ""
    substituted: int = 0
    retried: int = 0


class Meter:
    """Times steps and turns their totals into records::

        meter.begin()
        ...                                          # wait for the batch, and take the step
        record = meter.record(totals, loss=..., terms=..., learning_rate=..., gradient_norm=..., wait_s=...)

    ``step_s`` is host time from ``begin`` to ``record``; on a GPU it means something because reading the gradient norm waits for
    the device. What happens between ``record`` and ``begin`` (evaluation, checkpoint) belongs to no step.

    ``flops_per_token`` is what the model needs forward and backward; ``peak_flops`` (FLOP/s) is that of all devices of the job
    together. MFU as in PaLM (Chowdhery et al. 2022, appendix B): real tokens/s * flops_per_token / peak_flops.
    """

    def __init__(
        self,
        total_steps: int,
        memory_bytes: Callable[[], int],
        flops_per_token: float = 0.0,
        peak_flops: float | None = None,
        window_steps: int = 20,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._total_steps = total_steps
        self._memory_bytes = memory_bytes
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._clock = clock
        self._window: deque[tuple[int, float]] = deque(maxlen=window_steps)  # (real tokens, seconds) of a step
        self._begun_at = clock()

    def begin(self) -> None:
        """A step begins, with the wait for its batch."""
        self._begun_at = self._clock()

    def record(
        self,
        totals: StepTotals,
        *,
        loss: float,
        terms: Mapping[str, float],
        learning_rate: float,
        gradient_norm: float,
        wait_s: float,
        skipped: str | None = None,
    ) -> StepRecord:
        """The step begun last is over. ``loss`` is the weighted sum of ``terms``; ``wait_s`` is what it waited for data."""
        step_s = self._clock() - self._begun_at
        self._window.append((totals.real_tokens, step_s))
        window_tokens = sum(tokens for tokens, _ in self._window)
        window_s = math.fsum(seconds for _, seconds in self._window)
        tokens_per_second = window_tokens / window_s if window_s else 0.0
        return StepRecord(
            step=totals.step,
            samples=totals.samples,
            loss=float(loss),
            terms=dict(terms),
            learning_rate=learning_rate,
            gradient_norm=float(gradient_norm),
            real_tokens=totals.real_tokens,
            real_tokens_per_second=tokens_per_second,
            padding_share=1 - totals.real_tokens / totals.padded_tokens if totals.padded_tokens else 0.0,
            step_s=step_s,
            data_wait_s=wait_s,
            eta_s=(self._total_steps - totals.step) * window_s / len(self._window),
            mfu=tokens_per_second * self._flops_per_token / self._peak_flops if self._peak_flops else None,
            memory_bytes=self._memory_bytes(),
            rounds=totals.rounds,
            filler_share=totals.filler_share,
            skipped=skipped,
            digest=totals.digest,
            substituted=totals.substituted,
            retried=totals.retried,
        )


# TFLOP/s of dense bf16 matrix products with fp32 accumulation, by words of the name that CUDA gives the GPU; the first match
# counts. All but the measured one are nominal and were not checked here: set metrics.peak_tflops to be sure.
_NOMINAL = "nominal, not measured here"
_PEAKS = {
    "H200": (790.0, "measured"),
    "B200": (2250.0, _NOMINAL),
    "GH200": (990.0, _NOMINAL),
    "H100 PCIe": (756.0, _NOMINAL),
    "H100 NVL": (835.0, _NOMINAL),
    "H100": (989.0, _NOMINAL),
    "A100": (312.0, _NOMINAL),
    "L40S": (362.0, _NOMINAL),
    "A10": (125.0, _NOMINAL),
    "L4": (121.0, _NOMINAL),
}


@dataclass(frozen=True, slots=True)
class Peak:
    """What one device is assumed to reach, and where the figure comes from, for the log."""

    tflops: float
    assumption: str


def device_peak(config: MetricsConfig, device_name: str | None) -> Peak | None:
    """The peak that MFU is a share of: the configured one, else the one known for the GPU's name, else none.

    ``device_name`` as ``torch.cuda.get_device_name`` gives it, None on CPU. A slice of a GPU (MIG) has no known peak.
    """
    if config.peak_tflops is not None:
        return Peak(config.peak_tflops, f"{config.peak_tflops:g} TFLOP/s per device, from metrics.peak_tflops")
    words = set(re.split(r"[^0-9A-Za-z]+", device_name or ""))
    if "MIG" in words:
        return None
    for gpu, (tflops, origin) in _PEAKS.items():
        if words.issuperset(gpu.split()):
            return Peak(tflops, f"{tflops:g} TFLOP/s per device, {origin}, dense bf16 on {gpu} (this is: {device_name})")
    return None


def peak_memory_bytes(device_type: str) -> int:
    """Highest memory use of this process so far: allocated by torch on ``cuda``, else resident (``getrusage``; on Linux
    never below the peak of the process that started this one).
    """
    if device_type == "cuda":
        import torch  # here, so that the config above can be read without torch

        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Writer(Protocol):
    """A place where records go. Every method may raise OSError; ``Writers`` sees to it."""

    def step(self, record: StepRecord) -> None: ...
    def evaluation(self, step: int, scores: Mapping[str, float]) -> None: ...
    def event(self, step: int, name: str, facts: Mapping[str, Fact]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Jsonl:
    """``metrics.jsonl``: one JSON object per line, of kind ``step``, ``eval`` or ``event``.

    Beside ``loss``, ``gradient_norm`` and ``scores`` stand twins named ``*_hex`` (``float.hex``), which compare two runs to the
    bit, and which tell nan from inf: both are null in the number itself, because JSON has no word for them.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        drop_later_lines(path, start_step)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", encoding="utf-8", opener=durable.own)  # noqa: SIM115

    def step(self, record: StepRecord) -> None:
        hexes = {"loss_hex": record.loss.hex(), "gradient_norm_hex": record.gradient_norm.hex()}
        self._append({"kind": "step", **asdict(record), **hexes})

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        hexes = {name: score.hex() for name, score in scores.items()}
        self._append({"kind": "eval", "step": step, "scores": dict(scores), "scores_hex": hexes})

    def event(self, step: int, name: str, facts: Mapping[str, Fact]) -> None:
        self._append({"kind": "event", "step": step, "name": name, "facts": dict(facts)})

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _append(self, row: Mapping[str, object]) -> None:
        self._file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
        self._file.flush()  # to the kernel: then the line outlives the process, if not the machine


def _finite(value: object) -> object:
    """The same JSON tree with null for every float that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a ``metrics.jsonl`` in order; a line that a kill has torn, or that nothing can read, is passed over."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with suppress(ValueError, RecursionError):
                yield json.loads(line)


def drop_later_lines(path: Path, start_step: int) -> None:
    """Cut a ``metrics.jsonl`` back to what a run that starts after ``start_step`` steps has behind it; 0 leaves nothing.

    Torn lines go too. The file is replaced in one rename: killed in between, it is the old one or the new one.
    """
    if not path.exists():
        return
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", opener=durable.own) as kept:
        kept.writelines(f"{json.dumps(row)}\n" for row in read_jsonl(path) if 0 < start_step >= row["step"])
        kept.flush()
        os.fsync(kept.fileno())
    temporary.replace(path)


class TensorBoard:
    """Scalars for TensorBoard. Steps after ``start_step`` that a killed run wrote into the same folder are purged on reading.

    Raises ConfigError when the package is not installed.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # here: slow to import, and may be missing
        except ImportError as error:
            rule, remedy = f"needs the tensorboard package ({error})", "Install tensorboard, or set metrics.tensorboard=false"
            raise ConfigError("metrics.tensorboard", True, rule, remedy) from error
        purge_step = start_step + 1 if start_step else 0  # afresh, what an evaluation wrote about step 0 goes too
        self._events = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)

    def step(self, record: StepRecord) -> None:
        scalars = {f"train/{name}": getattr(record, name) for name in ("loss", "learning_rate", "gradient_norm")}
        names = ("real_tokens_per_second", "padding_share", "step_s", "data_wait_s", "mfu", "memory_bytes")
        scalars |= {f"pace/{name}": getattr(record, name) for name in names}
        if len(record.terms) > 1:
            scalars |= {f"terms/{name}": value for name, value in record.terms.items()}
        self._add(record.step, {tag: value for tag, value in scalars.items() if value is not None})

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        self._add(step, {f"eval/{name}": score for name, score in scores.items()})

    def event(self, step: int, name: str, facts: Mapping[str, Fact]) -> None:
        self._events.add_text(f"events/{name}", "  ".join(f"{key}={value}" for key, value in facts.items()), step)

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()

    def _add(self, step: int, scalars: Mapping[str, float]) -> None:
        for tag, value in scalars.items():
            self._events.add_scalar(tag, value, step)
