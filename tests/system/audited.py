"""Every process of a command tells on itself: what it unpickled, started, bound and connected to.

``sitecustomize`` is imported by every Python that has its folder on PYTHONPATH, before the program's first line. An audit hook
cannot be taken away again, so that nothing that runs later can hide.
"""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOOK = """
import json, os, sys

_TOLD = os.path.join(os.environ["AUDIT_FOLDER"], f"{os.getpid()}.jsonl")
_HEARD = {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.bind", "socket.connect",
          "exec", "compile"}
_STDLIB = os.path.dirname(os.__file__) + os.sep


def _hook(event, arguments):
    if event not in _HEARD:
        return
    try:
        frame = sys._getframe(1)
    except ValueError:
        return  # the interpreter itself, with the program that it was started with
    if event in ("exec", "compile"):
        # A file's code is run by importing it. What is left is text that was put together while the program ran.
        file = frame.f_code.co_filename
        if file.startswith(("<frozen", _STDLIB)) and "site-packages" not in file:
            return
        made = arguments[0].co_filename if event == "exec" else arguments[1]
        if isinstance(made, (str, bytes)) and os.path.exists(made):
            return
        arguments = (made,)
    files = []
    while frame is not None:
        files.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")
        frame = frame.f_back
    line = json.dumps({"event": event, "arguments": [repr(a)[:300] for a in arguments[:2]], "files": files})
    with open(_TOLD, "a") as out:
        out.write(line + "\\n")


sys.addaudithook(_hook)
"""
"""Text that the standard library puts together (dataclasses, named tuples) is not told of."""


@dataclass
class Seen:
    """What a command did."""

    code: int
    output: str
    """Both streams."""
    events: list[dict[str, Any]] = field(default_factory=list)
    listening: set[str] = field(default_factory=set)
    """Addresses at which any of its processes took connections, without their ports."""
    commands: set[str] = field(default_factory=set)
    """Command lines of its processes, as everybody on the machine sees them."""


def run(command: Sequence[str], folder: Path, environment: dict[str, str], *, timeout_s: float = 150.0, **options: Any) -> Seen:
    """Runs it to its end. ``folder`` takes the hook and what it told."""
    told = folder / "told"
    told.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(HOOK)
    path = os.pathsep.join(filter(None, [str(folder), environment.get("PYTHONPATH", "")]))
    seen = Seen(0, "")
    with (folder / "output").open("w+b") as output:
        process = subprocess.Popen(
            command,
            env={**environment, "PYTHONPATH": path, "AUDIT_FOLDER": str(told)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )
        watch = threading.Thread(target=_watch, args=(process, seen), daemon=True)
        watch.start()
        try:
            seen.code = process.wait(timeout_s)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
            watch.join()
        output.seek(0)
        seen.output = output.read().decode(errors="replace")
    for file in sorted(told.glob("*.jsonl")):
        seen.events += [json.loads(line) for line in file.read_text().splitlines()]
        file.unlink()
    return seen


def _watch(process: subprocess.Popen[bytes], seen: Seen) -> None:
    """Looks at the command's session until it has ended."""
    while process.poll() is None:
        sockets = set()
        for number in _session(process.pid):
            try:
                seen.commands.add(Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
                sockets |= {os.readlink(link) for link in Path(f"/proc/{number}/fd").iterdir()}
            except OSError:
                continue  # it has ended
        seen.listening |= {address for address, socket in _listening() if f"socket:[{socket}]" in sockets}
        time.sleep(0.1)


def _session(leader: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader:
                yield int(entry.name)


def _listening() -> Iterator[tuple[str, str]]:
    """(address, inode) of every TCP socket that takes connections. Source: proc(5), /proc/net/tcp; 0A is TCP_LISTEN."""
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                yield _address(fields[1].partition(":")[0]), fields[9]


def _address(digits: str) -> str:
    words = [bytes.fromhex(digits[at : at + 8])[::-1] for at in range(0, len(digits), 8)]
    found = ipaddress.ip_address(b"".join(words))
    return str(getattr(found, "ipv4_mapped", None) or found)
