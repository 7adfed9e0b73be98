"""What is carried to a node and how: no name that was not allowed, no word that a shell would read as anything else."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaletrain.errors import ConfigError
from scaletrain.launcher.hostfile import Host
from scaletrain.launcher.node import PassOn, RunRanks, written
from scaletrain.launcher.transport import Transport, carried, require

HOST = Host("n1", 2, "hosts:1")
ORDER = PassOn(job="j", node="n1", number=15)


def transport(name: Literal["ssh", "pdsh"] = "ssh", **changes: Any) -> Transport:
    settings = {"options": ("-x", "-p22"), "folder": Path("/work"), "environment": {"A": "1"}, "python": "/bin/python"}
    return Transport(name=name, **{**settings, **changes})


def test_ssh_takes_one_word_that_its_shell_cuts_into_the_command() -> None:
    carrier = transport().carry(HOST, 0, ORDER)
    assert (carrier.argv[:5], len(carrier.argv), carrier.env) == (("ssh", "-x", "-p22", "--", "n1"), 6, {})
    words = ["cd", "/work", "&&", "exec", "env", "A=1", "/bin/python", "-m", "scaletrain.launcher", written(ORDER)]
    assert shlex.split(carrier.argv[5]) == words


def test_pdsh_takes_the_same_word_and_gives_the_same_options_to_ssh() -> None:
    carrier = transport("pdsh").carry(HOST, 0, ORDER)
    assert carrier.argv == ("pdsh", "-S", "-N", "-R", "ssh", "-w", "n1", transport().carry(HOST, 0, ORDER).argv[-1])
    assert carrier.env == {"PDSH_SSH_ARGS": "-x -p22 %h"}


def test_pdsh_finds_nothing_to_replace_but_the_host() -> None:
    carrier = transport("pdsh", options=("-Fa%h",), environment={"A": "%u%%"}).carry(HOST, 0, ORDER)
    assert " A=%%u%%%% " in carrier.argv[-1]
    assert carrier.env == {"PDSH_SSH_ARGS": "-Fa%%h %h"}


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), st.text(st.characters(exclude_characters="\0"))
)
def test_arguments_and_variables_pass_through_a_shell_unchanged(argument: str, value: str) -> None:
    order = RunRanks(job="j", node="n1", slots={"n1": 1}, argv=("x", argument), address="n1", port=1, grace_s=1, peer_grace_s=1)
    words = shlex.split(transport(environment={"A": value}).carry(HOST, 0, order).argv[-1])
    assert words[5] == f"A={value}"
    assert json.loads(words[-1])["argv"] == ["x", argument]


def test_only_allowed_variables_are_carried() -> None:
    environment = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "2", "PYTHONPATH": "/x", "HF_TOKEN": "t", "HOME": "/h", "MINE": "m"}
    allowed = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "2", "PYTHONPATH": "/x", "PYTHONUNBUFFERED": "1"}
    assert carried(environment, (), None) == allowed
    assert carried(environment, ("MINE",), None) == {**allowed, "MINE": "m"}


def test_an_interface_that_was_chosen_is_that_of_gloo_and_nccl() -> None:
    given = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    assert carried(given, (), None).items() >= given.items()
    assert carried(given, (), "eth0").items() >= {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}.items()


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "WANDB_API_KEY", "SSH_KEY", "GIT_CREDENTIALS", "DB_PASS", "AUTH_HEADER"],
)
def test_a_secret_is_not_carried(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^backend.environment: got '{name}'; the process list of every node shows the values"
    ):
        carried({name: "x"}, (name,), None)


def test_a_secret_in_a_url_is_not_carried() -> None:
    for value in ("http://me:secret@proxy:3128", "https://:secret@proxy"):
        with pytest.raises(ConfigError, match=r"^backend.environment: got 'PROXY'; the process list of every node"):
            carried({"PROXY": value}, ("PROXY",), None)
    assert carried({"PROXY": "http://proxy:3128/@a"}, ("PROXY",), None)["PROXY"] == "http://proxy:3128/@a"


@pytest.mark.parametrize("name", ["ABSENT", "A=1; id", "", "-u"])
def test_a_variable_that_is_not_set_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^backend.environment: got '.*'; must be the name of a variable that is set where"):
        carried({"A=1; id": "x", "-u": "x", "": "x"}, (name,), None)


def test_what_a_transport_needs_is_said_with_the_way_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ssh").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    require("ssh")
    with pytest.raises(ConfigError) as caught:
        require("pdsh")
    assert str(caught.value) == (
        "backend.transport: got 'pdsh'; the program pdsh is not installed on this machine. "
        "Install the package pdsh, or set backend.transport=ssh."
    )
    (tmp_path / "ssh").unlink()
    with pytest.raises(ConfigError, match="the program ssh is not installed on this machine"):
        require("ssh")
