"""What the keys on activations and frozen models say together. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastppo.config.schema import Config


def offload_mode(config: Config) -> str:
    """activation_offloading, or what LLaMA-Factory's keys for it say."""
    if config.activation_offloading is not None:
        return config.activation_offloading
    if config.use_unsloth_gc:
        return "checkpoint+offload"
    return "none" if config.disable_gradient_checkpointing else "checkpoint"


def longest_sequence(config: Config) -> int:
    """Most tokens of a sequence: in stage rm prompt and answer share cutoff_len."""
    return config.cutoff_len + (config.max_new_tokens if config.stage == "ppo" else 0)


def micro_batch_tokens(config: Config) -> int:
    """Most tokens of a micro-batch, padding included.

    In stage ppo what `per_device_train_batch_size` sequences take at their longest: shorter ones
    share a micro-batch with more, in the memory that was planned for them.
    """
    rows = config.per_device_train_batch_size * (2 if config.stage == "rm" else 1)
    return rows * longest_sequence(config)


def reference_streams(config: Config) -> bool:
    """Whether ref_model passes through the device: asked to, not in few bits, nothing on it trains.

    With freeze and full a critic that is an adapter trains on it.
    """
    trains = config.finetuning_type != "lora" and config.critic == "adapter" and config.has_critic
    whole = config.ref_model is not None and config.ref_model_quantization_bit is None
    return config.stream_frozen and whole and not trains


def check_offload(config: Config) -> None:
    """Refuse keys that contradict each other.

    Raises:
        ValueError: names the key, and the cure.
    """
    mode = offload_mode(config)
    if config.disable_gradient_checkpointing and mode not in ("none", "offload"):
        raise ValueError(
            f"disable_gradient_checkpointing: contradicts {mode}; leave one of the keys out"
        )
    if config.use_unsloth_gc and mode != "checkpoint+offload":
        raise ValueError(
            f"use_unsloth_gc: contradicts activation_offloading: {mode}; leave one of them out"
        )
    if config.stream_frozen:
        full = any(reward.kind == "full" for reward in config.rewards)
        if full and config.reward_model_quantization_bit is not None:
            raise ValueError(
                "stream_frozen: a model in few bits does not stream; leave it or "
                "reward_model_quantization_bit out"
            )
        if not full and not reference_streams(config):
            raise ValueError(
                "stream_frozen: no role has a whole model of its own here that is frozen and not "
                "in few bits; leave it out"
            )
    if config.offload_dir and mode in ("none", "checkpoint") and not config.stream_frozen:
        raise ValueError(
            f"offload_dir: activation_offloading: {mode} moves nothing there; use "
            "checkpoint+offload, or leave it out"
        )
