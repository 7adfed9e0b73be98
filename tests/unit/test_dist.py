"""What ranks say to each other: sums, JSON, rows, and failures that no rank keeps to itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from scaletrain import dist
from scaletrain.errors import ConfigError, DeviceError, PeerLostError, ScaletrainError, StorageError
from tests import ranks


def exchange() -> dict[str, Any]:
    dist.start(torch.device("cpu"))
    me = dist.rank()
    rows = dist.gather_rows(np.full((me, 2), float(me)))
    return {
        "sum": dist.sum_vector([me, 2.0**52, 0.5]),
        "gather": dist.gather({"rank": me, "text": "é" * me}),
        "bytes": [part.hex() for part in dist.gather_bytes(b"" if me == 0 else bytes([me] * 3))],
        "rows": rows.tolist(),
        "broadcast": dist.broadcast(["from", me]),
    }


def test_every_rank_gets_the_same_answers() -> None:
    for result in ranks.run(exchange, 3):
        assert result == {
            "sum": [3.0, 3 * 2.0**52, 1.5],
            "gather": [{"rank": rank, "text": "é" * rank} for rank in range(3)],
            "bytes": ["", "010101", "020202"],
            "rows": [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]],
            "broadcast": ["from", 0],
        }


def disagree() -> None:
    dist.start(torch.device("cpu"))
    dist.agree("the data", "same")
    dist.agree("the data", f"digest {dist.rank()}")


def test_disagreement_is_an_error_on_every_rank_that_says_who_has_what() -> None:
    for outcome in ranks.attempt(disagree, 2):
        assert outcome["type"] == ScaletrainError.__name__
        assert "the data (rank 0: digest 0, rank 1: digest 1)" in outcome["error"]


def fail_on_one() -> None:
    dist.start(torch.device("cpu"))
    dist.raise_together(StorageError("disk full") if dist.rank() == 1 else None, "writing")


def test_a_failure_on_one_rank_is_raised_on_all_with_its_exit_code() -> None:
    here, there = ranks.attempt(fail_on_one, 2)
    assert (here["type"], here["exit_code"]) == ("ScaletrainError", 74)
    assert "writing failed on rank 1: StorageError: disk full" in here["error"]
    assert (there["type"], there["exit_code"]) == ("StorageError", 74)


def leave_early() -> None:
    dist.start(torch.device("cpu"))
    if dist.rank() == 1:
        raise KeyError("a bug on one rank")
    dist.barrier()


def test_a_rank_whose_peer_died_says_so() -> None:
    stayed, left = ranks.attempt(leave_early, 2, timeout_s=30)
    assert (stayed["type"], stayed["exit_code"]) == (PeerLostError.__name__, 76)
    assert left["type"] == "KeyError"


@pytest.mark.parametrize("variables", [{"RANK": "0"}, {"RANK": "x", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}])
def test_half_a_launch_is_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="together"):
        dist.place()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_and_auto_takes_the_cpu() -> None:
    assert dist.device("auto") == torch.device("cpu")
    with pytest.raises(DeviceError, match="torch sees 0"):
        dist.device("cuda")
