"""No bytes that come from a file or a peer are ever run or unpickled, and no command passes through a shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "torch.load": "safetensors holds tensors, JSON the rest",
    "torch.save": "safetensors holds tensors, JSON the rest",
    "yaml.load": "scaletrain.config reads YAML",
    "yaml.full_load": "scaletrain.config reads YAML",
    "yaml.unsafe_load": "scaletrain.config reads YAML",
    "os.system": "subprocess takes a list",
    "os.popen": "subprocess takes a list",
    "tempfile.mktemp": "mkstemp makes the file it names",
}
OBJECT_COLLECTIVES = {
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}


def dotted(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""


def violations(source: str) -> Iterator[str]:
    """What a module does that it must not, one line each."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"{node.lineno}: import {a.name}" for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield f"{node.lineno}: import {node.module}"
        elif isinstance(node, ast.Call):
            yield from (f"{node.lineno}: {breach}" for breach in _call(node))


def _call(node: ast.Call) -> Iterator[str]:
    name = dotted(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in BUILTINS or name.removeprefix("builtins.") in BUILTINS:
        yield name
    if name in CALLS:
        yield f"{name}: {CALLS[name]}"
    if name.rpartition(".")[2] in OBJECT_COLLECTIVES:
        yield f"{name}: unpickles what a peer has sent"
    if name in ("np.load", "numpy.load") and not _is(given.get("allow_pickle"), False):
        yield f"{name} without allow_pickle=False"
    for keyword in ("shell", "trust_remote_code"):
        if keyword in given and not _is(given[keyword], False):
            yield f"{name} with {keyword}"


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("file", sorted((ROOT / "scaletrain").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_runs_and_unpickles_nothing_from_outside(file: Path) -> None:
    assert list(violations(file.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "eval(text)",
        "def f():\n    exec(text)",
        "torch.load(path, weights_only=True)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "os.system('ls')",
        "subprocess.run(command, shell=True)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "torch.distributed.all_gather_object(out, one)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_a_violation_is_seen(source: str) -> None:
    assert len(list(violations(source))) == 1


@pytest.mark.parametrize("source", ["model.eval()", "np.load(path, allow_pickle=False)", "subprocess.run(command, shell=False)"])
def test_what_only_looks_alike_is_allowed(source: str) -> None:
    assert list(violations(source)) == []
