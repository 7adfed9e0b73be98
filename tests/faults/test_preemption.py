"""A signal to one rank of two, wherever it is: one checkpoint, exit code 75, and a resume that ends as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from scaletrain import checkpoint, dist, lease, model
from scaletrain.config import decode
from scaletrain.engine import Engine
from scaletrain.errors import ConfigError
from scaletrain.recipes import pretrain
from scaletrain.recipes.pretrain import Run
from scaletrain.tasks.mlm import MaskedLanguageModelling
from scaletrain.train.control import SAVE_MARGIN, ControlConfig, StopRequest
from scaletrain.train.metrics import read_jsonl
from tests import ranks, tiny
from tests.faults.table import Add

STEPS = 10
POINTS: dict[str, tuple[Any, str, int | None, signal.Signals, list[int]]] = {
    "loading": (model, "build", None, signal.SIGTERM, []),
    "the first evaluation": (MaskedLanguageModelling, "score", 0, signal.SIGTERM, []),
    "a forward pass": (Engine, "forward", 1, signal.SIGUSR1, [3]),
    "clipping": (Engine, "clip", 3, signal.SIGTERM, [3, 5]),
    "an evaluation": (MaskedLanguageModelling, "score", 6, signal.SIGTERM, [3, 5, 6]),
    "a save": (Run, "save", 9, signal.SIGINT, [3, 5, 6, 9]),
    "the last evaluation": (MaskedLanguageModelling, "score", STEPS, signal.SIGTERM, [3, 5, 6, 9, STEPS]),
}
"""Before which function's first call, once the engine has taken so many steps, which signal comes; the checkpoints of then."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def settings(prepared: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return tiny.settings(
        prepared,
        output,
        **{
            "steps": STEPS,
            "evaluation": {"every_steps": 3, "chunks_per_pass": 16},
            "checkpoint": {"every_steps": 3, "keep": 9},
            **changes,
        },
    )


def run(tree: dict[str, Any], point: str | None = None, more: tuple[int, ...] = ()) -> float:
    """One rank, the last of which is sent a signal at ``point``, and ``more``; how old it is at the end, in seconds."""
    made: list[Engine] = []
    begin = Engine.begin

    def noted(self: Engine, *arguments: Any, **named: Any) -> Any:
        made[:] = [self]
        return begin(self, *arguments, **named)

    Engine.begin = noted  # type: ignore[method-assign]  # in a process of its own
    if point is not None:
        owner, name, updates, number, _ = POINTS[point]
        call, armed = getattr(owner, name), True

        def asked(*arguments: Any, **named: Any) -> Any:
            nonlocal armed
            here = (made[0].updates if made else None) == updates
            if armed and here and dist.rank() == dist.world() - 1:
                armed = False
                Path(f"{tree['output']}.note").write_text(str(time.monotonic()))
                for each in (number, *more):
                    os.kill(os.getpid(), each)
            return call(*arguments, **named)

        setattr(owner, name, asked)
    try:
        pretrain.main(decode(pretrain.Config, tree))
    except BaseException as error:
        error.add_note(f"age {lease.age_s()}")
        raise
    return lease.age_s()


def saved(output: Path) -> list[int]:
    return sorted(found.progress.step for found in checkpoint.find(output / "checkpoints"))


def lines(output: Path) -> list[Any]:
    """Every loss and every score, to the bit."""
    return [
        line.get("loss_hex", line.get("scores_hex")) for line in read_jsonl(output / "metrics.jsonl") if line["kind"] != "event"
    ]


def record(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "exit.json").read_text())
    return found


def test_a_signal_to_one_rank_is_requeue_for_all_and_the_resume_is_exact(prepared: Path, tmp_path: Path, fault: Add) -> None:
    """One run, interrupted at every point and continued each time, and one that nothing has interrupted."""
    output, whole = tmp_path / "run", tmp_path / "whole"
    tree = settings(prepared, output)
    for point, (_, _, _, number, left) in POINTS.items():
        outcomes = ranks.attempt(run, 2, {"tree": tree, "point": point})
        took_s = time.monotonic() - float(Path(f"{output}.note").read_text())
        assert [(outcome.get("type"), outcome.get("exit_code")) for outcome in outcomes] == [("RequeueError", 75)] * 2, outcomes
        assert took_s < 10
        assert saved(output) == left
        assert (record(output)["code"], record(output)["step"]) == (75, max(left, default=0))
        injected = f"{number.name} to one rank of two, {point}"
        fault(fault="F9", injected=injected, outcome="75, then exact", detect_s=took_s, lost_steps=0)
    ranks.run(run, 2, {"tree": tree})
    ranks.run(run, 2, {"tree": settings(prepared, whole)})
    assert record(output) == {"code": 0, "step": STEPS, "reason": "done", "lease": len(POINTS) + 1}
    assert lines(output) == lines(whole)
    mine, theirs = (checkpoint.find(folder / "checkpoints")[0] for folder in (output, whole))
    assert (mine.progress, mine.manifest["files"]) == (theirs.progress, theirs.manifest["files"])


def test_a_second_signal_of_another_kind_quits_at_once(prepared: Path, tmp_path: Path, fault: Add) -> None:
    output = tmp_path / "run"
    arguments = {"tree": settings(prepared, output), "point": "a forward pass", "more": [signal.SIGTERM]}
    first, last = ranks.attempt(run, 2, arguments)
    assert last["status"] == f"signal {signal.SIGTERM:d}"
    assert (first["type"], first["exit_code"], record(output)["code"]) == ("PeerLostError", 76, 76)
    fault(fault="F9", injected="two signals to one rank of two", outcome="it quits, the other says 76", lost_steps=0)


def test_it_stops_in_time_for_the_limit_of_the_queue(prepared: Path, tmp_path: Path) -> None:
    """Long before its last step, with all that was done saved; the next start goes on from there."""
    output, limit_s = tmp_path / "run", 4.0
    control = {"wall_clock_s": limit_s, "grace_s": 1.0}
    tree = settings(
        prepared, output, steps=100_000, checkpoint={"every_steps": 20}, evaluation={"every_steps": 0}, control=control
    )
    ends = []
    for _ in range(2):
        for outcome in ranks.attempt(run, 2, {"tree": tree}):
            assert (outcome["type"], outcome["exit_code"]) == ("RequeueError", 75)
            assert limit_s / 2 < float(outcome["error"].rpartition("age ")[2]) < limit_s
        assert saved(output)[-1] == record(output)["step"]
        ends.append(record(output)["step"])
    assert 0 < ends[0] < ends[1]


def test_a_limit_that_leaves_no_time_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"control\.wall_clock_s: got 20.*grace_s"):
        ControlConfig(wall_clock_s=20.0, grace_s=30.0)


def test_a_save_that_is_slower_than_the_grace_is_warned_of(prepared: Path, tmp_path: Path) -> None:
    tree = settings(prepared, tmp_path / "run", steps=1, evaluation={"every_steps": 0}, control={"grace_s": 0.0})
    with pytest.warns(UserWarning, match=r"control\.grace_s: got 0; .*Raise the launcher's backend\.grace_s"):
        pretrain.main(decode(pretrain.Config, {**tree, "engine": {"name": "local"}}))


def test_what_is_kept_free_for_the_last_save_is_that_of_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the copy that training waits for; and twice, for a save that is under way comes first."""
    stop = StopRequest(ControlConfig(wall_clock_s=1000.0, grace_s=100.0))
    for longest_s, last_moment in ((0.0, 900.0), (40.0, 1000.0 - SAVE_MARGIN * 80.0)):
        with stop.saving(lambda longest_s=longest_s: longest_s):
            pass
        for age_s, asked in ((last_moment - 1.0, False), (last_moment + 1.0, True)):
            monkeypatch.setattr(lease, "age_s", lambda age_s=age_s: age_s)
            assert stop.requested is asked
