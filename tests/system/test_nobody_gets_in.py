"""A whole run on two ranks, its resume, its export, and a fine-tuning that is evaluated, with every process under watch.

Nothing is unpickled, no text is run, nothing listens where others could reach it, no secret is written down, nothing that is
written can be read by others.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests import streams, tiny
from tests.system import audited

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {name: f"canary-{number}-9f3c1d" for number, name in enumerate(("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"))}

MAKES_TEXT = {
    "torch": "torch.compile's operators and remote modules are templates, filled in when torch is imported",
    "numpy": "f2py composes its rules when it is imported",
    "scipy": "scipy.optimize composes its solvers' wrappers when it is imported",
    "sympy": "which is imported by torch, reads SYMPY_DEBUG",
    "mpmath": "composes its operators when sympy imports it",
    "jinja2": "compiles the templates that torch's inductor has in its own source",
    "typing_inspection": "composes its predicates when pydantic imports it",
    "attr": "composes the methods of its classes",
    "pydantic": "composes signatures",
}
"""Packages that run text which they put together, and what it is: none of it comes from a file that a run reads."""
STARTS = {
    "scaletrain/launcher/group.py": "the ranks",
    "scaletrain/export/proof.py": "the Python that reloads an export",
    "deepspeed/": "asks numactl for the cores, and the C compiler whether libaio is there, when it is imported",
}
"""What may start a process, and what for."""


@dataclass(frozen=True)
class Ran:
    folder: Path
    commands: dict[str, audited.Seen]

    @property
    def events(self) -> list[dict[str, object]]:
        return [event for seen in self.commands.values() for event in seen.events]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    made, folder = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("ran")
    prepared, encoder = tiny.corpus(made), streams.encoder(made / "encoder")
    data = {"corpora": [{"path": str(prepared)}], "chunks_per_step": 8, "slots": {"micro_batch_tokens": 512}}
    task = streams.task(made / "task", "tools", each=12)
    trees = {
        "pretrain": tiny.settings(prepared, folder / "run", steps=4, data=data, checkpoint={"every_steps": 2}),
        "finetune": streams.finetuning(encoder, folder / "tuned", task),
        "export": {"run": str(folder / "run"), "output": str(folder / "exported")},
        "evaluate": {
            "model": str(folder / "tuned" / "model"),
            "files": task["data"]["test"],
            "output": str(folder / "evaluated"),
            "compute": {"device": "cpu", "max_tokens": 40, "engine": {"name": "local"}},
        },
    }
    for verb, tree in trees.items():
        (made / f"{verb}.yaml").write_text(yaml.safe_dump(tree))
    (made / "hostfile").write_text("localhost slots=2\n")
    environment = {**os.environ, **SECRETS, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    python = [sys.executable, "-m", "scaletrain"]
    job = ["--", "pretrain", "--config", str(made / "pretrain.yaml")]
    several = [["finetune", "--config", str(made / "finetune.yaml")], ["export", "--config", str(made / "export.yaml")]]
    several += [["evaluate", "--config", str(made / "evaluate.yaml")]]
    program = (
        f"import sys\nfrom scaletrain.cli import main\nif __name__ == '__main__': sys.exit(any([main(a) for a in {several!r}]))"
    )
    here = {"cwd": folder, "umask": 0o022}
    commands = {}

    def run(name: str, command: list[str]) -> None:
        commands[name] = audited.run(command, made / name, environment, **here)
        assert commands[name].code == 0, commands[name].output

    run("pretrain", [*python, "launch", "backend.ranks=2", f"backend.logs={folder / 'logs'}", *job])
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000004")
    run("resume", [*python, "launch", "backend.ranks=2", *job])
    (made / "several.py").write_text(program)
    run("several", [sys.executable, str(made / "several.py")])
    run("dry", [*python, "launch", "--dry-run", "backend.name=deepspeed", f"backend.hostfile={made / 'hostfile'}", *job])
    return Ran(folder, commands)


def test_the_watch_sees_what_it_is_to_see(tmp_path: Path) -> None:
    """Or its silence would mean nothing."""
    program = (
        "import pickle, socket, subprocess, sys, time, collections\n"
        "pickle.loads(pickle.dumps(collections.OrderedDict()))\n"
        "subprocess.run([sys.executable, '-c', 'exec(\"1\" + \"+1\")'])\n"
        "server = socket.socket(); server.bind(('', 0)); server.listen(); time.sleep(0.5)\n"
    )
    seen = audited.run([sys.executable, "-c", program], tmp_path / "audit", dict(os.environ))
    assert {event["event"] for event in seen.events} == {
        "pickle.find_class",
        "subprocess.Popen",
        "socket.bind",
        "exec",
        "compile",
    }
    assert seen.listening == {"0.0.0.0"}
    assert len(seen.commands) >= 1


def test_nothing_is_unpickled(ran: Ran) -> None:
    assert [event for event in ran.events if event["event"] == "pickle.find_class"] == []


def test_only_libraries_put_programs_together(ran: Ran) -> None:
    """The package that runs a text is the one whose frame is innermost."""
    runs = [event["files"][0] for event in ran.events if event["event"] in ("exec", "compile")]  # type: ignore[index]
    packages = {_package(file) for file in runs if "<string>" not in file}
    assert packages <= MAKES_TEXT.keys()


def _package(file: str) -> str:
    return file.partition("site-packages/")[2].partition("/")[0] or file


def test_only_what_is_listed_starts_processes_and_none_by_a_shell(ran: Ran) -> None:
    assert [event for event in ran.events if event["event"] in ("os.system", "os.exec", "os.posix_spawn")] == []
    started = [event for event in ran.events if event["event"] == "subprocess.Popen"]
    by = {part for event in started for part in STARTS if any(f"/{part}" in file for file in event["files"])}  # type: ignore[attr-defined]
    assert by == STARTS.keys()
    for event in started:
        assert any(f"/{part}" in file for part in STARTS for file in event["files"]), event  # type: ignore[attr-defined]
        assert not str(event["arguments"][0]).rpartition("/")[2].startswith(("sh'", "bash'")), event  # type: ignore[index]


def test_nothing_listens_beyond_this_machine(ran: Ran) -> None:
    """Where the ranks meet and where gloo listens; what binds besides only looks for a port."""
    for name, seen in ran.commands.items():
        assert seen.listening <= {"127.0.0.1"}, name
    assert ran.commands["pretrain"].listening == {"127.0.0.1"}
    bound = [event for event in ran.events if event["event"] == "socket.bind"]
    places = {str(event["arguments"][1]).partition(",")[0] for event in bound if "free_port" not in event["files"][0]}  # type: ignore[index]
    assert places == {"('127.0.0.1'"}


def test_nothing_connects_to_other_machines(ran: Ran) -> None:
    assert [event for event in ran.events if event["event"] == "socket.connect"] == []


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_of_the_environment_is_written_nowhere(ran: Ran, name: str) -> None:
    """Not in what is printed, nor in a command line, nor in any file of a run, its logs, its export and its report."""
    secret = SECRETS[name]
    for seen in ran.commands.values():
        assert secret not in seen.output
        assert not any(secret in command for command in seen.commands)
    files = [file for file in ran.folder.rglob("*") if file.is_file()]
    assert len(files) > 30
    assert [file for file in files if secret.encode() in file.read_bytes()] == []


def test_what_is_written_is_for_its_owner_alone(ran: Ran) -> None:
    """Although the shell's umask lets everybody read: runs hold the texts they learn from."""
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in ran.folder.rglob("*")}
    assert {path for path, mode in modes.items() if mode != (0o700 if path.is_dir() else 0o600)} == set()
