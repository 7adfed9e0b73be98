"""What a configuration file may say, and what is said about one that cannot be used."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from scaletrain import config
from scaletrain.errors import ConfigError, StorageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    path: Path
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    corpora: tuple[Corpus, ...] = ()
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Small:
    name: Literal["small"] = "small"
    layers: Annotated[int, Field(ge=1)] = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Large:
    name: Literal["large"] = "large"
    heads: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    output: Path | None = None
    title: str = ""
    steps: Annotated[int, Field(ge=1)] = 10
    precision: Literal["fp32", "bf16"] = "fp32"
    rate: Annotated[float, Field(gt=0)] = 1e-4
    data: Data = field(default_factory=Data)
    model: Annotated[Small | Large, Field(discriminator="name")] = field(default_factory=Small)
    extra: dict[str, Any] = field(default_factory=dict)
    held_out: Corpus | None = None

    def __post_init__(self) -> None:
        if self.title == "forbidden":
            raise ValueError("a run may not be called that")


def complaint(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        config.decode(Run, tree)
    return str(caught.value)


def test_a_whole_tree_is_decoded_into_the_dataclasses_of_their_owners() -> None:
    tree = {"output": "runs/a", "data": {"corpora": [{"path": "x", "weight": 2}]}, "model": {"name": "large", "heads": 4}}
    expected = Run(
        output=Path("runs/a"), data=Data(corpora=(Corpus(path=Path("x"), weight=2.0),)), model=Large(name="large", heads=4)
    )
    assert config.decode(Run, tree) == expected


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (
            {"data": {"corpora": [{"pth": "x", "path": "y"}]}},
            "data.corpora.0.pth: got 'x'; no such setting. Did you mean data.corpora.0.path?",
        ),
        ({"setps": 3}, "setps: got 3; no such setting. Did you mean steps?"),
        ({"layers": 3}, "layers: got 3; no such setting. Did you mean model.layers?"),
        ({"data": {"zzz": 1}}, "data.zzz: got 1; no such setting. The settings here are: corpora, seed"),
        ({"model": {"name": "large", "layers": 3}}, "model.layers: got 3; no such setting. The settings here are: name, heads"),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_the_nearest_setting(tree: dict[str, Any], said: str) -> None:
    assert complaint(tree) == said


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"steps": 0}, "steps: got 0; should be greater than or equal to 1"),
        ({"steps": "many"}, "steps: got 'many'; should be a valid integer, unable to parse string as an integer"),
        ({"steps": True}, "steps: got True; should be a number, not true or false"),
        ({"rate": -1.0}, "rate: got -1.0; should be greater than 0"),
        ({"title": 3}, "title: got 3; should be a text"),
        ({"data": {"corpora": "x"}}, "data.corpora: got 'x'; should be a list"),
        ({"data": 3}, "data: got 3; should be a group of settings"),
        ({"precision": "bf15"}, "precision: got 'bf15'; should be 'fp32' or 'bf16'. Did you mean bf16?"),
        ({"model": {"name": "smal"}}, "model.name: got 'smal'; should be one of 'small', 'large'. Did you mean small?"),
        ({"model": {"layers": 3}}, "model.name: got None; should be one of 'small', 'large'"),
        ({"model": {"name": "small", "layers": 0}}, "model.layers: got 0; should be greater than or equal to 1"),
        (
            {"data": {"corpora": [{"path": "a"}, {"weight": 2}]}},
            "data.corpora.1.path: got None; this setting has no default and must be given",
        ),
        ({"held_out": {}}, "held_out.path: got None; this setting has no default and must be given"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_the_rule_it_breaks(tree: dict[str, Any], said: str) -> None:
    assert complaint(tree) == said


def test_a_rule_of_the_owner_is_reported_like_any_other() -> None:
    assert complaint({"title": "forbidden"}).endswith("a run may not be called that")


def test_other_errors_are_listed_with_the_first() -> None:
    assert complaint({"steps": 0, "rate": 0}) == "steps: got 0; should be greater than or equal to 1. (also wrong: rate)"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3E-5", 3e-5),
        ("-1.5e+3", -1500.0),
        ("2.", 2.0),
        ("1_000", 1000),
        ("0x1f", 31),
        ("007", "007"),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("null", None),
        ("~", None),
        (".inf", float("inf")),
        ("e5", "e5"),
        ("[1, a]", [1, "a"]),
    ],
)
def test_scalars_mean_what_they_look_like(text: str, value: Any) -> None:
    assert config.load_tree(None, [f"x={text}"]) == {"x": value}


def test_a_base_is_merged_under_the_file_and_overrides_over_both(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "base.yaml").write_text("steps: 1\ndata: {seed: 1, corpora: [{path: a}, {path: b}]}\n")
    (tmp_path / "run.yaml").write_text("base: deep/base.yaml\ntitle: t\ndata: {corpora: [{path: c}]}\n")
    assert config.load_tree(tmp_path / "run.yaml", ["data.corpora.0.weight=3", "steps=7"]) == {
        "steps": 7,
        "title": "t",
        "data": {"seed": 1, "corpora": [{"path": "c", "weight": 3}]},
    }


def test_an_override_changes_one_of_two_settings_that_an_alias_made_equal(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x: &same {k: 1}\ny: *same\n")
    assert config.load_tree(tmp_path / "a.yaml", ["x.k=2"]) == {"x": {"k": 2}, "y": {"k": 1}}


def test_a_ring_of_bases_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match=r"ring: .*a\.yaml -> .*b\.yaml"):
        config.load_tree(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", r"x\.yaml, line 3: .*not valid YAML"),
        ("a: 1\nb: 2\na: 3\n", r"x\.yaml, line 3: got 'a: 3'; is not valid YAML: the key 'a' is given twice"),
        ("a: !!python/object:os.system {}\n", r"x\.yaml, line 1: .*could not determine a constructor"),
        ("- 1\n", r"x\.yaml: got \[1\]; a configuration is a mapping"),
        ("base: [a, b]\n", r"x\.yaml: base: got \['a', 'b'\]; must be the path of one YAML file"),
        ("base: gone.yaml\n", r"base: got '.*gone\.yaml'; must be a readable YAML file: No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        config.load_tree(tmp_path / "x.yaml")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^--config: got '/nowhere/x\.yaml'; must be a readable YAML file: No such file"):
        config.load(Run, Path("/nowhere/x.yaml"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps", "override: got 'steps'; must have the form key.path=value"),
        ("=3", "override: got '=3'; must have the form key.path=value"),
        ("data..seed=3", "override: got 'data..seed=3'; must have the form key.path=value"),
        ("steps.x=3", "override steps.x: got 10; steps is a value, not a group of settings"),
        ("list.4.x=3", "override list.4.x: got '4'; list is a list of 1: an existing position is needed"),
        ("data.sed=3", "data.sed: got 3; no such setting. Did you mean data.seed?"),
    ],
)
def test_an_override_that_cannot_be_applied_is_named(tmp_path: Path, override: str, said: str) -> None:
    (tmp_path / "x.yaml").write_text("steps: 10\n" + ("list: [{}]\n" if "list" in override else ""))
    with pytest.raises(ConfigError) as caught:
        config.load(Run, tmp_path / "x.yaml", [override])
    assert str(caught.value) == said


def test_the_written_tree_is_read_back_equal(tmp_path: Path) -> None:
    run = Run(
        output=Path("a b"),
        title="1e-4\x85 é",
        rate=3e-5,
        data=Data(corpora=(Corpus(path=Path("x")),)),
        model=Large(),
        extra={"on": [1]},
    )
    config.dump(run, tmp_path / "new" / "config.yaml")
    assert config.load(Run, tmp_path / "new" / "config.yaml") == run


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(extra=st.dictionaries(st.text(), plain, max_size=3), title=st.text())
def test_any_text_and_number_survives_the_file(
    tmp_path_factory: pytest.TempPathFactory, extra: dict[str, Any], title: str
) -> None:
    if title == "forbidden":
        title = ""
    file = tmp_path_factory.mktemp("any") / "config.yaml"
    run = Run(title=title, extra=extra)
    config.dump(run, file)
    assert config.load(Run, file) == run


def test_a_dump_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    config.dump(Run(steps=1), tmp_path / "config.yaml")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        config.dump(Run(steps=2), tmp_path / "config.yaml")
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    assert config.load(Run, tmp_path / "config.yaml") == Run(steps=1)


@pytest.mark.parametrize("url", ["https://me:hunter2@host/x", "s3://:hunter2@host", "a b ftp://u:hunter2@h c"])
def test_a_password_in_a_url_is_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    """In a file, its base, a list, an override: what is loaded is written beside what it makes."""
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({"a": [{"b": url}]}))
    (tmp_path / "run.yaml").write_text("base: base.yaml\n")
    for load in (
        lambda: config.load_tree(tmp_path / "run.yaml"),
        lambda: config.load_tree(None, [f"a={json.dumps([{'b': url}])}"]),
    ):
        with pytest.raises(ConfigError, match=r"a\.0\.b: .*\*\*\*@.* may hold no password") as told:
            load()
        assert "ter2" not in str(told.value)


def test_a_url_without_a_password_is_a_setting_like_any_other() -> None:
    assert config.load_tree(None, ["a='https://host:80/x@y'", "b='git@host:x'"]) == {
        "a": "https://host:80/x@y",
        "b": "git@host:x",
    }


@pytest.mark.parametrize("override", ["a=[https://me:hunter2@host", "https://me:hunter2@host"])
def test_a_password_is_not_repeated_by_what_cannot_be_read(override: str) -> None:
    with pytest.raises(ConfigError) as told:
        config.load_tree(None, [override])
    assert "hunter2" not in str(told.value)
