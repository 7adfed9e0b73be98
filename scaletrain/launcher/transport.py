"""How an order gets to a node: as one command line, by ssh or by pdsh, with an environment of which every name is allowed.

A command that goes through ssh is read by a shell on the node, so everything in it is quoted; what becomes an argument of ssh or
pdsh themselves was checked before (`hostfile.NAME`). Values of the environment are part of the command, and so are visible to
everybody in the process list of the node: no secrets.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import scaletrain
from scaletrain import config
from scaletrain.errors import ConfigError
from scaletrain.launcher import node
from scaletrain.launcher.hostfile import Host
from scaletrain.launcher.plan import Process

SSH_FAILED = 255
"""The exit code of ssh, and of pdsh with it, when there was no connection or it broke."""

CARRIED = (
    "DS_ACCELERATOR",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "LD_LIBRARY_PATH",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_OFFLINE",
)
"""Variables that every node gets where they are set; all others must be named in ``backend.environment``."""
CARRIED_FAMILIES = ("GLOO_", "NCCL_", "TORCH_NCCL_", "UCX_")
"""How the names of further ones begin."""

_SECRET = re.compile(r"PASSW|SECRET|CREDENTIAL|TOKENS?(_|$)|(^|_)(PASS|AUTH|KEY|(API|ACCESS|PRIVATE)KEY)(_|$)", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"://[^/@\s]*:[^/@\s]+@")
"""A URL with a password in it."""


def carried(environment: Mapping[str, str], extra: Sequence[str], interface: str | None) -> dict[str, str]:
    """What of ``environment`` goes to the nodes, by name. Raises ConfigError for an ``extra`` that is not set, or a secret."""
    for name in extra:
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) or name not in environment:
            rule = "must be the name of a variable that is set where the job is launched"
            raise ConfigError("backend.environment", name, rule, "Set it there, or take it off the list.")
        if _SECRET.search(name) or _SECRET_VALUE.search(environment[name]):
            rule = "the process list of every node shows the values of carried variables to everybody, so secrets are refused"
            raise ConfigError("backend.environment", name, rule, "Put it into a file that the job reads.")
    taken = {name for name in environment if name in CARRIED or name in extra or name.startswith(CARRIED_FAMILIES)}
    chosen = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
    # Unbuffered: what rank 0 prints goes through a pipe, and would arrive in lumps.
    return {"PYTHONUNBUFFERED": "1", **{name: environment[name] for name in sorted(taken)}, **chosen}


@dataclass(frozen=True, kw_only=True, slots=True)
class Transport:
    """Makes command lines; starts nothing."""

    name: Literal["ssh", "pdsh"]
    options: tuple[str, ...]
    """Of ssh, which pdsh uses as well."""
    folder: Path
    """Where the command runs on the node: the nodes share this machine's paths."""
    environment: Mapping[str, str]
    python: str = sys.executable

    def carry(self, host: Host, number: int, order: node.LookAround | node.RunRanks | node.PassOn) -> Process:
        """The process here that has ``host``, the ``number``-th node, carry out ``order`` and ends with its exit code."""
        added = "".join(f"{name}={shlex.quote(value)} " for name, value in self.environment.items())
        command = shlex.join([self.python, "-m", "scaletrain.launcher", node.written(order)])
        # exec: no shell stands between sshd and the process that watches over the ranks.
        line = f"cd {shlex.quote(str(self.folder))} && exec env {added}{command}"
        if self.name == "ssh":
            return Process(node=host.name, rank=number, argv=("ssh", *self.options, "--", host.name, line), env={})
        # One pdsh per host: one for all says how the worst of them ended when all have, not which it was, nor when.
        # It replaces %h, %u and %n in what it is given; its own default for the arguments of ssh would override the user there.
        argv = ("pdsh", "-S", "-N", "-R", "ssh", "-w", host.name, line.replace("%", "%%"))
        options = " ".join(option.replace("%", "%%") for option in self.options)
        return Process(node=host.name, rank=number, argv=argv, env={"PDSH_SSH_ARGS": f"{options} %h"})


def require(transport: Literal["ssh", "pdsh"]) -> None:
    """Raises ConfigError where a program that it needs is not installed."""
    if transport == "pdsh" and shutil.which("pdsh") is None:
        remedy = "Install the package pdsh, or set backend.transport=ssh."
        raise ConfigError("backend.transport", transport, "the program pdsh is not installed on this machine", remedy)
    if shutil.which("ssh") is None:
        remedy = "Install an ssh client (on Debian the package openssh-client)."
        raise ConfigError("backend.transport", transport, "the program ssh is not installed on this machine", remedy)


def look_around(transport: Transport, hosts: Sequence[Host], shared: Path | None, timeout_s: float) -> list[node.Sight]:
    """What each host answers, all asked at the same time. Raises ConfigError with the line of one that cannot take part."""
    carriers = [transport.carry(host, number, node.LookAround(shared=shared)) for number, host in enumerate(hosts)]
    processes = [start(carrier) for carrier in carriers]
    deadline = time.monotonic() + timeout_s
    try:
        return [_sight(host, process, deadline, shared) for host, process in zip(hosts, processes, strict=True)]
    finally:
        for process in processes:
            stop(process)


def start(carrier: Process) -> subprocess.Popen[str]:
    """For orders that are carried out at once. In a group of its own: Ctrl-C at the terminal is the launcher's to answer."""
    pipe, env = subprocess.PIPE, {**os.environ, **carrier.env}
    return subprocess.Popen(
        carrier.argv, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace", process_group=0
    )


def stop(process: subprocess.Popen[str]) -> None:
    """Kill it, and the ssh that pdsh runs under it, unless it has ended."""
    with process:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _sight(host: Host, process: subprocess.Popen[str], deadline: float, shared: Path | None) -> node.Sight:
    try:
        output, errors = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise ConfigError(
            host.where, host.name, "the host did not answer in time", "Is it up? See backend.start_timeout_s."
        ) from None
    reasons = [line for line in errors.strip().splitlines() if not line.startswith("pdsh@")]  # which only says that ssh failed
    said = reasons[-1].strip() if reasons else "no reason given"
    if process.returncode == SSH_FAILED:
        remedy = f"`ssh -o BatchMode=yes {host.name} true` must succeed."
        raise ConfigError(host.where, host.name, f"the host must be reachable by ssh without a password: {said}", remedy)
    try:
        sight = config.decode(node.Sight, json.loads(output.strip().splitlines()[-1]))
    except (IndexError, ValueError, ConfigError):
        rule = f"the host must have the launcher's Python, scaletrain and working folder at the same paths: {said}"
        raise ConfigError(
            host.where, host.name, rule, f"On it, `cd {Path.cwd()} && {sys.executable} -m scaletrain` must work."
        ) from None
    if sight.version != scaletrain.__version__:
        rule = f"the host has scaletrain {sight.version}, this machine {scaletrain.__version__}"
        raise ConfigError(host.where, host.name, rule, "All nodes must have the same.")
    if shared is not None and not sight.sees_shared:
        rule = f"{host.name} does not see this folder: all nodes write into one, on a file system that they share"
        raise ConfigError("output", str(shared.parent), rule)
    return sight
