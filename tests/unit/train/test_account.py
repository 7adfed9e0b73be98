"""The account of a run: what is written when, and what an audit makes of rows that others wrote."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from scaletrain.data.ledger import DamageConfig, digest_of_sum, sample_digest
from scaletrain.data.plan import CorpusShape, PhaseShape, Plan
from scaletrain.errors import StorageError
from scaletrain.train import account
from scaletrain.train.account import Account
from scaletrain.train.audit import audit

PLAN = Plan(1, [PhaseShape((CorpusShape("a", 50),), 10, 40)])


def begin(step: int, lease: int = 1) -> dict[str, Any]:
    return {"kind": "begin", "step": step, "corpora": ["a"], "plan": PLAN.described(), "lease": lease}


def taken(first: int, last: int, lease: int = 1) -> list[dict[str, Any]]:
    digests = {step: digest_of_sum(sample_digest(["a"], PLAN.picks(step - 1))) for step in range(first, last + 1)}
    return [{"kind": "step", "step": step, "samples": 10, "digest": digest, "lease": lease} for step, digest in digests.items()]


def test_what_a_resume_takes_again_counts_once() -> None:
    result = audit([begin(0), *taken(1, 7), begin(4), *taken(5, 12)])
    assert result.faults == [] and (result.steps, result.samples) == (12, 120)
    assert [(sorted(each.rows)[-1], each.void, each.samples.tolist()) for each in result.attempts] == [
        (4, [5, 6, 7], [40]),
        (12, [], [80]),
    ]


def test_rows_of_a_job_that_lost_the_folder_do_not_count() -> None:
    rows = [begin(0, 1), *taken(1, 4, 1), begin(2, 2), *taken(3, 4, 2), *taken(5, 6, 1), *taken(5, 8, 2)]
    assert audit(rows).faults == []


@pytest.mark.parametrize(("reached", "fault"), [(12, []), (14, ["no record of steps 13 to 14"])])
def test_an_account_reaches_as_far_as_the_run(reached: int, fault: list[str]) -> None:
    assert audit([begin(0), *taken(1, 12)], reached).faults == fault


def test_a_row_that_says_what_was_saved_is_a_witness() -> None:
    rows = [begin(0), *taken(1, 9), {"kind": "saved", "step": 10, "lease": 1}]
    assert audit(rows).faults == ["no record of step 10"]
    assert audit([*rows, begin(9), *taken(10, 10)]).faults == []  # the save was lost, and with it what it said


def test_an_audit_takes_time_in_proportion_to_the_steps() -> None:
    plan = Plan(1, [PhaseShape((CorpusShape("a", 50),), 1, 20_000)])
    rows = [begin(0) | {"plan": plan.described()}]
    rows += [{"kind": "step", "step": step, "samples": 0, "digest": "", "skipped": "passed over"} for step in range(1, 20_001)]
    result = audit([row | {"lease": 1} for row in rows])
    assert (result.faults, result.passed_over) == ([], 20_000)


def test_rows_wait_for_a_disk_and_are_there_before_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Account(PLAN, ["a"], DamageConfig(), tmp_path)
    write = os.write

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.warns(UserWarning, match="its rows wait"):
        book.begin(0, None)
        book.saved(3)
    assert (tmp_path / account.FILE).read_bytes() == b""
    monkeypatch.setattr(os, "write", write)
    book.flush()
    assert [row["kind"] for row in account.read(tmp_path / account.FILE)] == ["begin", "saved"]
    book.close()


def test_a_line_that_a_kill_has_torn_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / account.FILE).write_bytes(b'{"kind": "step", "st')
    book = Account(PLAN, ["a"], DamageConfig(), tmp_path)
    book.begin(0, None)
    book.close()
    assert [row["kind"] for row in account.read(tmp_path / account.FILE)] == ["begin"]


def test_a_file_that_is_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / account.FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match=r"consumed\.jsonl: it cannot be opened"):
        Account(PLAN, ["a"], DamageConfig(), tmp_path)
    assert not (tmp_path / "elsewhere").exists()
