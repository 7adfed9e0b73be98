"""A lineage at work: one task after another is onboarded onto it, by whichever verb."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scaletrain import dist
from scaletrain.config import dump, load_tree, to_tree
from scaletrain.continual import metrics
from scaletrain.continual.gate import require_decisive, require_known
from scaletrain.continual.lifecycle import ABANDONED, Attempt, Lifecycle, accuracies, in_order, under_way
from scaletrain.continual.store import ROLLED_BACK, Store
from scaletrain.data import labelled
from scaletrain.data.freeze import freeze, frozen_digest, thaw
from scaletrain.data.labelled import Labelled
from scaletrain.errors import ConfigError, CorpusError, RefusedError, UndecidedError
from scaletrain.recipes.onboarding import LineageConfig, Onboarding
from scaletrain.recipes.starting import TaskConfig, digest_of, frozen, model_folder
from scaletrain.train.control import Session, StopRequest


def require_fit(config: LineageConfig, tasks: Mapping[str, Labelled]) -> None:
    """Raises CorpusError or ConfigError for tasks that cannot be learned, evaluated or judged together."""
    first, *_ = tasks.values()
    for name, data in tasks.items():
        if not data.splits["test"]:
            rule = "a stream is evaluated on the test split of every task"
            raise CorpusError(f"task {name}: data.test", "no examples", rule, "Give it files, or data.test_fraction above 0")
        if config.scenario == "domain" and data.labels != first.labels:
            different = ", ".join(sorted(set(data.labels) ^ set(first.labels))[:5])
            rule = f"domain-incremental tasks share one set of labels; in one only: {different}"
            raise ConfigError(f"task {name}: labels", list(data.labels)[:20], rule, "Map the labels, or use scenario: class")
    if config.gate is not None:
        require_decisive(config.gate, {name: len(data.splits["gate"]) for name, data in tasks.items()})


class Stream:
    """The lineage in one folder. Every method is collective."""

    def __init__(self, config: LineageConfig, folder: Path, session: Session, stop: StopRequest) -> None:
        self._config, self._session, self._stop = config, session, stop
        self._store = Store(folder)
        self._lifecycle = Lifecycle(self._store, config.gate)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The lineage may be changed inside, by this job alone: the session has the folder's lease."""
        lock = self._store.hold(self._session.lease)
        dist.from_first("taking the lineage", lock.__enter__)
        try:
            dist.from_first("opening the lineage", self._open)
            yield
        finally:
            if dist.rank() == 0:
                lock.__exit__(None, None, None)

    def adopted(self) -> str | None:
        """The task that the model has learned which the lineage starts from, where that is a fine-tuning run.

        Raises ConfigError for a lineage that was begun from something else: one model cannot take over another's place in it.
        """
        start = Path(self._config.model.start)
        if not (start / "task" / "task.json").exists() or model_folder(start) is None:
            return None
        name = str(load_tree(start / "config.yaml")["task"]["name"])
        first = next((entry["task"] for entry in self._lifecycle.entries() if entry["event"] == "begun"), name)
        if first != name:
            rule = f"it has learned {name!r}, and this lineage was begun with {first!r}"
            raise ConfigError("model.start", str(start), rule, "Set it back, or begin another lineage in another folder")
        return name

    def look_ahead(self, tasks: Sequence[TaskConfig]) -> None:
        """Reads all that is still to be learned: the last task's files should not be found wanting after a week."""
        learned, going, adopted = self._learned(self._base()), self._lifecycle.under_way(), self.adopted()
        begun = [*learned, *([going.task] if going else [])]
        new = [task for task in tasks if task.name not in begun and self._lifecycle.concluded(task.name) is None]

        def look() -> None:
            folders = {task: self._store.task_folder(task) for task in begun}
            if adopted is not None:
                folders.setdefault(adopted, Path(self._config.model.start) / "task")
            known = {task: thaw(folder) for task, folder in folders.items()}
            coming = {task.name: labelled.read(task.data) for task in new}
            if known | coming:
                require_fit(self._config, known | coming)

        dist.from_first("looking at the tasks to come", look)

    def check_limits(self, tasks: Sequence[str]) -> None:
        """Raises ConfigError for a limit of the gate's on a task that is neither one of ``tasks`` nor the lineage's."""
        if self._config.gate is not None:
            begun = [entry["task"] for entry in self._lifecycle.entries() if entry["event"] == "begun"]
            require_known(self._config.gate, list(dict.fromkeys([*tasks, *begun])))

    def onboard(self, name: str, task: TaskConfig | None, *, retry: bool = False) -> str:
        """Learns a task, or the rest of it; returns how it ended: published, refused or undecided.

        ``task`` is None for the one that was adopted. A task that was concluded is not learned again, unless ``retry`` is true
        and what is published has not learned it: it was refused, or rolled back. Raises RefusedError or UndecidedError unless
        ``on_refusal`` is ``continue``.
        """
        self._stop.check()
        event = self._lifecycle.concluded(name)
        gone = event is not None and name not in self._learned(self._published())
        if event is None or (retry and gone):
            base = self._base(name)
            learned = self._learned(base)
            self._require_new(name, learned, base)
            data = self._data(name, task)
            require_fit(self._config, {each: thaw(self._store.task_folder(each)) for each in learned} | {name: data})
            attempt = self._lifecycle.begin(name, self._digest(name, base), base)
            # Not before: settings that cannot be used must not take the place of those that `onboard` goes on with.
            dist.from_first("noting the settings", lambda: dump(self._config, self._store.folder / "config.yaml"))
            work = Onboarding(self._config, self._store, attempt, self._session, self._stop, adopted=task is None)
            event = self._lifecycle.conclude(attempt, work)
            work.close()
            self._settle(attempt)
        elif dist.rank() == 0:
            since = ", but it was rolled back since (--retry learns it again)" if gone and event == "published" else ""
            print(f"{name}: {event} before{since}; nothing is trained", flush=True)
        if event != "published" and self._config.on_refusal == "stop":
            raise self._refusal(name, event)
        return event

    def standing(self) -> dict[str, Any]:
        """What is published, and its figures."""
        version = self._published()
        scores = dist.from_first("reading a version", lambda: self._store.evaluation(version)["test"] if version else {})
        return {"published": version, "test": scores}

    def abandon(self) -> None:
        """Gives up the onboarding that is under way, if any is; what is published stays."""
        given_up = self._lifecycle.abandon()
        if given_up is not None and dist.rank() == 0:
            print(f"version {given_up.version} was given up", flush=True)

    def result(self, tasks: Sequence[str]) -> dict[str, Any]:
        """The figures of the stream so far, with R; printed on rank 0 with the formulas."""
        entries = self._lifecycle.entries()
        known = in_order(entries, tasks)
        rows = accuracies(entries, known)
        if dist.rank() == 0:
            print("\n" + metrics.table(rows, known), flush=True)
        return {
            "tasks": known,
            "R": rows,
            **metrics.summary(rows),
            "gate": {task: self._lifecycle.concluded(task) for task in tasks},
            "published": self._published(),
        }

    def _open(self) -> None:
        """Checks that what is there is a whole lineage with these settings, and drops what stages that are over have left."""
        self._store.published()
        if (known := self._store.folder / "config.yaml").exists():
            before = load_tree(known)
            for path, mine in (("scenario", self._config.scenario), ("model.pooling", self._config.model.pooling)):
                theirs: Any = before
                for key in path.split("."):
                    theirs = theirs[key]
                if theirs != mine:
                    rule = f"this lineage was begun with {theirs!r}"
                    raise ConfigError(path, mine, rule, "Set it back, or begin another lineage in another folder")
        going = under_way(self._store.entries())
        for left in self._store.folder.glob("work/*/checkpoints"):
            if going is None or left.parent.name != going.version:
                shutil.rmtree(left)

    def _base(self, name: str | None = None) -> str | None:
        """The version that the next task, perhaps ``name`` once more, builds on."""
        if (going := self._lifecycle.under_way()) is not None:
            return going.base
        entries = self._lifecycle.entries()
        if self._config.on_refusal == "continue":
            given_up = {entry["version"] for entry in entries if entry["event"] == ABANDONED}
            own = {entry["version"] for entry in entries if entry["event"] == "begun" and entry["task"] == name}
            seen = [entry["version"] for entry in entries if entry["event"] in ("evaluated", ROLLED_BACK)]
            newest = [version for version in seen if version not in given_up | own]
            if newest:
                return str(newest[-1])
        return self._published()

    def _published(self) -> str | None:
        found: str | None = dist.from_first("reading what is published", self._store.published)
        return found

    def _data(self, name: str, task: TaskConfig | None) -> Labelled:
        folder = self._store.task_folder(name)
        if task is not None:
            going = self._lifecycle.under_way()
            return frozen(task, folder, begun=going is not None and going.task == name)

        def copy() -> None:
            freeze(thaw(Path(self._config.model.start) / "task"), folder)

        dist.from_first("taking the task's examples over", copy)
        return thaw(folder)

    def _require_new(self, name: str, learned: Sequence[str], base: str | None) -> None:
        """Raises ConfigError, before the task's data is touched, for one that cannot be begun."""
        self._lifecycle.require_free(name)
        if name in learned:
            rule = f"version {base} has learned it already"
            raise ConfigError("task.name", name, rule, "Choose another name: a task with new data is a new task")

    def _learned(self, version: str | None) -> list[str]:
        found: list[str] = dist.from_first(
            "reading a version", lambda: list(self._store.evaluation(version)["tasks"]) if version else []
        )
        return found

    def _digest(self, name: str, base: str | None) -> str:
        """Of all that the candidate follows from."""
        tree = to_tree(self._config)
        tree["compute"] = tree["compute"]["max_tokens"]
        for section in ("gate", "on_refusal", "control"):
            del tree[section]
        for section in ("checkpoint", "metrics", "guard"):
            del tree["training"][section]
        return digest_of(repr(tree), frozen_digest(self._store.task_folder(name)), str(base))

    def _settle(self, attempt: Attempt) -> None:
        """Says what the gate said, and drops the stage's checkpoints: the version has the weights."""

        def settle() -> None:
            print("\n".join(self._verdict(attempt.version)["lines"]), flush=True)
            shutil.rmtree(self._store.work_folder(attempt.version) / "checkpoints", ignore_errors=True)

        dist.from_first("settling", settle)

    def _verdict(self, version: str) -> dict[str, Any]:
        judged = [entry for entry in self._store.entries() if entry["event"] == "judged" and entry["version"] == version]
        return dict(judged[-1]["verdict"])

    def _refusal(self, name: str, event: str) -> RefusedError | UndecidedError:
        def lines() -> list[str]:
            version = [entry["version"] for entry in self._store.entries() if entry.get("task") == name][-1]
            return list(self._verdict(version)["lines"])

        kind = RefusedError if event == "refused" else UndecidedError
        text = "\n".join(dist.from_first("reading the verdict", lines))
        return kind(f"{text}\n{name} was not published; what was published before still is. --retry tries it again")
