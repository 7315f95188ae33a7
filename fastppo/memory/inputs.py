"""What the memory plan reads of a configuration, under the configuration's own names."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastppo.config.model import run_dtype
from fastppo.memory.shapes import ModelShape
from fastppo.memory.units import MIB

if TYPE_CHECKING:
    from fastppo.config import Config

# The defaults of fastppo/ops/head.py, which imports torch; a test holds them together.
CHUNK_BYTES_CPU, CHUNK_BYTES_GPU = 80 * MIB, 512 * MIB
CHUNK_ROWS_CPU = 128
CHUNK_ROWS_TRAINED_CPU = 256
# Of fastppo/ops/workspace.py: a CPU's chunk of a size between these is kept from call to call.
KEPT_FROM, KEPT_TO = MIB, 256 * MIB
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
    """One run, as far as memory depends on it. Keys that a Config lacks have these defaults."""

    stage: str = "ppo"
    finetuning_type: str = "lora"
    freeze_trainable_layers: int = 2
    lora_rank: int = 8
    lora_target: str = "all"
    lora_layers: int | None = None
    adapter_name_or_path: str | None = None
    create_new_adapter: bool = False
    quantization_bit: int | None = None
    bf16: bool = False
    advantage: str = "gae"
    kl_penalty: str = "kl"
    critic: str = "adapter"
    critic_model: str | None = None
    critic_finetuning_type: str | None = None
    ref_model: str | None = None
    ref_model_quantization_bit: int | None = None
    reward_model_quantization_bit: int | None = None
    flash_attn: str = "auto"
    disable_gradient_checkpointing: bool = False
    activation_offloading: str | None = None
    offload_dir: str | None = None
    stream_frozen: bool = False
    optim: str | None = None
    use_dora: bool = False
    ptx_coef: float = 0.0
    cutoff_len: int = 2048
    max_new_tokens: int = 1024
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    ppo_buffer_size: int = 1
    ppo_max_token_len_per_gpu: int | None = None
    ppo_micro_batch_size_per_gpu: int | None = None
    log_prob_max_token_len_per_gpu: int | None = None
    rollout_kv_cache_gib: float | None = None
    rollout_merge_adapter: bool | None = None
    eval_max_samples: int = 64
    generation_batch: int | None = None  # None: a step's prompts at once
    chunk_bytes: int | None = None
    # What is not a key of its own name.
    device: Literal["gpu", "cpu"] = "gpu"
    own_dtype: str = "bfloat16"  # the checkpoint's
    rewards: tuple[str, ...] = ("lora",)
    start_rank: int | None = None  # of an adapter that trains on; None: lora_rank
    start_target: str = "all"
    reward_rank: int = 8
    reward_target: str = "all"
    reward_source: str = ""  # where its rank is from
    auto: tuple[str, ...] = ()  # keys that the plan is to decide
    compiled_ops: bool = True  # kernels, and not the operators' definition in PyTorch
    mixed_lengths: bool = True  # rows of a batch differ in length

    @property
    def dtype(self) -> str:
        """What the base is in."""
        return run_dtype(bf16=self.bf16, own=self.own_dtype, on_gpu=self.device == "gpu")

    @property
    def item(self) -> int:
        """Bytes of an element of the base."""
        return 4 if self.dtype == "float32" else 2

    @property
    def autocast(self) -> bool:
        """Whether float32 adapters are cast for each pass."""
        return self.item < 4

    @property
    def merges(self) -> bool:
        """Whether adapters become part of the base, which has to be in 16 bits or more for that."""
        folders = self.adapter_name_or_path
        return folders is not None and (self.create_new_adapter or "," in folders)

    @property
    def continues(self) -> bool:
        """Whether an adapter trains on, of which a frozen copy is the reference."""
        return self.adapter_name_or_path is not None and not self.create_new_adapter

    @property
    def actor_rank(self) -> int:
        """Of the actor's adapter."""
        return self.lora_rank if self.start_rank is None else self.start_rank

    @property
    def actor_target(self) -> str:
        """What the actor's adapter is on."""
        return self.lora_target if self.start_rank is None else self.start_target

    @property
    def has_critic(self) -> bool:
        """Whether values are learned: the advantage estimators beside gae do without."""
        return self.stage == "ppo" and self.advantage == "gae"

    @property
    def eager(self) -> bool:
        """Attention that holds its probabilities."""
        return self.flash_attn == "disabled"

    @property
    def sequence(self) -> int:
        """The longest row of an update: prompt and response, or in stage rm both in cutoff_len."""
        return self.cutoff_len + (self.max_new_tokens if self.stage == "ppo" else 0)

    @property
    def step_rows(self) -> int:
        """Sequences of an optimiser step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def micro_batch(self, tokens: int | None) -> tuple[int, int]:
        """Rows and length of the largest micro-batch of stage ppo in a budget of `tokens`.

        None is what per_device_train_batch_size sequences take at their longest. Shorter sequences
        fill a budget that is no multiple of the longest.
        """
        longest = self.sequence
        tokens = tokens or self.per_device_train_batch_size * longest
        most = min(self.step_rows, self.ppo_micro_batch_size_per_gpu or self.step_rows)
        rows = min(max(1, -(-tokens // longest)), most)
        return rows, min(longest, max(tokens, longest) // rows)

    @property
    def update_batch(self) -> tuple[int, int]:
        """Rows and length of the largest micro-batch of the update."""
        return self.micro_batch(self.ppo_max_token_len_per_gpu)

    @property
    def score_batch(self) -> tuple[int, int]:
        """The same of scoring, in training and in evaluation."""
        return self.micro_batch(
            self.log_prob_max_token_len_per_gpu or self.ppo_max_token_len_per_gpu
        )

    @property
    def accumulates(self) -> bool:
        """Whether an optimiser step has more than one micro-batch."""
        return self.step_rows > self.update_batch[0]

    @property
    def rollout_rows(self) -> int:
        """Sequences that are sampled at a time."""
        step = self.step_rows * self.ppo_buffer_size
        return min(step, self.generation_batch or step)

    @property
    def least_chunk_rows(self) -> int:
        """Rows of logits that the operators make at a time whatever their default budget is."""
        if self.device != "cpu" or self.chunk_bytes is not None:
            return 1
        return CHUNK_ROWS_TRAINED_CPU if self.finetuning_type == "full" else CHUNK_ROWS_CPU

    @property
    def resolved_chunk_bytes(self) -> int:
        """The budget of the head's logits."""
        default = CHUNK_BYTES_GPU if self.device == "gpu" else CHUNK_BYTES_CPU
        return self.chunk_bytes or default

    @property
    def offloading(self) -> str:
        """none, checkpoint, offload or checkpoint+offload."""
        if self.activation_offloading is None:
            return "none" if self.disable_gradient_checkpointing else "checkpoint"
        return str(self.activation_offloading)

    @property
    def rollout_merges(self) -> bool:
        """Whether sampling has a copy of the adapted weights; that it is too large is not known."""
        if self.finetuning_type != "lora" or self.quantization_bit is not None:
            return False
        return self.item == 4 if self.rollout_merge_adapter is None else self.rollout_merge_adapter

    def padded(self, rows: int) -> bool:
        """Whether a batch has padding, and so attention a mask; a row alone never has."""
        return rows > 1 and self.mixed_lengths

    @classmethod
    def of(cls, config: Config, shape: ModelShape, *, device: Literal["gpu", "cpu"]) -> PlanInputs:
        """The inputs of a configuration on a base of `shape`."""
        own = {f.name for f in fields(cls)} - {"device", "own_dtype", "rewards", "auto"}
        values: dict[str, Any] = {n: getattr(config, n) for n in own if hasattr(config, n)}
        auto = tuple(name for name in AUTO_KEYS if values.get(name) == "auto")
        values |= dict.fromkeys(auto)
        if config.use_unsloth_gc and values["activation_offloading"] is None:
            values["activation_offloading"] = "checkpoint+offload"
        rank, target, source = reward_adapters(config)
        if config.adapter_name_or_path is not None and not config.create_new_adapter:
            start = read_adapter(config.adapter_name_or_path.split(",")[-1].strip())
            if start is not None:
                values |= {"start_rank": start[0], "start_target": start[1]}
        return cls(
            **values,
            device=device,
            auto=auto,
            own_dtype=shape.dtype,
            rewards=tuple(spec.kind for spec in config.rewards),
            reward_rank=rank,
            reward_target=target,
            reward_source=source,
        )


def read_adapter(folder: str) -> tuple[int, str] | None:
    """Rank and target of an adapter on disk; None where there is none, or none that can be read."""
    try:
        data = json.loads((Path(folder) / ADAPTER_FILE).read_text(encoding="utf-8"))
        target = data["target_modules"]
        return int(data["r"]), target if isinstance(target, str) else ",".join(target)
    except (OSError, ValueError, KeyError, TypeError):  # preflight says what is wrong with it
        return None


def reward_adapters(config: Config) -> tuple[int, str, str]:
    """Rank and target of the reward adapters, and where they are from; the largest of several.

    The folders that stage rm wrote say; before they are there, the policy's own are assumed.
    """
    found = [
        (*adapter, str(Path(folder) / ADAPTER_FILE))
        for folder in config.reward_adapters.values()
        if (adapter := read_adapter(folder)) is not None
    ]
    if found:
        return max(found)
    return config.lora_rank, config.lora_target, "assumed: the policy's own lora_rank"
