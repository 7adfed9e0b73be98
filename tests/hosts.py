"""Two hosts on one machine: network namespaces joined by a cable, each with its own sshd.

What they share is what the nodes of a cluster share: the file system. They also share process numbers, so that a test can see
from outside what runs on a host. Keys, configuration and sshd live and end with the test.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

NAMES = ("alpha", "beta")
"""Aliases in `Hosts.ssh_config`; no other name service knows them."""
ADDRESSES = ("10.77.0.1", "10.77.0.2")
"""Nothing outside the two can reach them, so that tests that run at the same time may all have these."""
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")


@dataclass(frozen=True)
class Hosts:
    """Two hosts that are up."""

    namespaces: tuple[str, ...]
    daemons: tuple[int, ...]
    """Process number of each sshd."""
    ssh_config: Path

    def on_first(self, command: Sequence[str]) -> list[str]:
        """``command`` as it is run on the first host."""
        return ["ip", "netns", "exec", self.namespaces[0], *command]

    def processes(self, host: int) -> dict[int, str]:
        """Number and command line of what runs on a host, sshd apart."""
        return {number: line for number, line in self._all(host).items() if not line.startswith("sshd:")}

    def sessions(self, host: int) -> list[int]:
        """Process numbers of the connections that a host's sshd serves."""
        return [number for number, line in self._all(host).items() if line.startswith("sshd:")]

    def _all(self, host: int) -> dict[int, str]:
        """Without the sshd that waits for connections."""
        listed = {int(number) for number in _do("ip", "netns", "pids", self.namespaces[host]).split()} - {self.daemons[host]}
        return {number: line for number in listed if (line := _command_line(number))}


def missing() -> str | None:
    """Why there can be no such hosts on this machine."""
    absent = [program for program in ("ip", "ssh", "ssh-keygen", "pdsh") if shutil.which(program) is None]
    absent += [] if SSHD else ["sshd"]
    if absent:
        return f"needs {', '.join(absent)} (on Debian: iproute2, openssh-client, openssh-server, pdsh)"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    probe = f"scaletrain-{secrets.token_hex(4)}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"needs network namespaces: {made.stderr.strip()}"
    _do("ip", "netns", "delete", probe)
    return None


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Two hosts that reach each other by ssh, without a password and by the names of `NAMES`; ``folder`` takes their files."""
    namespaces = tuple(f"scaletrain-{secrets.token_hex(4)}" for _ in NAMES)
    with ExitStack() as stack:
        for namespace in namespaces:
            _do("ip", "netns", "add", namespace)
            stack.callback(_tear_down, namespace)
            _do("ip", "-n", namespace, "link", "set", "lo", "up")
        first, second = namespaces
        _do("ip", "-n", first, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second)
        for namespace, address in zip(namespaces, ADDRESSES, strict=True):
            _do("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "cable")
            _do("ip", "-n", namespace, "link", "set", "cable", "up")
        ssh_config, sshd_config = _configured(folder)
        daemons = tuple(stack.enter_context(_sshd(namespace, sshd_config)).pid for namespace in namespaces)
        for address in ADDRESSES:
            _await_sshd(first, address)
        yield Hosts(namespaces, daemons, ssh_config)


def _tear_down(namespace: str) -> None:
    """With whatever a test that has failed may have left in it."""
    for number in _do("ip", "netns", "pids", namespace).split():
        with suppress(ProcessLookupError):
            os.kill(int(number), signal.SIGKILL)
    _do("ip", "netns", "delete", namespace)


def _configured(folder: Path) -> tuple[Path, Path]:
    """Keys and the configuration of both sides, made for this test."""
    for key in ("host_key", "user_key"):
        _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    host_key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{address} {host_key}" for address in ADDRESSES))
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    (folder / "ssh_config").write_text(
        "".join(f"Host {name}\n  HostName {address}\n" for name, address in zip(NAMES, ADDRESSES, strict=True))
        + f"Host *\n  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n  StrictHostKeyChecking yes\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
    )
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\n"
        "PasswordAuthentication no\nPidFile none\nUsePAM no\n"
    )
    return folder / "ssh_config", folder / "sshd_config"


@contextmanager
def _sshd(namespace: str, settings: Path) -> Iterator[subprocess.Popen[bytes]]:
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # an empty folder, in which its unprivileged part is locked up
    command = ["ip", "netns", "exec", namespace, str(SSHD), "-D", "-e", "-f", str(settings)]
    with (settings.parent / f"{namespace}.log").open("wb") as log:
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield daemon
    finally:
        daemon.kill()
        daemon.wait()


def _await_sshd(namespace: str, address: str) -> None:
    end = time.monotonic() + 20
    asking = ["ip", "netns", "exec", namespace, "ssh-keyscan", "-T", "1", address]
    while not subprocess.run(asking, capture_output=True).stdout:
        assert time.monotonic() < end, f"no sshd at {address}"
        time.sleep(0.05)


def _command_line(number: int) -> str:
    """Empty for a process that has ended."""
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):  # before it was opened, or after
        return ""


def _do(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
