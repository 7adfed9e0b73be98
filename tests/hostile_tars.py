"""Tars that somebody made to do harm, or that a disk did: mutations of good ones in every format, from a seed."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable

BLOCK = 512
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def make(seed: int) -> tuple[str, bytes]:
    """A case: what was done, and the bytes of the tar."""
    draw = random.Random(seed)
    name, mutate = draw.choice(MUTATIONS)
    data = bytearray(_good(draw, extra=_SPECIAL.get(name)))
    mutate(data, draw)
    return name, bytes(data)


def _good(draw: random.Random, extra: object = None) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=draw.choice(FORMATS[1:] if extra else FORMATS)) as tar:
        for number in range(draw.randint(1, 4)):
            long = draw.random() < 0.3
            key = f"{'d' * draw.randint(60, 140)}/{'k' * draw.randint(20, 90)}{number}" if long else f"s{number}"
            for suffix in draw.sample(("txt", "json", "npy", "seg.png"), draw.randint(1, 3)):
                payload = draw.randbytes(draw.choice((0, 1, 511, 512, 513, 2000)))
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
        if callable(extra):
            extra(tar, draw)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------- members that are not plain files


def _member(**fields: object) -> Callable[[tarfile.TarFile, random.Random], None]:
    def add(tar: tarfile.TarFile, draw: random.Random) -> None:
        info = tarfile.TarInfo("evil.txt")
        for name, value in fields.items():
            setattr(info, name, value)
        tar.addfile(info, io.BytesIO(bytes(info.size)))

    return add


_SPECIAL: dict[str, Callable[[tarfile.TarFile, random.Random], None]] = {
    "a symbolic link": _member(type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": _member(type=tarfile.LNKTYPE, linkname="s0.txt"),
    "a device": _member(type=tarfile.CHRTYPE),
    "a FIFO": _member(type=tarfile.FIFOTYPE),
    "upwards": _member(name="../../evil.txt"),
    "upwards in the middle": _member(name="a/../../evil.txt"),
    "an absolute name": _member(name="/etc/evil.txt"),
    "a name with a newline": _member(name="evil\nname.txt"),
    "a duplicate": _member(name="s0.txt", size=3),
    "a key that comes back": lambda tar, draw: [_member(name=name)(tar, draw) for name in ("x.a", "y.a", "x.b")] and None,
    "a name of only dots": _member(name="..."),
    "a very long name": _member(name="n" * 5000 + ".txt"),
    "a PAX bomb": _member(pax_headers={"comment": "x" * (1 << 21)}, name="p" * 120 + ".txt"),
    "a PAX size": _member(pax_headers={"size": "99999999999"}, name="p" * 120 + ".txt"),
    "a sparse file": _member(pax_headers={"GNU.sparse.major": "1", "GNU.sparse.name": "../x"}),
    "a tar in a tar": lambda tar, draw: _nested(tar, draw),
}


def _nested(tar: tarfile.TarFile, draw: random.Random) -> None:
    payload = _good(draw)
    info = tarfile.TarInfo("inner.tar")
    info.size = len(payload)
    tar.addfile(info, io.BytesIO(payload))


# --------------------------------------------------------------------------------------------------------- mutations of bytes


def _headers(data: bytearray) -> list[int]:
    return [at for at in range(0, len(data) - BLOCK + 1, BLOCK) if data[at + 257 : at + 262] == b"ustar"]


def _seal(data: bytearray, at: int) -> None:
    """Makes the checksum of a header hold."""
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = f"{sum(data[at : at + BLOCK]):06o}\0 ".encode()


def _flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.randint(1, 4)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _flip_sealed(data: bytearray, draw: random.Random) -> None:
    """A header with other bits and a checksum that holds: what an attacker would write."""
    at = draw.choice(_headers(data))
    for _ in range(draw.randint(1, 6)):
        data[at + draw.randrange(BLOCK)] ^= 1 << draw.randrange(8)
    _seal(data, at)


def _size(data: bytearray, draw: random.Random) -> None:
    at = draw.choice(_headers(data))
    sizes = (b"77777777777\0", b"-0000000001\0", b"0x000000010\0", b"1_000000000\0", b"\x80" + b"\xff" * 11, b"\xff" * 12,
             b"\x80" + bytes(10) + b"\x01", b"            ", b"9999999999\0\0", b"\0" * 12, b"00000001000\0")  # fmt: skip
    data[at + 124 : at + 136] = draw.choice(sizes)
    _seal(data, at)


def _kind(data: bytearray, draw: random.Random) -> None:
    at = draw.choice(_headers(data))
    data[at + 156] = draw.choice(b"0123456789gxLKSMVN\0\x7f\xffA")
    _seal(data, at)


def _truncate(data: bytearray, draw: random.Random) -> None:
    del data[draw.choice((draw.randrange(len(data)), draw.randrange(len(data) // BLOCK) * BLOCK)) :]


def _zero(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data) // BLOCK) * BLOCK
    count = draw.choice((1, 1, 2, 5)) * BLOCK
    data[at : at + count] = bytes(min(count, len(data) - at))


def _join(data: bytearray, draw: random.Random) -> None:
    data += _good(draw)


def _swap(data: bytearray, draw: random.Random) -> None:
    """Two blocks change places."""
    one, two = (draw.randrange(len(data) // BLOCK) * BLOCK for _ in range(2))
    data[one : one + BLOCK], data[two : two + BLOCK] = data[two : two + BLOCK], data[one : one + BLOCK]


def _noise(data: bytearray, draw: random.Random) -> None:
    data[:] = draw.randbytes(draw.choice((0, 1, 511, 512, 10_000)))


def _name(data: bytearray, draw: random.Random) -> None:
    at = draw.choice(_headers(data))
    names = (b"\xff\xfe.txt", b"a\0b.txt", b"", b"/", b".", b"..", b"\xe2\x80\xaetxt.a", b"a" * 100, b"C:\\x.txt", b"./x.txt")
    data[at : at + 100] = draw.choice(names).ljust(100, b"\0")
    _seal(data, at)


def _records(data: bytearray, draw: random.Random) -> None:
    """A PAX header of nonsense before the first member, or many long names in a row."""
    body = draw.choice((b"12 path=../x\n", b"999999 path=a\n", b"-5 path=a\n", b"0 =\n", b"18 path=" + b"\xff" * 9 + b"\n",
                        b"7 a\n", b"13 size=-12\n" + b"\0", b"25 GNU.sparse.map=0,9999\n", b"\0" * 600,
                        b"11 path=\0\0\n", b"5 a=\n" * 30_000))  # fmt: skip
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    header[156:157] = draw.choice((b"x", b"g", b"L", b"K"))
    header[124:136] = f"{len(body):011o}\0".encode()
    _seal(header, 0)
    front = (bytes(header) + body.ljust(-(-len(body) // BLOCK) * BLOCK, b"\0")) * (
        draw.choice((1, 1, 2, 300)) if len(body) < 1000 else 1
    )
    data[:0] = front


MUTATIONS: list[tuple[str, Callable[[bytearray, random.Random], None]]] = [
    ("nothing", lambda data, draw: None),
    ("flipped bits", _flip),
    ("a changed header whose checksum holds", _flip_sealed),
    ("another size", _size),
    ("another kind", _kind),
    ("another name", _name),
    ("cut", _truncate),
    ("zero blocks", _zero),
    ("joined archives", _join),
    ("swapped blocks", _swap),
    ("noise", _noise),
    ("extended headers", _records),
    *[(name, lambda data, draw: None) for name in _SPECIAL],
]
