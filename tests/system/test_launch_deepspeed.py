"""The deepspeed launcher over two hosts with real sshd: the same run as on one machine, and an end that leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml

from scaletrain import checkpoint
from scaletrain.train.metrics import read_jsonl
from tests import streams, tiny
from tests.faults.table import Add
from tests.hosts import ADDRESSES, NAMES, Hosts, missing, two_hosts

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 150.0
STEPS = 6

both_transports = pytest.mark.parametrize("transport", ["ssh", "pdsh"])


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts")) as found:
        yield found


@pytest.fixture
def nothing_left(hosts: Hosts) -> Iterator[None]:
    """The hosts run nothing when a test ends, and not only some time later."""
    yield
    assert [hosts.processes(host) for host in range(2)] == [{}, {}]


def wait_until(true: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> bool:
    end = time.monotonic() + timeout_s
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def backend(hosts: Hosts, folder: Path, transport: str, slots: int = 1, **settings: Any) -> list[str]:
    """The launcher's settings on a command line, with a hostfile of both hosts."""
    (folder / "hosts").write_text("".join(f"{name} slots={slots}\n" for name in NAMES))
    given = {
        "name": "deepspeed",
        "hostfile": folder / "hosts",
        "transport": transport,
        "ssh_config": hosts.ssh_config,
        **settings,
    }
    return [f"backend.{name}={value}" for name, value in given.items()]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}


# --------------------------------------------------------------------------------------------------------- whole verbs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the runs read: `prepared`, `encoder`, and the files of a task."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.corpus(folder)
    streams.encoder(folder / "encoder")
    streams.task(folder, "fruit")
    return folder


def pretrain(inputs: Path, output: Path) -> dict[str, Any]:
    prepared = inputs / "prepared"
    data = {"corpora": [{"path": str(prepared)}], "chunks_per_step": 8, "slots": {"micro_batch_tokens": 512}}
    return tiny.settings(prepared, output, steps=STEPS, data=data)


def finetune(inputs: Path, output: Path) -> dict[str, Any]:
    return streams.finetuning(inputs / "encoder", output, streams.task(inputs, "fruit"))


SETTINGS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {"pretrain": pretrain, "finetune": finetune}
"""Verb -> the settings of a short run on the inputs, into a folder."""


def job(verb: str, inputs: Path, output: Path, **changes: Any) -> list[str]:
    """The command line of a verb."""
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**SETTINGS[verb](inputs, output), **changes}))
    return [verb, "--config", str(file)]


def launch(settings: list[str], job: list[str]) -> list[str]:
    return [sys.executable, "-m", "scaletrain", "launch", *settings, "--", *job]


def run(command: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=TIMEOUT_S)


def losses(output: Path) -> list[str]:
    """Loss of every step to the bit."""
    return [line["loss_hex"] for line in read_jsonl(output / "metrics.jsonl") if line["kind"] == "step"]


def weights(output: Path) -> dict[str, str]:
    """Digest of every file of tensors in the last checkpoint: weights and moments of every rank."""
    last = checkpoint.find(output / "checkpoints")[0].folder
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in last.glob("*.safetensors")}


def record(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "exit.json").read_text())
    return found


@pytest.fixture(scope="module")
def local(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run folder of a verb on two ranks of one machine."""
    done: dict[str, Path] = {}

    def folder(verb: str) -> Path:
        if verb not in done:
            output = tmp_path_factory.mktemp(verb) / "run"
            ended = run(launch(["backend.ranks=2"], job(verb, inputs, output)))
            assert ended.returncode == 0, ended.stderr
            done[verb] = output
        return done[verb]

    return folder


@both_transports
@pytest.mark.parametrize("verb", SETTINGS)
@pytest.mark.usefixtures("nothing_left")
def test_two_hosts_give_the_losses_and_weights_of_two_local_ranks_to_the_bit(
    hosts: Hosts, inputs: Path, local: Callable[[str], Path], tmp_path: Path, verb: str, transport: str
) -> None:
    settings = backend(hosts, tmp_path, transport)
    done = run(hosts.on_first(launch(settings, job(verb, inputs, tmp_path / "run"))))
    assert done.returncode == 0, done.stderr
    assert record(tmp_path / "run") == record(local(verb))
    assert losses(tmp_path / "run") == losses(local(verb))
    assert weights(tmp_path / "run") == weights(local(verb)) != {}


@pytest.mark.usefixtures("nothing_left")
def test_a_request_to_stop_is_a_checkpoint_and_75_on_all_hosts(hosts: Hosts, inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = launch(backend(hosts, tmp_path, "pdsh"), job("pretrain", inputs, output, steps=100_000))
    launcher = subprocess.Popen(hosts.on_first(command), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        assert wait_until(lambda: (output / "metrics.jsonl").exists() and bool(losses(output)))
        launcher.terminate()
        assert launcher.wait(timeout=60) == 75
    finally:
        launcher.kill()
        launcher.communicate()
    stopped = record(output)
    assert stopped["code"] == 75
    assert [each.progress.step for each in checkpoint.find(output / "checkpoints")] == [stopped["step"]]


def test_a_job_goes_on_without_a_host_that_was_lost(tmp_path: Path, inputs: Path, fault: Add) -> None:
    """Everything on it dies at once, and it does not come back: one rank takes the steps of two, with the same losses."""
    if reason := missing():
        pytest.skip(reason)
    changes = {"steps": 24, "checkpoint": {"every_steps": 2}}
    assert run(launch(["backend.ranks=2"], job("pretrain", inputs, tmp_path / "whole", **changes))).returncode == 0
    (tmp_path / "hosts").mkdir()
    restarts = {"restarts.attempts": 2, "restarts.backoff_s": 0.2, "min_hosts": 1, "peer_grace_s": 1.0}
    with two_hosts(tmp_path / "hosts") as hosts:
        settings = backend(hosts, tmp_path / "hosts", "ssh", **restarts)
        command = hosts.on_first(launch(settings, job("pretrain", inputs, tmp_path / "run", **changes)))
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
        try:
            metrics = tmp_path / "run/metrics.jsonl"
            assert wait_until(lambda: metrics.exists() and len(losses(tmp_path / "run")) > 4)
            killed = time.monotonic()
            for number in (hosts.daemons[1], *hosts.processes(1)):
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            _, said = launcher.communicate(timeout=TIMEOUT_S)
        finally:
            launcher.kill()
            launcher.communicate()
    assert launcher.returncode == 0, said
    assert "warning: beta is left out: " in said
    rows = [json.loads(line) for line in (tmp_path / "run/attempts.jsonl").read_text().splitlines()]
    assert [row["code"] for row in rows] == [76, 0]
    left, right = ([float.fromhex(each) for each in losses(tmp_path / name)] for name in ("whole", "run"))
    assert right == pytest.approx(left, abs=1e-5)
    assert checkpoint.find(tmp_path / "run/checkpoints")[0].manifest["world_size"] == 1
    detect_s = max(0.0, time.monotonic() - killed - rows[1]["seconds"])
    fault(
        fault="F8",
        injected="one host of two is gone",
        outcome="goes on with one; losses to 1e-5",
        detect_s=detect_s,
        lost_steps=1,
    )


# ------------------------------------------------------------------------------- how a job ends, with ranks that learn nothing

LAUNCHER = """
import json, sys
from pathlib import Path
from scaletrain import config, launcher
settings = config.load(launcher.LaunchConfig, None, sys.argv[2:])
sys.exit(launcher.deepspeed.run(settings.backend, launcher.Job(argv=tuple(json.loads(sys.argv[1])), output=None)))
"""
HERE = "import json, os, signal, sys, time; rank = os.environ['RANK']; folder = sys.argv[1] + '/'\n"


def ranks_run(text: str, folder: Path, *arguments: str) -> str:
    """The command of every rank: a Python program that knows its ``rank`` and a ``folder``, as JSON."""
    return json.dumps([sys.executable, "-S", "-E", "-c", HERE + text, str(folder), *arguments])


@contextmanager
def running(hosts: Hosts, folder: Path, text: str, settings: list[str]) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A launcher on the first host whose ranks have begun, with their process numbers."""
    here = text + "open(folder + 'pid' + rank + '.tmp', 'w').write(str(os.getpid()))\n"
    here += "os.rename(folder + 'pid' + rank + '.tmp', folder + 'pid' + rank)\ntime.sleep(100)"
    command = hosts.on_first([sys.executable, "-c", LAUNCHER, ranks_run(here, folder), *settings])
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    files = [folder / f"pid{rank}" for rank in range(2)]
    try:
        assert wait_until(lambda: launcher.poll() is not None or all(file.exists() for file in files))
        assert launcher.poll() is None, launcher.communicate()[1]
        yield launcher, [int(file.read_text()) for file in files]
    finally:
        launcher.kill()
        launcher.communicate()


@both_transports
@pytest.mark.usefixtures("nothing_left")
def test_ranks_get_their_arguments_and_variables_unchanged_and_their_host(hosts: Hosts, tmp_path: Path, transport: str) -> None:
    hostile = "a  b'c\"d $(touch pwned) `touch pwned` %h %% \\ ; touch pwned\n#é"
    text = "json.dump([dict(os.environ), sys.argv[2:], os.getcwd(), os.readlink('/proc/self/ns/net')], open(folder + rank, 'w'))"
    settings = backend(hosts, tmp_path, transport, slots=2, port=29503, environment="[NOTE]")
    command = hosts.on_first([sys.executable, "-c", LAUNCHER, ranks_run(text, tmp_path, hostile, ""), *settings])
    done = run(command, NOTE=hostile, UNASKED="x", NCCL_DEBUG="WARN")
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(4)]
    networks = [os.readlink(f"/proc/{daemon}/ns/net") for daemon in hosts.daemons]
    for rank, (variables, arguments, folder, network) in enumerate(found):
        expected = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29503"}
        expected |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % 2),
            "NOTE": hostile,
            "NCCL_DEBUG": "WARN",
            "OMP_NUM_THREADS": "1",
        }
        expected |= {"GLOO_SOCKET_IFNAME": "cable"}
        assert {name: variables[name] for name in expected} == expected
        assert "UNASKED" not in variables
        assert (arguments, folder, network) == ([hostile, ""], str(ROOT), networks[rank // 2])
    assert not (ROOT / "pwned").exists()


@pytest.mark.parametrize(("transport", "number"), [("ssh", signal.SIGUSR1), ("pdsh", signal.SIGTERM)], ids=["ssh", "pdsh"])
@pytest.mark.usefixtures("nothing_left")
def test_a_signal_reaches_every_rank_on_every_host(hosts: Hosts, tmp_path: Path, transport: str, number: signal.Signals) -> None:
    text = "def end(number, frame): open(folder + 'got' + rank, 'w').write(str(number)); os._exit(75)\n"
    text += f"signal.signal({int(number)}, end)\n"
    with running(hosts, tmp_path, text, backend(hosts, tmp_path, transport)) as (launcher, _):
        launcher.send_signal(number)
        assert launcher.wait(timeout=20) == 75
    assert [(tmp_path / f"got{rank}").read_text() for rank in range(2)] == [str(int(number))] * 2


@both_transports
@pytest.mark.usefixtures("nothing_left")
def test_a_killed_rank_is_a_lost_peer_that_is_named_and_takes_the_other_host_with_it(
    hosts: Hosts, tmp_path: Path, transport: str
) -> None:
    text = "print('last words of', rank, flush=True)\n"
    settings = backend(hosts, tmp_path, transport, peer_grace_s=0.2)
    with running(hosts, tmp_path, text, settings) as (launcher, ranks):
        os.kill(ranks[1], signal.SIGKILL)
        assert launcher.wait(timeout=20) == 76
        assert launcher.stderr is not None
        said = [line for line in launcher.stderr.read().splitlines() if not line.startswith("pdsh@")]
    assert said == ["error: rank 1 on beta ended with SIGKILL", "[rank 1] last words of 1"]


@both_transports
def test_no_rank_outlives_a_launcher_that_was_killed(hosts: Hosts, tmp_path: Path, transport: str) -> None:
    with running(hosts, tmp_path, "", backend(hosts, tmp_path, transport)) as (launcher, _):
        launcher.kill()
        assert wait_until(lambda: not any(hosts.processes(host) for host in range(2)), timeout_s=10)


@pytest.mark.usefixtures("nothing_left")
def test_ranks_that_do_not_stop_are_killed_when_their_time_is_up(hosts: Hosts, tmp_path: Path) -> None:
    settings = backend(hosts, tmp_path, "ssh", grace_s=0.2)
    with running(hosts, tmp_path, "signal.signal(signal.SIGINT, signal.SIG_IGN)\n", settings) as (launcher, _):
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(timeout=20) == 128 + signal.SIGINT


@both_transports
@pytest.mark.usefixtures("nothing_left")
def test_a_host_whose_connection_broke_is_named_and_its_ranks_are_waited_for(
    hosts: Hosts, tmp_path: Path, transport: str
) -> None:
    settings = backend(hosts, tmp_path, transport, peer_grace_s=0.2)
    with running(hosts, tmp_path, "", settings) as (launcher, ranks):
        (watching,) = [number for number, line in hosts.processes(1).items() if "run-ranks" in line]
        os.kill(watching, signal.SIGSTOP)  # It does not notice yet that the launcher cannot see it any more.
        for session in hosts.sessions(1):
            os.kill(session, signal.SIGKILL)
        assert wait_until(lambda: ranks[0] not in hosts.processes(0), timeout_s=20)
        time.sleep(1.0)
        assert launcher.poll() is None
        os.kill(watching, signal.SIGCONT)
        assert launcher.wait(timeout=20) == 76
        assert launcher.stderr is not None
        said = [line for line in launcher.stderr.read().splitlines() if not line.startswith("pdsh@")]
    assert said == ["error: the connection to beta broke", f"Connection to {ADDRESSES[1]} closed by remote host."]


# ------------------------------------------------------------------------------------------------- hosts that cannot be used


@both_transports
@pytest.mark.usefixtures("nothing_left")
def test_an_unknown_host_is_named_before_anything_starts(hosts: Hosts, tmp_path: Path, transport: str) -> None:
    (tmp_path / "x.yaml").write_text(f"output: {tmp_path / 'run'}\n")
    settings = backend(hosts, tmp_path, transport)
    (tmp_path / "hosts").write_text("alpha slots=1\ngamma slots=1\n")
    done = run(hosts.on_first(launch(settings, ["pretrain", "--config", str(tmp_path / "x.yaml")])))
    assert done.returncode == 65
    assert done.stderr.startswith(
        f"error: {tmp_path}/hosts:2: got 'gamma'; the host must be reachable by ssh without a password: ssh: Could not resolve"
    )
    assert not list((tmp_path / "run").iterdir())


def test_a_host_that_does_not_listen_is_named_before_anything_starts(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("{}")
    settings = backend(hosts, tmp_path, "ssh", ssh_port=2222)
    done = run(hosts.on_first(launch(settings, ["pretrain", "--config", str(tmp_path / "x.yaml")])))
    assert (done.returncode, done.stderr.splitlines()) == (
        65,
        [
            f"error: {tmp_path}/hosts:1: got 'alpha'; the host must be reachable by ssh without a password: "
            f"ssh: connect to host {ADDRESSES[0]} port 2222: Connection refused. `ssh -o BatchMode=yes alpha true` must succeed."
        ],
    )
