"""What every test starts from: few threads, no network, and where to find real text.

Tests on several ranks use `tests.ranks`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.faults import table

# Before anything imports torch or tokenizers, which read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets: SCALETRAIN_DATA, or ../shared/data beside the repository."""
    folder = Path(os.environ.get("SCALETRAIN_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}: set SCALETRAIN_DATA to a folder that has them")
    return folder


@pytest.fixture
def fault(record_property: Any) -> table.Add:
    """Adds a row to the table of faults: ``fault(fault="F2", injected=..., outcome=...)``, once it was asserted."""
    return table.adder(record_property)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of faults, where any test added to it."""
    found = table.rows(report for report in terminalreporter.getreports("passed") if report.when == "call")
    if found:
        terminalreporter.section("faults")
        for line in table.lines(found):
            terminalreporter.line(line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped where there is none; torch is imported only if there are such tests."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
