"""A lineage on disk: whole after a kill at any point, and never silently altered."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaletrain.continual.store import Store, published_model
from scaletrain.errors import CheckpointError, ConfigError, InputError, ScaletrainError, StorageError

ROOT = Path(__file__).resolve().parents[3]
FIRST, SECOND, THIRD = "0001-csv", "0002-json", "0003-re"


def fill(folder: Path, version: str) -> None:
    """What a version might hold."""
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_bytes(version.encode() * 1000)
    (folder / "memory.jsonl").write_text("{}\n")
    (folder / "evaluation.json").write_text(json.dumps({"tasks": [version], "row": [0.5]}))


def onboard(folder: Path, version: str) -> None:
    """A command as a user gives it, and gives again after a kill: each phase once."""
    store = Store(folder)
    with store.hold():
        done = {entry["event"] for entry in store.entries() if entry.get("version") == version}
        if "begun" not in done:
            store.append("begun", version=version)
        if "evaluated" not in done:
            fill(store.partial_version(version), version)
            store.commit_version(version)
            store.append("evaluated", version=version, row=[0.5])
        store.publish(version, task=version[5:])
        if "settled" not in done:
            store.append("settled", version=version)


def digests(folder: Path) -> list[str]:
    return [entry["sha256"] for entry in Store(folder).entries()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lineage that has published two versions."""
    folder = tmp_path_factory.mktemp("built") / "lineage"
    onboard(folder, FIRST)
    onboard(folder, SECOND)
    return folder


@pytest.fixture
def lineage(built: Path, tmp_path: Path) -> Path:
    """A copy of it to be damaged."""
    return Path(shutil.copytree(built, tmp_path / "lineage"))


# --- kills


def kill_at(number: int) -> None:
    """Lets this process be killed instead of its ``number``-th operation on the disk, a write after half of it."""
    left = number

    def dying(operation: Callable[..., Any], half: bool) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if half:
                    operation(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **named)

        return run

    os.fsync = lambda descriptor: None  # a kill loses nothing that was written, synced or not
    for name in ("fsync", "rename", "replace", "write", "ftruncate", "mkdir", "unlink", "rmdir", "open"):
        setattr(os, name, dying(getattr(os, name), half=name == "write"))


def kill_everywhere(start: Path | None, cases: Path, version: str) -> None:
    """``cases``/N: what is left of ``start`` (none: of nothing) when ``onboard`` is killed at its N-th operation; every N."""
    number, status = 0, signal.SIGKILL.value
    while os.WIFSIGNALED(status):
        number += 1
        folder = cases / f"{number:03d}"
        if start is not None:
            shutil.copytree(start, folder)
        child = os.fork()
        if child == 0:
            kill_at(number)
            onboard(folder, version)
            os._exit(0)
        _, status = os.waitpid(child, 0)


KILLER = """
import pathlib, sys
from tests.unit.continual import test_store
start, cases, version = sys.argv[1:]
test_store.kill_everywhere(pathlib.Path(start) if start else None, pathlib.Path(cases), version)
"""
"""In a process of its own, since one that has threads should not fork."""


@pytest.mark.parametrize(("before", "version"), [(None, FIRST), (SECOND, THIRD)], ids=["first", "third"])
def test_a_kill_at_any_operation_leaves_the_old_or_the_new_and_can_be_repeated(
    before: str | None, version: str, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    start, whole, cases = str(built) if before else "", tmp_path / "whole", tmp_path / "cases"
    if start:
        shutil.copytree(start, whole)
    onboard(whole, version)
    expected = digests(whole)
    subprocess.run([sys.executable, "-c", KILLER, start, str(cases), version], check=True, cwd=ROOT)
    seen = set()
    folders = sorted(cases.iterdir())
    for folder in folders:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a torn line is expected in some
            left, published = digests(folder), Store(folder).published()
            assert left == expected[: len(left)]
            assert published in (before, version)
            onboard(folder, version)
        assert digests(folder) == expected
        assert Store(folder).published() == version
        assert [path.name for path in folder.rglob("*") if path.name.endswith(".partial")] == []
        seen.add((len(left), published))
    assert len(folders) > 25
    # Kills fell before every entry, and on both sides of the change of the pointer.
    assert {entries for entries, _ in seen} == set(range(len(expected) - 5, len(expected) + 1))
    assert {published for _, published in seen} == {before, version}


def test_everything_is_on_the_disk_before_it_gets_its_name(lineage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    renamed: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def fsync(descriptor: int) -> None:
        real["fsync"](descriptor)
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    def moving(name: str) -> Callable[[Any, Any], None]:
        def move(source: Any, target: Any) -> None:
            inside = [str(path) for path in Path(source).rglob("*")] if Path(source).is_dir() else []
            assert {str(source), *inside} <= synced | {path.replace(".MANIFEST.json.tmp", "MANIFEST.json") for path in synced}
            real[name](source, target)
            renamed.append(Path(target).name)
            synced.discard(str(Path(target).parent))

        return move

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", moving("rename"))
    monkeypatch.setattr(os, "replace", moving("replace"))
    onboard(lineage, THIRD)
    assert renamed == ["MANIFEST.json", THIRD, "published", "lease-00000003.json"]
    assert {str(lineage), str(lineage / "versions")} <= synced


def test_a_publish_that_was_killed_before_the_pointer_is_completed_by_the_next_holder(lineage: Path) -> None:
    before = (lineage / "published").read_bytes()
    store = Store(lineage)
    with store.hold():
        fill(store.partial_version(THIRD), THIRD)
        store.commit_version(THIRD)
        store.publish(THIRD)
    (lineage / "published").write_bytes(before)
    assert store.published() == SECOND
    with store.hold():
        assert store.published() == THIRD


# --- the lock


def test_a_second_holder_is_told_who_holds_the_lineage_and_since_when(lineage: Path) -> None:
    with (
        Store(lineage).hold(),
        pytest.raises(InputError, match=rf"lineage: .*\w+@\S+ \(pid {os.getpid()}, since 20\d\d-.*\+00:00\)") as caught,
        Store(lineage).hold(),
    ):
        pass
    assert caught.value.exit_code == 65
    with Store(lineage).hold():
        pass


HOLDER = """
import pathlib, sys
from scaletrain.continual.store import Store
with Store(pathlib.Path(sys.argv[1])).hold():
    print(1, flush=True)
    input()
"""


def test_a_killed_holder_lets_go(lineage: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(lineage)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
        with pytest.raises(InputError, match=rf"pid {holder.pid},"), Store(lineage).hold():
            pass
        holder.kill()
        holder.wait()
        with Store(lineage).hold():
            assert Store(lineage).published() == SECOND


@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.append("begun"),
        lambda store: store.partial_version(THIRD),
        lambda store: store.commit_version(SECOND),
        lambda store: store.publish(SECOND),
        lambda store: store.rollback(FIRST),
    ],
)
def test_what_changes_a_lineage_needs_it_held(lineage: Path, change: Callable[[Store], object]) -> None:
    with pytest.raises(ScaletrainError, match=r"Store\.hold"):
        change(Store(lineage))


# --- publishing


def test_publishing_twice_is_the_same_as_once(lineage: Path) -> None:
    before = digests(lineage)
    store = Store(lineage)
    with store.hold():
        store.publish(SECOND)
    assert digests(lineage) == before


def test_the_facts_of_a_publication_are_in_the_ledger(lineage: Path) -> None:
    published = [entry for entry in Store(lineage).entries() if entry["event"] == "published"]
    assert [(entry["version"], entry["task"]) for entry in published] == [(FIRST, "csv"), (SECOND, "json")]
    assert json.loads((lineage / "published").read_bytes()) == {"version": SECOND, "digest": published[1]["digest"]}


def test_the_published_model_is_that_of_the_published_version(lineage: Path) -> None:
    assert published_model(lineage) == lineage / "versions" / SECOND / "model"


def test_rolling_back_is_one_entry_and_loses_nothing(lineage: Path) -> None:
    store = Store(lineage)
    with store.hold():
        assert store.rollback(FIRST) == FIRST
        assert store.published() == FIRST
        assert store.rollback(SECOND, reason="a mistake") == SECOND
    last = store.entries()[-2:]
    assert [(entry["event"], entry["version"]) for entry in last] == [("rolled back", FIRST), ("rolled back", SECOND)]
    assert last[1]["reason"] == "a mistake"
    assert store.published() == SECOND


def test_rolling_back_to_what_is_published_changes_nothing(lineage: Path) -> None:
    before = digests(lineage)
    store = Store(lineage)
    with store.hold():
        store.rollback(SECOND)
    assert digests(lineage) == before


def test_without_a_name_it_goes_back_by_one(lineage: Path) -> None:
    onboard(lineage, THIRD)
    store = Store(lineage)
    with store.hold():
        assert [store.rollback(), store.rollback()] == [SECOND, FIRST]
        with pytest.raises(InputError, match="none before the present one"):
            store.rollback()


def test_only_what_was_published_can_be_again(lineage: Path) -> None:
    store = Store(lineage)
    with store.hold():
        fill(store.partial_version(THIRD), THIRD)
        store.commit_version(THIRD)
        with pytest.raises(InputError, match=f"version: got '{THIRD}'.*published before. {FIRST}, {SECOND} has been"):
            store.rollback(THIRD)
    assert store.published() == SECOND


def test_a_version_that_was_rolled_back_is_not_published_again_by_its_command(lineage: Path) -> None:
    store = Store(lineage)
    with store.hold():
        store.rollback(FIRST)
    with pytest.raises(InputError, match=f"version: got '{SECOND}'.*published before"):
        onboard(lineage, SECOND)
    assert store.published() == FIRST


# --- what is missing or altered


def test_a_new_lineage_has_nothing_published(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "lineage")
    with store.hold():
        assert (store.entries(), store.published()) == ([], None)
        store.append("begun")
    assert store.published() is None
    with pytest.raises(CheckpointError, match="nothing published"):
        published_model(store.folder)


def test_a_folder_without_a_ledger_is_no_lineage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lineage: got .*ledger\.jsonl"):
        Store(tmp_path / "typo").check()
    with pytest.raises(ConfigError, match="lineage"):
        published_model(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link(path: Path) -> None:
    moved = path.rename(path.parents[4] / "elsewhere")
    path.symlink_to(moved)


def point_back(lineage: Path) -> None:
    """At the version before, as if the last publication had not been."""
    first = next(entry for entry in Store(lineage).entries() if entry["event"] == "published")
    (lineage / "published").write_text(json.dumps({"version": first["version"], "digest": first["digest"]}))


MODEL = f"versions/{SECOND}/model/model.safetensors"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda at: flip(at / MODEL), "model.safetensors: got 'another content'"),
        (lambda at: (at / MODEL).write_bytes(b""), "model.safetensors: got 'another content'"),
        (lambda at: (at / MODEL).unlink(), "model.safetensors: got 'no such file'"),
        (lambda at: link(at / MODEL), "model.safetensors: got 'a link"),
        (
            lambda at: (at / MODEL).with_name("pytorch_model.bin").touch(),
            "pytorch_model.bin: got 'a file'.*no part of the version",
        ),
        (
            lambda at: shutil.rmtree(at / "versions" / SECOND),
            f"{SECOND}: got 'No such file or directory'; the version is missing",
        ),
        (lambda at: (at / "versions" / SECOND / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
        (lambda at: flip(at / "versions" / SECOND / "MANIFEST.json"), "MANIFEST.json"),
        (lambda at: (at / "versions" / SECOND / "MANIFEST.json").write_text("{}"), "MANIFEST.json: .*no manifest"),
        (lambda at: (at / "published").unlink(), f"published: got 'no such file'; the ledger says that {SECOND} is published"),
        (lambda at: (at / "published").write_text(""), f"published: .*the ledger says that {SECOND}"),
        (lambda at: flip(at / "published"), f"published: .*the ledger says that {SECOND}"),
        (point_back, f"published: .*{FIRST}.*the ledger says that {SECOND} is published"),
        (lambda at: flip(at / "ledger.jsonl"), r"ledger\.jsonl:\d"),
    ],
)
def test_a_published_version_that_is_missing_or_altered_is_named(
    lineage: Path, damage: Callable[[Path], None], named: str
) -> None:
    damage(lineage)
    with pytest.raises(CheckpointError, match=named):
        Store(lineage).published()
    with pytest.raises(CheckpointError, match=named):
        published_model(lineage)


def test_a_version_in_the_place_of_another_is_seen(lineage: Path) -> None:
    shutil.rmtree(lineage / "versions" / SECOND)
    shutil.copytree(lineage / "versions" / FIRST, lineage / "versions" / SECOND)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json: got 'another digest'; the ledger says"):
        Store(lineage).verify(SECOND)


def test_a_pointer_to_what_the_gate_never_let_through_counts_for_nothing(lineage: Path) -> None:
    store = Store(lineage)
    with store.hold():
        fill(store.partial_version(THIRD), THIRD)
        digest = store.commit_version(THIRD)
    (lineage / "published").write_text(json.dumps({"version": THIRD, "digest": digest}))
    with pytest.raises(CheckpointError, match=f"the ledger says that {SECOND} is published. Roll back to {SECOND}"):
        store.published()
    with store.hold():
        store.rollback(SECOND)
    assert store.published() == SECOND


def test_a_damaged_published_version_can_be_rolled_back_from(lineage: Path) -> None:
    shutil.rmtree(lineage / "versions" / SECOND)
    store = Store(lineage)
    with store.hold():
        assert store.rollback() == FIRST
    assert store.published() == FIRST


def test_a_damaged_version_is_neither_published_nor_rolled_back_to(lineage: Path) -> None:
    flip(lineage / "versions" / FIRST / "memory.jsonl")
    store, before = Store(lineage), digests(lineage)
    with store.hold(), pytest.raises(CheckpointError, match=r"memory\.jsonl"):
        store.rollback(FIRST)
    assert (digests(lineage), store.published()) == (before, SECOND)


def test_an_evaluation_is_read_only_as_it_was_committed(lineage: Path) -> None:
    assert Store(lineage).evaluation(FIRST) == {"tasks": [FIRST], "row": [0.5]}
    (lineage / "versions" / FIRST / "evaluation.json").write_text(json.dumps({"tasks": [FIRST], "row": [0.9]}))
    with pytest.raises(CheckpointError, match=r"evaluation\.json: got 'another content'"):
        Store(lineage).evaluation(FIRST)


def test_a_version_that_the_ledger_does_not_know_is_none(lineage: Path) -> None:
    shutil.copytree(lineage / "versions" / FIRST, lineage / "versions" / THIRD)
    with pytest.raises(CheckpointError, match="the ledger does not know this version"):
        Store(lineage).verify(THIRD)


# --- versions


def test_a_committed_version_stays_as_it_is(lineage: Path) -> None:
    store, before = Store(lineage), digests(lineage)
    with store.hold():
        fill(store.partial_version(SECOND), "0009-other")
        assert store.commit_version(SECOND) == store.verify(SECOND)
    assert digests(lineage) == before


def test_a_version_of_anything_but_plain_files_is_not_committed(lineage: Path) -> None:
    store = Store(lineage)
    with store.hold():
        partial = store.partial_version(THIRD)
        (partial / "model").symlink_to(lineage / "versions" / FIRST / "model")
        with pytest.raises(CheckpointError, match="model: got 'a link or device'"):
            store.commit_version(THIRD)
    assert not store.version_folder(THIRD).exists()


def test_room_for_a_version_is_empty_and_the_only_one(lineage: Path) -> None:
    store = Store(lineage)
    with store.hold():
        fill(store.partial_version(THIRD), THIRD)
        partial = store.partial_version("0004-ast")
        assert list(partial.iterdir()) == []
    assert sorted(path.name for path in (lineage / "versions").iterdir()) == [".0004-ast.partial", FIRST, SECOND]


def test_a_full_disk_leaves_what_was_published(lineage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        with pytest.raises(StorageError, match=r"0003-re.*No space left"):
            onboard(lineage, THIRD)
    assert Store(lineage).published() == SECOND
    onboard(lineage, THIRD)
    assert Store(lineage).published() == THIRD


@pytest.mark.parametrize("event", ["committed", "published", "rolled back"])
def test_events_of_the_store_are_its_own(lineage: Path, event: str) -> None:
    store = Store(lineage)
    with store.hold(), pytest.raises(ValueError, match="written by the store itself"):
        store.append(event, version=FIRST)


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a b", "ü", "a\n"])
def test_names_cannot_lead_out_of_the_lineage(name: str) -> None:
    store = Store(Path("lineage"))
    for place in (store.task_folder, lambda name: store.version_folder(f"0001-{name}"), store.work_folder):
        with pytest.raises(ConfigError, match="letters, digits"):
            place(name)


def test_places_in_a_lineage() -> None:
    store = Store(Path("lineage"))
    assert store.task_folder("csv") == Path("lineage/tasks/csv")
    assert store.work_folder(THIRD) == Path("lineage/work/0003-re")
    assert store.version_folder(THIRD) == Path("lineage/versions/0003-re")
