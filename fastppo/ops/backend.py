"""Which implementation of an op runs.

An op has up to three: `triton` (CUDA and ROCm), `native` (C++ for the CPU) and `torch`, the
definition. The choice is made by the device of the inputs, or forced by `backend=` or by
FASTPPO_BACKEND. A forced backend that cannot run is an error; nothing falls back silently.
"""

from __future__ import annotations

import os
from typing import Final

BACKENDS: Final = ("triton", "native", "torch")

# Read once: a process that changed backend half-way would compare unlike numbers.
FORCED: Final = os.environ.get("FASTPPO_BACKEND") or None


def choose(op: str, backend: str | None) -> str:
    """Name of the backend that runs `op`: the caller's, else FASTPPO_BACKEND, else by device.

    Args:
        op: name of the public function, for the message.
        backend: the caller's `backend=`; None leaves the choice open.

    Raises:
        ValueError: a name that is no backend, or a backend that cannot run this op.
    """
    wanted, source = (backend, "backend=") if backend is not None else (FORCED, "FASTPPO_BACKEND=")
    if wanted is None or wanted == "torch":
        return "torch"
    if wanted not in BACKENDS:
        raise ValueError(
            f"{op}: {source}{wanted!r} is no backend; wanted one of {', '.join(BACKENDS)}"
        )
    raise ValueError(
        f"{op}: {source}{wanted!r} cannot run: this version has no {wanted} kernel of {op}; "
        "leave it out, or use 'torch'"
    )


def available(op: str) -> tuple[str, ...]:
    """Backends that can run `op` here; `torch` is always one of them."""
    del op  # every op has the definition, and nothing else yet
    return ("torch",)
