"""Keys of how a PPO step runs: what is sampled together, what shares a forward. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fastppo.config.key import HF, OWN, TRL24, VERL, Above0, Keys, Positive, key
from fastppo.config.memory import Auto

if TYPE_CHECKING:
    from fastppo.config.schema import Config


class StepKeys(Keys):
    """They change speed and memory, and the result by rounding only."""

    title = "Batches of a PPO step"

    ppo_max_token_len_per_gpu: Positive | Auto | None = key(
        None,
        VERL,
        "Most tokens of a micro-batch, padding included; null is per_device_train_batch_size x "
        "(cutoff_len + max_new_tokens), so that shorter sequences share one, auto as many as fit.",
    )
    ppo_micro_batch_size_per_gpu: Positive | None = key(
        None, VERL, "Most sequences of a micro-batch; null leaves it to the tokens."
    )
    log_prob_max_token_len_per_gpu: Positive | Auto | None = key(
        None,
        VERL,
        "Most tokens of a micro-batch in scoring, in evaluation too; null is the update's, auto as "
        "many as fit.",
    )
    padding_free: bool = key(
        False, TRL24, "Pack a micro-batch's sequences behind one another in place of padding them."
    )
    rollout_kv_cache_gib: Above0 | None = key(
        None,
        OWN,
        "GiB of keys and values that sampling may hold; past it a step's prompts are answered in "
        "groups. null is no limit on a CPU, and on a GPU most of what weights and optimiser leave.",
    )
    rollout_merge_adapter: bool | None = key(
        None,
        OWN,
        "Sample from a copy of the weights with the adapter merged in; null does where the copy "
        "takes a quarter of the memory at most and the weights are float32: bf16 rounds away what "
        "a young adapter says.",
    )
    cache_implementation: Literal["dynamic", "static"] = key(
        "dynamic", HF, "static compiles the sampler's steps, on CUDA (not measured here)."
    )


def check_step(config: Config) -> None:
    """Refuse to merge what cannot be merged.

    Raises:
        ValueError: names the key, and the cure.
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
