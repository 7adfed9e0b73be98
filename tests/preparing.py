"""A small reproducible corpus, and ``scaletrain prepare`` on it: as a call, as a process, and killed."""

from __future__ import annotations

import gzip
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scaletrain import config
from scaletrain.data.prepare import PrepareConfig

WORDS = [
    "".join(letters)
    for letters in zip(*[iter("lorem ipsum dolor sit amet consectetur adipiscing".replace(" ", ""))] * 3, strict=False)
]


def document(number: int) -> str:
    """Reproducible prose of 5 to 120 words; every tenth document repeats another one."""
    chosen = random.Random(number - 7 if number % 10 == 9 else number)
    return " ".join(chosen.choice(WORDS) + chosen.choice(WORDS) for _ in range(chosen.randint(5, 120)))


def write_corpus(folder: Path, documents: int = 2000) -> Path:
    """So many documents, one a line."""
    file = folder / "corpus.txt.gz"
    file.write_bytes(gzip.compress("\n".join(map(document, range(documents))).encode()))
    return file


def settings(corpus: Path, output: Path, **changes: Any) -> PrepareConfig:
    """A configuration around the corpus, with some settings replaced."""
    tree: dict[str, Any] = {
        "source": {"name": "text", "paths": [str(corpus)], "document": "line"},
        "validation_fraction": 0.1,
        "tokenizer": {"name": "wordpiece", "vocab_size": 400},
        "max_tokens": 32,
        "chunks_per_shard": 150,
        "processes": 1,
    }
    return config.decode(PrepareConfig, tree | {"output": str(output)} | changes)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a prepared folder but the report, which has times in it."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "report.json"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def run_cli(
    tmp_path: Path, settings: PrepareConfig, *flags: str, start: tuple[str, ...] = ("-m", "scaletrain")
) -> subprocess.Popen[str]:
    """``scaletrain prepare`` as a process of its own."""
    config.dump(settings, tmp_path / "prepare.yaml")
    command = [sys.executable, *start, "prepare", "--config", str(tmp_path / "prepare.yaml"), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fails(tmp_path: Path, settings: PrepareConfig, *flags: str) -> tuple[int, str]:
    """Exit code and last line of the error output."""
    process = run_cli(tmp_path, settings, *flags)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors.strip().splitlines()[-1]


def descendants(parent: int) -> set[int]:
    """The processes below ``parent``."""
    below = {int(pid) for file in Path(f"/proc/{parent}/task").glob("*/children") for pid in file.read_text().split()}
    return below.union(*(descendants(pid) for pid in below))


def wait_until_gone(processes: set[int]) -> set[int]:
    """Those that are still there after ten seconds; dead ones that nobody has waited for do not count."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(alive(pid) for pid in processes):
        time.sleep(0.05)
    return {pid for pid in processes if alive(pid)}


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
