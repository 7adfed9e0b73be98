"""A launch plan is data: what each rank is told, and how it is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaletrain import launcher
from scaletrain.launcher import LaunchConfig, LocalConfig
from scaletrain.launcher.plan import on_one_node

ARGV = ("python", "-m", "scaletrain", "pretrain", "--config", "a b.yaml")


def test_each_rank_is_told_its_number_and_where_to_meet() -> None:
    plan = on_one_node(ARGV, ranks=3, port=1234, cores=8, environment={})
    shared = {
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1234",
        "OMP_NUM_THREADS": "2",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    assert [dict(process.env) for process in plan.processes] == [{"RANK": r, "LOCAL_RANK": r, **shared} for r in ("0", "1", "2")]
    assert [(process.rank, process.argv, process.node) for process in plan.processes] == [
        (r, ARGV, "localhost") for r in range(3)
    ]


def test_more_ranks_than_cores_leave_each_one_thread() -> None:
    plan = on_one_node(ARGV, ranks=4, port=1, cores=2, environment={})
    assert {process.env["OMP_NUM_THREADS"] for process in plan.processes} == {"1"}


def test_what_the_user_has_set_is_not_set_again() -> None:
    plan = on_one_node(ARGV, ranks=1, port=1, cores=2, environment={"OMP_NUM_THREADS": "7", "GLOO_SOCKET_IFNAME": "eth0"})
    assert set(plan.processes[0].env) == {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def test_the_shown_plan_is_a_shell_command_per_rank() -> None:
    plan = on_one_node(ARGV, ranks=1, port=5, cores=1, environment={"GLOO_SOCKET_IFNAME": "lo"})
    assert plan.text().splitlines() == [
        "# rank 0 on localhost",
        "RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=5 OMP_NUM_THREADS=1 "
        "python -m scaletrain pretrain --config 'a b.yaml'",
    ]


def test_a_dry_run_prints_the_plan_and_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "exit.json").write_text('{"code": 3}')
    config = LaunchConfig(backend=LocalConfig(ranks=2, port=77))
    assert launcher.launch(config, ["pretrain", "--config", "x.yaml"], tmp_path, dry_run=True) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith("#")] == ["# rank 0 on localhost", "# rank 1 on localhost"]
    assert all(
        line.endswith("-m scaletrain pretrain --config x.yaml") and "MASTER_PORT=77 OMP_NUM_THREADS=4 " in line
        for line in shown[1::2]
    )
    assert (tmp_path / "exit.json").read_text() == '{"code": 3}'
