"""The page of a lineage: what it knows, what later tasks did to earlier ones, what the gate said, what was published."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from scaletrain import errors
from scaletrain.report.chart import COLOURS
from scaletrain.report.content import (
    Block,
    Chart,
    Charts,
    Fact,
    Facts,
    Fold,
    HeatMap,
    Judgement,
    Mark,
    Metric,
    Metrics,
    Page,
    Passage,
    Section,
    Series,
    Table,
    Tone,
    Word,
)
from scaletrain.report.gate import COLUMNS, RULES
from scaletrain.report.run import Ending, Recorded, evaluations, losses, problem, settings_fold, standing
from scaletrain.report.scale import fixed, short

_CONCLUSIVE = {0, errors.RefusedError.exit_code, errors.UndecidedError.exit_code}
"""Exit codes of commands that brought an attempt to its end."""
MOST_CURVES = 2 * COLOURS
"""Tasks that can be told apart in one chart: each colour drawn through, and dashed."""
_TONES: dict[str, Tone] = {"published": "good", "refused": "bad", "abandoned": "bad", "rolled back": "bad"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One attempt at a task. ``accuracies``: task -> accuracy on it, as evaluated; empty before that."""

    name: str
    task: str
    base: str
    state: str
    """``begun``, ``trained``, ``evaluated``, ``judged``; then ``published``, ``refused``, ``undecided`` or ``abandoned``; and
    ``rolled back`` where that was done behind its publication.
    """
    since: str
    """When it came into its state."""
    accuracies: dict[str, float]
    judgement: Judgement | None = None
    recorded: Recorded | None = None

    @property
    def number(self) -> str:
        """``0003`` of ``0003-banking``."""
        return self.name.partition("-")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Figures that follow from the matrix of results of some stages, and which stages these are."""

    stages: str
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LineageRecord:
    """All that is known of a lineage. ``ledger``: (number, time, event, version, facts) of every entry."""

    name: str
    versions: tuple[Version, ...]
    published: str | None
    summaries: tuple[Summary, ...]
    ledger: tuple[tuple[str, str, str, str, str], ...]
    settings: str
    ending: Ending | None = None
    idle_s: float | None = None
    problems: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Every task that was evaluated, in the order of its first evaluation."""
        return tuple(dict.fromkeys(task for version in self.versions for task in version.accuracies))

    @property
    def evaluated(self) -> tuple[Version, ...]:
        return tuple(version for version in self.versions if version.accuracies)


def lineage_page(lineage: LineageRecord, origin: str, made: str) -> Page:
    """The page of a lineage, whether its last stage is under way or over."""
    status, detail = _standing(lineage)
    problems = tuple(map(problem, lineage.problems))
    sections = [Section(title="Overview", blocks=(*problems, Facts(facts=tuple(_overview(lineage)))))]
    if lineage.evaluated:
        sections.append(Section(title="Results", blocks=tuple(_results(lineage))))
    judged = [version.judgement for version in reversed(lineage.versions) if version.judgement]
    if judged:
        sections.append(Section(title="The gate", blocks=tuple(_gate(judged))))
    if lineage.versions:
        sections.append(Section(title="Versions", blocks=(_versions(lineage),)))
    if any(version.recorded for version in lineage.versions):
        sections.append(Section(title="Training", blocks=tuple(_training(lineage))))
    sections.append(Section(title="Records", blocks=tuple(_records(lineage))))
    return Page(
        title=lineage.name, kind="lineage", status=status, detail=detail, sections=tuple(sections), origin=origin, made=made
    )


def _standing(lineage: LineageRecord) -> tuple[Word, str]:
    """How the last attempt stands, and what is published meanwhile."""
    live = f"Published is {lineage.published}." if lineage.published else "Nothing is published yet."
    if not lineage.versions:
        return Word(text="empty", tone="open"), live
    last = lineage.versions[-1]
    if last.state in ("begun", "trained", "evaluated", "judged"):
        word, said = standing(lineage.ending, lineage.idle_s)
        return word, f"{said} {last.name} is {last.state} and not concluded. {live}"
    said = f"{last.name} was the last attempt. {live}"
    if lineage.ending and lineage.ending.code not in _CONCLUSIVE:
        word, how = standing(lineage.ending, None)
        said += f" A command since: {word.text}, {how}"
    return _word(last.state), said


def _word(state: str) -> Word:
    return Word(text=state, tone=_TONES.get(state, "open"))


def _overview(lineage: LineageRecord) -> Iterator[Fact]:
    states = [version.state for version in lineage.versions]
    live = next((version for version in lineage.versions if version.name == lineage.published), None)
    yield Fact(name="published", value=lineage.published or "nothing", note=f"since {live.since}" if live else "")
    if live and live.accuracies:
        worst = min(live.accuracies, key=lambda task: live.accuracies[task])
        yield Fact(name="tasks it knows", value=f"{len(live.accuracies)}")
        yield Fact(name="its average accuracy", value=fixed(fmean(live.accuracies.values())), note="on test examples")
        yield Fact(name="its worst task", value=fixed(live.accuracies[worst]), note=worst)
    yield Fact(name="attempts", value=f"{len(states)}")
    for state in ("published", "refused", "undecided", "abandoned", "rolled back"):
        if state in states:
            yield Fact(name=f"of them {state}", value=f"{states.count(state)}")


# ----------------------------------------------------------------------------------------------------------------------- results


def _results(lineage: LineageRecord) -> Iterator[Block]:
    evaluated, tasks = lineage.evaluated, lineage.tasks
    yield HeatMap(
        caption="R: accuracy on the test examples of each task (column) after each stage (row)",
        corner="after / on",
        rows=tuple(
            version.name if version.state == "published" else f"{version.name} ({version.state})" for version in evaluated
        ),
        columns=tasks,
        cells=tuple(tuple(version.accuracies.get(task) for task in tasks) for version in evaluated),
    )
    for summary in lineage.summaries:
        yield Metrics(caption=f"Summary figures of {summary.stages}", metrics=summary.metrics)
    yield Charts(charts=(_over_time(evaluated, tasks),))


def _over_time(versions: Sequence[Version], tasks: Sequence[str]) -> Chart:
    """Accuracy after each stage: of each task, or of many tasks what can be told apart of them."""
    many = len(tasks) > MOST_CURVES
    return Chart(
        title="Accuracy of all tasks over time" if many else "Accuracy of each task over time",
        unit="share of the test examples; each task's own is in the table above" if many else "share of its test examples",
        series=_of_many(versions) if many else _of_each(versions, tasks),
        places=tuple(version.name for version in versions),
        x_name="after stage",
        shares=True,
        wide=True,
    )


def _of_each(versions: Sequence[Version], tasks: Sequence[str]) -> tuple[Series, ...]:
    """A curve per task, and the mean over those that the stage knew."""
    curves = []
    for task in tasks:
        points = [(at, version.accuracies[task]) for at, version in enumerate(versions) if task in version.accuracies]
        curves.append(Series(name=task, x=[at for at, _ in points], y=[value for _, value in points], dotted=True))
    if len(tasks) > 1:
        means = [fmean(version.accuracies.values()) for version in versions]
        curves.append(Series(name="mean of the tasks known", x=range(len(versions)), y=means, dotted=True, leading=True))
    return tuple(curves)


def _of_many(versions: Sequence[Version]) -> tuple[Series, ...]:
    """The accuracies of the tasks that a stage knew as one curve with its band, and the lowest of them with its name."""
    points = [(at, value) for at, version in enumerate(versions) for value in version.accuracies.values()]
    worst = [min(version.accuracies, key=version.accuracies.__getitem__) for version in versions]
    lowest = [version.accuracies[task] for version, task in zip(versions, worst, strict=True)]
    known = Series(
        name="mean and range of the tasks known",
        x=[at for at, _ in points],
        y=[value for _, value in points],
        dotted=True,
        leading=True,
    )
    name = f"lowest task, at last {worst[-1]}"
    return known, Series(name=name, x=range(len(versions)), y=lowest, dotted=True, notes=worst)


# --------------------------------------------------------------------------------------------------------------- gate, versions


def _gate(judged: Sequence[Judgement]) -> Iterator[Block]:
    """The newest verdict in full, those before it folded."""
    yield judged[0]
    for each in judged[1:]:
        yield Fold(title=each.candidate, word=each.verdict, blocks=(each,))
    columns = Table(caption="columns of the gate", header=("column", "meaning"), rows=COLUMNS)
    yield Fold(title="How the gate decides", blocks=(Passage(text=RULES), columns))


def _versions(lineage: LineageRecord) -> Table:
    rows = []
    for version in lineage.versions:
        known = fixed(fmean(version.accuracies.values())) if version.accuracies else ""
        own = version.accuracies.get(version.task)
        state = _word(version.state)
        if version.state == "published" and version.name != lineage.published:
            state = Word(text="published before")
        row = (version.name, version.task, version.base, state, "" if own is None else fixed(own), known, version.since)
        rows.append(row)
    return Table(
        caption="versions",
        header=("version", "task", "built on", "state", "accuracy on its task", "mean accuracy", "since"),
        rows=tuple(rows),
        figures=frozenset({"accuracy on its task", "mean accuracy"}),
    )


# ---------------------------------------------------------------------------------------------------------------------- training


def _training(lineage: LineageRecord) -> Iterator[Block]:
    stages = [(version, version.recorded) for version in lineage.versions if version.recorded]
    begun = [(version, recorded) for version, recorded in stages if recorded.columns.get("loss")]
    if len(begun) > 1:
        yield Charts(charts=(_one_after_the_other(begun),))
    for version, recorded in stages:
        charts = (*losses(recorded), *evaluations(recorded))
        yield Fold(title=f"{version.name}, {_length(recorded)}", blocks=(Charts(charts=charts),), opened=version.state == "begun")


def _length(recorded: Recorded) -> str:
    return f"{recorded.steps[-1]:,.0f} steps" if recorded.steps else "no step yet"


def _one_after_the_other(stages: Sequence[tuple[Version, Recorded]]) -> Chart:
    """The loss of all stages along one axis; a mark where each begins."""
    x, y, marks, before = array("d"), array("d"), [], 0.0
    for version, recorded in stages:
        marks.append(Mark(x=before, letters=version.number, meaning=f"{version.name} begins"))
        x.extend(before + step for step in recorded.steps)
        y.extend(recorded.columns["loss"])
        before = x[-1]
    series = (Series(name="training", x=x, y=y),)
    return Chart(
        title="Loss, stage after stage", unit="nats", series=series, marks=tuple(marks), may_be_logarithmic=True, wide=True
    )


def _records(lineage: LineageRecord) -> Iterator[Block]:
    header = ("n", "time (UTC)", "event", "version", "facts")
    table = Table(caption="ledger", header=header, rows=lineage.ledger, figures=frozenset({"n"}))
    yield Fold(title=f"ledger, {short(len(lineage.ledger))} entries", blocks=(table,))
    if lineage.settings:
        yield settings_fold(lineage.settings)
