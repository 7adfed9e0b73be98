"""Several ranks in a test, in about the time of one.

A fork server imports torch, deepspeed and transformers once, before any thread exists, and forks a process per rank on request::

    results = run(work, world=2, arguments={"steps": 3})   # work is a function of a test module: work(**arguments) -> JSON value

Every rank is a real process with a real gloo group on a free port. What a rank returns comes back as JSON; what it raises comes
back as its traceback in RankFailed. Ranks that outlive ``timeout_s`` are killed and named.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class RankFailed(AssertionError):
    """One or more ranks raised, died or hung; ``outcomes`` has what each of them left."""

    def __init__(self, outcomes: list[dict[str, Any]]) -> None:
        self.outcomes = outcomes
        super().__init__(
            "\n".join(f"--- rank {o['rank']}: {o['status']}\n{o.get('error', '')}" for o in outcomes if o["status"] != "ok")
        )


def run(
    work: Callable[..., Any], world: int, arguments: Mapping[str, Any] | None = None, *, timeout_s: float = 120.0
) -> list[Any]:
    """``work(**arguments)`` on ``world`` ranks; what each returned, in rank order. Raises RankFailed."""
    outcomes = attempt(work, world, arguments, timeout_s=timeout_s)
    if any(outcome["status"] != "ok" for outcome in outcomes):
        raise RankFailed(outcomes)
    return [outcome["value"] for outcome in outcomes]


def attempt(
    work: Callable[..., Any],
    world: int,
    arguments: Mapping[str, Any] | None = None,
    *,
    timeout_s: float = 120.0,
) -> list[dict[str, Any]]:
    """Like :func:`run`, each rank's outcome: ``ok`` (value), ``raised`` (error, exit_code), ``signal N``, ``hung``."""
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "module": work.__module__,
            "function": work.__qualname__,
            "arguments": dict(arguments or {}),
            "world": world,
            "port": _free_port(),
            "folder": folder,
            "timeout_s": timeout_s,
        }
        _send(_server(), request)
        statuses = _receive(_server())
        return [_outcome(Path(folder), rank, status) for rank, status in enumerate(statuses)]


def _outcome(folder: Path, rank: int, status: str) -> dict[str, Any]:
    report = folder / f"{rank}.json"
    left = json.loads(report.read_text()) if report.exists() else {}
    if status != "exit 0" or not left:
        left.setdefault("error", "")
        left["status"] = left.get("status", status) if status.startswith("exit") else status
    return {"rank": rank, **left}


# --- the server: one process, no threads, forks on request


_connection: socket.socket | None = None


def _server() -> socket.socket:
    """The connection to the server. A new interpreter, not a fork: this one may already run torch's threads."""
    global _connection
    if _connection is None:
        _connection, theirs = socket.socketpair()
        command = [sys.executable, __file__, str(theirs.fileno())]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        server = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
        )
        theirs.close()
        atexit.register(_stop, _connection, server)
    return _connection


def _stop(connection: socket.socket, server: subprocess.Popen[bytes]) -> None:
    connection.close()
    server.wait(timeout=30)


def _serve(connection: socket.socket) -> None:
    _import_everything()
    while True:
        try:
            request = _receive(connection)
        except EOFError:
            os._exit(0)
        children = [_fork(connection, request, rank) for rank in range(request["world"])]
        _send(connection, _wait(children, request))


def _import_everything() -> None:
    """What a rank would import, some of it only when an engine is made; and the proof that forking is still safe."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # through torch.compile, which imports torch's compilers
    import torch
    import torch.utils.tensorboard
    from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM  # noqa: F401

    import scaletrain.recipes.pretrain  # noqa: F401

    torch.set_num_threads(1)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"{threads} threads after the imports: a fork would inherit locks that nobody releases")


def _fork(connection: socket.socket, request: dict[str, Any], rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    connection.close()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["world"]))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(request["port"]))
    report: dict[str, Any] = {}
    try:
        function: Any = importlib.import_module(request["module"])
        for part in request["function"].split("."):
            function = getattr(function, part)
        report = {"status": "ok", "value": function(**request["arguments"])}
    except BaseException as error:
        report = {"status": "raised", "error": traceback.format_exc(), "type": type(error).__name__}
        report["exit_code"] = getattr(error, "exit_code", 70)
    Path(request["folder"], f"{rank}.json").write_text(json.dumps(report))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if report["status"] == "ok" else 1)


def _wait(children: list[int], request: dict[str, Any]) -> list[str]:
    statuses: dict[int, str] = {}
    deadline = time.monotonic() + request["timeout_s"]
    while len(statuses) < len(children):
        for pid in children:
            if pid not in statuses:
                done, code = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = f"signal {os.WTERMSIG(code)}" if os.WIFSIGNALED(code) else f"exit {os.WEXITSTATUS(code)}"
        if time.monotonic() > deadline:
            hung = [pid for pid in children if pid not in statuses]
            for pid in hung:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                statuses[pid] = "hung"
        time.sleep(0.005)
    return [statuses[pid] for pid in children]


# --- messages: a length, then JSON


def _send(connection: socket.socket, tree: Any) -> None:
    data = json.dumps(tree).encode()
    connection.sendall(struct.pack("<I", len(data)) + data)


def _receive(connection: socket.socket) -> Any:
    return json.loads(_exactly(connection, struct.unpack("<I", _exactly(connection, 4))[0]))


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        select.select([connection], [], [])
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _free_port() -> int:
    """Below the ports that the kernel gives to connections (ip_local_port_range), so that none takes it before the ranks do."""
    while True:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
