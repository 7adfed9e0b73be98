"""A file that somebody else put there: whatever is read, a pickle in its place is refused or passed over, and never run.

The canary is a pickle that makes a folder when it is loaded. Beside it: names and links that lead out of a folder, lists and
values without end, configurations that name code.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scaletrain import checkpoint, config, dist, lease, outside
from scaletrain.commit.manifest import write as write_manifest
from scaletrain.config import decode
from scaletrain.continual import sealed
from scaletrain.continual.memory import load_memory, save_memory
from scaletrain.continual.store import Store
from scaletrain.data import index, labelled, npy
from scaletrain.data.dataset import Dataset, canonical_digest, split_digest
from scaletrain.data.freeze import freeze, frozen_digest, thaw
from scaletrain.data.journal import Journal
from scaletrain.data.labelled import LabelledConfig
from scaletrain.data.sources.jsonl import JsonlConfig
from scaletrain.data.sources.webdataset import WebdatasetConfig
from scaletrain.data.tokenizer import Vocabulary
from scaletrain.errors import CheckpointError, ConfigError, CorpusError, InputError, ModelError, TokenizerError
from scaletrain.launcher.outcome import Record, recorded
from scaletrain.model import ClassifierConfig, start
from scaletrain.model.classifier import Block, grow
from scaletrain.model.config import load_tokenizer
from scaletrain.model.folder import read_model, write_model
from scaletrain.model.network import hf_tree
from scaletrain.recipes.records import read_run
from scaletrain.train.metrics import drop_later_lines, read_jsonl
from tests import streams, tars, tiny, toy

VERSION = "0001-fruit"


class Canary:
    """Makes a folder when its pickle is loaded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder),)


def _torch(canary: Canary) -> bytes:
    stream = io.BytesIO()
    torch.save(canary, stream)
    return stream.getvalue()


def _object_array(canary: Canary) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([canary], object), allow_pickle=True)
    return stream.getvalue()


PICKLES: dict[str, Callable[[Canary], bytes]] = {
    "binary": pickle.dumps,
    "text": lambda canary: pickle.dumps(canary, protocol=0),
    "torch": _torch,
    "numpy": _object_array,
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything that scaletrain reads."""
    root = tmp_path_factory.mktemp("pristine")
    tiny.corpus(root)
    engine = toy.make("local")
    for step in (1, 2):
        list(toy.steps(engine, step - 1, step))
        progress = checkpoint.Progress(step, {"phase": 0, "samples": step}, {})
        checkpoint.save(root / "run" / "checkpoints", engine, progress, keep=2)
    dist.stop()
    (root / "run" / "exit.json").write_text('{"code": 0, "step": 2, "reason": "done"}')
    (root / "run" / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "loss": 1.0}\n')
    (root / "run" / "config.yaml").write_text("steps: 2\n")
    encoder = streams.encoder(root / "encoder")
    _model(encoder, root / "model")
    task = decode(LabelledConfig, streams.task(root / "rows", "fruit")["data"])
    freeze(labelled.read(task), root / "task")
    store = Store(root / "lineage")
    with store.hold():
        partial = store.partial_version(VERSION)
        save_memory(partial, [])
        (partial / "evaluation.json").write_text("{}")
        store.commit_version(VERSION)
        store.publish(VERSION, task="fruit")
    Journal.open(_made(root / "journal"), {}).save()
    return root


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _model(encoder: Path, folder: Path) -> None:
    classifier = start(ClassifierConfig(start=str(encoder))).classifier
    grow(classifier, Block("fruit", ("apple", "pear")), seed=0)
    write_model(
        folder,
        hf_config=hf_tree(classifier.encoder),
        head=classifier.head,
        state=classifier.state_dict(),
        tokenizer_folder=encoder,
        facts={},
    )


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Canary]:
    """Fails the test where it was loaded."""
    folder = tmp_path / "canary"
    yield Canary(folder)
    assert not folder.exists(), "a pickle was loaded"


def test_the_canary_sings(tmp_path: Path) -> None:
    """So that its silence means something."""
    for number, (name, make) in enumerate(PICKLES.items()):
        folder = tmp_path / name
        stream = io.BytesIO(make(Canary(folder)))
        loaders: list[Callable[[], object]] = [
            lambda stream=stream: pickle.load(stream),  # type: ignore[misc]
            lambda stream=stream: pickle.load(stream),  # type: ignore[misc]
            lambda stream=stream: torch.load(stream, weights_only=False),  # type: ignore[misc]
            lambda stream=stream: np.load(stream, allow_pickle=True),  # type: ignore[misc]
        ]
        loaders[number]()
        assert folder.is_dir(), name


# ------------------------------------------------------------------------------------------------------- every kind of file


@dataclass(frozen=True)
class Kind:
    """A file below ``root``, what reads it, and what that says: an error, or the value that comes of passing the file over."""

    file: str
    reads: Callable[[Path], object]
    said: object


def _newest(root: Path) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = checkpoint.newest(root / "run" / "checkpoints")
    assert found is not None
    checkpoint.weights(found)
    return found.progress.step


def _published(root: Path) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Store(root / "lineage").published()


def _rows(root: Path, suffix: str) -> object:
    return labelled.read(
        decode(LabelledConfig, {"train": [str(root / f"table.{suffix}")], "columns": {"text": "a", "label": "b"}})
    )


_LAST = "run/checkpoints/step-00000002"
_IN_VERSION = f"lineage/versions/{VERSION}"
KINDS = [
    Kind(f"{_LAST}/state-00000-of-00001.safetensors", _newest, 1),
    Kind(f"{_LAST}/MANIFEST.json", _newest, 1),
    Kind("run/checkpoints/latest", _newest, 2),
    Kind("run/exit.json", lambda root: recorded(Record(root / "run" / "exit.json", None, 0)), None),
    Kind("run/exit.json", lambda root: read_run(root / "run", now=0.0).ending, None),
    Kind("run/lease-00000001.json", lambda root: getattr(lease.newest(root / "run"), "holder", 0), None),
    Kind(
        "run/metrics.jsonl", lambda root: [row for row in read_jsonl(root / "run" / "metrics.jsonl") if isinstance(row, dict)], []
    ),
    Kind("run/config.yaml", lambda root: config.load_tree(root / "run" / "config.yaml"), ConfigError),
    Kind("encoder/config.json", lambda root: start(ClassifierConfig(start=str(root / "encoder"))), ModelError),
    Kind("encoder/model.safetensors", lambda root: start(ClassifierConfig(start=str(root / "encoder"))), ModelError),
    Kind("encoder/tokenizer.json", lambda root: load_tokenizer(root / "encoder"), TokenizerError),
    Kind("encoder/tokenizer_config.json", lambda root: load_tokenizer(root / "encoder"), TokenizerError),
    Kind("encoder/tokenizer.json", lambda root: Vocabulary.open(root / "encoder"), TokenizerError),
    Kind("encoder/tokenizer_config.json", lambda root: Vocabulary.open(root / "encoder"), TokenizerError),
    Kind("encoder/special_tokens_map.json", lambda root: Vocabulary.open(root / "encoder"), TokenizerError),
    *(
        Kind(f"model/{name}", lambda root: read_model(root / "model"), ModelError)
        for name in ("MODEL.json", "config.json", "head.json", "head.safetensors", "model.safetensors", "tokenizer.json")
    ),
    Kind("prepared/manifest.json", lambda root: Dataset.open(root / "prepared"), CorpusError),
    Kind("prepared/train/000000.tar", lambda root: Dataset.open(root / "prepared").read(0), CorpusError),
    Kind("prepared/train/000000.tar", lambda root: index.build(root / "prepared" / "train" / "000000.tar"), CorpusError),
    Kind("prepared/train/000000.idx", lambda root: Dataset.open(root / "prepared"), CorpusError),
    Kind("prepared/tokenizer/tokenizer.json", lambda root: Dataset.open(root / "prepared"), TokenizerError),
    Kind("journal/progress.json", lambda root: Journal.open(root / "journal", {}), InputError),
    Kind("journal/seen.bin", lambda root: list(Journal.open(root / "journal", {}).logs["seen.bin"].read(16)), []),
    Kind("task/task.json", lambda root: thaw(root / "task"), CorpusError),
    Kind("task/task.json", lambda root: frozen_digest(root / "task"), CorpusError),
    Kind("task/train.jsonl", lambda root: thaw(root / "task"), CorpusError),
    Kind("lineage/published", _published, CheckpointError),
    Kind(f"{_IN_VERSION}/MANIFEST.json", _published, CheckpointError),
    Kind(f"{_IN_VERSION}/memory.jsonl", _published, CheckpointError),
    Kind(f"{_IN_VERSION}/memory.jsonl", lambda root: load_memory(root / _IN_VERSION), CheckpointError),
    Kind(f"{_IN_VERSION}/evaluation.json", lambda root: Store(root / "lineage").evaluation(VERSION), CheckpointError),
    *(
        Kind(f"table.{suffix}", lambda root, suffix=suffix: _rows(root, suffix), CorpusError)
        for suffix in ("csv", "json", "jsonl", "parquet")
    ),
    Kind("raw.jsonl", lambda root: list(JsonlConfig(paths=(str(root / "raw.jsonl"),)).documents()), CorpusError),
    Kind("raw.tar", lambda root: list(WebdatasetConfig(paths=(str(root / "raw.tar"),)).documents()), CorpusError),
]


@pytest.mark.parametrize("form", PICKLES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.file.rpartition("/")[2])
def test_a_pickle_in_the_place_of_a_file_is_never_loaded(root: Path, canary: Canary, kind: Kind, form: str) -> None:
    (root / kind.file).write_bytes(PICKLES[form](canary))
    if isinstance(kind.said, type):
        with pytest.raises(kind.said):
            kind.reads(root)
    else:
        assert kind.reads(root) == kind.said


def test_what_replaces_nothing_is_read(root: Path) -> None:
    """So that the errors above are those of the pickles."""
    for kind in KINDS:
        if (root / kind.file).exists():
            kind.reads(root)


def test_a_ledger_with_a_pickle_is_refused_where_it_holds_a_line(root: Path, canary: Canary) -> None:
    with pytest.raises(CheckpointError):
        (root / "lineage" / "ledger.jsonl").write_bytes(pickle.dumps(canary, protocol=0) + b"\n")
        Store(root / "lineage").entries()


def test_metrics_with_a_pickle_are_cut_off_without_loading_it(root: Path, canary: Canary) -> None:
    file = root / "run" / "metrics.jsonl"
    file.write_bytes(pickle.dumps(canary) + b"\n" + file.read_bytes())
    drop_later_lines(file, 1)
    assert [row["step"] for row in read_jsonl(file)] == [1]


@pytest.mark.parametrize("form", PICKLES)
def test_a_pickle_under_a_manifest_that_lists_it_is_no_checkpoint(root: Path, canary: Canary, form: str) -> None:
    """Whoever can write the file can write the manifest."""
    folder = root / _LAST
    data = PICKLES[form](canary)
    (folder / "state-00000-of-00001.safetensors").write_bytes(data)
    _list(folder, [_entry("state-00000-of-00001.safetensors", data)])
    found = checkpoint.newest(folder.parent)
    assert found is not None and found.progress.step == 2  # its digests are right
    with pytest.raises(CheckpointError, match="must be safetensors"):
        checkpoint.weights(found)


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _list(folder: Path, files: Any) -> None:
    manifest = json.loads((folder / "MANIFEST.json").read_bytes())
    del manifest["sha256"]
    write_manifest(folder, {**manifest, "files": files})


@pytest.mark.parametrize("name", ["head.safetensors", "model.safetensors", "head.json", "config.json"])
def test_a_pickle_under_a_manifest_that_lists_it_is_no_model(root: Path, canary: Canary, name: str) -> None:
    data = pickle.dumps(canary)
    (root / "model" / name).write_bytes(data)
    _list_model(root / "model", name, data)
    with pytest.raises(ModelError):
        read_model(root / "model")


def _list_model(folder: Path, name: str, data: bytes) -> None:
    manifest = json.loads((folder / "MODEL.json").read_bytes())
    del manifest["sha256"]
    manifest["files"][name] = {key: value for key, value in _entry(name, data).items() if key != "name"}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "MODEL.json").write_text(json.dumps({**manifest, "sha256": digest}))


def test_an_array_of_objects_in_a_shard_is_no_chunk(tmp_path: Path, canary: Canary) -> None:
    data = _object_array(canary)
    built = index.build(tars.make_tar(tmp_path / "shard.tar", [("0.npy", data)]))
    assert built.tokens == 0
    with pytest.raises(ValueError, match="not a flat array of integers"):
        npy.decode(data)


def test_members_that_others_would_unpickle_are_passed_over(tmp_path: Path, canary: Canary) -> None:
    """webdataset's own decoder loads .pyd, .pkl, .pickle and .pth."""
    data = pickle.dumps(canary)
    names = ("pkl", "pyd", "pickle", "pth", "npy", "npz", "cls", "pt")
    tar = tars.make_tar(tmp_path / "raw.tar", [*((f"0.{name}", data) for name in names), ("0.txt", b"a text")])
    assert list(WebdatasetConfig(paths=(str(tar),)).documents()) == ["a text"]
    tar = tars.make_tar(tmp_path / "text.tar", [("0.txt", data), ("0.json", data)])
    for member in ("txt", "json"):
        with pytest.raises(CorpusError):
            list(WebdatasetConfig(paths=(str(tar),), member=member).documents())  # type: ignore[arg-type]


def test_a_compressed_pickle_is_no_table(tmp_path: Path, canary: Canary) -> None:
    (tmp_path / "raw.jsonl.gz").write_bytes(gzip.compress(pickle.dumps(canary)))
    with pytest.raises(CorpusError):
        list(JsonlConfig(paths=(str(tmp_path / "raw.jsonl.gz"),)).documents())


@pytest.mark.parametrize("form", PICKLES)
def test_weights_that_are_only_there_as_a_pickle_are_refused(root: Path, canary: Canary, form: str) -> None:
    (root / "encoder" / "model.safetensors").unlink()
    (root / "encoder" / "pytorch_model.bin").write_bytes(PICKLES[form](canary))
    with pytest.raises(ModelError):
        start(ClassifierConfig(start=str(root / "encoder")))


@pytest.mark.parametrize(
    "text",
    [
        "steps: !!python/object/apply:os.mkdir [{canary}]",
        "steps: !!python/object/new:os.mkdir [{canary}]",
        "!!python/object/apply:os.mkdir [{canary}]",
        "steps: !!python/name:os.mkdir",
        "steps: !!python/module:os",
    ],
)
def test_a_tag_in_yaml_makes_no_object(tmp_path: Path, canary: Canary, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text.format(canary=tmp_path / "canary"))
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.load_tree(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.load_tree(None, [f"steps={text.format(canary=tmp_path / 'canary').removeprefix('steps: ')}"])


# ------------------------------------------------------------------------------------------------- models that name their code

_CODE = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}


@pytest.mark.parametrize(
    ("added", "named"),
    [
        ({"auto_map": _CODE}, "auto_map"),
        ({"_attn_implementation_internal": "someone/kernel"}, "_attn_implementation_internal"),
        ({"_attn_implementation": "someone/kernel"}, "_attn_implementation"),
        ({"text_config": {"auto_map": _CODE}}, "text_config.auto_map"),
        ({"text_config": {"_attn_implementation_internal": "someone/kernel"}}, "text_config._attn_implementation_internal"),
        ({"keypoint_detector_config": {"trust_remote_code": True}}, "keypoint_detector_config.trust_remote_code"),
        ({"layers": [{"auto_map": _CODE}]}, "layers.0.auto_map"),
    ],
)
@pytest.mark.parametrize("folder", ["encoder", "model"])
def test_a_configuration_that_names_code_is_refused(
    root: Path, tmp_path: Path, canary: Canary, folder: str, added: Any, named: str
) -> None:
    """The canary is the module that it names."""
    file = root / folder / "config.json"
    tree = json.loads(file.read_bytes())
    file.write_text(json.dumps({**tree, **added}))
    (root / folder / "evil.py").write_text(
        f"import os\nos.mkdir({str(tmp_path / 'canary')!r})\nclass Config: pass\nclass Model: pass\n"
    )
    if folder == "model":
        _list_model(root / folder, "config.json", file.read_bytes())
    with pytest.raises(ModelError, match=f"names code to run: {named}"):
        start(ClassifierConfig(start=str(root / folder)))


# -------------------------------------------------------------------------------------------------------------- names and links

BAD_NAMES = ["../secret", "/etc/passwd", "a/../../secret", "", ".", "..", "a\0b", "a\nb", "a\\b", "./a", "a//b", None, 7, ["a"]]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_leads_away_is_seen(tmp_path: Path, name: object) -> None:
    assert not outside.is_inside(name)
    with pytest.raises(ValueError, match="no name of a file"):
        outside.plain(tmp_path, name)


@pytest.mark.parametrize(
    "entries",
    [
        *([{"name": name, "bytes": 6, "sha256": "0"}] for name in [*BAD_NAMES, "below/it"]),
        [{"name": "state-00000-of-00001.safetensors"}],
        ["state-00000-of-00001.safetensors"],
        {},
        None,
    ],
)
def test_a_checkpoint_that_lists_anything_but_its_own_files_is_passed_over(root: Path, entries: Any) -> None:
    _list(root / _LAST, entries)
    assert _newest(root) == 1


def test_a_checkpoint_that_lists_a_file_twice_is_passed_over(root: Path) -> None:
    """Each entry alone is right."""
    listed = json.loads((root / _LAST / "MANIFEST.json").read_bytes())["files"]
    _list(root / _LAST, listed)
    assert _newest(root) == 2
    _list(root / _LAST, listed * 2)
    assert _newest(root) == 1


def test_a_checkpoint_behind_a_link_is_passed_over(root: Path, tmp_path: Path) -> None:
    """Its folder, its manifest or its weights: what a link leads to changes without the folder being touched."""
    folder = root / _LAST
    for part in ("MANIFEST.json", "state-00000-of-00001.safetensors"):
        shutil.move(folder / part, tmp_path / part)
        (folder / part).symlink_to(tmp_path / part)
        assert _newest(root) == 1
        (folder / part).unlink()
        shutil.move(tmp_path / part, folder / part)
        assert _newest(root) == 2
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert _newest(root) == 1


@pytest.mark.parametrize("name", ["../x.tar", "/x.tar", "train/../../x.tar", "train\\x.tar"])
def test_a_data_set_that_lists_a_shard_elsewhere_is_refused(root: Path, name: str) -> None:
    _relist(root / "prepared", name)
    with pytest.raises(CorpusError, match="no name of a file"):
        Dataset.open(root / "prepared")


@pytest.mark.parametrize("suffix", ["tar", "idx"])
def test_a_shard_behind_a_link_is_refused(root: Path, tmp_path: Path, suffix: str) -> None:
    file = root / "prepared" / "train" / f"000000.{suffix}"
    shutil.move(file, tmp_path / file.name)
    file.symlink_to(tmp_path / file.name)
    with pytest.raises(CorpusError, match="is a link"):
        Dataset.open(root / "prepared")


def _relist(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    split = manifest["splits"]["train"]
    split["shards"][0]["file"] = name
    split["digest"] = split_digest(split["shards"], manifest["tokenizer"]["digest"], manifest["max_tokens"])
    del manifest["digest"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": canonical_digest(manifest)}))


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "below/x"])
def test_a_model_that_lists_a_file_elsewhere_is_refused(root: Path, name: str) -> None:
    (root / "x").write_bytes(b"x")
    _list_model(root / "model", name, b"x")
    with pytest.raises(ModelError):
        read_model(root / "model")


def test_a_model_behind_a_link_is_refused(root: Path, tmp_path: Path) -> None:
    file = root / "model" / "head.safetensors"
    shutil.move(file, tmp_path / file.name)
    file.symlink_to(tmp_path / file.name)
    with pytest.raises(ModelError, match="is a link"):
        read_model(root / "model")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x"])
def test_a_version_that_lists_a_file_elsewhere_is_refused(root: Path, name: str) -> None:
    file = root / _IN_VERSION / "MANIFEST.json"
    tree = json.loads(file.read_bytes())
    file.write_text(json.dumps({**tree, "files": {name: {"bytes": 1, "sha256": "0"}}}))
    with pytest.raises(CheckpointError, match="no manifest of a version"):
        sealed.manifest(root / _IN_VERSION)


def test_a_file_of_a_version_behind_a_link_is_refused(root: Path, tmp_path: Path) -> None:
    file = root / _IN_VERSION / "evaluation.json"
    shutil.move(file, tmp_path / file.name)
    file.symlink_to(tmp_path / file.name)
    with pytest.raises(CheckpointError, match="link"):
        Store(root / "lineage").evaluation(VERSION)
    with pytest.raises(CheckpointError, match="link"):
        Store(root / "lineage").verify(VERSION)


# ---------------------------------------------------------------------------------------------------------------- without end


@pytest.mark.parametrize(
    ("file", "reads", "error"),
    [
        ("prepared/manifest.json", lambda root: Dataset.open(root / "prepared"), CorpusError),
        ("encoder/tokenizer.json", lambda root: Vocabulary.open(root / "encoder"), TokenizerError),
        ("model/MODEL.json", lambda root: read_model(root / "model"), ModelError),
        ("task/task.json", lambda root: thaw(root / "task"), CorpusError),
        ("journal/progress.json", lambda root: Journal.open(root / "journal", {}), CorpusError),
        (f"{_IN_VERSION}/MANIFEST.json", lambda root: sealed.manifest(root / _IN_VERSION), CheckpointError),
        ("run/config.yaml", lambda root: config.load_tree(root / "run" / "config.yaml"), ConfigError),
        (f"{_LAST}/MANIFEST.json", _newest, None),
        ("run/exit.json", lambda root: recorded(Record(root / "run" / "exit.json", None, 0)), None),
    ],
)
@pytest.mark.parametrize("kind", ["deep", "pipe", "endless", "too large"])
def test_a_value_without_end_is_refused(
    root: Path,
    file: str,
    reads: Callable[[Path], object],
    error: type[Exception] | None,
    kind: str,
) -> None:
    """Nested a hundred thousand times; a pipe that nobody writes to; a device that never ends; more bytes than any has."""
    path = root / file
    path.unlink()
    if kind == "deep":
        path.write_text("[" * 100_000)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 42)
    if error is None:
        assert reads(root) in (None, 1)
    else:
        with pytest.raises(error):
            reads(root)
