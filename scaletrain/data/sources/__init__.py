"""Where raw text comes from: one file per kind, each a frozen config with ``documents() -> Iterator[str]``.

To add a kind, write a file with a config dataclass whose ``name`` is a new literal, and list it here. ``documents`` gives the raw
text of one document after another, always in the same order; it raises CorpusError for what is missing or cannot be read.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from scaletrain.data.sources.hub import HubConfig
from scaletrain.data.sources.jsonl import JsonlConfig
from scaletrain.data.sources.parquet import ParquetConfig
from scaletrain.data.sources.stdlib import StdlibConfig
from scaletrain.data.sources.text import TextConfig
from scaletrain.data.sources.webdataset import WebdatasetConfig

SourceConfig = Annotated[
    StdlibConfig | TextConfig | JsonlConfig | ParquetConfig | HubConfig | WebdatasetConfig, Field(discriminator="name")
]

__all__ = ["HubConfig", "JsonlConfig", "ParquetConfig", "SourceConfig", "StdlibConfig", "TextConfig", "WebdatasetConfig"]
