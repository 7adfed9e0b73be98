"""F10: ranks that hang. Whoever started them says which, and in what, keeps their stacks, and ends the job."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from scaletrain import heartbeat
from scaletrain.config import decode
from scaletrain.engine import Engine
from scaletrain.launcher import Job, LocalConfig, local
from scaletrain.launcher.watch import Limits, Watch
from scaletrain.recipes import pretrain
from tests import tiny
from tests.faults.table import Add

ROOT = Path(__file__).resolve().parents[2]
SHORT = Limits(start=20, data=0.6, forward=0.6, backward=0.6, step=0.6, reduce=1.5, save=0.6, other=1.2)
RANK = """
import ctypes, os, signal, sys, time
sys.path.insert(0, {root!r})
from scaletrain import heartbeat
rank = int(os.environ["RANK"])
heartbeat.begin()
line = open({line!r}, "wb" if rank else "rb", buffering=0)

def hangs_here():
    {hang}

for step in range({steps}):
    for section in ("data", "forward", "backward", "step", "save"):
        with heartbeat.section(section):
            if rank == 1 and step == 3 and section == {section!r}:
                hangs_here()
            time.sleep({pace})
    with heartbeat.section("reduce"):  # where the others wait for the one that hangs
        line.write(b".") if rank else line.read(1)
"""
HANGS = {
    "asleep": "time.sleep(60)",
    "with the interpreter lock held": "ctypes.PyDLL(None).sleep(60)",
    "in an endless loop": "while True: pass",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
}


def job(folder: Path, *, section: str = "none", hang: str = "pass", pace: float = 0.005, steps: int = 1000) -> Job:
    """Two ranks without torch, of which the second hangs."""
    os.mkfifo(folder / "line")
    text = RANK.format(root=str(ROOT), line=str(folder / "line"), section=section, hang=hang, pace=pace, steps=steps)
    return Job(argv=(sys.executable, "-c", text), output=folder / "run")


@pytest.mark.parametrize(
    ("section", "how"), [*(("forward", how) for how in HANGS), ("data", "asleep"), ("backward", "asleep"), ("save", "asleep")]
)
def test_a_rank_that_hangs_is_named_and_the_job_is_ended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], section: str, how: str, fault: Add
) -> None:
    code = local.run(LocalConfig(ranks=2, limits=SHORT), job(tmp_path, section=section, hang=HANGS[how]))
    said = capfd.readouterr().err
    assert code == 76, said
    found = re.search(rf"^error: rank 1 gave no sign of life for ([0-9.]+) s, in {section}; the job is ended$", said, re.M)
    assert found, said
    assert 0.6 <= float(found[1]) < 5
    stacks = (tmp_path / "run/stacks/attempt-0/rank-00001.txt").read_text()
    assert ("in hangs_here" in stacks) == (how != "stopped"), stacks
    assert ("did not answer" in stacks) == (how == "stopped"), stacks
    assert "Current thread" in (tmp_path / "run/stacks/attempt-0/rank-00000.txt").read_text()
    (row,) = map(json.loads, (tmp_path / "run/attempts.jsonl").read_text().splitlines())
    assert (row["code"], row["ranks"], row["section"]) == (76, [1], section)
    fault(
        fault="F10",
        injected=f"one rank of two {how}, in {section}",
        outcome="named, stacks kept, exit 76",
        detect_s=float(found[1]),
    )


def test_slow_ranks_within_their_limits_are_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each section takes half of its limit; the run as a whole many times as long."""
    code = local.run(LocalConfig(ranks=2, limits=SHORT), job(tmp_path, pace=0.3, steps=3))
    assert (code, "sign of life" in capfd.readouterr().err) == (70, False)  # of the missing exit.json


def test_a_rank_that_does_not_even_begin_is_noticed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its stacks are not asked for: it does not listen yet, and the signal would end it without a word."""
    text = "import os, time\nif os.environ['RANK'] == '0': time.sleep(60)"
    quick = Limits(start=0.5)
    assert local.run(LocalConfig(ranks=2, limits=quick), Job(argv=(sys.executable, "-S", "-c", text), output=None)) == 76
    assert re.search(r"rank 0 gave no sign of life for [0-9.]+ s, in start", capfd.readouterr().err)


def test_nothing_is_written_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(heartbeat.VARIABLE, raising=False)
    heartbeat.begin()
    with heartbeat.section("save"):
        assert heartbeat._file is None


def test_sections_return_to_the_one_around_them() -> None:
    text = f"""
import os, sys; sys.path.insert(0, {str(ROOT)!r})
from scaletrain import heartbeat
beat = int(os.environ[heartbeat.VARIABLE].split(",")[0])
assert heartbeat.read(beat) is None
heartbeat.begin()
seen = [heartbeat.read(beat).section]
with heartbeat.section("evaluation"):
    with heartbeat.section("forward"):
        seen.append(heartbeat.read(beat).section)
    seen.append(heartbeat.read(beat).section)
seen.append(heartbeat.read(beat).section)
assert seen == ["start", "forward", "evaluation", "other"], seen
assert heartbeat.read(beat).count == 5
"""
    assert local.run(LocalConfig(), Job(argv=(sys.executable, "-c", text), output=None)) == 0


WAITS = """
import sys, time
sys.path[:0] = [{root!r}, {folder!r}]
from scaletrain import heartbeat
from torch.distributed.fake import all_gather
heartbeat.begin()
with heartbeat.section("forward"):
    all_gather()
"""


def test_where_all_wait_for_another_machine_it_is_given_time_to_speak_first(tmp_path: Path) -> None:
    """And if nothing comes of that, the ranks here are named after all."""
    place = tmp_path / "torch/distributed/fake.py"
    place.parent.mkdir(parents=True)
    place.write_text("import time\ndef all_gather():\n    time.sleep(60)\n")
    text = WAITS.format(root=str(ROOT), folder=str(tmp_path))
    found: dict[bool, list[tuple[int, ...] | None]] = {}
    for alone in (True, False):
        with Watch(Limits(start=20, forward=0.3), None, alone=alone) as watch, ExitStack() as stack:
            members: dict[int, int] = {}
            for rank in range(2):
                command, env = [sys.executable, "-S", "-c", text], {**os.environ, **watch.environment(rank)}
                process = stack.enter_context(subprocess.Popen(command, env=env, pass_fds=watch.descriptors(rank)))
                stack.callback(process.kill)
                members[rank] = process.pid
            found[alone] = []
            end = time.monotonic() + 20
            while time.monotonic() < end and not any(found[alone]):
                if stall := watch.stalled(list(members)):
                    said = watch.dump(stall, members)
                    found[alone].append(said.ranks if said else None)
                time.sleep(0.01)
    assert found == {True: [(0, 1)], False: [None, (0, 1)]}


def hang_in_training(tree: dict[str, Any]) -> None:
    """A rank of a real run; the second one hangs in the forward pass of its third step."""
    forward = Engine._call

    def hanging(self: Engine, inputs: Any) -> Any:
        if self.updates == 2 and os.environ["RANK"] == "1":
            time.sleep(60)
        return forward(self, inputs)

    Engine._call = hanging  # type: ignore[method-assign]  # in a process of its own
    heartbeat.begin()
    pretrain.main(decode(pretrain.Config, tree))


def test_a_training_rank_that_hangs_is_told_from_those_that_wait_for_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], fault: Add
) -> None:
    tree = tiny.settings(tiny.corpus(tmp_path), tmp_path / "run")
    text = f"import json, sys; sys.path.insert(0, {str(ROOT)!r})\nfrom tests.faults.test_stalls import hang_in_training as run\n"
    argv = (sys.executable, "-c", f"{text}run(json.loads({json.dumps(tree)!r}))")
    limits = Limits(forward=2.0, reduce=6.0)
    assert local.run(LocalConfig(ranks=2, limits=limits), Job(argv=argv, output=tmp_path / "run")) == 76
    said = capfd.readouterr().err
    assert "error: rank 1 gave no sign of life for 2." in said, said
    assert ", in forward; the job is ended" in said
    assert "in hanging" in (tmp_path / "run/stacks/attempt-0/rank-00001.txt").read_text()
    injected, detect_s = "one rank of two asleep in ZeRO-3's forward", float(said.split(" sign of life for ")[1].split()[0])
    fault(fault="F10", injected=injected, outcome="named, stacks kept, exit 76", detect_s=detect_s)


def test_a_rank_that_works_while_the_others_wait_too_long_is_not_said_to_be_dead() -> None:
    with Watch(Limits(reduce=0.05, forward=60), None) as watch:
        now = time.monotonic_ns()
        for rank, (count, at_ns, section) in enumerate([(7, now, "forward"), (8, now - 10**9, "reduce")]):
            os.pwrite(watch.descriptors(rank)[0], struct.pack("<QQI", count, at_ns, heartbeat.SECTIONS.index(section)), 0)
        stall = watch.stalled([0, 1])
    assert stall is not None
    assert stall.text().startswith("rank 0 kept the others waiting for 1.")
