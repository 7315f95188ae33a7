"""The columns of training_metrics.csv, and which of them a run has."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastppo.config import Config

# Column -> its description. docs/metrics.md has the same table; a test compares the two.
COLUMNS = {
    "step": "PPO step, from 1",
    "epoch": "passes over the prompts so far",
    "score": "mean score of the rollout as the reward gave it; of several, their weighted sum",
    "score_std": "standard deviation of those scores",
    "score_shaped": "mean score after normalisation, clipping and penalties: what entered the "
    "reward",
    "kl": "KL to the reference, summed over a response, mean over responses (nats)",
    "kl_controlled": "the same by kl_penalty's estimate: what the KL controller follows",
    "kl_target": "target of the KL controller (ppo_target)",
    "kl_coef": "beta that this step's rewards (with use_kl_loss: its loss) were made with",
    "entropy": "mean entropy of the policy at a response token, full vocabulary (nats)",
    "policy_loss": "clipped surrogate alone, mean over the step's optimiser steps",
    "kl_loss": "the KL's part of the loss, beta included (with use_kl_loss)",
    "ptx_loss": "mean -log-prob of an answer's token in ptx_dataset, before ptx_coef",
    "value_loss": "clipped value loss with its factor 1/2, before vf_coef",
    "explained_variance": "1 - var(return - value) / var(return), at rollout",
    "value_mean": "mean value of the rollout's states",
    "value_std": "standard deviation of those values",
    "return_mean": "mean return (reward units)",
    "return_std": "standard deviation of the returns",
    "clipfrac": "share of tokens whose policy gradient the clip cut off",
    "value_clipfrac": "share of tokens whose value the clip held",
    "approxkl": "mean k3 estimate of KL(behaviour, policy) over all passes (nats)",
    "policykl": "mean of log-prob before minus after, over all passes (TRL's policykl, nats)",
    "ratio_mean": "mean of policy over behaviour probability",
    "ratio_max": "largest such ratio",
    "ratio_first_pass": "mean |log ratio| before the first update of the step: 0 but for rounding",
    "sampler_gap": "mean of sampler's minus recomputed log-prob: 0 unless sampling is truncated",
    "sampler_gap_abs": "mean of that difference's absolute value: rounding, and what truncates",
    "sampler_gap_max": "largest such value of a token (with rollout_is)",
    "rollout_is_mean": "mean importance weight of a token, truncated or masked (with rollout_is)",
    "rollout_is_capped": "share of tokens whose weight met rollout_is_threshold",
    "rollout_is_masked": "share of tokens whose weight is 0 (with rollout_is)",
    "rollout_is_ess": "effective sample size of those weights, as a share of the tokens: 1 where "
    "all are equal",
    "response_length": "mean tokens of a response, EOS included",
    "response_length_max": "longest response",
    "eos_share": "share of responses that ended by themselves",
    "score_length_corr": "correlation of score and response length: near 1 smells of length "
    "hacking",
    "learning_rate": "the actor's",
    "critic_learning_rate": "the critic's",
    "grad_norm_actor": "mean gradient norm before clipping",
    "grad_norm_critic": "mean gradient norm before clipping",
    "optimizer_steps": "optimiser steps taken in this PPO step",
    "skipped_steps": "optimiser steps skipped: a gradient that was not finite, or ratio_threshold",
    "nonfinite_steps": "those of them whose loss or gradient was not finite",
    "nonfinite_run": "such steps in a row, up to this step's last; max_bad_steps of them stop the "
    "run",
    "overflow_steps": "optimiser steps skipped for a gradient beyond float16's range, by the loss "
    "scale alone (with fp16)",
    "loss_scale": "what the loss is multiplied by, after the step (with fp16)",
    "early_stopped": "1 where the step's epochs were cut short by target_kl",
    "response_tokens": "response tokens in the rollout",
    "refills": "batches of prompts sampled after the step's first (with filter_groups)",
    "groups_alike": "prompts left out, their responses all of one score (with filter_groups)",
    "groups_trained": "prompts that the step trains on (with filter_groups)",
    "sampled_responses": "all responses sampled, those left out too (with filter_groups)",
    "sampled_tokens": "tokens of those responses (with filter_groups)",
    "score_sampled": "mean score of those responses; score is of those the step trains on (with "
    "filter_groups)",
    "update_tokens": "tokens that the update ran over in all its passes, prompts included",
    "guard_nonfinite": "1 where a loss or gradient was not finite",
    "guard_overflow": "1 where overflow_steps is above 0 (with fp16)",
    "guard_ratio": "1 where ratio_first_pass is above rounding: 1e-5, with tf32 or fp16 2.5e-3, "
    "with bf16 2e-2",
    "guard_kl": "1 where kl is above 5 times ppo_target",
    "guard_entropy": "1 where entropy is below a tenth of the first step's",
    "guard_eos": "1 where eos_share was above a tenth, and has fallen to a tenth of that",
    "guard_length": "1 where score_length_corr was past 0.6 over the last 10 steps (80 responses)",
    "guard_value_clip": "1 where value_clipfrac was above a quarter over the last 3 steps",
    "guard_sampler": "1 where sampler_gap_abs is above 1e-3, with tf32 or fp16 1.25e-2, with "
    "bf16 0.1, and nothing truncates",
    "guard_rollout_is": "1 where rollout_is_ess is below 0.5 (with rollout_is)",
    "seconds_rollout": "sampling (a clock)",
    "seconds_score": "log-probs, reference, values, reward (a clock)",
    "seconds_advantage": "KL reward, GAE, whitening (a clock)",
    "seconds_update": "PPO epochs (a clock)",
    "seconds": "the whole step (a clock)",
    "rollout_tokens_per_second": "response tokens sampled in a second (a clock)",
    "update_tokens_per_second": "update_tokens by seconds_update (a clock)",
    "tokens_per_second": "response tokens by the seconds of the whole step (a clock)",
}
# What a column should look like, and what to do when it does not: for docs/metrics.md, which has
# the same sentences (a test compares the two), and for the report.
WHAT_TO_LOOK_FOR = {
    "score": "`score` should rise; steps differ by chance. If it stays flat, the KL penalty may "
    "hold the policy (`kl_coef`), or steps are too small (`learning_rate`, `ppo_epochs`).",
    "kl": "`kl` grows without limit while `score` rises: the policy exploits the reward model; "
    "raise `init_kl_coef` or lower `ppo_target`.",
    "kl_coef": "`kl_coef` does not change: `horizon` is too long for the run, as its first lines "
    "said.",
    "entropy": "`entropy` may fall slowly. Below a tenth of its start (`guard_entropy`) the policy "
    "has one answer: set `entropy_coef`, raise `init_kl_coef` or lower `learning_rate`.",
    "clipfrac": "`clipfrac` of a few percent up to a quarter is usual. 0 in every step: the policy "
    "hardly moves. Well above: steps are too large; lower `learning_rate` or `ppo_epochs`.",
    "ratio_first_pass": "`ratio_first_pass` far from 0 stops the run: scoring and update disagree "
    "about the policy.",
    "eos_share": "`eos_share` falls and `response_length` rises to `max_new_tokens`: set "
    "`missing_eos_penalty`.",
    "score_length_corr": "`score_length_corr` near 1: the reward favours long responses.",
    "explained_variance": "`explained_variance` stays at or below 0: the critic has learned "
    "nothing yet; raise `critic_learning_rate`. `vf_coef` has an effect only with `critic: shared` "
    "([ppo.md](ppo.md#the-critic)).",
    "value_clipfrac": "`value_clipfrac` is high for several steps (`guard_value_clip`): the "
    "returns differ from the values by more than `cliprange_value`, which is in units of the "
    "score; set `cliprange_value: null`.",
    "skipped_steps": "`skipped_steps` above 0: in those steps weights and Adam's moments did not "
    "change. If it happens rarely, it is a spike; if it happens in every step, something is wrong, "
    "most often the learning rate.",
    "overflow_steps": "`overflow_steps` above 0 in the first steps: that is how `fp16` finds its "
    "`loss_scale`. If the scale keeps falling, the model needs bfloat16's range. Stage rm logs "
    "both next to the loss.",
    "rollout_is_mean": "`rollout_is_mean` far below 1, or `rollout_is_capped` above a few percent: "
    "the distributions of sampler and trainer differ (`sampler_gap`), and the correction reduces "
    "the weight of many tokens.",
    "ptx_loss": "`ptx_loss` rises: the policy forgets its language; raise `ptx_coef`.",
}
# If there are several rewards, each has a column; it is empty in steps where the reward applied to
# no response.
REWARD_COLUMN = "reward/{name}"
REWARD_MEANING = "of several rewards: mean score by that one, before its weight"
CRITIC_COLUMNS = {
    "value_loss",
    "explained_variance",
    "value_mean",
    "value_std",
    "value_clipfrac",
    "critic_learning_rate",
    "grad_norm_critic",
}
IMPORTANCE_COLUMNS = {
    "sampler_gap_max",
    "rollout_is_mean",
    "rollout_is_capped",
    "rollout_is_masked",
    "rollout_is_ess",
    "guard_rollout_is",
}


FILTER_COLUMNS = {
    "refills",
    "groups_alike",
    "groups_trained",
    "sampled_responses",
    "sampled_tokens",
    "score_sampled",
}


def absent_columns(config: Config) -> set[str]:
    """Columns that are left out of this run's file, because they have no meaning in it."""
    absent = set() if config.has_critic else set(CRITIC_COLUMNS)
    if not config.use_kl_loss:
        absent.add("kl_loss")
    if config.ptx_dataset is None:
        absent.add("ptx_loss")
    if not config.filter_groups:
        absent |= FILTER_COLUMNS
    if not config.fp16:
        absent |= {"overflow_steps", "loss_scale", "guard_overflow"}
    if config.importance_mode is None:
        absent |= IMPORTANCE_COLUMNS
    return absent
