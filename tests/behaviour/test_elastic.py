"""Any engine at any number of ranks goes on from any other's checkpoint: one run, whatever it is run on between two saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scaletrain import checkpoint
from scaletrain.checkpoint import Progress
from tests import ranks, toy
from tests.faults.table import Add

SLOTS = 12
"""In a step, or twice as many: 1, 2, 3 and 4 ranks divide it."""
LEG = 2
"""Steps between two saves: one with both heads, one with the second only."""

Leg = tuple[str, int]
"""An engine, and its number of ranks."""


def go_on(folder: str, name: str, until: int, **settings: Any) -> dict[str, Any]:
    """Takes steps from the newest checkpoint on, and saves after the last."""
    made = toy.make(name, **settings)
    last = checkpoint.newest(Path(folder))
    start = checkpoint.restore(last, made, {}).step if last else 0
    losses = [list(of_step) for of_step in toy.steps(made, start, until, slots=SLOTS)]
    checkpoint.save(Path(folder), made, Progress(until, {"phase": 0, "samples": until}, {}), keep=2)
    return {"losses": losses, "weights": toy.pieces(made), "buffer": made.buffers()["calls"].tolist()}


def chain(folder: Path, legs: list[Leg], **settings: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss and norm [steps, 2], final weights) of a run that every leg takes ``LEG`` steps further."""
    losses = []
    for number, (name, world) in enumerate(legs, 1):
        results = ranks.run(go_on, world, {"folder": str(folder), "name": name, "until": LEG * number, **settings})
        assert all(result["losses"] == results[0]["losses"] for result in results)
        losses += results[0]["losses"]
    return torch.tensor(losses), toy.whole([result["weights"] for result in results])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of plain PyTorch in one process, seven legs without a break; with dropout 0.1."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    found: dict[str, Any] = ranks.run(go_on, 1, {"folder": str(folder), "name": "local", "until": 7 * LEG})[0]
    return found


CHAINS: dict[str, list[Leg]] = {
    **{name: [("local", 1), *((name, world) for world in (4, 2, 3, 1, 4)), ("local", 1)] for name in toy.ZERO},
    "all stages": [("local", 1), ("zero3", 4), ("zero1", 2), ("zero0", 3), ("zero2", 1), ("zero3", 4), ("zero2", 3)],
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_engines_and_world_sizes_trains_on_as_one_run(
    tmp_path: Path, name: str, uninterrupted: dict[str, Any], fault: Add
) -> None:
    losses, weights = chain(tmp_path, CHAINS[name])
    torch.testing.assert_close(losses, torch.tensor(uninterrupted["losses"]), rtol=0, atol=1e-5)
    assert toy.furthest(toy.whole([uninterrupted["weights"]]), weights) < 1e-5
    route = " -> ".join(f"{engine}/{world}" for engine, world in CHAINS[name])
    fault(fault="F13", injected=route, times=len(CHAINS[name]) - 1, outcome="losses and weights to 1e-5", lost_steps=0)


@pytest.mark.parametrize("name", toy.ZERO)
def test_an_optimizer_on_the_host_is_read_by_one_that_is_not(tmp_path: Path, name: str) -> None:
    """In bf16, where masters and weights are two things: the bytes that a run without offload has."""
    settings: list[dict[str, Any]] = [{"offload": "none"}, {"offload": "cpu"}, {"offload": "none"}]
    found = {}
    for case, offloads in {"never": [settings[0]] * 3, "on the way": settings}.items():
        for number, setting in enumerate(offloads, 1):
            arguments = {"folder": str(tmp_path / case), "name": name, "until": LEG * number, "precision": "bf16", **setting}
            results = ranks.run(go_on, 2, arguments)
        found[case] = [[result["losses"], result["weights"]] for result in results]
    assert found["never"] == found["on the way"]
