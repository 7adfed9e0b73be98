"""The page of one training run: how it stands, its curves, its evaluations, what happened to it, how it was set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, median

from scaletrain import errors
from scaletrain.report.content import Block, Chart, Charts, Fact, Facts, Fold, Mark, Page, Passage, Section, Series, Table, Word
from scaletrain.report.scale import duration, fixed, short, size

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "pair_loss"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened after ``step`` steps."""

    step: float
    name: str
    facts: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What a run has written down. ``columns``: name of a figure -> its value after each step (nan: not finite or not known);
    ``step`` is one of them, ascending. ``scores``: name of a score -> (step, value) of each evaluation.
    """

    columns: Mapping[str, Sequence[float]]
    scores: Mapping[str, Sequence[tuple[float, float]]]
    events: tuple[Event, ...] = ()

    @property
    def steps(self) -> Sequence[float]:
        return self.columns.get("step", ())

    def known(self, name: str) -> list[float]:
        """The finite values of a column."""
        return [value for value in self.columns.get(name, ()) if math.isfinite(value)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a run ended: what it left in its record."""

    code: int
    step: int | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalTest:
    """What was measured at the end, on examples that were kept for it."""

    split: str
    examples: int | None
    figures: Mapping[str, float]
    labels: tuple[tuple[str, float, float, float, int | None], ...] = ()
    """Label, precision, recall, F1, examples."""
    mistakes: tuple[tuple[str, str, int | None], ...] = ()
    """The label that was right, the one that was answered, how often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """All that is known of a run. ``ending`` None: it is going, or was killed; ``idle_s``: since it was last heard of."""

    name: str
    recorded: Recorded
    settings: str
    total_steps: int | None = None
    ending: Ending | None = None
    idle_s: float | None = None
    tested: FinalTest | None = None
    problems: tuple[str, ...] = ()


def run_page(run: RunRecord, origin: str, made: str) -> Page:
    """The page of a run, whether it is going, done or broken."""
    status, detail = standing(run.ending, run.idle_s)
    sections = [Section(title="Overview", blocks=(*map(problem, run.problems), Facts(facts=tuple(_overview(run)))))]
    if run.tested:
        sections.append(Section(title="Final test", blocks=tuple(_final_test(run.tested))))
    sections += [
        Section(title=title, blocks=(Charts(charts=tuple(charts)),))
        for title, charts in (
            ("Learning", learning(run.recorded)),
            ("Evaluations", evaluations(run.recorded)),
            ("Pace", _pace(run.recorded)),
        )
        if charts
    ]
    if run.recorded.events:
        sections.append(Section(title="Events", blocks=(events_table(run.recorded.events),)))
    if run.settings:
        sections.append(Section(title="Settings", blocks=(settings_fold(run.settings),)))
    return Page(
        title=run.name, kind="training run", status=status, detail=detail, sections=tuple(sections), origin=origin, made=made
    )


def standing(ending: Ending | None, idle_s: float | None) -> tuple[Word, str]:
    """A word on how a job stands, and the sentence after it."""
    if ending is None:
        heard = f" Last record {duration(idle_s)} before this page was made." if idle_s is not None else ""
        return Word(text="no end recorded", tone="open"), f"It is still going, or it was killed.{heard}"
    at = f"after step {'?' if ending.step is None else f'{ending.step:,}'}"
    if ending.code == 0:
        return Word(text="done", tone="good"), at
    if ending.code == errors.RequeueError.exit_code:
        return Word(text="stopped on request", tone="open"), f"{at}: {ending.reason}"
    return Word(text=f"failed, exit code {ending.code}", tone="bad"), f"{at}: {meaning(ending.code)} {ending.reason}"


def meaning(code: int) -> str:
    """The exit code in words: the first line about the first class of `scaletrain.errors` that has it; else nothing."""
    for cls in vars(errors).values():
        if isinstance(cls, type) and issubclass(cls, errors.ScaletrainError) and cls.exit_code == code != 70:
            return (cls.__doc__ or "").splitlines()[0]
    return ""


def problem(text: str) -> Passage:
    """Something that could not be read, or not be trusted."""
    return Passage(text=f"Careful: {text}")


def _overview(run: RunRecord) -> Iterator[Fact]:
    recorded = run.recorded
    steps = recorded.steps
    done = int(steps[-1]) if steps else 0
    share = f"{done / run.total_steps:.0%} of {run.total_steps:,}" if run.total_steps else ""
    yield Fact(name="steps", value=f"{done:,}", note=share)
    if losses := recorded.columns.get("loss"):
        yield Fact(name="training loss", value=short(losses[-1]), note=f"at first {short(losses[0])}")
    for name, points in recorded.scores.items():
        sign = 1 if name in LOWER_IS_BETTER else -1
        best = min(points, key=lambda point: sign * point[1] if math.isfinite(point[1]) else math.inf)
        note = f"best {short(best[1])} at step {best[0]:,.0f}, at first {short(points[0][1])}"
        yield Fact(name=f"{spaced(name)}, evaluated", value=short(points[-1][1]), note=note)
    if tokens := recorded.known("real_tokens"):
        yield Fact(
            name="tokens", value=short(math.fsum(tokens)), note=f"{short(max(recorded.known('samples'), default=None))} samples"
        )
    if paces := recorded.known("real_tokens_per_second"):
        yield Fact(name="tokens per second", value=short(median(paces)), note="median")
    yield from _times(run)
    if memory := recorded.known("memory_bytes"):
        yield Fact(name="peak memory", value=size(max(memory)), note="of the first rank")
    if mfu := recorded.known("mfu"):
        yield Fact(name="model FLOP utilisation", value=f"{median(mfu):.1%}", note="median")
    starts = [event for event in recorded.events if event.name == "start"]
    for name, value in starts[-1].facts.items() if starts else ():
        yield Fact(name=spaced(name), value=_plain(value))


def _times(run: RunRecord) -> Iterator[Fact]:
    taken = math.fsum(run.recorded.known("step_s"))
    if taken:
        waited = math.fsum(run.recorded.known("data_wait_s")) / taken
        yield Fact(name="time in steps", value=duration(taken), note=f"{waited:.1%} of it waiting for data")
    if padding := run.recorded.known("padding_share"):
        yield Fact(name="padding", value=f"{fmean(padding):.1%}", note="of all token positions")
    left = run.recorded.known("eta_s")
    if run.ending is None and left:
        yield Fact(name="time left", value=duration(left[-1]), note="of steps, at the last pace")


# ------------------------------------------------------------------------------------------------------------------------ charts


def learning(recorded: Recorded) -> list[Chart]:
    """Loss, learning rate and gradient norm."""
    charts = losses(recorded, wide=True)
    charts += _single(recorded, "learning_rate", "Learning rate", "")
    charts += _single(recorded, "gradient_norm", "Gradient norm", "global, before clipping", may_be_logarithmic=True)
    return charts


def losses(recorded: Recorded, *, wide: bool = False) -> list[Chart]:
    """The loss with its evaluations, and its terms where there are several."""
    curves = [_series(recorded, "loss", "training")] if recorded.columns.get("loss") else []
    if held_out := recorded.scores.get("loss"):
        curves.append(_scores("evaluated", held_out))
    terms = [_series(recorded, name, name.partition(".")[2]) for name in recorded.columns if name.startswith("terms.")]
    charts = []
    if curves:
        marks = restarts(recorded)
        charts.append(Chart(title="Loss", unit="nats", series=tuple(curves), marks=marks, may_be_logarithmic=True, wide=wide))
    if len(terms) > 1:
        charts.append(Chart(title="Terms of the loss", unit="nats, unweighted", series=tuple(terms), may_be_logarithmic=True))
    return charts


def evaluations(recorded: Recorded) -> list[Chart]:
    """Scores other than the loss: shares (0 to 1) in one chart, every other score in its own."""
    shares = {
        name: points
        for name, points in recorded.scores.items()
        if name not in LOWER_IS_BETTER and all(0 <= value <= 1 or math.isnan(value) for _, value in points)
    }
    charts = []
    if len(shares) > 1:
        series = tuple(_scores(spaced(name), points) for name, points in shares.items())
        charts.append(Chart(title="Scores", unit="share, evaluated", series=series, shares=True))
    for name, points in recorded.scores.items():
        if name != "loss" and (name not in shares or len(shares) == 1):
            series = (_scores(spaced(name), points),)
            share = name in shares
            unit = "share, evaluated" if share else "evaluated"
            charts.append(Chart(title=spaced(name).capitalize(), unit=unit, series=series, may_be_logarithmic=True, shares=share))
    return charts


def _pace(recorded: Recorded) -> list[Chart]:
    charts = _single(recorded, "real_tokens_per_second", "Throughput", "real tokens per second, all ranks")
    charts += _single(recorded, "step_s", "Time of a step", "seconds", may_be_logarithmic=True)
    shares = [("padding_share", "padding"), ("filler_share", "empty slots")]
    wasted = tuple(_series(recorded, column, name) for column, name in shares if recorded.known(column))
    if wasted:
        charts.append(Chart(title="Wasted computation", unit="share of token positions, of slots", series=wasted, shares=True))
    charts += _single(recorded, "data_wait_s", "Waiting for data", "seconds per step")
    if recorded.known("mfu"):
        charts += _single(recorded, "mfu", "Model FLOP utilisation", "share of the assumed peak")
    return charts


def _single(recorded: Recorded, column: str, title: str, unit: str, may_be_logarithmic: bool = False) -> list[Chart]:
    if not recorded.columns.get(column):
        return []
    series = (_series(recorded, column, title.lower()),)
    return [Chart(title=title, unit=unit, series=series, may_be_logarithmic=may_be_logarithmic)]


def _series(recorded: Recorded, column: str, name: str) -> Series:
    return Series(name=name, x=recorded.steps, y=recorded.columns[column])


def _scores(name: str, points: Sequence[tuple[float, float]]) -> Series:
    return Series(name=name, x=[step for step, _ in points], y=[value for _, value in points], dotted=True)


def restarts(recorded: Recorded) -> tuple[Mark, ...]:
    """Where the run was continued."""
    steps = sorted({event.step for event in recorded.events if event.name == "start" and event.step > 0})
    return tuple(
        Mark(x=step, letters="\N{ANTICLOCKWISE OPEN CIRCLE ARROW}", meaning=f"continued after step {step:,.0f}") for step in steps
    )


# ------------------------------------------------------------------------------------------------------------------------ tables


def events_table(events: Sequence[Event]) -> Block:
    """What happened, in order; equal ones that follow each other (checkpoints) are one line."""
    rows = []
    for (name, facts), group in groupby(events, key=lambda event: (event.name, _listed(event.facts))):
        same = list(group)
        first, last = f"{same[0].step:,.0f}", f"{same[-1].step:,.0f}"
        times = f" ({len(same)} times)" if len(same) > 1 else ""
        rows.append((first if len(same) == 1 else f"{first} to {last}", name + times, facts))
    return Table(caption="events", header=("step", "event", "facts"), rows=tuple(rows), figures=frozenset({"step"}))


def _final_test(tested: FinalTest) -> Iterator[Block]:
    yield Passage(text=f"On the {short(tested.examples)} examples of the {tested.split} split, with the weights that were kept.")
    yield Facts(facts=tuple(Fact(name=spaced(name), value=short(value)) for name, value in tested.figures.items()))
    if tested.labels:
        rows = tuple((label, fixed(p), fixed(r), fixed(f), short(n)) for label, p, r, f, n in tested.labels)
        header = ("label", "precision", "recall", "F1", "examples")
        table = Table(caption="labels", header=header, rows=rows, figures=frozenset(header[1:]))
        yield Fold(title=f"{len(rows)} labels", blocks=(table,), opened=len(rows) <= 20)
    if tested.mistakes:
        wrong = tuple((true, answered, short(count)) for true, answered, count in tested.mistakes)
        table = Table(
            caption="mistakes", header=("right would be", "answered", "times"), rows=wrong, figures=frozenset({"times"})
        )
        yield Fold(title="Most frequent mistakes", blocks=(table,))


def settings_fold(settings: str) -> Fold:
    """The settings as they were written into the run's folder."""
    return Fold(title="config.yaml", blocks=(Passage(text=settings, verbatim=True),))


def spaced(name: str) -> str:
    """``macro_f1`` -> ``macro f1``."""
    return name.replace("_", " ")


def _listed(facts: Mapping[str, object]) -> str:
    return ", ".join(f"{spaced(name)} {_plain(value)}" for name, value in facts.items())


def _plain(value: object) -> str:
    return short(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
