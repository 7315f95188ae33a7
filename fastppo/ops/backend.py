"""Choose the backend of an op.

An op has up to three backends: `triton` (CUDA and ROCm), `native` (C++ for the CPU) and `torch`,
the definition. The device of the inputs decides, or the caller (`backend=`), or FASTPPO_BACKEND. If
a backend that was asked for cannot run, that is an error: there is no silent fallback.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import Final

import torch
from torch import Tensor

from fastppo.ops import native_library

BACKENDS: Final = ("triton", "native", "torch")

# Read once, so that a process does not change its backend half-way.
FORCED: Final = os.environ.get("FASTPPO_BACKEND") or None
HAS_TRITON: Final = importlib.util.find_spec("triton") is not None
# Triton reads this variable when a kernel is defined; with it kernels run on the CPU, slowly.
INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"


def choose(op: str, backend: str | None, *tensors: Tensor | None) -> str:
    """Name of the backend that runs `op`: the caller's, else FASTPPO_BACKEND, else by device.

    On a GPU that is `triton`, on the CPU `native`; float64 always runs by the definition. A CPU
    without the native kernels also uses the definition, with one warning.

    Args:
        op: name of the public function, for the message.
        backend: the caller's `backend=`; None means not given.
        tensors: the inputs, whose devices and dtypes decide.

    Raises:
        ValueError: a name that is no backend, or a backend that cannot run this op.
    """
    wanted, source = (backend, "backend=") if backend is not None else (FORCED, "FASTPPO_BACKEND=")
    given = [t for t in tensors if t is not None]
    if wanted is None:
        kind = given[0].device.type
        if kind not in ("cuda", "cpu") or any(t.dtype == torch.float64 for t in given):
            return "torch"
        if kind == "cpu" and native_library.OBSTACLE is not None:
            _say_once(native_library.OBSTACLE)
            return "torch"
        wanted, source = ("triton", "on a GPU ") if kind == "cuda" else ("native", "on a CPU ")
    if wanted == "torch":
        return wanted
    if wanted not in BACKENDS:
        raise ValueError(
            f"{op}: {source}{wanted!r} is no backend; wanted one of {', '.join(BACKENDS)}"
        )
    why = _obstacle(op, wanted, given)
    if why is not None:
        raise ValueError(f"{op}: {source}{wanted!r} cannot run: {why}; or use 'torch'")
    return wanted


def _obstacle(op: str, backend: str, tensors: list[Tensor]) -> str | None:
    """Why a backend cannot run on these inputs, and the cure; None if it can."""
    device = tensors[0].device
    if backend == "native" and native_library.OBSTACLE is not None:
        return native_library.OBSTACLE
    if backend == "triton" and not HAS_TRITON:
        return "triton is not installed; run: pip install triton"
    if any(t.dtype == torch.float64 for t in tensors):
        return "its kernels compute in float32 and float64 came; cast it"
    if backend == "native":
        return None if device.type == "cpu" else f"the inputs are on {device}; move them to the CPU"
    if device.type != "cuda" and not INTERPRETED:
        return f"the inputs are on {device}; move them to a GPU, or set TRITON_INTERPRET=1"
    return None


_said: list[str] = []


def _say_once(why: str) -> None:
    """Warn once that the CPU's kernels are missing: results are right without them, but slow."""
    if not _said and not torch.compiler.is_compiling():
        _said.append(why)
        warnings.warn(f"fastppo.ops runs in PyTorch, several times slower: {why}", stacklevel=3)


def available(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Names of the backends that can run on float32 tensors of `device`; `torch` always can."""
    probe = torch.empty(0, device=device)
    return tuple(
        name for name in BACKENDS if name == "torch" or _obstacle("", name, [probe]) is None
    )
