"""Copies of shards that lie elsewhere: whole and verified or not there, shared by processes, and bounded."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scaletrain.data import cache as caches
from scaletrain.data.cache import Cache, CacheConfig
from scaletrain.data.transfer import TransferConfig
from scaletrain.errors import ConfigError, CorpusError, StorageError
from tests import web
from tests.web import Site

SIZE = 99_968
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "served" / "train").mkdir(parents=True)
    for number in range(6):
        data = hashlib.sha256(bytes([number])).digest() * (SIZE // 32)
        (tmp_path / "served" / "train" / f"{number}.tar").write_bytes(data)
    with web.serving(tmp_path / "served") as site:
        yield site


def made(tmp_path: Path, shards: float = 100, **transfer: float) -> Cache:
    limits = {"stall_s": 1.0, "pause_s": 0.01, "timeout_s": 10.0, **transfer}
    return Cache(CacheConfig(folder=tmp_path / "cache", size_gb=shards * SIZE / 1e9, transfer=TransferConfig(**limits)))


def wanted(site: Site, number: int) -> tuple[str, int, str]:
    data = (site.folder / "train" / f"{number}.tar").read_bytes()
    return f"{site.url}/train/{number}.tar", len(data), hashlib.sha256(data).hexdigest()


def held(cache: Cache) -> list[Path]:
    return sorted(path for path in (cache.folder / "shards").iterdir() if path.name != ".lock")


def source(site: Site, number: int) -> bytes:
    return (site.folder / "train" / f"{number}.tar").read_bytes()


def test_a_shard_is_fetched_once_and_is_what_the_source_has(site: Site, tmp_path: Path) -> None:
    for cache in (made(tmp_path), made(tmp_path)):
        for _ in range(3):
            assert cache.fetch(*wanted(site, 0)).read_bytes() == source(site, 0)
    assert site.requests == {"train/0.tar": 1}
    assert len(held(cache)) == 1 and held(cache)[0].stat().st_mode & 0o077 == 0


def test_shards_of_one_name_at_two_places_are_two(site: Site, tmp_path: Path) -> None:
    other = site.folder / "other"
    other.mkdir()
    (other / "0.tar").write_bytes(b"x" * SIZE)
    cache = made(tmp_path)
    first = cache.fetch(*wanted(site, 0))
    second = cache.fetch(f"{site.url}/other/0.tar", SIZE, hashlib.sha256(b"x" * SIZE).hexdigest())
    assert first.read_bytes() == source(site, 0) and second.read_bytes() == b"x" * SIZE


@pytest.mark.parametrize(
    "faults",
    [(web.status(503), web.status(500), web.status(429)), (web.cut, web.cut), (web.short,), (web.stalled(1.5),), (web.changed,)],
    ids=["5xx", "cut", "short", "stalled", "changed"],
)
def test_a_transfer_that_fails_is_begun_again(site: Site, tmp_path: Path, faults: tuple[web.Fault, ...]) -> None:
    site.misbehave("train/1.tar", *faults)
    cache = made(tmp_path, stall_s=0.3)
    assert cache.fetch(*wanted(site, 1)).read_bytes() == source(site, 1)
    assert site.requests["train/1.tar"] == len(faults) + 1
    assert len(held(cache)) == 1


def test_a_server_that_does_not_answer_is_given_up_at_the_deadline(site: Site, tmp_path: Path) -> None:
    for faults in ([web.status(503)] * 1000, [web.stalled(60.0)] * 20, [web.trickled(0.1)]):
        site.misbehave("train/1.tar", *faults)
        cache, began = made(tmp_path, stall_s=0.3, timeout_s=1.0), time.monotonic()
        with pytest.raises(StorageError, match=r"/train/1\.tar: .*attempts? in .*timeout_s is 1\)"):
            cache.fetch(*wanted(site, 1))
        assert time.monotonic() - began < 6.0
        assert held(cache) == []
        site._faults.clear()


def test_what_went_wrong_is_said_although_the_deadline_cut_the_last_attempt(site: Site, tmp_path: Path) -> None:
    site.misbehave("train/1.tar", web.status(503), web.stalled(60.0))
    with pytest.raises(StorageError, match="answered with status 503; 2 attempts"):
        made(tmp_path, stall_s=30.0, timeout_s=1.0).fetch(*wanted(site, 1))


def test_nobody_listens(tmp_path: Path) -> None:
    cache = made(tmp_path, timeout_s=0.5)
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9"):
        cache.fetch("http://127.0.0.1:9/0.tar", 5, "0" * 64)


def test_other_bytes_are_fetched_once_more_and_then_an_error_that_says_both_digests(site: Site, tmp_path: Path) -> None:
    site.misbehave("train/2.tar", *[web.changed] * 10)
    cache = made(tmp_path)
    url, size, digest = wanted(site, 2)
    found = hashlib.sha256(source(site, 2)[:-1] + bytes([source(site, 2)[-1] ^ 1])).hexdigest()
    for _ in range(3):  # the second and third are answered from memory
        with pytest.raises(CorpusError) as caught:
            cache.fetch(url, size, digest)
        assert url in str(caught.value) and digest in str(caught.value) and found in str(caught.value)
    assert site.requests["train/2.tar"] == 2 and held(cache) == []


@pytest.mark.parametrize(("fault", "said"), [(web.endless, "more than 99968 bytes"), (web.short, "ended after 49984 bytes")])
def test_another_length_is_an_error(site: Site, tmp_path: Path, fault: web.Fault, said: str) -> None:
    site.misbehave("train/2.tar", *[fault] * 10)
    url, _, digest = wanted(site, 2)
    with pytest.raises(CorpusError, match=said):
        made(tmp_path).fetch(url, SIZE, digest)


def test_a_shard_that_is_not_there_is_not_asked_for_again(site: Site, tmp_path: Path) -> None:
    cache = made(tmp_path)
    for _ in range(2):
        with pytest.raises(CorpusError, match="no such file"):
            cache.fetch(f"{site.url}/train/9.tar", SIZE, "0" * 64)
    assert site.requests["train/9.tar"] == 1


@pytest.mark.parametrize(("status", "said"), [(403, "access was refused"), (400, "status 400")])
def test_a_refusal_is_not_asked_again(site: Site, tmp_path: Path, status: int, said: str) -> None:
    site.misbehave("train/1.tar", *[web.status(status)] * 5)
    with pytest.raises(StorageError, match=said):
        made(tmp_path).fetch(*wanted(site, 1))
    assert site.requests["train/1.tar"] == 1


PROGRAM = """
import sys
from pathlib import Path
from scaletrain.data.cache import Cache, CacheConfig
from scaletrain.data.transfer import TransferConfig

folder, size_gb, served, *shards = sys.argv[1:]
cache = Cache(CacheConfig(folder=Path(folder), size_gb=float(size_gb), transfer=TransferConfig(stall_s=30.0, timeout_s=60.0)))
print("ready", flush=True)
for shard in shards:
    number, size, digest = shard.split(",")
    print(cache.fetch(f"{served}/train/{number}.tar", int(size), digest).name, flush=True)
"""


def process(cache: Cache, site: Site, numbers: list[int], shards: float = 100) -> subprocess.Popen[str]:
    """Another process that fetches these shards into the same cache."""
    described = [f"{number},{SIZE},{wanted(site, number)[2]}" for number in numbers]
    command = [sys.executable, "-c", PROGRAM, str(cache.folder), str(shards * SIZE / 1e9), site.url, *described]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert started.stdout is not None and started.stdout.readline() == "ready\n"
    return started


def wait_for(condition: object, limit_s: float = 10.0) -> None:
    until = time.monotonic() + limit_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.01)


def test_processes_and_threads_that_want_a_shard_fetch_it_once(site: Site, tmp_path: Path) -> None:
    for number in range(4):
        site.misbehave(f"train/{number}.tar", web.stalled(0.2))
    cache = made(tmp_path)
    others = [process(cache, site, order) for order in ([0, 1, 2, 3], [3, 2, 1, 0])]
    threads = [threading.Thread(target=cache.fetch, args=wanted(site, number)) for number in (2, 0, 3, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for other in others:
        assert other.wait(30) == 0
    assert dict(site.requests) == {f"train/{number}.tar": 1 for number in range(4)}
    assert len(held(cache)) == 4


def test_a_process_that_is_killed_in_a_transfer_leaves_nothing_that_is_in_the_way(site: Site, tmp_path: Path) -> None:
    site.misbehave("train/0.tar", web.stalled(60.0))
    cache = made(tmp_path, shards=2)
    other = process(cache, site, [0], shards=2)
    wait_for(lambda: site.requests["train/0.tar"] == 1)
    waiting = threading.Thread(target=cache.fetch, args=wanted(site, 0))
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive()  # for the one that has it
    other.send_signal(signal.SIGKILL)
    other.wait()
    waiting.join(5)
    assert not waiting.is_alive()
    assert cache.fetch(*wanted(site, 0)).read_bytes() == source(site, 0)
    assert site.requests["train/0.tar"] == 2 and len(held(cache)) == 1


def test_what_a_killed_process_has_left_is_swept_and_takes_no_room(site: Site, tmp_path: Path) -> None:
    site.misbehave("train/0.tar", web.stalled(60.0))
    cache = made(tmp_path, shards=2)
    other = process(cache, site, [0], shards=2)
    wait_for(lambda: site.requests["train/0.tar"] == 1)
    other.kill()
    other.wait()
    assert [(path.suffix, path.stat().st_size) for path in held(cache)] == [(".part", SIZE)]
    first, second = cache.fetch(*wanted(site, 1)), cache.fetch(*wanted(site, 2))
    assert held(cache) == sorted([first, second])


def test_one_that_waits_gives_up_at_its_deadline_and_says_for_what(site: Site, tmp_path: Path) -> None:
    site.misbehave("train/0.tar", web.stalled(60.0))
    other = process(made(tmp_path), site, [0])
    wait_for(lambda: site.requests["train/0.tar"] == 1)
    try:
        with pytest.raises(StorageError, match=r"train/0\.tar: another process or thread"):
            made(tmp_path, timeout_s=0.3).fetch(*wanted(site, 0))
    finally:
        other.kill()
        other.wait()


def test_the_shard_that_was_used_longest_ago_goes_first(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "_TOUCH_S", -1.0)
    cache = made(tmp_path, shards=3)
    zero, one, two = (cache.fetch(*wanted(site, number)) for number in (0, 1, 2))
    cache.fetch(*wanted(site, 0))
    with one.open("rb") as reader:
        three = cache.fetch(*wanted(site, 3))
        assert held(cache) == sorted([zero, two, three])
        assert reader.read() == source(site, 1)  # who reads it is not harmed
    cache.fetch(*wanted(site, 1))
    assert two not in held(cache) and len(held(cache)) == 3
    assert site.requests["train/1.tar"] == 2


def test_parts_that_are_being_made_count(site: Site, tmp_path: Path) -> None:
    site.misbehave("train/0.tar", web.stalled(0.5))
    cache = made(tmp_path, shards=1)
    other = process(cache, site, [0], shards=1)
    wait_for(lambda: site.requests["train/0.tar"] == 1)
    began = time.monotonic()
    cache.fetch(*wanted(site, 1))
    assert time.monotonic() - began > 0.3 and other.wait(30) == 0
    assert len(held(cache)) == 1


def test_a_cap_below_one_shard_is_an_error(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache\.size_gb"):
        made(tmp_path, shards=0.5).fetch(*wanted(site, 0))
    assert site.requests.total() == 0


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_copy_is_dropped_and_fetched_again(site: Site, tmp_path: Path, damage: str) -> None:
    copy = made(tmp_path).fetch(*wanted(site, 0))
    if damage == "cut":
        os.truncate(copy, SIZE // 2)
    else:
        with copy.open("r+b") as stream:
            stream.write(b"\0")
    cache = made(tmp_path)
    with pytest.warns(UserWarning, match=r"cached copy of http.*/train/0\.tar was damaged"):
        assert cache.fetch(*wanted(site, 0)).read_bytes() == source(site, 0)
    assert site.requests["train/0.tar"] == 2


def test_a_copy_that_is_doubted_is_verified_again(site: Site, tmp_path: Path) -> None:
    cache = made(tmp_path)
    copy = cache.fetch(*wanted(site, 0))
    state = copy.stat()
    with copy.open("r+b") as stream:
        stream.write(b"\0")
    os.utime(copy, ns=(state.st_atime_ns, state.st_mtime_ns))  # as a disk does it that loses a bit
    assert cache.fetch(*wanted(site, 0)).read_bytes() != source(site, 0)
    cache.doubt(*wanted(site, 0))
    with pytest.warns(UserWarning, match="damaged"):
        assert cache.fetch(*wanted(site, 0)).read_bytes() == source(site, 0)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_is_full_or_fails_is_said_and_nothing_stays(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    cache = made(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(StorageError, match=r"data\.cache\.folder"):
            cache.fetch(*wanted(site, 0))
    assert held(cache) == []
    assert cache.fetch(*wanted(site, 0)).read_bytes() == source(site, 0)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError, match=r"data\.cache\.folder"):
        made(tmp_path)


@pytest.mark.parametrize("then", ["nobody listens", "503"])
def test_the_address_of_a_redirect_is_not_repeated(site: Site, tmp_path: Path, then: str) -> None:
    to = "http://127.0.0.1:9/a" if then == "nobody listens" else f"{site.url}/train/2.tar"
    site.misbehave("train/1.tar", *[web.redirect(f"{to}?signature=hunter2")] * 1000)
    site.misbehave("train/2.tar", *[web.status(503)] * 1000)
    with pytest.raises(StorageError, match=r"train/1\.tar") as caught:
        made(tmp_path, timeout_s=0.3).fetch(*wanted(site, 1))
    assert "hunter2" not in str(caught.value) and caught.value.__cause__ is None


def test_a_password_is_taken_from_netrc(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.misbehave("train/1.tar", *[web.behind_password("reader", "hunter2")] * 2)
    with pytest.raises(StorageError, match="access was refused"):
        made(tmp_path).fetch(*wanted(site, 1))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login reader password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert made(tmp_path).fetch(*wanted(site, 1)).read_bytes() == source(site, 1)


def test_other_protocols_go_through_their_drivers(tmp_path: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/corpus/0.tar", b"y" * SIZE)
    copy = made(tmp_path).fetch("memory://corpus/0.tar", SIZE, hashlib.sha256(b"y" * SIZE).hexdigest())
    assert copy.read_bytes() == b"y" * SIZE
    with pytest.raises(CorpusError, match="no such file"):
        made(tmp_path).fetch("memory://corpus/1.tar", SIZE, "0" * 64)


def test_a_driver_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pip install s3fs"):
        made(tmp_path).fetch("s3://bucket/0.tar", SIZE, "0" * 64)
