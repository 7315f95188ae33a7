"""What a run's memory depends on: its configuration, and what stands in no key of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastppo.config import Config
from fastppo.config.memory import longest_sequence, offload_mode
from fastppo.config.model import run_dtype
from fastppo.memory.budgets import as_count
from fastppo.memory.shapes import ModelShape
from fastppo.memory.units import MIB

# The defaults of fastppo/ops/head.py, which imports torch; a test holds them together.
CHUNK_BYTES_CPU, CHUNK_BYTES_GPU = 80 * MIB, 512 * MIB
CHUNK_ROWS_CPU = 128
CHUNK_ROWS_TRAINED_CPU = 256
# Of fastppo/ops/workspace.py: on a CPU a buffer for logits of a size between these is reused.
REUSED_FROM, REUSED_TO = MIB, 256 * MIB
ADAPTER_FILE = "adapter_config.json"
# Keys whose `auto` the plan decides, in the order that costs most time when it is wrong.
AUTO_KEYS = (
    "activation_offloading",
    "chunk_bytes",
    "ppo_max_token_len_per_gpu",
    "log_prob_max_token_len_per_gpu",
    "generation_batch",
)


@dataclass(frozen=True)
class PlanInputs:
    """One run, as far as memory depends on it.

    Attributes:
        config: the run's keys. Those of AUTO_KEYS that were `auto` are null: see `auto`.
        device: where it runs.
        checkpoint_dtype: of the weights on disk.
        start_rank, start_target: of the adapter on disk that trains on; None where there is none.
        reward_rank, reward_target: of the reward adapters, the largest of several.
        reward_source: where these two are from, in words; begins with ASSUMED where they follow the
            policy's.
        auto: keys that the plan is to decide.
        compiled_ops: the operators run as kernels, and not as their definition in PyTorch.
        mixed_lengths: sequences of a batch differ in length.
    """

    config: Config
    device: Literal["gpu", "cpu"] = "gpu"
    checkpoint_dtype: str = "bfloat16"
    start_rank: int | None = None
    start_target: str = "all"
    reward_rank: int = 8
    reward_target: str = "all"
    reward_source: str = ""
    auto: tuple[str, ...] = ()
    compiled_ops: bool = True
    mixed_lengths: bool = True

    @classmethod
    def of(cls, config: Config, shape: ModelShape, *, device: Literal["gpu", "cpu"]) -> PlanInputs:
        """The inputs of a configuration on a base of `shape`."""
        auto = tuple(name for name in AUTO_KEYS if getattr(config, name) == "auto")
        rank, target, source = largest_reward_adapter(config)
        inputs = cls(
            config.model_copy(update=dict.fromkeys(auto)),
            device=device,
            checkpoint_dtype=shape.dtype,
            reward_rank=rank,
            reward_target=target,
            reward_source=source,
            auto=auto,
        )
        if config.adapter_name_or_path is not None and not config.create_new_adapter:
            last = config.adapter_name_or_path.split(",")[-1].strip()
            if (start := read_adapter(last)) is not None:
                return replace(inputs, start_rank=start[0], start_target=start[1])
        return inputs

    def with_changes(self, **changes: Any) -> PlanInputs:
        """The same run with some keys, or fields of its own, changed; nothing is checked again."""
        keys = {name: value for name, value in changes.items() if name in Config.model_fields}
        fields = {name: value for name, value in changes.items() if name not in keys}
        return replace(self, config=self.config.model_copy(update=keys), **fields)

    @property
    def dtype(self) -> str:
        """The base's dtype."""
        config, on_gpu = self.config, self.device == "gpu"
        own = self.checkpoint_dtype
        return run_dtype(bf16=config.bf16, fp16=config.fp16, own=own, on_gpu=on_gpu)

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the base."""
        return 4 if self.dtype == "float32" else 2

    @property
    def autocast(self) -> bool:
        """Whether float32 adapters are cast for each pass."""
        return self.itemsize < 4

    @property
    def merges_adapters(self) -> bool:
        """Whether adapters are merged into the base at the start, which must not be quantised."""
        folders = self.config.adapter_name_or_path
        return folders is not None and (self.config.create_new_adapter or "," in folders)

    @property
    def continues_adapter(self) -> bool:
        """Whether an adapter from disk trains on; the reference is then a frozen copy of it."""
        config = self.config
        return config.adapter_name_or_path is not None and not config.create_new_adapter

    @property
    def actor_rank(self) -> int:
        """Rank of the actor's adapter."""
        return self.config.lora_rank if self.start_rank is None else self.start_rank

    @property
    def actor_target(self) -> str:
        """Linear layers that the actor's adapter is on."""
        return self.config.lora_target if self.start_rank is None else self.start_target

    @property
    def reward_kinds(self) -> tuple[str, ...]:
        """reward_model_type of each reward."""
        return tuple(spec.kind for spec in self.config.rewards)

    @property
    def has_critic(self) -> bool:
        """Whether a critic is built and trained."""
        return self.config.stage == "ppo" and self.config.has_critic

    @property
    def eager_attention(self) -> bool:
        """Whether attention holds its probabilities."""
        return self.config.flash_attn == "disabled"

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence: prompt and response; in stage rm both in cutoff_len."""
        return longest_sequence(self.config)

    @property
    def step_rows(self) -> int:
        """Sequences of an optimiser step (in stage rm pairs)."""
        return self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps

    def largest_micro_batch(self, tokens: int | None) -> tuple[int, int]:
        """Rows and length of the largest micro-batch of stage ppo in a budget of `tokens`.

        None is what per_device_train_batch_size sequences take at their longest. Shorter sequences
        fill a budget that is no multiple of the longest.
        """
        longest = self.longest_sequence
        tokens = tokens or self.config.per_device_train_batch_size * longest
        most = min(self.step_rows, self.config.ppo_micro_batch_size_per_gpu or self.step_rows)
        rows = min(max(1, -(-tokens // longest)), most)
        return rows, min(longest, max(tokens, longest) // rows)

    @property
    def update_batch(self) -> tuple[int, int]:
        """Rows and length of the largest micro-batch of the update."""
        return self.largest_micro_batch(as_count(self.config.ppo_max_token_len_per_gpu))

    @property
    def score_batch(self) -> tuple[int, int]:
        """Rows and length of the largest micro-batch of scoring, in training and in evaluation."""
        config = self.config
        tokens = config.log_prob_max_token_len_per_gpu or config.ppo_max_token_len_per_gpu
        return self.largest_micro_batch(as_count(tokens))

    @property
    def accumulates(self) -> bool:
        """Whether an optimiser step has more than one micro-batch."""
        return self.step_rows > self.update_batch[0]

    @property
    def rollout_rows(self) -> int:
        """Sequences that are sampled at a time."""
        rows = self.step_rows * self.config.ppo_buffer_size
        return min(rows, as_count(self.config.generation_batch) or rows)

    @property
    def min_chunk_rows(self) -> int:
        """Rows of logits that the operators make at a time whatever their default budget is."""
        if self.device != "cpu" or self.config.chunk_bytes is not None:
            return 1
        full = self.config.finetuning_type == "full"
        return CHUNK_ROWS_TRAINED_CPU if full else CHUNK_ROWS_CPU

    @property
    def chunk_bytes(self) -> int:
        """Bytes of logits that exist at a time: the key, or the operators' default."""
        default = CHUNK_BYTES_GPU if self.device == "gpu" else CHUNK_BYTES_CPU
        return as_count(self.config.chunk_bytes) or default

    @property
    def offload_mode(self) -> str:
        """none, checkpoint, offload or checkpoint+offload."""
        return offload_mode(self.config)

    @property
    def samples_from_merged_copy(self) -> bool:
        """Whether sampling has a copy of the adapted weights, unless it turns out too large."""
        config = self.config
        if config.finetuning_type != "lora" or config.quantization_bit is not None:
            return False
        merge = config.rollout_merge_adapter
        return self.itemsize == 4 if merge is None else merge

    def has_padding(self, rows: int) -> bool:
        """Whether a batch of `rows` has padding, and so attention a mask; one row never has."""
        return rows > 1 and self.mixed_lengths


def read_adapter(folder: str) -> tuple[int, str] | None:
    """Rank and target of an adapter on disk; None where there is none, or none that can be read."""
    try:
        data = json.loads((Path(folder) / ADAPTER_FILE).read_text(encoding="utf-8"))
        target = data["target_modules"]
        return int(data["r"]), target if isinstance(target, str) else ",".join(target)
    except (OSError, ValueError, KeyError, TypeError):  # preflight reports what is wrong with it
        return None


ASSUMED = "assumed"


def largest_reward_adapter(config: Config) -> tuple[int, str, str]:
    """Rank, target and source of the reward adapter with the highest rank.

    They are read from the folders that stage rm wrote; before those exist, the policy's own are
    assumed.
    """
    found = [
        (*adapter, str(Path(folder) / ADAPTER_FILE))
        for folder in config.reward_adapters.values()
        if (adapter := read_adapter(folder)) is not None
    ]
    if found:
        return max(found)
    return config.lora_rank, config.lora_target, f"{ASSUMED}: the policy's own lora_rank"
