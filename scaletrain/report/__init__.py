"""A run, a lineage or a folder of data as one HTML file that asks for nothing: data in, text out. No files, no torch.

::

    RunRecord, LineageRecord, SurveyRecord   what is known         filled by the recipe
      run_page, lineage_page, survey_page    what is worth saying  -> Page
        render                               how it looks          -> text of an HTML file
"""

from __future__ import annotations

from scaletrain.report.content import GateRow, Histogram, Judgement, Metric, Page
from scaletrain.report.gate import finding, judgement
from scaletrain.report.histogram import bar_lines, by_power, by_width
from scaletrain.report.lineage import LineageRecord, Summary, Version, lineage_page
from scaletrain.report.page import render
from scaletrain.report.run import Ending, Event, FinalTest, Recorded, RunRecord, run_page, spaced
from scaletrain.report.scale import size
from scaletrain.report.survey import Part, SurveyRecord, survey_page, written

__all__ = [
    "Ending",
    "Event",
    "FinalTest",
    "GateRow",
    "Histogram",
    "Judgement",
    "LineageRecord",
    "Metric",
    "Page",
    "Part",
    "Recorded",
    "RunRecord",
    "Summary",
    "SurveyRecord",
    "Version",
    "bar_lines",
    "by_power",
    "by_width",
    "finding",
    "judgement",
    "lineage_page",
    "render",
    "run_page",
    "size",
    "spaced",
    "survey_page",
    "written",
]
