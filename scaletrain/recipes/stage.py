"""One training run of a classifier: new examples, perhaps old ones beside them, and what methods add to the loss.

Fine-tuning is one stage, a stream is one stage after another. Start a stage again and it continues from its newest checkpoint:
what methods prepare with the weights that the stage starts from (a teacher's logits, an anchor) is computed again, which gives
the same, rather than stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from scaletrain import checkpoint, dist, heartbeat, model
from scaletrain.checkpoint import Checkpoint, CheckpointConfig, Progress, Saver
from scaletrain.continual.method import Active
from scaletrain.data.examples import Examples
from scaletrain.data.plan import CorpusShape, Cursor, PhaseShape, Plan
from scaletrain.data.slots import DealtPlan
from scaletrain.engine import OptimizerConfig
from scaletrain.errors import CheckpointError, ConfigError, CorpusError, RequeueError
from scaletrain.recipes.starting import digest_of
from scaletrain.recipes.student import Named, Student
from scaletrain.train.console import Writers, open_writers
from scaletrain.train.control import Session, StopRequest
from scaletrain.train.guard import Guard, GuardConfig
from scaletrain.train.loop import train
from scaletrain.train.metrics import Meter, MetricsConfig, StepRecord, peak_memory_bytes
from scaletrain.train.schedule import LinearConfig, ScheduleConfig, due, learning_rate
from scaletrain.train.selection import Selection, SelectionConfig

STATE_FOLLOWS = ("name", "betas", "epsilon", "weight_decay")
"""Settings of the optimizer that its state means something under."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """How a classifier is trained."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the new examples."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """New examples per optimizer step, over all ranks; rehearsed ones come on top."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=5e-5, betas=(0.9, 0.999)))
    """How weights follow gradients."""
    schedule: ScheduleConfig = field(default_factory=LinearConfig)
    """How the learning rate changes over the stage."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest L2 norm of the step's gradient; null: no clipping."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What is done about steps that are not finite."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """Which weights the stage ends with, and whether it may stop early."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the stage is saved."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """What is recorded."""


@dataclass(frozen=True, slots=True)
class StageData:
    """What a stage learns from. An example comes with the name of its task."""

    new: Sequence[Named]
    validation: Sequence[Named]
    """What ``selection`` looks at; empty: the stage ends with its last weights."""
    old: Sequence[Named] = ()
    old_per_new: float | None = None
    """Old samples per new one in every step; None: new and old are one pool."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a stage ended with."""

    checkpoint: Checkpoint
    step: int
    """Of the weights that were kept."""
    steps: int
    """Taken in all."""
    score: float | None
    """The best one on the validation split, if there is one."""


class Stage:
    """One stage, from the student as it is: ``run`` trains it, and leaves it with the weights to keep."""

    def __init__(
        self,
        config: StageConfig,
        folder: Path,
        student: Student,
        data: StageData,
        seed: int,
        identity: Mapping[str, str],
    ) -> None:
        """``identity``: what else may not change between start and resume, such as the weights that the stage starts from."""
        if not data.new:
            raise CorpusError("train", 0, "a stage learns from at least one new example", "Give the task examples")
        self._config, self._folder, self._student, self._seed = config, folder, student, seed
        self.corpora, shapes, per_step = _mixture(student, data, config.batch_size)
        self.new = self.corpora[0]
        pool = self.new.chunks  # without a ratio, the new ones are the pool of all
        self.steps = math.ceil(config.epochs * pool / config.batch_size - 1e-9)
        self._plan = Plan(seed, [PhaseShape(shapes, per_step, self.steps)])
        self._dealt = DealtPlan(self._plan, [corpus.lengths for corpus in self.corpora], student.dealing)
        self._dealt.check_world(dist.world(), multiple_follows=student.brings_multiple)
        self._every = config.selection.every_steps or math.ceil(pool / config.batch_size)
        self._validation = student.encode(data.validation) if data.validation else None
        self._identity = {  # first what a user would look for: the digests that follow contain some of it
            "seed": str(seed),
            "training.batch_size": str(config.batch_size),
            # Not the learning rate: a lower one is what a run that diverged is continued with.
            **{f"training.optimizer.{each}": str(getattr(config.optimizer, each)) for each in STATE_FOLLOWS},
            "training.selection.metric": config.selection.metric,
            "training.selection.keep": config.selection.keep,
            **identity,
            "model": model.identity(student.classifier),
            "data": self._plan.digest,
        }
        with heartbeat.section("load"):
            self._last = checkpoint.newest(folder / "checkpoints", aside=True)
        if self._last is not None:
            self._check_continues(self._last)

    def run(self, begin: Callable[[Stage], Active], session: Session, stop: StopRequest) -> Kept:
        """Trains to the end, from where the folder stands; the student is left with the weights to keep.

        ``begin`` is called with the weights that the stage starts from, unless all steps were taken by an earlier start. Raises
        RequeueError, after a checkpoint, where the stage was asked to stop.
        """
        last = self._last
        self._session, self._stop = session, stop
        stop.check()
        active = Active() if last is not None and self._over(last) else begin(self)
        task = replace(
            self._student.task(self.corpora, self._seed),
            further=active.terms,
            cached={name: self._split(rows) for name, rows in active.cached.items()},
        )
        start, selection = self._resume(last)
        session.step = start
        writers = self._writers(start)
        saver = Saver(
            self._folder / "checkpoints",
            self._student.engine,
            self._config.checkpoint,
            lambda step, why: writers.event(step, "save failed", error=why),
            check=session.check,
        )
        if last is not None and not last.progress.state.get("evaluated", True):
            self._evaluate(start, selection, writers)
            self._save(start, selection, saver, writers)
        total, engine = self._plan.samples_before(self.steps), self._student.engine
        meter = Meter(self.steps, lambda: peak_memory_bytes(engine.device.type))

        def attempt(start: int) -> Iterator[StepRecord]:
            end = start if selection.exhausted else self.steps
            batches = self._guard.batches(loader.batches, start, end, self._plan.samples_before)
            rate, clip = (lambda step: self._rate(step, total)), self._config.clip_norm
            return train(engine, task, batches, rate, clip, stop, meter, self._guard, active.penalties)

        def go_back(step: int) -> tuple[int, Mapping[str, Any]] | None:
            with stop.saving(lambda: saver.longest_s):
                saver.wait()
            last = checkpoint.go_back(self._folder / "checkpoints", step, session.check)
            if last is None:
                return None
            progress = checkpoint.restore(last, engine, self._identity)
            selection.restore(progress.state["selection"])
            writers.rewind(progress.step)
            writers.event(progress.step, "rolled back", before=step)
            return progress.step, progress.state["guard"]

        with saver, self._student.loader(self._dealt, task) as loader:
            for record in self._guard.guarded(attempt, start, go_back):
                session.step = record.step
                writers.step(record)
                at_end = record.step == self.steps
                try:
                    best = self._evaluate(record.step, selection, writers) if due(record.step, self._every) or at_end else False
                except RequeueError:
                    self._save(record.step, selection, saver, writers, evaluated=False)
                    self._settle(saver)
                    writers.close()
                    raise
                over = at_end or selection.exhausted
                saves = due(record.step, self._config.checkpoint.every_steps) and not self._guard.in_doubt
                if over or best or stop.agreed or saves:
                    self._save(record.step, selection, saver, writers)
                    if not over and stop.ask():  # a request that came in a save needs no second one
                        break
                if selection.exhausted:
                    break
            self._settle(saver)
        writers.close()
        if stop.agreed and not selection.exhausted and session.step < self.steps:
            raise RequeueError(f"stopped on request after step {session.step} of {self.steps}; the same command continues it")
        return self._keep(selection, session.step)

    def _check_continues(self, last: Checkpoint) -> None:
        """What restoring would find out, before anything is computed or written; and whether the run is past its last step."""
        checkpoint.check_identity(last, self._identity)
        if last.progress.step > self.steps:
            rule = f"the run in {self._folder} has taken {last.progress.step} steps already, and these are {self.steps}"
            raise ConfigError("training.epochs", self._config.epochs, rule, "Set more, another output folder, or --fresh.")

    def _over(self, last: Checkpoint) -> bool:
        selection = Selection.resumed(self._config.selection, last.progress.state["selection"])
        return selection.exhausted or last.progress.step >= self.steps

    def _rate(self, step: int, total: int) -> float:
        samples = self._plan.samples_before(step) + 1
        return learning_rate(self._config.schedule, self._config.optimizer.learning_rate, samples, total)

    def _resume(self, last: Checkpoint | None) -> tuple[int, Selection]:
        self._guard = Guard(self._config.guard, self._names, self._folder)
        if last is None:
            return 0, Selection(self._config.selection)
        with heartbeat.section("load"):
            progress = checkpoint.restore(last, self._student.engine, self._identity)
        self._guard.resume(progress.state.get("guard"), progress.step)
        selection = Selection.resumed(self._config.selection, progress.state["selection"])
        return self._plan.step_at(Cursor(**progress.cursor)), selection

    def _names(self, step: int) -> list[str]:
        """What the samples of a step, counted from 1, are called: their keys."""
        picks = self._plan.picks(step - 1)
        return [self.corpora[c].keys[n] for c, n in zip(picks.corpus.tolist(), picks.chunk.tolist(), strict=True)]

    def _evaluate(self, step: int, selection: Selection, writers: Writers) -> bool:
        """Measures the validation split, if there is one; whether it was the best so far."""
        if self._validation is None:
            return False
        table = self._student.score(self._validation)
        scores = self._student.task([], 0).summary(table)
        writers.evaluation(step, scores)
        return selection.offer(step, scores)

    def _save(self, step: int, selection: Selection, saver: Saver, writers: Writers, *, evaluated: bool = True) -> None:
        """``evaluated``: False where the evaluation that is due at this step was interrupted: a resume begins with it."""
        writers.flush()
        progress = Progress(
            step,
            self._plan.cursor(step)._asdict(),
            self._identity,
            fixed={"dealing": asdict(self._student.dealing)},
            state={"selection": selection.state(), "guard": self._guard.state()} | ({} if evaluated else {"evaluated": False}),
        )
        best = [selection.best_step] if selection.best_step is not None and self._config.selection.keep == "best" else []
        # Without the best, the stage could not end: it stops now, and goes on from the checkpoint before.
        with self._stop.saving(lambda: saver.longest_s):
            begun = saver.save(progress, protected=best, required=best == [step])
        if begun:
            writers.event(step, "checkpoint")

    def _settle(self, saver: Saver) -> None:
        """Waits until the last checkpoint is on the disk."""
        with self._stop.saving(lambda: saver.longest_s):
            saver.settle()

    def _keep(self, selection: Selection, step: int) -> Kept:
        """Goes back to the best weights, where they are what is to be kept."""
        best = selection.best_step if self._config.selection.keep == "best" else None
        wanted = step if best is None else best
        with heartbeat.section("load"):
            kept = checkpoint.of_step(self._folder / "checkpoints", wanted)
        if kept is None:
            rule = f"the best weights are those of step {wanted}, and their checkpoint is gone or damaged"
            remedy = "Restore it from a backup, or start again with --fresh."
            there = dist.broadcast(sorted(each.progress.step for each in checkpoint.find(self._folder / "checkpoints")))
            raise CheckpointError(str(self._folder), there, rule, remedy)
        if wanted != step:
            checkpoint.restore(kept, self._student.engine, self._identity)
        return Kept(kept, wanted, step, selection.best_score)

    def _split(self, rows: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Rows of all samples of the stage, cut into those of each corpus."""
        return np.split(rows, np.cumsum([corpus.chunks for corpus in self.corpora])[:-1])

    def _writers(self, start: int) -> Writers:
        if dist.rank() != 0:
            return Writers({})
        writers = open_writers(self._config.metrics, self._folder, start_step=start, total_steps=self.steps)
        examples = {"new": self.new.chunks, "old": sum(corpus.chunks for corpus in self.corpora[1:])}
        cut = {"truncated": truncated} if (truncated := sum(corpus.truncated for corpus in self.corpora)) else {}
        parameters = sum(math.prod(shard.shape) for shard in self._student.engine.shards())
        writers.event(start, "start", parameters=parameters, ranks=dist.world(), **examples, **cut)
        return writers


def start_dealing(folder: Path) -> dict[str, Any] | None:
    """The rule by which the stage in ``folder`` has dealt its steps so far; None before its first checkpoint. Collective.

    Raises CheckpointError where the checkpoints are not those of a stage.
    """

    def of_newest() -> dict[str, Any] | None:
        found = checkpoint.find(folder / "checkpoints")
        if found and "selection" not in found[0].progress.state:
            raise CheckpointError("output", str(folder), "it holds a run of another kind", "Choose another output folder")
        return dict(found[0].progress.fixed["dealing"]) if found else None

    dealing: dict[str, Any] | None = dist.from_first("reading what the folder holds", of_newest)
    return dealing


def _mixture(student: Student, data: StageData, batch: int) -> tuple[list[Examples], tuple[CorpusShape, ...], int]:
    """The corpora of the plan, their shares, and the samples of a step."""
    if not data.old or data.old_per_new is None:
        pool = student.encode([*data.new, *data.old])
        return [pool], (CorpusShape(pool.digest, pool.chunks),), batch
    new, old = student.encode(data.new), student.encode(data.old)
    rehearsed = max(1, round(batch * data.old_per_new))
    shapes = (CorpusShape(new.digest, new.chunks, batch), CorpusShape(old.digest, old.chunks, rehearsed))
    return [new, old], shapes, batch + rehearsed


def methods_identity(methods: Sequence[Any]) -> str:
    """Digest of the settings of a stream's methods."""
    return digest_of(*(f"{type(method).__name__} {sorted(asdict(method).items())}" for method in methods))
