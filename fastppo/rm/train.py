"""Stage rm: a reward model (an adapter and a head) from pairs of better and worse answers."""

from __future__ import annotations

import math
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from fastppo import __version__
from fastppo.config.rewards import HEAD_FILES
from fastppo.config.roles import folder_to_evaluate
from fastppo.data import encode_pairs
from fastppo.errors import Interrupted, TrainingStopped
from fastppo.memory.auto import advice_on_failure, resolve_auto
from fastppo.memory.budgets import Budgets
from fastppo.memory.retry import retried
from fastppo.models import optim
from fastppo.models.adapters import (
    adapter_to_continue,
    adapters_to_merge,
    disable_input_cast,
    load_peft_model,
    merge_adapters,
    round_outputs_to_bfloat16,
    setup_lora_tuning,
    setup_weight_tuning,
    upcast_trainable,
)
from fastppo.models.load import (
    causal_lm,
    compute_dtype,
    hidden_size,
    load_base,
    load_tokenizer,
    wrap_activations,
)
from fastppo.models.value_head import load_value_head, new_value_head
from fastppo.rewards.adapter import read_score_at
from fastppo.rm.log import Bar, Lines, Report
from fastppo.rm.model import RewardModel, calibrate
from fastppo.rm.pairs import Pairs, collate
from fastppo.rm.report import LogFile, report
from fastppo.rm.trainer import PairTrainer, compute_metrics
from fastppo.run import console, durable, results, save, session
from fastppo.run.launch import alone
from fastppo.run.stopping import Stop
from fastppo.run.tracking import Trackers
from fastppo.templates import get_template

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.data import Records

HEAD_STD = 0.01  # the head starts near 0: every pair even, and none of them by much


# Keys that transformers' arguments have by the same name and meaning.
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


@alone()
def training_arguments(config: Config, train_pairs: int) -> TrainingArguments:
    """The YAML's keys as transformers' arguments, on one device however many are visible."""
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
        disable_tqdm=True,  # Bar draws the one that goes with our lines
        report_to="none",  # Report does that, as stage ppo does
        remove_unused_columns=False,
        label_names=[],
        dataloader_pin_memory=torch.cuda.is_available() and not config.use_cpu,
    )
    # With more than one the Trainer takes nn.DataParallel and as many times the batch: another run,
    # and its replicas would recompute their layers on the first device.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def trained_model(config: Config, device: torch.device) -> nn.Module:
    """The base with what `finetuning_type` trains of it: float32, the rest as it was loaded."""
    base = load_base(config, device, bits=config.quantization_bit)
    if config.finetuning_type == "lora":
        model: nn.Module = setup_lora_tuning(config, base)
        trained = [p for p in model.parameters() if p.requires_grad]
        round_outputs_to_bfloat16(model, trained)
        disable_input_cast(model)
    else:
        model, trained = base, setup_weight_tuning(config, base, config.finetuning_type)
    upcast_trainable(trained)
    return model


def lora_plus(config: Config, model: nn.Module) -> torch.optim.Optimizer | None:
    """The optimiser where `loraplus_lr_ratio` is set; None leaves it to transformers."""
    if config.loraplus_lr_ratio is None:
        return None

    def asked_for(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        betas = (config.adam_beta1, config.adam_beta2)
        return optim.create_optimizer(
            config.optim, groups, lr=lr, betas=betas, eps=config.adam_epsilon
        )

    return create_loraplus_optimizer(
        model,
        asked_for,
        lr=config.learning_rate,
        loraplus_lr_ratio=config.loraplus_lr_ratio,
        loraplus_weight_decay=config.weight_decay,
    )


def earlier_head(config: Config) -> Path | None:
    """The adapter that goes on training, where it is a reward model already, as in LLaMA-Factory.

    An SFT adapter has no head: there a new one begins.
    """
    goes_on = adapter_to_continue(config)
    folder = None if goes_on is None else Path(goes_on)
    if folder is None or not any((folder / name).is_file() for name in HEAD_FILES):
        return None
    return folder


def load_trained(config: Config, folder: Path, device: torch.device) -> nn.Module:
    """The model that a run (or LLaMA-Factory's) left in `folder`: under its adapter, or whole."""
    if config.finetuning_type != "lora":
        return load_base(config, device, str(folder))
    base = load_base(config, device, bits=config.quantization_bit)
    base = merge_adapters(base, adapters_to_merge(config), "adapter_name_or_path")
    return load_peft_model(base, str(folder), "adapter_name_or_path", train=False)


class Beginning:
    """What trains as it is now, in host memory."""

    def __init__(self, model: nn.Module) -> None:
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.values = [p.detach().to("cpu", copy=True) for p in self.trained]

    @torch.no_grad()
    def restore(self) -> None:
        """Put it back, without gradients."""
        for parameter, value in zip(self.trained, self.values, strict=True):
            parameter.copy_(value)
            parameter.grad = None


def within(config: Config, budgets: Budgets) -> Config:
    """The same optimiser steps in micro-batches of as many pairs as the budget has room for."""
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    most = max(1, (budgets.update.tokens or 0) // (2 * config.cutoff_len))
    pairs = next(n for n in range(min(most, step), 0, -1) if step % n == 0)
    return config.model_copy(
        update={
            "per_device_train_batch_size": pairs,
            "gradient_accumulation_steps": step // pairs,
            "per_device_eval_batch_size": min(config.per_device_eval_batch_size, most),
        }
    )


def run(config: Config, records: Records) -> None:
    """Stage rm; a full disk or a signal ends it in one line."""
    with durable.space(Path(config.output_dir)), ExitStack() as until_the_end:
        run_pairs(config, records, until_the_end)


def run_pairs(config: Config, records: Records, until_the_end: ExitStack) -> None:
    """Train on the pairs, evaluate on those held out, write adapter or model, and its head.

    Without training: evaluate what was trained before, by fastppo or LLaMA-Factory.
    """
    resumed, notes = durable.to_resume(config)
    if config.resume_from_checkpoint:
        config = save.decided(config, resumed or Path(config.output_dir))
    device = session.start(config)
    output_dir, folder = Path(config.output_dir), None
    if not config.trains:
        folder, config = folder_to_evaluate(config)
    tokenizer = load_tokenizer(config)
    template = get_template(
        config.template,
        tokenizer,
        enable_thinking=config.enable_thinking,
        preserve_thinking=config.preserve_thinking,
    )
    start = folder or earlier_head(config)
    score_at = "eos"
    if start is not None:
        score_at = read_score_at(start) or ("suffix" if template.suffix_ids else "eos")
    room = (config.cutoff_len, config.default_system)
    how = {"lf_truncation": config.lf_truncation, "suffix": score_at == "suffix"}
    train, held_out = (
        Pairs(encode_pairs(rows, template, *room, **how)) for rows in (records.train, records.eval)
    )
    config, plan, said = resolve_auto(config, device)
    budgets = Budgets.of(config)
    set_seed(config.seed)
    with advice_on_failure(plan, config, budgets, device):
        model = load_trained(config, folder, device) if folder else trained_model(config, device)
    if start is None:
        head = new_value_head(hidden_size(model), device)
        nn.init.normal_(head.weight, std=HEAD_STD)
    else:
        head = load_value_head(start, hidden_size(model), device, "adapter_name_or_path")
    offload = wrap_activations(config, causal_lm(model))
    bf16 = compute_dtype(config, device) == torch.bfloat16
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = "adapter" if config.finetuning_type == "lora" else f"base ({config.finetuning_type})"
    trains = f"{what} and head train {trainable + head.weight.numel() + 1:,}"
    say = console.console.print
    say(f"[bold]fastppo {__version__}[/bold], stage rm, {config.model_name_or_path}")
    say(
        f"  device {device}, {'bf16' if bf16 else 'float32'}, "
        + ("" if folder else f"{len(train)} pairs to train on, ")
        + f"{len(held_out)} held out; "
        + (f"evaluates {folder}, read at {score_at}" if folder else trains)
    )
    say(f"  activations: {offload.mode}; writes {output_dir}")
    for line in [*said, *config.ignored]:
        say(f"  [yellow]note:[/yellow] {line}")
    for line in [*notes, *([] if resumed is None else [f"resumes from {resumed}"])]:
        say(f"  {line}")
    save.prepare_output_dir(output_dir)
    stop = until_the_end.enter_context(Stop())  # before, there is nothing to save
    reward_model = RewardModel(model, head, autocast=bf16)

    @alone()
    def new_trainer() -> PairTrainer:
        trainer = PairTrainer(
            model=reward_model,
            args=training_arguments(within(config, budgets), len(train)),
            train_dataset=train,
            eval_dataset=held_out if len(held_out) else None,
            data_collator=lambda pairs: collate(pairs, template.pad_id),
            compute_metrics=compute_metrics,
            callbacks=[Lines(plan, device, train.longest), Bar(config), LogFile()],
            optimizers=(None if folder else lora_plus(config, reward_model), None),
            stop=stop,
            max_bad_steps=config.max_bad_steps,
            decisions=budgets.decisions(),
        )
        trainer.tokenizer, trainer.in_order = tokenizer, config.disable_shuffling
        trainer.plots = config.plot_loss
        trainer.record = {
            "score_at": score_at,
            "template": template.name,
            "merged": adapters_to_merge(config),
            "fastppo": __version__,
        }
        trainer.remove_callback(PrinterCallback)
        return trainer

    if folder is not None:
        report(new_trainer(), config, held_out, trained=False)
        return
    trackers = Trackers.of(config, resumed)

    def fitted() -> PairTrainer:
        trainer = new_trainer()
        trainer.trackers = trackers
        if config.early_stopping_steps is not None:
            trainer.add_callback(EarlyStoppingCallback(config.early_stopping_steps))
        if trackers is not None:
            trainer.add_callback(Report(trackers))
        fit(trainer, config, head, held_out or train, resumed)
        return trainer

    with advice_on_failure(plan, config, budgets, device):
        if config.finetuning_type == "lora":
            back = Beginning(reward_model)
            trainer = retried(
                "update",
                budgets,
                fitted,
                used=lambda: budgets.update.tokens or 0,
                clean=back.restore,
            )
        else:  # too large to keep a copy of
            trainer = fitted()
        try:
            report(trainer, config, held_out, trained=True)
        except Interrupted as stopped:
            cut = f"the reward model in {output_dir} is whole, its evaluation was cut off"
            raise Interrupted(stopped.signal, cut) from None
    trainer.draw()
    if trackers is not None:
        trackers.close()


def fit(
    trainer: PairTrainer, config: Config, head: nn.Linear, known: Pairs, resumed: Path | None
) -> None:
    """Train, on from `resumed`, and save.

    `known` are the pairs whose scores `calibrate_reward` makes mean 0, std 1.
    """
    output_dir = Path(config.output_dir)
    if resumed is None:
        results.clear(output_dir)
    save.begin(output_dir, trainer.decisions, trainer.trackers)
    start = None if resumed is None else str(resumed)
    try:
        result = trainer.train(resume_from_checkpoint=start)
        known_scores = trainer.predict(known).predictions if config.calibrate_reward else None
    except Interrupted as stop:
        folder = trainer.save_stopped()
        with suppress(Exception):
            trainer.draw()
        if folder is None:
            none = "no step was finished, so nothing was saved"
            raise Interrupted(stop.signal, none) from None
        saved = f"resume_from_checkpoint: true goes on from {folder}"
        raise Interrupted(stop.signal, saved) from None
    except Exception:
        with suppress(Exception):  # what stopped the run is what there is to say
            trainer.draw()
        raise
    if not all(torch.isfinite(p).all() for p in head.parameters()):
        raise TrainingStopped("the reward model's head is not finite; lower learning_rate")
    if known_scores is not None:
        calibrate(head, torch.as_tensor(known_scores).flatten())
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
