"""Bytes of activations, logits and autocast's copies in a pass of one role over a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from fastppo.memory.inputs import REUSED_FROM, REUSED_TO, PlanInputs
from fastppo.memory.layer import LayerSetting, TrunkMemory, trunk_memory
from fastppo.memory.shapes import ModelShape
from fastppo.memory.tape import FLOAT32
from fastppo.memory.units import MIB
from fastppo.memory.weights import StaticBytes, Trainable


@dataclass(frozen=True)
class Activations:
    """Bytes that a run's passes allocate, by what holds them."""

    inputs: PlanInputs
    shape: ModelShape
    static: StaticBytes

    def layer_setting(
        self, rows: int, length: int, role: str, *, masked: bool = False
    ) -> LayerSetting:
        """How `role` runs a layer; PPO's own passes need no mask, see `Batch.inputs`."""
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
        """What the trunk of `role` allocates for rows x length tokens; no `shape`: the base's."""
        return trunk_memory(
            shape or self.shape, self.layer_setting(rows, length, role, masked=masked)
        )

    @property
    def fused_lora(self) -> bool:
        """Whether LoRA's layers run as `fastppo.models.fused_lora` has them."""
        return self.inputs.config.stage == "ppo" and self.inputs.config.quantization_bit is None

    def autocast_copies(self, trainable: Trainable, *, in_graph: bool = False) -> int:
        """An adapter in 16 bits: what autocast holds through a pass, or a layer's as it runs.

        The latter where the layers are fused; with `in_graph`, the graph holds those of all layers.
        """
        dora = self.inputs.config.use_dora
        if in_graph or not self.fused_lora or dora or trainable.trains_base:
            return trainable.cast_bytes
        return trainable.cast_bytes // max(trainable.layers, 1)

    @property
    def dequantized_layer(self) -> int:
        """The largest linear layer as its GEMM reads it, where weights are quantised."""
        if self.inputs.config.quantization_bit is None:
            return 0
        return max(a * b for a, b in self.shape.linears.values()) * self.inputs.itemsize

    def response_tokens(self, rows: int, length: int) -> int:
        """Response tokens of a micro-batch."""
        return rows * min(length, self.inputs.config.max_new_tokens)

    def hidden_states(self, tokens: int) -> int:
        """The last hidden states."""
        return tokens * self.shape.hidden * self.inputs.itemsize

    def logits_chunk(self, tokens: int) -> int:
        """The logits that exist at a time, for so many response tokens."""
        inputs, vocab = self.inputs, self.shape.vocab
        most = max(inputs.min_chunk_rows, inputs.chunk_bytes // (vocab * inputs.itemsize))
        rows = -(-tokens // -(-tokens // most))  # chunks are of nearly one length
        # The definition works in float32 blocks of 2 MiB: a copy, its exponentials, a product.
        blocks = 0 if inputs.compiled_ops else 3 * min(2 * MIB, tokens * vocab * FLOAT32)
        return rows * vocab * inputs.itemsize + blocks

    @property
    def reused_chunk(self) -> int:
        """The chunk of logits that the operators hold on a CPU between calls."""
        if self.inputs.config.stage != "ppo":
            return 0
        most = max(self.inputs.score_batch, self.inputs.update_batch, key=lambda b: b[0] * b[1])
        chunk = self.logits_chunk(self.response_tokens(*most))
        return chunk if REUSED_FROM <= chunk <= REUSED_TO else 0

    def saved_for_backward(self, trunk: TrunkMemory, layers: int) -> int:
        """What a forward through `layers` layers saves on the device, the top layer's aside."""
        mode, below = self.inputs.offload_mode, max(layers - 1, 0)
        if mode == "checkpoint":
            return below * trunk.input
        if mode == "checkpoint+offload":  # the one that is next, on its way back
            return min(below, 1) * trunk.input
        if mode == "offload":
            return min(below, 1) * trunk.saved
        return max(below - 1, 0) * trunk.saved + min(below, 1) * trunk.saved_first

    @property
    def offloaded_bytes(self) -> int:
        """What offloading holds in pinned host memory at a time."""
        mode, inputs = self.inputs.offload_mode, self.inputs
        if "offload" not in mode:
            return 0
        rows, length = 2 * inputs.config.per_device_train_batch_size, inputs.longest_sequence
        if inputs.config.stage == "ppo":
            rows, length = inputs.update_batch
        trunk = self.trunk(rows, length, "actor")
        each = trunk.input if "checkpoint" in mode else trunk.saved
        return self.static.actor.layers * each
