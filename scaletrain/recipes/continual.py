"""A stream of tasks, learned one after the other onto one model: each is trained, evaluated, judged, and published or not."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from scaletrain import dist
from scaletrain.errors import ConfigError
from scaletrain.recipes.onboarding import LineageConfig
from scaletrain.recipes.starting import TaskConfig
from scaletrain.recipes.stream import Stream
from scaletrain.train.control import Session, StopRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class ContinualConfig(LineageConfig):
    """A lineage, and the stream of tasks that it begins with."""

    output: Path
    """The lineage's folder: ledger, versions, the tasks' data, and the pointer to what is published."""
    tasks: Annotated[tuple[TaskConfig, ...], Field(min_length=1)]
    """In the order in which they are learned."""

    def __post_init__(self) -> None:
        LineageConfig.__post_init__(self)  # super() does not know a class with slots
        names = [task.name for task in self.tasks]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ConfigError(f"tasks.{number}.name", name, "another task of the stream has it", "Give each its own name")

    @property
    def lineage(self) -> LineageConfig:
        """The settings without the tasks."""
        return LineageConfig(**{entry.name: getattr(self, entry.name) for entry in fields(LineageConfig)})


Config = ContinualConfig


def main(config: ContinualConfig, *, retry: bool = False, abandon: bool = False) -> dict[str, Any] | None:
    """Runs, or continues, the stream; returns its figures on rank 0.

    Raises RefusedError or UndecidedError where the gate did not accept a candidate and ``on_refusal`` is ``stop``, unless
    ``retry`` lets tasks that were not published be tried again. ``abandon`` gives up what is under way first, such as a task that
    was begun with other settings. Raises RequeueError where it was asked to stop.
    """
    with StopRequest(config.control) as stop, Session(config.output, config.compute.device, stop) as session:
        stream = Stream(config.lineage, config.output, session, stop)
        with stream.held():
            if abandon:
                stream.abandon()
            adopted = stream.adopted()
            names = [*([adopted] if adopted else []), *(task.name for task in config.tasks)]
            stream.check_limits(names)
            stream.look_ahead(config.tasks)
            if adopted is not None:
                stream.onboard(adopted, None)
            for task in config.tasks:
                stream.onboard(task.name, task, retry=retry)
            result = stream.result(names)
        return result if dist.rank() == 0 else None
