"""A hostfile names hosts and nothing else: what ssh or pdsh would take for an order is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaletrain.errors import ConfigError
from scaletrain.launcher.hostfile import Host, parse, read, select

THREE = parse("a slots=1\nb slots=2\nc slots=3\n", "hosts")


def test_hosts_come_in_the_order_of_the_file_with_comments_and_blank_lines_left_out() -> None:
    text = "# the cluster\n\nnode-02.rack_1 slots=4   # with GPUs\n\t10.0.0.7\tslots=01\r\n"
    assert parse(text, "hosts") == (Host("node-02.rack_1", 4, "hosts:3"), Host("10.0.0.7", 1, "hosts:4"))


@pytest.mark.parametrize(
    "name",
    [
        "-oProxyCommand=touch${IFS}x",
        "a;rm",
        "$(id)",
        "`id`",
        "a|b",
        "a&b",
        "a>b",
        "'a'",
        "a,b",
        "n[1-9]",
        "^file",
        "/.*/",
        "a%h",
        "a\\b",
        "*",
        "a\x00b",
        "é",
        "-",
        "a-",
        ".a",
        "x" * 256,
    ],
)
def test_a_name_that_would_be_more_than_a_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"a slots=1\n{name} slots=1\n", "hosts")
    assert (caught.value.field, caught.value.value) == ("hosts:2", name)
    assert caught.value.rule == (
        "a host is a name of letters, digits, dots, dashes and underscores that begins and ends with a letter or digit"
    )
    assert caught.value.remedy == "Write one `host slots=N` per line."


@pytest.mark.parametrize("name", ["user@host;rm", "root@host", "host:22", "ssh:host", "fe80::1"])
def test_users_and_ports_are_the_business_of_ssh(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"{name} slots=1\n", "hosts")
    assert caught.value.remedy == "User, port and jump hosts belong into the ssh configuration."


@pytest.mark.parametrize("settings", ["", "slots=1 slots=2", "slots=1 port=22", "gpus=4", "slots 4", "slots = 4"])
def test_a_host_is_followed_by_its_slots_and_nothing_else(settings: str) -> None:
    with pytest.raises(ConfigError, match=r"^hosts:1: got .*; a host is followed by") as caught:
        parse(f"a {settings}\n", "hosts")
    assert caught.value.value == settings


@pytest.mark.parametrize("count", ["0", "-1", "1.5", "", "1025", "9" * 30, "٣", "1_0", "0x1", "1;id"])
def test_slots_are_a_number_of_ranks(count: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"a slots={count}", "hosts")
    assert str(caught.value) == (
        f"hosts:1: got {f'slots={count}'!r}; slots is the number of ranks on that host, 1 to 1024. "
        "Put a # before a host that is to run none."
    )


@pytest.mark.parametrize("again", ["a", "A"])
def test_a_host_that_stands_twice_is_refused_with_both_lines(again: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"a slots=1\nb slots=1\n{again} slots=2\n", "hosts")
    assert (
        str(caught.value)
        == f"hosts:3: got {again!r}; each host stands once; it is already at hosts:1. Add up its slots on one line."
    )


@pytest.mark.parametrize("text", ["", "\n\n", "# a slots=1\n"])
def test_a_hostfile_without_a_host_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "hosts")
    assert str(caught.value) == "hosts: got ''; a hostfile names at least one host. Write one `host slots=N` per line."


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file or directory"), (b"\xff\xfe", "not UTF-8 text")])
def test_a_hostfile_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "hosts").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "hosts")
    said = f"must be a readable file: {reason}. Write one `host slots=N` per line."
    assert str(caught.value) == f"backend.hostfile: got '{tmp_path}/hosts'; {said}"


def test_the_example_is_a_hostfile() -> None:
    example = Path(__file__).resolve().parents[3] / "launch" / "hostfile.example"
    assert [(host.name, host.slots) for host in read(example)] == [("node-1", 8), ("node-2", 8)]


@pytest.mark.parametrize(
    ("include", "exclude", "left"), [((), (), "abc"), (("c", "a"), (), "ac"), ((), ("b",), "ac"), (("a", "b"), ("a",), "b")]
)
def test_hosts_are_chosen_by_name_and_keep_their_order(include: tuple[str, ...], exclude: tuple[str, ...], left: str) -> None:
    assert [host.name for host in select(THREE, include, exclude)] == list(left)


@pytest.mark.parametrize(
    ("include", "exclude", "said"),
    [
        (("d",), (), "backend.include: got 'd'; must be a host of the hostfile. It has: a, b, c."),
        ((), ("d",), "backend.exclude: got 'd'; must be a host of the hostfile. It has: a, b, c."),
        (("a",), ("a",), "backend.exclude: got ['a']; at least one host must be left. The hosts are: a, b, c."),
    ],
)
def test_a_choice_that_names_no_host_or_leaves_none_is_refused(
    include: tuple[str, ...], exclude: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        select(THREE, include, exclude)
    assert str(caught.value) == said
