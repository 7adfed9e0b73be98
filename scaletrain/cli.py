"""The command line: verbs, and nothing but verbs.

Every setting lives in a file or a ``key.path=value``; flags only permit (``--fresh``), show (``--dry-run``, ``--debug``), take a
slice of the job (``--part``) or name the file. A verb's module is imported when the verb is called: ``scaletrain --help`` and
``scaletrain launch`` answer at once.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import scaletrain
from scaletrain import config, heartbeat
from scaletrain.errors import ConfigError, ScaletrainError


@dataclass(frozen=True, kw_only=True, slots=True)
class Verb:
    """What can be done. ``module`` has ``Config`` and ``main(config, **permissions)``."""

    module: str
    summary: str
    permissions: Mapping[str, str] = field(default_factory=dict)
    """Flag -> what it permits once; each is a keyword of ``main``."""
    lasting: Mapping[str, str] = field(default_factory=dict)
    """The same for what it permits for as long as the job is started again."""
    slices: str = ""
    """Where the work can be split over machines: what ``--part I/N`` does, a keyword of ``main`` that takes the text or None."""
    ranks: bool = False
    """Whether ``scaletrain launch`` may run it on several ranks."""
    embedded: bool = False
    """Whether it brings its own configuration, so that --config may be left out."""
    places: tuple[str, ...] = ()
    """Settings that are what the verb works on: each may be given as ``--NAME PATH``, the first one also as a bare word."""
    folder: str = "output"
    """The setting that names the run's folder, where exit.json goes."""


VERBS: Mapping[str, Verb] = {
    "prepare": Verb(
        module="scaletrain.recipes.prepare",
        summary="clean and tokenise a corpus, write indexed shards",
        permissions={
            "fresh": "discard what an earlier prepare has left in the output folder; with --part what that part has left",
            "merge": "write the folder from its parts, when all of them are done",
        },
        slices="tokenise one of N parts, each on a machine of its own if you like; --merge then writes the folder",
    ),
    "index": Verb(
        module="scaletrain.recipes.index",
        summary="make, or check, the indexes of tars that others wrote",
        embedded=True,
    ),
    "pretrain": Verb(
        module="scaletrain.recipes.pretrain",
        summary="train an encoder on prepared data; continues where the run folder stands",
        permissions={"fresh": "start at step 0 although the run folder holds checkpoints"},
        lasting={"allow_pipe": "run the commands of corpora whose path is pipe:COMMAND; no file can permit it"},
        ranks=True,
    ),
    "finetune": Verb(
        module="scaletrain.recipes.finetune",
        summary="train a classifier on labelled texts, from an encoder; continues where the run folder stands",
        permissions={"fresh": "start at step 0, with the data read again, although the run folder holds checkpoints"},
        ranks=True,
    ),
    "evaluate": Verb(
        module="scaletrain.recipes.evaluate",
        summary="measure a classifier on labelled texts: accuracy, F1, a report per label",
        ranks=True,
    ),
    "predict": Verb(
        module="scaletrain.recipes.predict",
        summary="label texts from a file or from standard input",
        embedded=True,
        places=("model",),
    ),
    "continual": Verb(
        module="scaletrain.recipes.continual",
        summary="learn a stream of tasks onto one model: train, evaluate, judge, publish; continues where the lineage stands",
        permissions={"retry": "try tasks again that the gate did not accept", "abandon": "give up what is under way first"},
        ranks=True,
    ),
    "onboard": Verb(
        module="scaletrain.recipes.onboard",
        summary="one more task onto the published model of a lineage",
        permissions={
            "retry": "try the task again although the gate did not accept it",
            "abandon": "give up what is under way first",
        },
        ranks=True,
        embedded=True,
        places=("lineage", "task"),
        folder="lineage",
    ),
    "history": Verb(
        module="scaletrain.recipes.history",
        summary="what a lineage has been through, from its ledger",
        embedded=True,
        places=("lineage",),
    ),
    "rollback": Verb(
        module="scaletrain.recipes.rollback",
        summary="publish an earlier version of a lineage again",
        embedded=True,
        places=("lineage", "version"),
    ),
    "report": Verb(
        module="scaletrain.recipes.report",
        summary="a run or a lineage as one HTML page",
        embedded=True,
        places=("run",),
    ),
    "inspect data": Verb(
        module="scaletrain.recipes.survey",
        summary="what a folder of shards holds, in figures and pictures, with every byte verified",
        embedded=True,
        places=("data",),
    ),
    "inspect audit": Verb(
        module="scaletrain.recipes.audit",
        summary="what a run has consumed, to the sample, checked against its plan",
        embedded=True,
        places=("run",),
    ),
    "export": Verb(
        module="scaletrain.recipes.export",
        summary="write a checkpoint as a folder that plain transformers loads",
    ),
    "import-deepspeed": Verb(
        module="scaletrain.recipes.import_deepspeed",
        summary="weights of a DeepSpeed checkpoint, as a folder to start from; it is unpickled, so its bytes are code",
        permissions={"trust": "unpickle the checkpoint: whoever wrote it can run programs as you"},
        embedded=True,
        places=("checkpoint",),
    ),
    "quickstart": Verb(
        module="scaletrain.recipes.quickstart",
        summary="all of it in minutes, without a download: pretrain on two ranks, fine-tune, learn more tasks, publish",
        embedded=True,
    ),
}

_LAUNCH_SUMMARY = "run a verb on several ranks and answer with its exit code"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code of `scaletrain.errors`; 130 after Ctrl-C."""
    # What a run writes holds its data (memory.jsonl, predictions): others get at it where the user says so, with chmod.
    os.umask(os.umask(0o077) | 0o077)
    # The deepspeed launcher adds --local_rank=N to every command; the rank is read from the environment instead.
    given = [argument for argument in (sys.argv[1:] if argv is None else argv) if not argument.startswith("--local_rank=")]
    if " ".join(given[:2]) in VERBS:  # a verb of two words
        given[:2] = [" ".join(given[:2])]
    try:
        try:
            return _launch(given[1:]) if given[:1] == ["launch"] else _run(given)
        except _UsageError as error:
            raise ConfigError(
                "command line", config.redacted(" ".join(given)), config.redacted(error.args[0]), *error.args[1:]
            ) from None
    except ScaletrainError as error:
        if "--debug" in given:
            traceback.print_exc()
        print("\n  ".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return ScaletrainError.exit_code


def _run(argv: Sequence[str]) -> int:
    """Any verb but ``launch``."""
    if not argv or argv[0] not in VERBS:
        _top_parser().parse_args(argv)
        _top_parser().print_help(sys.stderr)
        return 2
    name, verb = argv[0], VERBS[argv[0]]
    parser = _parser(name, verb)
    if {"-h", "--help"} & set(argv[1:]):
        print(parser.format_help())
        print(settings_text(_recipe(verb).Config))
        return 0
    options = parser.parse_intermixed_args(argv[1:])
    heartbeat.begin()
    recipe = _recipe(verb)
    settings = config.load(recipe.Config, options.config, _overrides(verb, options))
    flags = (*verb.permissions, *verb.lasting, *(("part",) if verb.slices else ()))
    result = recipe.main(settings, **{flag: getattr(options, flag) for flag in flags})
    if isinstance(result, Mapping):
        print(json.dumps(result), flush=True)
        return 0
    return int(result or 0)


def _launch(argv: Sequence[str]) -> int:
    """``launch [--config FILE] [key=value ...] [--dry-run] -- VERB ...``."""
    from scaletrain.launcher import LaunchConfig, launch

    cut = list(argv).index("--") if "--" in argv else len(argv)
    own, job = argv[:cut], argv[cut + 1 :]
    parser = _parser("launch", Verb(module="", summary=_LAUNCH_SUMMARY, ranks=True, embedded=True))
    parser.usage = "scaletrain launch [--config FILE] [key.path=value ...] [--dry-run] -- VERB --config FILE [key.path=value ...]"
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, and start nothing")
    if {"-h", "--help"} & set(own):
        print(parser.format_help())
        print(settings_text(LaunchConfig))
        return 0
    options = parser.parse_intermixed_args(own)
    verbs = [name for name, verb in VERBS.items() if verb.ranks]
    if not job or job[0] not in verbs:
        parser.error(f"after -- comes the verb to run on every rank: {', '.join(verbs)}")
    settings = config.load(LaunchConfig, options.config, options.override)
    if {"-h", "--help"} & set(job[1:]):
        return _run(job)
    # The file is read before anything starts, but not decoded: the settings of a verb belong to modules that need torch.
    verb = VERBS[job[0]]
    asked = _parser(job[0], verb).parse_intermixed_args(job[1:])
    output = config.load_tree(asked.config, _overrides(verb, asked)).get(verb.folder)
    folder, flags = Path(output) if isinstance(output, str) else None, [f"--{permission}" for permission in verb.permissions]
    return launch(settings, job, folder, dry_run=options.dry_run, once_only=flags)


def _overrides(verb: Verb, options: argparse.Namespace) -> list[str]:
    """What the command line sets: the places by their names, and everything of the form key.path=value."""
    words = [word for word in options.override if "=" not in word] if verb.places else []
    given = dict(zip(verb.places[:1], words[:1], strict=False))
    given |= {place: value for place in verb.places if (value := getattr(options, place)) is not None}
    # As JSON, which YAML reads as it is: a version called 0003 is no number.
    named = [f"{place}={json.dumps(value)}" for place, value in given.items()]
    return named + [word for word in options.override if word not in words[:1]]


def _recipe(verb: Verb) -> Any:
    return importlib.import_module(verb.module)


# ------------------------------------------------------------------------------------------------------------------- the parsers


def _top_parser() -> argparse.ArgumentParser:
    verbs = {**{name: verb.summary for name, verb in VERBS.items()}, "launch": _LAUNCH_SUMMARY}
    listing = "\n".join(f"  {name:<18}{summary}" for name, summary in verbs.items())
    parser = _Parser(
        prog="scaletrain",
        usage="scaletrain VERB [--config FILE] [key.path=value ...]",
        description=f"{(scaletrain.__doc__ or '').splitlines()[0]}\n\nverbs:\n{listing}",
        epilog="`scaletrain VERB --help` lists every setting of a verb with its default.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"scaletrain {scaletrain.__version__}")
    parser.add_argument("verb", choices=list(verbs), metavar="VERB", nargs="?", help=argparse.SUPPRESS)
    return parser


def _parser(name: str, verb: Verb) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"scaletrain {name}", description=verb.summary, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE", required=not verb.embedded, help="YAML; may build on a `base:`")
    parser.add_argument("override", nargs="*", metavar="key.path=value", help="a setting that takes precedence over the file's")
    for number, place in enumerate(verb.places):
        bare = "; may also be given as a bare word" if number == 0 else ""
        parser.add_argument(f"--{place}", metavar=place.upper(), help=f"the same as {place}={place.upper()}{bare}")
    for permission, meaning in {**verb.permissions, **verb.lasting}.items():
        parser.add_argument(f"--{permission.replace('_', '-')}", action="store_true", help=meaning)
    if verb.slices:
        parser.add_argument("--part", metavar="I/N", help=verb.slices)
    parser.add_argument("--debug", action="store_true", help="show where an error was raised")
    parser.add_argument("-h", "--help", action="store_true", help="this text, with every setting and its default")
    return parser


class _UsageError(Exception):
    """A command line that cannot be read."""


class _Parser(argparse.ArgumentParser):
    """Leaves it to `main` to say what is wrong, so that wrong usage ends like any other wrong input."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(message, f"See `{self.prog} --help`")


# ------------------------------------------------------------------------------------------------------------- the settings tree


def settings_text(cls: type) -> str:
    """Every setting below ``cls``: dotted path, type, default, and the docstring under its field."""
    return "\n".join(["settings:", *_lines(cls, "", None, {})])


def _lines(cls: type, prefix: str, default: Any, shown: dict[tuple[type, ...], str]) -> Iterator[str]:
    """``default``: the instance that the enclosing setting has, whose values count rather than the class's own.

    ``shown``: where alternatives that occur more than once have been listed.
    """
    said = docstrings(cls)
    for entry in fields(cls):
        if not entry.init:
            continue
        path, hint = f"{prefix}{entry.name}", config.hints_of(cls)[entry.name]
        value = getattr(default, entry.name) if default is not None else _default(entry)
        below = config.members(hint) or _items(hint)
        end = ", must be given" if value is MISSING else "" if config.members(hint) and value else f", default {_value(value)}"
        yield f"  {path}: {_type(hint)}{end}"
        yield from _wrapped(said.get(entry.name) or (_first_line(cls) if entry.name == "name" else ""))
        if len(below) > 1 and below in shown:
            yield from _wrapped(f"Its settings are those of {shown[below]}.")
            continue
        shown[below] = path
        for member in below:
            yield from _lines(
                member, f"{path}{'.0' if _items(hint) else ''}.", value if isinstance(value, member) else None, shown
            )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, width=110, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or cls.__name__).splitlines()[0]


def _items(hint: Any) -> tuple[type, ...]:
    """The dataclasses that a list setting holds."""
    lists = [leaf for leaf in config.alternatives(hint) if get_origin(leaf) in (tuple, list)]
    return tuple(member for leaf in lists for member in config.members(get_args(leaf)[0]))


def _default(entry: Any) -> Any:
    make: Callable[[], Any] | Any = entry.default_factory
    return entry.default if make is MISSING else make()


def _value(value: Any) -> str:
    return json.dumps(config.to_tree(value))


def _type(hint: Any) -> str:
    """A type as the user of a YAML file would name it."""
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path", type(None): "null"}
    groups = config.members(hint)
    shown = []
    for leaf in config.alternatives(hint):
        origin = get_origin(leaf)
        if origin is Literal:
            shown += [str(choice) for choice in get_args(leaf)]
        elif origin in (tuple, list):
            shown.append(f"list of {_type(get_args(leaf)[0])}")
        elif leaf in groups:
            shown.append(_type(config.hints_of(leaf)["name"]) if len(groups) > 1 else "settings")
        else:
            shown.append("mapping" if origin is dict else names.get(leaf, "any value"))
    return " | ".join(shown)


def docstrings(cls: type) -> dict[str, str]:
    """The text under each field of a dataclass, inherited ones included, which Python itself does not keep."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= _own_docstrings(base) if is_dataclass(base) else {}
    return found


def _own_docstrings(cls: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for above, below in zip(body.body, body.body[1:], strict=False):
        match above, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = inspect.cleandoc(text).replace("\n", " ")
    return found
