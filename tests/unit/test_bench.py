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
SCRIPT = ROOT / "tools" / "bench" / "standard_ebooks.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("standard_ebooks", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(data: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script as a user starts it, with the data sets at ``data``."""
    environment = {**os.environ, "SCALETRAIN_DATA": str(data), "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=False)


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
