"""The benchmarks under tools/bench still run, and sum up what they measured correctly."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "tools" / "bench"


def module(name: str) -> ModuleType:
    """A script under tools/bench, imported; each is alone in the world and none is in a package."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found  # where dataclasses look their annotations up
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return module("standard_ebooks")


@pytest.fixture(scope="module")
def outcomes() -> ModuleType:
    return module("outcomes")


def run(data: Path, *arguments: str, script: str = "standard_ebooks") -> subprocess.CompletedProcess[str]:
    """The script as a user starts it, with the data sets at ``data``."""
    environment = {**os.environ, "SCALETRAIN_DATA": str(data), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(BENCH / f"{script}.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_smoke_run_measures_everything_without_the_data(tmp_path: Path) -> None:
    """Eight steps on two ranks on the text that ships with Python; the corpus and the run are left where they were asked for."""
    done = run(tmp_path / "no-such-folder", "--smoke", "--work", str(tmp_path / "work"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["bench"], result["smoke"], result["table"]["steps"]) == ("standard_ebooks", True, 8)
    assert [step for step, _, _ in result["table"]["validation"]] == [0, 4, 8]
    values = {name.split(",")[0]: check["value"] for name, check in result["checks"].items()}
    assert list(values) == ["validation loss falls", "data wait", "padding", "filler"]
    assert values["validation loss falls"] < -0.1
    assert 0.0 < values["padding"] < 0.5
    assert (values["filler"], result["table"]["cpu_s"] > 1.0) == (0.0, True)
    assert (tmp_path / "work" / "run" / "checkpoints" / "latest").read_text() == "step-00000008\n"


def test_without_the_data_the_full_run_says_where_it_looked_and_ends_with_65(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 65
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: SCALETRAIN_DATA: got '{tmp_path}/standard_ebooks/train.txt.gz'; no such file")


def test_shares_are_of_the_whole_run_not_means_over_its_steps(bench: ModuleType) -> None:
    """Two steps of 900 and 100 tokens: 10 % and 50 % padding, no wait and a second of four."""
    quick = {"kind": "step", "real_tokens": 900, "padding_share": 0.1, "step_s": 1.0, "data_wait_s": 0.0, "filler_share": 0.0}
    slow = {"kind": "step", "real_tokens": 100, "padding_share": 0.5, "step_s": 4.0, "data_wait_s": 1.0, "filler_share": 0.25}
    lines: list[dict[str, Any]] = [{**step, "memory_bytes": 7} for step in (quick, slow)]
    lines += [{"kind": "eval", "step": step, "scores": {"loss": loss, "accuracy": 0.5}} for step, loss in ((0, 9.0), (2, 6.5))]
    result = bench.figures(lines, entropy=6.0, spent={"wall_s": 6.0, "cpu_s": 10.0})
    values = [check["value"] for check in result["checks"].values()]
    assert values == pytest.approx([-2.5, 0.2, 1 - 1000 / 1200, 0.25])
    assert [bench.met(check) for check in result["checks"].values()] == [True, False, False, False]
    assert result["table"]["real_tokens_per_second_median"] == pytest.approx((900 + 25) / 2)
    assert result["table"]["cpu_s_per_1000_real_tokens"] == pytest.approx(10.0)


# ----------------------------------------------------------------------------------------------------------------------- clinc150


@pytest.mark.parametrize(
    ("part", "method", "samples", "targets"),
    [
        # Eight intents with eight examples each; and two tasks of 32, the second with as many old examples as new ones.
        pytest.param("a", "finetune", 64, {">= -1"}, id="fine-tuning beside Trainer"),
        pytest.param("b", "replay", 32 + 32 + 32, {">= 0.83", ">= 0", "<= 1.1"}, id="a stream beside the plain loop"),
    ],
)
def test_the_smoke_run_of_clinc150_measures_both_sides_without_the_data(
    part: str, method: str, samples: int, targets: set[str], tmp_path: Path
) -> None:
    """Intents that one word tells apart: both sides learn them, of equally many samples."""
    work = tmp_path / "work"
    arguments = ("--smoke", "--part", part, "--threads", "1", "--work", str(work))
    done = run(tmp_path / "no-such-folder", *arguments, script="clinc150")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["bench"], result["smoke"], result["machine"]["threads"]) == ("clinc150", True, 1)
    assert [(row["method"], row["side"]) for row in result["table"]] == [(method, "ours"), (method, "rival")]
    assert [row["accuracy"] > 0.5 for row in result["table"]] == [True, True]  # by chance one in eight
    assert [round(row["samples_per_cpu_s"] * row["cpu_s"]) for row in result["table"]] == [samples, samples]
    assert {check["target"] for check in result["checks"].values()} == targets
    assert (work / f"{method}-ours-1" / "metrics.jsonl" if part == "a" else work / f"{method}-ours-1" / "published").exists()


def test_without_clinc150_the_full_run_says_where_it_looked_and_ends_with_65(tmp_path: Path) -> None:
    done = run(tmp_path, "--part", "b", script="clinc150")
    assert (done.returncode, done.stdout) == (65, "")
    assert done.stderr.startswith(f"error: SCALETRAIN_DATA: got '{tmp_path}/clinc150/domains.json'; no such file")


def test_the_stream_is_the_domains_one_after_the_other_without_out_of_scope_queries(
    tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first examples of each intent, ten intents to a task: the second task begins inside the first domain."""
    if not (data_folder / "clinc150").is_dir():
        pytest.skip(f"no clinc150 in {data_folder}")
    monkeypatch.setenv("SCALETRAIN_DATA", str(data_folder))
    intents = module("intents")
    tasks = intents.write(tmp_path, intents.Size(), may_be_made_up=False)
    rows = [[json.loads(line) for line in Path(task["train"]).read_text().splitlines()] for task in tasks]
    assert [len(own) for own in rows] == [400] * 15
    labels = [row["label"] for own in rows for row in own]
    assert list(dict.fromkeys(labels))[9:12] == ["transfer", "order_checks", "balance"]
    assert (len(set(labels)), "oos" in labels) == (150, False)


def test_recovery_and_the_ratio_of_steps_are_taken_within_a_round_and_a_side(outcomes: ModuleType) -> None:
    """Steps of the first task, which rehearses nothing, do not count: here they would have said 4, and the others say 1 and 3."""

    def outcome(method: str, side: str, last: list[float], steps: list[list[float]]) -> Any:
        results = [[0.9], last] if len(last) > 1 else [last]
        return outcomes.Outcome(outcomes.Run(method, side, 1), results, 100, steps, 50.0, 25.0)

    result = outcomes.figures(
        [
            outcome("naive", "ours", [0.0, 0.4], [[1.0], [1.0]]),
            outcome("replay", "ours", [0.6, 0.8], [[4.0], [1.0, 3.0]]),
            outcome("replay", "rival", [0.7, 0.8], [[1.0], [2.0, 2.0]]),
            outcome("joint", "ours", [0.8], [[1.0]]),
        ]
    )
    values = {name: check["value"] for name, check in result["checks"].items()}
    assert values == pytest.approx(
        {
            "replay, average accuracy": 0.7,
            "replay, average accuracy, ours - plain loop (points)": -5.0,
            "replay, CPU seconds of a step, ours / plain loop": 1.0,
            "replay, recovery": (0.7 - 0.2) / (0.8 - 0.2),
        }
    )
    assert [outcomes.met(check) for check in result["checks"].values()] == [False, False, True, False]
    rows = {(row["method"], row["side"]): row for row in result["table"]}
    assert rows["replay", "ours"]["forgetting"] == pytest.approx(0.3)
    assert (rows["replay", "rival"]["recovery"], rows["joint", "ours"]["forgetting"]) == (None, None)
    assert rows["replay", "ours"]["samples_per_cpu_s"] == pytest.approx(2.0)


# --------------------------------------------------------------------------------------------------------------------- quickstart


def test_the_smoke_run_of_quickstart_has_every_check(tmp_path: Path) -> None:
    done = run(tmp_path, "--smoke", "--work", str(tmp_path / "work"), script="quickstart")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["bench"], result["smoke"], [row["seed"] for row in result["table"]]) == ("quickstart", True, [1])
    assert result["table"][0]["naive"]["gate"] in ("published", "refused", "undecided")
    assert result["checks"]["exported - original, largest difference of a logit"]["value"] <= 1e-5


def test_the_worst_seed_is_what_counts() -> None:
    def row(naive: float, protected: float, gate: str) -> dict[str, Any]:
        streams = {"naive": {"forgetting": naive, "gate": "refused"}, "protected": {"forgetting": protected, "gate": gate}}
        losses = {"mlm_eval_loss_last": 5.5, "unigram_entropy": 6.0, "finetune_accuracy": 0.9, "majority_baseline": 0.4}
        return {**streams, **losses, "export_max_abs_diff": 0.0, "seconds": 100 * protected}

    found = module("quickstart").checks([row(0.8, 0.2, "published"), row(0.8, 0.6, "refused")])
    values = [check["value"] for check in found.values()]
    assert values == pytest.approx([0.75, 2, 1, -0.5, 0.5, 0.0, 60.0])
    assert [check["target"] for check in found.values()][1:3] == [">= 2", ">= 2"]


def test_the_smoke_run_of_kills_loses_nothing(tmp_path: Path) -> None:
    """30 kills of the protocol and 2 of ZeRO-3; how many of so few are in a save is chance."""
    done = run(tmp_path, "--smoke", script="kills")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["bench"], result["smoke"]) == ("kills", True)
    assert [result["table"][name]["kills"] for name in ("protocol", "zero3")] == [30, 2]
    wrong = [check["value"] for name, check in result["checks"].items() if "wrong" in name]
    assert wrong == [0, 0]


def test_the_smoke_run_of_checkpoint_measures_every_way(tmp_path: Path) -> None:
    """Saved and loaded by each, by two ranks; how long a tiny model takes says nothing."""
    done = run(tmp_path, "--smoke", "--work", str(tmp_path), script="checkpoint")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["bench"], result["smoke"]) == ("checkpoint", True)
    assert list(result["table"]) == ["ours", "ours, asynchronous", "deepspeed", "torch DCP", "torch DCP, asynchronous"]
    for way, row in result["table"].items():
        assert row["durable_s"]["median"] >= row["blocking_s"]["median"] > 0, way
        assert row["load_s"]["median"] > 0 and row["bytes"]["median"] > 500_000, way
    assert [check["target"] for check in result["checks"].values()] == ["<= 0.3", "<= 1.2", "<= 1.2"]
    assert not list(tmp_path.iterdir())


def test_the_smoke_run_of_loader_reads_with_every_way(tmp_path: Path) -> None:
    done = run(tmp_path, "--smoke", "--work", str(tmp_path), script="loader")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["checks"]) == 8 and result["table"]["resume"]["equal"] and result["table"]["resume"]["steps compared"] == 3
    for size in ("2 KB", "64 KB"):
        for what in ("bytes", "batches"):
            assert all(result["table"][size][what][way]["samples_per_cpu_s"] > 0 for way in ("ours", "webdataset", "datasets"))
    assert result["table"]["resume"]["webdataset"]["at 90 %"] > result["table"]["resume"]["ours"]["at 90 %"]
    assert list(tmp_path.iterdir()) == []


def test_the_smoke_run_of_damage_accounts_for_every_sample(tmp_path: Path) -> None:
    done = run(tmp_path, "--smoke", script="damage")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    checks = {name.split(",")[0]: check["value"] for name, check in result["checks"].items()}
    assert checks["samples unaccounted for"] == checks["hostile tars read wrongly"] == checks["written outside"] == 0
    healthy, *damaged = result["table"]["faults"]
    assert healthy["webdataset"]["silent"] is False and healthy["ours"] == {"right": 600, "replaced": 0, "unaccounted": 0}
    assert len(damaged) == 14 and all(row["webdataset"]["silent"] for row in damaged)


# ------------------------------------------------------------------------------------------------------------------------ padding


def test_the_smoke_run_of_padding_measures_every_way_without_the_data(tmp_path: Path) -> None:
    done = run(tmp_path / "no-such-folder", "--smoke", script="padding")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["bench"], result["smoke"], len(result["checks"])) == ("padding", True, 8)
    rows = {(row["longest"], row["layout"], row["world"], row["way"]): row for row in result["table"]}
    assert {"ours", "ours_as_many", "random", "group_by_length"} <= {way for *_, way in rows}
    for longest, world in ((128, 2), (128, 8), (512, 2), (512, 8)):
        ours = [rows[longest, layout, world, "ours"] for layout in ("padded", "unpadded")]
        assert 0.05 < ours[0]["padding"] < rows[longest, "padded", world, "random"]["padding"]
        assert (ours[1]["padding"], ours[1]["round"] < 0.01) == (0.0, True)
        assert ours[0]["padding"] == rows[longest, "padded", 2, "ours"]["padding"]  # no slot knows the number of ranks
        assert rows[longest, "unpadded", world, "random"]["round"] > ours[1]["round"]


def test_without_the_data_the_full_run_of_padding_ends_with_65(tmp_path: Path) -> None:
    done = run(tmp_path, script="padding")
    assert (done.returncode, done.stdout) == (65, "")
    assert done.stderr.startswith(f"error: SCALETRAIN_DATA: got '{tmp_path}/standard_ebooks/train.txt.gz'; no such file")


def test_padding_and_imbalance_of_a_step_counted_by_hand() -> None:
    """Two rounds of two ranks. Padded: 20 + 12 and 8 + 0 places with 33 tokens in them; unpadded 19 + 8 and 6 + 0."""
    padding = module("padding")
    batches = [[[10, 9], [4, 2, 2]], [[2, 2, 2, 0], []]]
    step = [[padding.np.array(rows, dtype=padding.np.int64) for rows in batches_] for batches_ in batches]
    padded, unpadded = (padding.measure([step], layout) for layout in ("padded", "unpadded"))
    assert padded["padding"] == pytest.approx(1 - 33 / 40)
    assert padded["round"] == pytest.approx((20 + 8) / (16 + 4) - 1)
    assert padded["step"] == pytest.approx(28 / 20 - 1)
    assert padded["worst"] == pytest.approx(1.0)
    assert padded["useful"] == pytest.approx(33 / (2 * 28))
    assert padded["attention"] == pytest.approx((200 + 16) / ((200 + 48) / 2 + 8) - 1)
    assert (unpadded["padding"], unpadded["useful"]) == (0.0, pytest.approx(33 / (2 * 25)))
    assert unpadded["attention"] == pytest.approx((181 + 12) / ((181 + 24) / 2 + 6) - 1)
    assert (padded["rounds"], padded["drift"]) == (2.0, 0.0)


def test_the_smoke_run_of_prepare_does_the_same_work_each_way(tmp_path: Path) -> None:
    done = run(tmp_path, "--smoke", "--work", str(tmp_path), script="prepare")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    row = json.loads(done.stdout.splitlines()[-2])
    assert len({row[way]["tokens"] for way in ("raw", "raw_two", "one", "two", "parts", "minhash")}) == 1
    assert [check["target"] for check in result["checks"].values()] == [">= 0.85", ">= 1.7", "<= 1.25"]
    assert all(row[way]["cpu_s"] > row[way]["own_cpu_s"] > 0 for way in ("one", "two", "parts", "minhash"))
    assert 800 < result["table"]["index"]["bytes_per_document"] < 4000
    assert list(tmp_path.iterdir()) == []


def test_the_ratios_of_prepare_are_per_second_of_the_processor_and_of_the_clock() -> None:
    """A round of 1,000 tokens: 10 s of one core for the tokeniser, 12.5 s for all of prepare, which two processes halve."""
    row = {"tokens": 1000, "own_cpu_s": 1.0}
    seconds = {
        "raw": (10.0, 10.0),
        "raw_two": (5.0, 10.0),
        "one": (12.0, 12.5),
        "two": (6.0, 13.0),
        "parts": (14.0, 15.0),
        "minhash": (20.0, 25.0),
    }
    rounds = [{way: {**row, "wall_s": wall, "cpu_s": cpu} for way, (wall, cpu) in seconds.items()}]
    bench = module("prepare")
    assert [check["value"] for check in bench.checks(rounds).values()] == [0.8, 2.0, 1.2]
    assert bench.table(rounds)["processor time, minhash / exact"] == 2.0
    assert bench.table(rounds)["tokens/s, two raw encode_batch at once / one"] == 2.0
    assert bench.table(rounds)["raw"]["tokens_per_cpu_s"] == 100


def test_without_the_text_the_full_run_of_prepare_says_where_it_looked(tmp_path: Path) -> None:
    done = run(tmp_path, script="prepare")
    assert (done.returncode, done.stdout) == (65, "")
    assert done.stderr.startswith(f"error: SCALETRAIN_DATA: got '{tmp_path}/standard_ebooks/train.txt.gz'; no such file")
