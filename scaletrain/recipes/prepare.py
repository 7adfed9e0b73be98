"""``scaletrain prepare``: raw text to a prepared folder, and a short account of what became of it."""

from __future__ import annotations

from typing import Any

from scaletrain.data.prepare import PrepareConfig, prepare

Config = PrepareConfig


def main(config: PrepareConfig, *, fresh: bool = False) -> dict[str, Any]:
    """Prepare ``config.output``, print a summary, return the report. Raises what ``data.prepare.prepare`` raises."""
    report = prepare(config, fresh=fresh)
    print("\n".join(summary(report)))
    return report


def summary(report: dict[str, Any]) -> list[str]:
    """The report in a few lines for people."""
    lines = [f"{report['status']}: {report['output']}  (vocabulary {report['vocab_size']:,}, digest {report['digest'][:12]})"]
    for split, counts in report["splits"].items():
        documents = counts["documents"]
        lost = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in documents["dropped"].items() if count)
        held_out = f", {documents['held_out']:,} held out" if documents["held_out"] else ""
        lines.append(
            f"  {split}: {documents['kept']:,} of {documents['read']:,} documents{held_out}, "
            f"{counts['chunks']:,} chunks, {counts['tokens']:,} tokens" + (f"; dropped: {lost}" if lost else "")
        )
    if "seconds" in report:
        lines.append(f"  {report['seconds']:.1f} s, {report['tokens_per_s']:,.0f} tokens/s tokenised and written")
    return lines
