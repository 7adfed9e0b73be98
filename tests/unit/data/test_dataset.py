"""A prepared split: what it gives, and every way in which it notices that it is not what was prepared."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from scaletrain.data import dataset, npy, shards, tokenizer
from scaletrain.data.dataset import Dataset
from scaletrain.data.index import RECORD
from scaletrain.data.tokenizer import WordPieceConfig
from scaletrain.errors import CorpusError, TokenizerError

CHUNKS = [np.arange(3 + number % 5, dtype=np.uint16) + 7 * number for number in range(30)]
SHARDS = [CHUNKS[:11], CHUNKS[11:12], CHUNKS[12:]]


def write_split(folder: Path, split: str, chunks: list[list[np.ndarray]]) -> list[dict[str, object]]:
    """Write shards of these chunks; what the manifest says of them."""
    numbers, described = itertools.count(), []
    for number, content in enumerate(chunks):
        writer = shards.ShardWriter(folder, f"{split}/{number:06d}")
        for ids in content:
            data = shards.sample(f"{next(numbers):09d}-0000", ids)
            writer.add(data, np.array([(0, len(data), shards.crc(data), len(ids))], RECORD))
        described.append(
            {name: getattr(writer_done, name) for writer_done in [writer.finish()] for name in writer_done.__slots__}
        )
    return described


def write_manifest(folder: Path, splits: dict[str, list[dict[str, object]]]) -> None:
    digest = tokenizer.folder_digest(folder / "tokenizer")
    tree = {"format": 1, "max_tokens": 8, "tokenizer": {"digest": digest, "vocab_size": 300}, "splits": {}}
    for split, content in splits.items():
        totals = {name: sum(int(str(shard[name])) for shard in content) for name in ("chunks", "tokens")}
        tree["splits"][split] = {"digest": dataset.split_digest(content, digest, 8), **totals, "shards": content}  # type: ignore[index]
    shards.write_json(folder / "manifest.json", {"digest": dataset.canonical_digest(tree), **tree})


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    made = tokenizer.train(WordPieceConfig(vocab_size=256), lambda: ["a few words"], max_tokens=8)
    made.save_pretrained(folder / "tokenizer")
    write_manifest(
        folder, {"train": write_split(folder, "train", SHARDS), "validation": write_split(folder, "validation", [CHUNKS[:2]])}
    )
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def test_every_chunk_is_read_back_across_shards(pristine: Path) -> None:
    data = Dataset.open(pristine)
    assert (data.chunks, data.tokens, data.max_tokens) == (30, sum(map(len, CHUNKS)), 8)
    assert data.lengths.tolist() == [len(ids) for ids in CHUNKS]
    for chunk, expected in enumerate(CHUNKS):
        assert data.read(chunk).dtype == np.int32
        assert data.read(chunk).tolist() == expected.tolist()
        assert data.key(chunk) == f"{chunk:09d}-0000"
    data.verify()


def test_the_validation_split_is_another_data_set(pristine: Path) -> None:
    train, held_out = Dataset.open(pristine), Dataset.open(pristine, "validation")
    assert (held_out.chunks, held_out.digest != train.digest) == (2, True)


def test_a_copy_elsewhere_has_the_same_digest(pristine: Path, folder: Path) -> None:
    assert Dataset.open(folder).digest == Dataset.open(pristine).digest


@pytest.mark.parametrize("chunk", [-1, 30])
def test_there_is_no_chunk_outside(pristine: Path, chunk: int) -> None:
    with pytest.raises(IndexError, match=rf"chunk: got {chunk}; .* has chunks 0 to 29"):
        Dataset.open(pristine).read(chunk)


def test_many_threads_read_the_same_bytes_with_fewer_open_files_than_shards(
    pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "_FILES_MAX", 1)
    data, before = Dataset.open(pristine), len(os.listdir("/proc/self/fd"))
    order = [number * 7 % 30 for number in range(3000)]
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda chunk: data.read(chunk).tolist(), order))
    assert read == [CHUNKS[chunk].tolist() for chunk in order]
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_flipped_bit_names_shard_key_offset_and_both_crcs(folder: Path) -> None:
    data = Dataset.open(folder)
    offset = 3 * 1024
    flip(folder / "train/000002.tar", offset + 512 + 128)
    span = (folder / "train/000002.tar").read_bytes()[offset : offset + 1024]
    with pytest.raises(CorpusError) as caught:
        data.read(15)
    assert caught.value.field == str(folder / "train/000002.tar")
    assert caught.value.value == f"CRC-32 {zlib.crc32(span):#010x} of sample '000000015-0000' at byte {offset}"
    assert caught.value.rule.startswith("its index says 0x")
    assert data.read(14).tolist() == CHUNKS[14].tolist()
    with pytest.raises(CorpusError, match="of sample '000000015-0000'"):
        data.verify()


def test_a_shard_that_shrinks_while_it_is_open_is_noticed(folder: Path) -> None:
    data = Dataset.open(folder)
    os.truncate(folder / "train/000002.tar", 5 * 1024)
    with pytest.raises(CorpusError, match=r"0 bytes at byte 8192.*cut short"):
        data.read(20)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "got 'no such folder'"),
        (lambda folder: (folder / "manifest.json").unlink(), "got 'no manifest.json'"),
        (lambda folder: flip(folder / "manifest.json", 5), "manifest.json"),
        (lambda folder: flip(folder / "manifest.json", -70), "manifest.json"),
        (lambda folder: os.truncate(folder / "manifest.json", 100), "got 'not JSON'"),
        (lambda folder: (folder / "train/000001.tar").unlink(), r"000001.tar: got 'no such file'"),
        (lambda folder: os.truncate(folder / "train/000001.tar", 512), r"000001.tar: got '512 bytes'; the manifest says 2048"),
        (lambda folder: (folder / "train/000001.idx").unlink(), r"000001.idx: got 'no such file'"),
        (lambda folder: flip(folder / "train/000001.idx", 50), r"000001.idx: got 'other records'"),
        (lambda folder: shutil.copy(folder / "train/000000.idx", folder / "train/000001.idx"), "an index of 12288 bytes"),
    ],
    ids=[
        "folder",
        "manifest",
        "manifest byte",
        "manifest value",
        "manifest cut",
        "tar",
        "tar cut",
        "index",
        "index byte",
        "index swapped",
    ],
)
def test_a_damaged_folder_is_not_opened(folder: Path, damage: object, message: str) -> None:
    damage(folder)  # type: ignore[operator]
    with pytest.raises(CorpusError, match=message):
        Dataset.open(folder)


def test_an_index_of_a_shard_of_the_same_size_is_noticed(folder: Path) -> None:
    write_split(folder, "train", [CHUNKS[1:12]])  # 11 chunks again
    with pytest.raises(CorpusError, match=r"000000.idx: got '[0-9a-f]{64}'; the manifest says"):
        Dataset.open(folder)


def test_a_split_that_was_not_prepared_is_named(folder: Path) -> None:
    with pytest.raises(CorpusError, match="split: got 'test'; it has train, validation"):
        Dataset.open(folder, "test")


def test_an_empty_split_is_refused(folder: Path) -> None:
    write_manifest(folder, {"train": []})
    with pytest.raises(CorpusError, match="split: got 'train'; a split holds at least one chunk"):
        Dataset.open(folder)


def test_a_tokenizer_that_did_not_make_the_shards_is_refused(folder: Path) -> None:
    tree = json.loads((folder / "tokenizer/tokenizer.json").read_bytes())
    tree["model"]["vocab"]["another"] = 299
    (folder / "tokenizer/tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(TokenizerError, match=r"tokenizer: digest: got .*; the shards were made with"):
        Dataset.open(folder)


def test_a_shard_is_a_tar_that_the_standard_library_reads(pristine: Path) -> None:
    with tarfile.open(pristine / "train/000001.tar") as tar:
        (member,) = tar.getmembers()
        stream = tar.extractfile(member)
        assert stream is not None
        assert np.load(io.BytesIO(stream.read()), allow_pickle=False).tolist() == CHUNKS[11].tolist()
    assert (member.name, member.mode, member.uid, member.gid, member.mtime) == ("000000011-0000.npy", 0o644, 0, 0, 0)


@pytest.mark.parametrize("items", [0, 1, 9, 10, 126, 65536])
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_an_array_is_written_byte_for_byte_as_numpy_writes_it(tmp_path: Path, items: int, dtype: str) -> None:
    ids = np.arange(items).astype(dtype)
    np.save(tmp_path / "a.npy", ids)
    assert npy.header(items, dtype) + ids.tobytes() == (tmp_path / "a.npy").read_bytes()
    assert npy.decode((tmp_path / "a.npy").read_bytes()).tolist() == ids.tolist()


@pytest.mark.parametrize("array", [np.zeros((2, 2), "<u2"), np.zeros(2, "<f4"), np.array([None])], ids=["2-D", "float", "object"])
def test_an_array_of_anything_but_token_ids_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match="not a flat array of integers"):
        npy.decode((tmp_path / "a.npy").read_bytes())
