"""The name in ``latest`` is a hint for people: whatever it says, the manifests decide."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaletrain import checkpoint, dist
from scaletrain.checkpoint import Progress
from tests import toy
from tests.faults.table import Add

POINTERS = {
    "empty": b"",
    "garbage": b"\xff\x00\xfe",
    "at nothing": b"step-99999999\n",
    "at an older one": b"step-00000001\n",
    "with CRLF": b"step-00000002\r\n",
    "upwards": b"../../etc\n",
}


@pytest.mark.parametrize("name", [*POINTERS, "missing", "a folder"])
def test_the_pointer_is_not_trusted(tmp_path: Path, name: str, fault: Add, request: pytest.FixtureRequest) -> None:
    engine = toy.make("local")
    request.addfinalizer(dist.stop)
    for step in (1, 2):
        list(toy.steps(engine, step - 1, step))
        checkpoint.save(tmp_path, engine, Progress(step, {"phase": 0, "samples": step}, {}), keep=2)
    pointer = tmp_path / "latest"
    pointer.unlink()
    if name == "a folder":
        pointer.mkdir()
    elif name != "missing":
        pointer.write_bytes(POINTERS[name])
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.progress.step == 2
    fault(fault="F4", injected=f"the pointer is {name}", outcome="the newest that verifies", lost_steps=0)
