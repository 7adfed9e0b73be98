"""What a person sees of a run: one bar that is redrawn in place, or plain lines, and a loss curve drawn in text.

``open_writers`` puts the console and the files of ``metrics`` together as the ``Writers`` of a run.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, TextIO

from tqdm import tqdm

from scaletrain.train.metrics import ConsoleMode, Fact, Jsonl, MetricsConfig, StepRecord, TensorBoard, Writer


class Terminal:
    """A stream of text for people, with a progress bar at its foot where the stream can redraw one.

    ``auto`` draws the bar on a terminal, and prints lines into a file or a pipe: there a bar would leave thousands of
    half-lines. Only ``line`` writes when there is no bar.
    """

    def __init__(self, mode: ConsoleMode, total_steps: int, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.has_bar = mode == "bar" or (mode == "auto" and _can_redraw(self.stream))
        self._total_steps = total_steps
        self._bar: tqdm[NoReturn] | None = None

    def draw(self, step: int, text: str) -> None:
        """Move the bar to ``step`` and show ``text`` at its right; raises OSError when the stream is gone."""
        if self._bar is None:  # rate and ETA come with the text: tqdm's are smoothed over redraws, and not over steps
            layout = "{n_fmt}/{total_fmt} {bar} {desc}"
            self._bar = tqdm(total=self._total_steps, initial=step, file=self.stream, bar_format=layout, dynamic_ncols=True)
        self._bar.n = step
        self._bar.set_description_str(text)

    def line(self, text: str) -> None:
        """Print one line, above the bar if there is one; raises OSError when the stream is gone."""
        if self._bar is not None:
            self._bar.clear()
        self.stream.write(f"{text}\n")
        self.stream.flush()
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it stands and go to the next line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _can_redraw(stream: TextIO) -> bool:
    """Whether this is a terminal that can go back in a line and knows its size (some containers' terminals have 0 x 0)."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and min(os.get_terminal_size(stream.fileno())) > 0


def count(value: float) -> str:
    """A count in three digits: ``950``, ``12.4k``, ``1.23M``."""
    for divisor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * divisor:  # where three digits of the smaller unit would round up to 1000
            scaled = value / divisor
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{suffix}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """A time left or taken: ``0:42``, ``2:13``, ``1:02:13``, ``3d 01:02``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class Console:
    """Steps as a moving bar, or as a line every ``log_every`` steps and at the last; evaluations and events as lines."""

    def __init__(self, terminal: Terminal, log_every: int, total_steps: int) -> None:
        self._terminal, self._log_every, self._total_steps = terminal, log_every, total_steps

    def step(self, record: StepRecord) -> None:
        wait = record.data_wait_s / record.step_s if record.step_s else 0.0
        pace = f"{count(record.real_tokens_per_second)} tok/s  pad {record.padding_share:.1%}  wait {wait:.1%}"
        head, tail = f"loss {record.loss:.4f}  lr {record.learning_rate:.1e}", f"eta {duration(record.eta_s)}"
        if self._terminal.has_bar:
            self._terminal.draw(record.step, f"{head}  {pace}  {tail}")
        elif record.step % self._log_every == 0 or record.step == self._total_steps:
            mfu = "" if record.mfu is None else f"  mfu {record.mfu:.1%}"
            self._terminal.line(
                f"step {record.step:>{len(str(self._total_steps))}}/{self._total_steps}  {head}"
                f"  norm {record.gradient_norm:.3g}  {pace}{mfu}  mem {count(record.memory_bytes)}B  {tail}"
            )

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        self._terminal.line(f"eval at step {step}:  " + "  ".join(f"{name} {score:.4f}" for name, score in scores.items()))

    def event(self, step: int, name: str, facts: Mapping[str, Fact]) -> None:
        self._terminal.line(f"{name} at step {step}" + "".join(f"  {key} {value}" for key, value in facts.items()))

    def flush(self) -> None:
        """Every line was flushed when it was written."""

    def close(self) -> None:
        self._terminal.close()


def curve(losses: Sequence[float], width: int = 64, height: int = 12) -> str:
    """Losses of the steps 1, 2, ... as a line in braille characters, with the loss on the left and the step below.

    ``width`` and ``height`` are those of the plotting area, in characters of 2 x 4 dots. With more losses than dots a dot column
    shows the mean of its losses, so that the noise of single steps does not fill the plot; what is not finite leaves a gap.
    """
    columns = _columns(losses, dots=2 * width)
    finite = [loss for loss in columns if math.isfinite(loss)]
    if not finite:
        return "(no finite loss to draw)"
    low, high = min(finite), max(finite)
    rows = _braille(_dots(columns, low, high, 4 * height), width, height)
    labels = _axis(low, high, height)
    margin = max(len(label) for label in labels.values())
    lines = [f"{labels.get(i, ''):>{margin}} {'┤' if i in labels else '│'}{row}".rstrip() for i, row in enumerate(rows)]
    last = f"step {len(losses)}"
    return "\n".join([*lines, f"{'':>{margin}} └{'─' * width}", f"{'':>{margin}}  1{last:>{max(width - 1, len(last) + 1)}}"])


def _columns(losses: Sequence[float], dots: int) -> list[float]:
    """One loss for each column of dots: the mean of those in it, or the straight line between two; nan in a gap."""
    if len(losses) < 2:
        return list(losses) * dots
    columns = []
    for column in range(dots):
        if len(losses) > dots:
            bucket = losses[column * len(losses) // dots : (column + 1) * len(losses) // dots]
            finite = [loss for loss in bucket if math.isfinite(loss)]
            columns.append(math.fsum(finite) / len(finite) if finite else math.nan)
        else:
            left, between = divmod(column * (len(losses) - 1), dots - 1)
            weight = between / (dots - 1)
            columns.append(losses[left] + weight * (losses[left + 1] - losses[left]) if between else losses[left])
    return columns


def _axis(low: float, high: float, height: int) -> dict[int, str]:
    """Row -> label: the loss at the top, in the middle and at the bottom, with as many decimals as tell them apart."""
    middle = height // 2
    if low == high:
        return {middle: f"{low:.3f}"}
    digits = min(6, max(1, 2 - math.floor(math.log10(high - low))))
    half = high - (high - low) * (4 * middle + 1.5) / (4 * height - 1)
    values = {0: high, middle: half, height - 1: low} if height > 2 else {0: high, height - 1: low}
    return {row: f"{value:.{digits}f}" for row, value in values.items()}


def _dots(columns: Sequence[float], low: float, high: float, rows: int) -> set[tuple[int, int]]:
    """(column, row from the top) of every dot, with each column joined to the one before it by a vertical run."""
    dots: set[tuple[int, int]] = set()
    before: int | None = None
    for column, loss in enumerate(columns):
        if not math.isfinite(loss):
            before = None
            continue
        row = round((high - loss) / (high - low) * (rows - 1)) if high > low else rows // 2
        start = row if before is None or before == row else before + (1 if row > before else -1)
        dots.update((column, y) for y in range(min(start, row), max(start, row) + 1))
        before = row
    return dots


def _braille(dots: set[tuple[int, int]], width: int, height: int) -> list[str]:
    """Text rows of a picture; the bit of a dot in its character is fixed by Unicode's block of braille patterns, U+2800."""
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
    cells = [[0] * width for _ in range(height)]
    for x, y in dots:
        cells[y // 4][x // 2] |= bits[y % 4][x % 2]
    return ["".join(chr(0x2800 + cell) if cell else " " for cell in row) for row in cells]


class Writers:
    """Several writers as one, none of which can stop the training.

    Each is made by its opener, from the number of steps that the run has behind it. The first OSError of a writer (a full disk,
    a terminal that is gone) is reported on stderr, and the writer is used no more. Any other exception is a bug and passes.
    ``Writers({})`` is that of the ranks that do not write.
    """

    def __init__(self, openers: Mapping[str, Callable[[int], Writer]], start_step: int = 0) -> None:
        self._openers = openers
        self._writers: dict[str, Writer] = {}
        self._open(start_step)

    def _open(self, start_step: int) -> None:
        for name, opener in self._openers.items():
            with self._switched_off_on_error(name):
                self._writers[name] = opener(start_step)

    def rewind(self, step: int) -> None:
        """Drops what was written about later steps than ``step``: the run goes on from there."""
        self.close()
        self._open(step)

    def step(self, record: StepRecord) -> None:
        self._each(lambda writer: writer.step(record))
        if record.skipped:
            self.event(record.step, "skipped", reason=record.skipped)

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Results of an evaluation after ``step`` steps, by the name of the score."""
        self._each(lambda writer: writer.evaluation(step, scores))

    def event(self, step: int, name: str, **facts: Fact) -> None:
        """Something that happened after ``step`` steps: a start, a checkpoint, a skipped step."""
        self._each(lambda writer: writer.event(step, name, facts))

    def flush(self) -> None:
        """Bring everything written so far to the disk. Before a checkpoint: what it follows must not be lost after it."""
        self._each(lambda writer: writer.flush())

    def close(self) -> None:
        self._each(lambda writer: writer.close())
        self._writers.clear()

    def _each(self, act: Callable[[Writer], None]) -> None:
        for name, writer in list(self._writers.items()):
            with self._switched_off_on_error(name):
                act(writer)

    @contextmanager
    def _switched_off_on_error(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writers.pop(name, None)
            with suppress(OSError):  # stderr itself may be what failed: then nobody is left to tell
                print(f"warning: {name} is switched off for the rest of this run: {error}", file=sys.stderr, flush=True)


def open_writers(config: MetricsConfig, run: Path, *, start_step: int, total_steps: int) -> Writers:
    """The writers that the config asks for, in the folder of a run that starts after ``start_step`` steps (0: afresh).

    Raises ConfigError when TensorBoard is asked for and is not installed.
    """
    openers: dict[str, Callable[[int], Writer]] = {}
    if config.console != "off":
        openers["console"] = lambda _: Console(Terminal(config.console, total_steps), config.log_every, total_steps)
    if config.jsonl:
        openers["metrics.jsonl"] = lambda start: Jsonl(run / "metrics.jsonl", start)
    if config.tensorboard:
        openers["tensorboard"] = lambda start: TensorBoard(run / "tensorboard", start)
    return Writers(openers, start_step)
