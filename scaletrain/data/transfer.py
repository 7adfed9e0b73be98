"""Brings one file from a URL or a command: begun again after a failure, until a deadline, and checked against its digest.

::

    refused, 5xx, cut, no byte for stall_s ──► pause, begin again ── timeout_s is over ──► StorageError
    ended early, or other bytes ────────────► begin again ── the same, several times ───► CorpusError
    not there (404) ──────────────────────────────────────────────────────────────────► CorpusError

What is wrong with the bytes is an error of the data, which a run can pass over; a server that does not answer is one of the
storage, after which the same command continues.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import random
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO, Protocol

from pydantic import Field

from scaletrain.config import redacted
from scaletrain.data import urls
from scaletrain.data.command import Command
from scaletrain.errors import ConfigError, CorpusError, ScaletrainError, StorageError

BLOCK_BYTES = 4 << 20
_BLOCKS_AHEAD = 4
_REQUEST_BYTES = 32 << 20
"""Of protocols that are asked block by block: an object store takes tens of milliseconds to begin an answer."""
_PAUSE_MAX_S = 30.0
_ENDED_EARLY_MAX, _OTHER_BYTES_MAX = 4, 2
"""Attempts after which bytes that are wrong are taken for what the source has."""
_AGAIN = {408, 425, 429}
"""HTTP statuses below 500 after which the same request may succeed (RFC 9110; RFC 6585; RFC 8470)."""
_REMEDY = "Give the source its file back, or prepare the corpus again"


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferConfig:
    """When a transfer is given up."""

    stall_s: Annotated[float, Field(gt=0)] = 30.0
    """Longest wait for the next bytes; after it the transfer is begun again."""
    pause_s: Annotated[float, Field(ge=0)] = 0.5
    """Pause before a second attempt; it doubles each time, to 30 s at most, and up to half of it is added at random."""
    timeout_s: Annotated[float, Field(gt=0)] = 240.0
    """Longest time for one file, with all attempts and with the wait for a process that fetches it already. Below
    `data.loader.timeout_s`, so that a server that is away is named."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file elsewhere, and what its bytes are known to be."""

    url: str
    bytes: int
    """Its size; where there is no ``sha256``, the largest that is taken."""
    sha256: str | None = None


class Source(Protocol):
    """What is read from: a file of an fsspec file system, or a command."""

    def read(self, count: int, /) -> bytes: ...

    def close(self) -> None: ...


class _AgainError(Exception):
    """This attempt failed, the next one need not."""


class _LateError(_AgainError):
    """The deadline came in the middle of it, which says less than what went wrong before."""


class _WrongError(Exception):
    """The bytes that came are not those that were wanted."""

    def __init__(self, found: str, attempts_max: int) -> None:
        self.found, self.attempts_max = found, attempts_max
        super().__init__(found)


def fetch(wanted: Wanted, stream: BinaryIO, config: TransferConfig, deadline: float | None = None) -> None:
    """Writes the file from the start of ``stream``. ``deadline``: on the monotonic clock; default ``timeout_s`` from now.

    Raises StorageError when the deadline has passed or access is refused, CorpusError for a file that is not there or has other
    bytes, ConfigError for a driver or program that is not there, and OSError where ``stream`` cannot be written.
    """
    began = time.monotonic()
    deadline = began + config.timeout_s if deadline is None else deadline
    name, attempts, wrong = urls.shown(wanted.url), 0, 0
    said: Exception | None = None
    while True:
        attempts += 1
        try:
            _attempt(wanted, stream, config.stall_s, deadline)
            return
        except FileNotFoundError:
            raise CorpusError(name, "no such file", "the manifest lists it", _REMEDY) from None
        except _WrongError as failure:
            wrong += 1
            if wrong >= failure.attempts_max:
                rule = f"the manifest says {wanted.bytes} bytes with SHA-256 {wanted.sha256}"
                raise CorpusError(name, failure.found, rule, _REMEDY) from None
            said = failure
        except _LateError as failure:
            said = said or failure
        except _AgainError as failure:
            said = failure
        pause = min(config.pause_s * 2 ** (attempts - 1), _PAUSE_MAX_S) * random.uniform(1.0, 1.5)
        if time.monotonic() + pause >= deadline:
            after = f"{attempts} attempts in {time.monotonic() - began:.1f} s (data.cache.timeout_s is {config.timeout_s:g})"
            raise StorageError(f"{name}: {said}; {after}. Check the server and the network; the same command continues")
        time.sleep(pause)


def _attempt(wanted: Wanted, stream: BinaryIO, stall_s: float, deadline: float) -> None:
    stream.seek(0)
    digest, count = hashlib.sha256(), 0
    with contextlib.closing(_blocks(wanted, stall_s, deadline)) as blocks:
        for block in blocks:
            count += len(block)
            if count > wanted.bytes:
                raise _WrongError(f"more than {wanted.bytes} bytes", _OTHER_BYTES_MAX)
            digest.update(block)
            stream.write(block)
    stream.truncate()
    if wanted.sha256 is None:
        return
    if count < wanted.bytes:
        raise _WrongError(f"it ended after {count} bytes", _ENDED_EARLY_MAX)
    if digest.hexdigest() != wanted.sha256:
        raise _WrongError(f"SHA-256 {digest.hexdigest()}", _OTHER_BYTES_MAX)


def _blocks(wanted: Wanted, stall_s: float, deadline: float) -> Generator[bytes, None, None]:
    """The file's bytes as one attempt brings them. Raises FileNotFoundError and _AgainError."""
    pump = _Pump(lambda: _opened(wanted, stall_s))
    pump.start()
    try:
        while True:
            limit_s = min(stall_s, deadline - time.monotonic())
            try:
                item = pump.blocks.get(timeout=max(limit_s, 0.001))
            except queue.Empty:
                raise (_AgainError if limit_s >= stall_s else _LateError)(f"no byte for {limit_s:.1f} s") from None
            if limit_s <= 0:  # bytes that trickle in never stall
                raise _LateError("it was not whole in time")
            if isinstance(item, BaseException):
                raise _judged(item, wanted.url) from None
            if not item:
                return
            yield item
    finally:
        pump.abandon()


class _Pump(threading.Thread):
    """Reads a source ahead. A thread of its own, since no driver can be relied on to come back: it is left behind then."""

    def __init__(self, opened: Callable[[], Source]) -> None:
        super().__init__(name="transfer", daemon=True)
        self.blocks: queue.Queue[bytes | BaseException] = queue.Queue(_BLOCKS_AHEAD)
        self._opened = opened
        self._source: Source | None = None
        self._abandoned = threading.Event()

    def run(self) -> None:
        try:
            source = self._opened()
            self._source = source
            if self._abandoned.is_set():
                self.abandon()
            while block := source.read(BLOCK_BYTES):
                self._put(block)
                if self._abandoned.is_set():
                    break
            source.close()
            self._put(b"")
        except BaseException as error:  # whoever waits for the blocks gets it
            self._put(error)

    def abandon(self) -> None:
        """Nobody waits any longer."""
        self._abandoned.set()
        if isinstance(self._source, Command):
            self._source.kill()

    def _put(self, item: bytes | BaseException) -> None:
        while not self._abandoned.is_set():
            try:
                self.blocks.put(item, timeout=0.2)
                return
            except queue.Full:
                pass


def _opened(wanted: Wanted, stall_s: float) -> Source:
    if wanted.url.startswith(urls.PIPE):
        return Command(wanted.url)
    import fsspec  # only where data lies elsewhere

    protocol, options = wanted.url.partition("://")[0], dict[str, Any]()
    if protocol in ("http", "https"):
        import aiohttp

        # aiohttp's own limit, five minutes for a whole file, would cut large shards. trust_env: proxies, and ~/.netrc.
        limit = aiohttp.ClientTimeout(total=None, sock_connect=stall_s, sock_read=stall_s)
        options["client_kwargs"] = {"timeout": limit, "trust_env": True, "read_bufsize": BLOCK_BYTES}
        # One request that streams, instead of one to ask for the size and one for each block.
        how: dict[str, Any] = {"block_size": 0, "size": wanted.bytes}
    else:
        how = {"block_size": _REQUEST_BYTES, "cache_type": "readahead"}
    system, path = fsspec.url_to_fs(wanted.url, **options)
    source: Source = system.open(path, "rb", **how)
    return source


def _judged(error: BaseException, url: str) -> Exception:
    """What a driver's error means. Its text may hold the addresses of redirects, with their secrets."""
    name, status = urls.shown(url), getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError()
    if isinstance(error, ScaletrainError):
        return error
    if isinstance(error, ImportError):
        package = urls.PACKAGES[url.partition("://")[0]]
        rule = f"it is read through the package {package}, which is not installed"
        return ConfigError("data.corpora", name, rule, f"pip install {package}, or 'scaletrain[remote]' for http and https")
    if isinstance(error, PermissionError) or status in (401, 403, 407):
        return StorageError(f"{name}: access was refused ({status or 'by the driver'}). Check the credentials of this user")
    if isinstance(status, int):
        if status < 500 and status not in _AGAIN:
            return StorageError(f"{name}: the server answered with status {status}. Check the URL")
        return _AgainError(f"the server answered with status {status}")
    return _AgainError(f"{type(error).__name__}: {redacted(str(error))}" if str(error) else type(error).__name__)
