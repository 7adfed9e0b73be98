"""A ledger tells what was written, and tells when that was changed."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from scaletrain.continual import ledger
from scaletrain.continual.ledger import Ledger
from scaletrain.errors import CheckpointError, StorageError


@pytest.fixture
def book(tmp_path: Path) -> Ledger:
    """A ledger of four entries."""
    book = Ledger(tmp_path / "ledger.jsonl")
    for number, event in enumerate(["begun", "trained", "evaluated", "judged"]):
        book.append(event, {"version": "0001-a", "row": [0.1 * number, 1.0], "sizes": {"10": 1, "9": 2}})
    return book


def test_entries_are_numbered_and_chained(book: Ledger) -> None:
    entries = book.entries()
    assert [(entry["n"], entry["event"]) for entry in entries] == [(1, "begun"), (2, "trained"), (3, "evaluated"), (4, "judged")]
    assert [entry["previous"] for entry in entries] == ["scaletrain-ledger-1", *(entry["sha256"] for entry in entries[:3])]


def test_what_append_returns_is_what_is_read(tmp_path: Path) -> None:
    book = Ledger(tmp_path / "ledger.jsonl")
    written = book.append("begun", {"tuple": (1, 2), "numbers": {10: "a", 9: "b"}, "text": "ü\u2028\n"})
    assert book.entries() == [written]
    assert written["tuple"] == [1, 2]


def test_the_time_is_in_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests, times = [], []
    for number, time in enumerate(["2026-01-01T00:00:00+00:00", "2027-02-02T00:00:00+00:00"]):
        monkeypatch.setattr(ledger, "utc_now", lambda time=time: time)
        entry = Ledger(tmp_path / f"{number}.jsonl").append("begun", {"version": "0001-a"})
        digests.append(entry["sha256"])
        times.append(entry["at"])
    assert digests[0] == digests[1]
    assert times == ["2026-01-01T00:00:00+00:00", "2027-02-02T00:00:00+00:00"]


def test_before_the_first_entry_there_is_nothing(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "ledger.jsonl").entries() == []


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_changed_line_is_named(book: Ledger, number: int) -> None:
    lines = book.path.read_text().splitlines()
    lines[number - 1] = lines[number - 1].replace("0001-a", "0001-b")
    book.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(CheckpointError, match=rf"ledger\.jsonl:{number}: "):
        book.entries()


def test_a_changed_line_with_a_digest_of_its_own_breaks_the_chain(book: Ledger) -> None:
    lines = book.path.read_text().splitlines()
    forged: dict[str, Any] = json.loads(lines[1])
    forged["version"] = "0001-b"
    forged["sha256"] = ledger._digest(forged)
    lines[1] = json.dumps(forged)
    book.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl:3: "):
        book.entries()


@pytest.mark.parametrize(
    ("order", "number"),
    [([1, 0, 2, 3], 1), ([0, 2, 3], 2), ([0, 1, 1, 2, 3], 3), ([1, 2, 3], 1)],
    ids=["swap", "drop", "twice", "head"],
)
def test_lines_moved_dropped_or_repeated_are_named(book: Ledger, order: list[int], number: int) -> None:
    lines = book.path.read_text().splitlines()
    book.path.write_text("\n".join(lines[place] for place in order) + "\n")
    with pytest.raises(CheckpointError, match=rf"ledger\.jsonl:{number}: "):
        book.entries()


@pytest.mark.parametrize("line", ["", "null", "[]", "not json", "{}"])
def test_a_line_that_is_no_entry_is_named(book: Ledger, line: str) -> None:
    book.path.write_text(book.path.read_text() + line + "\n")
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl:5: "):
        book.entries()


def test_a_torn_last_line_does_not_count_and_the_next_takes_its_place(book: Ledger) -> None:
    whole = book.path.read_bytes()
    for kept in (1, 40, len(whole.splitlines()[3])):  # the last one lacks nothing but its line break
        book.path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]) + whole.splitlines()[3][:kept])
        with pytest.warns(UserWarning, match=r"ledger\.jsonl:4: the line was torn"):
            assert [entry["n"] for entry in book.entries()] == [1, 2, 3]
        with pytest.warns(UserWarning, match="torn"):
            again = book.append("judged", {"version": "0001-a", "row": [0.1 * 3, 1.0], "sizes": {"10": 1, "9": 2}})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert book.entries()[-1] == again
        assert again["sha256"] == json.loads(whole.splitlines()[3])["sha256"]


def test_nothing_of_a_torn_line_is_left_behind_a_shorter_entry(book: Ledger) -> None:
    with book.path.open("ab") as file:
        file.write(b'{"n": 5, "event": "' + bytes(5000))
    with pytest.warns(UserWarning, match="torn"):
        entry = book.append("published", {})
    assert book.path.read_bytes().endswith(json.dumps(entry).encode() + b"\n")
    assert book.entries()[4:] == [entry]


def test_an_entry_reaches_the_disk_before_append_returns(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, int]] = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        fsync(descriptor)
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", watch)
    book.append("published", {})
    assert synced == [(str(book.path), book.path.stat().st_size)]
    other = Ledger(book.path.with_name("new.jsonl"))
    other.append("begun", {})
    assert [path for path, _ in synced[1:]] == [str(other.path), str(other.path.parent)]


def test_a_full_disk_is_named_and_leaves_the_entries(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    before, write = book.entries(), os.write

    def full(descriptor: int, data: bytes) -> int:
        write(descriptor, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageError, match=r"ledger\.jsonl.*No space left") as caught:
            book.append("published", {})
    assert caught.value.exit_code == 74
    with pytest.warns(UserWarning, match="torn"):
        assert book.entries() == before


def test_a_write_that_takes_only_a_part_is_continued(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    assert book.append("published", {"version": "0001-a"}) == book.entries()[-1]


@pytest.mark.parametrize("name", ["n", "event", "previous", "sha256", "at"])
def test_a_fact_cannot_be_a_field_of_every_entry(book: Ledger, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        book.append("begun", {name: 1})


def test_what_json_cannot_say_is_refused(book: Ledger) -> None:
    before = book.path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        book.append("evaluated", {"accuracy": float("nan")})
    assert book.path.read_bytes() == before
