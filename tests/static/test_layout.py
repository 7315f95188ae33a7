"""The plan of the house, held against the code: what imports what, and what lies where."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from fastppo import ops

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fastppo"
CODE = sorted(
    path
    for folder in ("fastppo", "kernels", "benchmarks", "examples", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if "fastppo/kernels" not in path.as_posix()
    and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)  # the peers
)
# A module imports from the rows below its own: not from above, and not from its neighbours. `types`
# and `errors` are what passes between rooms, and everybody's.
LEVELS = [
    {"export"},
    {"cli", "export_model", "info"},
    {"held_out", "reward_model", "trainer"},
    {"finish", "reward_log", "reward_report"},
    {"evaluation", "guards", "summary"},
    {"phases"},
    {"state"},
    {"card", "checkpoint", "lines", "samples", "toy"},
    {"pair_trainer"},
    {"console", "save"},
    {"preflight", "results"},
    {"advantage", "metrics", "rollout", "score", "update"},
    {"optimizer", "ptx", "reward"},
    {"reward_api", "reward_full", "reward_function"},
    {"reward_head"},
    {"batch", "data", "decoding", "merge", "roles", "sampling", "templates", "trained"},
    {"pair_model", "seats", "tuning"},
    {"base", "heads"},
    {"loading", "settle"},
    {"lora", "streaming"},
    {"oom", "offload", "optim", "plots", "session", "snapshot", "stopping", "tracking"},
    {"stash", "training_state"},
    {"streams"},
    {"explain", "plan"},
    {"memory_advice"},
    {"memory"},
    {"moments"},
    {"layer_memory", "residents"},
    {"recipe"},
    {"allocations", "model_shapes"},
    {"export_config"},
    {"budgets"},
    {"config"},
    {"config_not_here"},
    {"config_data", "config_ppo", "config_roles", "config_step", "config_training"},
    {"config_memory"},
    {
        "config_effect",
        "config_file",
        "config_key",
        "durable",
        "launch",
        "pairs",
        "offload_config",
        "precision",
        "reward_spec",
        "rounding",
    },
    {"ops"},
    {"errors", "pair_metrics", "seeds", "types", "__init__"},
]
# Packages among the modules, and their modules from the first to the last.
INNER = {
    "data": ["info", "files", "records", "mixing", "encode"],
    "templates": ["formats", "jinja", "template"],
}
PACKAGES = {"ops", *INNER}
INFRASTRUCTURE = {
    "__init__",
    "arguments",
    "backend",
    "config",
    "few_rows",
    "head",
    "native_library",
    "registered",
    "registry",
    "rows",
    "workspace",
}


def level_of(name: str) -> int:
    (level,) = [i for i, names in enumerate(LEVELS) if name in names]
    return level


def imports_of(path: Path) -> set[str]:
    """First-level modules of fastppo that a file imports when it runs (not for type checking)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {parts[1] for parts in names if parts[0] == "fastppo" and len(parts) > 1}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: a relative import hides where it points"
            parts = (node.module or "").split(".")
            if parts[0] == "fastppo" and len(parts) > 1:
                found.add(parts[1])
            elif parts == ["fastppo"]:
                modules = {path.stem for path in PACKAGE.glob("*.py")} | PACKAGES
                found |= {a.name for a in node.names if a.name in modules}
    return found


def test_every_module_has_its_place():
    modules = {path.stem for path in PACKAGE.glob("*.py")} | PACKAGES
    assert modules == set().union(*LEVELS)


@pytest.mark.parametrize(
    "path",
    [
        *sorted(PACKAGE.glob("*.py")),
        *(x for name in INNER for x in sorted((PACKAGE / name).glob("*.py"))),
    ],
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_imports_point_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    not_below = [name for name in imports_of(path) - {own} if level_of(name) <= level_of(own)]
    assert not not_below


@pytest.mark.parametrize("name", INNER)
def test_modules_of_a_package_import_those_before_them(name):
    """`__init__` says in which order a package is read, and that is the order of its imports."""
    order = INNER[name]
    assert {path.stem for path in (PACKAGE / name).glob("*.py")} == {*order, "__init__"}
    for place, stem in enumerate(order):
        text = (PACKAGE / name / f"{stem}.py").read_text(encoding="utf-8")
        later = [x for x in order[place:] if f"from fastppo.{name}.{x} import" in text]
        assert not later


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "ops").rglob("*.py")), ids=lambda path: path.stem
)
def test_ops_import_nothing_of_the_trainer(path):
    below = {"ops", "kernels"} if path.stem == "triton" else {"ops"}
    assert imports_of(path) <= below


def test_every_op_has_a_test_file_of_its_stem():
    stems = {path.stem for path in (PACKAGE / "ops").glob("*.py")} - INFRASTRUCTURE
    tested = {
        path.stem.removeprefix("test_") for path in (ROOT / "tests" / "ops").glob("test_*.py")
    }
    assert stems <= tested


def test_no_file_is_over_500_lines():
    long = {
        str(path.relative_to(ROOT)): count
        for path in CODE
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert not long


def test_kernels_are_installed_under_fastppo_and_never_as_kernels():
    assert (PACKAGE / "kernels").is_symlink()
    assert (PACKAGE / "kernels").resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("name", [name for name in ops.__all__ if name[0].islower()])
def test_public_ops_say_what_they_take_give_and_refuse(name):
    text = inspect.getdoc(getattr(ops, name)) or ""
    for section in ("Args:", "Raises:"):
        assert section in text, f"{name} has no {section}"
    for parameter in inspect.signature(getattr(ops, name)).parameters:
        if parameter not in ("ignore_index", "self"):
            assert parameter in text, f"{name} does not document {parameter}"
