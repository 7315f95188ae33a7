"""What a kernel is compiled for, and what it is not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton


def kernel(*varying: str, aligned: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """`triton.jit` for a kernel whose integers `varying` change from call to call.

    Triton compiles a kernel anew for every pointer that is or is not divisible by 16, and so in the
    middle of training, where micro-batches are cut out of one packed tensor. Here only the pointers
    in `aligned` have that; kernels over logits are told by ALIGNED and TOGETHER where rows lie.
    """

    def compiled(function: Any) -> Any:
        rest = [
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if name not in aligned and "constexpr" not in str(parameter.annotation)
        ]
        return triton.jit(do_not_specialize=varying, do_not_specialize_on_alignment=rest)(function)

    return compiled
