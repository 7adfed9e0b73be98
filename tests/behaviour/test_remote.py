"""Corpora behind a server or a command: the run that a folder gives, whatever the server does in between."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scaletrain.errors import StorageError
from scaletrain.train import account
from scaletrain.train.audit import audit
from tests import ranks, tiny, web
from tests.faults.table import Add
from tests.received import joined, losses, run, weights
from tests.web import Site

TRANSFER = {"stall_s": 1.0, "pause_s": 0.01, "timeout_s": 20.0}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def site(prepared: Path) -> Iterator[Site]:
    with web.serving(prepared.parent) as site:
        yield site


def shards(prepared: Path) -> list[str]:
    return sorted(f"{prepared.name}/train/{file.name}" for file in (prepared / "train").glob("*.tar"))


def settings(path: str, folder: Path, name: str, **transfer: float) -> dict[str, Any]:
    """A run with an evaluation at both ends, in ``folder/name``; the cache is in ``folder/cache``."""
    evaluation = {"every_steps": 8, "chunks_per_pass": 24}
    tree = tiny.settings(Path("."), folder / name, steps=8, evaluation=evaluation, engine={"name": "zero0"})
    tree["data"] |= {
        "corpora": [{"path": path}],
        "cache": {"folder": str(folder / "cache"), "transfer": {**TRANSFER, **transfer}},
        "damage": {"fraction": 0.9, "consecutive": 1000},
    }
    return tree


@pytest.fixture(scope="module")
def expected(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """Of the folder itself: what is received, the losses and the weights."""
    folder = tmp_path_factory.mktemp("local")
    received = joined(ranks.run(run, 1, {"tree": settings(str(prepared), folder, "run")}))
    assert not (folder / "cache").exists()
    return received, losses(folder / "run"), weights(folder / "run")


def assert_same(results: list[Any], output: Path, expected: tuple[Any, Any, Any]) -> None:
    received, its_losses, its_weights = expected
    assert joined(results) == received and losses(output) == its_losses
    found = weights(output)
    assert found.keys() == its_weights.keys()
    assert all(torch.equal(found[name], its_weights[name]) for name in found)


def test_a_run_from_a_server_equals_one_from_the_folder(
    site: Site, prepared: Path, tmp_path: Path, expected: tuple[Any, Any, Any]
) -> None:
    tree = settings(f"{site.url}/{prepared.name}", tmp_path, "two")
    assert joined(ranks.run(run, 2, {"tree": tree})) == expected[0]
    asked = {path: count for path, count in site.requests.items() if not path.endswith("manifest.json")}
    assert set(shards(prepared)) <= set(asked) and set(asked.values()) == {1}  # two ranks, two splits, one transfer
    tree = settings(f"{site.url}/{prepared.name}", tmp_path, "run")
    assert_same(ranks.run(run, 1, {"tree": tree}), tmp_path / "run", expected)
    assert {path: site.requests[path] for path in asked} == asked  # what is here is not fetched again


def test_a_server_that_fails_now_and_then_changes_nothing(
    site: Site, prepared: Path, tmp_path: Path, expected: tuple[Any, Any, Any], fault: Add
) -> None:
    faults = [web.status(503), web.status(500), web.cut, web.short, web.stalled(3.0), web.changed]
    for path, kind in zip(shards(prepared), faults, strict=False):
        site.misbehave(path, kind)
    burst = [web.status(503)] * 3
    site.misbehave(f"{prepared.name}/manifest.json", *burst)
    site.misbehave(f"{prepared.name}/tokenizer/tokenizer.json", web.cut, *burst)
    site.misbehave(f"{prepared.name}/train/000001.idx", web.changed)
    tree = settings(f"{site.url}/{prepared.name}", tmp_path, "run", stall_s=0.5)
    assert_same(ranks.run(run, 1, {"tree": tree}), tmp_path / "run", expected)
    assert [site.requests[path] for path in shards(prepared)[: len(faults)]] == [2] * min(len(faults), len(shards(prepared)))
    outcome = "fetched again; the same weights to the bit"
    fault(fault="F17", injected="503 bursts, cut and short bodies, a stall, other bytes", times=len(faults) + 8, outcome=outcome)


def test_a_kill_in_a_transfer_and_the_same_command_again(
    site: Site, prepared: Path, tmp_path: Path, expected: tuple[Any, Any, Any], fault: Add
) -> None:
    for path in [*shards(prepared), f"{prepared.name}/validation/000000.tar"]:
        site.misbehave(path, web.stalled(60.0))
    tree = settings(f"{site.url}/{prepared.name}", tmp_path, "run", stall_s=60.0)
    outcomes = ranks.attempt(killed, 2, {"tree": tree, "folder": str(tmp_path)})
    assert {outcome["status"] for outcome in outcomes} == {f"signal {signal.SIGKILL:d}"}
    assert list((tmp_path / "cache" / "shards").glob("*.part"))
    site._faults.clear()
    assert_same(ranks.run(run, 1, {"tree": tree}), tmp_path / "run", expected)
    assert not list((tmp_path / "cache").rglob("*.part"))
    fault(fault="F18", injected="SIGKILL of two ranks while shards are fetched", times=2, outcome="parts are swept, no clean-up")


def killed(tree: dict[str, Any], folder: str) -> None:
    """A rank that is killed when a shard is half here."""

    def watch() -> None:
        while not list((Path(folder) / "cache" / "shards").glob("*.part")):
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    run(tree)


def test_a_server_that_goes_away_stops_the_run_and_it_continues(
    site: Site, prepared: Path, tmp_path: Path, expected: tuple[Any, Any, Any], fault: Add
) -> None:
    tree = settings(f"{site.url}/{prepared.name}", tmp_path, "run", timeout_s=1.5)
    for path in shards(prepared)[-2:]:
        site.misbehave(path, *[web.status(503)] * 1000)
    began = time.monotonic()
    outcomes = ranks.attempt(run, 1, {"tree": tree})
    seconds = time.monotonic() - began
    assert StorageError.exit_code in {outcome["exit_code"] for outcome in outcomes}
    assert any("answered with status 503" in outcome["error"] and "timeout_s is 1.5" in outcome["error"] for outcome in outcomes)
    site._faults.clear()
    assert_same(ranks.run(run, 1, {"tree": tree}), tmp_path / "run", expected)
    fault(fault="F17", injected="a server that is away", outcome="74, named; the same command continues", detect_s=seconds)


def test_shards_that_are_gone_or_changed_at_the_source_are_replaced_and_booked(
    site: Site, prepared: Path, tmp_path: Path, fault: Add
) -> None:
    shutil.copytree(prepared, tmp_path / "served" / "corpus")
    gone, changed = shards(prepared)[:2]
    (tmp_path / "served" / "corpus" / "train" / Path(gone).name).unlink()
    with web.serving(tmp_path / "served") as served:
        served.misbehave(f"corpus/train/{Path(changed).name}", *[web.changed] * 100)
        tree = settings(f"{served.url}/corpus", tmp_path, "run")
        ranks.run(run, 1, {"tree": tree})
        assert served.requests[f"corpus/train/{Path(gone).name}"] == 1
        assert served.requests[f"corpus/train/{Path(changed).name}"] == 2
    result = audit(account.read(tmp_path / "run" / account.FILE))
    lost = {chunk for chunk in range(800)}
    picks = [chunk for step in range(8) for chunk in result.plan.picks(step).chunk.tolist()]
    assert (
        result.faults == [] and [entry.substitution.chunk for entry in result.replaced] == [c for c in picks if c in lost] != []
    )
    fault(fault="F16", injected="shards gone and changed on a server", outcome="replaced, 0 unaccounted for")
