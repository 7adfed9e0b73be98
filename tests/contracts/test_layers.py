"""Imports point down only: read from the source, so that one inside a function or under TYPE_CHECKING counts too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

ROWS = (
    {"errors", "durable", "heartbeat", "outside"},
    {"commit", "config", "dist", "lease"},
    {"engine", "data", "model"},
    {"checkpoint"},
    {"train", "tasks", "export", "launcher", "report"},
    {"continual"},
    {"recipes"},
    {"cli"},
    {"__main__"},
)
"""From the bottom up. A part may import those of lower rows, and not its neighbours."""
HEIGHT = {part: height for height, row in enumerate(ROWS) for part in row}
ONLY = {"launcher": {"config", "errors", "heartbeat", "lease", "outside"}, "commit": {"durable", "errors", "outside"}}
"""Parts that may import less than the rows below them: a launcher runs on login nodes, where there is no torch, and what decides
whether a checkpoint exists is bytes and JSON alone."""

Edges = Mapping[str, set[str]]


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for file in sorted((ROOT / "scaletrain").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(source: str) -> Iterator[tuple[str, str | None]]:
    """(module, name) of every import statement, wherever it stands; name is None for ``import module``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)


def edges(sources: Mapping[str, str]) -> Edges:
    """Module -> modules of the package that it imports."""
    found: dict[str, set[str]] = {}
    for module, source in sources.items():
        targets = {f"{base}.{name}" if f"{base}.{name}" in sources else base for base, name in imported(source)}
        found[module] = {target for target in targets if target.split(".")[0] == "scaletrain"} - {module}
    return found


def part(module: str) -> str:
    """The part that a module belongs to; the package itself is its own."""
    return module.split(".")[1] if "." in module else module


def breaches(graph: Edges) -> list[str]:
    """Every arrow that does not point down."""
    found = []
    for module, targets in graph.items():
        for target in sorted(targets):
            here, there = part(module), part(target)
            if here == there or there == "scaletrain":
                continue
            if here not in HEIGHT or there not in HEIGHT or HEIGHT[there] >= HEIGHT[here] or there not in ONLY.get(here, {there}):
                found.append(f"{module} imports {target}")
    return found


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {name: file.read_text() for name, file in modules().items()}


def test_every_part_has_its_row(sources: dict[str, str]) -> None:
    assert {part(module) for module in sources if "." in module} - set(HEIGHT) == set()


def test_no_import_points_up_or_sideways(sources: dict[str, str]) -> None:
    assert breaches(edges(sources)) == []


def test_no_modules_import_each_other_in_a_ring(sources: dict[str, str]) -> None:
    try:
        TopologicalSorter(edges(sources)).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_package_itself_imports_nothing_of_its_own(sources: dict[str, str]) -> None:
    assert edges(sources)["scaletrain"] == set()


def test_imports_are_absolute(sources: dict[str, str]) -> None:
    assert [module for module, source in sources.items() for base, _ in imported(source) if base.startswith(".")] == []


@pytest.mark.parametrize(
    ("module", "source", "breach"),
    [
        ("scaletrain.train.loop", "from scaletrain.recipes import pretrain", "scaletrain.train.loop imports scaletrain.recipes"),
        (
            "scaletrain.train.loop",
            "def f():\n    from scaletrain.tasks import mlm",
            "scaletrain.train.loop imports scaletrain.tasks",
        ),
        (
            "scaletrain.data.plan",
            "if TYPE_CHECKING:\n    import scaletrain.engine.base",
            "scaletrain.data.plan imports scaletrain.engine.base",
        ),
        ("scaletrain.launcher.local", "from scaletrain import dist", "scaletrain.launcher.local imports scaletrain.dist"),
        ("scaletrain.novelty", "from scaletrain import errors", "scaletrain.novelty imports scaletrain.errors"),
    ],
)
def test_a_breach_is_seen(module: str, source: str, breach: str) -> None:
    known = dict.fromkeys(("scaletrain.dist", "scaletrain.errors", "scaletrain.engine.base"), "")
    assert breaches(edges({**known, module: source})) == [breach]


def test_only_the_zero_engines_import_deepspeed(sources: dict[str, str]) -> None:
    users = {module for module, source in sources.items() for base, _ in imported(source) if base.split(".")[0] == "deepspeed"}
    # The last is a program of its own, which no module imports.
    assert {m for m in users if not m.startswith("scaletrain.engine.zero")} == {"scaletrain.recipes.unpickle_deepspeed"}


def test_only_dist_reads_the_rank_variables(sources: dict[str, str]) -> None:
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    users = {
        module
        for module, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and node.value in names
    }
    # The launcher's plan writes what dist reads.
    assert users - {"scaletrain.dist", "scaletrain.launcher.plan"} == set()


def test_the_command_line_the_launcher_and_the_commit_come_without_torch() -> None:
    parts = "scaletrain.cli, scaletrain.commit, scaletrain.launcher"
    code = f"import sys, {parts}; scaletrain.cli._top_parser().format_help(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    heavy = {"torch", "deepspeed", "transformers", "datasets", "tokenizers", "pyarrow", "pandas", "numpy", "tensorboard"}
    assert heavy & set(loaded) == set()
