"""Keys that have no effect because of a file's other settings: why, and which keys act instead.

No torch here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastppo.config.schema import Config

# Schedules without a warm-up.
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau")
# Optimisers whose step is proportional to the gradient; other optimisers normalise it.
SCALED_BY_GRADIENT = ("sgd",)


def without_effect(config: Config) -> dict[str, str]:
    """Key -> why it has no effect in this configuration, as text to print after `key: `.

    Keys that the advantage estimator does not use are in `config.unknown_to_estimator`.
    """
    found: dict[str, str] = {}
    if config.stage == "ppo":
        found |= algorithm(config)
    if config.fsdp_config and not config.shards:
        found["fsdp_config"] = "no effect without fsdp: full_shard"
    if "swanlab" not in config.trackers:
        swanlab = "no effect without use_swanlab: true, or swanlab in report_to"
        found |= {name: swanlab for name in type(config).model_fields if name[:8] == "swanlab_"}
    if not config.push_to_hub:
        for name in ("hub_model_id", "hub_private_repo", "hub_strategy"):
            found[name] = "no effect without push_to_hub: true"
    warms = config.warmup_ratio or config.warmup_steps
    if warms and config.lr_scheduler_type in WITHOUT_WARMUP:
        cure = "constant_with_warmup" if config.lr_scheduler_type == "constant" else "linear"
        for name in ("warmup_ratio", "warmup_steps"):
            found[name] = (
                f"no effect with lr_scheduler_type: {config.lr_scheduler_type}, which has no "
                f"warm-up; use {cure}"
            )
    return found


def algorithm(config: Config) -> dict[str, str]:
    """The keys of stage ppo among them."""
    found = {}
    if config.has_critic and config.critic != "shared" and config.optim not in SCALED_BY_GRADIENT:
        found["vf_coef"] = (
            f"next to no effect with critic: {config.critic}: the critic has weights and an "
            "optimiser group of its own, and neither Adam's step nor the clipped gradient goes "
            "with the scale of its loss; raise or lower critic_learning_rate"
        )
    if not config.adap_kl_ctrl:
        found["horizon"] = "no effect with adap_kl_ctrl: false, which keeps beta at init_kl_coef"
        found["ppo_target"] = (
            "moves no beta with adap_kl_ctrl: false; guard_kl alone measures the KL by it"
        )
    elif config.init_kl_coef == 0:
        why = (
            "no effect with init_kl_coef: 0: the controller multiplies beta, which stays 0; set "
            "init_kl_coef"
        )
        found |= {"horizon": why, "adap_kl_ctrl": why}
    if not config.early_stopping:
        found["target_kl"] = "no effect without early_stopping: true"
    found |= engine(config)
    if config.importance_mode is None:
        for name in ("rollout_is_threshold", "rollout_is_lower"):
            found[name] = "no effect with rollout_is: none"
    if not config.use_kl_loss:
        found["kl_loss_type"] = (
            "no effect without use_kl_loss: true; in the reward it is kl_penalty"
        )
    if config.cliprange_low is not None and config.cliprange_high is not None:
        found["cliprange"] = "no effect beside cliprange_low and cliprange_high"
    if config.token_loss in ("sapo", "reinforce"):
        for name in ("cliprange", "cliprange_low", "cliprange_high"):
            found[name] = f"no effect with policy_loss: {config.policy_loss}, which has no clip"
    if config.token_loss != "sapo":
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            found[name] = "no effect without policy_loss: sapo"
    if not config.penalise_no_eos and not config.min_response_length:
        found["reward_penalty"] = "no effect without penalise_no_eos or min_response_length"
    if not config.filter_groups:
        found["max_num_gen_batches"] = "no effect without filter_groups: true"
    if config.overlong_buffer_len is None:
        found["overlong_penalty_factor"] = "no effect without overlong_buffer_len"
    if config.mask_truncated_completions and config.bootstrap_truncated:
        found["bootstrap_truncated"] = (
            "no effect with mask_truncated_completions: true, which leaves truncated responses out"
        )
    return found


def engine(config: Config) -> dict[str, str]:
    """The keys of rollouts by vLLM among them."""
    address = "vllm_server_base_url"
    of_colocate = (
        "vllm_gpu_memory_utilization",
        "vllm_enable_sleep_mode",
        "vllm_tensor_parallel_size",
    )
    if not config.use_vllm:
        of_both = ("vllm_mode", "vllm_server_timeout", "vllm_adapter_dir")
        names = (*of_both, address, *of_colocate)
        return dict.fromkeys(names, "no effect without use_vllm: true")
    if config.vllm_mode == "colocate":
        return {address: "no effect with vllm_mode: colocate"}
    why = "no effect with vllm_mode: server, whose own flags say it"
    return dict.fromkeys(of_colocate, why)
