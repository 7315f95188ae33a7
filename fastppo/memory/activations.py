"""Bytes of activations, logits and autocast's copies in one role's pass over a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from fastppo.memory.budgets import as_count
from fastppo.memory.inputs import (
    MOST_TOKENS,
    MOST_WORDS,
    REUSED_FROM,
    REUSED_TO,
    WORD_BLOCK,
    WORD_COLUMNS,
    WORD_TILE,
    WORDS_CPU,
    WORDS_FROM,
    PlanInputs,
)
from fastppo.memory.layer import LayerSetting
from fastppo.memory.shapes import ModelShape
from fastppo.memory.tape import FLOAT32
from fastppo.memory.trunk import TrunkMemory, trunk_memory
from fastppo.memory.units import MIB
from fastppo.memory.weights import StaticBytes, Trainable


@dataclass(frozen=True)
class Activations:
    """Bytes that the passes of a run allocate, for the memory plan."""

    inputs: PlanInputs
    shape: ModelShape
    static: StaticBytes

    def layer_setting(
        self, rows: int, length: int, role: str, *, masked: bool = False
    ) -> LayerSetting:
        """How `role` runs a layer; the passes of stage ppo need no mask, see `Batch.inputs`."""
        inputs, config = self.inputs, self.inputs.config
        shared = role == "critic" and config.critic == "shared"
        critic = role == "critic" and not shared
        trainable = self.static.critic if critic else self.static.actor
        trains = role in ("actor", "critic")
        adapted = trains or (role == "reference" and "reference adapter" in self.static.rows)
        targets = {"reward": inputs.reward_target, "critic": config.lora_target}
        return LayerSetting(
            rows=rows,
            length=length,
            item=inputs.itemsize,
            rank=trainable.rank if adapted else inputs.reward_rank * (role == "reward"),
            target=inputs.actor_target if shared else targets.get(role, inputs.actor_target),
            adapter_item=inputs.itemsize if role == "reward" else FLOAT32,
            trains_base=trainable.trains_base and trains,
            masked=masked,
            fused=self.fused_lora,
            native=inputs.native_layers,
            eager=inputs.eager_attention,
            dora=config.use_dora and role != "reward",
        )

    def trunk(
        self,
        rows: int,
        length: int,
        role: str,
        *,
        shape: ModelShape | None = None,
        masked: bool = False,
    ) -> TrunkMemory:
        """Bytes of the trunk of `role` for rows x length tokens; `shape` None is the base's."""
        return trunk_memory(
            shape or self.shape, self.layer_setting(rows, length, role, masked=masked)
        )

    @property
    def fused_lora(self) -> bool:
        """Whether LoRA layers run by `fastppo.models.lora`."""
        return self.inputs.config.quantization_bit is None and not self.inputs.config.lora_dropout

    def autocast_copies(self, trainable: Trainable, *, in_graph: bool = False) -> int:
        """Bytes of the 16-bit copies of an adapter that autocast makes.

        They exist for all layers during the whole pass; with fused layers only for the layer that
        runs, unless the autograd graph holds them (`in_graph`).
        """
        dora = self.inputs.config.use_dora
        if in_graph or not self.fused_lora or dora or trainable.trains_base:
            return trainable.cast_bytes
        return trainable.cast_bytes // max(trainable.layers, 1)

    @property
    def dequantized_layer(self) -> int:
        """Bytes of the largest weight, dequantised for its GEMM; 0 if nothing is quantised."""
        if self.inputs.config.quantization_bit is None:
            return 0
        return max(a * b for a, b in self.shape.linears.values()) * self.inputs.itemsize

    def response_tokens(self, rows: int, length: int) -> int:
        """Number of response tokens in a micro-batch."""
        return rows * min(length, self.inputs.config.max_new_tokens)

    def hidden_states(self, tokens: int) -> int:
        """Bytes of the last hidden states."""
        return tokens * self.shape.hidden * self.inputs.itemsize

    @cached_property
    def shared_layers(self) -> int:
        """Number of lowest layers that run once per rollout."""
        return self.inputs.shared_layers(self.shape.layers)

    def shared_states(self, rows: int) -> int:
        """Bytes of the states behind the shared layers, of `rows` sequences of the full length."""
        return self.hidden_states(rows * self.inputs.longest_sequence) * (self.shared_layers > 0)

    def logits_chunk(self, tokens: int, *, gradient: bool = False) -> int:
        """Bytes of the logits that exist at a time, for this number of response tokens.

        They are float32. Their `gradient` overwrites them, unless it has 16 bits as the head has.
        """
        inputs, vocab = self.inputs, self.shape.vocab
        # The definition uses float32 blocks of 2 MiB: a copy, its exponentials, a product.
        blocks = 0 if inputs.compiled_ops else 3 * min(2 * MIB, tokens * vocab * FLOAT32)
        buffers = self._chunk_buffers(tokens, gradient=gradient)
        if self._by_words(tokens, gradient=gradient):
            # With a frozen head's gradient also the words that were sampled, in its dtype.
            frozen = gradient and not inputs.trains_head
            return buffers[0] + frozen * self.hidden_states(tokens)
        # On a CPU the float32 product is one of upcast hidden states and words.
        rows = buffers[0] // (vocab * FLOAT32) + min(WORDS_CPU, vocab)
        upcasts = inputs.device != "gpu" and inputs.itemsize != FLOAT32
        return sum(buffers) + upcasts * rows * self.shape.hidden * FLOAT32 + blocks

    def _by_words(self, tokens: int, *, gradient: bool) -> bool:
        """Whether the logits go by blocks of words for all tokens, and not by chunks of rows."""
        inputs, config = self.inputs, self.inputs.config
        if not inputs.native_layers or tokens < WORDS_FROM:
            return False
        if gradient:
            return config.entropy_coef == 0 if not inputs.trains_head else self._fits(tokens)
        return config.kl_penalty != "full"

    def _fits(self, tokens: int) -> bool:
        """Whether a trained weight's gradient has room for the logits."""
        return tokens <= MOST_TOKENS and _columns(tokens) <= self.shape.hidden

    def _chunk_buffers(self, tokens: int, *, gradient: bool) -> list[int]:
        """Bytes of the logits of a chunk and, if it needs memory of its own, of their gradient."""
        inputs, vocab = self.inputs, self.shape.vocab
        if self._by_words(tokens, gradient=gradient):
            part = -(-tokens // -(-tokens // MOST_TOKENS))
            row = _columns(part) * FLOAT32
            words = (as_count(inputs.config.chunk_bytes) or WORD_BLOCK) // row
            return [min(max(1, words), MOST_WORDS, vocab) * row]
        most = max(inputs.min_chunk_rows, inputs.chunk_bytes // (vocab * FLOAT32))
        rows = -(-tokens // -(-tokens // most))  # all chunks have nearly the same length
        apart = gradient and inputs.itemsize != FLOAT32
        return [rows * vocab * FLOAT32] + [rows * vocab * inputs.itemsize] * apart

    @property
    def reused_chunk(self) -> int:
        """Bytes of the chunk of logits that the operators keep between calls on a CPU."""
        if self.inputs.config.stage != "ppo":
            return 0
        score, update = self.inputs.score_batch, self.inputs.update_batch
        kept = (
            sum(size for size in buffers if REUSED_FROM <= size <= REUSED_TO)
            for buffers in (
                self._chunk_buffers(self.response_tokens(*score), gradient=False),
                self._chunk_buffers(self.response_tokens(*update), gradient=True),
            )
        )
        return max(kept)

    def saved_for_backward(self, trunk: TrunkMemory, layers: int) -> int:
        """Bytes that `layers` layers, except the top one, save on the device for the backward."""
        mode, below = self.inputs.offload_mode, max(layers - 1, 0)
        if mode == "checkpoint":
            return below * trunk.input
        if mode == "checkpoint+offload":  # the next layer's input, being copied back
            return min(below, 1) * trunk.input
        if mode == "offload":
            return min(below, 1) * trunk.saved
        return max(below - 1, 0) * trunk.saved + min(below, 1) * trunk.saved_first

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of pinned host memory that offloading uses at a time."""
        mode, inputs = self.inputs.offload_mode, self.inputs
        if "offload" not in mode:
            return 0
        rows, length = 2 * inputs.config.per_device_train_batch_size, inputs.longest_sequence
        if inputs.config.stage == "ppo":
            rows, length = inputs.update_batch
        trunk = self.trunk(rows, length, "actor")
        each = trunk.input if "checkpoint" in mode else trunk.saved
        return self.static.actor.layers * each


def _columns(tokens: int) -> int:
    """Distance of two words' logits of so many tokens."""
    return -(-tokens // WORD_TILE) * WORD_TILE + WORD_COLUMNS
