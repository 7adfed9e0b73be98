"""Kills at random moments: is anything ever lost, or resumed wrongly, and where do kills strike?

::

    python tools/bench/kills.py [--kills N] [--zero3 N] [--seed N] [--smoke]

3,000 kills of the commit protocol by a fast driver without torch, and 50 of two ranks of real ZeRO-3 that save after every
step. The last line is one JSON object: ``table`` has how the processes ended (waitpid) and a histogram of what the killed ones
were at. ``--smoke``: 30 and 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: ranks are forked, and take turns on the cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=3000, metavar="N", help="of the protocol; default 3000")
    parser.add_argument("--zero3", type=int, default=50, metavar="N", help="of real ZeRO-3; default 50")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--smoke", action="store_true", help="does it still run?")
    options = parser.parse_args(argv)
    protocol, zero3 = (30, 2) if options.smoke else (options.kills, options.zero3)
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="scaletrain-bench-") as folder:
        # First what forks by itself: the other one imports torch.
        from tests.faults import random_kills

        began = time.monotonic()
        fast = random_kills.run(protocol, options.seed, Path(folder, "protocol"), said_every(100, protocol))
        table["protocol"] = fast.to_json() | {"seconds": round(time.monotonic() - began, 1)}
        from tests.faults import zero3_kills

        began = time.monotonic()
        slow = zero3_kills.run(zero3, options.seed, Path(folder, "zero3"), said_every(5, zero3))
        table["zero3"] = slow.to_json() | {"seconds": round(time.monotonic() - began, 1)}
    checks = {
        "protocol: lost or wrong resumes": {"value": len(fast.wrong), "target": "0"},
        "protocol: share of kills in a save": {"value": table["protocol"]["in a save"], "target": ">= 0.3"},
        "zero3: lost or wrong resumes": {"value": len(slow.wrong), "target": "0"},
        "zero3: share of kills in a save": {"value": table["zero3"]["in a save"], "target": ">= 0.3"},
    }
    command = " ".join(["python", "tools/bench/kills.py", *sys.argv[1:]])
    machine = {"cores": len(os.sched_getaffinity(0)), "load_after": os.getloadavg()[0]}
    result = {"bench": "kills", "smoke": options.smoke, "checks": checks, "table": table}
    print(json.dumps({**result, "command": command, "machine": machine}), flush=True)
    return 1 if fast.wrong or slow.wrong else 0


def said_every(number: int, of: int) -> Any:
    """Prints how far it is, every so many kills."""

    def say(tally: Any) -> None:
        if tally.kills % number == 0 or tally.kills == of:
            print(f"{tally.kills} of {of} kills, wrong: {len(tally.wrong)}", flush=True)

    return say


if __name__ == "__main__":
    sys.exit(main())
