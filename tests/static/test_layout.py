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
    for folder in ("fastppo", "kernels", "benchmarks", "docs", "examples", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if "fastppo/kernels" not in path.as_posix()
    and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)  # the peers
)
# A room imports from the rows below its own: not from above, and not from its neighbours.
ROOMS = [
    {"__main__"},
    {"launch"},
    {"cli", "export", "info", "integrations", "report", "trainer"},
    {"ppo", "rm"},
    {"rewards", "run", "toy"},
    {"models"},
    {"data", "memory", "servers", "templates"},
    {"config"},
    {"offload", "ops"},
    {"errors", "seeds", "types", "__init__"},
    {"packages"},
]
# Rooms that say in which order they are read.
READ_IN_ORDER = {
    "data": ["info", "files", "records", "mixing", "encode"],
    "templates": ["formats", "jinja", "template", "exported"],
}
PACKAGES = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
INFRASTRUCTURE = {
    "__init__",
    "arguments",
    "backend",
    "checks",
    "config",
    "decode_attention",
    "decoder_layer",
    "few_rows",
    "gated_unit",
    "gradient_made",
    "head",
    "labels",
    "linear_passes",
    "native_library",
    "operands",
    "products",
    "registered",
    "registry",
    "rms_norm",
    "rows",
    "shapes",
    "surrogate",
    "workspace",
}


def level_of(name: str) -> int:
    (level,) = [i for i, names in enumerate(ROOMS) if name in names]
    return level


def imports_of(path: Path) -> set[str]:
    """Rooms of fastppo that a file imports from when it runs (not for type checking)."""
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


def modules_of(path: Path, room: str) -> set[str]:
    """Modules of a room that a file imports when it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == f"fastppo.{room}":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith(f"fastppo.{room}."):
                found.add(node.module.split(".")[2])
    return found


def test_every_room_has_its_place():
    rooms = {path.stem for path in PACKAGE.glob("*.py")} | PACKAGES
    assert rooms == set().union(*ROOMS)


def test_imports_point_one_way():
    rooms = [path for path in CODE if PACKAGE in path.parents and "ops" not in path.parts]
    assert len(rooms) > 100
    for path in rooms:
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        not_below = [name for name in imports_of(path) - {own} if level_of(name) <= level_of(own)]
        assert not not_below, path


@pytest.mark.parametrize("room", sorted(PACKAGES - {"ops"}))
def test_modules_of_a_room_import_each_other_one_way(room):
    """No two of them need each other, so that each can be read after those that it stands on."""
    left = {
        path.stem: modules_of(path, room) - {path.stem} for path in (PACKAGE / room).glob("*.py")
    }
    while ready := [stem for stem, needs in left.items() if not needs & left.keys()]:
        for stem in ready:
            del left[stem]
    assert not left, "a circle"


@pytest.mark.parametrize("room", READ_IN_ORDER)
def test_a_package_lists_its_modules_in_the_order_of_their_imports(room):
    """`__init__` says in which order a room is read, and that is the order of its imports."""
    order = READ_IN_ORDER[room]
    assert {path.stem for path in (PACKAGE / room).glob("*.py")} == {*order, "__init__"}
    for place, stem in enumerate(order):
        assert not modules_of(PACKAGE / room / f"{stem}.py", room) & set(order[place:])


def test_few_files_stand_beside_the_rooms():
    # `python -m fastppo` looks for __main__ and for no other name.
    assert len([path for path in PACKAGE.glob("*.py") if path.stem != "__main__"]) <= 8


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "ops").rglob("*.py")), ids=lambda path: path.stem
)
def test_ops_import_nothing_of_the_trainer(path):
    below = {"ops", "kernels"} if path.stem in ("triton", "triton_tokens") else {"ops"}
    assert imports_of(path) <= below


def test_every_op_has_a_test_file_of_its_stem():
    stems = {path.stem for path in (PACKAGE / "ops").glob("*.py")} - INFRASTRUCTURE
    tested = {
        path.stem.removeprefix("test_") for path in (ROOT / "tests" / "ops").glob("test_*.py")
    }
    assert stems <= tested


def test_no_module_is_over_400_lines_and_no_other_file_over_500():
    long = {
        str(path.relative_to(ROOT)): count
        for path in CODE
        if (count := len(path.read_text(encoding="utf-8").splitlines()))
        > (400 if PACKAGE in path.parents else 500)
    }
    assert not long


def test_kernels_are_installed_under_fastppo_and_never_as_kernels():
    assert (PACKAGE / "kernels").is_symlink()
    assert (PACKAGE / "kernels").resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


FUNCTIONS = [
    getattr(module, name)
    for module in (ops, ops.losses)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_public_ops_say_what_they_take_give_and_refuse(function):
    name, text = function.__name__, inspect.getdoc(function) or ""
    for section in ("Args:", "Raises:"):
        assert section in text, f"{name} has no {section}"
    for parameter in inspect.signature(function).parameters:
        if parameter not in ("ignore_index", "self"):
            assert parameter in text, f"{name} does not document {parameter}"
