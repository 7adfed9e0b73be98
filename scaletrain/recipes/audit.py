"""What a run has consumed, checked against its plan and its checkpoint."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaletrain import checkpoint, outside
from scaletrain.checkpoint import Checkpoint
from scaletrain.data.ledger import DamageConfig, Entry, Ledger
from scaletrain.errors import CorpusError
from scaletrain.train import account
from scaletrain.train.audit import Audit, audit, ranges

LISTED = 20
"""Replaced samples, and faults, that are printed; the account has all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditConfig:
    """Of which run."""

    run: Path
    """The run's folder."""
    chunk: str | None = None
    """Of one chunk, CORPUS:NUMBER, say in which steps it was seen."""


Config = AuditConfig


def main(config: AuditConfig) -> dict[str, Any]:
    """Prints what was seen how often, by attempt; returns the totals. Raises CorpusError where the account is not the plan's."""
    file = config.run / account.FILE
    saved, reached = _reached(config.run)  # first: a run that goes on meanwhile books before it saves
    try:
        result = audit(account.read(file), reached)
    except FileNotFoundError:
        rule = f"a run keeps an account in {account.FILE}"
        raise CorpusError(str(config.run), f"no {account.FILE}", rule, "Name the folder of a pretraining run") from None
    except (ValueError, KeyError, TypeError) as wrong:
        raise CorpusError(str(file), str(wrong), "the rows are those that a run writes", "Restore it from a copy") from None
    result.faults += _against_checkpoint(saved, result.replaced)
    for line in _lines(result):
        print(line)
    if config.chunk is not None:
        print(_history(result, config.chunk))
    if result.faults:
        error = CorpusError(str(file), f"{len(result.faults)} faults", "every step has the plan's samples, each once")
        for fault in result.faults[:LISTED]:
            error.add_note(fault)
        raise error
    return {
        "steps": result.steps,
        "samples": result.samples,
        "replaced": len(result.replaced),
        "taken_again": sum(len(attempt.void) for attempt in result.attempts),
    }


def _reached(run: Path) -> tuple[Checkpoint | None, int]:
    """The newest checkpoint, and how many steps the run is known to have taken, by it or by how it ended."""
    saved = next(iter(checkpoint.find(run / "checkpoints")), None)
    try:
        ended = outside.read_json(run / "exit.json")
    except (OSError, ValueError):
        ended = None
    step = ended.get("step") if isinstance(ended, dict) and ended.get("code") == 0 else 0
    return saved, max(saved.step if saved else 0, step if isinstance(step, int) else 0)


def _against_checkpoint(found: Checkpoint | None, replaced: list[Entry]) -> list[str]:
    """A checkpoint has the same ledger as the account, up to its step."""
    if found is not None:
        ledger = Ledger(DamageConfig())
        ledger.restore(found.progress.state.get("replaced", []))
        if ledger.entries != [entry for entry in replaced if entry.step <= found.step]:
            return [
                f"the checkpoint of step {found.step} says that {len(ledger.entries)} samples were replaced, and which others"
            ]
    return []


def _lines(result: Audit) -> list[str]:
    names = result.names
    lines = [f"{'attempt':<9}{'steps that count':<20}{'taken again':<20}samples of {', '.join(names)}"]
    for number, attempt in enumerate(result.attempts, 1):
        by_corpus = ", ".join(f"{count:,}" for count in attempt.samples)
        lines.append(f"{number:<9}{_ranges(attempt.rows):<20}{_ranges(attempt.void):<20}{by_corpus}")
    for name, times in zip(names, result.seen, strict=True):
        spread = ", ".join(f"{chunks:,} seen {_times(often)}" for often, chunks in sorted(Counter(times.tolist()).items()))
        lines.append(f"{name}: {len(times):,} chunks: {spread}")
    for entry in result.replaced[:LISTED]:
        each = entry.substitution
        lines.append(f"step {entry.step}: {names[each.corpus]}:{each.substitute} for {each.chunk} ({each.reason})")
    if len(result.replaced) > LISTED:
        lines.append(f"and {len(result.replaced) - LISTED} more replaced samples")
    if result.untaken:
        lines.append(f"{result.untaken} of the samples were in steps that changed nothing (not finite, or a spike)")
    if result.passed_over:
        lines.append(f"{result.passed_over} steps were passed over: their samples were not read")
    return lines


def _ranges(steps: Any) -> str:
    found = ranges(steps)
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in found) or "-"


def _times(often: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(often, f"{often} times")


def _history(result: Audit, named: str) -> str:
    """In which steps that count a chunk was seen."""
    name, _, number = named.rpartition(":")
    if name not in result.names or not number.isdecimal() or int(number) >= len(result.seen[result.names.index(name)]):
        rule = f"CORPUS:NUMBER, with one of the corpora {', '.join(result.names)} and a chunk of it"
        raise CorpusError("chunk", named, rule)
    corpus, chunk = result.names.index(name), int(number)
    instead = {(entry.step, entry.substitution.corpus, entry.substitution.chunk): entry for entry in result.replaced}
    said = []
    for step, row in sorted((step, row) for attempt in result.attempts for step, row in attempt.rows.items()):
        picks = result.plan.picks(step - 1)
        there = np.flatnonzero((picks.corpus == corpus) & (picks.chunk == chunk))
        if len(there) and row["samples"]:
            gone = (step, corpus, chunk) in instead
            said.append(f"step {step} (pass {int(picks.corpus_pass[there[0]])}{', replaced' if gone else ''})")
        said += [
            f"step {step} (for {entry.substitution.chunk})"
            for (at, of, _), entry in instead.items()
            if at == step and of == corpus and entry.substitution.substitute == chunk
        ]
    return f"{named}: {', '.join(said) or 'never seen'}"
