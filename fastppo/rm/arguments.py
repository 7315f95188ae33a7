"""The YAML's keys as arguments of transformers' Trainer, and LoRA+'s optimiser."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import TrainingArguments

from fastppo.models import optim
from fastppo.run.launch import hide_launcher_variables

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.memory.budgets import Budgets

# Keys with the same name and meaning as transformers' arguments.
SAME_NAME = (
    "output_dir",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
    "data_seed",
    "logging_strategy",
    "logging_first_step",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "save_only_model",
    "eval_strategy",
    "eval_delay",
    "eval_on_start",
    "greater_is_better",
    "use_cpu",
)


@hide_launcher_variables()
def training_arguments(
    config: Config, train_pairs: int, device: torch.device | None = None
) -> TrainingArguments:
    """transformers' arguments for a run over `train_pairs` pairs, on one device.

    Of several processes each has its own `device`; to transformers it is alone.
    """
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    steps = max(1, -(-train_pairs // per_step))
    total = config.max_steps if config.max_steps > 0 else math.ceil(steps * config.num_train_epochs)
    given = {name: getattr(config, name) for name in SAME_NAME}
    if config.optim is not None:
        given["optim"] = "adamw_torch" if config.optim == "adamw_hf" else config.optim
    arguments = TrainingArguments(
        **given,
        warmup_steps=config.warmup(total),
        logging_steps=config.logging_steps or min(10, max(1, total // 10)),
        eval_steps=config.eval_steps or config.logging_steps or 500,
        metric_for_best_model=config.metric_for_best_model
        or ("loss" if config.early_stopping_steps else None),
        disable_tqdm=True,  # callbacks.ProgressBar draws the bar
        report_to="none",  # callbacks.LogToTrackers reports, as in stage ppo
        remove_unused_columns=False,
        label_names=[],
        dataloader_pin_memory=torch.cuda.is_available() and not config.use_cpu,
    )
    # With several GPUs the Trainer would use nn.DataParallel and multiply the batch by their
    # number, and replicas would recompute their checkpointed layers on the first device.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if device is not None and device.index is not None:
        arguments.__dict__["_setup_devices"] = device  # its cached property: the first GPU
        torch.cuda.set_device(device)
    return arguments


def fit_micro_batches(config: Config, budgets: Budgets, processes: int = 1) -> Config:
    """`config` with the largest micro-batches that the budget allows.

    The number of pairs in an optimiser step, per_device_train_batch_size x
    gradient_accumulation_steps, stays the same. Each of several processes has its part of a
    micro-batch, and the budget is that of a part.
    """
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    most = max(1, (budgets.update.tokens or 0) // (2 * config.cutoff_len))
    pairs = next(n for n in range(min(most * processes, step), 0, -1) if step % n == 0)
    return config.model_copy(
        update={
            "per_device_train_batch_size": pairs,
            "gradient_accumulation_steps": step // pairs,
            "per_device_eval_batch_size": min(config.per_device_eval_batch_size, most),
        }
    )


def lora_plus(config: Config, model: nn.Module) -> torch.optim.Optimizer | None:
    """LoRA+'s optimiser if `loraplus_lr_ratio` is set, else None: transformers then makes one."""
    if config.loraplus_lr_ratio is None:
        return None

    def make_optimizer(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        betas = (config.adam_beta1, config.adam_beta2)
        return optim.create_optimizer(
            config.optim, groups, lr=lr, betas=betas, eps=config.adam_epsilon
        )

    optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
        cast(Any, model),
        cast(Any, make_optimizer),  # PEFT calls it like a class
        lr=config.learning_rate,
        loraplus_lr_ratio=config.loraplus_lr_ratio,
        loraplus_weight_decay=config.weight_decay,
    )
    return optimizer
