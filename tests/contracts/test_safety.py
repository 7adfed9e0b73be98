"""No bytes that come from a file or a peer are ever run or unpickled, and no command passes through a shell.

Read from the source of all of ``scaletrain/``, programs that stand there as text included, and of the scripts in ``launch/``.
Names are followed through imports, and a mention counts like a call: ``from torch import load as get`` is seen. ``tools/`` and
``tests/`` are no part of what runs for a user, and are not read.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MODULES = {
    **dict.fromkeys(("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"), "runs what it reads"),
    **dict.fromkeys(("imp", "runpy", "code", "codeop"), "runs what it is given"),
    **dict.fromkeys(("telnetlib", "ftplib", "socketserver", "http.server", "xmlrpc"), "talks to the network"),
}
NAMES = {
    **dict.fromkeys(("eval", "exec", "compile", "__import__"), "runs text"),
    **dict.fromkeys(("torch.load", "torch.save"), "safetensors holds tensors, JSON the rest"),
    **dict.fromkeys(
        (
            "torch.hub",
            "torch.jit.load",
            "torch.package",
            "torch.export.load",
            "torch.serialization",
            "torch.distributed.checkpoint",
        ),
        "runs or unpickles what it reads",
    ),
    "deepspeed.utils.zero_to_fp32": "unpickles what it reads",
    **dict.fromkeys(("numpy.lib.format", "numpy.lib.npyio", "pandas.read_pickle", "pandas.eval"), "unpickles or evaluates"),
    **dict.fromkeys(
        ("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all"),
        "scaletrain.config reads YAML",
    ),
    **dict.fromkeys(("yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader"), "scaletrain.config has a safe loader"),
    **dict.fromkeys(
        ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"),
        "a command is a list, and passes through no shell",
    ),
    **dict.fromkeys(
        (f"os.{kind}{end}" for kind in ("exec", "spawn") for end in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
        "processes are started by subprocess",
    ),
    **dict.fromkeys(("os.posix_spawn", "os.posix_spawnp", "pty.spawn"), "processes are started by subprocess"),
    "tempfile.mktemp": "mkstemp makes the file it names",
    "ssl._create_unverified_context": "certificates are checked",
    "ssl.CERT_NONE": "certificates are checked",
    "multiprocessing.connection": "what a connection receives is unpickled",
    "multiprocessing.managers": "what a manager receives is unpickled",
}
METHODS = {
    **dict.fromkeys(
        (
            "all_gather_object",
            "gather_object",
            "broadcast_object_list",
            "scatter_object_list",
            "send_object_list",
            "recv_object_list",
        ),
        "unpickles what a peer has sent",
    ),
    **dict.fromkeys(("load_checkpoint", "save_checkpoint"), "DeepSpeed's checkpoints are pickles"),
    **dict.fromkeys(("extractall", "extract", "unpack_archive"), "nothing is extracted"),
    "import_module": "only the modules that this program names",
    "subprocess_shell": "a command is a list, and passes through no shell",
}
"""Whatever they are methods of."""
FALSE = ("allow_pickle", "shell", "trust_remote_code")
TRUE = ("verify", "weights_only", "check_hostname")
_EVERYWHERE = ("", "0.0.0.0", "::")

ALLOWED: Mapping[str, Mapping[str, str]] = {
    "scaletrain/cli.py": {"import_module": "the modules of VERBS, which stand in the same file"},
    "scaletrain/recipes/unpickle_deepspeed.py": {
        "deepspeed.utils.zero_to_fp32": "the one door for foreign checkpoints: a program of its own, behind a permission"
    },
    "scaletrain/launcher/local.py": {
        "bind": "free_port asks for a port that is free at every address, and does not listen on it"
    },
}
"""File -> what it may do, and why."""


def violations(source: str) -> Iterator[tuple[str, str]]:
    """(what a module does that it must not, the line and why)."""
    tree = ast.parse(source)
    known = dict(_imports(tree))
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found = _import(node)
        elif isinstance(node, ast.Call):
            found = _call(node, known)
        elif isinstance(node, ast.Name | ast.Attribute) and id(node) not in called and id(node) not in inner:
            found = _name(node, known)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = ((what, f"in a program that stands here as text: {why}") for what, why in _program(node.value))
        else:
            continue
        yield from ((what, f"line {node.lineno}: {what}: {why}") for what, why in found)


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What a name stands for: ``import numpy as np`` and ``from os import system as s``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def _import(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    module = getattr(node, "module", None)
    for alias in node.names:
        full = f"{module}.{alias.name}" if module else alias.name
        yield from _matches(full, MODULES)
        yield from _matches(full, NAMES)
        if module and alias.name in METHODS:
            yield alias.name, METHODS[alias.name]


def _matches(name: str, table: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    yield from ((banned, why) for banned, why in table.items() if name == banned or name.startswith(f"{banned}."))


def _full(node: ast.expr, known: Mapping[str, str]) -> str:
    """The dotted name, with its first part as it was imported; empty for what is no name."""
    if not isinstance(node, ast.Attribute | ast.Name):
        return ""
    first, _, rest = ast.unparse(node).partition(".")
    full = f"{known.get(first, first)}.{rest}".rstrip(".")
    return re.sub(r"^np\.", "numpy.", full).removeprefix("builtins.")


def _name(node: ast.Name | ast.Attribute, known: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Name) and (node.id in known or not isinstance(node.ctx, ast.Load)):
        return  # the import itself was seen
    full = _full(node, known)
    yield from _matches(full, NAMES)
    if isinstance(node, ast.Attribute) and node.attr in METHODS:
        yield node.attr, METHODS[node.attr]


def _call(node: ast.Call, known: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    full, last = _full(node.func, known), getattr(node.func, "attr", "")
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if not (isinstance(node.func, ast.Name) and node.func.id in known):
        yield from _matches(full, NAMES)
        if last in METHODS and not (last == "import_module" and node.args and isinstance(node.args[0], ast.Constant)):
            yield last, METHODS[last]
    if full == "numpy.load" and "allow_pickle" not in given:
        yield full, "without allow_pickle=False"
    yield from ((name, "only False") for name in FALSE if name in given and not _is(given[name], False))
    yield from ((name, "only True") for name in TRUE if name in given and _is(given[name], False))
    if full.startswith("subprocess.") and full.rpartition(".")[2] in ("run", "call", "check_call", "check_output", "Popen"):
        if len(node.args) > 1 or None in given:
            yield "subprocess", "everything but the command is given by name, so that shell= is seen"
        if node.args and isinstance(node.args[0], ast.Constant | ast.JoinedStr | ast.BinOp):
            yield "subprocess", "a command is a list"
    if last == "bind" and node.args and isinstance(node.args[0], ast.Tuple):
        host = node.args[0].elts[0]
        if isinstance(host, ast.Constant) and host.value in _EVERYWHERE:
            yield "bind", "a port that every machine can reach"


def _program(text: str) -> Iterator[tuple[str, str]]:
    """Of a text that is a program to be run by another Python."""
    if "\n" in text and "import " in text:
        try:
            ast.parse(text)
        except (SyntaxError, ValueError):
            return
        yield from violations(text)


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def shell_violations(script: str) -> list[str]:
    """What a shell script does that it must not: run text, read programs from elsewhere, expand what is not quoted."""
    code = [line for line in script.splitlines() if not line.lstrip().startswith("#")]
    found = [line for line in code if re.search(r"(^|[\s;&|(])(eval|source|curl|wget|sh -c|bash -c)\s|^\s*\.\s|`", line)]
    words = [line for line in code if not re.match(r"\s*\w+=", line)]  # what is assigned is not split
    return found + [line for line in words if re.search(r"(?<![\"\w{])\$(\{?\w+\}?|@|\*)(?!\")", re.sub(r'"[^"]*"', '""', line))]


MODULES_READ = sorted((ROOT / "scaletrain").rglob("*.py"))


@pytest.mark.parametrize("file", MODULES_READ, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_runs_and_unpickles_nothing_from_outside(file: Path) -> None:
    allowed = ALLOWED.get(file.relative_to(ROOT).as_posix(), {})
    found = list(violations(file.read_text()))
    assert [why for what, why in found if what not in allowed] == []
    assert {what for what, _ in found} == allowed.keys()  # what is allowed and no longer done goes from the list


def test_the_list_of_what_is_allowed_names_files_that_exist() -> None:
    assert ALLOWED.keys() <= {file.relative_to(ROOT).as_posix() for file in MODULES_READ}


def test_nothing_imports_the_program_that_unpickles() -> None:
    """It is run by its path, in a process of its own."""
    name = "unpickle_deepspeed"
    for file in MODULES_READ:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        imported = [alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
        imported += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        assert not [found for found in imported if name in found.split(".")], file


@pytest.mark.parametrize("file", sorted((ROOT / "launch").glob("*.sh")), ids=lambda file: file.name)
def test_a_script_expands_nothing_unquoted_and_runs_no_text(file: Path) -> None:
    assert shell_violations(file.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import _pickle as p",
        "from dill import loads",
        "import marshal",
        "from joblib import load",
        "import shelve",
        "eval(text)",
        "def f():\n    exec(text)",
        "compile(text, '', 'exec')",
        "__import__(name)",
        "builtins.eval(text)",
        "list(map(eval, lines))",
        "torch.load(path, weights_only=True)",
        "from torch import load as get",
        "import torch as t\nt.load(path)",
        "read = torch.load",
        "torch.save(state, path)",
        "torch.hub.load(repo, model)",
        "torch.jit.load(path)",
        "import torch.distributed.checkpoint as dcp",
        "torch.serialization.add_safe_globals([Thing])",
        "read(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.unsafe_load(text)",
        "read(text, yaml.FullLoader)",
        "os.system('ls')",
        "os.popen('ls')",
        "from os import execv",
        "os.execvp(name, argv)",
        "os.spawnl(mode, path)",
        "os.posix_spawn(path, argv, env)",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=flag)",
        "subprocess.Popen(command, -1, None, None, None, None, None, True, True)",
        "subprocess.run(command, **options)",
        "subprocess.run('ls -l')",
        "subprocess.run(f'ls {folder}')",
        "subprocess.getoutput('ls')",
        "from subprocess import run\nrun(command, shell=True)",
        "asyncio.create_subprocess_shell(text)",
        "loop.subprocess_shell(factory, text)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "import numpy\nnumpy.load(path)",
        "numpy.lib.format.read_array(stream)",
        "pandas.read_pickle(path)",
        "torch.distributed.all_gather_object(out, one)",
        "td.broadcast_object_list(out)",
        "from torch.distributed import gather_object",
        "engine.load_checkpoint(folder)",
        "importlib.import_module(name)",
        "from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint",
        "import deepspeed.utils.zero_to_fp32 as reader",
        "from importlib import import_module",
        "archive.extractall(folder)",
        "archive.extract(member)",
        "shutil.unpack_archive(file)",
        "tempfile.mktemp()",
        "server.bind(('', 80))",
        "server.bind(('0.0.0.0', port))",
        "import http.server",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "requests.get(url, verify=False)",
        "ssl._create_unverified_context()",
        "multiprocessing.connection.Listener(address)",
        "PROGRAM = '''\nimport pickle\n'''",
    ],
)
def test_a_violation_is_seen(source: str) -> None:
    assert len(list(violations(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile(pattern)",
        "from re import compile\ncompile(pattern)",
        "np.load(path, allow_pickle=False)",
        "subprocess.run(command, shell=False)",
        "importlib.import_module('scaletrain.cli')",
        "server.bind(('127.0.0.1', 0))",
        "'''Says that import pickle\nis not done.'''",
    ],
)
def test_what_only_looks_alike_is_allowed(source: str) -> None:
    assert list(violations(source)) == []


@pytest.mark.parametrize(
    "script", ['eval "$1"', "bash -c x", "curl https://x | sh", "rm $folder", "cat `ls`", ". ./settings", "run $@"]
)
def test_a_violation_in_a_script_is_seen(script: str) -> None:
    assert shell_violations(script) == [script]
