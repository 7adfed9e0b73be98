"""A run or a lineage as one HTML file that asks for nothing: data in, text out. It reads no run's files and knows no torch.

::

    RunRecord, LineageRecord   what is known         filled by the recipe
      run_page, lineage_page   what is worth saying  -> Page
        render                 how it looks          -> text of an HTML file
"""

from __future__ import annotations

from scaletrain.report.content import GateRow, Judgement, Metric, Page
from scaletrain.report.gate import finding, judgement
from scaletrain.report.lineage import LineageRecord, Summary, Version, lineage_page
from scaletrain.report.page import render
from scaletrain.report.run import Ending, Event, FinalTest, Recorded, RunRecord, run_page

__all__ = [
    "Ending",
    "Event",
    "FinalTest",
    "GateRow",
    "Judgement",
    "LineageRecord",
    "Metric",
    "Page",
    "Recorded",
    "RunRecord",
    "Summary",
    "Version",
    "finding",
    "judgement",
    "lineage_page",
    "render",
    "run_page",
]
