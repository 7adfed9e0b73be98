"""prepare in parts, on machines that share a file system: the bytes of one process, whatever happens to the parts."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from scaletrain.data import encode
from scaletrain.data.journal import locked
from scaletrain.data.parts import Part, merge, prepare_part
from scaletrain.data.pieces import PieceWriter
from scaletrain.data.prepare import PrepareConfig, prepare
from scaletrain.data.shards import ShardWriter
from scaletrain.errors import ConfigError, CorpusError, StorageError
from tests import preparing
from tests.preparing import contents, descendants, fails, run_cli, wait_until_gone

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"scaletrain.data.batches._BATCH_DOCUMENTS": 13, "scaletrain.data.parts._PIECE_BYTES": 40_000}
"""Many batches and pieces of a small corpus."""
SMALL_CLI = """
import sys, time
from scaletrain import cli, durable
from scaletrain.data import batches, parts
batches._BATCH_DOCUMENTS, parts._PIECE_BYTES = 13, 40_000
sync = durable.sync
durable.sync = lambda path: (time.sleep(0.03), sync(path))
sys.exit(cli.main(sys.argv[1:]))
"""
"""The same for real processes, on a disk so slow that they can be killed in the middle."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PrepareConfig]:
    return partial(preparing.settings, preparing.write_corpus(tmp_path_factory.mktemp("corpus"), 700), chunks_per_shard=50)


@pytest.fixture(scope="module")
def prepared(settings: Callable[..., PrepareConfig], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a prepare without parts writes."""
    folder = tmp_path_factory.mktemp("prepared") / "folder"
    prepare(settings(folder))
    return contents(folder)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches, encoded in this process, which spares the start of others."""

    def run(recipe: encode.Recipe, batches: Iterable[encode.Batch], processes: int) -> Iterator[encode.Encoded]:
        return map(encode.Encoder(recipe).encode, batches)

    monkeypatch.setattr(encode, "run", run)
    for name, value in SMALL.items():
        monkeypatch.setattr(name, value)


def all_parts(made: PrepareConfig, of: int) -> None:
    for number in range(1, of + 1):
        prepare_part(made, Part(number, of))


def stop(function: Callable[[], object], monkeypatch: pytest.MonkeyPatch, finish: type, after: int) -> None:
    """Call a function and break it off when the ``finish`` of a class was called so many times."""
    original, count = finish.finish, iter(range(after))  # type: ignore[attr-defined]

    def failing(self: Any) -> Any:
        if next(count, None) is None:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finish, "finish", failing)
        function()


# --------------------------------------------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize(
    "order", [(1,), (2, 1), (5, 1, 7, 3, 2, 6, 4), range(80, 0, -1)], ids=["1", "2", "7", "more than batches"]
)
def test_any_number_of_parts_in_any_order_gives_the_bytes_of_no_parts(
    here: None, settings: Callable[..., PrepareConfig], prepared: dict[str, bytes], tmp_path: Path, order: Iterable[int]
) -> None:
    made = settings(tmp_path / "out")
    for number in order:
        prepare_part(made, Part(number, len(list(order))))
    report = merge(made)
    assert contents(tmp_path / "out") == prepared  # and so nothing of the parts is left
    assert report == json.loads((tmp_path / "out/report.json").read_bytes())
    assert report["status"] == "prepared"


def test_the_work_is_split(here: None, settings: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    tokens = [prepare_part(settings(tmp_path / "out"), Part(number, 3))["tokens"] for number in (1, 2, 3)]
    assert max(tokens) < 1.2 * min(tokens)
    assert sum(tokens) > sum(split["tokens"] for split in merge(settings(tmp_path / "out"))["splits"].values())  # duplicates


def test_a_validation_source_of_its_own_is_split_too(here: None, settings: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("\n".join(preparing.document(number) for number in range(650, 800)))
    held = {"name": "text", "paths": [str(tmp_path / "held.txt")], "document": "line"}
    made = partial(settings, validation=held, validation_fraction=0)
    prepare(made(tmp_path / "whole"))
    all_parts(made(tmp_path / "out"), 4)
    merge(made(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_parts_that_run_at_once_and_are_killed(
    settings: Callable[..., PrepareConfig], prepared: dict[str, bytes], tmp_path: Path
) -> None:
    """Three real jobs; two of them are killed when they have written a piece, and run again; then the merge likewise."""
    made, script = settings(tmp_path / "out"), ("-c", SMALL_CLI)
    jobs = {number: run_cli(tmp_path, made, "--part", f"{number}/3", start=script) for number in (1, 2, 3)}
    children: set[int] = set()
    for number in (2, 3):
        children |= kill_when(jobs[number], lambda: any(part_pieces(tmp_path / "out", number)))  # noqa: B023
    whole = {file: file.read_bytes() for number in (2, 3) for file in part_pieces(tmp_path / "out", number)}
    out, errors = jobs[1].communicate(timeout=120)
    assert (jobs[1].returncode, json.loads(out.splitlines()[-1])["part"]) == (0, "1/3"), errors
    assert wait_until_gone(children) == set()
    for number in (2, 3):
        _, errors = run_cli(tmp_path, made, "--part", f"{number}/3", start=script).communicate(timeout=120)
        assert errors.count("error") == 0
    assert whole and {file: file.read_bytes() for file in whole} == whole
    kill_when(run_cli(tmp_path, made, "--merge", start=script), lambda: (tmp_path / "out/train/000003.tar").exists())
    shard = (tmp_path / "out/train/000000.tar").stat()
    assert run_cli(tmp_path, made, "--merge").wait(120) == 0
    assert contents(tmp_path / "out") == prepared
    assert (tmp_path / "out/train/000000.tar").stat().st_ino == shard.st_ino  # continued


def part_pieces(output: Path, number: int) -> list[Path]:
    return sorted(output.glob(f"parts/{number}-of-*/train/*.piece"))


def kill_when(job: subprocess.Popen[str], moment: Callable[[], bool]) -> set[int]:
    """SIGKILL a job when the moment has come; the processes it had started."""
    while not moment() and job.poll() is None:
        time.sleep(0.001)
    children = descendants(job.pid)
    job.send_signal(signal.SIGKILL)
    _, errors = job.communicate()
    assert job.returncode == -signal.SIGKILL, errors
    return children


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_a_part_that_was_interrupted_continues_after_its_last_whole_piece(
    here: None, settings: Callable[..., PrepareConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    made = [settings(tmp_path / name) for name in ("whole", "out")]
    prepare_part(made[0], Part(2, 3))
    stop(lambda: prepare_part(made[1], Part(2, 3)), monkeypatch, PieceWriter, pieces)
    files = {file: file.stat().st_ino for file in part_pieces(tmp_path / "out", 2)}
    assert len(files) == pieces
    prepare_part(made[1], Part(2, 3))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {file: file.stat().st_ino for file in files} == files


@pytest.mark.parametrize("shards", [0, 1, 4, 7])
def test_a_merge_that_was_interrupted_continues_after_its_last_whole_shard(
    here: None,
    settings: Callable[..., PrepareConfig],
    prepared: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shards: int,
) -> None:
    made = settings(tmp_path / "out")
    all_parts(made, 2)
    stop(lambda: merge(made), monkeypatch, ShardWriter, shards)
    written = {file: file.stat().st_ino for file in (tmp_path / "out").rglob("*.tar")}
    assert len(written) == shards
    merge(made)
    assert contents(tmp_path / "out") == prepared
    assert {file: file.stat().st_ino for file in written} == written


def test_the_tokenizer_is_made_once_and_the_others_wait_with_a_message(
    here: None, settings: Callable[..., PrepareConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = settings(tmp_path / "out")
    with locked(tmp_path / "out"):
        job = run_cli(tmp_path, made, "--part", "1/2", start=("-c", SMALL_CLI))
        assert job.stderr is not None
        said = job.stderr.readline()
    job.communicate(timeout=120)
    assert said == f"waiting: another job holds {tmp_path / 'out'}, to make the tokenizer or to merge\n"
    monkeypatch.setattr("scaletrain.data.tokenizer.train", None)
    prepare_part(made, Part(2, 2))
    merge(made)


def test_what_is_done_is_not_done_again(
    here: None,
    settings: Callable[..., PrepareConfig],
    prepared: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = settings(tmp_path / "out")
    all_parts(made, 2)
    monkeypatch.setattr(encode, "run", None)
    assert prepare_part(made, Part(2, 2))["tokens"] > 0
    merge(made)
    assert prepare_part(made, Part(2, 2))["status"] == merge(made)["status"] == prepare(made)["status"] == "already prepared"
    assert contents(tmp_path / "out") == prepared


def test_fresh_repeats_one_part_or_the_merge(
    here: None,
    settings: Callable[..., PrepareConfig],
    prepared: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = settings(tmp_path / "out")
    all_parts(made, 2)
    before = {number: [file.stat().st_mtime_ns for file in part_pieces(tmp_path / "out", number)] for number in (1, 2)}
    prepare_part(made, Part(2, 2), fresh=True)
    after = {number: [file.stat().st_mtime_ns for file in part_pieces(tmp_path / "out", number)] for number in (1, 2)}
    assert (after[1] == before[1], after[2] == before[2]) == (True, False)
    stop(lambda: merge(made), monkeypatch, ShardWriter, 2)
    (tmp_path / "out/train/000000.tar").write_bytes(b"damaged")
    merge(made, fresh=True)
    assert contents(tmp_path / "out") == prepared
    prepare(made, fresh=True)
    assert contents(tmp_path / "out") == prepared


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}, ["--part", "3/8"]),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "2", "PARTS": "8"}, ["--part", "3/8"]),
        ({}, ["--merge"]),
    ],
    ids=["a job of an array", "some jobs again", "no array"],
)
def test_the_slurm_script_runs_its_part_or_the_merge(tmp_path: Path, environment: dict[str, str], expected: list[str]) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    script = ROOT / "launch" / "prepare.slurm.sbatch"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **environment}
    done = subprocess.run([script, "x y.yaml", "seed=1"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["-m", "scaletrain", "prepare", "--config", "x y.yaml", *expected, "seed=1"]


# --------------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "part", ["0/4", "5/4", "x", "1/0", "-1/2", "1/2/3", "1", "1/", " 1/2", "1.0/2", "\u0661/2", "1/99999999"]
)
def test_what_is_no_part_is_refused(part: str) -> None:
    with pytest.raises(ConfigError, match=r"^--part: got .*; a part is I/N with 1 <= I <= N. Give for example --part 1/4$"):
        Part.parse(part)


def test_the_command_line_refuses_a_wrong_part_and_a_part_with_merge(
    settings: Callable[..., PrepareConfig], tmp_path: Path
) -> None:
    made = settings(tmp_path / "out")
    assert fails(tmp_path, made, "--part", "5/4")[0] == 65
    code, error = fails(tmp_path, made, "--part", "1/4", "--merge")
    assert (code, error) == (
        65,
        "error: --part: got '1/4'; a part is prepared or parts are merged, not both. Leave out --part or --merge",
    )
    assert not (tmp_path / "out").exists()


def test_a_merge_names_the_parts_that_are_missing_or_unfinished(
    here: None, settings: Callable[..., PrepareConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = settings(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--merge: got .*; no part was prepared there. Run the parts first"):
        merge(made)
    stop(lambda: prepare_part(made, Part(4, 5)), monkeypatch, PieceWriter, 1)
    for number in (1, 3):
        prepare_part(made, Part(number, 5))
    with pytest.raises(ConfigError) as caught:
        merge(made)
    assert caught.value.value == "2/5, 5/5 missing; 4/5 unfinished"
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_parts_of_another_number_or_with_other_settings_are_refused(
    here: None, settings: Callable[..., PrepareConfig], tmp_path: Path
) -> None:
    made = settings(tmp_path / "out")
    prepare_part(made, Part(1, 2))
    with pytest.raises(ConfigError, match=r"--part: got '1/3'; .* was begun in 2 parts. Use a new output folder"):
        prepare_part(made, Part(1, 3))
    with pytest.raises(ConfigError, match=r"max_tokens: got 64; the folder .* was begun with 32"):
        prepare_part(settings(tmp_path / "out", max_tokens=64), Part(2, 2))
    with pytest.raises(ConfigError, match=r"max_tokens: got 64; the folder .* was begun with 32"):
        merge(settings(tmp_path / "out", max_tokens=64))
    with pytest.raises(ConfigError, match=r"--part: got None; .* was begun in 2 parts. Run the parts and then --merge, or start"):
        prepare(made)


def test_parts_and_a_prepare_without_parts_do_not_mix(
    here: None, settings: Callable[..., PrepareConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = settings(tmp_path / "out")
    stop(lambda: prepare(made), monkeypatch, ShardWriter, 1)
    with pytest.raises(ConfigError, match=r"--part: got '1/2'; .* was begun without parts"):
        prepare_part(made, Part(1, 2))
    with pytest.raises(ConfigError, match=r"--merge: got .*; it was begun without parts. Run the same command without --merge"):
        merge(made)


def test_a_second_job_on_the_same_part_is_refused(here: None, settings: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    made = settings(tmp_path / "out")
    prepare_part(made, Part(2, 2))
    with locked(tmp_path / "out/parts/1-of-2"):
        with pytest.raises(ConfigError, match=re.escape("1-of-2'; another prepare is writing this part. Wait for it to end")):
            prepare_part(made, Part(1, 2))
        with pytest.raises(ConfigError, match="another prepare is writing this part"):
            prepare(made, fresh=True)


def test_a_file_system_without_locks_is_refused(
    settings: Callable[..., PrepareConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(stream: object, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")  # as Lustre does where it is mounted without them

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(StorageError, match=r"the file system cannot lock files \(Operation not supported\), so that two jobs"):
        prepare_part(settings(tmp_path / "out"), Part(1, 2))


def test_parts_that_read_other_text_are_refused(here: None, settings: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    made = [
        settings(tmp_path / "out", source={"name": "text", "paths": [str(tmp_path / "a.txt")], "document": "line"})
        for _ in range(2)
    ]
    lines = [preparing.document(number) for number in range(300)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    prepare_part(made[0], Part(1, 2))
    (tmp_path / "a.txt").write_text("\n".join([*lines[:-1], "another end"]))
    prepare_part(made[0], Part(2, 2))
    with pytest.raises(ConfigError, match=r"source of train: got '300 documents in part 2/2, 300 in part 1/2'; all parts read"):
        merge(made[0])


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit in the text": lambda file: flip(file, -100),
    "a flipped bit in the magic": lambda file: flip(file, 0),
    "a flipped bit in a size": lambda file: flip(file, 17 + 8 * 4),
    "cut in a batch": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "cut in a head": lambda file: file.write_bytes(file.read_bytes()[:10]),
    "gone": Path.unlink,
    "that of another part": lambda file: shutil.copy(str(file).replace("1-of-2", "2-of-2"), file),
}


def test_a_damaged_piece_is_named(
    here: None, settings: Callable[..., PrepareConfig], prepared: dict[str, bytes], tmp_path: Path
) -> None:
    all_parts(settings(tmp_path / "both"), 2)
    for number, damage in enumerate(DAMAGE.values()):
        output = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "both", output)
        damage(part_pieces(output, 1)[1])
        with pytest.raises(CorpusError, match=r"000001.piece: got .*"):
            merge(settings(output))
    made = settings(output)
    prepare_part(made, Part(1, 2), fresh=True)
    merge(made)
    assert contents(output) == prepared
