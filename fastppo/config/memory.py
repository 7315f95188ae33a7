"""Keys that change a run's memory and speed, and its result only by rounding.

No torch here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fastppo.config.key import HF, LF, OWN, TRL24, VERL, Above0, Keys, Positive, key

if TYPE_CHECKING:
    from fastppo.config.schema import Config

Auto = Literal["auto"]  # the memory plan chooses the fastest value that fits


class MemoryKeys(Keys):
    """Keys that change how much memory the phases of a run need, but not what they train."""

    title = "Memory"

    chunk_bytes: Positive | Auto | None = key(
        None,
        OWN,
        "Bytes of logits that exist at a time; null is 512 MiB on a GPU, and 80 MiB or 128 rows "
        "on a CPU; auto is that, or less if it does not fit.",
    )
    generation_batch: Positive | Auto | None = key(
        None,
        OWN,
        "Largest number of sequences that are sampled at a time; auto is as many of a rollout "
        "as fit, null is all.",
    )
    disable_gradient_checkpointing: bool | None = key(
        None,
        LF,
        "true keeps activations (activation_offloading: none), false recomputes them (checkpoint).",
    )
    use_unsloth_gc: bool = key(False, LF, "The same as activation_offloading: checkpoint+offload.")
    activation_offloading: (
        Literal["none", "checkpoint", "offload", "checkpoint+offload", "auto"] | None
    ) = key(
        None,
        OWN,
        "Where activations are kept between forward and backward, see docs/offload.md; null "
        "follows the two keys above; without them it is none if the run then takes at most half "
        "of the memory by its plan, and else checkpoint.",
    )
    offload_dir: str | None = key(
        None, OWN, "Offload to memory-mapped files in this folder instead of host memory."
    )


class StepKeys(Keys):
    """Keys that change speed and memory, and the result only by rounding."""

    title = "Batches of a PPO step"

    ppo_max_token_len_per_gpu: Positive | Auto | None = key(
        None,
        VERL,
        "Largest number of tokens in a micro-batch, including padding; null is "
        "per_device_train_batch_size x (cutoff_len + max_new_tokens), so that several shorter "
        "sequences share one; auto is as many as fit.",
    )
    ppo_micro_batch_size_per_gpu: Positive | None = key(
        None, VERL, "Largest number of sequences in a micro-batch; null limits only the tokens."
    )
    log_prob_max_token_len_per_gpu: Positive | Auto | None = key(
        None,
        VERL,
        "Largest number of tokens in a micro-batch of scoring, also in evaluation; null is the "
        "update's, auto is as many as fit.",
    )
    padding_free: bool = key(
        False, TRL24, "Pack the sequences of a micro-batch into one row instead of padding them."
    )
    rollout_kv_cache_gib: Above0 | None = key(
        None,
        OWN,
        "GiB of keys and values that sampling may use; if a step's prompts need more, some wait "
        "until others have ended. null is no limit on a CPU, and on a GPU most of what weights "
        "and optimiser leave.",
    )
    rollout_merge_adapter: bool | None = key(
        None,
        OWN,
        "Sample with the adapter merged into a copy of the weights; null does so if the copy "
        "takes at most a quarter of the memory and the weights are float32: bf16 would round "
        "away the small changes of a new adapter.",
    )
    cache_implementation: Literal["dynamic", "static"] = key(
        "dynamic", HF, "static compiles decoding on CUDA (not measured here)."
    )


def offload_mode(config: Config) -> str:
    """activation_offloading, or the mode that LLaMA-Factory's keys ask for.

    It is `checkpoint` where nothing asks for a mode, until the run's plan has decided.
    """
    if config.activation_offloading is not None:
        return config.activation_offloading
    if config.use_unsloth_gc:
        return "checkpoint+offload"
    return "none" if config.disable_gradient_checkpointing else "checkpoint"


def plan_decides_offloading(config: Config) -> bool:
    """Whether no key says if activations are kept or recomputed.

    A sharded base recomputes them then: it is sharded because memory is short.
    """
    asked = (config.activation_offloading, config.disable_gradient_checkpointing)
    return asked == (None, None) and not config.use_unsloth_gc and not config.shards


def longest_sequence(config: Config) -> int:
    """Largest number of tokens in a sequence; in stage rm prompt and answer share cutoff_len."""
    return config.cutoff_len + (config.max_new_tokens if config.stage == "ppo" else 0)


def micro_batch_tokens(config: Config) -> int:
    """Largest number of tokens in a micro-batch, including padding.

    In stage ppo it is `per_device_train_batch_size` times the longest sequence; of shorter
    sequences, more share a micro-batch, in the same memory.
    """
    rows = config.per_device_train_batch_size * (2 if config.stage == "rm" else 1)
    return rows * longest_sequence(config)


def reference_streams(config: Config) -> bool:
    """Whether ref_model's layers are streamed: the keys say so, and it is neither quantised nor
    the base of a critic's adapter (with finetuning_type freeze and full).
    """
    trains = config.finetuning_type != "lora" and config.critic == "adapter" and config.has_critic
    whole = config.ref_model is not None and config.ref_model_quantization_bit is None
    return config.stream_frozen and whole and not trains


def check_offload(config: Config) -> None:
    """Check that the keys of offloading do not contradict each other.

    Raises:
        ValueError: two keys do; the message names the key and the cure.
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


def check_step(config: Config) -> None:
    """Check that rollout_merge_adapter can be obeyed.

    Raises:
        ValueError: the adapter cannot be merged; the message names the key and the cure.
    """
    if not config.rollout_merge_adapter:
        return
    if config.finetuning_type != "lora":
        raise ValueError(
            f"rollout_merge_adapter: finetuning_type: {config.finetuning_type} has no adapter to "
            "merge; leave it out"
        )
    if config.quantization_bit is not None:
        raise ValueError(
            "rollout_merge_adapter: quantised weights take no merge; leave it or quantization_bit "
            "out"
        )
