"""What a masked language model is asked for beside single tokens: the same on any number of ranks, and after being killed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests import ranks, tiny
from tests.behaviour.test_pretrain import joined, losses, run


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def floats(output: Path) -> list[float]:
    return [float.fromhex(value) for value in losses(output)]


TASKS: dict[str, dict[str, Any]] = {"spans": {"spans": {}}}


@pytest.mark.parametrize("name", TASKS)
def test_killed_and_resumed_on_two_ranks_it_equals_plain_pytorch(prepared: Path, tmp_path: Path, name: str) -> None:
    """The inputs of every slot to the bit, losses to 1e-5."""
    changes: dict[str, Any] = {"steps": 8, "task": TASKS[name], "checkpoint": {"every_steps": 3}}
    local = tiny.settings(prepared, tmp_path / "local", engine={"name": "local"}, **changes)
    expected = joined(ranks.run(run, 1, {"tree": local}))
    tree = tiny.settings(prepared, tmp_path / "two", **changes)
    for outcome in ranks.attempt(run, 2, {"tree": tree, "die_after": 5}):
        assert outcome["status"] == f"signal {signal.SIGKILL:d}"
    received = joined(ranks.run(run, 2, {"tree": tree}))
    assert received == {key: value for key, value in expected.items() if int(key.split("/")[0]) >= 3}
    assert len(floats(tmp_path / "two")) == 8
    assert floats(tmp_path / "two") == pytest.approx(floats(tmp_path / "local"), abs=1e-5)
    (other,) = ranks.attempt(run, 1, {"tree": tiny.settings(prepared, tmp_path / "two", steps=9)})
    assert (other["type"], other["exit_code"]) == ("CheckpointError", 65)
    assert name in other["error"] or "another model" in other["error"]
