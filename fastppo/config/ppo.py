"""Keys of the algorithm: KL, score, advantage, loss. Names are TRL's where TRL has one.

Other keys have the name that verl, OpenRLHF, torchtune or TRL's GRPO trainer gives them.
`ELSEWHERE` lists further names, so that the error for such a key names the right one.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from fastppo.config.engine import EngineKeys
from fastppo.config.key import (
    GRPO,
    LF,
    OPENRLHF,
    OWN,
    TRL,
    TRL24,
    TUNE,
    VERL,
    Above0,
    Count,
    Finite,
    Keys,
    NonNegative,
    Positive,
    Share,
    Stage,
    key,
)
from fastppo.config.loss import CLIPPED, POLICY_LOSS, TRL_AGGREGATION, LossKeys
from fastppo.config.training import TrainingKeys

# kl_penalty and kl_loss_type -> the operators' kl_kind. With `full` they are given the KL itself.
KL_KIND = {"kl": "k1", "abs": "abs", "mse": "k2", "low_var_kl": "k3", "full": "k1"}


class KLKeys(Keys):
    """Keys of the use of a rollout and of the penalty for leaving the reference."""

    title = "PPO: rollouts and KL"
    own_stage: ClassVar[Stage | None] = "ppo"

    ppo_buffer_size: Positive = key(1, LF, "Size of a rollout in optimiser steps.")
    ppo_epochs: Positive = key(4, LF, "Passes over each rollout.", first=True)
    ppo_target: Above0 = key(6.0, LF, "Target of the KL controller, nats a response.", first=True)

    filter_groups: bool = key(
        False,
        VERL,
        "Leave out prompts whose num_generations responses all score the same, and sample further "
        "prompts in their place.",
    )
    max_num_gen_batches: Positive = key(
        10,
        VERL,
        "With filter_groups: the most batches of prompts that a step samples, the first one "
        "included; then it goes on with the prompts that it has.",
    )

    init_kl_coef: NonNegative = key(0.2, TRL, "beta at the start of training.")
    adap_kl_ctrl: bool = key(True, TRL, "Let the controller change beta; false keeps it constant.")
    horizon: Above0 = key(
        10000,
        TRL,
        "Number of responses over which beta changes by at most 20%; a smaller one changes it "
        "faster, but one step never by more than 20%.",
    )
    kl_penalty: Literal["kl", "abs", "mse", "low_var_kl", "full"] = key(
        "kl",
        TRL,
        "Estimate of a token's KL in the reward: from the sampled token (low_var_kl is k3), or "
        "full: exact, over the vocabulary.",
    )
    use_kl_loss: bool = key(
        False, VERL, "Put the KL into the loss instead of the reward, with the same beta."
    )
    kl_loss_type: Literal["low_var_kl", "mse", "abs"] = key(
        "low_var_kl", VERL, "Estimate of a token's KL in the loss: k3, k2 or its absolute value."
    )


class ScoreKeys(Keys):
    """Keys of the step from scores to rewards."""

    title = "PPO: scores"
    own_stage: ClassVar[Stage | None] = "ppo"

    ppo_score_norm: bool = key(
        False, LF, "Normalise scores: use_score_scaling and use_score_norm in one."
    )
    use_score_scaling: bool = key(
        False, TRL, "Divide scores by the standard deviation of all scores so far."
    )
    use_score_norm: bool = key(
        False, TRL, "With use_score_scaling: first subtract the mean of all scores so far."
    )
    score_clip: Above0 | None = key(
        None, TRL, "Clip scores to plus or minus this, after normalising."
    )
    missing_eos_penalty: NonNegative | None = key(
        None, TRL24, "Subtracted from the score of a truncated response."
    )
    min_response_length: Count = key(
        0, TUNE, "A response with fewer tokens, EOS included, gets the score reward_penalty."
    )
    penalise_no_eos: bool = key(False, TUNE, "A truncated response gets the score reward_penalty.")
    reward_penalty: Finite = key(
        -3.0,
        TUNE,
        "The score, after normalising and clipping, that the two keys above give; it must be "
        "below the scores of finished responses to be a penalty.",
    )
    bootstrap_truncated: bool = key(
        False,
        OWN,
        "A truncated response gets the critic's value of its last state instead of its score, "
        "which that value predicts.",
    )
    overlong_buffer_len: Positive | None = key(
        None,
        OPENRLHF,
        "Number of tokens before max_new_tokens in which a response's score falls, by "
        "overlong_penalty_factor at the end; null is off (verl: overlong_buffer.len).",
    )
    overlong_penalty_factor: NonNegative = key(
        1.0,
        OPENRLHF,
        "Subtracted from the score of a response of max_new_tokens, less from one that ends within "
        "overlong_buffer_len.",
    )
    ppo_whiten_rewards: bool = key(
        False, LF, "Whiten rewards before the advantages; their mean is kept."
    )


class AdvantageKeys(Keys):
    """Keys of the step from rewards to advantages."""

    title = "PPO: advantages"
    own_stage: ClassVar[Stage | None] = "ppo"

    advantage: Literal["gae", "grpo", "rloo", "reinforce++"] = key(
        "gae",
        OWN,
        "Advantage estimator: gae trains a critic, the others need none, see docs/ppo.md.",
    )
    num_generations: Positive = key(
        1, GRPO, "Number of responses to each prompt of a rollout; grpo and rloo compare them."
    )
    scale_rewards: Literal["group", "batch", "none"] = key(
        "group",
        GRPO,
        "grpo divides by the standard deviation of the prompt's responses, by that of the "
        "batch, or not at all.",
    )
    gamma: Share = key(1.0, TRL, "Discount factor.")
    lam: Share = key(0.95, TRL, "GAE's lambda.")
    whiten_advantages: bool | None = key(
        None, OWN, "Whiten advantages over the whole rollout; null is true for gae and reinforce++."
    )


class PPOKeys(LossKeys, AdvantageKeys, ScoreKeys, KLKeys):
    """All keys of the PPO algorithm."""

    @property
    def token_loss(self) -> str:
        """The loss of `linear_policy_loss`."""
        name = POLICY_LOSS.get(self.policy_loss, self.policy_loss)
        if name == "ppo_clip" and self.importance_sampling_level == "sequence":
            name = "gspo"
        # Advantages that differ by token: gspo would spread each one's over its response.
        by_token = self.advantage in ("gae", "reinforce++")
        return "gspo_token" if name == "gspo" and by_token else name

    @property
    def bounds(self) -> dict[str, float]:
        """Bounds of the ratio, as `PolicyLossConfig` has them."""
        found = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        if self.dual_clip is None:
            return found
        dppo = self.token_loss in ("dppo_tv", "dppo_kl")
        return {**found, "ratio_limit" if dppo else "dual_clip": self.dual_clip}

    @property
    def has_critic(self) -> bool:
        """Whether a critic is built and trained."""
        return self.advantage == "gae"

    @property
    def whitens_advantages(self) -> bool:
        """whiten_advantages if it is set, else the choice of the estimator's authors."""
        if self.whiten_advantages is not None:
            return self.whiten_advantages
        return self.advantage in ("gae", "reinforce++")

    @property
    def clip_low(self) -> float:
        """The ratio is clipped below at 1 - clip_low."""
        return self.cliprange if self.cliprange_low is None else self.cliprange_low

    @property
    def clip_high(self) -> float:
        """The ratio is clipped above at 1 + clip_high."""
        return self.cliprange if self.cliprange_high is None else self.cliprange_high

    @property
    def unknown_to_estimator(self) -> set[str]:
        """Keys that this advantage estimator does not use."""
        critics = {"critic", "critic_model", "critic_finetuning_type", "value_head_init"}
        critics |= {"critic_learning_rate", "cliprange_value"}
        return {
            "gae": {"scale_rewards"},
            "grpo": critics | {"vf_coef", "lam"},
            "rloo": critics | {"vf_coef", "lam", "scale_rewards"},
            "reinforce++": critics | {"vf_coef", "lam", "scale_rewards"},
        }[self.advantage]

    @property
    def without_meaning(self) -> list[str]:
        """Keys that were set but that this advantage estimator does not use."""
        return sorted(self.unknown_to_estimator & self.model_fields_set)

    @model_validator(mode="after")
    def _algorithm_belongs_together(self) -> PPOKeys:
        if self.use_score_norm and not self.use_score_scaling and not self.ppo_score_norm:
            raise ValueError("use_score_norm: acts within use_score_scaling; set that to true too")
        if self.penalise_no_eos and self.missing_eos_penalty is not None:
            raise ValueError(
                "penalise_no_eos: sets the score that missing_eos_penalty takes from; keep one"
            )
        if self.penalise_no_eos and self.bootstrap_truncated:
            raise ValueError(
                "penalise_no_eos: sets the score that bootstrap_truncated replaces; keep one"
            )
        dppo = self.token_loss in ("dppo_tv", "dppo_kl")
        if self.dual_clip is not None and not dppo and not self.dual_clip > 1 + self.clip_high:
            raise ValueError(
                f"dual_clip: {self.dual_clip:g} is not above the clip at {1 + self.clip_high:g}; "
                "raise it, for example to 3"
            )
        if self.dual_clip is not None and not dppo and self.token_loss not in CLIPPED:
            raise ValueError(
                f"dual_clip: policy_loss: {self.policy_loss} has none; leave it out, or use "
                "ppo_clip"
            )
        if self.importance_sampling_level == "sequence" and self.token_loss not in CLIPPED:
            raise ValueError(
                f"importance_sampling_level: sequence is policy_loss: gspo, not "
                f"{self.policy_loss}; leave one of them out"
            )
        aggregation = TRL_AGGREGATION.get(self.policy_loss, self.loss_agg_mode)
        if self.loss_agg_mode != aggregation:
            raise ValueError(
                f"policy_loss: {self.policy_loss} is ppo_clip with loss_agg_mode: {aggregation}; "
                "leave loss_agg_mode out, or use ppo_clip"
            )
        if self.advantage in ("grpo", "rloo") and self.num_generations < 2:
            raise ValueError(
                f"num_generations: advantage: {self.advantage} compares responses to one prompt; "
                "set it to at least 2, for example 8"
            )
        if self.filter_groups and self.num_generations < 2:
            raise ValueError(
                "filter_groups: compares responses to one prompt; set num_generations to at least "
                "2, for example 8"
            )
        if not self.has_critic and (self.bootstrap_truncated or self.critic_warmup):
            name = "bootstrap_truncated" if self.bootstrap_truncated else "critic_warmup"
            raise ValueError(
                f"{name}: advantage: {self.advantage} has no critic; leave it out, or use gae"
            )
        if bool(self.ptx_coef) != bool(self.ptx_dataset):
            missing, other = (
                ("ptx_dataset", "ptx_coef") if self.ptx_coef else ("ptx_coef", "ptx_dataset")
            )
            raise ValueError(f"{missing}: is needed by {other}; set both or neither")
        return self


class AlgorithmKeys(PPOKeys, TrainingKeys, EngineKeys):
    """What PPO's keys mean together with those of training and of the engine."""

    @property
    def rollout_batch_size(self) -> int:
        """Number of responses that are sampled in a PPO step."""
        micro = self.per_device_train_batch_size
        return micro * self.gradient_accumulation_steps * self.ppo_buffer_size

    @property
    def prompts_a_step(self) -> int:
        """Number of prompts in a PPO step; each is answered `num_generations` times."""
        return self.rollout_batch_size // self.num_generations

    @property
    def importance_mode(self) -> str | None:
        """`mode` of `losses.importance_weights`; None without a correction."""
        bounded = self.rollout_is_threshold is not None or self.rollout_is_lower is not None
        default = "token_truncate" if self.use_vllm or bounded else "none"
        mode = self.rollout_is or default
        return None if mode == "none" else mode

    @property
    def importance_bounds(self) -> tuple[float | None, float]:
        """The lower and the upper bound of the importance weights."""
        high = self.rollout_is_threshold
        return self.rollout_is_lower, 2.0 if high is None else high


# TRL 0.9.6's name -> LLaMA-Factory's name for the same setting, which is used here.
ALIASES = {"target": "ppo_target", "whiten_rewards": "ppo_whiten_rewards"}
# Other trainers' names for settings that exist here -> the names to use here.
ELSEWHERE = {
    "adv_estimator": "advantage",
    "advantage_estimator": "advantage",
    "backward_batch_size": "per_device_train_batch_size and gradient_accumulation_steps",
    "batch_size": "ppo_buffer_size, the factor over an optimiser step's responses",
    "clip_ratio": "cliprange",
    "clip_ratio_c": "dual_clip",
    "clip_ratio_high": "cliprange_high",
    "clip_ratio_low": "cliprange_low",
    "delta": "dual_clip",
    "dynamic_filtering": "filter_groups",
    "early_stopping_patience": "early_stopping_steps",
    "entropy_coeff": "entropy_coef",
    "entropy_loss_coef": "entropy_coef",
    "eps_clip": "cliprange",
    "epsilon": "cliprange",
    "epsilon_high": "cliprange_high",
    "forward_batch_size": "ppo_micro_batch_size_per_gpu",
    "freezing_actor_steps": "critic_warmup",
    "kl_coef": "init_kl_coef with adap_kl_ctrl: false",
    "kl_estimator": "kl_penalty (k1 is kl, k2 is mse, k3 is low_var_kl)",
    "kl_loss_coef": "init_kl_coef: with use_kl_loss it is the loss's",
    "kl_target": "ppo_target",
    "lambd": "lam",
    "log_with": "report_to",
    "loss_mode": "policy_loss",
    "loss_type": "policy_loss",
    "micro_batch_size": "ppo_micro_batch_size_per_gpu",
    "mini_batch_size": "per_device_train_batch_size",
    "model_name": "model_name_or_path",
    "n_samples_per_prompt": "num_generations",
    "num_ppo_epochs": "ppo_epochs",
    "pretrain_data": "ptx_dataset",
    "query_dataset": "dataset",
    "ratio_level": "importance_sampling_level",
    "response_length": "max_new_tokens",
    "reward_model_path": "reward_model",
    "steps": "max_steps",
    "tau_neg": "sapo_temperature_neg",
    "tau_pos": "sapo_temperature_pos",
    "stop_token": "template, whose EOS, stop tokens and stop strings all end a response",
    "rollout_rs": "rollout_is (token_mask or sequence_mask), with rollout_is_lower and "
    "rollout_is_threshold",
    "rollout_rs_threshold": "rollout_is_lower and rollout_is_threshold",
    "tis_imp_ratio_cap": "rollout_is_threshold",
    "total_episodes": "max_steps or num_train_epochs",
    "unsup_coef": "ptx_coef",
    "use_dynamic_bsz": "ppo_max_token_len_per_gpu",
    "value_clip": "cliprange_value",
    "vllm_max_model_length": "the server's flag --max-model-len; colocate takes the longest prompt "
    "and max_new_tokens",
    "vllm_server_host": "vllm_server_base_url",
    "vllm_server_port": "vllm_server_base_url",
}
# TRL 0.9.6's keys that do not change training.
TRL_IGNORED = dict.fromkeys(
    (
        "compare_steps",
        "exp_name",
        "optimize_cuda_cache",
        "optimize_device_cache",
        "remove_unused_columns",
        "task_name",
        "tracker_project_name",
    ),
    "TRL's bookkeeping, no part of training",
)
