"""The process of one section: `python -m benchmarks.gpu.child SECTION --part 1/1 --rows FILE`.

`benchmarks.gpu.runner` starts it. It writes a line of JSON for every row as soon as there is one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from benchmarks.gpu.sections import BY_NAME

# Exit code of a child that has no device to measure.
NO_DEVICE = 3


class Hidden:
    """Finds modules as Python's own finder does, but for packages that are not to be there.

    A hidden package is found in the folder `site` alone, where one was given (`--wheels`).
    """

    def __init__(self, names: list[str], site: Path | None) -> None:
        self.names, self.site = set(names), site

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name in self.names:
            path = [str(self.site)] if self.site is not None else []
        return PathFinder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(PathFinder, name)


class Rows:
    """Appends rows to a file, each in one write, so that a killed process leaves whole lines."""

    def __init__(self, path: Path | None, fault: str | None = None) -> None:
        self.file = None
        self.fault, self.count = fault, 0
        if path is not None:
            self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            os.write(self.file, (json.dumps(line) + "\n").encode())

    def __call__(self, **row: Any) -> None:
        self.write(row)
        self.count += 1
        if self.fault == "fail":
            raise RuntimeError("a failure that was asked for")
        if self.fault == "hang":
            time.sleep(3600)


def machine() -> dict[str, Any]:
    """The device and the versions that numbers depend on."""
    import torch
    import triton

    found = {
        "device": f"{platform.machine()} CPU, interpreted",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found |= {
            "device": gpu.name,
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "multiprocessors": gpu.multi_processor_count,
            "l2_mib": round(getattr(gpu, "L2_cache_size", 0) / 2**20, 1),
            "capability": f"{gpu.major}.{gpu.minor}",
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return found


def main(argv: list[str] | None = None) -> int:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.child", description=__doc__)
    parser.add_argument("section", choices=list(BY_NAME))
    parser.add_argument("--part", required=True, help="1/6 is the first of six; warm compiles only")
    parser.add_argument("--rows", type=Path, help="file that rows are appended to")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--hide", nargs="*", default=[], help="packages that are not to be found")
    parser.add_argument("--site", type=Path, help="folder to import missing packages from")
    parser.add_argument("--fault", choices=["fail", "hang"])
    asked = parser.parse_args(argv)
    if asked.hide:
        at = sys.meta_path.index(PathFinder)
        sys.meta_path[at] = Hidden(asked.hide, asked.site)  # type: ignore[call-overload]
    if asked.site is not None:
        sys.path.insert(0, str(asked.site))

    import torch

    imported = {"torch": round(time.perf_counter() - began, 2)}
    if not asked.rehearse and not torch.cuda.is_available():
        print("there is no GPU here; --rehearse walks through without one", file=sys.stderr)
        return NO_DEVICE
    for name in ("triton", "fastppo.ops"):
        began = time.perf_counter()
        importlib.import_module(name)
        imported[name] = round(time.perf_counter() - began, 2)
    from benchmarks.gpu.plan import make_plan

    add = Rows(asked.rows, asked.fault)
    add.write({"machine": machine()})
    plan = make_plan(asked.rehearse, part=asked.part, tokens=asked.tokens, imported=imported)
    if asked.rehearse:
        from tests.ops import interpreter

        interpreter.install()
    module = importlib.import_module(f"benchmarks.gpu.{asked.section}")
    wrong = module.measure(plan, add)
    if wrong:
        print(f"{len(wrong)} wrong: {'; '.join(wrong[:5])}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
