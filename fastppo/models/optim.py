"""Optimisers by transformers' names: PyTorch's, or bitsandbytes' with 8-bit or paged state."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

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
    """The optimiser of that name, as transformers sets it up.

    Args:
        name: a value of `optim`; None is AdamW.
        groups: parameters, with the learning rate of each group.
        betas: AdamW's and Lion's.
        eps: AdamW's.
        common: weight_decay and lr, which all of them take.

    Raises:
        UserError: bitsandbytes is asked for and is not installed.
    """
    if name == "sgd":
        return torch.optim.SGD(groups, **common)
    if name == "adagrad":
        return torch.optim.Adagrad(groups, **common)
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, **common)
    if name == "adafactor":
        from transformers import Adafactor

        # Its own schedule off: the learning rate is the configuration's.
        return Adafactor(groups, scale_parameter=False, relative_step=False, **common)
    if name is not None and "lion" in name:
        bits, paged = BITSANDBYTES[name]
        lion = bitsandbytes(name).optim.Lion
        return lion(groups, betas=betas, optim_bits=bits, is_paged=paged, **common)
    return adamw(name, groups, betas=betas, eps=eps, **common)


def adamw(name: str | None, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """AdamW over `groups`; `settings` are betas, eps and weight_decay, of which all of them know.

    Raises:
        UserError: bitsandbytes is asked for and is not installed.

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
    """The library, or an error that says for what it is needed."""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(
            f"optim: {name} needs bitsandbytes ({error}); pip install 'fastppo[quantization]', or "
            "use optim: adamw_torch"
        ) from None


def start_warmup_above_zero(scheduler: Any, warmup: int) -> None:
    """Take a warm-up that begins at 0 one step ahead; from its peak on the schedule stays as it is.

    Of `warmup` steps the first then has 1 / warmup of the peak and the last the peak itself, where
    transformers' first has 0: a rollout, or a batch of pairs, that teaches nothing.
    """
    if warmup < 1 or not isinstance(scheduler, LambdaLR):
        return

    def ahead(factor: Callable[[int], float]) -> Callable[[int], float]:
        if factor(0) > 0:
            return factor

        def of_step(step: int) -> float:
            if step >= warmup:
                return factor(step)
            return factor(step + 1) if step + 1 < warmup else 1.0

        return of_step

    scheduler.lr_lambdas = [ahead(factor) for factor in scheduler.lr_lambdas]
    begin = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    scheduler._last_lr = [rate * factor(0) for rate, factor in begin]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate
