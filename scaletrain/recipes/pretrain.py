"""Pretraining: prepared corpora in, checkpoints of an encoder out. Start it again and it continues."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from scaletrain import checkpoint, dist, engine, heartbeat, model
from scaletrain.checkpoint import Checkpoint, CheckpointConfig, Progress, Saver
from scaletrain.config import dump
from scaletrain.data.loader import Loader
from scaletrain.data.plan import Cursor
from scaletrain.data.slots import Dealing
from scaletrain.engine import Engine, EngineConfig, OptimizerConfig, Zero3Config
from scaletrain.errors import CheckpointError, ConfigError, DataBudgetError, RequeueError, ScaletrainError, StorageError
from scaletrain.model import MaskedLanguageModel, ModelConfig
from scaletrain.recipes.corpora import Corpora, DataConfig
from scaletrain.tasks.mlm import MlmConfig
from scaletrain.train import account
from scaletrain.train.console import Writers, open_writers
from scaletrain.train.control import ControlConfig, Session, StopRequest
from scaletrain.train.evaluate import evaluate
from scaletrain.train.guard import Guard, GuardConfig
from scaletrain.train.loop import train
from scaletrain.train.metrics import Fact, Meter, MetricsConfig, StepRecord, device_peak, peak_memory_bytes
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
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What is done about steps that are not finite."""
    engine: EngineConfig = field(default_factory=Zero3Config)
    """What runs the model."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """When the held-out loss is measured."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the run is saved."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """What is recorded."""
    control: ControlConfig = field(default_factory=ControlConfig)
    """How long the job may run, and when it takes the folder of another one over."""


Config = PretrainConfig


def main(config: PretrainConfig, *, fresh: bool = False, allow_pipe: bool = False) -> None:
    """Runs, or continues, until ``config.steps``. ``fresh`` sets checkpoints that are there aside and starts at step 0.
    ``allow_pipe``: corpora may be commands, which are run.

    Raises RequeueError, after a checkpoint, where the run was asked to stop.
    """
    with StopRequest(config.control) as stop, Session(config.output, config.device, stop) as session:
        for name in ("checkpoints", "metrics.jsonl", "tensorboard", account.FILE, account.RECORD) if fresh else ():
            checkpoint.set_aside(config.output / name)
        with heartbeat.section("load"):
            last = checkpoint.newest(config.output / "checkpoints", aside=True)
            if last is None:
                dist.from_first("looking for checkpoints", lambda: account.require_first(config.output))
        session.step = last.progress.step if last else 0
        run = Run(config, session, stop, last, allow_pipe=allow_pipe)
        stop.check()
        if run.evaluation_is_due:
            run.evaluate(run.start)
            if run.start:
                run.save(run.start)
        with run.saver, run.corpora.loader(run.task) as loader:
            for record in run.records(loader, stop):
                session.step = record.step
                run.writers.step(record)
                run.book(record)
                at_end = record.step == config.steps
                if due(record.step, config.evaluation.every_steps) or at_end:
                    try:
                        run.evaluate(record.step)
                    except RequeueError:
                        run.save(record.step, evaluated=False)
                        run.settle()
                        run.close()
                        raise
                saves = due(record.step, config.checkpoint.every_steps) and not run.guard.in_doubt
                if saves or at_end or stop.agreed:
                    run.save(record.step)
                    if not at_end and stop.ask():  # a request that came in a save needs no second one
                        break
            run.settle()
        run.close()
        if stop.agreed and session.step < config.steps:
            raise RequeueError(f"stopped on request after step {session.step} of {config.steps}; the same command continues it")


class Run:
    """The parts of one run, made from its settings and, where there is one, the checkpoint that it continues from."""

    def __init__(
        self, config: PretrainConfig, session: Session, stop: StopRequest, last: Checkpoint | None, *, allow_pipe: bool
    ) -> None:
        self._config, self._session, self._stop, device = config, session, stop, session.device
        dealing = Dealing(**last.progress.fixed["dealing"]) if last else None
        self.corpora = Corpora(config.data, config.steps, config.seed, config.model.layout, dealing, allow_pipe=allow_pipe)
        self._held_out = self.corpora.held_out(config.evaluation.chunks_per_pass) if config.evaluation.every_steps else None
        pair = config.task.pair != "none"
        network = model.build(config.model, self.corpora.tokenizer_folder, config.seed, pair=pair)
        self.task = self.corpora.task(config.task, config.seed, token_types=network.uses_token_types)
        self.corpora.check_positions(network.max_positions)
        self._identity = _identity(config, network, self.corpora)
        if last:
            _check_continues(last, config, network, self._identity)
        self.evaluation_is_due = last is None or not last.progress.state.get("evaluated", True)
        """Whether the evaluation of the step to start from is still to be done."""
        self._fixed = {"dealing": asdict(self.corpora.dealing), "hf_config": model.describe(network)["hf_config"]}
        flops_per_token = model.training_flops_per_token(network, self.corpora.tokens_per_chunk, config.task.mask_rate)
        facts: dict[str, Fact] = {"parameters": sum(p.numel() for p in network.parameters())}
        self.engine: Engine = engine.create(
            config.engine, network, model.parameter_groups(network, config.optimizer.weight_decay), config.optimizer, device
        )
        plan = self.corpora.plan
        with heartbeat.section("load"):
            self.start = plan.step_at(Cursor(**checkpoint.restore(last, self.engine, self._identity).cursor)) if last else 0
        self.guard = Guard(config.guard, self.corpora.names, config.output)
        if last:
            self.guard.resume(last.progress.state.get("guard"), self.start)
        peak = device_peak(config.metrics, torch.cuda.get_device_name(device) if device.type == "cuda" else None)
        self.meter = Meter(
            config.steps,
            lambda: peak_memory_bytes(device.type),
            flops_per_token,
            peak.tflops * 1e12 * dist.world() if peak else None,
        )
        self.writers = _writers(config, self.corpora, self.start)
        self._account = account.Account(plan, self.corpora.folder_names, config.data.damage, config.output, session.lease)
        self._account.begin(self.start, last.progress.state.get("replaced") if last else None, self.corpora.readable)
        facts |= {
            "ranks": dist.world(),
            "device": device.type,
            "slots": self.corpora.dealing.slot_multiple,
            "waste": self.corpora.waste,
        }
        if peak:
            facts["peak"] = peak.assumption
        self.writers.event(self.start, "start", **facts)
        for corpus in self.corpora.mixture():
            self.writers.event(self.start, "corpus", **corpus)
        self._total_samples = plan.samples_before(config.steps)
        self._noted: int | None = None
        self.saver = Saver(config.output / "checkpoints", self.engine, config.checkpoint, self._not_saved, check=session.check)

    def records(self, loader: Loader, stop: StopRequest) -> Iterator[StepRecord]:
        """Takes the steps that are left, those after a roll-back included."""
        config, samples_before = self._config, self.corpora.plan.samples_before

        def attempt(start: int) -> Iterator[StepRecord]:
            batches = self._account.watch(self.guard.batches(loader.batches, start, config.steps, samples_before))
            return train(self.engine, self.task, batches, self.learning_rate, config.clip_norm, stop, self.meter, self.guard)

        return self.guard.guarded(attempt, self.start, self._go_back)

    def _go_back(self, step: int) -> tuple[int, Mapping[str, Any]] | None:
        with self._stop.saving(lambda: self.saver.longest_s):
            self.saver.wait()
        last = checkpoint.go_back(self._config.output / "checkpoints", step, self._session.check)
        if last is None:
            return None
        progress = checkpoint.restore(last, self.engine, self._identity)
        self.writers.rewind(progress.step)
        self.writers.event(progress.step, "rolled back", before=step)
        self._account.begin(progress.step, progress.state["replaced"])
        return progress.step, progress.state["guard"]

    def learning_rate(self, step: int) -> float:
        samples = self.corpora.plan.samples_before(step) + 1  # the step's first sample: no step has the rate 0 of the run's end
        return learning_rate(self._config.schedule, self._config.optimizer.learning_rate, samples, self._total_samples)

    def evaluate(self, step: int) -> None:
        """Measures the held-out loss, where the settings ask for it."""
        if self._held_out is None:
            return
        task = self._held_out.task(self.task)
        with self._held_out.loader(task) as loader:
            table = evaluate(self.engine, task, loader.batches(), self._held_out.samples, self._stop)
        self.writers.evaluation(step, task.summary(table))

    def book(self, record: StepRecord) -> None:
        """Enters a step into the account. Where more of the data is damaged than may be, saves, and raises DataBudgetError."""
        try:
            self._account.settle(record)
        except DataBudgetError:
            evaluation_is_due = due(record.step, self._config.evaluation.every_steps) or record.step == self._config.steps
            self.save(record.step, evaluated=not evaluation_is_due)
            self.settle()
            raise

    def save(self, step: int, *, evaluated: bool = True) -> None:
        """``evaluated``: False where the evaluation that is due at this step was interrupted: a resume begins with it."""
        self.writers.flush()  # what a checkpoint stands for must not be lost after it
        self._account.flush()
        cursor = self.corpora.plan.cursor(step)._asdict()
        state: dict[str, Any] = {"guard": self.guard.state(), "replaced": self._account.state()}
        state |= {} if evaluated else {"evaluated": False}
        with self._stop.saving(lambda: self.saver.longest_s):
            begun = self.saver.save(Progress(step, cursor, self._identity, self._fixed, state))
        if begun:
            self.writers.event(step, "checkpoint")
        self._note_saved()

    def settle(self) -> None:
        """Waits until the last checkpoint is on the disk."""
        with self._stop.saving(lambda: self.saver.longest_s):
            self.saver.settle()
        self._note_saved()

    def close(self) -> None:
        """Closes the files of the run."""
        self.writers.close()
        self._account.close()

    def _note_saved(self) -> None:
        if self.saver.saved not in (None, self._noted):
            self._noted = self.saver.saved
            self._account.saved(self._noted)

    def _not_saved(self, step: int, why: str) -> None:
        self.writers.event(step, "save failed", error=why)


def _identity(config: PretrainConfig, network: MaskedLanguageModel, corpora: Corpora) -> dict[str, str]:
    """What may not change within a run: with any of these changed, going on would be another run."""
    return {
        "seed": str(config.seed),  # first what a user would look for: the digests that follow contain it
        **corpora.identity(),
        **{f"task.{name}": value for name, value in config.task.identity().items()},
        "model": model.identity(network),
        # Not the learning rate: a lower one is what a run that diverged is continued with.
        **{f"optimizer.{name}": str(getattr(config.optimizer, name)) for name in ("name", "betas", "epsilon", "weight_decay")},
    }


def _check_continues(last: Checkpoint, config: PretrainConfig, network: MaskedLanguageModel, identity: Mapping[str, str]) -> None:
    """Raises CheckpointError for a checkpoint of another run, and ConfigError for a run that is already past its last step."""
    shapes = {name: facts["shape"] for name, facts in last.manifest["parameters"].items()}
    stored = {"hf_config": last.progress.fixed["hf_config"], "parameters": shapes}
    difference = model.difference(stored, model.describe(network))
    if difference:
        rule = f"the checkpoint {last.folder} is of another model"
        error = CheckpointError("model", difference, rule, "Use the settings of that run, another output folder, or --fresh.")
        for what, said in checkpoint.differences(last, identity).items():
            if what != "model":
                error.add_note(said)
        raise error
    checkpoint.check_identity(last, identity)
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
            (config.output / "tokenizer").mkdir(exist_ok=True)
            for file in filter(Path.is_file, corpora.tokenizer_folder.iterdir()):
                shutil.copyfile(file, config.output / "tokenizer" / file.name)  # not its mode: the run's files are private
    except StorageError as failure:
        error = failure
    except OSError as failure:
        error = StorageError(f"output: got {str(config.output)!r}; no tokenizer can be written there: {failure}. Make room")
    dist.raise_together(error, "writing the run's settings")
    if dist.rank() != 0:
        return Writers({})
    return open_writers(config.metrics, config.output, start_step=start, total_steps=config.steps)
