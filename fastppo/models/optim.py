"""Optimisers by transformers' names: PyTorch's, or bitsandbytes' with 8-bit or paged state.

transformers' own `Trainer.get_optimizer_cls_and_kwargs` is not used, because it rejects `adamw_hf`,
which old files have, and importing `transformers.trainer` takes seconds. A test compares the
optimisers made here with those of that function.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from fastppo import packages
from fastppo.config.training import BITSANDBYTES
from fastppo.errors import UserError


def create_optimizer(
    name: str | None,
    groups: list[dict[str, Any]],
    *,
    betas: tuple[float, float],
    eps: float,
    **common: Any,
) -> torch.optim.Optimizer:
    """The optimiser that transformers' Trainer would make for `optim: name`.

    Args:
        name: a value of `optim`; None and adamw_hf are PyTorch's AdamW.
        groups: PyTorch's parameter groups; each may have its own lr and weight_decay.
        betas: for AdamW and Lion; the others have none.
        eps: for AdamW; the others keep their default.
        common: weight_decay and lr for groups that set none.

    Raises:
        UserError: `name` needs bitsandbytes, which is not installed.
    """
    if name == "sgd":
        return torch.optim.SGD(groups, **common)
    if name == "adagrad":
        return torch.optim.Adagrad(groups, **common)
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, **common)
    if name == "adafactor":
        from transformers import Adafactor

        # Without its own schedule: the learning rate is the configuration's.
        return Adafactor(groups, scale_parameter=False, relative_step=False, **common)
    if name is not None and "lion" in name:
        bits, paged = BITSANDBYTES[name]
        lion = bitsandbytes(name).optim.Lion
        return lion(groups, betas=betas, optim_bits=bits, is_paged=paged, **common)
    return adamw(name, groups, betas=betas, eps=eps, **common)


def adamw(name: str | None, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """PyTorch's AdamW, or bitsandbytes' if `name` is one of those; `settings` are passed to it.

    Raises:
        UserError: `name` needs bitsandbytes, which is not installed.

    Source: Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization; Dettmers et al. 2022,
    8-bit Optimizers via Block-wise Quantization.
    """
    if name not in BITSANDBYTES:
        return torch.optim.AdamW(
            groups, fused=True if name == "adamw_torch_fused" else None, **settings
        )
    bits, paged = BITSANDBYTES[name]
    return bitsandbytes(name).optim.AdamW(groups, optim_bits=bits, is_paged=paged, **settings)


def bitsandbytes(name: str) -> Any:
    """The bitsandbytes module; `name` is the value of `optim` that needs it, for the error."""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(
            f"optim: {name} needs bitsandbytes ({error}); "
            f"{packages.install('quantization')}, or use optim: adamw_torch"
        ) from None


def start_warmup_above_zero(scheduler: Any, warmup: int) -> None:
    """Shift the warm-up of `scheduler` by one step, so that no step has a learning rate of 0.

    The first of the `warmup` steps then has 1 / warmup of the peak rate, and the last has the peak.
    With transformers the first step has rate 0, so that its rollout, or its batch of pairs, is
    wasted. After the warm-up the schedule is unchanged, and so is one that does not begin at 0.
    """
    if warmup < 1 or not isinstance(scheduler, LambdaLR):
        return

    def shift(factor: Callable[[int], float]) -> Callable[[int], float]:
        if factor(0) > 0:
            return factor

        def shifted(step: int) -> float:
            if step >= warmup:
                return factor(step)
            return factor(step + 1) if step + 1 < warmup else 1.0

        return shifted

    scheduler.lr_lambdas = [shift(factor) for factor in scheduler.lr_lambdas]
    first = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    scheduler._last_lr = [rate * factor(0) for rate, factor in first]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate
