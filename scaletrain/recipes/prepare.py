"""``scaletrain prepare``: raw text to a prepared folder, and a short account of what became of it."""

from __future__ import annotations

from typing import Any

from scaletrain.data import parts
from scaletrain.data.prepare import PrepareConfig, prepare
from scaletrain.errors import ConfigError

Config = PrepareConfig


def main(config: PrepareConfig, *, fresh: bool = False, merge: bool = False, part: str | None = None) -> dict[str, Any]:
    """Prepare ``config.output``, or a part of it, print a summary, return the report.

    Raises what ``data.prepare.prepare`` and ``data.parts`` raise.
    """
    if merge and part is not None:
        raise ConfigError("--part", part, "a part is prepared or parts are merged, not both", "Leave out --part or --merge")
    if part is not None:
        report = parts.prepare_part(config, parts.Part.parse(part), fresh=fresh)
    else:
        report = parts.merge(config, fresh=fresh) if merge else prepare(config, fresh=fresh)
    print("\n".join(summary(report)))
    return report


def summary(report: dict[str, Any]) -> list[str]:
    """The report in a few lines for people."""
    speed = f"  {report['seconds']:.1f} s, {report['tokens_per_s']:,.0f} tokens/s" if "seconds" in report else ""
    if "part" in report:
        return [f"{report['status']}: {report['part']} of {report['output']}, {report['tokens']:,} tokens", speed]
    lines = [f"{report['status']}: {report['output']}  (vocabulary {report['vocab_size']:,}, digest {report['digest'][:12]})"]
    for split, counts in report["splits"].items():
        documents = counts["documents"]
        held_out = f", {documents['held_out']:,} held out" if documents["held_out"] else ""
        lines.append(
            f"  {split}: {documents['kept']:,} of {documents['read']:,} documents{held_out}, "
            f"{counts['chunks']:,} chunks, {counts['tokens']:,} tokens"
        )
    lines += _dropped({split: counts["documents"]["dropped"] for split, counts in report["splits"].items()})
    return [*lines, f"{speed} tokenised and written"] if speed else lines


def _dropped(splits: dict[str, dict[str, int]]) -> list[str]:
    """A table of the reasons why documents were not used, those that occurred."""
    reasons = [reason for reason in splits["train"] if any(counts[reason] for counts in splits.values())]
    if not reasons:
        return []
    head = "  dropped (each in dropped.jsonl)".ljust(34) + "".join(f"{split:>16}" for split in splits)
    rows = (
        f"    {reason.replace('_', ' '):<30}" + "".join(f"{counts[reason]:>16,}" for counts in splits.values())
        for reason in reasons
    )
    return [head, *rows]
