"""`python -m fastppo.info`: versions, devices, and which backend runs each operator, and why."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from fastppo import __version__
from fastppo.ops import backend, native_library
from fastppo.ops.registry import OPS

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "datasets", "flash-attn")


def installed(package: str) -> str:
    """The version of a package, or a text that says that it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def backends() -> list[tuple[str, str]]:
    """Each backend, and whether it can run here, with the reason if it cannot."""
    if native_library.OBSTACLE is None:
        threads = torch.get_num_threads()
        native = f"runs on CPU tensors: {native_library.isa()}, {threads} threads"
    else:
        native = native_library.OBSTACLE
    if not backend.HAS_TRITON:
        triton = "triton is not installed; run: pip install triton"
    elif torch.cuda.is_available():
        triton = "runs on GPU tensors"
    elif backend.INTERPRETED:
        triton = "runs on CPU tensors by Triton's interpreter, slowly (TRITON_INTERPRET=1)"
    else:
        triton = "there is no GPU"
    return [("triton", triton), ("native", native), ("torch", "runs everywhere; the definition")]


def devices() -> list[str]:
    """Descriptions of the processor and of every GPU."""
    found = [f"cpu: {platform.processor() or platform.machine()}, {os.cpu_count()} cores"]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i}: {gpu.name}, {gpu.total_memory / 2**30:.1f} GiB")
    return found


def chosen() -> list[tuple[str, str]]:
    """Each operator, and the backend that runs it here on each device."""
    places = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for name in OPS:
        by_place = []
        for place in places:
            try:
                picked = backend.choose(name, None, torch.empty(0, device=place))
            except ValueError as error:
                picked = f"an error ({error})"
            by_place.append(f"{picked} on {place}")
        rows.append((name, ", ".join(by_place)))
    return rows


def main() -> None:
    print(f"fastppo {__version__}, Python {platform.python_version()}, {platform.system()}")
    print("\npackages\n" + "\n".join(f"  {name:13} {installed(name)}" for name in PACKAGES))
    print("\ndevices\n" + "\n".join(f"  {line}" for line in devices()))
    print("\nbackends of fastppo.ops\n" + "\n".join(f"  {a:8} {b}" for a, b in backends()))
    if backend.FORCED:
        print(f"  FASTPPO_BACKEND={backend.FORCED} forces one")
    print("\noperators\n" + "\n".join(f"  {name:22} {where}" for name, where in chosen()))


if __name__ == "__main__":
    main()
