"""An onboarding, killed at every point at which it can be told apart, ends as if it had never been."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from scaletrain import durable
from scaletrain.continual.gate import GateConfig
from scaletrain.continual.lifecycle import Lifecycle, accuracies
from scaletrain.continual.store import Store
from scaletrain.errors import ConfigError

GATE = GateConfig(max_drop=0.1)


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class Fake:
    """Work whose outcome on each task is given: how many of its 200 gate examples are right."""

    def __init__(self, right: Mapping[str, int], die_in: str = "") -> None:
        self.right, self.die_in, self.trained, self.built = right, die_in, 0, 0

    def train(self) -> dict[str, Any]:
        if self.die_in == "train":
            raise Killed
        self.trained += 1
        return {"steps": 7}

    def build(self, folder: Path) -> dict[str, Any]:
        outcomes = {task: {str(n): n < right for n in range(200)} for task, right in self.right.items()}
        row = [right / 200 for right in self.right.values()]
        evaluation = {"tasks": list(self.right), "test": {}, "gate": outcomes}
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
        if self.die_in == "build":
            raise Killed
        self.built += 1
        return {"tasks": list(self.right), "row": row}


def onboard(folder: Path, task: str, work: Fake, digest: str = "d") -> str:
    store = Store(folder)
    lifecycle = Lifecycle(store, GATE)
    with store.hold():
        known = lifecycle.concluded(task)
        return known or lifecycle.conclude(lifecycle.begin(task, digest, store.published()), work)


def ledger(folder: Path) -> list[dict[str, Any]]:
    """Without the times."""
    return [{key: value for key, value in entry.items() if key != "at"} for entry in Store(folder).entries()]


def test_a_task_that_holds_what_was_learned_is_published(tmp_path: Path) -> None:
    assert onboard(tmp_path, "one", Fake({"one": 180})) == "published"
    assert onboard(tmp_path, "two", Fake({"one": 179, "two": 150})) == "published"
    assert Store(tmp_path).published() == "0002-two"
    events = ["begun", "trained", "committed", "evaluated", "judged", "published"]
    assert [entry["event"] for entry in ledger(tmp_path)] == events * 2


def test_a_damaged_candidate_is_refused_and_what_was_published_stays(tmp_path: Path) -> None:
    onboard(tmp_path, "one", Fake({"one": 180}))
    assert onboard(tmp_path, "two", Fake({"one": 100, "two": 199})) == "refused"
    assert Store(tmp_path).published() == "0001-one"


def test_between_the_two_it_is_undecided(tmp_path: Path) -> None:
    onboard(tmp_path, "one", Fake({"one": 180}))
    assert onboard(tmp_path, "two", Fake({"one": 162, "two": 199})) == "undecided"
    assert Store(tmp_path).published() == "0001-one"


def test_the_uses_of_a_gate_split_are_counted(tmp_path: Path) -> None:
    for task, right in (("one", {"one": 180}), ("two", {"one": 180, "two": 180}), ("three", {"one": 9, "two": 9, "three": 9})):
        onboard(tmp_path, task, Fake(right))
    assert [entry["uses"] for entry in ledger(tmp_path) if entry["event"] == "judged"] == [
        {"one": 1},
        {"one": 2, "two": 1},
        {"one": 3, "two": 2, "three": 1},
    ]


def test_without_a_gate_everything_is_published(tmp_path: Path) -> None:
    store = Store(tmp_path)
    lifecycle = Lifecycle(store, None)
    with store.hold():
        for task, right in (("one", {"one": 180}), ("two", {"one": 0, "two": 1})):
            attempt = lifecycle.begin(task, "d", store.published())
            assert lifecycle.conclude(attempt, Fake(right)) == "published"


def test_a_rolled_back_lineage_builds_on_what_is_published_again(tmp_path: Path) -> None:
    onboard(tmp_path, "one", Fake({"one": 180}))
    onboard(tmp_path, "two", Fake({"one": 180, "two": 180}))
    store = Store(tmp_path)
    with store.hold():
        store.rollback()
    onboard(tmp_path, "three", Fake({"one": 180, "three": 180}))
    begun = [entry for entry in ledger(tmp_path) if entry["event"] == "begun"]
    assert (begun[-1]["version"], begun[-1]["base"]) == ("0003-three", "0001-one")


@pytest.mark.parametrize("digest", ["d", "other"])
def test_one_onboarding_at_a_time(tmp_path: Path, digest: str) -> None:
    """Another task has to wait, and the same one with other settings as well."""
    with pytest.raises(Killed):
        onboard(tmp_path, "one", Fake({"one": 180}, die_in="train"))
    task = "two" if digest == "d" else "one"
    with pytest.raises(ConfigError, match="is under way as version 0001-one"):
        onboard(tmp_path, task, Fake({task: 180}), digest)


def test_what_is_abandoned_makes_way(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        onboard(tmp_path, "one", Fake({"one": 180}, die_in="train"))
    store = Store(tmp_path)
    with store.hold():
        Lifecycle(store, GATE).abandon()
        assert Lifecycle(store, GATE).concluded("one") is None
    assert onboard(tmp_path, "two", Fake({"two": 180})) == "published"
    assert onboard(tmp_path, "one", Fake({"two": 180, "one": 180})) == "published"


def boundaries(folder: Path, monkeypatch: pytest.MonkeyPatch, die_at: int) -> int:
    """Onboards the second task, dying before the write to the disk number ``die_at``; returns how many there were."""
    count = 0
    entry_written, renamed, written = Store._append, Path.rename, durable.write

    def counted(real: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == die_at:
                raise Killed
            return real(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_append", counted(entry_written))
        patch.setattr(Path, "rename", counted(renamed))
        patch.setattr(durable, "write", counted(written))
        onboard(folder, "two", Fake({"one": 180, "two": 180}))
    return count


def test_killed_before_any_write_it_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same ledger, same published version, and what is published in between is whole and the old or the new one."""
    whole = tmp_path / "whole"
    onboard(whole, "one", Fake({"one": 180}))
    writes = boundaries(whole, monkeypatch, die_at=0)
    assert writes >= 8
    for die_at in range(1, writes + 1):
        folder = tmp_path / str(die_at)
        onboard(folder, "one", Fake({"one": 180}))
        with pytest.raises(Killed):
            boundaries(folder, monkeypatch, die_at)
        assert Store(folder).published() in ("0001-one", "0002-two")
        assert onboard(folder, "two", Fake({"one": 180, "two": 180})) == "published"
        assert ledger(folder) == ledger(whole)
        assert Store(folder).published() == "0002-two"


@pytest.mark.parametrize("die_in", ["train", "build"])
def test_killed_inside_a_phase_it_runs_that_phase_again_and_no_other(tmp_path: Path, die_in: str) -> None:
    with pytest.raises(Killed):
        onboard(tmp_path, "one", Fake({"one": 180}, die_in=die_in))
    again = Fake({"one": 180})
    assert onboard(tmp_path, "one", again) == "published"
    assert (again.trained, again.built) == ((1, 1) if die_in == "train" else (0, 1))


def test_r_has_the_last_candidate_of_every_task() -> None:
    entries = [
        {"event": "evaluated", "tasks": ["a"], "row": [0.9]},
        {"event": "evaluated", "tasks": ["a", "b"], "row": [0.1, 0.2]},
        {"event": "refused", "task": "b"},
        {"event": "evaluated", "tasks": ["a", "b"], "row": [0.8, 0.7]},
    ]
    assert accuracies(entries, ["a", "b"]) == [[0.9], [0.8, 0.7]]
