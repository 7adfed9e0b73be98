"""What a run has consumed, to the sample: kept in the run's folder as it happens, and the ledger of what was replaced.

``consumed.jsonl`` is only ever added to. A resume, or a roll-back, says from which step it goes on; the steps after that which an
earlier attempt took are void from then on, and still on record. `scaletrain inspect audit` checks the file against the plan.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from scaletrain import dist, durable
from scaletrain.data.ledger import DamageConfig, Entry, Ledger, Substitution, samples_of
from scaletrain.data.loader import Batch
from scaletrain.data.plan import Plan
from scaletrain.errors import CheckpointError, DataBudgetError, LeaseLostError, StorageError
from scaletrain.lease import Lease
from scaletrain.train.metrics import StepRecord

FILE = "consumed.jsonl"
RECORD = "damaged.json"
NAMED = 3
"""Files that a message names; the record has all."""
LOOKED_AT = 100
"""Samples that are tried again at a start, of those that were replaced last."""


class Account:
    """Of one run. All methods are called by all ranks; the first one writes."""

    def __init__(self, plan: Plan, names: Sequence[str], config: DamageConfig, folder: Path, lease: Lease | None = None) -> None:
        """``names``: what the plan's corpora are called. ``folder``: of the run. ``lease``: of that folder, on rank 0.

        Collective. Raises StorageError where the file cannot be opened.
        """
        self._plan, self._names, self._folder, self._lease = plan, list(names), folder, lease
        self.ledger = Ledger(config)
        self._mine: dict[int, tuple[Substitution, ...]] = {}
        self._lines, error = None, None
        try:
            self._lines = _Lines(folder / FILE) if dist.rank() == 0 else None
        except OSError as failure:
            error = StorageError(f"{folder / FILE}: it cannot be opened ({failure.strerror}). Move it away, or use --fresh")
        dist.raise_together(error, "opening the run's account")

    def begin(
        self, step: int, state: Sequence[Sequence[Any]] | None, readable: Callable[[Substitution], bool] | None = None
    ) -> None:
        """The run goes on after ``step`` steps, with the ledger of the checkpoint's ``state``. Collective.

        ``readable``: whether what could not be read can be by now. Raises DataBudgetError where it cannot, and the ledger has
        more than the settings allow: else starting again and again would get through any budget.
        """
        self.ledger.restore(state or [])
        self._mine.clear()
        exceeded = self.ledger.exceeded(self._plan.samples_before(step))
        if exceeded and readable:
            dist.from_first("looking at what could not be read", lambda: self._require_mended(exceeded, readable))
        if self._lines:
            (self._folder / RECORD).unlink(missing_ok=True)  # of a stop that is over
        self._write({"kind": "begin", "step": step, "corpora": self._names, "plan": self._plan.described()})

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; what was replaced in them is remembered until ``settle``."""
        for batch in batches:
            if batch.substitutions:
                self._mine[batch.step] = batch.substitutions
            yield batch

    def settle(self, record: StepRecord) -> None:
        """Books a step. Collective where anything was replaced in it.

        Raises DataBudgetError, on all ranks alike, where that is more than the settings allow.
        """
        step, before = record.step, self._plan.samples_before(record.step - 1)
        mine = self._mine.pop(step - 1, ())
        if record.substituted:
            gathered = dist.gather([list(astuple(each)) for each in mine])
            replaced = [Substitution(*each) for rank in gathered for each in rank]
            entries = [Entry(step, sample, each) for sample, each in samples_of(replaced, self._plan.picks(step - 1), before)]
            self.ledger.add(entries)
            for entry in sorted(entries, key=lambda entry: entry.sample):
                self._write({"kind": "replaced", "step": step, "sample": entry.sample, **asdict(entry.substitution)})
        passed_over = record.skipped is not None and not record.rounds
        facts: dict[str, Any] = {"samples": 0 if passed_over else record.samples - before, "digest": record.digest}
        self._write({"kind": "step", "step": step, **facts} | ({"skipped": record.skipped} if record.skipped else {}))
        exceeded = self.ledger.exceeded(record.samples) if record.substituted else None
        if exceeded:
            raise self._error(exceeded)

    def _require_mended(self, exceeded: str, readable: Callable[[Substitution], bool]) -> None:
        for entry in self.ledger.entries[-LOOKED_AT:]:
            if not readable(entry.substitution):
                raise self._error(exceeded)

    def saved(self, step: int) -> None:
        """The checkpoint of ``step`` is on the disk."""
        self._write({"kind": "saved", "step": step})

    def flush(self) -> None:
        """What a checkpoint stands for must not be lost after it."""
        if self._lines:
            self._lines.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._lines:
            self._lines.close()

    def state(self) -> list[list[Any]]:
        """For a checkpoint: the ledger."""
        return self.ledger.state()

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._lines and self._holds():
            self._lines.write({**row, "lease": self._lease.token if self._lease else 0})

    def _holds(self) -> bool:
        """Whether the folder is still this job's. Where it is not, the next save ends the job, for all ranks together."""
        try:
            if self._lease:
                self._lease.check()
        except LeaseLostError:
            return False
        return True

    def _error(self, exceeded: str) -> DataBudgetError:
        reasons: dict[str, list[str]] = {}  # by what is before the first colon: the file
        for entry in self.ledger.entries:
            reasons.setdefault(entry.substitution.reason.split(": ")[0], []).append(entry.substitution.reason)
        if dist.rank() == 0:
            rows = [{"step": entry.step, "sample": entry.sample, **asdict(entry.substitution)} for entry in self.ledger.entries]
            record = {
                "exceeded": exceeded,
                "corpora": self._names,
                "files": {file: len(those) for file, those in reasons.items()},
                "replaced": rows,
            }
            try:
                durable.write(self._folder / RECORD, json.dumps(record, indent=1).encode())
            except OSError as error:  # the run ends all the same, and for its own reason
                warnings.warn(f"{self._folder / RECORD} could not be written: {error}", stacklevel=3)
        frequent = sorted(reasons.values(), key=len, reverse=True)
        named = "; ".join(f"{len(those)} as {those[-1]}" for those in frequent[:NAMED])
        more = f"; and {len(frequent) - NAMED} other files" if len(frequent) > NAMED else ""
        return DataBudgetError(
            f"{exceeded}. {named}{more}. {RECORD} has all of them. "
            "Restore the shards from a copy, or raise the budget; the same command goes on from here"
        )


def require_first(folder: Path) -> None:
    """Raises CheckpointError where the account says that the run in ``folder`` was saved: for a run that found no checkpoint.

    Going back to step 0 because a folder was deleted, or is not mounted, is for the user to say.
    """
    saved = [row["step"] for row in read(folder / FILE) if row["kind"] == "saved"] if (folder / FILE).exists() else []
    if saved:
        rule = f"the run's {FILE} says that step {max(saved)} was saved there"
        remedy = "Mount or restore the folder, or start again with --fresh."
        raise CheckpointError(str(folder / "checkpoints"), "no checkpoint", rule, remedy)


def read(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of an account in order; a line that a kill has torn is passed over: what it said has no effect, and is void."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("kind"), str) and isinstance(row.get("step"), int):
                yield row


class _Lines:
    """A file that rows are added to. Where it cannot be written, rows wait: a full disk is the checkpoints' trouble to report."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._waiting, self._warned = file, b"", False
        self._number = durable.own(str(file), os.O_RDWR | os.O_CREAT | os.O_APPEND)
        size = os.fstat(self._number).st_size
        if size and os.pread(self._number, 1, size - 1) != b"\n":
            self._waiting = b"\n"  # after a line that a kill has torn

    def write(self, row: Mapping[str, Any]) -> None:
        self._waiting += json.dumps(row).encode() + b"\n"
        self._put()

    def _put(self) -> None:
        try:
            written = os.write(self._number, self._waiting)
        except OSError as error:
            if not self._warned:
                warnings.warn(f"{self._file} cannot be written, its rows wait: {error}", stacklevel=4)
            self._warned = True
            return
        self._waiting = self._waiting[written:]

    def flush(self) -> None:
        self._put()
        try:
            os.fsync(self._number)
        except OSError as error:
            warnings.warn(f"{self._file} cannot be flushed: {error}", stacklevel=3)

    def close(self) -> None:
        if self._number >= 0:
            self.flush()
            os.close(self._number)
            self._number = -1
