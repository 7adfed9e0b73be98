"""The deepspeed launcher with an ssh that stays on this machine: what it asks before a job, what it plans, and how a job ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import scaletrain
from scaletrain.config import decode, to_tree
from scaletrain.errors import ConfigError, InputError, StorageError
from scaletrain.launcher import DeepspeedConfig, Job, LaunchConfig, deepspeed, launch
from scaletrain.launcher.deepspeed import Meeting
from scaletrain.launcher.hostfile import Host
from scaletrain.launcher.node import Sight
from scaletrain.launcher.transport import Transport
from scaletrain.launcher.watch import Limits

SIGHT = {"address": "10.0.0.9", "port": 1, "sees_shared": True, "version": scaletrain.__version__}
SSH = f"""#!/bin/sh
# ssh OPTIONS HOST COMMAND, where every host is this one
host= command=
for word; do host=$command command=$word; done
case $host in
    deaf) exec sleep 60 ;;
    down) echo "ssh: connect to host down port 22: Connection refused" >&2; exit 255 ;;
    bare) echo "sh: 1: cd: can't cd to /work" >&2; exit 2 ;;
    chatty) echo "Welcome to this cluster" ;;
    other) echo '{json.dumps({**SIGHT, "sees_shared": False})}'; exit ;;
    old) echo '{json.dumps({**SIGHT, "version": "0.0.0"})}'; exit ;;
    away) case $command in *look-around*) echo '{json.dumps(SIGHT)}'; exit ;; esac
esac
export SSH_CONNECTION="127.0.0.1 40000 127.0.0.1 22"
eval "$command"
"""
HERE = "import json, os, signal, sys, time; rank = os.environ['RANK']; folder = sys.argv[1]\n"


@pytest.fixture(autouse=True)
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(SSH)
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def config(folder: Path, *names: str, **settings: Any) -> DeepspeedConfig:
    (folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in names))
    tree = {"name": "deepspeed", "hostfile": str(folder / "hosts"), "peer_grace_s": 0.1, **settings}
    backend = decode(LaunchConfig, {"backend": tree}).backend
    assert isinstance(backend, DeepspeedConfig)
    return backend


def job(folder: Path, text: str, output: Path | None = None) -> Job:
    return Job(argv=(sys.executable, "-S", "-E", "-c", HERE + text, str(folder)), output=output)


# --------------------------------------------------------------------------------------------------------- what is planned


def test_a_plan_has_one_carrier_per_host_and_its_ranks_with_their_environment() -> None:
    hosts = (Host("n1", 1, "hosts:1"), Host("n2", 2, "hosts:2"))
    way = Transport(name="ssh", options=("-x",), folder=Path("/w"), environment={"A": "b c"}, python="/python")
    settings = DeepspeedConfig(hostfile=Path("hosts"), grace_s=5.0, logs=Path("logs"))
    plan = deepspeed.plan(settings, hosts, Job(argv=("run", "it"), output=None), way, Meeting("j", "10.0.0.1", 7))
    assert [(rank.node, rank.rank, rank.argv) for rank in plan.processes] == [
        (n, r, ("run", "it")) for r, n in enumerate(["n1", "n2", "n2"])
    ]
    expected = {"RANK": "2", "LOCAL_RANK": "1", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}
    assert plan.processes[2].env == {**expected, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7", "A": "b c"}
    order = {
        "name": "run-ranks",
        "job": "j",
        "node": "n2",
        "slots": {"n1": 1, "n2": 2},
        "argv": ["run", "it"],
        "address": "10.0.0.1",
    }
    order |= {"port": 7, "grace_s": 5.0, "peer_grace_s": 10.0, "logs": "logs"}
    order |= {"limits": to_tree(Limits()), "stacks": None}
    command = f"cd /w && exec env A='b c' /python -m scaletrain.launcher '{json.dumps(order)}'"
    assert [(carrier.node, carrier.rank) for carrier in plan.carriers] == [("n1", 0), ("n2", 1)]
    assert plan.carriers[1].argv == ("ssh", "-x", "--", "n2", command)


def test_a_dry_run_asks_nobody_and_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exit.json").write_text('{"code": 3}')
    settings = config(tmp_path, "a", "b", transport="pdsh")
    monkeypatch.setenv("PATH", "")
    assert launch(LaunchConfig(backend=settings), ["pretrain", "--config", "x.yaml"], tmp_path / "run", dry_run=True) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith("#")] == [
        "# MASTER_ADDR and MASTER_PORT, where they are not set, are asked of a when the job starts.",
        "# to a",
        "# rank 0 on a",
        "# to b",
        "# rank 1 on b",
    ]
    assert [line.split(" -w ")[1][:2] for line in shown if line.startswith("PDSH_SSH_ARGS=")] == ["a ", "b "]
    assert (tmp_path / "run" / "exit.json").read_text() == '{"code": 3}'


def test_options_of_ssh_come_from_the_settings(tmp_path: Path) -> None:
    (tmp_path / "config").touch()
    way = deepspeed.way_to_nodes(config(tmp_path, "a", ssh_port=2222, ssh_config=str(tmp_path / "config")))
    assert way.options[-2:] == ("-p2222", f"-F{tmp_path / 'config'}")
    assert "-oBatchMode=yes" in way.options


@pytest.mark.parametrize("name", ["absent", "with space"])
def test_a_configuration_for_ssh_that_cannot_be_given_to_it_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "with space").touch()
    with pytest.raises(
        ConfigError, match=rf"^backend.ssh_config: got '{tmp_path}/{name}'; must be a file that is there, without spaces"
    ):
        deepspeed.way_to_nodes(config(tmp_path, "a", ssh_config=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("interface", "eth0;id"),
        ("interface", "-x"),
        ("interface", "x" * 16),
        ("master_addr", "-x"),
        ("master_addr", "$(id)"),
        ("master_addr", "a\n"),
    ],
)
def test_names_that_no_network_has_are_refused(tmp_path: Path, field: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, "a", **{field: value})
    assert (caught.value.field, caught.value.value) == (f"backend.{field}", value)


# ------------------------------------------------------------------------------------------------ what is asked before a job


@pytest.mark.parametrize(
    ("host", "said"),
    [
        (
            "down",
            "the host must be reachable by ssh without a password: ssh: connect to host down port 22: Connection refused.",
        ),
        (
            "bare",
            "the host must have the launcher's Python, scaletrain and working folder at the same paths: sh: 1: cd: can't cd to",
        ),
        ("old", f"the host has scaletrain 0.0.0, this machine {scaletrain.__version__}. All nodes must have the same."),
    ],
)
def test_a_host_that_cannot_take_part_is_named_with_its_line_and_nothing_starts(tmp_path: Path, host: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        deepspeed.run(config(tmp_path, "a", host), job(tmp_path, "open(folder + '/began', 'w')"))
    assert str(caught.value).startswith(f"{tmp_path}/hosts:2: got {host!r}; {said}")
    assert not (tmp_path / "began").exists()


def test_a_host_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        deepspeed.run(config(tmp_path, "deaf", "a", start_timeout_s=0.2), job(tmp_path, ""))
    rule = "the host did not answer in time. Is it up? See backend.start_timeout_s."
    assert str(caught.value) == f"{tmp_path}/hosts:1: got 'deaf'; {rule}"
    assert time.monotonic() - began < 10


def test_a_run_folder_that_a_host_does_not_see_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        deepspeed.run(config(tmp_path, "a", "other"), job(tmp_path, "", tmp_path / "run"))
    rule = "other does not see this folder: all nodes write into one, on a file system that they share"
    assert str(caught.value) == f"output: got '{tmp_path}/run'; {rule}"
    assert not list((tmp_path / "run").iterdir())


def test_a_first_host_that_others_cannot_reach_where_we_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        deepspeed.run(config(tmp_path, "a", "away"), job(tmp_path, ""))
    assert str(caught.value) == (
        "backend.master_addr: got '127.0.0.1'; this is how a is reached from here, and other hosts cannot. "
        "Set it to one of its addresses."
    )
    assert deepspeed.run(config(tmp_path, "a", "away", master_addr="127.0.0.1"), job(tmp_path, "")) == 0


def test_a_run_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=rf"^output: got '{tmp_path}/file/run'; it cannot be written \(Not a directory\)"):
        deepspeed.run(config(tmp_path, "a"), job(tmp_path, "", tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("addresses", "meeting"),
    [
        (["10.0.0.1", "fe80::1%eth0"], "10.0.0.1"),
        (["fe80::1%eth0", "10.0.0.1"], "fe80::1%eth0"),
        (["127.0.0.1", "::1"], "127.0.0.1"),
        (["::1", "10.0.0.1"], None),
        (["UNKNOWN", "UNKNOWN"], None),
    ],
)
def test_ranks_meet_at_the_address_of_the_first_host_if_others_can(addresses: list[str], meeting: str | None) -> None:
    hosts = (Host("a", 1, "hosts:1"), Host("b", 1, "hosts:2"))
    sights = [Sight(address=address, port=1, sees_shared=True, version="") for address in addresses]
    if meeting is None:
        with pytest.raises(ConfigError, match=f"^backend.master_addr: got '{addresses[0]}'; this is how a is reached"):
            deepspeed._address(hosts, sights)
    else:
        assert deepspeed._address(hosts, sights) == meeting


# ------------------------------------------------------------------------------------------------------- how a job ends


def test_the_record_of_rank_0_is_the_exit_code_and_an_earlier_one_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exit.json").write_text('{"code": 3}')
    settings, output = config(tmp_path, "a", "chatty"), tmp_path / "run"
    assert deepspeed.run(settings, job(tmp_path, "", output)) == 70
    text = "if rank == '0': json.dump({'code': 75}, open(folder + '/run/exit.json', 'w'))\nos._exit(int(rank))"
    assert deepspeed.run(settings, job(tmp_path, text, output)) == 75
    assert [file.name for file in output.iterdir()] == ["exit.json"]


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("", 0, []),
        ("os._exit(66)", 66, ["error: rank 0 on a ended with exit code 66"]),
        (
            "time.sleep(60 if rank == '0' else 0); print('no'); sys.stdout.flush(); os._exit(66)",
            66,
            ["error: rank 1 on b ended with exit code 66", "[rank 1] no"],
        ),
        (
            "time.sleep(60 if rank == '0' else 0); os.kill(os.getpid(), signal.SIGKILL)",
            76,
            ["error: rank 1 on b ended with SIGKILL"],
        ),
        (
            "time.sleep(0.3 if rank == '1' else 0)\nif rank == '0': os._exit(76)\nos.kill(os.getpid(), signal.SIGKILL)",
            76,
            ["error: rank 0 on a ended with exit code 76", "error: rank 1 on b ended with SIGKILL"],
        ),
    ],
    ids=["well", "all fail alike", "one fails", "one is killed", "the news of a death comes late"],
)
def test_without_a_record_the_ranks_decide_and_those_that_failed_first_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, code: int, said: list[str]
) -> None:
    settings = config(tmp_path, "a", "b", peer_grace_s=5.0 if "0.3" in text else 0.1)
    assert deepspeed.run(settings, job(tmp_path, text)) == code
    assert capfd.readouterr().err.splitlines() == said


def test_rank_0_speaks_and_logs_take_the_rest(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = "print('this is', rank, flush=True); print('aside', rank, file=sys.stderr)"
    assert deepspeed.run(config(tmp_path, "a", "b", logs=str(tmp_path / "logs")), job(tmp_path, text)) == 0
    assert capfd.readouterr() == ("this is 0\n", "aside 0\n")
    assert (tmp_path / "logs" / "rank-00001.log").read_text() == "this is 1\naside 1\n"


def test_signals_have_their_former_meaning_after_a_job(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    assert deepspeed.run(config(tmp_path, "a"), job(tmp_path, "")) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
