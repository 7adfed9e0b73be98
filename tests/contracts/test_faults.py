"""Every fault that a run must survive is injected by some test, which adds its row to the table of faults."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
NUMBER = re.compile(r"""["'](F\d+)["']""")

FAULTS = {
    "F1": "a rank is killed at any boundary of a save",
    "F2": "a file of a checkpoint is cut, zeroed or has a flipped bit",
    "F3": "a disk is full or fails, on one rank, in a save",
    "F4": "the pointer to the newest checkpoint is missing or wrong",
    "F5": "ranks see different checkpoints",
    "F6": "there is no checkpoint where one was",
    "F7": "a rank dies",
    "F8": "a host is lost",
    "F9": "a request to stop, at any moment, to one rank",
    "F10": "a rank hangs",
    "F11": "a save takes longer than a collective may",
    "F12": "clocks and names are wrong",
    "F13": "another number of ranks, another engine",
    "F14": "resumed twice, saved right after a resume, at the last step",
    "F15": "the loss or the gradient is not finite, or a spike",
    "F16": "data that is damaged or missing",
    "F17": "storage that stalls or fails for a while",
    "F18": "what a killed run leaves behind",
    "F19": "two jobs in one folder",
    "F20": "resumed with other settings",
    "F22": "a kill or a failure while old checkpoints go",
}
"""Not in it: silent errors of a GPU (F21)."""


def test_every_fault_has_a_row() -> None:
    text = "\n".join(file.read_text() for folder in ("faults", "behaviour", "system") for file in (TESTS / folder).glob("*.py"))
    assert set(FAULTS) - set(NUMBER.findall(text)) == set()
