"""The command line that scripts hold on to: its verbs, their flags, and how each kind of end is told."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import scaletrain
from scaletrain import cli, config
from scaletrain.errors import RequeueError, StorageError
from scaletrain.launcher import LaunchConfig

ROOT = Path(__file__).resolve().parents[2]

VERBS = {
    "prepare": {"fresh", "merge"},
    "index": set(),
    "pretrain": {"fresh"},
    "finetune": {"fresh"},
    "evaluate": set(),
    "predict": set(),
    "continual": {"retry", "abandon"},
    "onboard": {"retry", "abandon"},
    "history": set(),
    "rollback": set(),
    "report": set(),
    "inspect data": set(),
    "inspect audit": set(),
    "export": set(),
    "import-deepspeed": {"trust"},
    "quickstart": set(),
}


def settings_below(cls: type) -> Iterator[type]:
    """``cls`` and every dataclass that its settings hold."""
    yield cls
    for hint in config.hints_of(cls).values():
        for member in (*config.members(hint), *cli._items(hint)):
            yield from settings_below(member)


def config_of(verb: str) -> type:
    return LaunchConfig if verb == "launch" else importlib.import_module(cli.VERBS[verb].module).Config


def test_the_verbs_and_their_permissions() -> None:
    assert {name: set(verb.permissions) for name, verb in cli.VERBS.items()} == VERBS


def test_what_is_permitted_for_every_start_of_a_job() -> None:
    assert {name: set(verb.lasting) for name, verb in cli.VERBS.items() if verb.lasting} == {"pretrain": {"allow_pipe"}}


def test_the_verbs_that_run_on_several_ranks() -> None:
    assert {name for name, verb in cli.VERBS.items() if verb.ranks} == {
        *("pretrain", "finetune", "evaluate", "continual", "onboard")
    }


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_takes_its_permissions_and_only_those(verb: str) -> None:
    _settings, *rest = inspect.signature(importlib.import_module(cli.VERBS[verb].module).main).parameters.values()
    sliced = {"part": None} if cli.VERBS[verb].slices else {}
    assert {parameter.name: parameter.default for parameter in rest} == dict.fromkeys(
        (*VERBS[verb], *cli.VERBS[verb].lasting), False
    ) | sliced


def test_the_verbs_whose_work_can_be_split_over_machines() -> None:
    assert {name for name, verb in cli.VERBS.items() if verb.slices} == {"prepare"}


@pytest.mark.parametrize("verb", [*VERBS, "launch"])
def test_every_setting_is_explained(verb: str) -> None:
    silent = [
        f"{cls.__name__}.{name}"
        for cls in settings_below(config_of(verb))
        for name in config.hints_of(cls)
        if name != "name" and not cli.docstrings(cls).get(name)
    ]
    assert silent == []


# --- how a verb ends, with one of our own


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the verb below."""

    size: int = 3
    """How large."""


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Makes a function the ``main`` of a verb called ``try``."""

    def install(function: Callable[..., Any]) -> None:
        monkeypatch.setitem(sys.modules, "verb_of_this_test", SimpleNamespace(Config=Settings, main=function))
        table = {"try": cli.Verb(module="verb_of_this_test", summary="", permissions={"fresh": "x"}, embedded=True)}
        monkeypatch.setattr(cli, "VERBS", table)

    return install


def raises(error: BaseException) -> Callable[..., None]:
    def main(settings: Settings, *, fresh: bool) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (StorageError("disk full"), 74, "error: disk full\n"),
        (RequeueError("stopped at step 3"), 75, "error: stopped at step 3\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_of_ours_is_one_line_and_its_exit_code(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    verb(raises(error))
    assert cli.main(["try"]) == code
    assert capsys.readouterr() == ("", said)


def test_any_other_error_is_a_traceback_and_70(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    verb(raises(KeyError("x")))
    assert cli.main(["try"]) == 70
    assert capsys.readouterr().err.startswith("Traceback (most recent call last)")


def test_debug_shows_where_an_error_of_ours_was_raised(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    verb(raises(StorageError("disk full")))
    assert cli.main(["try", "--debug"]) == 74
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith("error: disk full\n")


@pytest.mark.parametrize(("result", "code", "shown"), [(None, 0, ""), (7, 7, ""), ({"loss": 1.5}, 0, '{"loss": 1.5}\n')])
def test_a_result_is_an_exit_code_or_one_line_of_json(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str], result: Any, code: int, shown: str
) -> None:
    verb(lambda settings, *, fresh: result)
    assert cli.main(["try"]) == code
    assert capsys.readouterr() == (shown, "")


def test_settings_and_permissions_arrive_in_any_order(verb: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("size: 4\n")
    seen: list[Any] = []
    verb(lambda settings, *, fresh: seen.append((settings, fresh)))
    assert cli.main(["--local_rank=1", "try", "--fresh", "--config", str(tmp_path / "x.yaml")]) == 0
    assert cli.main(["try", "size=5", "--config", str(tmp_path / "x.yaml"), "--local_rank=0"]) == 0
    assert seen == [(Settings(size=4), True), (Settings(size=5), False)]


def test_the_help_of_a_verb_shows_each_setting_with_its_default(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raises(AssertionError("not to be run")))
    assert cli.main(["try", "--help"]) == 0
    assert capsys.readouterr().out.endswith("settings:\n  size: whole number, default 3\n      How large.\n")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["pretain"], "error: command line: got 'pretain'; argument VERB: invalid choice: 'pretain'"),
        (["prepare"], "error: command line: got 'prepare'; the following arguments are required: --config"),
        (["export", "--config", "x.yaml", "--fresh"], "error: command line: got 'export --config x.yaml --fresh'; unrecognized"),
        (["prepare", "--config", "/none.yaml"], "error: --config: got '/none.yaml'; must be a readable YAML file"),
        (["launch", "--", "export"], "error: command line: got 'launch -- export'; after -- comes the verb to run on every rank"),
        (["launch", "backend.ranks=0", "--", "pretrain", "--config", "x"], "error: backend.ranks: got 0; should be greater than"),
    ],
)
def test_wrong_usage_is_wrong_input(capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    assert cli.main(argv) == 65
    assert capsys.readouterr().err.startswith(said)


def test_launch_gives_the_verb_and_its_run_folder_to_the_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("output: elsewhere\n")
    job = ["pretrain", "--config", str(tmp_path / "x.yaml"), f"output={tmp_path}", "steps=3", "--fresh"]
    seen: list[Any] = []

    def launch(*given: Any, **named: Any) -> int:
        seen.append((given, named))
        return 75

    monkeypatch.setattr("scaletrain.launcher.launch", launch)
    assert cli.main(["launch", "backend.ranks=3", "--dry-run", "--", *job]) == 75
    ((settings, arguments, output), named) = seen[0]
    assert (settings.backend.ranks, arguments, output, named) == (3, job, tmp_path, {"dry_run": True, "once_only": ["--fresh"]})


def test_the_module_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "scaletrain", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert shown == f"scaletrain {scaletrain.__version__}\n"


def test_a_dry_run_of_launch_prints_what_would_be_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.yaml").write_text(json.dumps({"output": str(tmp_path / "run")}))
    given = ["launch", "backend.ranks=2", "backend.port=9", "--dry-run", "--", "pretrain", "--config", str(tmp_path / "x.yaml")]
    assert cli.main(given) == 0
    assert capsys.readouterr().out.count(f"{sys.executable} -m scaletrain pretrain --config {tmp_path / 'x.yaml'}") == 2
    assert [file.name for file in tmp_path.iterdir()] == ["x.yaml"]
