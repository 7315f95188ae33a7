"""Keys of the optimiser, its schedule, and of logging, saving and evaluating.

Names and meanings are those of TrainingArguments in transformers 4.52, for which LLaMA-Factory's
files are written, including keys that transformers 5 has dropped. No torch here.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastppo.config.key import HF, LF, OWN, Above0, Count, Keys, NonNegative, Positive, Share, key

# An interval in steps; below 1 it is a share of the whole run.
Every = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
# bitsandbytes' optimisers -> bits of their state, and whether it is in paged memory.
BITSANDBYTES = {
    "adamw_8bit": (8, False),
    "adamw_bnb_8bit": (8, False),
    "paged_adamw_8bit": (8, True),
    "paged_adamw_32bit": (32, True),
    "lion_8bit": (8, False),
    "lion_32bit": (32, False),
    "paged_lion_8bit": (8, True),
    "paged_lion_32bit": (32, True),
}

# lr_scheduler_type -> the keys that lr_scheduler_kwargs may have, from transformers' functions.
SCHEDULES: dict[str, frozenset[str]] = {
    "linear": frozenset(),
    "cosine": frozenset({"num_cycles"}),
    "cosine_with_restarts": frozenset({"num_cycles"}),
    "polynomial": frozenset({"lr_end", "power"}),
    "constant": frozenset(),
    "constant_with_warmup": frozenset(),
    "inverse_sqrt": frozenset({"timescale"}),
    "reduce_lr_on_plateau": frozenset(
        {"mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "eps"}
    ),
    "cosine_with_min_lr": frozenset({"num_cycles", "min_lr", "min_lr_rate"}),
    "cosine_warmup_with_min_lr": frozenset(
        {"num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"}
    ),
    "warmup_stable_decay": frozenset(
        {
            "num_decay_steps",
            "num_stable_steps",
            "warmup_type",
            "decay_type",
            "min_lr_ratio",
            "num_cycles",
        }
    ),
}
# The keys among them that are learning rates, or fractions of one.
RATES = {"lr_end", "min_lr", "min_lr_rate", "min_lr_ratio", "warmup_lr_rate"}
# lr_scheduler_type -> keys of which lr_scheduler_kwargs must have one.
NEEDED = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}


class OptimiserKeys(Keys):
    """Keys of the optimiser, its schedule and the number of steps."""

    title = "Training"

    per_device_train_batch_size: Positive = key(
        8,
        HF,
        "Sequences of a micro-batch at their longest (in stage rm pairs); in stage ppo a "
        "micro-batch has more of them if they are shorter.",
        first=True,
    )
    per_device_eval_batch_size: Positive = key(
        8, HF, "Sequences that an evaluation samples at a time (in stage rm pairs that it scores)."
    )
    gradient_accumulation_steps: Positive = key(
        1, HF, "Times per_device_train_batch_size: the responses of an optimiser step.", first=True
    )
    learning_rate: NonNegative = key(5e-5, HF, "Peak learning rate (the actor's).", first=True)
    num_train_epochs: Above0 = key(3.0, HF, "Passes over the data set.", first=True)
    max_steps: int = key(
        -1, HF, "Stop after this number of steps instead of num_train_epochs; -1 is off."
    )
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "reduce_lr_on_plateau",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ] = key(
        "linear",
        HF,
        "Learning rate schedule; it advances with each PPO step (reduce_lr_on_plateau: with "
        "each evaluation of stage rm).",
    )
    lr_scheduler_kwargs: dict[str, Any] | None = key(
        None, HF, "Further arguments of that schedule, such as {min_lr: 1e-6}."
    )
    warmup_ratio: Share = key(0.0, HF, "Share of the steps that are warm-up, rounded up.")
    warmup_steps: NonNegative = key(
        0,
        HF,
        "Number of warm-up steps; used instead of warmup_ratio if it is set; below 1 it is a "
        "share too.",
    )
    optim: (
        Literal[
            "adamw_torch",
            "adamw_torch_fused",
            "adamw_hf",
            "adamw_8bit",
            "adamw_bnb_8bit",
            "paged_adamw_8bit",
            "paged_adamw_32bit",
            "adafactor",
            "sgd",
            "adagrad",
            "rmsprop",
            "lion_8bit",
            "lion_32bit",
            "paged_lion_8bit",
            "paged_lion_32bit",
        ]
        | None
    ) = key(
        None,
        HF,
        "PyTorch's optimisers by name, or bitsandbytes' with 8-bit or paged state; null and "
        "adamw_hf are PyTorch's AdamW.",
    )
    weight_decay: NonNegative = key(0.0, HF, "The optimiser's weight decay.")
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = key(0.9, HF, "AdamW's beta 1.")
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = key(0.999, HF, "AdamW's beta 2.")
    adam_epsilon: Above0 = key(1e-8, HF, "AdamW's epsilon; PPO's classic is 1e-5.")
    max_grad_norm: NonNegative = key(
        1.0, HF, "Gradient norm to which each role is clipped; 0 is off."
    )
    max_bad_steps: Count = key(
        3,
        OWN,
        "Stop after this number of steps in a row whose loss or gradient is not finite; 0 is off.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = key(42, HF, "Seed of all random numbers.")
    data_seed: Annotated[int, Field(ge=0, lt=2**31)] | None = key(
        None, HF, "Seed of the order of the data; null is seed."
    )
    bf16: bool = key(
        False,
        HF,
        "Models in bfloat16, with autocast; what trains stays float32. If false: on a GPU the "
        "checkpoint's own 16 bits, else float32.",
    )
    fp16: bool = key(
        False,
        HF,
        "Models in float16, with autocast and a loss scaler, for GPUs without bfloat16 "
        "(T4, V100, RTX 20); if a gradient overflows, its step is skipped and the scale halved. "
        "What trains stays float32.",
    )
    tf32: bool | None = key(
        None, HF, "float32 products in TF32 on a GPU that has it; null is PyTorch's default."
    )
    use_cpu: bool = key(False, HF, "Train on the CPU even if there is a GPU.")
    disable_shuffling: bool = key(False, LF, "Use the data in the order of the file.")


class LoggingKeys(Keys):
    """Keys that say when to log, save and evaluate."""

    title = "Logging, checkpoints, evaluation"

    logging_strategy: Literal["no", "steps", "epoch"] = key(
        "steps", HF, "When to log a line: by logging_steps, after each epoch, or never."
    )
    logging_steps: Every | None = key(
        None,
        HF,
        "Steps between log lines, or below 1 a share of the run; null is each step in ppo, and "
        "in rm 10 or a tenth of a shorter run. Trackers and the metrics file get every step of "
        "ppo.",
    )
    logging_first_step: bool = key(False, HF, "Also log the first step.")
    disable_tqdm: bool | None = key(
        None,
        HF,
        "true leaves plain lines on a terminal too; null draws a live view below them there (bar, "
        "curves, a sample, warnings), false everywhere. Log lines show the time left in any case.",
    )
    plot_loss: bool = key(
        False,
        LF,
        "Draw training_loss.png, and training_reward.png (ppo) or training_eval_loss.png and "
        "training_eval_accuracy.png (rm), into output_dir.",
    )
    save_strategy: Literal["no", "steps", "epoch"] = key(
        "steps", HF, "When to write a checkpoint: by save_steps, after each epoch, or never."
    )
    save_steps: Every = key(500, HF, "Steps between checkpoints, or below 1 a share of the run.")
    save_total_limit: Positive | None = key(None, HF, "Keep only this number of checkpoints.")
    eval_strategy: Literal["no", "steps", "epoch"] = key(
        "no", HF, "When to evaluate during training: by eval_steps, after each epoch, or never."
    )
    eval_steps: Every | None = key(
        None,
        HF,
        "Steps between evaluations, or below 1 a share of the run; null is logging_steps, or 500.",
    )
    eval_delay: NonNegative = key(
        0.0, HF, "No evaluation before this number of steps (with epoch: of epochs)."
    )
    eval_on_start: bool = key(False, HF, "Also evaluate before the first step.")
    early_stopping_steps: Positive | None = key(
        None,
        LF,
        "Stop after this number of evaluations without a better metric_for_best_model.",
    )
    load_best_model_at_end: bool = key(
        False,
        HF,
        "In stage ppo: also write a checkpoint after each evaluation that is the best so far, and "
        "leave that policy in output_dir at the end.",
    )
    metric_for_best_model: str | None = key(
        None,
        HF,
        "By what evaluations are compared: in stage ppo reward, judge, win_rate or reward/NAME "
        "(null is judge with eval_judge, else reward), in stage rm loss, accuracy or margin (null "
        "is loss).",
    )
    greater_is_better: bool | None = key(
        None,
        HF,
        "Whether a greater metric_for_best_model is better; null is true unless it is the loss.",
    )


class TrainingKeys(LoggingKeys, OptimiserKeys):
    """All keys that correspond to transformers' TrainingArguments."""

    def warmup(self, steps: int) -> int:
        """Number of warm-up steps in a run of `steps`, as transformers 4.52 computes it."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(steps * (self.warmup_steps or self.warmup_ratio))

    def acts(self, what: str, step: int, total: int, steps_an_epoch: float) -> bool:
        """Whether `what` (logging, save or eval) is due after `step` of `total`, counted from 1."""
        strategy = getattr(self, f"{what}_strategy")
        if what == "logging":
            if step == 1 and self.logging_first_step:
                return True
            every = self.logging_steps or 1
        elif what == "eval":
            every = self.eval_steps or self.logging_steps or 500
            reached = step / steps_an_epoch if strategy == "epoch" else step
            if reached < self.eval_delay:
                return False
        else:
            every = self.save_steps
        return due(strategy, every, step, total, steps_an_epoch)

    @property
    def data_order_seed(self) -> int:
        """data_seed if it is set, else seed."""
        return self.seed if self.data_seed is None else self.data_seed

    @model_validator(mode="after")
    def _training_belongs_together(self) -> TrainingKeys:
        if self.fp16 and self.bf16:
            raise ValueError(
                "fp16: and bf16 are both true; keep bf16 where the GPU has it, else fp16"
            )
        for cadence in ("logging_steps", "save_steps", "eval_steps"):
            every = getattr(self, cadence)
            if every is not None and every > 1 and every != int(every):
                raise ValueError(f"{cadence}: above 1 it is a count of steps; give a whole number")
        if self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError("warmup_steps: above 1 it is a count of steps; give a whole number")
        self._check_schedule()
        return self

    def _check_schedule(self) -> None:
        kind, given = self.lr_scheduler_type, set(self.lr_scheduler_kwargs or ())
        strange = sorted(given - SCHEDULES[kind])
        if strange:
            takes = ", ".join(sorted(SCHEDULES[kind])) or "nothing"
            raise ValueError(f"lr_scheduler_kwargs: {kind} knows no {strange[0]}; it takes {takes}")
        needed = NEEDED.get(kind, ())
        if needed and not given & set(needed):
            raise ValueError(
                f"lr_scheduler_kwargs: {kind} needs {' or '.join(needed)}; write for example "
                f"lr_scheduler_kwargs: {{{needed[0]}: {'1e-6' if 'lr' in needed[0] else '10'}}}"
            )
        for name in sorted(given & RATES):
            value = (self.lr_scheduler_kwargs or {})[name]
            if isinstance(value, (int, float)) and value < 0:
                raise ValueError(
                    f"lr_scheduler_kwargs: {name}: {value:g} is a learning rate below 0, which "
                    "would unlearn; give 0 or more"
                )
        if len(given & {"min_lr", "min_lr_rate"}) == 2:
            raise ValueError("lr_scheduler_kwargs: min_lr and min_lr_rate say the same; keep one")


def every_steps(every: float, total: int) -> int:
    """An interval as a number of steps; below 1 it is a share of `total`, rounded up."""
    return int(every) if every >= 1 else max(1, math.ceil(total * every))


def due(strategy: str, every: float, step: int, total: int, steps_an_epoch: float) -> bool:
    """Whether to act after `step`, counted from 1, by a strategy: steps, epoch or no.

    `epoch` acts at the first step that reaches the end of an epoch. The caller must handle the last
    step of a run.
    """
    if strategy == "steps":
        return step % every_steps(every, total) == 0
    if strategy == "epoch":
        # 1e-9 allows for rounding when a step ends exactly at the end of an epoch.
        return int(step / steps_an_epoch + 1e-9) > int((step - 1) / steps_an_epoch + 1e-9)
    return False
