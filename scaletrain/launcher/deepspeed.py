"""Ranks on the hosts of a DeepSpeed hostfile, through ssh or pdsh.

Hostfile and transports are those of the ``deepspeed`` command. What is started on a node is our own `node`, and not
``deepspeed.launcher.launch``: that dies of SIGUSR1 and leaves its ranks behind, or lives on with them when the launcher has gone;
when it is killed the job ends with 0; and what cleans up after it is ``pkill -f``, which also hits other jobs of the user.

Two things are asked of the nodes: the same paths (Python, scaletrain, the working folder), and one file system under the run
folder, where rank 0 records how the job ended. Both are looked at before anything starts.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from scaletrain.errors import ConfigError, StorageError
from scaletrain.launcher import hostfile, transport
from scaletrain.launcher.group import signals_to
from scaletrain.launcher.hostfile import Host
from scaletrain.launcher.node import PassOn, RunRanks, Sight
from scaletrain.launcher.nodes import ANSWER_S, Nodes
from scaletrain.launcher.outcome import forget, outcome, recorded
from scaletrain.launcher.plan import Job, LaunchPlan, Process, on_nodes
from scaletrain.launcher.restart import Ending, Restarts, again
from scaletrain.launcher.transport import Transport
from scaletrain.launcher.watch import Limits

Address = Annotated[str, Field(pattern="^[A-Za-z0-9]([A-Za-z0-9._:-]*[A-Za-z0-9])?$")]
Interface = Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._:-]{0,14}$")]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepspeedConfig:
    """Ranks on the hosts of a hostfile, which must share the paths of this machine and the file system of the run folder."""

    name: Literal["deepspeed"] = "deepspeed"
    """This launcher."""
    hostfile: Path
    """One ``host slots=N`` per line; N is the number of ranks on that host (on GPUs, one each). The first host has rank 0."""
    include: tuple[str, ...] = ()
    """Hosts of the hostfile to use; none means all."""
    exclude: tuple[str, ...] = ()
    """Hosts of the hostfile to leave out."""
    transport: Literal["ssh", "pdsh"] = "ssh"
    """How a host is reached, without a password; pdsh is used with ssh."""
    ssh_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Where sshd listens; null leaves it to the ssh configuration."""
    ssh_config: Path | None = None
    """A configuration file for ssh in the place of the user's and the system's."""
    master_addr: Address | None = None
    """Where the ranks meet: an address of the first host; null takes the one at which ssh reaches it."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """The port at which they meet; 0 picks one that is free on the first host."""
    interface: Interface | None = None
    """The network interface of gloo and NCCL on every host; null: gloo has the one to the first host, NCCL chooses."""
    environment: tuple[str, ...] = ()
    """Further variables to carry to the hosts, by name: beyond some of NCCL, gloo, OpenMP, Hugging Face, Python. No secrets."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that a host has to answer before the job starts; of these, ten to be reached."""
    grace_s: Annotated[float, Field(ge=0)] = 30.0
    """Seconds that the ranks have to save and stop after SIGTERM, SIGINT or SIGUSR1, before they are killed."""
    peer_grace_s: Annotated[float, Field(ge=0)] = 10.0
    """Seconds that the other ranks of a host, and then the other hosts, have to notice a failed one, before they are killed."""
    logs: Path | None = None
    """Folder for the output of ranks above 0, one file each; without one only the last lines of a failed rank are shown."""
    limits: Limits = field(default_factory=Limits)
    """How long a rank may give no sign of life before the job is ended."""
    restarts: Restarts = field(default_factory=Restarts)
    """What follows from a failure."""
    min_hosts: Annotated[int, Field(ge=1)] | None = None
    """With so many hosts a job that failed is started again, without those that do not answer; null: with all or not at all. The
    plan's slots must fit the ranks that are left (slot_multiple)."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """What tells one job from others: its name on the nodes, and where its ranks meet."""

    job: str
    address: str
    port: int


def run(config: DeepspeedConfig, job: Job, *, dry_run: bool = False) -> int:
    """Start the ranks, wait for them, answer with the job's exit code. Raises ConfigError and StorageError."""
    hosts: Sequence[Host] = hostfile.select(hostfile.read(config.hostfile), config.include, config.exclude)
    way = way_to_nodes(config)
    if dry_run:
        meeting = Meeting("dry-run", config.master_addr or hosts[0].name, config.port)
        if not (config.master_addr and config.port):
            print(f"# MASTER_ADDR and MASTER_PORT, where they are not set, are asked of {hosts[0].name} when the job starts.")
        print(plan(config, hosts, job, way, meeting).text())
        return 0
    transport.require(config.transport)

    def once(number: int) -> Ending:
        nonlocal hosts
        if number and config.min_hosts is not None:
            hosts = _reachable(config, hosts, way)
        return _once(config, hosts, job.attempt(number), way, number)

    return again(config.restarts, once, job.output)


def _reachable(config: DeepspeedConfig, hosts: Sequence[Host], way: Transport) -> list[Host]:
    """Those that still answer. Raises ConfigError where they are too few."""
    found = []
    for host in hosts:
        try:
            transport.look_around(way, [host], None, config.start_timeout_s)
        except ConfigError as error:
            print(f"warning: {host.name} is left out: {error}", file=sys.stderr)
        else:
            found.append(host)
    if len(found) < (config.min_hosts or 1):
        rule = f"so many hosts must be left, and {', '.join(host.name for host in found) or 'none'} answered"
        raise ConfigError("backend.min_hosts", config.min_hosts, rule, "Repair the others, or allow fewer")
    return found


def _once(config: DeepspeedConfig, hosts: Sequence[Host], job: Job, way: Transport, number: int) -> Ending:
    record = forget(job.output)
    meeting = Meeting(secrets.token_hex(8), "", 0)
    with _shared_file(job.output, meeting.job) as shared:
        sights = transport.look_around(way, hosts, shared, config.start_timeout_s)
    meeting = replace(meeting, address=config.master_addr or _address(hosts, sights), port=config.port or sights[0].port)

    def pass_on(number: int, asked: int) -> Process:
        # A request may come before the ranks have: it waits for them. To end, what has not begun need not be waited for.
        patience_s = 0.0 if asked == signal.SIGKILL else ANSWER_S / 2
        order = PassOn(job=meeting.job, node=hosts[number].name, number=asked, patience_s=patience_s)
        return way.carry(hosts[number], number, order)

    carriers = plan(config, hosts, job, way, meeting, number).carriers
    nodes = Nodes(carriers, pass_on, grace_s=config.grace_s, peer_grace_s=config.peer_grace_s)
    with signals_to(nodes.request_stop):
        try:
            nodes.start()
            nodes.wait()
        finally:
            nodes.end()
    return Ending(outcome(nodes, record), nodes.requested is not None, said=recorded(record))


def plan(
    config: DeepspeedConfig, hosts: Sequence[Host], job: Job, way: Transport, meeting: Meeting, attempt: int = 0
) -> LaunchPlan:
    """What is run here for each host, and which ranks that starts there. Pure.

    Beyond what is shown each node adds OMP_NUM_THREADS and GLOO_SOCKET_IFNAME where nobody has set them: it knows its cores
    and its interfaces.
    """
    slots = {host.name: host.slots for host in hosts}
    carriers = tuple(
        way.carry(
            host,
            number,
            RunRanks(
                job=meeting.job,
                node=host.name,
                slots=slots,
                argv=job.argv,
                address=meeting.address,
                port=meeting.port,
                grace_s=config.grace_s,
                peer_grace_s=config.peer_grace_s,
                logs=config.logs,
                limits=config.limits,
                stacks=job.output.resolve() / "stacks" / f"attempt-{attempt}" if job.output else None,
            ),
        )
        for number, host in enumerate(hosts)
    )
    return replace(on_nodes(job.argv, slots, meeting.address, meeting.port, way.environment), carriers=carriers)


def way_to_nodes(config: DeepspeedConfig) -> Transport:
    """The transport with its options and environment. Raises ConfigError."""
    options = ["-x", "-a", "-oBatchMode=yes", "-oConnectTimeout=10", "-oServerAliveInterval=15"]
    options += [f"-p{config.ssh_port}"] if config.ssh_port else []
    if config.ssh_config:
        file = str(config.ssh_config.resolve())
        if not config.ssh_config.is_file() or file.split() != [file]:
            rule = "must be a file that is there, without spaces in its path: pdsh cuts the options of ssh at spaces"
            raise ConfigError("backend.ssh_config", file, rule)
        options.append(f"-F{file}")
    environment = transport.carried(os.environ, config.environment, config.interface)
    return Transport(name=config.transport, options=tuple(options), folder=Path.cwd(), environment=environment)


def _address(hosts: Sequence[Host], sights: Sequence[Sight]) -> str:
    """Where the others reach the first host: there where we do, unless that is only from here. Raises ConfigError."""
    kinds = [_kind(sight.address) for sight in sights]
    if kinds[0] != "network" and set(kinds) != {"loopback"}:
        rule, remedy = (
            f"this is how {hosts[0].name} is reached from here, and other hosts cannot",
            "Set it to one of its addresses.",
        )
        raise ConfigError("backend.master_addr", sights[0].address, rule, remedy)
    return sights[0].address


def _kind(address: str) -> Literal["network", "loopback", "unknown"]:
    """sshd says UNKNOWN where it is not asked through a network."""
    try:
        return "loopback" if ipaddress.ip_address(address.partition("%")[0]).is_loopback else "network"
    except ValueError:
        return "unknown"


@contextmanager
def _shared_file(output: Path | None, job: str) -> Iterator[Path | None]:
    """A file in the run folder by which the nodes are asked whether they see the same one. Raises StorageError."""
    if output is None or (output.exists() and not output.is_dir()):  # The latter rank 0 says better.
        yield None
        return
    file = output.resolve() / f".launch-{job}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise StorageError(f"output: got {str(output)!r}; it cannot be written ({error.strerror})") from error
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)
