"""The index of a tar shard: spans, CRCs, and the tars that it refuses."""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path

import pytest

from scaletrain.data import index
from scaletrain.errors import CorpusError
from tests.tars import make_special, make_tar, npy_bytes


def forge(file: Path, name: bytes, size: bytes) -> Path:
    """A tar of one header with arbitrary bytes in the size field and a checksum that holds."""
    header = bytearray(name.ljust(100, b"\0") + b"0000644\0" + bytes(16) + size.ljust(12, b"\0") + bytes(376))
    header[156:157] = b"0"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    file.write_bytes(bytes(header) + bytes(1024))
    return file


def test_a_span_runs_from_the_first_header_of_a_sample_to_its_last_padding(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", [("one.txt", b"x" * 600), ("one.json", b"{}"), ("two.txt", b"")])
    records = index.build(tar).records
    assert records["offset"].tolist() == [0, 512 + 1024 + 512 + 512]
    assert records["length"].tolist() == [512 + 1024 + 512 + 512, 512]


def test_the_crc_covers_exactly_the_span(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", [("one.txt", b"x" * 600), ("two.txt", b"y")])
    data = tar.read_bytes()
    for record in index.build(tar).records:
        offset, length = int(record["offset"]), int(record["length"])
        assert int(record["crc32"]) == zlib.crc32(data[offset : offset + length])


def test_tokens_are_the_elements_of_npy_members(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", [("1.npy", npy_bytes(7)), ("2.txt", b"no array"), ("3.npy", npy_bytes(0))])
    assert index.build(tar).records["tokens"].tolist() == [7, 0, 0]
    assert index.build(tar).tokens == 7


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "gnu", "pax"])
def test_long_names_are_read_in_every_format(tmp_path: Path, form: int) -> None:
    long = "d" * 90 + "/" + "k" * 80 + ".txt"
    tar = make_tar(tmp_path / "a.tar", [(long, b"x"), ("b.txt", b"y")], form)
    data = tar.read_bytes()
    found = list(index.members(lambda at, count: data[at : at + count], len(data), "a.tar", ends=True))
    assert [member.name for member in found] == [long, "b.txt"]
    assert found[0].key == long.removesuffix(".txt")
    assert (found[0].start, found[1].start) == (0, found[0].end)


def test_a_key_ends_at_the_first_dot_of_the_base_name(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", [("v1.0/a.seg.png", b""), ("v1.0/a.txt", b""), ("v1.0/b.txt", b"")])
    assert len(index.build(tar).records) == 2


def test_directories_and_names_without_a_key_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("folder/README", tarfile.REGTYPE), ("folder/.hidden", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("folder/a.txt"))
    assert index.build(tmp_path / "a.tar").records["offset"].tolist() == [3 * 512]


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "a symbolic link"),
        ({"type": tarfile.LNKTYPE, "linkname": "good.txt"}, "a hard link"),
        ({"type": tarfile.CHRTYPE}, "a character device"),
        ({"type": tarfile.BLKTYPE}, "a block device"),
        ({"type": tarfile.FIFOTYPE}, "a FIFO"),
        ({"type": tarfile.GNUTYPE_SPARSE}, "a sparse file"),
        ({"name": "../bad.txt"}, "a name with '..'"),
        ({"name": "a/../../bad.txt"}, "a name with '..'"),
        ({"name": "/bad.txt"}, "an absolute name"),
        ({"name": "good.txt"}, "a name that came before"),
    ],
)
def test_a_member_that_is_not_a_plain_harmless_file_is_refused_by_name(
    tmp_path: Path, fields: dict[str, object], rule: str
) -> None:
    tar = make_special(tmp_path / "a.tar", **fields)
    with pytest.raises(CorpusError) as caught:
        index.build(tar)
    assert caught.value.field == str(tar)
    assert str(caught.value.value).startswith(f"{rule}, {fields.get('name', 'bad.txt')!r} at byte 512")


def test_a_sample_whose_members_lie_apart_is_refused_by_name(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", [("one.txt", b""), ("two.txt", b""), ("one.json", b"")])
    with pytest.raises(CorpusError, match=r"a key that came before, 'one.json' at byte 1024"):
        index.build(tar)


@pytest.mark.parametrize("size", [b"-0000000001", b"+0000000001", b"0000_000001", b"\xff" * 12, b"9"])
def test_a_size_that_is_not_a_plain_number_is_refused(tmp_path: Path, size: bytes) -> None:
    with pytest.raises(CorpusError, match=r"a header that cannot be read, 'bad.txt' at byte 0"):
        index.build(forge(tmp_path / "a.tar", b"bad.txt", size))


@pytest.mark.parametrize("size", [b"77777777777", b"\x80" + b"\x7f" * 11], ids=["octal", "base 256"])
def test_a_member_larger_than_its_file_is_refused(tmp_path: Path, size: bytes) -> None:
    with pytest.raises(CorpusError, match="it was cut short"):
        index.build(forge(tmp_path / "a.tar", b"bad.txt", size))


def test_an_extended_header_of_two_megabytes_is_refused_unread(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.pax_headers = {"path": "x" * (2 << 20)}
        tar.addfile(info)
    with pytest.raises(CorpusError, match="an extended header of"):
        index.build(tmp_path / "a.tar")


def test_a_pax_size_that_contradicts_the_header_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.pax_headers = {"size": "512"}
        tar.addfile(info)
    with pytest.raises(CorpusError, match="an extended header with 'size'"):
        index.build(tmp_path / "a.tar")


@pytest.mark.parametrize("keep", [512, 600, 1536, 1600, 2560], ids=lambda keep: f"{keep} bytes left")
def test_a_tar_that_was_cut_anywhere_is_refused(tmp_path: Path, keep: int) -> None:
    tar = make_tar(tmp_path / "a.tar", [("one.txt", b"x" * 600), ("two.txt", b"y")])
    tar.write_bytes(tar.read_bytes()[:keep])
    with pytest.raises(CorpusError, match="cut short"):
        index.build(tar)


def test_a_flipped_header_bit_is_refused(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", [("one.txt", b"x"), ("two.txt", b"y")])
    data = bytearray(tar.read_bytes())
    data[1024] ^= 1
    tar.write_bytes(data)
    with pytest.raises(CorpusError, match=r"a header with a wrong checksum, 'uwo.txt' at byte 1024"):
        index.build(tar)


def test_a_second_archive_behind_the_first_is_refused(tmp_path: Path) -> None:
    one, two = make_tar(tmp_path / "a.tar", [("one.txt", b"x")]), make_tar(tmp_path / "b.tar", [("two.txt", b"y")])
    one.write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(CorpusError, match="data after the end of the archive"):
        index.build(one)


def test_an_index_is_read_back_as_it_was_built(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", [("1.npy", npy_bytes(3)), ("2.npy", npy_bytes(4))])
    built = index.build(tar)
    (tmp_path / "a.idx").write_bytes(built.to_bytes())
    loaded = index.load(tmp_path / "a.idx", shard_bytes=tar.stat().st_size)
    assert (loaded.shard_bytes, loaded.tokens) == (tar.stat().st_size, 7)
    assert loaded.records.tobytes() == built.records.tobytes()


@pytest.mark.parametrize("position", [0, 8, 12, 36, 45, -1])
def test_a_changed_byte_anywhere_in_an_index_is_noticed(tmp_path: Path, position: int) -> None:
    tar = make_tar(tmp_path / "a.tar", [("1.npy", npy_bytes(3))])
    data = bytearray(index.build(tar).to_bytes())
    data[position] ^= 1
    (tmp_path / "a.idx").write_bytes(data)
    with pytest.raises(CorpusError):
        index.load(tmp_path / "a.idx")


def test_an_index_of_another_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.idx").write_bytes(index.build(make_tar(tmp_path / "a.tar", [("a.txt", b"")])).to_bytes())
    with pytest.raises(CorpusError, match=r"an index of 10240 bytes'; the shard has 99 bytes"):
        index.load(tmp_path / "a.idx", shard_bytes=99)


def test_verify_names_shard_key_offset_and_both_crcs(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", [("one.txt", b"x"), ("two.txt", b"y")])
    built = index.build(tar)
    index.verify(built, tar)
    data = bytearray(tar.read_bytes())
    data[1024 + 512] ^= 4
    tar.write_bytes(data)
    found, expected = zlib.crc32(data[1024:2048]), int(built.records[1]["crc32"])
    with pytest.raises(CorpusError) as caught:
        index.verify(built, tar)
    assert caught.value.field == str(tar)
    assert caught.value.value == f"CRC-32 {found:#010x} of sample 'two' at byte 1024"
    assert caught.value.rule == f"its index says {expected:#010x}"
