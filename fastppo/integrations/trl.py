"""TRL's trainers with our output head: GRPO, RLOO, and all others that use TRL's fused one.

    from fastppo.integrations.trl import patched

    with patched():
        trainer = GRPOTrainer(model=..., reward_funcs=..., train_dataset=...)
    trainer.train()

TRL gives a model its fused head when a trainer is constructed, so the block goes around that. The
losses stay TRL's; log-probs and entropies, and their gradients, are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from trl.trainer import utils

from fastppo.integrations.head import logprobs_and_entropy
from fastppo.integrations.patching import check_version, replace

check_version("trl")

PLACE = "add_fused_lm_head"


class Head:
    """Stands for TRL's ChunkedLogProbFunction: `apply` has its arguments and its results."""

    def __init__(self, theirs: Any, *, entropy_grad: bool) -> None:
        self.theirs = theirs
        self.entropy_grad = entropy_grad

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy",),
    ) -> tuple[Tensor | None, ...]:
        """Log-probs, entropies, and what else TRL asks for: the last three are TRL's own."""
        logprob, entropy = logprobs_and_entropy(
            hidden,
            weight,
            targets,
            bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            entropy_grad=self.entropy_grad and "entropy" in outputs,
        )
        rest = tuple(name for name in outputs if name not in ("log_probs", "entropy"))
        others: tuple[Tensor | None, ...] = (None, None, None)
        if rest:
            given = (hidden, weight, bias, targets, temperature, chunk_size)
            with torch.no_grad():
                found = self.theirs.apply(*given, final_logit_softcapping, logit_scale, rest)
            others = found[2:]
        return (logprob, entropy if "entropy" in outputs else None, *others)


@contextmanager
def patched(*, entropy_grad: bool = False) -> Iterator[None]:
    """Trainers that are constructed inside the block have our output head from then on.

    Args:
        entropy_grad: prepare the gradient of the entropy in the forward, which is cheaper where the
            loss has an entropy bonus; else it is computed when a backward asks for it.

    Raises:
        RuntimeError: no model got a fused head inside the block: the trainer was constructed before
            it, or is one that does not use TRL's fused head.
    """
    theirs = getattr(utils, PLACE)
    # The same function, whose names stand for ours: only models that it is called for change.
    names = {
        **vars(utils),
        "_ChunkedLogProbFunction": Head(utils._ChunkedLogProbFunction, entropy_grad=entropy_grad),
        "_use_triton": lambda _: True,  # on every device: score only the positions with a label
    }
    add = FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__)
    add.__kwdefaults__ = theirs.__kwdefaults__
    models = 0

    def ours(*args: Any, **kwargs: Any) -> None:
        nonlocal models
        models += 1
        add(*args, **kwargs)

    replace("trl", PLACE, theirs, ours)
    try:
        yield
    finally:
        replace("trl", PLACE, ours, theirs)
    if not models:
        raise RuntimeError(
            "fastppo.integrations.trl.patched: no trainer with TRL's fused output head was "
            "constructed inside the block; construct it there, since TRL patches the model then"
        )
