"""Saves that cannot write, folders that not all ranks see alike, and what is never lost on the way."""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from scaletrain import checkpoint, commit, dist
from scaletrain.checkpoint import CheckpointConfig, Progress, Saver, memory
from scaletrain.commit import Alone, Boundary, File, Retention
from scaletrain.engine import Engine
from scaletrain.errors import CheckpointError, ConfigError, ScaletrainError
from tests import ranks, toy
from tests.faults.table import Add


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Engine:
    request.addfinalizer(dist.stop)
    return toy.make("local")


def progress(step: int) -> Progress:
    return Progress(step, {"phase": 0, "samples": step}, {})


def steps_in(folder: Path) -> list[int]:
    return [found.step for found in commit.find(folder)]


def commit_bytes(folder: Path, step: int, data: bytes = b"0123456789", peers: commit.Peers | None = None, **how: Any) -> None:
    """A committed step without tensors."""
    peers = peers or Alone()
    files = [File(f"part-{peers.rank}", len(data), [data])]
    facts = {"format": commit.FORMAT, "version": commit.VERSION, "progress": {"step": step}}
    retention = how.pop("retention", Retention(keep=9))
    commit.commit(folder / f"step-{step:08d}", peers, files, lambda entries: {**facts, "files": entries}, retention, **how)


# ----------------------------------------------------------------------------------------------------------- F3, F22: disks


def saves_on_a_failing_disk(folder: str, failures: int, asynchronous: bool) -> dict[str, Any]:
    """Saves at every step; rank 1 can write no file above a kilobyte at the steps 2, 3, 5 and 6."""
    made = toy.make("zero3")
    alarms: list[int] = []
    config = CheckpointConfig(keep=2, failures=failures, asynchronous=asynchronous)
    saver = Saver(Path(folder), made, config, lambda step, why: alarms.append(step))
    left: dict[str, Any] = {}
    try:
        for step in range(1, 7):
            list(toy.steps(made, step - 1, step))
            limit = 1000 if step in (2, 3, 5, 6) and dist.rank() == 1 else resource.RLIM_INFINITY
            if step == 5:
                saver.settle()  # of step 4, which went well: failures are counted from nothing again
                left["after 4"] = steps_in(Path(folder))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            saver.save(progress(step))
        saver.settle()
    except ScaletrainError as error:
        left |= {"error": str(error), "code": error.exit_code}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {**left, "alarms": alarms, "trained": made.updates}


@pytest.mark.parametrize("asynchronous", [True, False], ids=["beside the training", "waiting"])
def test_a_disk_that_fails_on_one_rank_stops_no_training_until_it_has_failed_too_often(
    tmp_path: Path, asynchronous: bool, fault: Add
) -> None:
    arguments = {"folder": str(tmp_path), "failures": 3, "asynchronous": asynchronous}
    first, second = ranks.run(saves_on_a_failing_disk, 2, arguments)
    for left in (first, second):
        assert left["after 4"] == [4, 1]  # 2 and 3 are gone without a trace, and nothing was dropped for them
        assert (left["alarms"], left["trained"], left["code"]) == ([2, 3, 5, 6], 6, 74)  # the last one fails the end of the run
    assert "File too large" in second["error"] and "failed on rank 1: StorageError" in first["error"]
    assert steps_in(tmp_path) == [4, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001", "step-00000004"]
    how = "beside the training" if asynchronous else "that all wait for"
    fault(fault="F3", injected=f"no room on one rank of two, in saves {how}", times=4, outcome="removed, trained on, alarm")


def test_saves_that_fail_in_a_row_end_the_run_on_all_ranks(tmp_path: Path, fault: Add) -> None:
    arguments = {"folder": str(tmp_path), "failures": 2, "asynchronous": True}
    for left in ranks.run(saves_on_a_failing_disk, 2, arguments):
        assert (left["alarms"], left["trained"], left["code"]) == ([2, 3], 4, 74)
        assert left["error"].startswith("2 saves in a row have failed; the last one: ")
    assert steps_in(tmp_path) == [1]
    fault(fault="F22", injected="saves fail in a row", times=2, outcome="all ranks end with 74, the older one is whole")


def test_a_save_that_is_required_ends_the_run_at_once(tmp_path: Path, engine: Engine) -> None:
    saver = Saver(tmp_path, engine, CheckpointConfig(asynchronous=False))
    with full(100), pytest.raises(ScaletrainError, match="File too large"), pytest.warns(UserWarning, match="step 1"):
        saver.save(progress(1), required=True)
    assert list(tmp_path.iterdir()) == []


class full:
    """No file of more than so many bytes can be written by this process."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __enter__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_at_no_moment_of_a_save_is_there_no_whole_checkpoint(tmp_path: Path, fault: Add) -> None:
    """With a single one kept: the old one goes after the new one is durable."""
    commit_bytes(tmp_path, 1)
    seen: dict[Boundary, list[int]] = {}

    def at(boundary: Boundary) -> None:
        seen[boundary] = [found.step for found in commit.find(tmp_path) if not commit.verify(found.folder, Alone()).fault]

    commit_bytes(tmp_path, 2, retention=Retention(keep=1), at=at)
    order = list(Boundary)
    named, trashed = order.index(Boundary.FOLDER_NAMED), order.index(Boundary.TRASH_NAMED)
    assert seen == {b: [1] if n < named else [2, 1] if n < trashed else [2] for n, b in enumerate(order)}
    fault(
        fault="F22", injected="a look at every boundary of a save that drops the only older one", times=len(seen), outcome="whole"
    )


def test_retention_keeps_multiples_and_the_protected_and_never_counts_a_cut_one(tmp_path: Path) -> None:
    for step in range(1, 8):
        commit_bytes(tmp_path, step)
    (tmp_path / "step-00000007" / "part-0").write_bytes(b"cut")
    commit_bytes(tmp_path, 8, retention=Retention(keep=2, every_steps=3, protected=(1,)))
    assert steps_in(tmp_path) == [8, 7, 6, 3, 1]


# ------------------------------------------------------------------------------------------------------------- F2: damage


def damaged(data: bytes, how: str) -> bytes:
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]
    return {"truncated": data[:middle], "empty": b"", "zeroed": bytes(len(data)), "flipped": flipped}[how]


@pytest.mark.parametrize("how", ["truncated", "empty", "zeroed", "flipped"])
def test_a_damaged_file_of_any_kind_is_named_kept_aside_and_the_one_before_is_taken(
    tmp_path: Path, engine: Engine, how: str, fault: Add
) -> None:
    """The manifest, a rank's first file, and a further one."""
    digests = {}
    for step in (1, 2):
        list(toy.steps(engine, step - 1, step))
        checkpoint.save(tmp_path, engine, progress(step), keep=9, max_file_bytes=9000)
        digests[step] = toy.digest(engine)
    newest = tmp_path / "step-00000002"
    kinds = ["MANIFEST.json", "state-00000-of-00001.safetensors", "state-00000-of-00001-00001.safetensors"]
    began = time.monotonic()
    for number, kind in enumerate(kinds, start=1):
        whole = (newest / kind).read_bytes()
        (newest / kind).write_bytes(damaged(whole, how))
        named = "the manifest cannot be read" if kind == "MANIFEST.json" else kind
        with pytest.warns(UserWarning, match=named):
            found = checkpoint.newest(tmp_path, aside=True)
        assert found is not None and found.step == 1
        checkpoint.restore(found, engine, {})
        assert toy.digest(engine) == digests[1]
        aside = tmp_path / f"damaged-step-00000002-{number}"
        assert (aside / kind).read_bytes() == damaged(whole, how)
        for path in aside.iterdir():
            newest.mkdir(exist_ok=True)
            (newest / path.name).write_bytes(whole if path.name == kind else path.read_bytes())
    found = checkpoint.newest(tmp_path, aside=True)
    assert found is not None and found.step == 2
    seconds = (time.monotonic() - began) / len(kinds)
    fault(fault="F2", injected=f"{how}: each kind of file", times=3, outcome="named, the one before", detect_s=seconds)


# ------------------------------------------------------------------------------------------------- F5, F6, F12: which is newest


def newest_seen(folder: str) -> dict[str, Any]:
    """What this rank is told, where every rank looks into a folder of its own."""
    dist.start(toy.CPU)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = checkpoint.newest(Path(folder, str(dist.rank())), aside=True)
            return {"step": found and found.step, "said": [str(each.message) for each in said]}
        except CheckpointError as error:
            return {"error": str(error)}


@pytest.mark.parametrize(
    ("others", "taken", "named"),
    [
        ({2: b"same"}, 2, "step-00000004 is not the same for all ranks and was passed over: its manifest is not seen"),
        ({2: b"same", 4: b"else"}, 2, "is another one, on the ranks [1]"),
        ({2: b"same", 4: None}, 2, "part-0 is missing on the ranks [1]"),
        ({}, None, "on the ranks [1]"),
    ],
    ids=["older on one", "other bytes on one", "a file missing on one", "none on one"],
)
def test_ranks_that_see_different_folders_take_the_newest_that_all_see(
    tmp_path: Path, others: dict[int, bytes | None], taken: int | None, named: str, fault: Add
) -> None:
    for step in (2, 4):
        commit_bytes(tmp_path / "0", step, b"same")
    (tmp_path / "1").mkdir()
    for step, data in others.items():
        commit_bytes(tmp_path / "1", step, data or b"same")
        if data is None:
            (tmp_path / "1" / f"step-{step:08d}" / "part-0").unlink()
    began = time.monotonic()
    left = ranks.run(newest_seen, 2, {"folder": str(tmp_path)})
    if taken is None:
        assert all(named in each["error"] and "--fresh" in each["error"] for each in left)
    else:
        assert [each["step"] for each in left] == [taken] * 2
        assert any(named in text for text in left[0]["said"])
        assert steps_in(tmp_path / "0") == [4, 2]  # it may be whole: nothing is renamed
    outcome = "an error that names the ranks" if taken is None else "the newest that all see"
    fault(fault="F5", injected=f"rank 1 sees {sorted(others)}", outcome=outcome, detect_s=time.monotonic() - began)


@pytest.mark.parametrize("left", ["only the pointer", "only damaged ones"])
def test_nothing_to_resume_where_there_was_something_is_an_error_unless_fresh(tmp_path: Path, left: str, fault: Add) -> None:
    folder = tmp_path / "checkpoints"
    assert checkpoint.newest(folder) is None  # there never was one
    commit_bytes(folder, 1)
    if left == "only the pointer":
        commit.put_aside(folder / "step-00000001", prefix="gone-")
    else:
        (folder / "step-00000001" / "part-0").unlink()
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match="--fresh"):
        warnings.simplefilter("ignore")
        checkpoint.newest(folder, aside=True)
    checkpoint.set_aside(folder)
    assert checkpoint.newest(folder) is None
    fault(fault="F6", injected=f"a resume with {left}", outcome="an error unless --fresh")


def test_the_order_is_that_of_the_steps_whatever_names_and_clocks_say(tmp_path: Path, fault: Add) -> None:
    for number, step in enumerate([8, 16, 4]):
        commit_bytes(tmp_path, step)
        os.utime(tmp_path / f"step-{step:08d}", (1e9 - number, 1e9 - number))
    (tmp_path / "step-00000004").rename(tmp_path / "step-00000099")
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 16
    assert steps_in(tmp_path) == [16, 8, 4]
    commit_bytes(tmp_path, 17, retention=Retention(keep=2))
    assert steps_in(tmp_path) == [17, 16]
    fault(fault="F12", injected="clocks run backwards, a folder has another step's name", outcome="by the manifests' steps")


# -------------------------------------------------------------------------------------------------------- F11, F14: when it is


def slow_save(folder: str, own_group: bool) -> str:
    """Rank 1 takes 3 seconds for its file, where ranks wait a second for each other in the training."""
    dist.start(toy.CPU, timeout_s=1.0)
    channel = dist.open_channel(60.0) if own_group else dist.channel()

    def at(boundary: Boundary) -> None:
        if boundary == Boundary.FILE_OPENED and dist.rank() == 1:
            time.sleep(3.0)

    try:
        commit_bytes(Path(folder), 1, peers=channel, at=at)
    except ScaletrainError as error:
        return type(error).__name__
    return "saved"


def test_a_save_may_take_longer_than_a_collective(tmp_path: Path, fault: Add) -> None:
    assert ranks.run(slow_save, 2, {"folder": str(tmp_path / "own"), "own_group": True}) == ["saved", "saved"]
    assert ranks.run(slow_save, 2, {"folder": str(tmp_path / "shared"), "own_group": False})[0] == "PeerLostError"
    fault(fault="F11", injected="a save of 3 s, collectives limited to 1 s", outcome="saved")


@pytest.mark.parametrize("asynchronous", [True, False])
def test_resumed_twice_saved_right_after_and_at_the_last_step(
    tmp_path: Path, engine: Engine, asynchronous: bool, fault: Add
) -> None:
    """The cursor never stands still and never goes back; what is there already is not written again."""
    config = CheckpointConfig(keep=9, asynchronous=asynchronous)
    digests = {0: toy.digest(engine)}
    for start in (0, 3, 3, 6):  # the second of two resumes from step 3, and one of a run that was at its end
        last = checkpoint.newest(tmp_path)
        if last is not None:
            assert checkpoint.restore(last, engine, {}).cursor == {"phase": 0, "samples": last.step}
            assert toy.digest(engine) == digests[last.step]
        with Saver(tmp_path, engine, config) as saver:
            files = {path: path.stat().st_ino for path in tmp_path.glob("step-*/*")}
            saver.save(progress(last.step if last else 0))
            for step in range(start, min(start + 3, 6)):
                list(toy.steps(engine, step, step + 1))
            if start == 3 and 6 not in digests and len(digests) == 2:
                digests[-1] = ""  # this attempt is lost before it saves
                continue
            digests[min(start + 3, 6)] = toy.digest(engine)
            saver.save(progress(min(start + 3, 6)))
            saver.settle()
            assert {path: path.stat().st_ino for path in files} == files
    assert steps_in(tmp_path) == [6, 3, 0]
    fault(fault="F14", injected=f"resumes, and saves right after them, asynchronous={asynchronous}", times=3, outcome="exact")


# ------------------------------------------------------------------------------------------------------------- copies and files


def test_what_is_saved_is_the_state_at_the_save_whatever_is_trained_meanwhile(tmp_path: Path, engine: Engine) -> None:
    """Also when the buffer is used again. No file is written before the weights have moved on."""
    moved_on = threading.Event()

    def at(boundary: Boundary) -> None:
        if boundary == Boundary.FILE_OPENED:
            assert moved_on.wait(timeout=60)
            moved_on.clear()

    saver = Saver(tmp_path, engine, CheckpointConfig(keep=9), at=at)
    digests: list[str] = []
    for step in (1, 2, 3):
        list(toy.steps(engine, step - 1, step))
        if digests:
            moved_on.set()
        digests.append(toy.digest(engine))
        saver.save(progress(step))
    list(toy.steps(engine, 3, 6))
    moved_on.set()
    saver.settle()
    for found in reversed(checkpoint.find(tmp_path)):
        checkpoint.restore(found, engine, {})
        assert toy.digest(engine) == digests[found.step - 1]


@pytest.mark.parametrize("most", [12, 1000, 5000, 10**6])
def test_files_are_of_bounded_size_and_a_larger_parameter_is_cut(tmp_path: Path, engine: Engine, most: int) -> None:
    list(toy.steps(engine, 0, 1))
    if most == 12:  # one element and its two moments to a file: of a small part only, there would be thousands
        pieces = {"bias": checkpoint.Piece((5,), 0, torch.arange(5.0))}
        own = checkpoint.pieces.files([(part, "bias", pieces["bias"]) for part in ("weight", "a", "b")], {}, most)
        assert len(own) == 5
        return
    before = toy.digest(engine)
    checkpoint.save(tmp_path, engine, progress(1), keep=1, max_file_bytes=most)
    found = checkpoint.find(tmp_path)[0]
    total = checkpoint.saver.copy_bytes(engine)
    assert len(found.manifest["files"]) >= total / most
    assert all(entry["bytes"] <= most + 3000 for entry in found.manifest["files"])  # the header names the tensors
    whole = checkpoint.weights(found)
    assert all(torch.equal(whole[shard.name].flatten(), shard.weight) for shard in engine.shards())
    list(toy.steps(engine, 1, 2))
    checkpoint.restore(found, engine, {})
    assert toy.digest(engine) == before


def test_a_machine_without_room_for_the_copies_is_refused_before_the_start(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = checkpoint.saver.copy_bytes(engine)
    monkeypatch.setattr(memory, "available_bytes", lambda root: need)
    Saver(tmp_path, engine, CheckpointConfig())
    monkeypatch.setattr(memory, "available_bytes", lambda root: need - 1)
    with pytest.raises(ConfigError, match=f"take {need} bytes .* and {need - 1} bytes .*asynchronous=false"):
        Saver(tmp_path, engine, CheckpointConfig())
    Saver(tmp_path, engine, CheckpointConfig(asynchronous=False))


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 5 kB\n"}, 5 * 1024),
        ({}, None),
        (
            {
                "proc/meminfo": "MemAvailable: 5 kB\n",
                "proc/self/cgroup": "0::/job/rank\n",
                "sys/fs/cgroup/job/memory.max": "4000\n",
                "sys/fs/cgroup/job/memory.current": "3000\n",
                "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 500\nactive_file 100\n",
                "sys/fs/cgroup/job/rank/memory.max": "max\n",
                "sys/fs/cgroup/job/rank/memory.current": "1\n",
            },
            1600,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n2:memory:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "4000\n",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "4100\n",
                "sys/fs/cgroup/memory/job/memory.stat": "total_inactive_file 50\n",
            },
            0,
        ),
    ],
    ids=["machine", "unknown", "version 2", "version 1"],
)
def test_available_memory_is_the_least_of_the_machine_and_its_control_groups(
    tmp_path: Path, files: dict[str, str], available: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.available_bytes(tmp_path) == available


def test_what_was_just_published_stays_whatever_else_is_there(tmp_path: Path) -> None:
    """A later step may be one that some rank does not see, and that was passed over."""
    commit_bytes(tmp_path, 300)
    commit_bytes(tmp_path, 250, retention=Retention(keep=1))
    assert steps_in(tmp_path) == [250]


def test_a_file_that_cannot_be_read_is_a_fault_of_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        commit_bytes(tmp_path, step)
    digest = commit.finding.file_digest

    def failing(path: Path) -> str:
        if path.parent.name == "step-00000002":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return digest(path)

    monkeypatch.setattr(commit.finding, "file_digest", failing)
    with pytest.warns(UserWarning, match="part-0 cannot be read: Input/output error"):
        found = commit.newest(tmp_path, Alone())
    assert found is not None and found.step == 1


def test_a_whole_step_that_is_saved_again_is_there_at_every_moment(tmp_path: Path) -> None:
    """As after a request to stop in an evaluation; and nothing of the old one is left, for nothing was wrong with it."""
    commit_bytes(tmp_path, 3, b"old")
    seen: list[bytes] = []

    def look(boundary: commit.Boundary) -> None:
        found = commit.newest(tmp_path, Alone())
        assert found is not None
        seen.append((found.folder / "part-0").read_bytes())

    commit_bytes(tmp_path, 3, b"new", at=look)
    assert sorted(set(seen)) == [b"new", b"old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]


def test_a_pointer_that_cannot_be_written_does_not_undo_a_save(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    for step in (1, 2):
        with pytest.warns(UserWarning, match=f"step-0000000{step} is saved, but its folder could not be tidied"):
            commit_bytes(tmp_path, step)
    assert steps_in(tmp_path) == [2, 1]


def test_waiting_for_a_save_that_failed_is_not_the_end(tmp_path: Path, engine: Engine) -> None:
    """As before a roll-back: fewer have failed in a row than may."""
    saver = Saver(tmp_path, engine, CheckpointConfig(failures=2))
    with full(100), pytest.warns(UserWarning, match="step 1 was not saved"):
        saver.save(progress(1))
        saver.wait()
    with pytest.raises(ScaletrainError, match="File too large"):
        saver.settle()
