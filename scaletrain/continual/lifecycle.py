"""One more task: begun, trained, evaluated, judged, and then published or not.

::

    begun ─ train ─► trained ─ consolidate, evaluate, commit ─► evaluated ─ gate ─► judged ─┬► published
                                                                                            ├► refused
                                                                                            └► undecided

Each arrow ends with an entry in the ledger, and does nothing twice that could be seen: the version is committed by one rename,
the pointer to the published one is replaced by one rename. Killed anywhere, the same command takes up the first phase that has
no entry. What a phase does is passed in; here is only the order, and what is written down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from scaletrain import dist
from scaletrain.continual.gate import GateConfig, Verdict, judge
from scaletrain.continual.store import ROLLED_BACK, Store
from scaletrain.errors import ConfigError

CONCLUSIONS = {"accept": "published", "refuse": "refused", "undecidable": "undecided"}
"""Verdict of the gate -> the entry that ends an onboarding."""
ABANDONED = "abandoned"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One onboarding: which task, as which version, and on which version it builds (None: on the encoder)."""

    task: str
    version: str
    base: str | None
    digest: str
    """Of the task's data and of the settings: what may not change while it is under way."""


class Work(Protocol):
    """What the phases do. Every method is collective."""

    def train(self) -> Mapping[str, Any]:
        """Trains, or continues to; returns what the ledger should say of it. Raises RequeueError where it was asked to stop."""

    def build(self, folder: Path) -> Mapping[str, Any]:
        """Fills the folder of the version (rank 0 writes), its evaluation included; returns what the ledger should say."""


class Lifecycle:
    """The onboardings of one lineage. Every method is collective; rank 0 reads and writes, the others are told."""

    def __init__(self, store: Store, gate: GateConfig | None) -> None:
        self._store, self._gate = store, gate

    def entries(self) -> list[dict[str, Any]]:
        """The ledger."""
        found: list[dict[str, Any]] = dist.from_first(
            "reading the ledger", lambda: [dict(entry) for entry in self._store.entries()]
        )
        return found

    def under_way(self) -> Attempt | None:
        """The onboarding that was begun and not concluded."""
        return under_way(self.entries())

    def concluded(self, task: str) -> str | None:
        """The entry that ended the last attempt on a task; None where there was none, or it was given up, or is under way."""
        found = None
        for entry in self.entries():
            if entry.get("task") == task:
                found = entry["event"] if entry["event"] in CONCLUSIONS.values() else None
        return found

    def require_free(self, task: str) -> None:
        """Raises ConfigError where the onboarding of another task is under way."""
        going = self.under_way()
        if going is not None and going.task != task:
            raise _occupied(task, f"the task {going.task!r}", going)

    def begin(self, task: str, digest: str, base: str | None) -> Attempt:
        """A new attempt, or the one under way if it is this one. Raises ConfigError if it is another one."""
        self.require_free(task)
        going = self.under_way()
        if going is None:
            number = 1 + sum(entry["event"] == "begun" for entry in self.entries())
            attempt = Attempt(task, f"{number:04d}-{task}", base, digest)
            self._append("begun", task=task, version=attempt.version, base=base, digest=digest)
            return attempt
        if going.digest != digest:
            raise _occupied(task, "other settings or data", going)
        return going

    def abandon(self) -> Attempt | None:
        """Gives up what is under way, if anything is."""
        going = self.under_way()
        if going is not None:
            self._append(ABANDONED, task=going.task, version=going.version)
        return going

    def conclude(self, attempt: Attempt, work: Work) -> str:
        """Runs the phases that are left; returns the last entry's event: published, refused or undecided."""
        done = {entry["event"] for entry in self.entries() if entry.get("version") == attempt.version}
        if "trained" not in done:
            self._append("trained", version=attempt.version, **work.train())
        if "evaluated" not in done:
            facts = self._commit(attempt, work)
            self._append("evaluated", version=attempt.version, **facts)
        if "judged" not in done:
            verdict = self._judge(attempt)
            self._append("judged", version=attempt.version, **verdict)
        said = next(entry for entry in self.entries() if entry["event"] == "judged" and entry["version"] == attempt.version)
        event = CONCLUSIONS[said["verdict"]["decision"]]
        if event == "published":
            dist.from_first("publishing", lambda: self._store.publish(attempt.version, task=attempt.task))
        else:
            self._append(event, task=attempt.task, version=attempt.version)
        return event

    def _commit(self, attempt: Attempt, work: Work) -> Mapping[str, Any]:
        """Fills a folder beside the version's place, and puts it there by one rename."""
        partial = Path(dist.from_first("making room for a version", lambda: str(self._store.partial_version(attempt.version))))
        facts = work.build(partial)
        dist.from_first("committing a version", lambda: self._store.commit_version(attempt.version))
        return facts

    def _judge(self, attempt: Attempt) -> dict[str, Any]:
        """Compares the candidate with what is published, on the gate's split of every task that is live."""

        def said() -> dict[str, Any]:
            published = self._store.published()
            candidate = self._store.evaluation(attempt.version)["gate"]
            before = self._store.evaluation(published)["gate"] if published else {}
            verdict = judge(self._gate, before, candidate) if self._gate else Verdict("accept", ())
            said = verdict.to_json() | {"lines": [*verdict.lines, *([] if self._gate else ["there is no gate"])]}
            return {"against": published, "verdict": said, "uses": self._uses(list(candidate))}

        result: dict[str, Any] = dist.from_first("judging a version", said)
        return result

    def _uses(self, tasks: Sequence[str]) -> dict[str, int]:
        """How often the gate's split of each task has been used, this time included."""
        judged = [entry for entry in self._store.entries() if entry["event"] == "judged"]
        return {task: 1 + sum(task in entry["uses"] for entry in judged) for task in tasks}

    def _append(self, event: str, **facts: Any) -> None:
        dist.from_first(f"writing {event!r} into the ledger", lambda: self._store.append(event, **facts))


def _occupied(task: str, other: str, going: Attempt) -> ConfigError:
    rule = f"an onboarding with {other} is under way as version {going.version}"
    return ConfigError("task", task, rule, "Finish it with its own command, or give it up with --abandon")


def under_way(entries: Sequence[Mapping[str, Any]]) -> Attempt | None:
    """The attempt that was begun last, unless it was concluded or given up, or the lineage was rolled back since."""
    found = None
    for entry in entries:
        if entry["event"] == "begun":
            found = Attempt(entry["task"], entry["version"], entry["base"], entry["digest"])
        elif entry["event"] in (*CONCLUSIONS.values(), ABANDONED, ROLLED_BACK):
            found = None
    return found


def in_order(entries: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[str]:
    """Those of ``tasks`` that the last candidate for any of them knows, in the order in which it learned them."""
    found: list[str] = []
    for entry in entries:
        if entry["event"] == "evaluated" and entry["tasks"][-1] in tasks:
            found = [task for task in entry["tasks"] if task in tasks]
    return found


def accuracies(entries: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[list[float]]:
    """R of tasks ``in_order``: row t holds the accuracy on ``tasks[: t + 1]`` of the last candidate for ``tasks[t]``."""
    rows: dict[str, dict[str, float]] = {}
    for entry in entries:
        if entry["event"] == "evaluated":
            rows[entry["tasks"][-1]] = dict(zip(entry["tasks"], entry["row"], strict=True))
    return [[rows[last][task] for task in tasks[: place + 1]] for place, last in enumerate(tasks)]
