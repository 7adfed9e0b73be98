"""One more task onto the published model of a lineage, with the lineage's settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaletrain import config as configuration
from scaletrain import dist
from scaletrain.continual.store import Store
from scaletrain.recipes.onboarding import LineageConfig
from scaletrain.recipes.starting import TaskConfig
from scaletrain.recipes.stream import Stream
from scaletrain.train.control import Session, StopRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class OnboardConfig:
    """Which task, and onto which lineage; how it is learned is in the lineage's own config.yaml."""

    lineage: Path
    """The lineage's folder, as `continual` calls it `output`."""
    task: Path
    """A YAML file with the task: `name` and `data`."""

    @property
    def output(self) -> Path:
        """Where exit.json goes."""
        return self.lineage


Config = OnboardConfig


def main(config: OnboardConfig, *, retry: bool = False, abandon: bool = False) -> dict[str, Any] | None:
    """Onboards the task, or continues to; returns how it ended, on rank 0. Raises what `continual` raises."""
    Store(config.lineage).check()
    settings = configuration.load(LineageConfig, config.lineage / "config.yaml", ())
    task = configuration.load(TaskConfig, config.task, ())
    with StopRequest(settings.control) as stop, Session(config.lineage, settings.compute.device, stop) as session:
        stream = Stream(settings, config.lineage, session, stop)
        with stream.held():
            if abandon:
                stream.abandon()
            stream.look_ahead([task])
            event = stream.onboard(task.name, task, retry=retry)
            result = {"task": task.name, "outcome": event, **stream.standing()}
        return result if dist.rank() == 0 else None
