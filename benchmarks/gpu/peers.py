"""Others' cross-entropy, as far as it is importable: of logits, and of hidden states.

Each is (inputs) -> negative log-prob of each token. One that is not installed is left out; one that
is and fails is a line of the table.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor

OfLogits = Callable[[Tensor, Tensor], Tensor]
OfHidden = Callable[[Tensor, Tensor, Tensor], Tensor]


def installed(module: str, *packages: str) -> str | None:
    """The version of a package, by the names that it has in indexes; None if it is not there."""
    if importlib.util.find_spec(module) is None:
        return None
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def of_logits() -> Iterator[tuple[str, Callable[[], OfLogits]]]:
    """Name, and a function that imports what computes it."""
    if found := installed("quack", "quack-kernels"):
        yield f"quack {found}", quack
    if found := installed("liger_kernel", "liger-kernel", "liger-kernel-nightly"):
        yield f"Liger {found}", liger
    if found := installed("flash_attn", "flash-attn"):
        yield f"flash-attention {found}", flash_attention


def quack() -> OfLogits:
    from quack.cross_entropy import cross_entropy

    return lambda logits, token: cross_entropy(logits, token, reduction="none")


def liger() -> OfLogits:
    from liger_kernel.transformers.functional import liger_cross_entropy

    # With a gradient its forward writes over the logits, so that it is given a copy.
    def call(logits: Tensor, token: Tensor) -> Tensor:
        own = logits * 1 if logits.requires_grad else logits
        found: Any = liger_cross_entropy(own, token, reduction="none")
        return found[0] if isinstance(found, tuple) else found

    return call


def flash_attention() -> OfLogits:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda logits, token: cross_entropy_loss(logits, token)[0]


def of_hidden() -> Iterator[tuple[str, Callable[[], OfHidden]]]:
    """Name, and a function that imports what computes it."""
    if found := installed("cut_cross_entropy", "cut-cross-entropy"):
        yield f"cut-cross-entropy {found}", cut_cross_entropy
    if found := installed("liger_kernel", "liger-kernel", "liger-kernel-nightly"):
        yield f"Liger {found}, scaled cross-entropy", liger_scaled


def cut_cross_entropy() -> OfHidden:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, token: linear_cross_entropy(
        hidden, weight, token, reduction="none"
    )


def liger_scaled() -> OfHidden:
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as module

    return module.LigerFusedLinearScaledCrossEntropyFunction.apply  # type: ignore[no-any-return]
