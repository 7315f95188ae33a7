"""The peaks of a run at which memory may be highest, and what is alive at each.

What stays on the device is counted in `weights`; what a pass allocates in `layer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from fastppo.memory.inputs import KEPT_FROM, KEPT_TO, PlanInputs
from fastppo.memory.layer import LayerSetting, TrunkMemory, trunk_memory
from fastppo.memory.shapes import ModelShape
from fastppo.memory.tape import FLOAT32
from fastppo.memory.units import GIB, MIB, RESERVE
from fastppo.memory.weights import StaticBytes, Trained

PHASES: Final = ("load", "rollout", "score", "update")
ROWS: Final = (
    "base weights",
    "reference weights",
    "reward weights",
    "critic weights",
    "actor adapter",
    "reference adapter",
    "reward adapter",
    "critic adapter",
    "actor optimiser",
    "critic optimiser",
    "actor gradients",
    "critic gradients",
    "merged weights",
    "KV cache",
    "kept activations",
    "layer at work",
    "head chunk",
    "reserve",
)


@dataclass(frozen=True)
class Peak:
    """A point of a run at which memory may be highest: what is alive then, in bytes by row."""

    phase: str
    name: str
    rows: dict[str, int]
    evaluation: bool = False

    @property
    def total(self) -> int:
        """All rows."""
        return sum(self.rows.values())


@dataclass(frozen=True)
class Planner:
    """Works out the peaks of one run."""

    inputs: PlanInputs
    shape: ModelShape
    stay: StaticBytes

    def peaks(self) -> Iterator[Peak]:
        """Every peak that can be the highest."""
        yield self.peak("load", "base, adapters and heads loaded", {})
        if self.inputs.stage == "rm":
            yield from self.pair_peaks()
            return
        inputs = self.inputs
        yield from self.rollout_peaks(inputs.rollout_rows)
        # An evaluation scores in the micro-batches of training, so only its sampling counts.
        rows = min(inputs.per_device_eval_batch_size, inputs.eval_max_samples)
        rows = min(rows, inputs.generation_batch or rows)
        yield from self.rollout_peaks(rows, evaluation=True)
        yield from self.score_peaks()
        yield from self.update_peaks()

    def peak(
        self, phase: str, name: str, added: dict[str, int], *, evaluation: bool = False
    ) -> Peak:
        """What stays, and what is `added` to it."""
        rows = {**self.stay.rows, **added}
        if self.inputs.device == "gpu":
            rows["reserve"] = RESERVE
        elif phase != "load":
            rows.setdefault("head chunk", self.kept_chunk)
        assert set(rows) <= set(ROWS), sorted(set(rows) - set(ROWS))
        if phase == "load":  # the optimiser's state is made by its first step
            rows = {row: count for row, count in rows.items() if "optimiser" not in row}
        name = f"evaluation, {name}" if evaluation else name
        ordered = {row: rows[row] for row in ROWS if rows.get(row, 0)}
        return Peak(phase, name, ordered, evaluation)

    def setting(self, rows: int, length: int, role: str, *, masked: bool = False) -> LayerSetting:
        """How `role` runs a layer; PPO's own passes need no mask, see `Batch.inputs`."""
        inputs = self.inputs
        shared = role == "critic" and inputs.critic == "shared"
        trained = self.stay.critic if role == "critic" and not shared else self.stay.actor
        trains = role in ("actor", "critic")
        adapted = trains or (role == "reference" and "reference adapter" in self.stay.rows)
        own = {"reward": inputs.reward_target, "critic": inputs.lora_target}
        return LayerSetting(
            rows=rows,
            length=length,
            item=inputs.item,
            rank=trained.rank if adapted else inputs.reward_rank * (role == "reward"),
            target=inputs.actor_target if shared else own.get(role, inputs.actor_target),
            adapter_item=inputs.item if role == "reward" else FLOAT32,
            trained=trained.whole and trains,
            masked=masked,
            fused=self.fused,
            eager=inputs.eager,
            dora=inputs.use_dora and role != "reward",
        )

    @property
    def fused(self) -> bool:
        """Whether LoRA's layers run as `fastppo.models.fused_lora` has them."""
        return self.inputs.stage == "ppo" and self.inputs.quantization_bit is None

    def copies(self, trained: Trained, *, kept: bool = False) -> int:
        """An adapter in 16 bits: what autocast holds through a pass, or a layer's as it runs.

        The latter where the layers are fused; with `kept`, the graph holds those of all.
        """
        if kept or not self.fused or self.inputs.use_dora or trained.whole:
            return trained.casts
        return trained.casts // max(trained.layers, 1)

    @property
    def tile(self) -> int:
        """The largest linear layer as its GEMM reads it, where weights are quantised."""
        if self.inputs.quantization_bit is None:
            return 0
        return max(a * b for a, b in self.shape.linears.values()) * self.inputs.item

    def responses(self, rows: int, length: int) -> int:
        """Response tokens of a micro-batch."""
        return rows * min(length, self.inputs.max_new_tokens)

    def chunk(self, tokens: int) -> int:
        """The logits that exist at a time, for so many response tokens."""
        inputs, vocab = self.inputs, self.shape.vocab
        most = max(inputs.least_chunk_rows, inputs.resolved_chunk_bytes // (vocab * inputs.item))
        chunk = -(-tokens // -(-tokens // most))  # of nearly one length
        # The definition works in float32 blocks of 2 MiB: a copy, its exponentials, a product.
        blocks = 0 if inputs.compiled_ops else 3 * min(2 * MIB, tokens * vocab * FLOAT32)
        return chunk * vocab * inputs.item + blocks

    @property
    def kept_chunk(self) -> int:
        """The chunk of logits that the operators keep on a CPU from call to call."""
        if self.inputs.stage != "ppo":
            return 0
        most = max(self.inputs.score_batch, self.inputs.update_batch, key=lambda b: b[0] * b[1])
        chunk = self.chunk(self.responses(*most))
        return chunk if KEPT_FROM <= chunk <= KEPT_TO else 0

    def hidden(self, tokens: int) -> int:
        """Last hidden states."""
        return tokens * self.shape.hidden * self.inputs.item

    def rollout_peaks(self, rows: int, *, evaluation: bool = False) -> Iterator[Peak]:
        """The prompts at once, then a token at a time over the cache."""
        inputs, shape = self.inputs, self.shape
        prompt, whole = inputs.cutoff_len, inputs.cutoff_len + inputs.max_new_tokens
        token = 2 * shape.kv_heads * shape.head_dim * inputs.item
        if inputs.rollout_kv_cache_gib is not None:
            room = int(inputs.rollout_kv_cache_gib * GIB)
            rows = max(1, min(rows, room // (token * shape.layers * whole)))
        # What a sample of the policy is merged into; the reference's in evaluation is the base.
        linear = sum(a * b for a, b in shape.targets(inputs.actor_target).values())
        layers = min(inputs.lora_layers or shape.layers, shape.layers)
        merged = {"merged weights": inputs.rollout_merges * linear * layers * inputs.item}
        masked = inputs.padded(rows)
        trunk = trunk_memory(shape, self.setting(rows, prompt, "actor", masked=masked))
        yield self.peak(
            "rollout",
            f"{rows} prompts of {prompt} tokens",
            {
                **merged,
                "KV cache": rows * token * shape.cached_tokens(prompt),
                "kept activations": self.copies(self.stay.actor),
                "layer at work": trunk.fixed + trunk.forward + self.tile,
            },
            evaluation=evaluation,
        )
        # A layer's keys are made anew with the token appended; with padding in the batch every
        # query head gets a copy of its keys and values.
        copied = masked and shape.kv_heads not in (1, shape.heads)
        copies = 2 * shape.heads * shape.head_dim * inputs.item if copied else 0
        # Logits, the same in float32, their softmax, and the row that the recorder keeps.
        logits = rows * shape.vocab * (inputs.item + 3 * FLOAT32)
        yield self.peak(
            "rollout",
            f"the last token of {rows} sequences of {whole}",
            {
                **merged,
                "KV cache": rows * token * shape.cached_tokens(whole),
                "kept activations": self.stay.actor.casts,  # a step of decoding takes autocast's
                "layer at work": rows * whole * (token // 2 + copies) + logits + self.tile,
            },
            evaluation=evaluation,
        )

    def score_peaks(self) -> Iterator[Peak]:
        """Rewards, reference, critic and actor in their order, forward only."""
        inputs = self.inputs
        rows, length = inputs.score_batch
        hidden = self.hidden(rows * length)
        both = inputs.kl_penalty == "full"  # the reference's states and logits beside the actor's
        passes = {"reward": 0} if "lora" in inputs.rewards else {}
        # An adapter as the reference has copies by autocast too.
        copies = self.copies(self.stay.actor)
        passes["reference"] = copies * ("reference adapter" in self.stay.rows)
        if inputs.has_critic and inputs.critic != "shared":
            passes["critic"] = self.copies(self.stay.critic) + hidden * both
        passes["actor"] = copies + hidden * both
        for role, kept in passes.items():
            shape = self.stay.shapes.resolved_critic if role == "critic" else self.shape
            trunk = trunk_memory(shape, self.setting(rows, length, role))
            yield self.peak(
                "score",
                f"the {role}'s pass over {rows} x {length} tokens",
                {
                    "kept activations": kept,
                    "layer at work": trunk.fixed + trunk.forward + self.tile,
                },
            )
        gathered = self.hidden(self.responses(rows, length))
        yield self.peak(
            "score",
            f"log-probs of {rows} responses",
            {
                "kept activations": (hidden + gathered) * (1 + both),
                "head chunk": self.chunk(self.responses(rows, length)) * (1 + both),
            },
        )

    def update_peaks(self) -> Iterator[Peak]:
        """Forward and loss, backward, optimiser; the actor, then a critic with a trunk."""
        inputs, actor, critic = self.inputs, self.stay.actor, self.stay.critic
        rows, length = inputs.update_batch
        apart = inputs.has_critic and inputs.critic != "shared"
        gradients = {
            "actor gradients": FLOAT32 * (actor.parameters + critic.parameters * (not apart)),
            "critic gradients": FLOAT32 * critic.parameters * apart,
        }
        # There from the first micro-batch of an optimiser step on.
        before = gradients if inputs.accumulates else {}
        responses = self.responses(rows, length)
        gathered = self.hidden(responses)
        yield from self.pass_peaks(
            Pass("actor", self.setting(rows, length, "actor"), actor, self.shape),
            gathered=gathered,
            loss=gathered,  # the gradient of the hidden states, made in the forward
            chunk=self.chunk(responses),
            before=before,
            after={**before, "actor gradients": gradients["actor gradients"]},
        )
        if apart:
            shape = self.stay.shapes.resolved_critic
            wide = responses * shape.hidden * FLOAT32
            yield from self.pass_peaks(
                Pass("critic", self.setting(rows, length, "critic"), critic, shape),
                gathered=gathered,
                loss=wide if inputs.item != FLOAT32 else 0,
                chunk=0,
                before={**before, "actor gradients": gradients["actor gradients"]},
                after=gradients,
                # The actor's hidden states, and the embeddings that its graph was given.
                found=gathered + self.hidden(rows * length),
            )
        if inputs.ptx_coef:
            yield from self.ptx_peaks(gradients)
        # AdamW over a group at once holds the square root of one of its states.
        group = max(actor.parameters, critic.parameters) * FLOAT32
        work = {"layer at work": group if inputs.device == "gpu" else 0}
        yield self.peak("update", "the optimiser's step", {**gradients, **work})

    def ptx_peaks(self, gradients: dict[str, int]) -> Iterator[Peak]:
        """Written answers beside an optimiser step: a micro-batch of them, all gradients there."""
        inputs, actor = self.inputs, self.stay.actor
        rows, length = inputs.per_device_train_batch_size, inputs.cutoff_len
        gathered = self.hidden(rows * length)
        yield from self.pass_peaks(
            Pass("PTX pass", self.setting(rows, length, "actor"), actor, self.shape),
            gathered=gathered,
            loss=gathered,
            chunk=self.chunk(rows * length),
            before=gradients,
            after=gradients,
        )

    def pair_peaks(self) -> Iterator[Peak]:
        """Stage rm: chosen and rejected answers of a micro-batch of pairs in one pass."""
        inputs, actor = self.inputs, self.stay.actor
        gradients = {"actor gradients": FLOAT32 * actor.parameters}
        rows, length = 2 * inputs.per_device_train_batch_size, inputs.sequence
        yield from self.pass_peaks(
            Pass(
                "reward model",
                self.setting(rows, length, "actor", masked=inputs.padded(rows)),
                actor,
                self.shape,
            ),
            gathered=self.hidden(rows * length),  # of which the head reads one a row
            loss=0,
            chunk=0,
            before=gradients if inputs.gradient_accumulation_steps > 1 else {},
            after=gradients,
        )
        yield self.peak("update", "the optimiser's step", gradients)
        rows = 2 * min(inputs.per_device_eval_batch_size, inputs.per_device_train_batch_size)
        trunk = trunk_memory(
            self.shape, self.setting(rows, length, "actor", masked=inputs.padded(rows))
        )
        yield self.peak(
            "score",
            f"{rows} x {length} tokens",
            {
                "kept activations": actor.casts,
                "layer at work": trunk.fixed + trunk.forward + self.tile,
            },
            evaluation=True,
        )

    def pass_peaks(
        self,
        run: Pass,
        *,
        gathered: int,
        loss: int,
        chunk: int,
        before: dict[str, int],
        after: dict[str, int],
        found: int = 0,
    ) -> Iterator[Peak]:
        """Forward, loss and backward of a trained trunk over one micro-batch.

        `found` is there from an earlier pass; the hidden states that are `gathered` outlive the
        pass, `loss` is there until the backward begins; the gradients are those `before` and
        `after` it.
        """
        trunk = trunk_memory(run.shape, run.setting)
        again = "checkpoint" in self.inputs.offloading
        below = self.kept(trunk, run.trained.layers)
        # Autocast's copies live as long as the pass, or the graph that multiplied by them.
        casts = self.copies(run.trained, kept=not again)
        left = 0 if again else casts
        work = trunk.forward - trunk.input if again else trunk.forward_kept
        yield self.peak(
            "update",
            f"the {run.role}'s forward",
            {
                **before,
                "kept activations": below + casts + found,
                "layer at work": trunk.fixed + work + self.tile,
            },
        )
        top = trunk.input if again else trunk.saved
        held = below + left + top + trunk.norm_saved + gathered + loss + found
        yield self.peak(
            "update",
            f"the {run.role}'s loss",
            {**before, "kept activations": held, "head chunk": chunk},
        )
        if again:
            layer = trunk.recompute + run.trained.casts // max(run.trained.layers, 1)
            peak = max(top + trunk.norm_backward, layer)
        else:
            peak = trunk.backward
        # Gradients come layer by layer, as what was kept for them goes: the sum is highest at one
        # of the ends.
        layers = max(run.trained.layers, 1)
        begun = {
            row: before.get(row, 0) + (count - before.get(row, 0)) // layers
            for row, count in after.items()
        }
        ends = {"backward": (begun, below), "backward, at its end": (after, 0)}
        for name, (gradients, waiting) in ends.items():
            yield self.peak(
                "update",
                f"the {run.role}'s {name}",
                {
                    **gradients,
                    "kept activations": waiting + left + gathered + found,
                    "layer at work": trunk.fixed + peak + self.tile,
                },
            )

    def kept(self, trunk: TrunkMemory, layers: int) -> int:
        """What a forward pass leaves on the device for its backward, the top layer's aside."""
        mode, below = self.inputs.offloading, max(layers - 1, 0)
        if mode == "checkpoint":
            return below * trunk.input
        if mode == "checkpoint+offload":  # the one that is next, on its way back
            return min(below, 1) * trunk.input
        if mode == "offload":
            return min(below, 1) * trunk.saved
        return max(below - 1, 0) * trunk.saved + min(below, 1) * trunk.saved_first

    def host_bytes(self) -> int:
        """What offloading keeps in pinned memory at a time."""
        mode, inputs = self.inputs.offloading, self.inputs
        if "offload" not in mode:
            return 0
        rows, length = 2 * inputs.per_device_train_batch_size, inputs.sequence
        if inputs.stage == "ppo":
            rows, length = inputs.update_batch
        trunk = trunk_memory(self.shape, self.setting(rows, length, "actor"))
        each = trunk.input if "checkpoint" in mode else trunk.saved
        return self.stay.actor.layers * each


@dataclass(frozen=True)
class Pass:
    """A trained trunk and how it is run."""

    role: str
    setting: LayerSetting
    trained: Trained
    shape: ModelShape
