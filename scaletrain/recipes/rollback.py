"""Back to a version that was published before: one pointer changes, nothing is deleted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaletrain.continual.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackConfig:
    """Of which lineage, and to which version."""

    lineage: Path
    """The lineage's folder."""
    version: str | None = None
    """A version that was published before, as `history` names it; empty: the one before what is published now."""


Config = RollbackConfig


def main(config: RollbackConfig) -> dict[str, Any]:
    """Rolls back; returns what is published now. Raises InputError while an onboarding is under way in another process."""
    store = Store(config.lineage)
    store.check()
    with store.hold():
        return {"published": store.rollback(config.version)}
