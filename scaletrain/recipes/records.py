"""What the folder of a run or of a lineage says, for a page about it. Nothing is locked, and what is torn is passed over."""

from __future__ import annotations

import json
import math
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from scaletrain import outside, report
from scaletrain.config import load_tree
from scaletrain.continual import metrics, store
from scaletrain.continual.ledger import Ledger
from scaletrain.errors import CheckpointError, ConfigError
from scaletrain.report import (
    Ending,
    Event,
    FinalTest,
    GateRow,
    Judgement,
    LineageRecord,
    Metric,
    Recorded,
    RunRecord,
    Summary,
    Version,
)
from scaletrain.train.metrics import read_jsonl

RUN_FILES = ("metrics.jsonl", "exit.json")
"""By which a run's folder is known."""
LARGEST = 1e100
"""Numbers from here on are taken for infinite: no tensor holds them, and no axis needs to."""

# ------------------------------------------------------------------------------------------------------------------------- a run


def read_run(folder: Path, now: float) -> RunRecord:
    """What a run's folder says. ``now``: seconds since the epoch."""
    problems: list[str] = []
    file = folder / "metrics.jsonl"
    recorded, idle_s = Recorded(columns={}, scores={}), None
    if file.is_file():
        recorded, idle_s = read_metrics(file), max(0.0, now - file.stat().st_mtime)
    else:
        problems.append("There is no metrics.jsonl, so that nothing is known of its steps (metrics.jsonl=false?).")
    total = _tree(folder / "config.yaml", problems).get("steps")
    return RunRecord(
        name=folder.resolve().name,
        recorded=recorded,
        settings=_text(folder / "config.yaml"),
        total_steps=_whole(total),
        ending=_ending(folder / "exit.json", problems),
        idle_s=idle_s,
        tested=_tested(folder / "report.json", problems),
        problems=tuple(problems),
    )


FIGURES = (
    "samples",
    "loss",
    "learning_rate",
    "gradient_norm",
    "real_tokens",
    "real_tokens_per_second",
    "padding_share",
    "filler_share",
    "step_s",
    "data_wait_s",
    "eta_s",
    "mfu",
    "memory_bytes",
)
"""Of a step's line in ``metrics.jsonl``."""
SCORES = ("accuracy", "macro_f1", "weighted_f1", "loss")
"""Of the ``report.json`` of a fine-tuning run."""


def read_metrics(file: Path) -> Recorded:
    """The columns of a ``metrics.jsonl``. Lines that are torn, of no known kind, or not in order are passed over."""
    columns: dict[str, array[float]] = {name: array("d") for name in ("step", *FIGURES)}
    scores: dict[str, list[tuple[float, float]]] = {}
    events: list[Event] = []
    for line in read_jsonl(file):
        step = _number(line.get("step")) if isinstance(line, dict) else math.nan
        if not math.isfinite(step):
            continue
        match line:
            case {"kind": "step"} if not columns["step"] or step > columns["step"][-1]:
                _add_step(columns, step, line)
            case {"kind": "eval", "scores": dict(found)}:
                for name, value in found.items():
                    scores.setdefault(name, []).append((step, _number(value)))
            case {"kind": "event", "name": str(name), "facts": dict(facts)}:
                events.append(Event(step=step, name=name, facts=facts))
    return Recorded(columns=columns, scores=scores, events=tuple(events))


def _add_step(columns: dict[str, array[float]], step: float, line: Mapping[str, Any]) -> None:
    before = len(columns["step"])
    columns["step"].append(step)
    for name in FIGURES:
        columns[name].append(_number(line.get(name)))
    terms = line.get("terms")
    for name, value in (terms if isinstance(terms, dict) else {}).items():
        column = columns.setdefault(f"terms.{name}", array("d"))
        column.extend([math.nan] * (before - len(column)))
        column.append(_number(value))


def _number(value: object) -> float:
    """nan for what is not a number (null stands for a value that was not finite), or too large."""
    if isinstance(value, bool) or not isinstance(value, (float, int)) or not -LARGEST < value < LARGEST:
        return math.nan
    return float(value)


def _whole(value: object) -> int | None:
    """A count or a code; None for what is not a whole number, or too large to be one of anything."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e15 else None


def _tested(file: Path, problems: list[str]) -> FinalTest | None:
    """What a fine-tuning run measured at its end; None where it has not come to it, or is of another kind."""
    if not file.is_file():
        return None
    try:
        found = outside.read_json(file)
        return FinalTest(
            split=str(found["split"]),
            examples=_whole(found["examples"]),
            figures={name: _number(found[name]) for name in (*SCORES, "majority_baseline") if name in found},
            labels=tuple(
                (str(row["label"]), _number(row["precision"]), _number(row["recall"]), _number(row["f1"]), _whole(row["support"]))
                for row in found.get("labels", [])
            ),
            mistakes=tuple((str(row["true"]), str(row["predicted"]), _whole(row["count"])) for row in found.get("mistakes", [])),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problems.append(f"The final test cannot be read from {file.name} ({error!r}).")
        return None


def _ending(file: Path, problems: list[str]) -> Ending | None:
    if not file.is_file():
        return None
    with suppress(OSError, ValueError, RecursionError):
        record = outside.read_json(file)
        code = _whole(record.get("code")) if isinstance(record, dict) else None
        if code is not None:
            return Ending(code=code, step=_whole(record.get("step")), reason=str(record.get("reason", "")))
    problems.append(f"How it ended cannot be read from {file.name}.")
    return None


def _tree(file: Path, problems: list[str]) -> Mapping[str, Any]:
    try:
        return load_tree(file) if file.is_file() else {}
    except (ConfigError, ValueError, RecursionError) as error:
        problems.append(f"The settings cannot be read. {error}")
        return {}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


# --------------------------------------------------------------------------------------------------------------------- a lineage

STATES = ("begun", "trained", "evaluated", "judged", "published", "refused", "undecided")


def read_lineage(folder: Path, now: float) -> LineageRecord:
    """What a lineage's folder says. ``now``: seconds since the epoch."""
    problems: list[str] = []
    entries = _entries(folder / store.LEDGER, problems)
    stages = {file.parent.name: file for file in folder.glob("work/*/metrics.jsonl")}
    published, withdrawn = _publication(entries)
    versions = []
    for name in dict.fromkeys(str(entry["version"]) for entry in entries if "version" in entry):
        own = [entry for entry in entries if entry.get("version") == name]
        recorded = read_metrics(stages[name]) if name in stages else None
        version = _version(name, own, recorded, problems)
        versions.append(replace(version, state="rolled back") if name in withdrawn else version)
    if (pointed := _pointed(folder / store.POINTER)) != published:
        problems.append(f"The pointer to the published version says {pointed}, the ledger {published}: look into `history`.")
    return LineageRecord(
        name=folder.resolve().name,
        versions=tuple(versions),
        published=published,
        summaries=tuple(_summaries(versions, published)),
        ledger=tuple(map(_ledger_row, entries)),
        settings=_text(folder / "config.yaml"),
        ending=_ending(folder / "exit.json", problems),
        idle_s=max(0.0, now - max(file.stat().st_mtime for file in (folder / store.LEDGER, *stages.values()))),
        problems=tuple(problems),
    )


def _entries(file: Path, problems: list[str]) -> Sequence[Mapping[str, Any]]:
    """The ledger; of one that was altered, what can be read of it. A line that is being written does not count."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Ledger(file).entries()
        except (CheckpointError, RecursionError) as error:
            problems.append(f"The ledger was altered, and what this page says of it is not to be trusted. {error}")
    return [entry for entry in read_jsonl(file) if isinstance(entry, dict) and isinstance(entry.get("event"), str)]


def _publication(entries: Sequence[Mapping[str, Any]]) -> tuple[str | None, set[str]]:
    """The published version, and those that were rolled back and have not been published again."""
    published, withdrawn = None, set()
    for entry in entries:
        if entry["event"] in (store.PUBLISHED, store.ROLLED_BACK) and "version" in entry:
            if entry["event"] == store.ROLLED_BACK and published:
                withdrawn.add(published)
            published = str(entry["version"])
            withdrawn.discard(published)
    return published, withdrawn


def _pointed(file: Path) -> str | None:
    """The version that the pointer names."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return str(outside.read_json(file)["version"])
    return None


def _version(name: str, entries: Sequence[Mapping[str, Any]], recorded: Recorded | None, problems: list[str]) -> Version:
    """One attempt at a task, from the entries about it, in order."""
    facts: dict[str, Any] = {}
    state, since, judgement = "begun", "", None
    for entry in entries:
        facts |= entry
        if entry["event"] in STATES:
            state, since = entry["event"], _time(entry)
        if entry["event"] == "judged":
            try:
                judgement = _judgement(name, entry)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                problems.append(f"What the gate said of {name} cannot be read from the ledger ({error!r}).")
    tasks, row = (facts[key] if isinstance(facts.get(key), list) else [] for key in ("tasks", "row"))
    return Version(
        name=name,
        task=str(facts.get("task", "")),
        base=str(facts.get("base") or "the encoder"),
        state="abandoned" if state == "refused" and facts.get("reason") == "abandoned" else state,
        since=since,
        accuracies={str(task): _number(value) for task, value in zip(tasks, row, strict=False) if math.isfinite(_number(value))},
        judgement=judgement,
        recorded=recorded,
    )


def _judgement(name: str, entry: Mapping[str, Any]) -> Judgement:
    """What the gate said, as `continual.gate.Verdict.to_json` has written it. Raises ValueError, KeyError, TypeError or
    AttributeError.
    """
    verdict, against = entry["verdict"], entry.get("against")
    uses = dict(entry.get("uses", {}))
    rows = [_gate_row(task, _optional(uses.get(task["task"]))) for task in verdict["tasks"]]
    return report.judgement(name, str(verdict["decision"]), rows, str(against) if against else None)


def _gate_row(task: Mapping[str, Any], uses: float | None) -> GateRow:
    return GateRow(
        task=str(task["task"]),
        examples=_optional(task["pairs"]),
        lost=_optional(task["lost"]),
        gained=_optional(task["gained"]),
        drop=_optional(task["drop"]),
        limit=_optional(task["limit"]),
        accuracy=_optional(task["accuracy"]),
        floor=_optional(task["floor"]),
        p_held=_optional(task["adjusted_held"]),
        p_broken=_optional(task["adjusted_broken"]),
        outcome=report.finding(str(task["status"]), compared=task["drop"] is not None),
        reason=str(task["reason"]),
        uses=uses,
    )


def _optional(value: object) -> float | None:
    """A number; None for what is none."""
    number = _number(value)
    return number if math.isfinite(number) else None


def _summaries(versions: Sequence[Version], published: str | None) -> Iterator[Summary]:
    """Figures of the stages that led to the published version and, if that is another one, to the last that was evaluated."""
    evaluated = [version for version in versions if version.accuracies]
    ends = [version for version in evaluated if version.name == published] + evaluated[-1:]
    for end in dict.fromkeys(version.name for version in ends):
        last = next(version for version in evaluated if version.name == end)
        results = _results(evaluated[: evaluated.index(last) + 1], list(last.accuracies))
        if results:
            found = metrics.summary(results)
            figures = tuple(
                Metric(name=name.replace("_", " "), value=value, formula=metrics.FORMULAS[name]) for name, value in found.items()
            )
            yield Summary(stages=f"the stages up to {end}", metrics=figures)


def _results(versions: Sequence[Version], tasks: Sequence[str]) -> list[list[float]]:
    """R of ``tasks``: row t is of the last version that was made for task t. Empty where a row is missing or too short."""
    rows = []
    for number, task in enumerate(tasks):
        made = [version for version in versions if version.task == task]
        row = [made[-1].accuracies[each] for each in tasks if each in made[-1].accuracies] if made else []
        if len(row) <= number:
            return []
        rows.append(row)
    return rows


def _ledger_row(entry: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    shown = {"n", "event", "at", "version", "previous", "sha256"}
    facts = {name: value for name, value in entry.items() if name not in shown}
    text = json.dumps(facts, ensure_ascii=False) if facts else ""
    return str(entry.get("n", "")), _time(entry), entry["event"], str(entry.get("version", "")), text


def _time(entry: Mapping[str, Any]) -> str:
    """When an entry was written, to the second."""
    return str(entry.get("at", "")).partition(".")[0].replace("T", " ").removesuffix("+00:00").removesuffix("Z")
