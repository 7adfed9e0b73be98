"""A launch plan is data: what each rank is told, and how it is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaletrain import config, launcher
from scaletrain.launcher import DeepspeedConfig, LaunchConfig, LocalConfig
from scaletrain.launcher.plan import LaunchPlan, Process, on_nodes, on_one_node

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
    settings = LaunchConfig(backend=LocalConfig(ranks=2, port=77))
    assert launcher.launch(settings, ["pretrain", "--config", "x.yaml"], tmp_path, dry_run=True) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith("#")] == ["# rank 0 on localhost", "# rank 1 on localhost"]
    assert all(
        line.endswith("-m scaletrain pretrain --config x.yaml") and "MASTER_PORT=77 OMP_NUM_THREADS=4 " in line
        for line in shown[1::2]
    )
    assert (tmp_path / "exit.json").read_text() == '{"code": 3}'


def test_ranks_are_counted_through_the_nodes_in_their_order() -> None:
    plan = on_nodes(ARGV, {"b": 2, "a": 1}, "10.0.0.1", 7, {"X": "1"})
    numbers = [
        (process.node, process.rank, *(process.env[name] for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
        for process in plan.processes
    ]
    assert numbers == [("b", 0, "0", "0", "2"), ("b", 1, "1", "1", "2"), ("a", 2, "2", "0", "1")]
    shared = {"WORLD_SIZE": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7", "X": "1"}
    assert all({name: process.env[name] for name in shared} == shared for process in plan.processes)


def test_what_all_share_cannot_make_a_rank_another_one() -> None:
    shared = {"RANK": "9", "MASTER_PORT": "9", "WORLD_SIZE": "9"}
    assert on_nodes(ARGV, {"a": 1}, "x", 7, shared) == on_nodes(ARGV, {"a": 1}, "x", 7, {})


def test_the_ranks_of_a_node_are_shown_under_what_carries_them_there() -> None:
    ranks = [Process("a", 0, ("run",), {"RANK": "0"}), Process("a", 1, ("run",), {}), Process("b", 2, ("run",), {})]
    carriers = (Process("a", 0, ("ssh", "a"), {}), Process("b", 1, ("ssh", "b", "c d"), {"X": "y z"}))
    assert LaunchPlan(tuple(ranks), carriers).text().splitlines() == [
        "# to a",
        "ssh a",
        "# rank 0 on a",
        "RANK=0 run",
        "# rank 1 on a",
        "run",
        "# to b",
        "X='y z' ssh b 'c d'",
        "# rank 2 on b",
        "run",
    ]


@pytest.mark.parametrize(
    ("tree", "kind"), [({"ranks": 2}, LocalConfig), ({"name": "deepspeed", "hostfile": "x"}, DeepspeedConfig)]
)
def test_a_backend_without_a_name_is_the_local_one(tree: dict[str, object], kind: type) -> None:
    assert isinstance(config.decode(LaunchConfig, {"backend": tree}).backend, kind)
