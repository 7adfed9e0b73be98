"""What a lineage has been through: its ledger, for people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaletrain.continual.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryConfig:
    """Whose."""

    lineage: Path
    """The lineage's folder."""


Config = HistoryConfig


def main(config: HistoryConfig) -> dict[str, Any]:
    """Prints a line per entry of the ledger; returns what is published and how many versions there are."""
    store = Store(config.lineage)
    store.check()
    entries = store.entries()
    for entry in entries:
        print(f"{entry['at']}  {entry['event']:<11} {entry.get('version') or '':<24} {_facts(entry)}".rstrip())
    return {"published": store.published(), "versions": sum(entry["event"] == "evaluated" for entry in entries)}


def _facts(entry: dict[str, Any]) -> str:
    match entry["event"]:
        case "begun":
            return f"on {entry['base'] or 'the encoder'}"
        case "trained":
            return f"{entry['steps']} steps"
        case "evaluated":
            return "  ".join(f"{task} {score:.4f}" for task, score in zip(entry["tasks"], entry["row"], strict=True))
        case "judged":
            return str(entry["verdict"]["decision"])
        case _:
            return str(entry.get("reason", ""))
