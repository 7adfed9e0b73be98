"""Every file under configs/ can be used as it stands by the verb that its folder is named after."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from scaletrain import config
from scaletrain.cli import VERBS
from scaletrain.launcher import LaunchConfig
from scaletrain.recipes.starting import TaskConfig

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT / "configs")))
def test_a_config_decodes_into_the_settings_of_its_verb(file: Path) -> None:
    verb = file.relative_to(ROOT / "configs").parts[0]
    others = {"launch": LaunchConfig, "task": TaskConfig}
    cls = others[verb] if verb in others else importlib.import_module(VERBS[verb].module).Config
    assert isinstance(config.load(cls, file), cls)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT / "configs")))
def test_a_config_says_what_it_is_for(file: Path) -> None:
    assert file.read_text().startswith("# ")


def test_nothing_else_lies_among_the_configs() -> None:
    assert [path for path in (ROOT / "configs").rglob("*") if path.is_file() and path.suffix != ".yaml"] == []
