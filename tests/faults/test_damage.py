"""Shards that are damaged, missing or hang: a run goes on with other samples, the same on any number of ranks, and says which."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaletrain import checkpoint, dist
from scaletrain.cli import main as cli
from scaletrain.config import decode
from scaletrain.data import index
from scaletrain.data.dataset import Dataset
from scaletrain.data.plan import CorpusShape, PhaseShape, Plan
from scaletrain.engine import Engine
from scaletrain.errors import DataBudgetError
from scaletrain.recipes import pretrain
from scaletrain.train import account
from scaletrain.train.audit import audit
from scaletrain.train.metrics import read_jsonl
from tests import ranks, tiny
from tests.faults.table import Add

STEPS = 20


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def run(tree: dict[str, Any], log: str, die_before: int | None = None, stall: dict[str, float] | None = None) -> None:
    """One rank of a run; what ``engine.forward`` received goes into ``log``, a line per slot: step, corpus, chunk, labels.

    ``stall``: on rank 1, the first ``reads`` of the chunk ``chunk`` take ``seconds``.
    """
    forward, begin = Engine.forward, Engine.begin
    if stall and dist.place().rank == 1:
        _stall(stall)
    file = Path(f"{log}.{dist.place().rank}")

    def recorded(self: Engine, slot: Any) -> Any:
        if slot.seed and len(slot.samples) and "labels" in slot.targets and self.module.training:
            seen = [[int(c), int(n)] for c, n in zip(slot.samples.corpus, slot.samples.chunk, strict=True)]
            row = [slot.step + 1, seen, slot.inputs["input_ids"].sum().item(), slot.targets["labels"].sum().item()]
            with file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
        return forward(self, slot)

    def dying(self: Engine, *arguments: Any) -> Any:
        if die_before is not None and self.updates == die_before and dist.rank() == dist.world() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return begin(self, *arguments)

    Engine.forward, Engine.begin = recorded, dying  # type: ignore[method-assign]  # in a process of its own
    try:
        pretrain.main(decode(pretrain.Config, tree))
    finally:
        Engine.forward, Engine.begin = forward, begin  # type: ignore[method-assign]


def _stall(stall: dict[str, float]) -> None:
    read, reads = Dataset.stored, []

    def slow(self: Dataset, chunk: int) -> Any:
        if chunk == stall["chunk"] and len(reads) < stall["reads"]:
            reads.append(chunk)
            time.sleep(stall["seconds"])
        return read(self, chunk)

    Dataset.stored = slow  # type: ignore[method-assign]  # in a process of its own


def received(log: Path) -> list[list[Any]]:
    """What all ranks have received, in the order in which it was written."""
    return [row for file in sorted(log.parent.glob(f"{log.name}.*")) for row in rows(file)]


def rows(log: Path) -> list[list[Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("**/train*.tar")) or sorted(folder.rglob("*.tar"))


def flip(folder: Path, chunks: list[int]) -> None:
    """Flips a bit of the payload of some chunks of the second shard."""
    shard = shards(folder)[1]
    records = index.load(shard.with_suffix(".idx")).records
    data = bytearray(shard.read_bytes())
    for chunk in chunks:
        data[int(records[chunk]["offset"] + records[chunk]["length"]) - 512] ^= 1
    shard.write_bytes(data)


def flip_headers(folder: Path) -> None:
    shard = shards(folder)[1]
    data = bytearray(shard.read_bytes())
    for record in index.load(shard.with_suffix(".idx")).records[:40]:
        data[int(record["offset"]) + 3] ^= 1
    shard.write_bytes(data)


def cut(folder: Path) -> None:
    shard = shards(folder)[1]
    os.truncate(shard, shard.stat().st_size // 2 + 100)


def zero_blocks(folder: Path) -> None:
    shard = shards(folder)[1]
    data = bytearray(shard.read_bytes())
    data[10 * 512 : 60 * 512] = bytes(50 * 512)
    shard.write_bytes(data)


def swap(folder: Path) -> None:
    """Another shard's bytes, of the length that the index was made for."""
    one, two = shards(folder)[:2]
    size = two.stat().st_size
    two.write_bytes(one.read_bytes()[:size].ljust(size, b"\0"))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "payload bits are flipped": lambda folder: flip(folder, list(range(0, 400, 7))),
    "header bits are flipped": flip_headers,
    "a shard is cut short": cut,
    "blocks are zero": zero_blocks,
    "a shard is empty": lambda folder: os.truncate(shards(folder)[1], 0),
    "a shard is missing": lambda folder: shards(folder)[1].unlink(),
    "a shard is another one": swap,
}

TOLERANT = {"fraction": 0.9, "consecutive": 1000}
RETRY = {"retry": {"attempts": 2, "pause_s": 0.0}}


def settings(prepared: Path, output: Path, **changes: Any) -> dict[str, Any]:
    tree = tiny.settings(prepared, output, engine={"name": "local"}, checkpoint={"every_steps": 4, "keep": 50}, **changes)
    tree["data"] |= {"damage": TOLERANT, "loader": RETRY}
    return tree


@pytest.fixture
def damaged(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "damaged")
    return tmp_path / "damaged"


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_sample_of_a_damaged_shard_is_accounted_for(damaged: Path, tmp_path: Path, damage: str, fault: Add) -> None:
    assert len(shards(damaged)) > 2
    whole = Dataset.open(damaged)
    expected = [whole.read(chunk) for chunk in range(whole.chunks)]
    DAMAGES[damage](damaged)
    broken = Dataset.open(damaged, tolerant=True)
    unreadable = set()
    for chunk in range(broken.chunks):
        try:
            np.testing.assert_array_equal(broken.read(chunk), expected[chunk])  # what is read is what was written
        except Exception as error:
            assert not isinstance(error, AssertionError)
            unreadable.add(chunk)
    ranks.run(run, 1, {"tree": settings(damaged, tmp_path / "run"), "log": str(tmp_path / "log")})
    result = audit(account.read(tmp_path / "run" / account.FILE))
    assert result.faults == [] and result.samples == STEPS * 24
    picks = [chunk for step in range(STEPS) for chunk in result.plan.picks(step).chunk.tolist()]
    assert [entry.substitution.chunk for entry in result.replaced] == [chunk for chunk in picks if chunk in unreadable] != []
    assert not any(entry.substitution.substitute in unreadable for entry in result.replaced)
    fault(
        fault="F16",
        injected=f"{damage}, {len(result.replaced)} of {result.samples} samples",
        outcome="replaced, 0 unaccounted for",
    )


def test_two_kills_and_a_corrupt_shard_audited_exactly(damaged: Path, tmp_path: Path, fault: Add) -> None:
    """4 ranks, killed; 2 ranks, killed; 3 ranks: the samples of one rank that was not disturbed, and the account knows all."""
    flip(damaged, list(range(400)))
    zero3 = {"name": "zero3", "persistence_threshold": 1000}
    tree = settings(damaged, tmp_path / "alone")
    tree["data"]["slots"] = {"micro_batch_tokens": 256, "slot_multiple": 12}
    tree["data"]["damage"] = TOLERANT
    ranks.run(run, 1, {"tree": tree, "log": str(tmp_path / "alone.log")})

    tree |= {"output": str(tmp_path / "run"), "engine": zero3}
    for world, die_before in ((4, 7), (2, 14)):
        outcomes = ranks.attempt(run, world, {"tree": tree, "log": str(tmp_path / f"{world}.log"), "die_before": die_before})
        assert outcomes[-1]["status"] == "signal 9"
    ranks.run(run, 3, {"tree": tree, "log": str(tmp_path / "3.log")})

    result = audit(account.read(tmp_path / "run" / account.FILE))
    assert result.faults == []
    assert [(attempt.start, list(attempt.rows), attempt.void) for attempt in result.attempts] == [
        (0, [1, 2, 3, 4], [5, 6, 7]),
        (4, [5, 6, 7, 8, 9, 10, 11, 12], [13, 14]),
        (12, list(range(13, 21)), []),
    ]
    counted = Counter()
    for attempt, log in zip(result.attempts, ("4.log", "2.log", "3.log"), strict=True):
        for step, samples, *_ in received(tmp_path / log):
            counted.update(chunk for _, chunk in samples if step in attempt.rows)
    assert {chunk: int(times) for chunk, times in enumerate(result.seen[0]) if times} == dict(counted)
    alone = sorted(received(tmp_path / "alone.log"))
    steps = {"4.log": range(1, 5), "2.log": range(5, 13), "3.log": range(13, 21)}
    assert sorted(row for log, those in steps.items() for row in received(tmp_path / log) if row[0] in those) == alone
    assert len(result.replaced) > 20
    last = checkpoint.find(tmp_path / "run" / "checkpoints")[0]
    assert len(last.progress.state["replaced"]) == len(result.replaced)
    assert cli(["inspect", "audit", str(tmp_path / "run")]) == 0
    fault(
        fault="F16",
        injected="a corrupt shard and two kills, 4 -> 2 -> 3 ranks",
        outcome="as one undisturbed rank; audit exact",
        lost_steps=5,
    )


def test_beyond_the_budget_all_ranks_stop_together_and_a_mended_shard_goes_on(damaged: Path, tmp_path: Path, fault: Add) -> None:
    shard = shards(damaged)[1]
    healthy = shard.read_bytes()
    flip(damaged, list(range(400)))
    tree = settings(damaged, tmp_path / "run")
    tree |= {"engine": {"name": "zero3", "persistence_threshold": 1000}, "checkpoint": {"every_steps": 1000}}
    tree["data"]["damage"] = {"fraction": 0.002}  # 20 of the first 10,000
    outcomes = ranks.attempt(run, 2, {"tree": tree, "log": str(tmp_path / "log")})
    assert {outcome["exit_code"] for outcome in outcomes} == {DataBudgetError.exit_code}
    said = outcomes[1]["error"]
    assert "samples could not be read; 20 may (data.damage.fraction is 0.002" in said and shard.name in said
    report = json.loads((tmp_path / "run" / account.RECORD).read_text())
    stopped = report["replaced"][-1]["step"]
    assert len(report["replaced"]) > 20 and checkpoint.find(tmp_path / "run" / "checkpoints")[0].step == stopped < STEPS

    (again,) = {outcome["exit_code"] for outcome in ranks.attempt(run, 2, {"tree": tree, "log": str(tmp_path / "log")})}
    assert again == DataBudgetError.exit_code  # starting once more gets nobody through the budget
    assert checkpoint.find(tmp_path / "run" / "checkpoints")[0].step == stopped
    shard.write_bytes(healthy)
    ranks.run(run, 2, {"tree": tree, "log": str(tmp_path / "log")})
    result = audit(account.read(tmp_path / "run" / account.FILE))
    assert result.faults == [] and result.samples == STEPS * 24
    assert [entry.step for entry in result.replaced] == [row["step"] for row in report["replaced"]]
    assert not (tmp_path / "run" / account.RECORD).exists()
    fault(
        fault="F16",
        injected="more damaged than the budget allows, on two ranks",
        outcome="66 on all ranks, saved; mended, it goes on",
        lost_steps=0,
    )


def test_an_evaluation_that_a_stop_came_before_is_made_up_for(damaged: Path, tmp_path: Path) -> None:
    last = Dataset.open(damaged)
    tree = settings(damaged, tmp_path / "run", evaluation={"every_steps": 10})
    tree["data"]["damage"] = {"fraction": 0.0}
    plan = Plan(1, [PhaseShape((CorpusShape(last.digest, last.chunks),), 24, STEPS)])
    early = {int(chunk) for step in range(STEPS - 1) for chunk in plan.picks(step).chunk}
    shard, records = shards(damaged)[1], index.load(shards(damaged)[1].with_suffix(".idx")).records
    first = sum(len(index.load(each.with_suffix(".idx")).records) for each in shards(damaged)[:1])
    chunk = next(c for c in plan.picks(STEPS - 1).chunk.tolist() if first <= c < first + len(records) and c not in early)
    healthy = shard.read_bytes()
    flip(damaged, [chunk - first])
    (outcome,) = ranks.attempt(run, 1, {"tree": tree, "log": str(tmp_path / "log")})
    assert outcome["exit_code"] == DataBudgetError.exit_code
    shard.write_bytes(healthy)
    ranks.run(run, 1, {"tree": tree, "log": str(tmp_path / "log")})
    lines = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 10, 20]


def test_samples_in_a_row_are_beyond_the_budget(damaged: Path, tmp_path: Path) -> None:
    for shard in shards(damaged)[1:3]:
        os.truncate(shard, 0)
    tree = settings(damaged, tmp_path / "run")
    tree["data"]["damage"] = {"fraction": 1.0, "consecutive": 5}
    (outcome,) = ranks.attempt(run, 1, {"tree": tree, "log": str(tmp_path / "log")})
    assert outcome["exit_code"] == DataBudgetError.exit_code
    assert "samples in a row could not be read (data.damage.consecutive is 5)" in outcome["error"]


def test_a_missing_shard_is_an_error_at_the_start_where_the_budget_does_not_have_it(damaged: Path, tmp_path: Path) -> None:
    shards(damaged)[1].unlink()
    tree = settings(damaged, tmp_path / "run")
    tree["data"]["damage"] = {}
    (outcome,) = ranks.attempt(run, 1, {"tree": tree, "log": str(tmp_path / "log")})
    assert outcome["exit_code"] == 65 and "no such file" in outcome["error"] and "data.damage.fraction" in outcome["error"]


def test_an_account_that_was_tampered_with_is_found_out(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks.run(run, 1, {"tree": settings(damaged, tmp_path / "run"), "log": str(tmp_path / "log")})
    file = tmp_path / "run" / account.FILE
    lines = file.read_text().splitlines()
    steps = [number for number, line in enumerate(lines) if json.loads(line)["kind"] == "step"]

    def found(changed: list[str]) -> str:
        file.write_text("\n".join(changed) + "\n")
        capsys.readouterr()
        assert cli(["inspect", "audit", str(tmp_path / "run")]) == 65
        return capsys.readouterr().err

    assert "no record of steps 12 to 20" in found(lines[: steps[11]])
    gone = steps[6]
    assert "no record of step 7" in found(lines[:gone] + lines[gone + 1 :])
    assert "step 7 is recorded twice" in found(lines[: gone + 1] + lines[gone:])
    swapped = lines[gone].replace(json.loads(lines[gone])["digest"], "0123456789")
    assert "step 7: other samples than the plan's" in found([*lines[:gone], swapped, *lines[gone + 1 :]])
    fewer = lines[gone].replace('"samples": 24', '"samples": 23')
    assert "step 7: 23 samples, and the plan has 24" in found([*lines[:gone], fewer, *lines[gone + 1 :]])
    file.write_text("\n".join(lines) + "\n")
    chunk = int(audit(account.read(file)).plan.picks(6).chunk[0])
    capsys.readouterr()
    assert cli(["inspect", "audit", str(tmp_path / "run"), f"chunk=damaged:{chunk}"]) == 0
    assert "step 7 (pass 0)" in capsys.readouterr().out


def test_a_checkpoints_folder_that_is_gone_is_not_a_fresh_start(damaged: Path, tmp_path: Path, fault: Add) -> None:
    tree = settings(damaged, tmp_path / "run")
    ranks.run(run, 1, {"tree": tree, "log": str(tmp_path / "log")})
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (outcome,) = ranks.attempt(run, 1, {"tree": tree, "log": str(tmp_path / "log")})
    assert outcome["exit_code"] == 65 and f"says that step {STEPS} was saved" in outcome["error"]
    fault(fault="F6", injected="a resume without the whole folder of checkpoints", outcome="an error unless --fresh")


@pytest.mark.parametrize("reads", [2, 1000], ids=["twice", "always"])
def test_a_read_that_hangs_on_one_rank_is_given_up_and_read_again(prepared: Path, tmp_path: Path, reads: int, fault: Add) -> None:
    """Of two ranks; the thread hangs for a minute, and the run is over long before."""
    tree = settings(prepared, tmp_path / "whole")
    tree |= {"engine": {"name": "zero3", "persistence_threshold": 1000}}
    tree["data"]["loader"] = {"retry": {"attempts": 3, "pause_s": 0.0, "read_timeout_s": 0.4}}
    ranks.run(run, 2, {"tree": tree, "log": str(tmp_path / "whole.log")})
    chunk = min(samples[0][1] for _, samples, *_ in rows(tmp_path / "whole.log.1"))
    began = time.monotonic()
    tree["output"] = str(tmp_path / "run")
    stall = {"chunk": chunk, "reads": reads, "seconds": 60}
    ranks.run(run, 2, {"tree": tree, "log": str(tmp_path / "run.log"), "stall": stall})
    assert time.monotonic() - began < 30
    result = audit(account.read(tmp_path / "run" / account.FILE))
    assert result.faults == []
    if reads == 2:
        assert result.replaced == []
        assert sum(line["retried"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step") == 2
        assert received(tmp_path / "run.log") == received(tmp_path / "whole.log")
    else:
        assert {entry.substitution.chunk for entry in result.replaced} == {chunk}
        assert "no answer within 0.4 s, 3 times" in result.replaced[0].substitution.reason
    how, outcome = ("twice", "read again by another thread; exact") if reads == 2 else ("always", "another sample stands in")
    fault(fault="F17", injected=f"a read hangs for a minute on one rank of two, {how}", outcome=outcome, detect_s=0.4)
