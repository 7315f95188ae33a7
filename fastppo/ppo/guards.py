"""Guards: warnings when training goes wrong, each with a cure, and the stop after bad steps.

A guard reads only the rows of training_metrics.csv, so a resumed run gives the same warnings as an
uninterrupted one. A guard's column is 1 in every step in which it fires.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from fastppo.errors import TrainingStopped
from fastppo.models.rounding import LIMITS, Precision
from fastppo.ppo.sampling import Sampling

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.types import Experience

Row = Mapping[str, float]

KL_LIMIT = 5.0  # times ppo_target
MIN_ENTROPY = 0.1  # as a share of the first step's entropy
MIN_FIRST_EOS = 0.1  # share of responses with EOS in the first steps; below it nothing is checked
MIN_EOS = 0.1  # as a share of that first share
EOS_EXPECTED = 20  # responses with EOS expected in the window: fewer could be missing by chance
LENGTH_CORRELATION = 0.6
LENGTH_SAMPLES = 80  # responses in the window: a few correlate by chance
MIN_EFFECTIVE = 0.5  # share of the tokens that importance weights leave
MAX_VALUE_CLIPPED, VALUE_STEPS = 0.25, 3  # share of tokens, averaged over so many steps


def mean(rows: Sequence[Row], column: str) -> float:
    """Mean of a column over rows."""
    return sum(row[column] for row in rows) / len(rows)


def responses(row: Row) -> float:
    """Number of responses in a step."""
    return row["response_tokens"] / row["response_length"]


def ratio_not_one(rows: Sequence[Row], config: Config, precision: Precision) -> bool:
    """Scoring and update disagree before the first optimiser step."""
    return rows[-1]["ratio_first_pass"] > LIMITS[precision].log_ratio


def kl_too_large(rows: Sequence[Row], config: Config, precision: Precision) -> bool:
    """The policy is far from its reference."""
    return rows[-1]["kl"] > KL_LIMIT * config.ppo_target


def entropy_collapsed(rows: Sequence[Row], config: Config, precision: Precision) -> bool:
    """The policy has nearly collapsed to one response."""
    return rows[-1]["entropy"] < MIN_ENTROPY * rows[0]["entropy"]


def eos_disappeared(rows: Sequence[Row], config: Config, precision: Precision) -> bool:
    """Responses used to end with EOS, and no longer do."""
    first = mean(rows[:5], "eos_share")
    if first < MIN_FIRST_EOS:
        return False
    window = max(3, math.ceil(EOS_EXPECTED / (first * responses(rows[-1]))))
    return len(rows) >= 5 + window and mean(rows[-window:], "eos_share") <= MIN_EOS * first


def score_follows_length(rows: Sequence[Row], config: Config, precision: Precision) -> bool:
    """Score and response length correlate over many responses."""
    window = max(10, math.ceil(LENGTH_SAMPLES / responses(rows[-1])))
    enough = len(rows) >= window
    return enough and abs(mean(rows[-window:], "score_length_corr")) >= LENGTH_CORRELATION


def sampler_differs(rows: Sequence[Row], config: Config, precision: Precision) -> bool:
    """The sampler's log-probs differ from the trainer's, though no sampling setting explains it."""
    if Sampling.of(config).truncates or config.min_new_tokens:
        return False
    return not rows[-1]["sampler_gap_abs"] <= LIMITS[precision].sampler_gap


def values_clipped(rows: Sequence[Row], config: Config, precision: Precision) -> bool:
    """The value clip keeps the values of many tokens from their returns, for several steps."""
    last = [row.get("value_clipfrac", 0.0) for row in rows[-VALUE_STEPS:]]
    return len(last) == VALUE_STEPS and sum(last) / VALUE_STEPS > MAX_VALUE_CLIPPED


@dataclass(frozen=True)
class Guard:
    """A condition on the rows so far, and its warning; `found` is formatted with the last row."""

    fires: Callable[[Sequence[Row], Config, Precision], bool]
    found: str
    cure: str

    def line(self, column: str, row: Row) -> str:
        """The warning's text."""
        return f"{column}: {self.found.format(**row)}; {self.cure}"


GUARDS = {
    "guard_nonfinite": Guard(
        lambda rows, config, precision: rows[-1]["nonfinite_steps"] > 0,
        "{nonfinite_steps:.0f} optimiser steps were skipped, their loss or gradient not finite",
        "now and then it is a spike; in many steps lower learning_rate, or look for huge scores "
        "(score_clip)",
    ),
    "guard_overflow": Guard(
        lambda rows, config, precision: rows[-1]["overflow_steps"] > 0,
        "{overflow_steps:.0f} optimiser steps were skipped, their gradient beyond float16's range; "
        "the loss scale is {loss_scale:g} now",
        "in a run's first steps, and now and then, that is how the scale is found; where it falls "
        "on and on use bf16: true, or leave fp16 out",
    ),
    "guard_ratio": Guard(
        ratio_not_one,
        "mean |log ratio| is {ratio_first_pass:.2g} before the step's first update, and should be "
        "0 but for rounding",
        "scoring and update run different kernels: try flash_attn: disabled, bf16: false, "
        "fp16: false or tf32: false",
    ),
    "guard_kl": Guard(
        kl_too_large,
        f"KL is {{kl:.1f}} nats a response, more than {KL_LIMIT:g} times ppo_target",
        "the reward is being exploited: raise init_kl_coef, or lower learning_rate or horizon",
    ),
    "guard_entropy": Guard(
        entropy_collapsed,
        f"entropy fell to {{entropy:.3g}} nats a token, below {MIN_ENTROPY:.0%} of the first "
        "step's",
        "the policy says one thing only: set entropy_coef, raise init_kl_coef or lower "
        "learning_rate",
    ),
    "guard_eos": Guard(
        eos_disappeared,
        "responses no longer end by themselves (eos_share {eos_share:.2f})",
        "set missing_eos_penalty, or look whether the reward pays for length",
    ),
    "guard_length": Guard(
        score_follows_length,
        "score and response length move together (correlation {score_length_corr:+.2f})",
        "the reward pays for length: read samples.json, train the reward model on pairs of equal "
        "length, or add a reward of weight below 0 for it",
    ),
    "guard_value_clip": Guard(
        values_clipped,
        "the value clip held {value_clipfrac:.0%} of the tokens: the critic may move by "
        "cliprange_value a step, and its returns are further off",
        "set cliprange_value: null, or raise it to the scale of the scores (return_std)",
    ),
    "guard_sampler": Guard(
        sampler_differs,
        "the sampler's log-probs are {sampler_gap_abs:.2g} from the trainer's in the mean",
        "set rollout_is: token_truncate, and look for generation settings or kernels that only "
        "sampling uses",
    ),
    "guard_rollout_is": Guard(
        lambda rows, config, precision: rows[-1]["rollout_is_ess"] < MIN_EFFECTIVE,
        "the weights of rollout_is leave {rollout_is_ess:.0%} of the tokens in effect, and "
        "{rollout_is_masked:.0%} are masked",
        "sampler and trainer run different policies: compare their dtypes, or take rollout_is by "
        "token rather than by sequence",
    ),
}


def flags(rows: Sequence[Row], row: Row, config: Config, precision: Precision) -> dict[str, float]:
    """The guards' columns for the step of `row`, which comes after `rows`."""
    so_far, guards = [*rows, row], dict(GUARDS)
    if "overflow_steps" not in row:  # no fp16
        del guards["guard_overflow"]
    if "rollout_is_ess" not in row:  # no importance weights
        del guards["guard_rollout_is"]
    return {name: float(guard.fires(so_far, config, precision)) for name, guard in guards.items()}


def warnings(rows: Sequence[Row]) -> list[str]:
    """Warnings of the guards that fire in the last step for the first time."""
    return [
        guard.line(name, rows[-1])
        for name, guard in GUARDS.items()
        if rows[-1].get(name) and not any(row.get(name) for row in rows[:-1])
    ]


def save_batch(experience: Experience, path: Path) -> None:
    """Save a rollout and the update's inputs as safetensors, with the texts as metadata."""
    scored, rollout = experience.scored, experience.scored.rollout
    tensors = {
        "input_ids_BT": rollout.input_ids_BT,
        "prompt_length_B": torch.tensor(rollout.prompt_lengths),
        "response_length_B": torch.tensor(rollout.response_lengths),
        "offsets": scored.offsets,
        "score_B": scored.score_B,
        "shaped_score_B": experience.score_B,
        "sampler_logprob_N": rollout.sampler_logprob_N,
        "logprob_N": scored.logprob_N,
        "ref_logprob_N": scored.ref_logprob_N,
        "entropy_N": scored.entropy_N,
        "kl_N": experience.kl_N,
        "reward_N": experience.reward_N,
        "advantage_N": experience.advantage_N,
        "return_N": experience.return_N,
        "value_N": scored.value_N,
    }
    texts = [[p.text, text] for p, text in zip(rollout.prompts, rollout.texts, strict=True)]
    save_file(
        {name: x.detach().cpu().clone() for name, x in tensors.items() if x is not None},
        path,
        metadata={"texts": json.dumps(texts, ensure_ascii=False)},
    )


def check_first_pass(mean_log_ratio: float, precision: Precision) -> None:
    """Raise TrainingStopped if scoring and update disagree before the first optimiser step.

    Both run the same weights then, so every ratio should be 1. A ratio that is not finite raises
    nothing: its optimiser step is skipped and counted.
    """
    limit = 10 * LIMITS[precision].log_ratio
    if limit < mean_log_ratio < math.inf:
        raise TrainingStopped(
            f"mean |log ratio| is {mean_log_ratio:.2g} before the first update, the limit is "
            f"{limit:g} with products in {precision}; the likeliest cause: scoring and update run "
            "different weights, dropout or attention kernels"
        )


def check_finite(row: Row, experience: Experience, config: Config, *, writes: bool = True) -> None:
    """Stop a run after `max_bad_steps` bad optimiser steps in a row, and save their batch.

    With `writes=False` (a process other than the first) the batch is not saved.

    Raises:
        TrainingStopped: there were `max_bad_steps` bad steps in a row.
    """
    if not 0 < config.max_bad_steps <= row["nonfinite_run"]:
        return
    path = Path(config.output_dir) / f"bad_batch_step_{row['step']:.0f}.safetensors"
    if writes:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_batch(experience, path)
    cause = "learning_rate, or scores that are huge"
    if config.fp16:
        cause += "; or this model overflows float16, and bf16: true would not"
    raise TrainingStopped(
        f"{config.max_bad_steps} optimiser steps in a row had a loss or gradient that is not "
        f"finite (max_bad_steps); their batch is in {path}, weights and moments are as they were "
        f"before them; the likeliest cause: {cause}"
    )
