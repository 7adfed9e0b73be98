"""From YAML to one frozen tree of settings, and back.

A verb's settings are a tree of frozen dataclasses, each written beside the code that it configures; none is declared here.
A file may name another with ``base:`` (relative to itself) and is merged over it; ``key.path=value`` overrides come last.
pydantic then decodes the plain tree against the dataclasses, so that a mistyped key, a wrong type or a value out of range is
reported with its dotted path before anything starts. Paths inside a file are relative to the working directory.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import ErrorDetails

from scaletrain import durable, outside
from scaletrain.errors import ConfigError, StorageError

T = TypeVar("T")


_BYTES_MAX = 16 << 20
_SECRET_URL = re.compile(r"://[^/@\s]*:[^/\s]*@")
"""The part of a URL that has a user and a password, as in ``scheme://user:password@host`` (RFC 3986, section 3.2.1)."""
_QUERY = re.compile(r"(://[^\s?#'\"]*[?#])[^\s'\"]+")
"""A URL up to its query or fragment, and what follows: signatures and tokens are there."""


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: 1e-4 is a number; ``no``, ``on`` and ``2024-01-01`` are text; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_FLOAT = r"[-+]?((\d[\d_]*\.[\d_]*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
_FLOAT_STARTS = "-+.0123456789"
# PyYAML follows YAML 1.1, where 1e-4 is text and "no" is false; this is the core schema of YAML 1.2 (section 10.3.2).
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _starts in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][\d_]*)|0x[\da-fA-F]+", list("-+0123456789")),
    ("float", _FLOAT, list(_FLOAT_STARTS)),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), _starts)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever this loader or a YAML 1.1 loader would not read back as text."""

    def text(self, text: str) -> yaml.ScalarNode:
        # Outside double quotes PyYAML writes U+0085 and its like as line breaks, and reads them as spaces.
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"(?:{_FLOAT})$"), list(_FLOAT_STARTS))


def _parse(text: str, where: str) -> Any:
    """Decode one YAML document. Raises ConfigError with the line."""
    try:
        return _Loader(text).get_single_data()
    except RecursionError:
        raise ConfigError(where, text[:40], "is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        shown = text.splitlines()[mark.line].strip() if mark and mark.line < len(text.splitlines()) else ""
        raise ConfigError(f"{where}{line}", redacted(shown), f"is not valid YAML: {problem}") from None


def _read(file: Path, ring: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read ``file`` and, under it, the chain of files that its ``base:`` names."""
    if file.resolve() in ring:
        raise ConfigError("base", str(file), f"files may not name each other in a ring: {' -> '.join(map(str, ring))}")
    try:
        text = outside.read_bytes(file, _BYTES_MAX).decode("utf-8")
    except (OSError, ValueError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None) or str(error)
        raise ConfigError("--config" if not ring else "base", str(file), f"must be a readable YAML file: {reason}") from None
    tree = _parse(text, str(file))
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(str(file), tree, "a configuration is a mapping of settings to values")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{file}: base", base, "must be the path of one YAML file, relative to this one")
    return merge(_read(file.parent / base, (*ring, file.resolve())), tree)


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``under``: mappings merge key by key, everything else (lists too) replaces."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _override(tree: dict[str, Any], override: str) -> None:
    """Set one ``a.b.0.c=value`` in ``tree``; the value is YAML."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError("override", redacted(override), "must have the form key.path=value")
    value, node = _parse(text, f"override {path}"), cast(Any, tree)
    for depth, key in enumerate(keys):
        here = ".".join(keys[:depth]) or "the configuration"
        if isinstance(node, list):
            if not (key.isdecimal() and int(key) < len(node)):
                raise ConfigError(f"override {path}", key, f"{here} is a list of {len(node)}: an existing position is needed")
            slot: Any = int(key)
        elif isinstance(node, dict):
            slot = key
        else:
            raise ConfigError(f"override {path}", node, f"{here} is a value, not a group of settings")
        if depth == len(keys) - 1:
            node[slot] = value
        else:
            below = node.get(slot) if isinstance(node, dict) else node[slot]
            # A copy, since a YAML alias makes two settings share one mapping and only one of them was named.
            node[slot] = {} if below is None else below.copy() if isinstance(below, dict | list) else below
            node = node[slot]


def load_tree(file: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain tree of ``file`` (none: empty) with its bases and ``overrides`` merged, not yet decoded. Raises ConfigError."""
    tree = _read(file) if file is not None else {}
    for override in overrides:
        _override(tree, override)
    _refuse_secrets(tree, "")
    return tree


def _refuse_secrets(node: Any, path: str) -> None:
    """Raises ConfigError for a URL with a password in it, and does not repeat it: settings are kept beside what they made."""
    if isinstance(node, str) and _SECRET_URL.search(node):
        rule = "settings are written into the run's folder and shown in reports, so that a URL may hold no password"
        raise ConfigError(path, redacted(node), rule, "Keep it where the protocol's client looks for it (~/.netrc, ~/.ssh)")
    below = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in below:
        _refuse_secrets(value, f"{path}.{key}" if path else str(key))


def redacted(text: str) -> str:
    """The text without the passwords and the queries of URLs in it."""
    return _QUERY.sub(r"\1***", _SECRET_URL.sub("://***@", text))


def load(cls: type[T], file: Path | None, overrides: Sequence[str] = ()) -> T:
    """Read, merge and decode. Raises ConfigError."""
    return decode(cls, load_tree(file, overrides))


def decode(cls: type[T], tree: Mapping[str, Any]) -> T:
    """Decode a plain tree into the dataclass ``cls``.

    Raises ConfigError for an unknown key (with the nearest that exists), a missing one, a wrong type and a value out of range.
    """
    try:
        decoded = cast(T, cast(Any, _model(cast(Any, cls))(value=tree)).value)
    except ValidationError as error:
        raise _explain(cls, tree, error.errors(include_url=False)) from None
    _refuse_booleans(tree, to_tree(decoded), "")
    return decoded


@cache
def _model(cls: type) -> type[BaseModel]:
    """A pydantic model around ``cls``, whose configuration reaches every dataclass in the tree: owners need not repeat it."""
    return create_model("Root", __config__=ConfigDict(extra="forbid"), value=(cls, ...))


def _refuse_booleans(given: Any, decoded: Any, path: str) -> None:
    """``steps: true`` is a slip, not the number 1 that pydantic makes of it."""
    if isinstance(given, bool) and not isinstance(decoded, bool):
        raise ConfigError(path, given, "should be a number, not true or false")
    if isinstance(given, Mapping) and isinstance(decoded, Mapping):
        for key in given:
            _refuse_booleans(given[key], decoded.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(given, list) and isinstance(decoded, list):
        for position, (one, other) in enumerate(zip(given, decoded, strict=False)):
            _refuse_booleans(one, other, f"{path}.{position}")


def to_tree(value: Any) -> Any:
    """The plain YAML and JSON form: dataclasses become mappings, tuples lists, paths text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_tree(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Mapping):
        return {str(key): to_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_tree(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a setting of type {type(value).__name__} has no plain form; use numbers, text, paths, lists, dataclasses")


def dump(config: Any, path: Path) -> None:
    """Write the resolved tree as YAML, whole or not at all: ``load(type(config), path) == config``. Raises StorageError."""
    text = yaml.dump(to_tree(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write(path, text.encode())
    except OSError as error:
        raise StorageError(f"{path}: got {error.strerror!r}; the resolved settings must be written there") from error


# ----------------------------------------------------------------------------------------------------- what settings there are


@cache
def hints_of(cls: type) -> dict[str, Any]:
    """The settings of a dataclass: name -> type, with its constraints."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def alternatives(hint: Any) -> tuple[Any, ...]:
    """``Annotated[A | B, ...] | None`` -> ``(A, B, NoneType)``."""
    if get_origin(hint) is Annotated:
        return alternatives(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(leaf for member in get_args(hint) for leaf in alternatives(member))
    return (hint,)


def members(hint: Any) -> tuple[type, ...]:
    """The dataclasses among the alternatives of ``hint``."""
    return tuple(leaf for leaf in alternatives(hint) if isinstance(leaf, type) and dataclasses.is_dataclass(leaf))


def _member(hint: Any, node: Any) -> type | None:
    """The dataclass that ``node`` is read as: the only one, or the one whose ``name`` it gives."""
    found = members(hint)
    if len(found) > 1 and isinstance(node, Mapping):
        found = tuple(cls for cls in found if node.get("name") in _tags(cls))
    return found[0] if len(found) == 1 else None


def _below(hint: Any, node: Any, key: str | int) -> Any:
    """The type of what lies under ``key``."""
    owner = _member(hint, node)
    if owner is not None:
        return hints_of(owner).get(str(key), Any)
    inside = [get_args(leaf) for leaf in alternatives(hint) if get_origin(leaf) in (list, tuple, dict)]
    return next((args[1] if isinstance(key, str) else args[0] for args in inside if len(args) > isinstance(key, str)), Any)


def _paths(hint: Any, prefix: str = "") -> Iterator[str]:
    for cls in members(hint):
        for name, below in hints_of(cls).items():
            yield prefix + name
            yield from _paths(below, f"{prefix}{name}.")


# ----------------------------------------------------------------------------------------------------- pydantic errors -> ours


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where in the user's tree an error is: dotted path, value found, its type, and the dataclass that holds the last key."""

    path: str
    value: Any
    hint: Any
    owner: type | None


def _locate(cls: type, tree: Any, location: tuple[str | int, ...]) -> _Place:
    """Follow pydantic's location, which also names the branch taken at each union, through the user's tree."""
    path: list[str] = []
    hint, node, owner = cast(Any, cls), tree, None
    for key in location:
        member = _member(hint, node)
        if len(members(hint)) > 1 and isinstance(node, Mapping) and key == node.get("name"):
            hint = member
            continue
        known = member is not None and key in hints_of(member)
        listed = isinstance(node, list | tuple) and isinstance(key, int)
        if known or listed or (isinstance(node, Mapping) and key in node):
            path.append(str(key))
            owner, hint = member, _below(hint, node, key)
            node = node.get(key) if isinstance(node, Mapping) else node[cast(int, key)]
    return _Place(".".join(path), node, hint, owner)


def _explain(cls: type, tree: Any, problems: list[ErrorDetails]) -> ConfigError:
    """One error for the first problem, an unknown key before any other: it is often the reason for a missing one."""
    problems = sorted(problems, key=lambda problem: problem["type"] != "unexpected_keyword_argument")
    places = [_locate(cls, tree, problem["loc"][1:]) for problem in problems]
    place, kind = places[0], problems[0]["type"]
    path, value = place.path or "the configuration", place.value
    if kind == "unexpected_keyword_argument":
        rule, hint = "no such setting", _nearest(cls, place)
    elif kind == "missing":
        rule, hint = "this setting has no default and must be given", ""
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        expected = [tag for member in members(place.hint) for tag in _tags(member)]
        path, value = f"{path}.name", value.get("name") if isinstance(value, Mapping) else value
        rule, hint = f"should be one of {', '.join(map(repr, expected))}", _did_you_mean(value, expected)
    else:
        same = [problem for problem, other in zip(problems, places, strict=True) if other.path == place.path]
        rule = " or ".join(dict.fromkeys(_plain(problem["msg"]) for problem in same)).replace(" or should be ", " or ")
        expected = re.findall(r"'([^']*)'", problems[0].get("ctx", {}).get("expected", "")) if kind == "literal_error" else []
        hint = _did_you_mean(value, expected)
    others = ", ".join(sorted({other.path for other in places} - {place.path}))
    return ConfigError(path, value, rule, f"{hint} (also wrong: {others})".strip() if others else hint)


def _tags(cls: type) -> tuple[str, ...]:
    name = alternatives(hints_of(cls).get("name"))[0]
    return get_args(name) if get_origin(name) is Literal else ()


def _plain(message: str) -> str:
    """pydantic's wording without its Python: the user wrote YAML."""
    message = re.sub(r"^(Value error, |Assertion failed, |Input )", "", message)
    message = re.sub(r"^is not a valid path.*", "should be a path", message)
    message = re.sub(r"should be a (valid )?dictionary or .*", "should be a group of settings", message)
    return message.replace("valid tuple", "list").replace("valid dictionary", "group of settings").replace("valid string", "text")


def _nearest(cls: type, place: _Place) -> str:
    """The setting that was probably meant: a neighbour spelt much alike, or the same name in another group."""
    group, _, wrong = place.path.rpartition(".")
    siblings = list(hints_of(place.owner)) if place.owner else []
    close = difflib.get_close_matches(wrong, siblings, n=1)
    if close:
        return f"Did you mean {group}{'.' if group else ''}{close[0]}?"
    elsewhere = [path for path in _paths(cls) if path.rpartition(".")[2] == wrong and path != place.path]
    if elsewhere:
        return f"Did you mean {elsewhere[0]}?"
    return f"The settings here are: {', '.join(siblings)}" if siblings else ""


def _did_you_mean(value: Any, options: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(value), options, n=1)
    return f"Did you mean {close[0]}?" if close else ""
