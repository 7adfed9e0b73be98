"""The loop. Pretraining, fine-tuning and continual learning are this loop with other parts around it.

It is a generator of records: whoever runs it decides between two steps what is due. Nothing here knows about ranks: the engine
sums over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from scaletrain import heartbeat
from scaletrain.data.ledger import digest_of_sum
from scaletrain.data.loader import Batch
from scaletrain.engine import Engine, Shard
from scaletrain.train.control import StopRequest
from scaletrain.train.guard import Guard
from scaletrain.train.metrics import Meter, StepRecord, StepTotals


class Learner(Protocol):
    """What a task says of a slot: the sums that its loss is made of."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Term -> its weight in the loss."""

    def terms(self, outputs: Any, slot: Any) -> Mapping[str, Tensor]:
        """Term -> scalar sum over the slot; divided later by the term's count over the whole step."""


class Penalty(Protocol):
    """A part of the loss that is a function of the weights alone: it is added on the shards, without a gather or a graph."""

    @property
    def name(self) -> str:
        """Under which its value is recorded, beside the terms of the task."""

    def apply(self, shards: Iterable[Shard]) -> Tensor:
        """Adds its gradient to the shards' in place; returns this rank's part of its value, a float64 scalar."""


def train(
    engine: Engine,
    task: Learner,
    batches: Iterable[Batch],
    learning_rate: Callable[[int], float],
    max_norm: float | None,
    stop: StopRequest,
    meter: Meter,
    guard: Guard,
    penalties: Sequence[Penalty] = (),
) -> Iterator[StepRecord]:
    """One record per step taken; ends with the batches, or after the step in which any rank was asked to stop (``stop.agreed``).

    ``learning_rate`` is a function of the number of the step, counted from 0. A step that ``guard`` finds fault with changes
    nothing; raises DivergedError, on all ranks, where it finds too many.
    """
    names = list(task.weights)
    meter.begin()
    for batch, failure in attempts(batches):
        totals = engine.begin(batch.rounds if batch else (), _header(batch, names, stop), failure)
        assert batch is not None, "begin raises for a failure"
        stop.agreed = totals["stop"] > 0
        sums = torch.zeros(len(names), dtype=torch.float64, device=engine.device)
        for slot in batch.slots:
            terms = task.terms(engine.forward(slot), slot)
            loss = torch.stack([task.weights[t] * terms[t] / max(1.0, totals[f"count {t}"]) for t in names]).sum()
            with heartbeat.section("backward"):
                engine.backward(loss)
            sums += torch.stack([terms[t].detach() for t in names]).double()
        values = [penalty.apply(engine.shards()).reshape(1).to(sums) for penalty in penalties]
        norm, sums = engine.clip(max_norm, torch.cat([sums, *values]))
        losses = {t: float(value) / max(1.0, totals[f"count {t}"]) for t, value in zip(names, sums, strict=False)}
        added = {penalty.name: float(value) for penalty, value in zip(penalties, sums[len(names) :], strict=True)}
        total = sum(task.weights[t] * losses[t] for t in names) + sum(added.values())
        skipped, rate = guard.judge(batch.step + 1, total, norm), learning_rate(batch.step)
        if skipped is None:
            with heartbeat.section("step"):
                engine.step(rate)
        yield meter.record(
            StepTotals(
                step=batch.step + 1,
                samples=batch.samples_after,
                real_tokens=int(totals["real tokens"]),
                padded_tokens=int(totals["padded tokens"]),
                rounds=len(batch.rounds),
                filler_share=batch.fillers / max(1.0, totals["slots"]),
                digest=digest_of_sum(totals["digest"]),
                substituted=int(totals["substituted"]),
                retried=int(totals["retried"]),
            ),
            loss=total,
            terms=losses | added,
            learning_rate=rate,
            gradient_norm=norm,
            wait_s=batch.wait_s,
            skipped=skipped,
        )
        guard.check()
        if stop.agreed:
            return
        meter.begin()  # what was done between two steps, such as an evaluation, belongs to neither


def attempts(batches: Iterable[Batch]) -> Iterator[tuple[Batch | None, Exception | None]]:
    """Batches, or at the end what stood in the way of one: to be told to the other ranks, which wait for this one."""
    stream = iter(batches)
    while True:
        try:
            with heartbeat.section("data"):
                batch = next(stream)
        except StopIteration:
            return
        except Exception as failure:
            yield None, failure
            return
        yield batch, None


def _header(batch: Batch | None, names: Sequence[str], stop: StopRequest) -> dict[str, float]:
    """What the ranks tell each other at the start of a step."""
    batch = batch or Batch(0, (), {}, 0, 0, 0, 0)
    return {
        **{f"count {name}": float(batch.counts.get(name, 0)) for name in names},
        "real tokens": float(batch.real_tokens),
        "padded tokens": float(batch.padded_tokens),
        "slots": float(len(batch.slots)),
        "digest": float(batch.digest),
        "substituted": float(len(batch.substitutions)),
        "retried": float(batch.retried),
        "stop": float(stop.requested),
    }
