"""The quickstart for several seeds: does what it shows a newcomer hold whatever the seed, and how long does it take?

::

    python tools/bench/quickstart.py [--seeds N] [--work DIR] [--smoke]

Every seed is a whole `scaletrain quickstart` in a folder of its own. ``--smoke`` is one seed on one rank, and a few steps, which
say nothing about learning. The last line is one JSON object: ``checks`` are the figures with a target, the worst of
all seeds, ``table`` has the result of every seed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ("steps=6", "epochs=0.2", "ranks=1")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="1 to N; default 3")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the runs here; default: a folder that is removed")
    parser.add_argument("--smoke", action="store_true", help="does it still run?")
    options = parser.parse_args(argv)
    settings = SMOKE if options.smoke else ()
    with tempfile.TemporaryDirectory(prefix="scaletrain-bench-") as folder:
        work = options.work or Path(folder)
        table = []
        for seed in range(1, 2 if options.smoke else options.seeds + 1):
            table.append({"seed": seed, **run(work / f"seed-{seed}", [f"seed={seed}", *settings])})
            print(json.dumps(table[-1]), flush=True)
    command = " ".join(["python", "tools/bench/quickstart.py", *sys.argv[1:]])
    machine = {"cores": len(os.sched_getaffinity(0)), "load_after": os.getloadavg()[0]}
    result = {"bench": "quickstart", "smoke": options.smoke, "checks": checks(table), "table": table}
    print(json.dumps({**result, "command": command, "machine": machine}), flush=True)
    return 0


def run(output: Path, settings: Sequence[str]) -> dict[str, Any]:
    """What a quickstart said last. Raises CalledProcessError, with its output printed, where it failed."""
    command = [sys.executable, "-m", "scaletrain", "quickstart", f"output={output}", *settings]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, command)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def checks(table: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The worst seed's figure for everything that is to hold for all. Pure."""
    seeds = len(table)
    return {
        "forgetting, protected / naive": {
            "value": max(row["protected"]["forgetting"] / max(1e-9, row["naive"]["forgetting"]) for row in table),
            "target": "<= 0.5",
        },
        "seeds whose naive stream is refused": {
            "value": sum(row["naive"]["gate"] == "refused" for row in table),
            "target": f">= {seeds}",
        },
        "seeds whose protected stream is published": {
            "value": sum(row["protected"]["gate"] == "published" for row in table),
            "target": f">= {seeds}",
        },
        "held-out loss - unigram entropy (nats)": {
            "value": max(row["mlm_eval_loss_last"] - row["unigram_entropy"] for row in table),
            "target": "<= 0",
        },
        "fine-tuned accuracy - majority": {
            "value": min(row["finetune_accuracy"] - row["majority_baseline"] for row in table),
            "target": ">= 0.3",
        },
        "exported - original, largest difference of a logit": {
            "value": max(row["export_max_abs_diff"] for row in table),
            "target": "<= 1e-5",
        },
        "seconds": {"value": max(row["seconds"] for row in table), "target": "<= 360"},
    }


if __name__ == "__main__":
    sys.exit(main())
