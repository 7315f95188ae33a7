"""Keys of the step from advantages to the loss; names as in ppo.py."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from fastppo.config.key import (
    GRPO,
    OPENRLHF,
    OWN,
    TRL,
    VERL,
    Above0,
    Count,
    Keys,
    NonNegative,
    Stage,
    key,
)

# verl's and TRL's names of a policy loss -> the operators' loss.
POLICY_LOSS = {"vanilla": "ppo_clip", "gpg": "reinforce"}
POLICY_LOSS |= dict.fromkeys(("grpo", "bnpo", "dapo", "dr_grpo"), "ppo_clip")
# TRL's names that say how the loss is aggregated -> loss_agg_mode.
TRL_AGGREGATION = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}
CLIPPED = ("ppo_clip", "gspo", "gspo_token")  # the operators' losses with PPO's clip


class LossKeys(Keys):
    """Keys of the step from advantages to the loss."""

    title = "PPO: loss"
    own_stage: ClassVar[Stage | None] = "ppo"

    cliprange: Above0 = key(0.2, TRL, "The ratio is clipped to 1 plus or minus this.")
    cliprange_low: Above0 | None = key(
        None, OWN, "The same, only below 1 (verl: clip_ratio_low); null is cliprange."
    )
    cliprange_high: Above0 | None = key(
        None, OWN, "The same, only above 1 (verl: clip_ratio_high); null is cliprange."
    )
    dual_clip: Above0 | None = key(
        None,
        OPENRLHF,
        "Upper bound of the loss, in units of |advantage|, where the advantage is negative; with "
        "policy_loss: dppo_tv and dppo_kl, of the ratio, where null is 20 (verl: clip_ratio_c).",
    )
    policy_loss: Literal[
        "ppo_clip",
        "vanilla",
        "grpo",
        "bnpo",
        "dapo",
        "dr_grpo",
        "gspo",
        "gspo_token",
        "cispo",
        "sapo",
        "dppo_tv",
        "dppo_kl",
        "reinforce",
        "gpg",
    ] = key(
        "ppo_clip",
        VERL,
        "Loss of a token (verl: loss_mode, TRL: loss_type), see docs/ppo.md; grpo, bnpo, dapo and "
        "dr_grpo are ppo_clip with the loss_agg_mode of that name in TRL.",
    )
    importance_sampling_level: Literal["token", "sequence"] = key(
        "token",
        GRPO,
        "One ratio for each token, or one for each response: policy_loss: gspo, with gae and "
        "reinforce++ gspo_token, as their advantages differ by token.",
    )
    sapo_temperature_pos: Above0 = key(
        1.0, GRPO, "policy_loss: sapo where the advantage is positive (verl: tau_pos)."
    )
    sapo_temperature_neg: Above0 = key(
        1.05, GRPO, "policy_loss: sapo where the advantage is negative (verl: tau_neg)."
    )
    rollout_is: (
        Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None
    ) = key(
        None,
        VERL,
        "Weight tokens by the trainer's probability divided by the sampler's, of each token or of "
        "the whole response; outside the two bounds below it is truncated to them, or the token is "
        "masked. null is token_truncate with use_vllm or with one of the bounds, otherwise none.",
    )
    rollout_is_threshold: Above0 | None = key(
        None, VERL, "Upper bound of the weights of rollout_is; null is 2."
    )
    rollout_is_lower: NonNegative | None = key(
        None, OWN, "Lower bound of the weights of rollout_is; null is none."
    )
    loss_agg_mode: Literal[
        "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
    ] = key(
        "token-mean",
        VERL,
        "How an optimiser step's loss is aggregated from its tokens; the last mode divides by "
        "max_new_tokens, while verl by default divides by the padded width of its batch.",
    )
    mask_truncated_completions: bool = key(
        False,
        GRPO,
        "Leave truncated responses out of the loss and of the whitening; they still count among "
        "the responses that grpo and rloo compare.",
    )
    cliprange_value: Above0 | None = key(
        0.2,
        TRL,
        "How far a value may move from the rollout's in a step, in units of the score; null is "
        "no limit.",
    )
    vf_coef: NonNegative = key(
        0.1,
        TRL,
        "Weight of the value loss; it has an effect with critic: shared, otherwise use "
        "critic_learning_rate.",
    )
    entropy_coef: NonNegative = key(0.0, OWN, "Weight of an entropy bonus in the policy loss.")
    critic_warmup: Count = key(
        0,
        VERL,
        "Number of PPO steps at the start that train only the critic; actor and beta do not "
        "change. The learning rate's schedule counts these steps.",
    )
    critic_learning_rate: NonNegative | None = key(
        None, OWN, "Learning rate of the critic; null is learning_rate."
    )
    ratio_threshold: Above0 = key(
        10.0, TRL, "An optimiser step whose mean ratio is above this is skipped."
    )
    early_stopping: bool = key(
        False, TRL, "End the epochs of a step when policykl exceeds 1.5 target_kl."
    )
    target_kl: Above0 = key(1.0, TRL, "See early_stopping.")

    ptx_coef: NonNegative = key(
        0.0, OPENRLHF, "Weight of the cross-entropy on ptx_dataset in each optimiser step."
    )
    ptx_dataset: str | None = key(
        None, OWN, "Records with an output, for ptx_coef; named like dataset."
    )

    @model_validator(mode="before")
    @classmethod
    def _aggregation_by_name(cls, data: Any) -> Any:
        """TRL's names of a loss include its aggregation."""
        name = data.get("policy_loss") if isinstance(data, dict) else None
        if isinstance(name, str) and name in TRL_AGGREGATION:
            return {"loss_agg_mode": TRL_AGGREGATION[name], **data}
        return data
