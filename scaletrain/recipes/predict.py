"""Labels for texts, from a file or from standard input, in batches: a JSON object a line."""

from __future__ import annotations

import difflib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from scaletrain import dist, durable
from scaletrain.data import tables
from scaletrain.data.examples import Encoder
from scaletrain.data.plan import Picks
from scaletrain.data.sources.files import read_lines
from scaletrain.data.tables import ColumnsConfig, Example
from scaletrain.errors import CorpusError, StorageError
from scaletrain.recipes.evaluate import chosen_block
from scaletrain.recipes.starting import open_classifier
from scaletrain.recipes.student import frame_of
from scaletrain.tasks.classification import Classification, Scenario, visible_columns


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig:
    """Which classifier, and the texts."""

    model: str
    """A model folder, a fine-tuning run, or a lineage, which stands for its published model."""
    input: Path | None = None
    """A .txt file (a text a line), or a table as a task's data is; empty: standard input, a text a line."""
    output: Path | None = None
    """A file to write, whole or not at all; empty: standard output, a batch at a time."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """Which column of a table holds what; a label is not needed."""
    lines: Literal["text", "json"] = "text"
    """What a line of standard input is: a text, or a JSON object with the columns."""
    task: str | None = None
    """With `scenario: task`: the task that the texts are of; may be empty where the model knows one only."""
    scenario: Scenario = "class"
    """`class`: any label of any task may be the answer. `task`: those of the task only."""
    top: Annotated[int, Field(ge=1)] = 1
    """How many labels to give, the most probable first."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Texts that are computed, and answered, together."""
    max_tokens: Annotated[int, Field(ge=3)] = 128
    """Longer texts are cut to so many tokens."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where there is a GPU."""


Config = PredictConfig


def main(config: PredictConfig) -> None:
    """Answers every text, in order. Raises CorpusError at a row without a text, with nothing said of its batch."""
    predictor = Predictor(config)
    with ExitStack() as stack:
        out = sys.stdout if config.output is None else stack.enter_context(_written(config.output))
        texts = _texts(config)
        while batch := list(itertools.islice(texts, config.batch_size)):
            for answer in predictor.answers(batch):
                print(json.dumps(answer, ensure_ascii=False), file=out)
            out.flush()


class Predictor:
    """A classifier in one process, without an engine: it only ever looks ahead."""

    def __init__(self, config: PredictConfig) -> None:
        origin = open_classifier(config.model)
        self._config = config
        self._device = dist.device(config.device)
        self._classifier = origin.classifier.eval().to(self._device)
        self.blocks = self._classifier.head.blocks
        several = len(self.blocks) > 1
        self._labels = [(block.task, label) if several else ("", label) for block in self.blocks for label in block.labels]
        self._task = self.blocks.index(chosen_block(self.blocks, config.task)) if config.scenario == "task" else 0
        self._visible = visible_columns(config.scenario, [len(block.labels) for block in self.blocks])
        self._encoder = Encoder(origin.tokenizer_folder, min(config.max_tokens, self._classifier.max_positions))
        self._frame = frame_of(origin.tokenizer_folder, self._classifier)

    def answers(self, texts: Sequence[tuple[str, str | None]]) -> Iterator[dict[str, Any]]:
        """For each (text, pair): ``label``, ``probability``, of several tasks ``task``; with ``top`` above 1, ``others``."""
        unlabelled = [Example(str(place), text, pair, "") for place, (text, pair) in enumerate(texts)]
        column = int(np.argmax(self._visible[self._task]))
        examples = self._encoder.encode(unlabelled, lambda _: column, self._task)
        task = Classification([examples], self._visible, self._frame, 0)
        places = np.arange(len(texts))
        picks = Picks(np.zeros(len(texts), np.int16), np.zeros(len(texts), np.int64), places)
        slot = task.collate(0, 0, picks, [examples.read(int(place)) for place in places])
        with torch.no_grad():
            outputs = self._classifier(**{name: value.to(self._device) for name, value in slot.inputs.items()})
        hidden = torch.from_numpy(~self._visible[self._task]).to(outputs.device)
        chances = outputs.float().masked_fill(hidden, -torch.inf).softmax(-1).cpu()
        best = chances.topk(min(self._config.top, int(self._visible[self._task].sum())))
        for text, values, columns in zip(texts, best.values.tolist(), best.indices.tolist(), strict=True):
            first, *others = [self._said(column, value) for column, value in zip(columns, values, strict=True)]
            yield {"text": text[0], **({"pair": text[1]} if text[1] is not None else {}), **first} | (
                {"others": others} if self._config.top > 1 else {}
            )

    def _said(self, column: int, probability: float) -> dict[str, Any]:
        task, label = self._labels[column]
        return {"label": label, **({"task": task} if task else {}), "probability": round(probability, 6)}


def _texts(config: PredictConfig) -> Iterator[tuple[str, str | None]]:
    """(text, pair) of every row."""
    if config.input is not None and not config.input.name.endswith(".txt"):
        yield from (_text(row, where, config.columns) for where, row in tables.rows(config.input))
        return
    for number, line in _standard_input() if config.input is None else read_lines(config.input):
        where = f"{config.input or 'standard input'}, line {number}"
        if config.input is None and config.lines == "json":
            yield _text(_object(line, where), where, config.columns)
        else:
            yield _text({config.columns.text: line}, where, ColumnsConfig(text=config.columns.text))


def _standard_input() -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end). As bytes: how a terminal decodes them is a setting of the machine."""
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield number, line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            found = line[error.start : error.start + 8]
            raise CorpusError(f"standard input, line {number}", found, "text is UTF-8", "Convert it to UTF-8") from None


def _object(line: str, where: str) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorpusError(where, line[:40], f"it is not valid JSON ({error})", "Give an object a line, or lines=text") from None
    if not isinstance(found, dict):
        raise CorpusError(where, line[:40], "a line is a JSON object", 'Write {"text": ...}, or use lines=text')
    return found


def _text(row: Mapping[str, Any], where: str, columns: ColumnsConfig) -> tuple[str, str | None]:
    def value(role: str, column: str) -> str:
        if column not in row:
            close = difflib.get_close_matches(column, list(row), n=1, cutoff=0.5)
            remedy = f"Set columns.{role} to {close[0]!r}" if close else f"Set columns.{role} to one of them"
            raise CorpusError(where, f"columns {', '.join(row)}", f"there is no column {column!r} (columns.{role})", remedy)
        found = row[column]
        if not isinstance(found, str) or not found.strip() or not _is_unicode(found):
            raise CorpusError(where, found, f"the column {column!r} holds a text to label", "Write one, or leave the row out")
        return found

    return value("text", columns.text), None if columns.pair is None else value("pair", columns.pair)


def _is_unicode(text: str) -> bool:
    r"""JSON can spell half a character (``"\ud800"``), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _written(path: Path) -> Iterator[IO[str]]:
    """A file that takes the place of ``path`` once it is whole. What is there may be the input."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="utf-8", opener=durable.own) as out:
            yield out
        durable.sync(partial)
        partial.replace(path)
        durable.sync(path.parent)
    except OSError as error:
        raise StorageError(f"output: got {str(path)!r}; it cannot be written ({error.strerror}). Choose another file") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
