"""Prepared folders wherever they lie: on this machine, behind a URL, or behind a command.

Of one that lies elsewhere, what is small (manifest, tokenizer, indexes) is copied when it is opened and kept; a shard is copied
whole when a chunk of it is read first. All that is copied is checked against the manifest, so that a corpus which is changed
while a run reads it is noticed; the manifest itself is as trustworthy as the connection.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scaletrain import outside
from scaletrain.data import index, urls
from scaletrain.data.cache import Cache, CacheConfig
from scaletrain.data.dataset import Dataset, check_manifest, read_manifest
from scaletrain.data.files import Files
from scaletrain.data.plan import OrderConfig
from scaletrain.errors import CorpusError, StorageError

_OPEN_MAX = 4
"""Copies that a process has open. One that is open still takes its room on the disk when it was removed from the cache."""
_EVICTED_MAX = 20
_TRANSFERS = 8
_REMEDY = "Prepare the corpus again, with this version of scaletrain"


class Folders:
    """Opens prepared folders by their paths and URLs; the cache is made when something is fetched first."""

    def __init__(self, config: CacheConfig, *, allow_pipe: bool = False) -> None:
        self._config, self._allow_pipe = config, allow_pipe
        self._cache: Cache | None = None
        self._manifests: dict[str, tuple[Path, dict[str, Any]]] = {}

    def manifest(self, path: str) -> dict[str, Any]:
        """The manifest of a folder; of one that lies elsewhere as it was when it was first asked for."""
        return self._mirrored(path)[1] if urls.is_remote(path) else read_manifest(Path(path))

    def open(self, path: str, split: str = "train", *, tolerant: bool = False) -> Dataset:
        """One split of a folder, as `Dataset.open`. Raises ConfigError, too, for a URL that data is not read from."""
        if not urls.is_remote(path):
            return Dataset.open(Path(path), split, tolerant=tolerant)
        folder, manifest = self._mirrored(path)
        assert self._cache is not None
        return Dataset.open(folder, split, tolerant=tolerant, files=Fetched(folder, path, manifest, self._cache))

    def check_room(self, order: OrderConfig) -> None:
        """Warns where the shards that an order reads from at the same time do not fit into the cache together."""
        shards = [shard for _, manifest in self._manifests.values() for shard in manifest["splits"]["train"]["shards"]]
        if not shards:
            return
        chunks = sum(shard["chunks"] for shard in shards) / len(shards)
        share = 1.0 if order.block == 1 else min(order.window * (1 + order.block / chunks) / len(shards), 1.0)
        needed_gb = share * sum(shard["bytes"] for shard in shards) / 1e9
        if needed_gb > self._config.size_gb:
            said = f"data.order mixes chunks of about {needed_gb:.3g} GB of shards that lie elsewhere"
            remedy = f"Make room for them, or set data.order.block={chunks:.0f} (a shard) with a small data.order.window"
            warnings.warn(
                f"data.cache.size_gb: got {self._config.size_gb:g}; {said}, which are fetched again and again. {remedy}",
                stacklevel=2,
            )

    def _mirrored(self, url: str) -> tuple[Path, dict[str, Any]]:
        """The folder of this machine with everything but the shards, and its manifest."""
        if url not in self._manifests:
            urls.check(url, "data.corpora", allow_pipe=self._allow_pipe)
            self._cache = self._cache or Cache(self._config)
            self._manifests[url] = _mirror(url, self._cache)
        return self._manifests[url]


class Fetched(Files):
    """The shards of a folder that lies elsewhere. A file is asked for by the place that it would have in its mirror."""

    def __init__(self, folder: Path, url: str, manifest: Mapping[str, Any], cache: Cache) -> None:
        super().__init__(_OPEN_MAX)
        self._cache = cache
        shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
        self._wanted = {
            folder / shard["file"]: (urls.join(url, shard["file"]), int(shard["bytes"]), str(shard["sha256"])) for shard in shards
        }

    def fetch(self, file: Path) -> None:
        handle = self._held(file)
        self._cache.touch(handle.number)

    def local(self, file: Path) -> Path:
        return self._cache.fetch(*self._wanted[file])

    def close(self, file: Path) -> None:
        super().close(file)
        self._cache.doubt(*self._wanted[file])

    def _descriptor(self, file: Path) -> int:
        for _ in range(_EVICTED_MAX):
            try:
                return os.open(self.local(file), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # another process needed the room just now
                time.sleep(0.01)
        raise StorageError(
            f"{urls.shown(self._wanted[file][0])}: removed from the cache {_EVICTED_MAX} times before it could be opened. "
            "Give data.cache.size_gb room for some shards for each rank"
        )


def _mirror(url: str, cache: Cache) -> tuple[Path, dict[str, Any]]:
    name = urls.shown(urls.join(url, "manifest.json"))
    try:
        data = cache.read(urls.join(url, "manifest.json"), outside.JSON_BYTES_MAX)
        manifest = check_manifest(outside.parse_json(data), name)
    except ValueError:
        raise CorpusError(name, "not JSON", "the manifest of a prepared folder", "Check the URL") from None
    key = hashlib.sha256(url.encode() + b"\n" + hashlib.sha256(data).digest()).hexdigest()
    place = f"corpora/{key}/{urls.label(url)}"
    try:
        wanted = dict(_small(manifest))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CorpusError(name, "no sizes and digests of its files", "the manifest lists them", _REMEDY) from None
    links = {file: urls.join(url, file) for file in wanted}
    with ThreadPoolExecutor(_TRANSFERS) as threads:
        copies = [threads.submit(cache.keep, f"{place}/{file}", links[file], *wanted[file]) for file in wanted]
        for copy in copies:
            copy.result()
    return cache.put(f"{place}/manifest.json", data).parent, manifest


def _small(manifest: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Of each file but the shards and the manifest: its size and SHA-256."""
    found = {
        f"tokenizer/{name}": (int(file["bytes"]), str(file["sha256"])) for name, file in manifest["tokenizer"]["files"].items()
    }
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            name = str(Path(shard["file"]).with_suffix(".idx"))
            found[name] = index.file_bytes(int(shard["chunks"])), str(shard["index_sha256"])
    if any(size > outside.JSON_BYTES_MAX for name, (size, _) in found.items() if name.startswith("tokenizer/")):
        raise ValueError("a tokenizer is not that large")
    return found
