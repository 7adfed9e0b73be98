"""prepare, from raw text to a folder that counts: the same bytes whatever happens on the way, clear words when it cannot."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaletrain.data import encode, index, tokenizer
from scaletrain.data.dataset import Dataset, read_manifest
from scaletrain.data.prepare import PrepareConfig, prepare
from scaletrain.errors import ConfigError, CorpusError, StorageError, TokenizerError
from tests import preparing
from tests.preparing import contents, descendants, document, fails, run_cli, wait_until_gone


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preparing.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def settings(corpus: Path) -> Callable[..., PrepareConfig]:
    return partial(preparing.settings, corpus)


@pytest.fixture(scope="module")
def prepared(settings: Callable[..., PrepareConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "folder"
    prepare(settings(folder))
    return folder


# ---------------------------------------------------------------------------------------------------------- what is in the folder


def test_the_chunks_are_the_tokens_of_the_documents_in_order(prepared: Path) -> None:
    """Against a reference that tokenises the corpus by itself."""
    from transformers import AutoTokenizer

    loaded, seen, expected = AutoTokenizer.from_pretrained(prepared / "tokenizer"), set[str](), {}
    train, held_out = Dataset.open(prepared), Dataset.open(prepared, "validation")
    for number in range(2000):
        text = document(number)
        if text not in seen:
            seen.add(text)
            expected[number] = loaded(text, add_special_tokens=False)["input_ids"]
    found: dict[int, list[int]] = {}
    for data in (train, held_out):
        keys = [data.key(chunk) for chunk in range(data.chunks)]
        assert keys == sorted(keys)
        for chunk, key in enumerate(keys):
            found.setdefault(int(key[:9]), []).extend(data.read(chunk).tolist())
    assert found == expected
    assert max(train.lengths) <= 32


def test_held_out_documents_are_the_share_asked_for_and_none_is_in_train(prepared: Path) -> None:
    splits = [Dataset.open(prepared, split) for split in ("train", "validation")]
    documents = [{data.key(chunk)[:9] for chunk in range(data.chunks)} for data in splits]
    assert not documents[0] & documents[1]
    assert 0.08 < len(documents[1]) / (len(documents[0]) + len(documents[1])) < 0.12


def test_a_long_document_is_cut_before_words(prepared: Path) -> None:
    data, starts = Dataset.open(prepared), tokenizer.word_starts(prepared / "tokenizer")
    assert all(starts[data.read(chunk)[0]] for chunk in range(data.chunks))


def test_a_word_longer_than_a_chunk_is_cut_where_the_chunk_ends() -> None:
    ids, starts = np.arange(100, dtype=np.uint16), np.zeros(100, np.bool_)
    assert [len(piece) for piece in encode.split(ids, 40, starts)] == [40, 40, 20]
    starts[[30, 39]] = True
    assert [len(piece) for piece in encode.split(ids, 40, starts)] == [39, 40, 21]
    assert [len(piece) for piece in encode.split(ids[:40], 40, starts)] == [40]


def test_webdataset_reads_the_same_arrays_from_the_shards(prepared: Path) -> None:
    import webdataset

    data = Dataset.open(prepared)
    urls = [str(prepared / shard["file"]) for shard in read_manifest(prepared)["splits"]["train"]["shards"]]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [data.key(chunk) for chunk in range(data.chunks)]
    assert [sample["npy"].tolist() for sample in samples] == [data.read(chunk).tolist() for chunk in range(data.chunks)]


def test_the_indexes_are_those_that_the_tars_have_by_themselves(prepared: Path) -> None:
    for tar in sorted(prepared.rglob("*.tar")):
        assert index.build(tar).to_bytes() == tar.with_suffix(".idx").read_bytes()


def test_the_report_counts_every_document_once(settings: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    texts = ["x", "", "  ", "y" * 300, "same words here", "same  words here", "held words", "other words here"]
    for name, lines in (("a.txt", texts), ("b.txt", ["other words here", "new words here", "new words here"])):
        (tmp_path / name).write_text("\n".join(lines))
    report = prepare(
        settings(
            tmp_path / "out",
            source={"name": "text", "paths": [str(tmp_path / "a.txt")], "document": "line"},
            validation={"name": "text", "paths": [str(tmp_path / "b.txt")], "document": "line"},
            validation_fraction=0,
            clean={"min_characters": 2, "max_characters": 200},
            tokenizer={"name": "wordpiece", "vocab_size": 256, "min_frequency": 1},
        )
    )
    train, held_out = report["splits"]["train"], report["splits"]["validation"]
    dropped = {"empty": 2, "too_short": 1, "too_long": 1, "no_tokens": 0, "duplicate": 1, "near_duplicate": 0}
    assert train["documents"] == {"read": 8, "kept": 3, "held_out": 0, "dropped": dropped}
    assert held_out["documents"]["dropped"]["duplicate"] == 2  # one of train, one of its own
    assert (held_out["documents"]["read"], held_out["documents"]["kept"]) == (3, 1)
    assert sum(train["lengths"].values()) == train["chunks"] == 3
    assert json.loads((tmp_path / "out/report.json").read_bytes()) == report


def test_the_length_histogram_is_that_of_the_lengths(prepared: Path) -> None:
    report = read_manifest(prepared)["report"]["splits"]["train"]["lengths"]
    lengths = Counter((int(length) - 1) // 4 for length in Dataset.open(prepared).lengths)
    assert report == {f"{4 * bin + 1}-{4 * bin + 4}": lengths[bin] for bin in range(8)}


def test_a_byte_level_tokenizer_and_one_that_exists_can_be_used(settings: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    first = prepare(settings(tmp_path / "a", tokenizer={"name": "bpe", "vocab_size": 400}))
    second = prepare(settings(tmp_path / "b", tokenizer={"name": "pretrained", "path": str(tmp_path / "a/tokenizer")}))
    assert first["vocab_size"] == second["vocab_size"] == 400
    assert Dataset.open(tmp_path / "b").digest == Dataset.open(tmp_path / "a").digest


def test_the_vocabulary_is_learned_from_train_alone(settings: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    """Every document has a word of its own, which becomes a token where it was seen."""
    words = ["".join(chr(97 + number // 26**place % 26) for place in range(3)) + "q" * 5 for number in range(200)]
    (tmp_path / "a.txt").write_text("\n".join(words))
    source = {"name": "text", "paths": [str(tmp_path / "a.txt")], "document": "line"}
    prepare(settings(tmp_path / "out", source=source, tokenizer={"name": "wordpiece", "vocab_size": 2000, "min_frequency": 1}))
    train, held_out = (Dataset.open(tmp_path / "out", split) for split in ("train", "validation"))
    assert set(train.lengths) == {1}
    assert 1 not in set(held_out.lengths)


# -------------------------------------------------------------------------------------------------------- the same bytes, always


def test_two_processes_write_the_bytes_of_one(
    settings: Callable[..., PrepareConfig], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaletrain.data.batches._BATCH_DOCUMENTS", 37)  # other batches, too
    prepare(settings(tmp_path / "two", processes=2))
    assert contents(tmp_path / "two") == contents(prepared)


def test_a_second_run_finds_it_prepared_and_changes_nothing(settings: Callable[..., PrepareConfig], prepared: Path) -> None:
    times = {file: file.stat().st_mtime_ns for file in prepared.rglob("*")}
    report = prepare(settings(prepared))
    assert report["status"] == "already prepared"
    assert report["splits"] == read_manifest(prepared)["report"]["splits"]
    assert {file: file.stat().st_mtime_ns for file in prepared.rglob("*")} == times


def journal(folder: Path) -> dict[str, Any]:
    file = folder / "progress.json"
    return dict(json.loads(file.read_bytes())) if file.exists() else {"tokenizer": None, "splits": {}}


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "before the tokenizer": lambda folder: (folder / "progress.json").exists(),
    "with a tokenizer": lambda folder: journal(folder)["tokenizer"] is not None,
    "in the first shard": lambda folder: (folder / "train").exists(),
    "after some shards": lambda folder: len(journal(folder)["splits"].get("train", {}).get("shards", ())) >= 5,
    "in validation": lambda folder: "validation" in journal(folder)["splits"],
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_run_again_it_gives_the_bytes_of_an_uninterrupted_run(
    settings: Callable[..., PrepareConfig], prepared: Path, tmp_path: Path, moment: str
) -> None:
    folder, children = tmp_path / "killed", kill_at(MOMENTS[moment], tmp_path, settings(tmp_path / "killed", processes=2))
    assert not (folder / "manifest.json").exists()
    with pytest.raises(CorpusError):
        Dataset.open(folder)
    kept = {name: data for name, data in contents(folder).items() if name.endswith(".tar")}
    prepare(settings(folder))
    assert contents(folder) == contents(prepared)
    assert kept.items() <= contents(folder).items()
    assert wait_until_gone(children) == set()


def kill_at(moment: Callable[[Path], bool], tmp_path: Path, made: PrepareConfig) -> set[int]:
    """Start prepare and SIGKILL it when the moment has come; the processes that it had started.

    Where this process is not scheduled until prepare has finished, the moment is gone and has to be waited for once more.
    """
    for _ in range(10):
        shutil.rmtree(made.output, ignore_errors=True)
        process = run_cli(tmp_path, made)
        while not moment(made.output) and process.poll() is None:
            time.sleep(0.001)
        children = descendants(process.pid)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == -signal.SIGKILL and not (made.output / "manifest.json").exists():
            return children
    raise AssertionError("prepare finished ten times before it could be killed")


def interrupt(settings: PrepareConfig, monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    """Run until the given number of shards was finished, then fail."""
    from scaletrain.data.shards import ShardWriter

    finish, count = ShardWriter.finish, iter(range(shards))

    def failing(self: ShardWriter) -> Any:
        if next(count, None) is None:
            raise KeyboardInterrupt
        return finish(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShardWriter, "finish", failing)
        prepare(settings)


def test_hashes_that_a_kill_left_unaccounted_for_do_not_count(
    settings: Callable[..., PrepareConfig], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill between the two files of the journal; two more runs, since the second one reads what the first appended."""
    made = settings(tmp_path / "out")
    interrupt(made, monkeypatch, 2)
    stray = os.urandom(16 * 20 + 5)
    with (tmp_path / "out/seen.bin").open("ab") as stream:
        stream.write(stray)
    interrupt(made, monkeypatch, 2)
    assert stray not in (tmp_path / "out/seen.bin").read_bytes()
    with (tmp_path / "out/dropped.jsonl").open("ab") as stream:
        stream.write(b'{"split": "tr')
    prepare(made)
    assert contents(tmp_path / "out") == contents(prepared)


def test_an_interrupted_folder_is_not_continued_with_other_settings(
    settings: Callable[..., PrepareConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(settings(tmp_path / "out"), monkeypatch, 2)
    with pytest.raises(
        ConfigError, match=r"max_tokens: got 64; the folder .* was begun with 32. Use a new output folder, or --fresh"
    ):
        prepare(settings(tmp_path / "out", max_tokens=64))


def test_an_interrupted_folder_is_not_continued_from_another_text(
    settings: Callable[..., PrepareConfig], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.txt"
    own.write_bytes(gzip.decompress(corpus.read_bytes()))
    made = settings(tmp_path / "out", source={"name": "text", "paths": [str(own)], "document": "line"})
    interrupt(made, monkeypatch, 2)
    own.write_text("another first line\n" + own.read_text())
    with pytest.raises(ConfigError, match="source of train: got 'a changed source'"):
        prepare(made)


def test_a_finished_folder_is_not_reused_for_other_settings(settings: Callable[..., PrepareConfig], prepared: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer.vocab_size: got 500; the folder .* was begun with 400"):
        prepare(settings(prepared, tokenizer={"name": "wordpiece", "vocab_size": 500}))


def test_fresh_starts_over(settings: Callable[..., PrepareConfig], prepared: Path, tmp_path: Path) -> None:
    prepare(settings(tmp_path / "out", max_tokens=64))
    (tmp_path / "out" / "train" / "mine.txt").write_text("not made by prepare")
    prepare(settings(tmp_path / "out"), fresh=True)
    assert contents(tmp_path / "out") == contents(prepared) | {"train/mine.txt": b"not made by prepare"}


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_something_else_is_left_alone(settings: Callable[..., PrepareConfig], tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "000000.tar").write_text("precious")
    with pytest.raises(ConfigError, match=r"output: got .*this one holds 'train'. Use a new folder"):
        prepare(settings(tmp_path), fresh=fresh)
    assert contents(tmp_path) == {"train/000000.tar": b"precious"}


# ---------------------------------------------------------------------------------------------------------------------- bad input


def test_an_output_that_is_a_file_is_refused(settings: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match=r"output: got .*the output is a folder; this is a file"):
        prepare(settings(tmp_path / "out"))


def test_a_missing_corpus_ends_with_65_and_leaves_no_folder(settings: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere.txt")
    code, error = fails(tmp_path, settings(tmp_path / "out", source={"name": "text", "paths": [nowhere]}))
    assert (code, (tmp_path / "out").exists()) == (65, False)
    assert error.startswith(f"error: source.paths: got '{nowhere}'; an existing file, glob or folder. Check the path")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "source text: got 'no documents'; a corpus holds at least one"),
        ("\n \n\t\n", "train: got 'no text'; none of its 3 documents is left"),
    ],
    ids=["no bytes", "only white space"],
)
def test_an_empty_corpus_is_refused(settings: Callable[..., PrepareConfig], tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "empty.txt").write_text(content)
    made = settings(
        tmp_path / "out",
        source={"name": "text", "paths": [str(tmp_path / "empty.txt")], "document": "line"},
        tokenizer={"name": "wordpiece", "vocab_size": 256},
    )
    with pytest.raises(CorpusError, match=message) as caught:
        prepare(made)
    assert caught.value.exit_code == 65
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_validation_source_that_repeats_train_is_refused(
    settings: Callable[..., PrepareConfig], corpus: Path, tmp_path: Path
) -> None:
    same = {"name": "text", "paths": [str(corpus)], "document": "line"}
    with pytest.raises(
        CorpusError, match=r"validation: got 'no text'; none of its 2000 documents is left after cleaning: {'duplicate': 2000}"
    ):
        prepare(settings(tmp_path / "out", validation=same, validation_fraction=0))


def test_validation_from_two_places_is_refused(settings: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"validation_fraction: got 0.1; held-out text comes from 'validation' or from a fraction"
    ):
        settings(tmp_path, validation={"name": "stdlib"})


def test_a_tokenizer_that_was_exchanged_after_an_interruption_is_refused(
    settings: Callable[..., PrepareConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(settings(tmp_path / "out"), monkeypatch, 2)
    file = tmp_path / "out/tokenizer/tokenizer.json"
    file.write_text(file.read_text().replace('"lor"', '"rol"'))
    with pytest.raises(TokenizerError, match="the data was tokenised with the tokenizer of digest"):
        prepare(settings(tmp_path / "out"))


def test_two_prepares_do_not_write_one_folder(settings: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    from scaletrain.data.journal import locked

    with locked(tmp_path / "out"), pytest.raises(ConfigError, match="another prepare is writing this folder"):
        prepare(settings(tmp_path / "out"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    with mounted(tmp_path / "disk", "size=1m") as folder:
        yield folder


class mounted:
    """A tmpfs for the time of a test; skips where that is not allowed."""

    def __init__(self, folder: Path, options: str) -> None:
        self.folder, self.options = folder, options

    def __enter__(self) -> Path:
        self.folder.mkdir()
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", self.options, "tmpfs", self.folder], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"mounting a small file system is not allowed here: {made.stderr.strip()}")
        return self.folder

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", self.folder], check=True)


def test_a_full_disk_ends_with_74_and_the_same_command_continues_once_there_is_room(
    settings: Callable[..., PrepareConfig], prepared: Path, small_disk: Path, tmp_path: Path
) -> None:
    made = settings(small_disk / "out")
    code, error = fails(tmp_path, made)
    assert code == 74
    assert error.startswith(f"error: output: got '{small_disk / 'out'}'; the disk is full: at least ")
    assert error.endswith("are free. Free space and run the same command: it continues from the last whole shard")
    shards = journal(small_disk / "out")["splits"]["train"]["shards"]
    whole = {file: (small_disk / "out" / file).stat().st_ino for file in (shard["file"] for shard in shards)}
    assert len(whole) >= 1
    assert not list(small_disk.rglob(".*.tar.tmp"))
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    prepare(made)
    assert contents(small_disk / "out") == contents(prepared)
    assert {file: (small_disk / "out" / file).stat().st_ino for file in whole} == whole


def test_a_read_only_output_ends_with_74(settings: Callable[..., PrepareConfig], small_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    code, error = fails(tmp_path, settings(small_disk / "out"))
    assert (code, error) == (
        74,
        f"error: output: got '{small_disk / 'out'}'; the file system is read-only. "
        "Use a folder that can be written, or make this one writable",
    )


def test_a_finished_folder_can_be_used_read_only(settings: Callable[..., PrepareConfig], small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    prepare(settings(small_disk / "out"))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert prepare(settings(small_disk / "out"))["status"] == "already prepared"


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@pytest.mark.skipif(
    sys.version_info < (3, 11, 5), reason="CPython's process pool may deadlock here when a worker dies (gh-94777)"
)
def test_a_process_that_dies_is_reported_and_the_run_continues(
    settings: Callable[..., PrepareConfig], prepared: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    process = run_cli(tmp_path, settings(folder))
    workers: list[int] = []
    while not workers and process.poll() is None:
        workers = [pid for pid in descendants(process.pid) if b"spawn_main" in command_line(pid)]
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 70
    assert "processes: got 1; a tokenising process died, most likely killed for want of memory. Run the same command" in errors
    prepare(settings(folder))
    assert contents(folder) == contents(prepared)


def test_a_disk_error_of_another_kind_is_not_renamed(tmp_path: Path) -> None:
    from scaletrain.data.shards import storage

    with pytest.raises(StorageError, match="the disk reports an input/output error"), storage(tmp_path):
        raise OSError(5, "Input/output error")
    with pytest.raises(FileNotFoundError), storage(tmp_path):
        (tmp_path / "nowhere").read_bytes()
