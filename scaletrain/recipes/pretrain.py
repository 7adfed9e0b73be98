"""Pretraining: prepared corpora in, checkpoints of an encoder out. Start it again and it continues."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from scaletrain import checkpoint, dist, engine, model
from scaletrain.checkpoint import Checkpoint, CheckpointConfig, Progress, Saver
from scaletrain.config import dump
from scaletrain.data.plan import Cursor
from scaletrain.data.slots import Dealing
from scaletrain.engine import Engine, EngineConfig, OptimizerConfig, Zero3Config
from scaletrain.errors import CheckpointError, ConfigError, RequeueError, ScaletrainError, StorageError
from scaletrain.model import MaskedLanguageModel, ModelConfig
from scaletrain.recipes.corpora import Corpora, DataConfig
from scaletrain.tasks.mlm import MlmConfig
from scaletrain.train.console import Writers, open_writers
from scaletrain.train.control import Session, StopRequest
from scaletrain.train.evaluate import evaluate
from scaletrain.train.loop import train
from scaletrain.train.metrics import Fact, Meter, MetricsConfig, device_peak, peak_memory_bytes
from scaletrain.train.schedule import LinearConfig, ScheduleConfig, due, learning_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """The loss on held-out text."""

    every_steps: Annotated[int, Field(ge=0)] = 500
    """Steps between evaluations; before the first and after the last step there is one too. 0: never."""
    chunks_per_pass: Annotated[int, Field(ge=1)] = 256
    """Chunks that are evaluated together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Everything that a pretraining run follows from."""

    output: Path
    """The run's folder: checkpoints, metrics, the resolved settings, and exit.json."""
    steps: Annotated[int, Field(ge=1)]
    """Optimizer steps in all, warm-up phases included."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Of the weights, the order, the masks and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where there is a GPU."""
    model: ModelConfig
    """The encoder."""
    data: DataConfig
    """The corpora."""
    task: MlmConfig = field(default_factory=MlmConfig)
    """What is masked."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How weights follow gradients."""
    schedule: ScheduleConfig = field(default_factory=LinearConfig)
    """How the learning rate changes over the run."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest L2 norm of the step's gradient; null: no clipping."""
    engine: EngineConfig = field(default_factory=Zero3Config)
    """What runs the model."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """When the held-out loss is measured."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the run is saved."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """What is recorded."""


Config = PretrainConfig


def main(config: PretrainConfig, *, fresh: bool = False) -> None:
    """Runs, or continues, until ``config.steps``. ``fresh`` sets checkpoints that are there aside and starts at step 0.

    Raises RequeueError, after a checkpoint, where the run was asked to stop.
    """
    with Session(config.output, config.device) as session, StopRequest() as stop:
        for name in ("checkpoints", "metrics.jsonl", "tensorboard") if fresh else ():
            checkpoint.set_aside(config.output / name)
        last = checkpoint.newest(config.output / "checkpoints", aside=True)
        session.step = last.progress.step if last else 0
        run = Run(config, session.device, last)
        if run.start == 0:
            run.evaluate(0)
        with run.saver, run.corpora.loader(run.task) as loader:
            batches = loader.batches(run.start, config.steps)
            for record in train(run.engine, run.task, batches, run.learning_rate, config.clip_norm, stop, run.meter):
                session.step = record.step
                run.writers.step(record)
                at_end = record.step == config.steps
                if due(record.step, config.evaluation.every_steps) or at_end:
                    run.evaluate(record.step)
                if due(record.step, config.checkpoint.every_steps) or at_end or stop.agreed:
                    run.save(record.step)
            run.saver.settle()
        run.writers.close()
        if stop.agreed and session.step < config.steps:
            raise RequeueError(f"stopped on request after step {session.step} of {config.steps}; the same command continues it")


class Run:
    """The parts of one run, made from its settings and, where there is one, the checkpoint that it continues from."""

    def __init__(self, config: PretrainConfig, device: torch.device, last: Checkpoint | None) -> None:
        self._config = config
        dealing = Dealing(**last.progress.fixed["dealing"]) if last else None
        self.corpora = Corpora(config.data, config.steps, config.seed, config.model.layout, dealing)
        self.task = self.corpora.task(config.task, config.seed)
        self._held_out = self.corpora.held_out(config.evaluation.chunks_per_pass) if config.evaluation.every_steps else None
        network = model.build(config.model, self.corpora.tokenizer_folder, config.seed)
        self.corpora.check_positions(network.max_positions)
        if last:
            _check_continues(last, config, network)
        self._identity = _identity(config, network, self.corpora)
        self._fixed = {"dealing": asdict(self.corpora.dealing), "hf_config": model.describe(network)["hf_config"]}
        flops_per_token = model.training_flops_per_token(network, self.corpora.tokens_per_chunk, config.task.mask_rate)
        facts: dict[str, Fact] = {"parameters": sum(p.numel() for p in network.parameters())}
        self.engine: Engine = engine.create(
            config.engine, network, model.parameter_groups(network, config.optimizer.weight_decay), config.optimizer, device
        )
        plan = self.corpora.plan
        self.start = plan.step_at(Cursor(**checkpoint.restore(last, self.engine, self._identity).cursor)) if last else 0
        peak = device_peak(config.metrics, torch.cuda.get_device_name(device) if device.type == "cuda" else None)
        self.meter = Meter(
            config.steps,
            lambda: peak_memory_bytes(device.type),
            flops_per_token,
            peak.tflops * 1e12 * dist.world() if peak else None,
        )
        self.writers = _writers(config, self.corpora, self.start)
        facts |= {
            "ranks": dist.world(),
            "device": device.type,
            "slots": self.corpora.dealing.slot_multiple,
            "waste": self.corpora.waste,
        }
        if peak:
            facts["peak"] = peak.assumption
        self.writers.event(self.start, "start", **facts)
        self._total_samples = plan.samples_before(config.steps)
        self.saver = Saver(config.output / "checkpoints", self.engine, config.checkpoint, self._not_saved)

    def learning_rate(self, step: int) -> float:
        samples = self.corpora.plan.samples_before(step) + 1  # the step's first sample: no step has the rate 0 of the run's end
        return learning_rate(self._config.schedule, self._config.optimizer.learning_rate, samples, self._total_samples)

    def evaluate(self, step: int) -> None:
        """Measures the held-out loss, where the settings ask for it."""
        if self._held_out is None:
            return
        task = self._held_out.task(self.task)
        with self._held_out.loader(task) as loader:
            table = evaluate(self.engine, task, loader.batches(), self._held_out.samples)
        self.writers.evaluation(step, task.summary(table))

    def save(self, step: int) -> None:
        self.writers.flush()  # what a checkpoint stands for must not be lost after it
        cursor = self.corpora.plan.cursor(step)._asdict()
        if self.saver.save(Progress(step, cursor, self._identity, self._fixed)):
            self.writers.event(step, "checkpoint")

    def _not_saved(self, step: int, why: str) -> None:
        self.writers.event(step, "save failed", error=why)


def _identity(config: PretrainConfig, network: MaskedLanguageModel, corpora: Corpora) -> dict[str, str]:
    """What may not change within a run: with any of these changed, going on would be another run."""
    return {
        "seed": str(config.seed),  # first what a user would look for: the digests that follow contain it
        **corpora.identity(),
        **{f"task.{name}": str(value) for name, value in asdict(config.task).items()},
        "model": model.identity(network),
        "optimizer.name": config.optimizer.name,
    }


def _check_continues(last: Checkpoint, config: PretrainConfig, network: MaskedLanguageModel) -> None:
    """Raises CheckpointError for weights of another model, and ConfigError for a run that is already past its last step."""
    shapes = {name: facts["shape"] for name, facts in last.manifest["parameters"].items()}
    stored = {"hf_config": last.progress.fixed["hf_config"], "parameters": shapes}
    difference = model.difference(stored, model.describe(network))
    if difference:
        rule = f"the checkpoint {last.folder} is of another model"
        raise CheckpointError("model", difference, rule, "Use the settings of that run, another output folder, or --fresh.")
    if last.progress.step > config.steps:
        rule = f"the run in {config.output} has taken {last.progress.step} steps already"
        raise ConfigError("steps", config.steps, rule, "Set a larger number, another output folder, or --fresh.")


def _resolved(config: PretrainConfig, corpora: Corpora) -> PretrainConfig:
    """The settings with what the fresh start decided: they give the same run on another number of ranks."""
    slots = replace(config.data.slots, slot_multiple=corpora.dealing.slot_multiple)
    return replace(config, data=replace(config.data, slots=slots))


def _writers(config: PretrainConfig, corpora: Corpora, start: int) -> Writers:
    """The run's folder: how it was set, what it was tokenised with, and what happens in it. Rank 0's alone."""
    error: ScaletrainError | None = None
    try:
        if dist.rank() == 0:
            dump(_resolved(config, corpora), config.output / "config.yaml")
            shutil.copytree(corpora.tokenizer_folder, config.output / "tokenizer", dirs_exist_ok=True)
    except StorageError as failure:
        error = failure
    except OSError as failure:
        error = StorageError(f"output: got {str(config.output)!r}; no tokenizer can be written there: {failure}. Make room")
    dist.raise_together(error, "writing the run's settings")
    if dist.rank() != 0:
        return Writers({})
    return open_writers(config.metrics, config.output, start_step=start, total_steps=config.steps)
