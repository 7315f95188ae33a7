"""What the package may not do, read off its source: every way to run what came as data."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for folder in ("fastppo", "kernels", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if "fastppo/kernels" not in path.as_posix()
)
ALL = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
RUNS_DATA = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "runpy"}
# Functions of the user's, bitsandbytes, and the package's own lazy names.
IMPORT_BY_NAME = {
    "fastppo/__init__.py",
    "fastppo/models/optim.py",
    "fastppo/rewards/function.py",
}
# The client, and the check of its URL.
SPEAK_TO_SERVERS = {"fastppo/rewards/server.py", "fastppo/config/rewards.py"}
NETWORK = {"requests", "httpx", "aiohttp", "urllib3", "socket", "ftplib", "telnetlib"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call of a file, by its dotted name."""
    found = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in found]


@cache
def imports(path: Path) -> set[str]:
    """First parts of all imported modules, and the names that come from pickle."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
            if node.module == "pickle":
                found |= {f"pickle.{alias.name}" for alias in node.names}
    return found


def keyword(call: ast.Call, name: str) -> str | None:
    """A keyword argument as it is written."""
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


@ALL
def test_no_module_can_run_what_it_reads(path):
    """No eval, exec or pickle; a dynamic import only of the names that a user gives."""
    names = [name for name, _ in calls(path)]
    forbidden = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load"}
    assert not forbidden & set(names)
    assert not imports(path) & RUNS_DATA
    assert {x for x in imports(path) if x.startswith("pickle")} <= {
        "pickle",
        "pickle.UnpicklingError",
    }
    if any(name.endswith("import_module") for name in names):
        assert path.relative_to(ROOT).as_posix() in IMPORT_BY_NAME


@ALL
def test_torch_files_are_opened_as_tensors_alone(path):
    for name, call in calls(path):
        if name == "torch.load":
            assert keyword(call, "weights_only") == "True", ast.unparse(call)
        if name in ("np.load", "numpy.load"):
            assert keyword(call, "allow_pickle") in (None, "False"), ast.unparse(call)


@ALL
def test_trust_in_remote_code_is_the_files_own_word(path):
    for _, call in calls(path):
        trusted = keyword(call, "trust_remote_code")
        assert trusted in (None, "config.trust_remote_code"), ast.unparse(call)


@ALL
def test_commands_have_no_shell(path):
    for name, call in calls(path):
        if name.startswith("subprocess."):
            assert keyword(call, "shell") is None, ast.unparse(call)
            assert not isinstance(call.args[0], ast.Constant | ast.JoinedStr), ast.unparse(call)


@ALL
def test_yaml_is_read_by_a_safe_loader(path):
    for name, call in calls(path):
        if name.startswith("yaml.") and "load" in name and name != "yaml.safe_load":
            assert name == "yaml.load", ast.unparse(call)
            assert [ast.unparse(x) for x in call.args[1:]] == ["_Loader"], ast.unparse(call)


@ALL
def test_only_the_reward_client_speaks_to_servers(path):
    assert not imports(path) & NETWORK
    if "urllib" in imports(path):
        assert path.relative_to(ROOT).as_posix() in SPEAK_TO_SERVERS


def test_our_yaml_loader_is_safe():
    import yaml

    from fastppo.config.file import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)
