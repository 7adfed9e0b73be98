"""The commands of README, as a newcomer would type them one after the other, in one folder; only the runs are shorter."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from scaletrain.launcher.local import free_port
from scaletrain.recipes import docstrings, quickstart

ROOT = Path(__file__).resolve().parent.parent.parent
SHORTER = {
    "tools/quickstart": ["steps=6", "epochs=0.2"],
    "finetune": ["training.epochs=0.5"],
    "continual": ["training.epochs=0.5"],
    "tools/test": ["--collect-only", "--quiet", "tests/unit/test_config.py"],
    "pretrain": ["steps=6", "data.chunks_per_step=16", "evaluation.every_steps=6"],
}


def commands() -> list[list[str]]:
    """Every line of every bash block, split into words."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


def as_here(words: list[str]) -> list[str]:
    """The same command with this interpreter's programs, made shorter."""
    shorter = [extra for name, extras in SHORTER.items() if name in words for extra in extras]
    if words[0] == "tools/quickstart" and Path(sys.prefix) != ROOT / ".venv":
        words = [
            sys.executable,
            "-m",
            "scaletrain",
            "quickstart",
        ]  # not in the environment that the tools make: do not make one in a test
    if words[0] == "tools/test" and Path(sys.prefix) != ROOT / ".venv":
        words = [sys.executable, "-m", "pytest"]
    if words[0] == "deepspeed":
        words = ["deepspeed", "--master_port", str(free_port()), *words[1:]]  # its own choice may be taken on a shared machine
    if words[0].startswith("tools/"):
        return [str(ROOT / words[0]), *words[1:], *shorter]
    return [*words, *shorter]


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all commands are typed in."""
    return tmp_path_factory.mktemp("newcomer")


@pytest.fixture(scope="module")
def outputs(newcomer: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """Runs them all; the corpus that quickstart prepared is where the next commands look for theirs."""
    folder = newcomer
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "prepared").mkdir()
    (folder / "prepared" / "stdlib").symlink_to(folder / "quickstart" / "corpus")
    here = str(Path(sys.executable).parent)
    path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if not (Path(part) / "scaletrain").exists())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1"}
    done = {}
    for words in commands():
        if words == [".", ".venv/bin/activate"]:  # what it does; before it no command is found that is not at its own path
            environment["PATH"] = f"{here}{os.pathsep}{path}"
            continue
        where = ROOT if words[0] == "tools/test" else folder
        done[" ".join(words)] = subprocess.run(
            as_here(words), cwd=where, env=environment, capture_output=True, text=True, timeout=600
        )
    return done


@pytest.mark.timeout(1500)  # all commands are run in its set-up
def test_every_command_ends_well(outputs: dict[str, subprocess.CompletedProcess[str]]) -> None:
    failed = {command: f"{done.returncode}\n{done.stderr[-1500:]}" for command, done in outputs.items() if done.returncode}
    for command in [*failed]:
        if failed[command][:2] in ("77", "78") and {"continual", "onboard"} & set(command.split()):
            del failed[command]  # so little training is not for the gate to like
    assert not failed, "\n\n".join(f"{command}: {said}" for command, said in failed.items())
    assert {"tools/quickstart", "tools/test"} <= {command.split()[0] for command in outputs}


def test_quickstart_ends_with_one_json_object_of_measured_figures(outputs: dict[str, subprocess.CompletedProcess[str]]) -> None:
    result: dict[str, Any] = json.loads(outputs["tools/quickstart"].stdout.splitlines()[-1])
    assert result["mlm_eval_loss_last"] < result["mlm_eval_loss_first"]
    assert 4 < result["unigram_entropy"] < 8
    assert result["export_max_abs_diff"] <= 1e-5
    assert 0 < result["majority_baseline"] < 0.6
    for stream in ("naive", "protected"):
        assert result[stream].keys() == {"average_accuracy", "forgetting", "gate"}
        assert result[stream]["gate"] in ("published", "refused", "undecided")


def test_what_quickstart_says_to_try_next_works(outputs: dict[str, subprocess.CompletedProcess[str]], newcomer: Path) -> None:
    """As it stands there, in the folder that the quickstart was run in."""
    said = outputs["tools/quickstart"].stdout
    lines = said[said.rindex("Next:\n") :].splitlines()[1:4]
    assert [re.sub(r".*scaletrain ", "", line).split()[0] for line in lines] == ["history", "predict", "onboard"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = [subprocess.run(["bash", "-c", line], cwd=newcomer, env=environment, capture_output=True, text=True) for line in lines]
    assert [each.returncode for each in done[:2]] == [0, 0], done
    assert done[2].returncode in (0, 77, 78), done[2].stderr  # so little training is not for the gate to like
    assert json.loads(done[1].stdout.splitlines()[-1])["text"] == "Return the root of the tree."


def test_quickstart_pretrains_as_the_configs_show() -> None:
    """Only the paths, and how long and how often, differ: what a newcomer reads in configs/ is what was run."""
    trees = quickstart.settings(quickstart.Config(), write_tasks_nowhere())
    for stage in ("prepare", "pretrain"):
        shown = yaml.safe_load((ROOT / "configs" / stage / "stdlib.yaml").read_text())
        assert _without_paths(_numbers(shown)) == _without_paths(trees[stage]), stage


def write_tasks_nowhere() -> dict[str, dict[str, list[str]]]:
    return {task: {"train": [], "gate": [], "test": []} for task in docstrings.TASKS}


def _numbers(tree: Any) -> Any:
    """YAML 1.1 reads 2e-3 as text; ours does not."""
    if isinstance(tree, dict):
        return {key: _numbers(value) for key, value in tree.items()}
    return float(tree) if isinstance(tree, str) and re.fullmatch(r"\d+e-\d+", tree) else tree


def _without_paths(tree: dict[str, Any]) -> dict[str, Any]:
    kept = {
        key: value
        for key, value in tree.items()
        if key not in ("output", "run", "seed", "steps", "evaluation", "checkpoint", "metrics")
    }
    if "data" in kept:
        kept["data"] = {**kept["data"], "corpora": len(kept["data"]["corpora"])}
    return kept
