"""Tars that others wrote: every sample by its index; what is hostile is refused, in bounded time and memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
import webdataset
from webdataset.tariterators import base_plus_ext

from scaletrain.cli import main as cli
from scaletrain.data import foreign, index
from scaletrain.data.foreign import TarSet
from scaletrain.errors import CorpusError, StorageError
from tests import hostile_tars
from tests.tars import make_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def pairs(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    numbers = range(start, start + count)
    return [(f"s/{n:04d}.{suffix}", f"{suffix} of {n}".encode() * n) for n in numbers for suffix in ("txt", "seg.json")]


@pytest.mark.parametrize("form", FORMATS)
def test_every_sample_is_what_was_written(tmp_path: Path, form: str) -> None:
    long = "d" * 120 + "/" + "k" * 99
    files = [
        make_tar(tmp_path / "a.tar", pairs(5), FORMATS[form]),
        make_tar(tmp_path / "b.tar", [*pairs(3, 5), (f"{long[:150]}/{'n' * 60}.txt", b"x")], FORMATS[form]),
    ]
    tars = TarSet.open(files)
    assert len(tars) == 9
    read = [tars.read(n) for n in range(8)]
    assert [(f"{s.key}.{suffix}", data) for s in read for suffix, data in s.members.items()] == pairs(8)
    assert tars.read(8).key == f"{long[:150]}/{'n' * 60}"
    with pytest.raises(IndexError):
        tars.span(9)


def test_what_webdataset_wrote_is_read_as_it_reads_it(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        for number in range(7):
            writer.write({"__key__": f"k{number}", "txt": f"text {number}", "json": {"n": number}})
    expected = [
        {"__key__": each["__key__"], "txt": each["txt"], "json": each["json"]}
        for each in webdataset.WebDataset(str(tmp_path / "w.tar"), shardshuffle=False)
    ]
    tars = TarSet.open([tmp_path / "w.tar"])
    assert [{"__key__": s.key, **s.members} for s in map(tars.read, range(7))] == expected


def test_gnu_tar_is_read(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{'n' * 110}{number}.txt").write_text(f"text {number}")
    names = sorted(file.name for file in tmp_path.iterdir())
    subprocess.run(["tar", "-cf", "g.tar", *names], cwd=tmp_path, check=True)
    tars = TarSet.open([tmp_path / "g.tar"])
    assert [tars.read(n).members["txt"] for n in range(3)] == [b"text 0", b"text 1", b"text 2"]


def test_strict_mode_refuses_a_tar_without_an_index_and_takes_it_with_one(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", pairs(3))
    with pytest.raises(CorpusError, match=r"a\.tar.*no index that fits it.*scaletrain index"):
        TarSet.open([tar], strict=True)
    assert not foreign.place(tar).exists()
    assert [new for _, new in foreign.build([tar])] == [True]
    assert len(TarSet.open([tar], strict=True)) == 3


def test_an_index_of_an_older_or_other_tar_is_not_taken(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", pairs(3))
    TarSet.open([tar])
    made = foreign.place(tar).stat().st_mtime
    make_tar(tar, pairs(40))
    os.utime(tar, (made - 100, made - 100))  # looks older, and has another size
    assert foreign.indexed(tar) is None
    assert len(TarSet.open([tar])) == 40
    os.utime(tar, (made + 100, made + 100))
    assert foreign.indexed(tar) is None


def test_a_changed_byte_is_noticed_when_the_sample_is_read(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", pairs(6))
    tars = TarSet.open([tar])
    data = bytearray(tar.read_bytes())
    data[int(foreign.indexed(tar).records[4]["offset"]) + 600] ^= 1  # type: ignore[union-attr]
    tar.write_bytes(data)
    assert tars.read(3).members["txt"] == b"txt of 3" * 3
    with pytest.raises(CorpusError, match=r"CRC-32 .* of sample 's/0004'"):
        tars.read(4)


def test_a_packed_tar_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress(make_tar(tmp_path / "b.tar", pairs(3)).read_bytes()))
    with pytest.raises(CorpusError, match=r"a\.tar.*packed by gzip.*unpack it first"):
        TarSet.open([tmp_path / "a.tar"])


def test_an_index_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"index_folder: got '/proc/x'"):
        list(foreign.build([make_tar(tmp_path / "a.tar", pairs(3))], Path("/proc/x")))


def test_indexes_in_a_folder_of_their_own_do_not_collide(tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files.append(make_tar(tmp_path / name / "000000.tar", pairs(3 if name == "one" else 4)))
    assert len(TarSet.open(files, tmp_path / "indexes")) == 7
    assert len(list((tmp_path / "indexes").iterdir())) == 2 and not list(tmp_path.glob("*/*.stidx"))[2:]
    assert len(TarSet.open(files, tmp_path / "indexes", strict=True)) == 7


def test_a_folder_that_cannot_be_written_is_indexed_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, data: bytes) -> None:
        raise StorageError("the file system is read-only")

    monkeypatch.setattr(foreign, "write_atomically", full)
    assert len(TarSet.open([make_tar(tmp_path / "a.tar", pairs(3))])) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]


# ------------------------------------------------------------------------------------------------------------------- the verb


def test_the_verb_builds_in_parallel_once_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [make_tar(tmp_path / f"{n}.tar", pairs(20)) for n in range(4)]
    command = ["index", f'tars=["{tmp_path}"]', "processes=2"]

    def run(*more: str) -> tuple[int, dict[str, int], str]:
        code = cli([*command, *more])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if code == 0 else {}, err

    code, totals, _ = run()
    assert (code, totals["tars"], totals["samples"], totals["made"]) == (0, 4, 80, 4)
    assert run()[1]["made"] == 0
    assert run("check=true")[0] == 0
    for tar in files[1:3]:
        data = bytearray(tar.read_bytes())
        data[600] ^= 1
        tar.write_bytes(data)
        os.utime(tar, (1, 1))
    code, _, err = run("check=true")
    assert code == 65 and "2 of 4 damaged" in err and "1.tar" in err and "2.tar" in err
    assert cli(["index", f'tars=["{tmp_path / "nothing"}"]']) == 65


def test_killed_while_it_builds_it_goes_on_where_it_was(tmp_path: Path) -> None:
    for number in range(40):
        make_tar(tmp_path / f"{number:02d}.tar", pairs(60))
    program = "import sys; from scaletrain.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "index", f'tars=["{tmp_path}"]', "processes=1"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(3):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    there = {file: file.read_bytes() for file in tmp_path.glob("*.stidx")}
    assert 3 <= len(there) < 40
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["made"] == 40 - len(there)
    assert all(file.read_bytes() == data for file, data in there.items())
    assert len(TarSet.open(sorted(tmp_path.glob("*.tar")), strict=True)) == 40 * 60


def test_several_that_build_the_same_indexes_at_once_do_no_harm(tmp_path: Path) -> None:
    files = [make_tar(tmp_path / f"{n:02d}.tar", pairs(40)) for n in range(30)]
    program = (
        "import sys; from pathlib import Path; from scaletrain.data import foreign\n"
        "sys.stdin.read()\nlist(foreign.build([Path(each) for each in sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", program, *map(str, files)]
    builders = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(3)]
    time.sleep(2)  # until all of them wait for the word
    for builder in builders:
        assert builder.stdin is not None
        builder.stdin.close()
    assert [builder.wait() for builder in builders] == [0, 0, 0]
    assert len(TarSet.open(files, strict=True)) == 30 * 40
    assert list(tmp_path.glob(".*")) == []


# --------------------------------------------------------------------------------------------------------------------- hostile


def tried(case: int, folder: Path) -> tuple[str, bool, int]:
    """One hostile tar; whether it could be read, and then as the standard library reads it; and the most memory, in bytes."""
    what, data = hostile_tars.make(case)
    tar = folder / "case.tar"
    tar.write_bytes(data)
    began = time.perf_counter()
    tracemalloc.start()
    try:
        tars = TarSet([(tar, index.build(tar))])
        read = [tars.read(n) for n in range(len(tars))]
        outcome = True
    except CorpusError as error:
        assert str(tar) in str(error), what
        outcome = False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 16 << 20, (what, peak)
    assert time.perf_counter() - began < 5, what
    if outcome:
        try:
            with tarfile.open(fileobj=io.BytesIO(data)) as reference:
                members = [m for m in reference.getmembers() if not m.isdir()]
                assert all(m.isreg() for m in members), what
                theirs = [(m.name, reference.extractfile(m).read()) for m in members]  # type: ignore[union-attr]
        except (tarfile.TarError, UnicodeDecodeError, ValueError):
            return what, True, peak  # which reads less than the format allows
        ours = [(f"{sample.key}.{suffix}", data) for sample in read for suffix, data in sample.members.items()]
        # A name that begins with a dot is no sample here. And the reference ends, silently, at a header with a bad owner or time.
        expected = [
            (name, data) for name, data in theirs if base_plus_ext(name)[0] and not name.rpartition("/")[2].startswith(".")
        ]
        if what == "a changed header whose checksum holds":  # and takes a prefix where there is no ustar
            assert [data for _, data in ours][: len(expected)] == [data for _, data in expected], (case, what)
        else:
            assert ours == expected, (case, what)
    return what, outcome, peak


def test_hostile_tars_are_read_rightly_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "inside" / "folder"
    folder.mkdir(parents=True)
    outcomes: dict[str, set[bool]] = {}
    for case in range(400):
        what, read, _ = tried(case, folder)
        outcomes.setdefault(what, set()).add(read)
    assert outcomes["nothing"] == {True}
    refused = {"a symbolic link", "a hard link", "a device", "a FIFO", "upwards", "upwards in the middle", "an absolute name"}
    refused |= {"a key that comes back", "a very long name", "joined archives", "noise"}
    assert {what: outcomes[what] for what in refused & set(outcomes)} == {what: {False} for what in refused & set(outcomes)}
    assert len(set(outcomes) & refused) > 8 and outcomes["flipped bits"] == {True, False}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["case.tar", "folder", "inside"]


def test_several_threads_read_at_once(tmp_path: Path) -> None:
    tars = TarSet.open([make_tar(tmp_path / f"{n}.tar", pairs(30)) for n in range(3)])
    expected = [tars.span(n) for n in range(90)]
    wrong: list[int] = []

    def reads() -> None:
        wrong.extend(n for n in range(90) if tars.span(n) != expected[n])

    threads = [threading.Thread(target=reads) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
