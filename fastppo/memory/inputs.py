"""The inputs of the memory plan: the configuration, and facts that are in none of its keys."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastppo.config import Config
from fastppo.config.memory import longest_sequence, offload_mode, plan_decides_offloading
from fastppo.config.model import run_dtype
from fastppo.config.parallel import units_a_step
from fastppo.memory.budgets import PromptSharing, as_count, may_share_prompts
from fastppo.memory.shapes import ModelShape
from fastppo.memory.tape import FLOAT32
from fastppo.memory.units import MIB

# The defaults of fastppo/ops/head.py, which imports torch; a test compares them.
CHUNK_BYTES_CPU, CHUNK_BYTES_GPU = 80 * MIB, 512 * MIB
CHUNK_ROWS_CPU = 128
CHUNK_ROWS_TRAINED_CPU = 256
WORDS_CPU = 1024  # rows of a 16-bit head that are upcast at a time
# Of fastppo/ops/word_blocks.py: from how many tokens on float32 logits go by blocks of words; of
# how many bytes, words and tokens a block is at most. Its columns are tiles of tokens, and a few.
WORDS_FROM, WORD_BLOCK, MOST_WORDS, MOST_TOKENS = 64, 16 * MIB, 8192, 2048
WORD_TILE, WORD_COLUMNS = 32, 16
# From fastppo/ops/workspace.py: on a CPU, buffers for logits are reused if their size is between.
REUSED_FROM, REUSED_TO = MIB, 256 * MIB
# From fastppo/ops/few_rows.py: the most sequences that native layers on a CPU sample at a time.
FEW_ROWS = 32
ADAPTER_FILE = "adapter_config.json"
# Keys whose `auto` the plan decides; first those whose wrong value costs most time.
AUTO_KEYS = (
    "activation_offloading",
    "chunk_bytes",
    "ppo_max_token_len_per_gpu",
    "log_prob_max_token_len_per_gpu",
    "generation_batch",
)


@dataclass(frozen=True)
class PlanInputs:
    """Everything about a run that its memory depends on.

    Attributes:
        config: the configuration; keys that were `auto` are None here and are listed in `auto`.
        device: gpu or cpu.
        checkpoint_dtype: dtype of the weights on disk.
        start_rank, start_target: rank and target of the adapter that training continues; None if
            there is none.
        reward_rank, reward_target: rank and target of the largest reward adapter.
        reward_source: a description of where these two come from; it begins with ASSUMED if they
            are the policy's.
        auto: keys that the plan decides.
        compiled_ops: whether the operators run as kernels, not as their definition in PyTorch.
        mixed_lengths: whether the sequences of a batch differ in length.
        gpus: how many processes share the run; the plan is that of the one with most prompts.
        card_bytes: memory of a GPU, of which vLLM beside the trainer takes a share; None if no size
            is known.
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
    gpus: int = 1
    card_bytes: int | None = None

    @classmethod
    def of(
        cls, config: Config, shape: ModelShape, *, device: Literal["gpu", "cpu"], gpus: int = 1
    ) -> PlanInputs:
        """The inputs for a configuration whose base has this `shape`."""
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
            gpus=gpus,
        )
        if config.adapter_name_or_path is not None and not config.create_new_adapter:
            last = config.adapter_name_or_path.split(",")[-1].strip()
            if (start := read_adapter(last)) is not None:
                return replace(inputs, start_rank=start[0], start_target=start[1])
        return inputs

    def with_changes(self, **changes: Any) -> PlanInputs:
        """A copy with some keys or fields changed; the configuration is not checked again."""
        keys = {name: value for name, value in changes.items() if name in Config.model_fields}
        fields = {name: value for name, value in changes.items() if name not in keys}
        return replace(self, config=self.config.model_copy(update=keys), **fields)

    @property
    def dtype(self) -> str:
        """The name of the base's dtype."""
        config, on_gpu = self.config, self.device == "gpu"
        own = self.checkpoint_dtype
        return run_dtype(bf16=config.bf16, fp16=config.fp16, own=own, on_gpu=on_gpu)

    @property
    def itemsize(self) -> int:
        """Bytes per element of the base."""
        return 4 if self.dtype == "float32" else 2

    @property
    def autocast(self) -> bool:
        """Whether passes run under autocast, which casts float32 adapters."""
        return self.itemsize < 4

    @property
    def merges_adapters(self) -> bool:
        """Whether adapters are merged into the base at the start; then it cannot be quantised."""
        folders = self.config.adapter_name_or_path
        return folders is not None and (self.config.create_new_adapter or "," in folders)

    @property
    def continues_adapter(self) -> bool:
        """Whether training continues an adapter; the reference then has a frozen copy of it."""
        config = self.config
        return config.adapter_name_or_path is not None and not config.create_new_adapter

    @property
    def colocates(self) -> bool:
        """Whether vLLM samples on the trainer's device."""
        config = self.config
        beside = config.use_vllm and config.vllm_mode == "colocate"
        return beside and config.stage == "ppo" and config.trains

    @property
    def samples_a_reference(self) -> bool:
        """Whether an evaluation samples a reference with weights that vLLM does not have."""
        return self.config.ref_model is not None or self.continues_adapter

    @property
    def actor_rank(self) -> int:
        """Rank of the actor's adapter."""
        return self.config.lora_rank if self.start_rank is None else self.start_rank

    @property
    def actor_target(self) -> str:
        """The linear layers that have the actor's adapter, as in `lora_target`."""
        return self.config.lora_target if self.start_rank is None else self.start_target

    @property
    def shards(self) -> bool:
        """Whether each process has a part of the base's decoder layers (`fsdp`)."""
        return self.config.shards and self.gpus > 1

    @property
    def reward_kinds(self) -> tuple[str, ...]:
        """The `reward_model_type` of each reward."""
        return tuple(spec.kind for spec in self.config.rewards)

    @property
    def has_critic(self) -> bool:
        """Whether a critic is built and trained."""
        return self.config.stage == "ppo" and self.config.has_critic

    @property
    def eager_attention(self) -> bool:
        """Whether attention keeps its probabilities in memory."""
        return self.config.flash_attn == "disabled"

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence: prompt plus response; in stage rm cutoff_len."""
        return longest_sequence(self.config)

    @property
    def step_rows(self) -> int:
        """Number of sequences (in stage rm of pairs) in a process's part of an optimiser step."""
        rows = self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps
        # The rows of an optimiser step are drawn from all: by chance they may all be one process's.
        return min(rows, self.scored_rows) if self.config.stage == "ppo" else self.units

    def largest_micro_batch(self, tokens: int | None) -> tuple[int, int]:
        """Rows and length of the largest micro-batch of stage ppo with a budget of `tokens`.

        None is the tokens of per_device_train_batch_size sequences of the longest length. A budget
        that is no multiple of the longest length can be filled by shorter sequences.
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

    def with_prompts_once(
        self, rows: int, length: int, shape: ModelShape
    ) -> tuple[int, int] | None:
        """Rows and length of a micro-batch if the prompts that its responses share are run once.

        None if they are not, because it does not pay or the run's attention does not allow it.
        """
        config, each = self.config, min(rows, self.config.num_generations)
        allowed = config.stage == "ppo" and may_share_prompts(config) and not self.shards
        if each < 2 or not allowed or self.eager_attention or shape.softcapped:
            return None
        once = (-(-rows // each), length + (each - 1) * min(length - 1, config.max_new_tokens))
        sharing = PromptSharing(shape.hidden, shape.window if shape.sliding_layers else None)
        return once if sharing.pays((rows, length), once) else None

    @property
    def accumulates(self) -> bool:
        """Whether an optimiser step has more than one micro-batch."""
        return self.step_rows > self.update_batch[0]

    @property
    def native_layers(self) -> bool:
        """Whether the native kernels run the layers, too, and the head by blocks of words."""
        return self.device == "cpu" and self.compiled_ops and self.itemsize == FLOAT32

    @property
    def scored_rows(self) -> int:
        """Number of sequences in a process's part of a rollout."""
        return self.units * self.config.num_generations

    @property
    def units(self) -> int:
        """The most prompts of a step (in stage rm pairs) that a process has."""
        return -(-units_a_step(self.config)[0] // self.gpus)

    def sampled_rows(self, total: int) -> int:
        """Number of sequences, of `total`, that are sampled at a time if the cache has room."""
        most = as_count(self.config.generation_batch) or total
        if self.device == "cpu" and self.compiled_ops:
            most = min(most, FEW_ROWS)
        return min(total, most)

    @property
    def rollout_rows(self) -> int:
        """Number of sequences of a rollout that are sampled at a time."""
        return self.sampled_rows(self.scored_rows)

    @property
    def evaluated_rows(self) -> int:
        """Number of sequences that an evaluation scores at a time."""
        most = -(-self.config.eval_max_samples // self.gpus)
        return min(self.config.per_device_eval_batch_size, most)

    @property
    def states_on_host(self) -> bool:
        """Whether the states behind the shared layers are kept in host memory."""
        return "offload" in self.offload_mode

    @property
    def min_chunk_rows(self) -> int:
        """Rows of logits that the operators make at a time even if that exceeds their budget."""
        if self.device != "cpu" or self.config.chunk_bytes is not None:
            return 1
        full = self.config.finetuning_type == "full"
        return CHUNK_ROWS_TRAINED_CPU if full else CHUNK_ROWS_CPU

    @property
    def chunk_bytes(self) -> int:
        """Bytes of logits that exist at a time: `chunk_bytes`, or the operators' default."""
        default = CHUNK_BYTES_GPU if self.device == "gpu" else CHUNK_BYTES_CPU
        return as_count(self.config.chunk_bytes) or default

    @property
    def trains_head(self) -> bool:
        """Whether the output head has a gradient."""
        targets = self.config.additional_target or ""
        own = any(name in targets for name in ("lm_head", "embed"))
        return self.config.finetuning_type == "full" or own

    @property
    def offload_mode(self) -> str:
        """The mode of activation offloading: none, checkpoint, offload or checkpoint+offload."""
        return offload_mode(self.config)

    @property
    def decides_offloading(self) -> bool:
        """Whether the plan keeps activations if half of the memory has room for them."""
        asked = "activation_offloading" in self.auto
        return not asked and plan_decides_offloading(self.config)

    @property
    def samples_from_merged_copy(self) -> bool:
        """Whether sampling uses merged copies of the adapted weights, unless they are too large."""
        config = self.config
        if config.finetuning_type != "lora" or config.quantization_bit is not None or self.shards:
            return False
        merge = config.rollout_merge_adapter
        return self.itemsize == 4 if merge is None else merge

    def shared_layers(self, depth: int) -> int:
        """Number of lowest layers that run once per rollout, in models with `depth` layers.

        It is what `fastppo.models.shared_layers` finds once the models are loaded.
        """
        config = self.config
        if config.stage != "ppo" or config.quantization_bit == 8 or self.shards:
            return 0
        adapted = depth - min(config.lora_layers or depth, depth)  # layers below a new adapter
        upper = config.freeze_trainable_layers
        below = {"lora": adapted, "freeze": max(0, depth - upper) if upper > 0 else 0, "full": 0}
        frozen = {"actor": below[config.finetuning_type]}
        if self.continues_adapter:
            last = (config.adapter_name_or_path or "").split(",")[-1].strip()
            frozen["actor"] = layers_below(last, adapted)
        if config.ref_model is None:
            frozen["reference"] = frozen["actor"] if self.continues_adapter else depth
        rewards = config.reward_adapters
        frozen |= {role: layers_below(folder, adapted) for role, folder in rewards.items()}
        # A critic's adapter is on the base; with freeze and full it is on the reference's model.
        on_base = config.finetuning_type == "lora" or config.ref_model is None
        if self.has_critic and config.critic == "adapter" and on_base:
            frozen["critic"] = frozen["reward"] if rewards else adapted
        sharing = {role: layers for role, layers in frozen.items() if layers}
        passes = sum(1 + (role in ("actor", "critic")) for role in sharing)
        return min(sharing.values()) if passes > 1 else 0

    def has_padding(self, rows: int) -> bool:
        """Whether a batch of `rows` rows has padding, so that attention needs a mask."""
        return rows > 1 and self.mixed_lengths


def read_adapter(folder: str) -> tuple[int, str] | None:
    """Rank and target of an adapter on disk; None if there is none that can be read."""
    try:
        data = json.loads((Path(folder) / ADAPTER_FILE).read_text(encoding="utf-8"))
        target = data["target_modules"]
        return int(data["r"]), target if isinstance(target, str) else ",".join(target)
    except (OSError, ValueError, KeyError, TypeError):  # preflight reports the fault
        return None


def layers_below(folder: str, assumed: int) -> int:
    """Number of layers below the lowest one that the adapter in `folder` adapts.

    `assumed` is the result if there is no adapter that can be read.
    """
    try:
        data = json.loads((Path(folder) / ADAPTER_FILE).read_text(encoding="utf-8"))
        layers, target = data.get("layers_to_transform"), data["target_modules"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return assumed
    if layers is not None:
        return min([layers] if isinstance(layers, int) else layers, default=0)
    named = [] if isinstance(target, str) else [re.search(r"\.(\d+)\.", name) for name in target]
    return min(int(found[1]) for found in named if found) if named and all(named) else 0


ASSUMED = "assumed"


def largest_reward_adapter(config: Config) -> tuple[int, str, str]:
    """Rank, target and source of the reward adapter with the highest rank.

    They are read from the folders that stage rm wrote; if those do not exist yet, the policy's rank
    and target are assumed.
    """
    found = [
        (*adapter, str(Path(folder) / ADAPTER_FILE))
        for folder in config.reward_adapters.values()
        if (adapter := read_adapter(folder)) is not None
    ]
    if found:
        return max(found)
    return config.lora_rank, config.lora_target, f"{ASSUMED}: the policy's own lora_rank"
