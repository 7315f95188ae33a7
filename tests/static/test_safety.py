"""What the package may not do, read off its source: every way to run what came as data."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for folder in ("fastppo", "kernels", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if "fastppo/kernels" not in path.as_posix()
)
RUNS_DATA = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "runpy"}
# Functions of the user's, bitsandbytes, and the package's own lazy names.
IMPORT_BY_NAME = {
    "fastppo/__init__.py",
    "fastppo/models/optim.py",
    "fastppo/rewards/function.py",
}
# The client, and the checks of its URLs.
SPEAK_TO_SERVERS = {
    "fastppo/servers/client.py",
    "fastppo/config/engine.py",
    "fastppo/config/rewards.py",
}
NETWORK = {"requests", "httpx", "aiohttp", "urllib3", "socket", "ftplib", "telnetlib"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call of a file, by its dotted name."""
    found = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in found]


def every_call() -> Iterator[tuple[Path, str, ast.Call]]:
    """Every call of every file. A test goes over all files: a test for each would cost more."""
    return ((path, name, call) for path in SOURCES for name, call in calls(path))


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


def test_no_module_can_run_what_it_reads():
    """No eval, exec or pickle; a dynamic import only of the names that a user gives."""
    forbidden = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load"}
    assert len(SOURCES) > 100
    for path in SOURCES:
        names = [name for name, _ in calls(path)]
        assert not forbidden & set(names), path
        assert not imports(path) & RUNS_DATA, path
        pickles = {x for x in imports(path) if x.startswith("pickle")}
        assert pickles <= {"pickle", "pickle.UnpicklingError"}, path
        if any(name.endswith("import_module") for name in names):
            assert path.relative_to(ROOT).as_posix() in IMPORT_BY_NAME


def test_torch_files_are_opened_as_tensors_alone():
    for path, name, call in every_call():
        if name == "torch.load":
            assert keyword(call, "weights_only") == "True", (path, ast.unparse(call))
        if name in ("np.load", "numpy.load"):
            assert keyword(call, "allow_pickle") in (None, "False"), (path, ast.unparse(call))


def test_trust_in_remote_code_is_the_files_own_word():
    for path, _, call in every_call():
        trusted = keyword(call, "trust_remote_code")
        assert trusted in (None, "config.trust_remote_code"), (path, ast.unparse(call))


def test_commands_have_no_shell():
    for path, name, call in every_call():
        if name.startswith("subprocess."):
            assert keyword(call, "shell") is None, (path, ast.unparse(call))
            text = isinstance(call.args[0], ast.Constant | ast.JoinedStr)
            assert not text, (path, ast.unparse(call))


def test_yaml_is_read_by_a_safe_loader():
    for path, name, call in every_call():
        if name.startswith("yaml.") and "load" in name and name != "yaml.safe_load":
            assert name == "yaml.load", (path, ast.unparse(call))
            loaders = [ast.unparse(x) for x in call.args[1:]]
            assert loaders == ["_Loader"], (path, ast.unparse(call))


def test_only_the_client_speaks_to_servers():
    for path in SOURCES:
        assert not imports(path) & NETWORK, path
        if "urllib" in imports(path):
            assert path.relative_to(ROOT).as_posix() in SPEAK_TO_SERVERS


def test_our_yaml_loader_is_safe():
    import yaml

    from fastppo.config.file import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)
