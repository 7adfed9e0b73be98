"""``inspect data`` counts what is there, reads every byte, and names all that is damaged."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaletrain import cli
from scaletrain.data import foreign, index, shards, survey
from scaletrain.data.dataset import Dataset, read_manifest
from tests import tiny
from tests.tars import make_tar
from tests.unit.report.dom import parse

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several shards, a validation split, and documents that were dropped."""
    return tiny.corpus(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def prepared(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "prepared"))


def inspect(capsys: Capture, folder: Path, *settings: str) -> tuple[int, dict[str, Any], str, str]:
    """Exit code, the JSON of the last line, all lines, and what was said of errors."""
    code = cli.main(["inspect", "data", str(folder), *settings])
    said = capsys.readouterr()
    return code, json.loads(said.out.splitlines()[-1]), said.out, said.err


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x40
    file.write_bytes(data)


def test_the_figures_are_those_of_reading_chunk_by_chunk(prepared: Path, capsys: Capture) -> None:
    code, found, out, _ = inspect(capsys, prepared)
    assert (code, found["kind"], found["damaged"]) == (0, "prepared data", [])
    manifest = read_manifest(prepared)
    assert found["digest"] == manifest["digest"]
    for split in ("train", "validation"):
        part, dataset = found["parts"][split], Dataset.open(prepared, split)
        chunks = [dataset.read(chunk) for chunk in range(dataset.chunks)]
        tokens = np.bincount(np.concatenate(chunks), minlength=dataset.vocab_size)
        assert (part["chunks"], part["tokens"]) == (len(chunks), int(tokens.sum()))
        assert part["median_tokens_per_chunk"] == np.median([len(chunk) for chunk in chunks])
        lengths = Counter(-(-len(chunk) // 3) for chunk in chunks)  # 46 tokens in 16 bars: 3 each
        assert list(part["histograms"]["Length"].values()) == [lengths[bar] for bar in range(1, 17)]
        frequency = part["histograms"]["Frequency"]
        assert frequency["never"] == int((tokens == 0).sum())
        assert frequency["4-15"] == int(((tokens >= 4) & (tokens < 16)).sum())
        assert sum(frequency.values()) == dataset.vocab_size
        said = manifest["report"]["splits"][split]["documents"]
        assert (part["documents_read"], part["dropped"]) == (said["read"], said["dropped"])
        tars = sorted((prepared / split).glob("*.tar"))
        assert (part["shards"], part["bytes"]) == (len(tars), sum(tar.stat().st_size for tar in tars))
    assert found["verified_bytes"] == sum(part["bytes"] - 1024 * part["shards"] for part in found["parts"].values())
    assert "1-3 \N{FULL BLOCK}" in out
    page = parse(Path(found["page"]).read_text().removeprefix("<!doctype html>\n"))
    assert (page.one("h1").text, len(page.all("rect", "bar")) > 40) == ("prepared", True)
    assert page.all("table")[-1].all("tr")[1].all("td")[1].text.replace(",", "") == str(tokens.max())


def test_any_number_of_processes_and_pieces_finds_the_same(
    prepared: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(prepared / "train" / "000001.tar", 700)
    found = []
    for processes, stretch, read in ((1, 1 << 26, 1 << 24), (1, 5000, 3000), (2, 100_000, 1 << 24)):
        monkeypatch.setattr(survey, "STRETCH_BYTES", stretch)
        monkeypatch.setattr(survey, "READ_BYTES", read)
        found.append(inspect(capsys, prepared, f"processes={processes}")[1])
        del found[-1]["gb_per_s"]
    assert found[0] == found[1] == found[2]
    assert len(found[0]["damaged"]) == 1


def test_every_damaged_sample_is_named_and_nothing_else(prepared: Path, capsys: Capture) -> None:
    dataset = Dataset.open(prepared)
    hit = []
    for chunk in (0, 1, 500, dataset.chunks - 1):
        shard = next(each for each in reversed(dataset._shards) if each.first <= chunk)
        record = shard.index.records[chunk - shard.first]
        hit.append((str(shard.file), chunk, dataset.key(chunk), int(record["offset"])))
        flip(shard.file, int(record["offset"]) + 512 + 128)  # a token, so that the key can still be read
    code, found, out, err = inspect(capsys, prepared)
    assert code == 65
    assert [(each["file"], each["sample"], each["key"], each["offset"]) for each in found["damaged"]] == hit
    assert {each["split"] for each in found["damaged"]} == {"train"}
    assert [line.count("CRC-32") for line in out.splitlines() if line.startswith("damaged: ")] == [1] * 4
    assert err.startswith(f"error: {prepared}: got '4 faults'")
    assert "damaged: 4" in Path(found["page"]).read_text()
    assert found["parts"]["train"]["chunks"] == dataset.chunks


def test_a_header_that_cannot_be_read_leaves_a_question_mark_for_its_key(prepared: Path, capsys: Capture) -> None:
    flip(prepared / "train" / "000000.tar", 3)
    found = inspect(capsys, prepared)[1]
    assert [(each["sample"], each["key"]) for each in found["damaged"]] == [(0, "?")]


def test_missing_cut_and_unindexed_shards_are_faults_and_the_others_are_still_read(prepared: Path, capsys: Capture) -> None:
    train = prepared / "train"
    whole = inspect(capsys, prepared)[1]
    (train / "000000.tar").unlink()
    os.truncate(train / "000001.tar", 10_000)
    flip(train / "000002.idx", 60)
    flip(train / "000003.tar", 700)
    code, found, _, _ = inspect(capsys, prepared)
    assert code == 65
    files = [Path(each["file"]).name for each in found["damaged"]]
    assert files == ["000000.tar", "000001.tar", "000002.tar", "000003.tar"]
    problems = [each["problem"] for each in found["damaged"]]
    assert problems[0].startswith("got 'no such file'") and problems[1].startswith("got '10000 bytes'")
    assert "samples are not there" in problems[0] and "samples are not there" in problems[1]
    assert "samples without an index" in problems[2]
    sizes = {file.name: file.stat().st_size for file in prepared.rglob("*.tar")}
    unread = sum(shard["bytes"] for shard in read_manifest(prepared)["splits"]["train"]["shards"][:3])
    assert 0 < found["verified_bytes"] - (whole["verified_bytes"] - unread + 3 * 1024) <= sizes["000001.tar"]


def test_a_token_outside_of_the_vocabulary_is_damage(prepared: Path) -> None:
    dataset = Dataset.open(prepared)
    records, size = dataset._shards[0].index.records, max(int(dataset.read(chunk).max()) for chunk in range(50))
    result = survey.check(survey.Stretch(dataset._shards[0].file, 7, records[:50]), size)
    wrong = [chunk for chunk in range(50) if dataset.read(chunk).max() >= size]
    assert [damage.sample - 7 for damage in result.damaged] == wrong
    assert result.damaged[0].problem == f"token {size} is outside of the vocabulary of {size}"


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i2", "<i4"])
def test_tokens_are_counted_however_they_are_stored(tmp_path: Path, dtype: str) -> None:
    """Signed ids are complements where words start against the vocabulary's rule; another writer's arrays are read, too."""
    ids = [3, 1, 3, 2, 7]
    stored = np.array([~each if dtype[1] == "i" and place % 2 else each for place, each in enumerate(ids)], dtype)
    data = shards.sample("a", stored) + shards.sample("b", stored[:2])
    stream = io.BytesIO()
    np.save(stream, stored.astype("<i8"))
    other = make_tar(tmp_path / "other.tar", [("c.npy", stream.getvalue())]).read_bytes()[:1024]
    (tmp_path / "x.tar").write_bytes(data + other + bytes(1024))
    result = survey.check(survey.Stretch(tmp_path / "x.tar", 0, index.build(tmp_path / "x.tar").records), 8)
    assert (result.damaged, result.occurrences.tolist()) == ([], [0, 3, 2, 5, 0, 0, 0, 2])


def test_what_lies_elsewhere_is_refused(capsys: Capture) -> None:
    assert cli.main(["inspect", "data", "https://example.org/corpus"]) == 65
    assert "what lies elsewhere is not inspected from here" in capsys.readouterr().err


def test_without_verify_nothing_is_read(prepared: Path, capsys: Capture) -> None:
    flip(prepared / "train" / "000000.tar", 700)
    code, found, out, _ = inspect(capsys, prepared, "verify=false")
    assert (code, found["verified_bytes"], list(found["parts"]["train"]["histograms"])) == (0, 0, ["Length"])
    assert "No byte was compared with anything." in out and "not verified" in Path(found["page"]).read_text()


def test_another_tokenizer_in_the_folder_is_a_fault(prepared: Path, capsys: Capture) -> None:
    file = prepared / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace("[MASK]", "[mask]"))
    code, found, _, _ = inspect(capsys, prepared)
    assert (code, [Path(each["file"]).name for each in found["damaged"]]) == (65, ["tokenizer"])


def test_a_page_that_cannot_be_written_is_a_warning_or_if_asked_for_an_error(prepared: Path, capsys: Capture) -> None:
    (prepared / "inspect.html").mkdir()
    code, found, _, err = inspect(capsys, prepared)
    assert (code, found["page"]) == (0, None)
    assert "output=FILE puts the page elsewhere" in err
    assert cli.main(["inspect", "data", str(prepared), f"output={prepared / 'manifest.json' / 'x.html'}"]) == 74
    elsewhere = prepared.parent / "pages" / "x.html"
    assert inspect(capsys, prepared, f"output={elsewhere}")[1]["page"] == str(elsewhere)


def members(first: int, samples: int) -> list[tuple[str, bytes]]:
    numbers = range(first, first + samples)
    return [(f"d/{n:05d}.{suffix}", data) for n in numbers for suffix, data in (("txt", b"x" * (100 * n)), ("cls", b"1"))]


def test_tars_of_others_are_counted_and_compared_where_they_have_an_index(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(3):
        make_tar(folder / f"{number}.tar", members(10 * number, 5 + number))
    list(foreign.build([folder / "0.tar", folder / "1.tar"]))
    sizes = [file.stat().st_size for file in sorted(folder.glob("*.tar"))]
    code, found, _, _ = inspect(capsys, folder, "processes=1")
    part = found["parts"]["tars"]
    assert (code, found["kind"]) == (0, "tars that others wrote")
    assert (part["samples"], part["tars"], part["tars_with_index"]) == (18, 3, 2)
    assert (part["members_.txt"], part["members_.cls"], part["bytes"]) == (18, 18, sum(sizes))
    assert {file.name for file in folder.iterdir() if file.suffix != ".tar"} == {"0.tar.stidx", "1.tar.stidx", "inspect.html"}
    times = (folder / "1.tar").stat()
    flip(folder / "1.tar", 1024 * 4 + 600)  # the name of a member, which no longer has the checksum of its header
    os.utime(folder / "1.tar", ns=(times.st_atime_ns, times.st_mtime_ns))
    (folder / "2.tar").write_bytes((folder / "2.tar").read_bytes()[:3000])
    code, found, _, _ = inspect(capsys, folder, "processes=2")
    assert code == 65
    cut, damaged = found["damaged"]
    assert (Path(cut["file"]).name, cut["sample"]) == ("2.tar", None)
    assert (Path(damaged["file"]).name, damaged["key"]) == ("1.tar", "d/00011")
    assert damaged["sample"] == 6  # the second sample of the second tar, after five of the first


def test_a_folder_with_neither_is_refused(tmp_path: Path, capsys: Capture) -> None:
    assert cli.main(["inspect", "data", str(tmp_path)]) == 65
    assert capsys.readouterr().err.startswith(f"error: data: got '{tmp_path}'; a folder with files that end in .tar")
