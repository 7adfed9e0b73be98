"""Checkpoints: resumed equals uninterrupted to the byte, any world size reads any other's, and a damaged one is never loaded."""

from __future__ import annotations

import json
import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from scaletrain import checkpoint, dist
from scaletrain.checkpoint import Progress
from scaletrain.errors import CheckpointError
from tests import ranks, toy

IDENTITY = {"model": "toy"}


def go(
    folder: str, name: str, until: int, precision: str = "fp32", save_at: list[int] | None = None, die_at: int | None = None
) -> dict[str, Any]:
    """Takes steps from the newest checkpoint on, saves at some of them, and says what was computed."""
    made = toy.make(name, precision)
    last = checkpoint.newest(Path(folder))
    start = checkpoint.restore(last, made, IDENTITY).step if last else 0
    losses = {}
    for step in range(start, until):
        for loss, norm in toy.steps(made, step, step + 1):
            losses[step] = [loss.hex(), norm.hex()]
        if step + 1 in (save_at or []):
            checkpoint.save(Path(folder), made, Progress(step + 1, {"phase": 0, "samples": step + 1}, IDENTITY), keep=2)
        if step + 1 == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
    return {"start": start, "losses": losses, "digest": toy.digest(made), "weights": toy.pieces(made), "updates": made.updates}


@pytest.mark.parametrize(
    ("name", "world", "precision"),
    [
        *(("local", 1, precision) for precision in ("fp32", "bf16")),
        *(("zero3", 2, precision) for precision in ("fp32", "bf16")),
        *(("zero0", 2, "bf16"), ("zero1", 2, "bf16"), ("zero2", 2, "fp32")),
    ],
)
def test_killed_and_resumed_equals_uninterrupted_to_the_byte(tmp_path: Path, name: str, world: int, precision: str) -> None:
    """SIGKILL of all ranks three steps after a checkpoint; SHA-256 of all weights and moments after 20 more steps."""
    arguments = {"folder": str(tmp_path / "whole"), "name": name, "until": 26, "precision": precision}
    whole = ranks.run(go, world, arguments)
    broken = {**arguments, "folder": str(tmp_path / "broken")}
    for outcome in ranks.attempt(go, world, {**broken, "save_at": [6], "die_at": 9}):
        assert outcome["status"] == f"signal {signal.SIGKILL:d}"
    resumed = ranks.run(go, world, broken)
    for rank in range(world):
        assert resumed[rank]["start"] == 6
        assert resumed[rank]["losses"] == {step: value for step, value in whole[rank]["losses"].items() if int(step) >= 6}
        assert resumed[rank]["digest"] == whole[rank]["digest"]
        assert resumed[rank]["updates"] == 26


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 2 and 4, written by two ranks."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    ranks.run(go, 2, {"folder": str(folder), "name": "zero3", "until": 4, "save_at": [1, 2, 4]})
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_only_the_newest_are_kept(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "step-00000002", "step-00000004"]


def test_every_file_is_named_with_its_digest_and_every_element_is_there_once(saved: Path) -> None:
    newest = checkpoint.find(saved)[0]
    assert [entry["name"] for entry in newest.manifest["files"]] == [
        f"state-0000{rank}-of-00002.safetensors" for rank in range(2)
    ]
    weights = checkpoint.weights(newest)
    shapes = {name: list(value.shape) for name, value in weights.items()}
    model = toy.model()
    assert shapes == {name: list(p.shape) for name, p in [*model.named_parameters(), *model.named_buffers()]}


def keep_the_best(folder: str, protected: list[int]) -> None:
    made = toy.make("local")
    for step in range(5):
        list(toy.steps(made, step, step + 1))
        progress = Progress(step + 1, {"phase": 0, "samples": step + 1}, IDENTITY)
        checkpoint.save(Path(folder), made, progress, keep=1, protected=protected if step else ())


def test_a_protected_step_is_kept_whatever_its_age(tmp_path: Path) -> None:
    """Step 1 falls to retention before anyone protects it, step 2 never does."""
    ranks.run(keep_the_best, 1, {"folder": str(tmp_path), "protected": [2]})
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000002", "step-00000005"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "manifest cut", "manifest missing", "manifest edited"])
def test_a_damaged_newest_is_passed_over_for_the_one_before(copy: Path, damage: str) -> None:
    newest = copy / "step-00000004"
    file = newest / ("MANIFEST.json" if damage.startswith("manifest") else "state-00001-of-00002.safetensors")
    data = bytearray(file.read_bytes())
    if damage.endswith("missing"):
        file.unlink()
    elif damage.endswith("edited"):
        assert b'"step": 4' in data
        file.write_bytes(data.replace(b'"step": 4', b'"step": 5'))
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(data[: len(data) // 2])
    if damage.startswith("manifest"):
        found = checkpoint.newest(copy)
    else:
        with pytest.warns(UserWarning, match="state-00001-of-00002"):
            found = checkpoint.newest(copy)
    assert found is not None
    assert found.progress.step == 2


@pytest.mark.parametrize("damage", ["MANIFEST.json", "state-00000-of-00001.safetensors"])
def test_a_damaged_checkpoint_is_written_again_when_the_run_comes_by(tmp_path: Path, damage: str) -> None:
    arguments = {"folder": str(tmp_path), "name": "local", "until": 2, "save_at": [1, 2]}
    whole = ranks.run(go, 1, arguments)[0]
    file = tmp_path / "step-00000002" / damage
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = ranks.run(go, 1, arguments)[0]
        assert (again["start"], again["digest"]) == (1, whole["digest"])
        found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.progress.step == 2


def test_a_leftover_of_a_cut_save_and_a_wrong_pointer_change_nothing(copy: Path) -> None:
    shutil.copytree(copy / "step-00000004", copy / ".step-00000009.partial")
    (copy / "latest").write_text("step-00000099\r\n")
    found = checkpoint.newest(copy)
    assert found is not None
    assert found.progress.step == 4


def test_no_whole_checkpoint_where_there_were_some_is_an_error(copy: Path) -> None:
    """Never a silent start at step 0."""
    for manifest in copy.glob("step-*/MANIFEST.json"):
        manifest.unlink()
    with pytest.raises(CheckpointError, match="--fresh"):
        checkpoint.newest(copy)


def test_a_fresh_start_sets_the_old_checkpoints_aside(copy: Path) -> None:
    assert checkpoint.set_aside(copy) == copy.with_name("checkpoints.before-fresh-1")
    assert checkpoint.newest(copy) is None
    assert len(checkpoint.find(copy.with_name("checkpoints.before-fresh-1"))) == 2


def test_a_checkpoint_of_something_else_is_refused_by_name(copy: Path) -> None:
    made = toy.make("local")
    before = toy.digest(made)
    try:
        last = checkpoint.find(copy)[0]
        with pytest.raises(CheckpointError, match="model: got 'other'"):
            checkpoint.restore(last, made, {"model": "other"})
        manifest = json.loads((last.folder / "MANIFEST.json").read_text())
        manifest["parameters"]["hidden.weight"]["shape"] = [24, 25]
        with pytest.raises(CheckpointError, match=r"hidden\.weight"):
            checkpoint.restore(checkpoint.Checkpoint(last.folder, manifest), made, IDENTITY)
        assert toy.digest(made) == before
    finally:
        dist.stop()


# ------------------------------------------------------------------------------------------------------------ further pieces

SHAPES = {"embedding.weight": (7, 5), "bias": (3,), "scale": ()}


def value_of(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Of the whole, flat."""
    size = int(torch.Size(shape).numel())
    return torch.linspace(-1, 1, size) ** 3 + len(name)


def piece_of(name: str, shape: tuple[int, ...], filled: bool) -> checkpoint.Piece:
    """Of this rank: as ZeRO-3 cuts it, so that of three elements four ranks hold one each, and the last rank nothing."""
    whole = value_of(name, shape)
    size = -(-len(whole) // dist.world())
    own = whole[dist.rank() * size : (dist.rank() + 1) * size]
    return checkpoint.Piece(shape, min(dist.rank() * size, len(whole)), own.clone() if filled else torch.full_like(own, 9))


def write_state(folder: str) -> Any:
    dist.start(toy.CPU)
    return checkpoint.write_state(Path(folder), "fisher", {n: piece_of(n, shape, True) for n, shape in SHAPES.items()})


def read_state(folder: str, names: list[str]) -> dict[str, list[Any]]:
    dist.start(toy.CPU)
    pieces = {name: piece_of(name, SHAPES[name], False) for name in names}
    checkpoint.read_state(Path(folder), "fisher", pieces)
    return {name: [piece.start, piece.values.tolist()] for name, piece in pieces.items()}


@pytest.mark.parametrize(("before", "after"), [(2, 3), (4, 1), (1, 4), (3, 2)])
def test_pieces_of_any_world_size_are_read_at_any_other(tmp_path: Path, before: int, after: int) -> None:
    """To the bit, with every file in the entries that each rank gets."""
    entries = ranks.run(write_state, before, {"folder": str(tmp_path)})
    assert entries == [entries[0]] * before
    assert [entry["bytes"] for entry in entries[0]] == [
        (tmp_path / "fisher" / f"state-0000{rank}-of-0000{before}.safetensors").stat().st_size for rank in range(before)
    ]
    assert checkpoint.state_shapes(tmp_path, "fisher") == SHAPES
    found = toy.whole(ranks.run(read_state, after, {"folder": str(tmp_path), "names": list(SHAPES)}))
    assert all(torch.equal(found[name], value_of(name, shape)) for name, shape in SHAPES.items())


def test_a_state_that_is_written_again_replaces_the_one_before(tmp_path: Path) -> None:
    """As after a kill between the two; leftovers of the kill are swept."""
    ranks.run(write_state, 2, {"folder": str(tmp_path)})
    (tmp_path / ".fisher.partial").mkdir()
    ranks.run(write_state, 1, {"folder": str(tmp_path)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fisher"]
    assert sorted(path.name for path in (tmp_path / "fisher").iterdir()) == ["MANIFEST.json", "state-00000-of-00001.safetensors"]


@pytest.mark.parametrize("file", ["state-00000-of-00002.safetensors", "state-00001-of-00002.safetensors", "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_state_is_read_by_no_rank(tmp_path: Path, file: str, damage: str) -> None:
    """Whichever file it is; a damaged manifest is not taken for a state that was never written."""
    ranks.run(write_state, 2, {"folder": str(tmp_path)})
    data = bytearray((tmp_path / "fisher" / file).read_bytes())
    data[-3] ^= 1
    (tmp_path / "fisher" / file).unlink()
    if damage == "flipped":
        (tmp_path / "fisher" / file).write_bytes(data)
    outcomes = ranks.attempt(read_state, 2, {"folder": str(tmp_path), "names": list(SHAPES)})
    assert [(outcome["type"], outcome["exit_code"]) for outcome in outcomes] == [("CheckpointError", 65)] * 2
    if file == "MANIFEST.json":
        with pytest.raises(CheckpointError, match="the manifest cannot be read"):
            checkpoint.state_shapes(tmp_path, "fisher")
    assert checkpoint.state_shapes(tmp_path, "importance") == {}


def test_a_name_or_a_shape_that_was_not_written_is_refused_before_anything_is_filled(tmp_path: Path) -> None:
    write_state(str(tmp_path))
    try:
        for wrong in ("head.weight", "bias"):
            target = torch.full((4,), 9.0)
            known = piece_of("scale", (), False)
            with pytest.raises(CheckpointError, match=f"parameter {wrong}"):
                checkpoint.read_state(tmp_path, "fisher", {"scale": known, wrong: checkpoint.Piece((4,), 0, target)})
            assert known.values.tolist() == [9.0] and target.tolist() == [9.0] * 4
    finally:
        dist.stop()


def two_names(folder: str) -> None:
    dist.start(toy.CPU)
    name = f"of rank {dist.rank()}"
    checkpoint.write_state(Path(folder), "fisher", {name: checkpoint.Piece((1,), 0, torch.ones(1))})


def test_ranks_that_would_write_different_names_write_nothing(tmp_path: Path) -> None:
    outcomes = ranks.attempt(two_names, 2, {"folder": str(tmp_path)})
    assert all("do not agree on the names and shapes of fisher" in outcome["error"] for outcome in outcomes)
    assert list(tmp_path.iterdir()) == []


def weights_here(folder: str) -> str:
    """On each rank by itself."""
    dist.start(toy.CPU)
    try:
        checkpoint.weights(checkpoint.find(Path(folder))[0])
    except CheckpointError as error:
        return str(error.value)
    return "whole"


def test_whole_weights_are_verified_whole_by_every_process(copy: Path) -> None:
    """Also where several ranks read them: none may start from a file that only another one would have checked."""
    file = copy / "step-00000004" / "state-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert (
        ranks.run(weights_here, 2, {"folder": str(copy)}) == [f"{file.name} does not have the SHA-256 that the manifest says"] * 2
    )
