"""Corpora behind a server or a command: the run that a folder gives, whatever the server does in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scaletrain.cli import main as cli
from scaletrain.config import decode
from scaletrain.data.cache import CacheConfig
from scaletrain.data.dataset import Dataset, canonical_digest
from scaletrain.data.folders import Folders
from scaletrain.data.plan import CorpusShape, OrderConfig, PhaseShape, Plan
from scaletrain.errors import ConfigError, CorpusError, StorageError
from scaletrain.recipes import pretrain
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
    # A transfer may take longer than a read: nothing stands in for what is on its way.
    site.misbehave(shards(prepared)[0], web.stalled(1.0))
    tree["data"]["cache"]["transfer"]["stall_s"] = 10.0
    tree["data"]["loader"] = {"retry": {"attempts": 2, "read_timeout_s": 0.2, "pause_s": 0.0}}
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


def test_a_corpus_in_a_file_system_of_another_kind_is_read(prepared: Path, tmp_path: Path) -> None:
    import fsspec

    elsewhere = fsspec.filesystem("memory")
    for file in filter(Path.is_file, prepared.rglob("*")):
        elsewhere.pipe(f"/bucket/corpus/{file.relative_to(prepared)}", file.read_bytes())
    data, local = folders(tmp_path, 100, 10**6).open("memory://bucket/corpus"), Dataset.open(prepared)
    assert data.digest == local.digest and data.folder.name == "corpus"
    for chunk in range(0, local.chunks, 97):
        np.testing.assert_array_equal(data.stored(chunk), local.stored(chunk))


def folders(tmp_path: Path, shards: float, largest: int) -> Folders:
    return Folders(
        decode(CacheConfig, {"folder": str(tmp_path / "cache"), "size_gb": shards * largest / 1e9, "transfer": TRANSFER})
    )


def test_with_room_for_two_shards_every_chunk_is_read_in_the_plans_order(site: Site, prepared: Path, tmp_path: Path) -> None:
    """While another reader that shares the cache is somewhere else in it."""
    local = Dataset.open(prepared)
    sizes = [file.stat().st_size for file in (prepared / "train").glob("*.tar")]
    assert len(sizes) > 3
    url = f"{site.url}/{prepared.name}"
    readers = [folders(tmp_path, 2, max(sizes)).open(url) for _ in range(2)]
    phase = PhaseShape((CorpusShape(local.digest, local.chunks),), local.chunks, 1)
    order = Plan(1, [phase], OrderConfig(block=100, window=2)).picks(0).chunk.tolist()
    assert sorted(order) == list(range(local.chunks))
    for place, chunk in enumerate(order):
        np.testing.assert_array_equal(readers[0].stored(chunk), local.stored(chunk))
        if place % 100 == 0:
            np.testing.assert_array_equal(readers[1].stored(order[-place]), local.stored(order[-place]))
        kept = [file.stat().st_size for file in (tmp_path / "cache" / "shards").iterdir()]
        assert sum(kept) <= 2 * max(sizes)
    assert sum(count for path, count in site.requests.items() if path.endswith(".tar")) > len(sizes)


def test_a_cache_that_cannot_hold_what_is_read_at_once_is_warned_of(site: Site, prepared: Path, tmp_path: Path) -> None:
    sizes = [file.stat().st_size for file in (prepared / "train").glob("*.tar")]
    few = folders(tmp_path, 3, max(sizes))
    few.open(f"{site.url}/{prepared.name}")
    with pytest.warns(UserWarning, match=r"size_gb.*data\.order\.block=378"):
        few.check_room(OrderConfig())
    with pytest.warns(UserWarning, match=r"size_gb"):
        few.check_room(OrderConfig(block=400, window=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few.check_room(OrderConfig(block=40, window=2))
        folders(tmp_path, 100, max(sizes)).check_room(OrderConfig())


def test_a_copy_that_is_damaged_under_a_reader_is_fetched_again(site: Site, prepared: Path, tmp_path: Path) -> None:
    data = folders(tmp_path, 100, 10**6).open(f"{site.url}/{prepared.name}")
    expected = data.stored(0)
    (copy,) = [file for file in (tmp_path / "cache" / "shards").iterdir() if file.name != ".lock"]
    state = copy.stat()
    with copy.open("r+b") as stream:
        stream.write(bytes(4096))
    os.utime(copy, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(CorpusError, match="CRC-32"):
        data.stored(0)
    with pytest.warns(UserWarning, match="damaged"):
        data.fetch(0)
    np.testing.assert_array_equal(data.stored(0), expected)


PIPE = f"pipe:{sys.executable} -c 'import sys; sys.stdout.buffer.write(open(sys.argv[1], \"rb\").read())' "


def piped(tree: dict[str, Any]) -> None:
    pretrain.main(decode(pretrain.Config, tree), allow_pipe=True)


def test_a_run_from_a_command_equals_one_from_the_folder(prepared: Path, tmp_path: Path, expected: tuple[Any, Any, Any]) -> None:
    ranks.run(piped, 1, {"tree": settings(f"{PIPE}{prepared}/{{file}}", tmp_path, "run")})
    assert losses(tmp_path / "run") == expected[1]
    assert all(torch.equal(value, expected[2][name]) for name, value in weights(tmp_path / "run").items())


def test_no_file_and_no_override_permits_a_command(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A setting of that name is unknown, and the command is not run."""
    pipe = f"pipe:/usr/bin/touch {tmp_path}/ran {{file}}"
    tree = settings(pipe, tmp_path, "run")
    (tmp_path / "run.yaml").write_text(repr(tree))
    assert cli(["pretrain", "--config", str(tmp_path / "run.yaml")]) == 65
    said = capsys.readouterr().err
    assert "--allow-pipe" in said and "data.corpora" in said
    for name in ("allow_pipe", "data.allow_pipe", "data.cache.allow_pipe", "data.corpora.0.allow_pipe"):
        assert cli(["pretrain", "--config", str(tmp_path / "run.yaml"), f"{name}=true"]) == 65
        assert "no such setting" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def opened(pipe: str, tmp_path: Path, **transfer: float) -> Dataset:
    tree = {"folder": str(tmp_path / "cache"), "transfer": {**TRANSFER, **transfer}}
    return Folders(decode(CacheConfig, tree), allow_pipe=True).open(pipe)


def test_a_command_is_given_to_no_shell(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="ended with status 1"):
        opened(f"pipe:cat {{file}} $(touch {tmp_path}/a) ; touch {tmp_path}/b | touch {tmp_path}/c", tmp_path, timeout_s=0.3)
    assert {file.name for file in tmp_path.iterdir()} == {"cache"}


@pytest.mark.parametrize(
    ("command", "error", "said"),
    [
        ("false", StorageError, "ended with status 1"),
        ("no-such-program", ConfigError, "cannot be started"),
        ("head -c 10", CorpusError, "not JSON"),
        ("sleep 60", StorageError, "no byte for"),
    ],
)
def test_a_command_that_does_not_do_it(prepared: Path, tmp_path: Path, command: str, error: type[Exception], said: str) -> None:
    pipe = f"pipe:{command} " + ("--help {file}" if command == "sleep 60" else f"{prepared}/{{file}}")
    if command == "sleep 60":
        pipe = f"pipe:{sys.executable} -c 'import time; time.sleep(60)' {{file}}"
    with pytest.raises(error, match=said):
        opened(pipe, tmp_path, timeout_s=0.5, stall_s=0.2)


def test_at_the_deadline_a_command_goes_with_all_that_it_has_started(tmp_path: Path) -> None:
    seconds = f"600.{os.getpid()}"
    program = (
        "import os, subprocess; "
        f'subprocess.Popen(["sleep", "{seconds}"]);'
        ' open("/proc/self/fd/1", "wb").write(b"x"); os.read(os.pipe()[0], 1)'
    )
    with pytest.raises(StorageError, match="no byte for"):
        opened(f"pipe:{sys.executable} -c '{program}' {{file}}", tmp_path, timeout_s=0.8, stall_s=0.4)
    until = time.monotonic() + 5
    while seconds in (running := commands()):
        assert time.monotonic() < until, running
        time.sleep(0.02)


def commands() -> str:
    """The command lines of all processes that run."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(line for line in found if line.startswith("sleep"))


@pytest.mark.parametrize("url", ["simplecache::{}", "file://{}", "local://{}", "http://host/..{}", "-http://{}", "zip://{}"])
def test_a_hostile_path_in_a_setting_opens_nothing(prepared: Path, tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.corpora"):
        opened(url.format(prepared), tmp_path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["../../escape.tar", "/tmp/escape.tar", "train/-o.tar", "a b.tar", "a?b.tar", "a%2e.tar"])
def test_a_hostile_manifest_fetches_nothing(site: Site, prepared: Path, tmp_path: Path, name: str) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    manifest.pop("digest")
    manifest["splits"]["train"]["shards"][0]["file"] = name
    served = tmp_path / "served" / "corpus"
    served.mkdir(parents=True)
    (served / "manifest.json").write_text(json.dumps({**manifest, "digest": canonical_digest(manifest)}))
    with web.serving(tmp_path / "served") as hostile, pytest.raises(CorpusError, match="no name of a file"):
        folders(tmp_path, 1, 10**9).open(f"{hostile.url}/corpus")
    assert set(hostile.requests) == {"corpus/manifest.json"}
    assert {file.name for file in (tmp_path / "cache").rglob("*")} == {"shards"}
