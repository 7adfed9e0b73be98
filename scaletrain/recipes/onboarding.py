"""What the phases of an onboarding do: train a candidate on a task, consolidate, evaluate, and fill the folder of its version."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from scaletrain import checkpoint, dist, durable, model
from scaletrain.checkpoint import Piece
from scaletrain.continual.gate import GateConfig
from scaletrain.continual.lifecycle import Attempt
from scaletrain.continual.memory import Remembered, load_memory, save_memory
from scaletrain.continual.method import Active, Beginning, Ending, Past, Penalty, Rehearsal, State, Term
from scaletrain.continual.methods import MethodConfig, check_together
from scaletrain.continual.store import Store
from scaletrain.data.collate import Slot
from scaletrain.data.freeze import thaw
from scaletrain.data.slots import Dealing
from scaletrain.engine import Shard
from scaletrain.model import Block, Classifier, ClassifierConfig
from scaletrain.recipes.stage import Kept, Stage, StageConfig, StageData, methods_identity, start_dealing
from scaletrain.recipes.starting import model_folder, named, open_start, write_model
from scaletrain.recipes.student import ComputeConfig, Learning, Named, Student
from scaletrain.tasks.classification import Scenario
from scaletrain.train.control import ControlConfig, Session, StopRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class LineageConfig:
    """What all tasks of a lineage have in common."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Of the heads' first weights, the order, dropout, and the hashes that choose examples."""
    model: ClassifierConfig
    """What the first task starts from. A fine-tuning run is taken over as the first version."""
    scenario: Scenario = "class"
    """`class`: any label of any task may be the answer. `task`: the task is known. `domain`: all tasks have the same labels."""
    training: StageConfig = field(default_factory=StageConfig)
    """How every task is learned."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """What runs it."""
    methods: tuple[MethodConfig, ...] = ()
    """What is done against forgetting, together; empty: nothing."""
    gate: GateConfig | None = field(default_factory=GateConfig)
    """What a candidate must show to be published; null: every candidate is."""
    on_refusal: Literal["stop", "continue"] = "stop"
    """`continue`: the next task of a stream builds on the candidate that was not published."""
    control: ControlConfig = field(default_factory=ControlConfig)
    """How long a job may run, and when it takes the lineage of another one over."""

    def __post_init__(self) -> None:
        check_together(self.methods)


class Onboarding:
    """One attempt. Its methods are collective; what they compute follows from the attempt and the lineage alone."""

    def __init__(
        self, config: LineageConfig, store: Store, attempt: Attempt, session: Session, stop: StopRequest, *, adopted: bool = False
    ) -> None:
        """``adopted``: the model that the lineage starts from has learned the task already, and is taken as it is."""
        self._config, self._store, self._attempt, self._adopted = config, store, attempt, adopted
        self._session, self._stop = session, stop

        def learned() -> list[str]:
            if attempt.base is None:
                return []
            store.verify(attempt.base)  # it need not be the one that is published, which is always verified
            return list(store.evaluation(attempt.base)["tasks"])

        self._learned: list[str] = dist.from_first("reading the version to build on", learned)
        self._data = {task: thaw(store.task_folder(task)) for task in [*self._learned, attempt.task]}
        self._folder = store.work_folder(attempt.version)
        self._memory: Sequence[Remembered] = load_memory(store.version_folder(attempt.base)) if attempt.base else ()
        self._ready: tuple[Student, Stage | None, Kept | None] | None = None

    def train(self) -> dict[str, Any]:
        _, _, kept = self._trained()
        return {"step": 0, "steps": 0} if kept is None else {"step": kept.step, "steps": kept.steps, "validation": kept.score}

    def build(self, folder: Path) -> dict[str, Any]:
        student, _, kept = self._trained()
        new = named(self._attempt.task, self._data[self._attempt.task].splits["train"])
        self._consolidate(student, new, folder / "state")
        evaluation = self._evaluate(student)
        memory: Sequence[Remembered] = self._memory
        for method in self._config.methods:
            memory = method.remember(memory, self._attempt.task, [example for _, example in new])

        def write() -> None:
            facts = {"version": self._attempt.version, "task": self._attempt.task, "base": self._attempt.base}
            if kept is None:
                start = model_folder(Path(self._config.model.start))
                assert start is not None, "only a model folder can be adopted"
                model.copy_model(start, folder / "model")
            else:
                write_model(folder / "model", student.classifier, kept.checkpoint, student.tokenizer_folder, facts)
            save_memory(folder, memory)
            durable.write(folder / "evaluation.json", json.dumps(evaluation).encode())

        dist.from_first("writing a version", write)
        accuracy = [evaluation["test"][task]["accuracy"] for task in evaluation["tasks"]]
        return {"tasks": evaluation["tasks"], "row": accuracy, "remembered": len(memory)}

    def close(self) -> None:
        """Lets go of the model."""
        if self._ready is not None:
            self._ready[0].engine.close()
        self._ready = None
        gc.collect()  # engines are full of cycles, and the next stage needs the memory

    def _trained(self) -> tuple[Student, Stage | None, Kept | None]:
        """The student as its stage left it: trained now, or brought back from the stage's checkpoints."""
        if self._ready is None:
            rehearsal = self._rehearsal()
            student = self._student(rehearsal)
            if self._adopted:
                self._ready = student, None, None
            else:
                stage = self._stage(student, rehearsal)
                self._ready = student, stage, stage.run(lambda stage: self._begin(student, stage), self._session, self._stop)
        return self._ready

    def _student(self, rehearsal: Rehearsal | None) -> Student:
        config, base = self._config, self._attempt.base
        afresh = rehearsal is not None and rehearsal.afresh
        learned = {self._attempt.task, *(task for task, _ in (rehearsal.examples if rehearsal else ()))}
        start = config.model if base is None or afresh else config.model.starting_at(self._store.version_folder(base) / "model")
        origin = open_start(start)
        classifier = origin.classifier
        if (base is None and not self._adopted) or afresh:
            classifier.drop_blocks()
        self._grow(classifier)
        # What no sample competes among is not pulled back either.
        idle = [n for n, each in enumerate(classifier.head.blocks) if config.scenario == "task" and each.task not in learned]
        dealing = start_dealing(self._folder)
        return Student(
            config.compute,
            origin,
            self._session.device,
            scenario=config.scenario,
            learning=Learning(config.training.optimizer, config.model.head_learning_rate_factor, idle),
            dealing=Dealing(**dealing) if dealing else None,
            stop=self._stop,
        )

    def _grow(self, classifier: Classifier) -> None:
        """Gives the classifier the blocks that it does not have yet."""
        known = {block.task for block in classifier.head.blocks}
        for task, data in self._data.items():
            shared = self._config.scenario == "domain" and classifier.head.blocks
            if task not in known and not shared:
                model.grow(classifier, Block(task, data.labels), self._config.seed)

    def _rehearsal(self) -> Rehearsal | None:
        past = Past(
            tuple(self._learned),
            lambda: [pair for task in self._learned for pair in named(task, self._data[task].splits["train"])],
            self._memory,
        )
        found = [rehearsal for method in self._config.methods if (rehearsal := method.rehearse(past)) is not None]
        return found[0] if found else None

    def _stage(self, student: Student, rehearsal: Rehearsal | None) -> Stage:
        validation = [pair for task, data in self._data.items() for pair in named(task, data.splits["validation"])]
        new = named(self._attempt.task, self._data[self._attempt.task].splits["train"])
        data = StageData(new, validation)
        if rehearsal is not None:
            data = StageData(new, validation, rehearsal.examples, rehearsal.per_new)
        identity = {
            "model.start": student.start_digest,
            "attempt": self._attempt.digest,
            "methods": methods_identity(self._config.methods),
        }
        return Stage(self._config.training, self._folder, student, data, self._config.seed, identity)

    # ----------------------------------------------------------------------------------------------------------- the methods

    def _begin(self, student: Student, stage: Stage) -> Active:
        rows: list[NDArray[np.float32]] = []

        def teacher() -> NDArray[np.float32]:
            if not rows:
                rows.append(np.concatenate([student.logits(corpus) for corpus in stage.corpora]))
            return rows[0]

        ends = np.cumsum([len(block.labels) for block in student.blocks])
        blocks = [slice(int(end) - len(block.labels), int(end)) for block, end in zip(student.blocks, ends, strict=True)]
        old = [columns for columns, block in zip(blocks, student.blocks, strict=True) if block.task in self._learned]
        together, has_state = self._config.scenario != "task", self._attempt.base is not None
        beginning = Beginning(student.engine, teacher, tuple(old), together, self._state(student), has_state)
        parts = [method.begin(beginning) for method in self._config.methods]
        terms: dict[str, Term] = {name: term for part in parts for name, term in part.terms.items()}
        penalties: tuple[Penalty, ...] = tuple(penalty for part in parts for penalty in part.penalties)
        return Active(terms, penalties, {name: rows for part in parts for name, rows in part.cached.items()})

    def _consolidate(self, student: Student, new: Sequence[Named], folder: Path) -> None:
        examples = student.encode(new)

        def loss(outputs: Tensor, slot: Slot) -> Tensor:
            self._stop.check()  # a pass over the gradients of single samples is long; what it has summed is dropped
            return student.loss(outputs, slot)

        self._stop.check()
        ending = Ending(
            student.engine,
            slots=lambda count: student.singles(examples, count, self._config.seed),
            loss=loss,
            samples=lambda count: min(count, examples.chunks),
            state=self._state(student),
        )
        shards = {shard.name: shard for shard in student.engine.shards()}
        for method in self._config.methods:
            for part, pieces in method.consolidate(ending).items():
                placed = {name: Piece(shards[name].shape, shards[name].start, value) for name, value in pieces.items()}
                checkpoint.write_state(folder, part, placed)

    def _state(self, student: Student) -> State:
        """What the base version's methods stored, read whole at the first question for a part: reading is collective."""
        parts: dict[str, dict[str, Tensor]] = {}

        def read(part: str) -> dict[str, Tensor]:
            if self._attempt.base is None:
                return {}
            folder = self._store.version_folder(self._attempt.base) / "state"
            stored = checkpoint.state_shapes(folder, part)
            mine = {
                shard.name: Piece(shard.shape, shard.start, torch.zeros_like(shard.weight))
                for shard in student.engine.shards()
                if shard.name in stored
            }
            if stored:
                checkpoint.read_state(folder, part, mine)
            return {name: piece.values for name, piece in mine.items()}

        def state(part: str, shard: Shard) -> Tensor:
            if part not in parts:
                parts[part] = read(part)
            return parts[part].get(shard.name, torch.zeros_like(shard.weight))

        return state

    def _evaluate(self, student: Student) -> dict[str, Any]:
        """Scores on the test split of every task so far, and what was right on the gate's."""
        tests, outcomes = {}, {}
        task = student.task([], 0)
        for name, data in self._data.items():
            tests[name] = task.summary(student.score(student.encode(named(name, data.splits["test"]))))
            gate = data.splits["gate"]
            if gate:  # also where no gate asks: one that is set later compares with this
                table = student.score(student.encode(named(name, gate)))
                right = table[:, 1] == table[:, 2]
                outcomes[name] = {example.key: bool(each) for example, each in zip(gate, right, strict=True)}
        return {"tasks": list(self._data), "test": tests, "gate": outcomes}
