"""The peaks of a run: the points at which memory may be highest, and what is in memory at each.

`weights` counts what stays on the device, `activations` what a pass allocates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fastppo.memory.activations import Activations
from fastppo.memory.engine import EngineMemory
from fastppo.memory.inputs import PlanInputs
from fastppo.memory.layer import LayerSetting
from fastppo.memory.peak import ROWS, Peak
from fastppo.memory.shapes import ModelShape
from fastppo.memory.tape import FLOAT32
from fastppo.memory.trunk import trunk_memory
from fastppo.memory.units import CONTEXT, GIB, PREFILL_TOKENS, REDUCED_BYTES, RESERVE, SLACK
from fastppo.memory.weights import StaticBytes, Trainable


@dataclass(frozen=True)
class TrainingPass:
    """Forward and backward of a trainable trunk over one micro-batch.

    Attributes:
        role: the role, for the peaks' names.
        setting: how the layers run.
        trainable: the trainable part of the role.
        shape: the shape of the trunk.
        gathered: bytes of the response tokens' hidden states, which live longer than the pass.
        loss: bytes that the loss keeps until the backward begins.
        chunk: bytes of logits that exist at a time.
        gradients_before, gradients_after: row -> bytes, at the beginning and end of the pass.
        held: bytes of activations that an earlier pass has left.
        words: the end of the peaks' names.
    """

    role: str
    setting: LayerSetting
    trainable: Trainable
    shape: ModelShape
    gathered: int
    loss: int
    chunk: int
    gradients_before: dict[str, int]
    gradients_after: dict[str, int]
    held: int = 0
    words: str = ""


class Way(NamedTuple):
    """How a micro-batch may be run: as it is, or with the prompts that responses share once.

    `copied` are the bytes of hidden states as they are copied back from the latter.
    """

    rows: int
    length: int
    masked: bool = False
    copied: int = 0
    words: str = ""


class Planner:
    """Computes the peaks of one run."""

    def __init__(self, inputs: PlanInputs, shape: ModelShape, static: StaticBytes) -> None:
        self.inputs, self.config = inputs, inputs.config
        self.shape, self.static = shape, static
        self.activations = Activations(inputs, shape, static)
        self.engine = EngineMemory.of(inputs, shape)

    def peaks(self) -> Iterator[Peak]:
        """All peaks that can be the highest."""
        yield self.peak("load", "base, adapters and heads loaded", {})
        if self.config.stage == "rm":
            yield from self.reward_model_peaks()
            return
        if self.engine is None:
            yield from self.rollout_peaks(self.inputs.scored_rows)
        else:
            yield self.peak("rollout", "vLLM samples", {})
        # An evaluation scores in the same micro-batches as training, so only its sampling is added,
        # and the states that it keeps if it has more sequences.
        evaluated = self.inputs.evaluated_rows
        if self.engine is None or self.inputs.samples_a_reference:
            yield from self.rollout_peaks(evaluated, evaluation=True)
        yield from self.score_peaks()
        if self.activations.shared_states(evaluated) > self.shared_states("score"):
            yield from self.score_peaks(evaluation=True)
        yield from self.update_peaks()

    def peak(
        self, phase: str, name: str, added: dict[str, int], *, evaluation: bool = False
    ) -> Peak:
        """A peak: everything that stays on the device, plus `added` (row -> bytes)."""
        engine = {} if self.engine is None else self.engine.rows(phase)
        rows = {**self.static.rows, **engine, **added}
        rows["shared states"] = self.shared_states(phase, evaluation=evaluation)
        if self.inputs.device == "gpu":
            rows["reserve"] = RESERVE + CONTEXT * (self.engine is not None)
        elif phase != "load":
            rows.setdefault("head chunk", self.activations.reused_chunk)
        assert set(rows) <= set(ROWS), sorted(set(rows) - set(ROWS))
        if phase == "load":  # the optimiser creates its state in its first step
            rows = {row: count for row, count in rows.items() if "optimiser" not in row}
        name = f"evaluation, {name}" if evaluation else name
        ordered = {row: rows[row] for row in ROWS if rows.get(row, 0)}
        return Peak(phase, name, ordered, evaluation)

    def ways(self, rows: int, length: int, shape: ModelShape) -> Iterator[Way]:
        """The ways in which a micro-batch may be run; a run may have both."""
        yield Way(rows, length)
        if (once := self.inputs.with_prompts_once(rows, length, shape)) is not None:
            copied = self.activations.hidden_states(rows * length)
            yield Way(*once, masked=True, copied=copied, words=", prompts once")

    def shared_states(self, phase: str, *, evaluation: bool = False) -> int:
        """Bytes on the device of the states behind the layers that roles share, in a phase."""
        inputs = self.inputs
        if phase not in ("score", "update") or inputs.states_on_host:
            return 0
        rows = inputs.evaluated_rows if evaluation else inputs.scored_rows
        return self.activations.shared_states(rows)

    def rollout_peaks(self, total: int, *, evaluation: bool = False) -> Iterator[Peak]:
        """Sampling of `total` prompts: passes over some of them, then a token at a time of many."""
        inputs, config, shape = self.inputs, self.config, self.shape
        prompt, longest = config.cutoff_len, config.cutoff_len + config.max_new_tokens
        token = 2 * shape.kv_heads * shape.head_dim * inputs.itemsize * shape.layers
        static = config.cache_implementation == "static"  # transformers' own, all rows together
        # As the sampler chooses its slots, which are wider if rows enter later.
        rows, spare = inputs.sampled_rows(total), 0 if static else SLACK
        if config.rollout_kv_cache_gib is not None:
            room = int(config.rollout_kv_cache_gib * GIB)
            if rows * token * (longest + spare * (rows < total)) > room:
                rows = max(1, room // (token * (longest + spare)))
        width = longest + spare * (rows < total)
        # Merged copies of the weights, for samples of the policy; the reference samples unmerged.
        linear = sum(a * b for a, b in shape.targets(inputs.actor_target).values())
        layers = min(config.lora_layers or shape.layers, shape.layers)
        copy = inputs.samples_from_merged_copy * linear * layers * inputs.itemsize
        always = {"merged weights": copy, "KV cache": rows * token * width}
        # A pass has few tokens, of one prompt on a CPU; a long prompt is run in chunks.
        passed = 1 if inputs.device == "cpu" else min(rows, max(1, PREFILL_TOKENS // prompt))
        passed, chunk = (rows, prompt) if static else (passed, min(prompt, PREFILL_TOKENS))
        trunk = self.activations.trunk(
            passed, chunk, "actor", masked=inputs.has_padding(passed) or chunk < prompt
        )
        mask = passed * chunk * (prompt - chunk) * (1 + inputs.itemsize)
        tile = self.activations.dequantized_layer
        yield self.peak(
            "rollout",
            f"{passed} prompts of {prompt} tokens" + f", {chunk} at a time" * (chunk < prompt),
            {
                **always,
                # The prompts' keys and values are copied into the cache that is allocated already.
                "KV cache": always["KV cache"] + passed * prompt * token * (not static),
                "kept activations": self.activations.autocast_copies(self.static.actor),
                "layer at work": trunk.fixed + trunk.forward + mask + tile,
            },
            evaluation=evaluation,
        )
        # With padding in the batch, keys and values may be copied for every query head.
        repeated = inputs.has_padding(rows) and shape.kv_heads not in (1, shape.heads)
        copies = 2 * shape.heads * shape.head_dim * inputs.itemsize if repeated else 0
        # Logits, their float32 copy, that copy processed, and its softmax or exponentials.
        logits = rows * shape.vocab * (inputs.itemsize + 3 * FLOAT32)
        yield self.peak(
            "rollout",
            f"the last token of {rows} sequences of {longest}",
            {
                **always,
                # In decoding, autocast keeps its copies for all layers.
                "kept activations": self.static.actor.cast_bytes,
                "layer at work": rows * longest * copies + logits + tile,
            },
            evaluation=evaluation,
        )

    def score_peaks(self, *, evaluation: bool = False) -> Iterator[Peak]:
        """Forward passes of rewards, reference, critic and actor, in this order."""
        inputs, config, memory = self.inputs, self.config, self.activations
        rows, length = inputs.score_batch
        hidden = memory.hidden_states(rows * length)
        # With kl_penalty full, hidden states and logits of reference and actor exist together.
        both = config.kl_penalty == "full"
        held = {"reward": 0} if "lora" in inputs.reward_kinds else {}
        # Autocast also copies the adapter of a reference that has one.
        copies = memory.autocast_copies(self.static.actor)
        held["reference"] = copies * ("reference adapter" in self.static.rows)
        if inputs.has_critic and config.critic != "shared":
            held["critic"] = memory.autocast_copies(self.static.critic) + hidden * both
        held["actor"] = copies + hidden * both
        for role, count in held.items():
            shape = self.static.shapes.critic_or_base if role == "critic" else self.shape
            for way in self.ways(rows, length, shape):
                trunk = memory.trunk(way.rows, way.length, role, shape=shape, masked=way.masked)
                yield self.peak(
                    "score",
                    f"the {role}'s pass over {way.rows} x {way.length} tokens{way.words}",
                    {
                        "kept activations": count + way.copied,
                        "layer at work": trunk.fixed + trunk.forward + memory.dequantized_layer,
                    },
                    evaluation=evaluation,
                )
        tokens = memory.response_tokens(rows, length)
        yield self.peak(
            "score",
            f"log-probs of {rows} responses",
            {
                "kept activations": (hidden + memory.hidden_states(tokens)) * (1 + both),
                "head chunk": memory.logits_chunk(tokens) * (1 + both),
            },
            evaluation=evaluation,
        )

    def update_peaks(self) -> Iterator[Peak]:
        """Forward, loss and backward of actor and separate critic, then the optimiser's step."""
        inputs, memory = self.inputs, self.activations
        actor, critic = self.static.actor, self.static.critic
        rows, length = inputs.update_batch
        separate = inputs.has_critic and self.config.critic != "shared"
        gradients = {
            "actor gradients": FLOAT32 * (actor.parameters + critic.parameters * (not separate)),
            "critic gradients": FLOAT32 * critic.parameters * separate,
        }
        # Gradients exist from the first micro-batch of an optimiser step on.
        before = gradients if inputs.accumulates else {}
        tokens = memory.response_tokens(rows, length)
        gathered = memory.hidden_states(tokens)
        actors_gradients = {**before, "actor gradients": gradients["actor gradients"]}
        for way in self.ways(rows, length, self.shape):
            yield from self.training_pass_peaks(
                TrainingPass(
                    "actor",
                    memory.layer_setting(way.rows, way.length, "actor", masked=way.masked),
                    actor,
                    self.shape,
                    gathered=gathered,
                    loss=gathered,  # the gradient of the hidden states, computed in the forward
                    chunk=memory.logits_chunk(tokens, gradient=True),
                    gradients_before=before,
                    gradients_after=actors_gradients,
                    held=way.copied,
                    words=way.words,
                )
            )
        shape = self.static.shapes.critic_or_base
        for way in self.ways(rows, length, shape) if separate else ():
            in_float32 = tokens * shape.hidden * FLOAT32
            yield from self.training_pass_peaks(
                TrainingPass(
                    "critic",
                    memory.layer_setting(way.rows, way.length, "critic", masked=way.masked),
                    critic,
                    shape,
                    gathered=gathered,
                    loss=in_float32 if inputs.itemsize != FLOAT32 else 0,
                    chunk=0,
                    gradients_before=actors_gradients,
                    gradients_after=gradients,
                    # The actor's hidden states, and the embeddings that are the input of its graph.
                    held=gathered + memory.hidden_states(rows * length) + way.copied,
                    words=way.words,
                )
            )
        if self.config.ptx_coef:
            yield from self.ptx_peaks(gradients)
        # AdamW updates a group at once and allocates the square root of one of its states.
        group = max(actor.parameters, critic.parameters) * FLOAT32
        work = {"layer at work": group if inputs.device == "gpu" else 0}
        yield self.peak("update", "the optimiser's step", {**gradients, **work})
        yield from self.reduction_peaks(gradients)

    def reduction_peaks(self, gradients: dict[str, int]) -> Iterator[Peak]:
        """The sum of the gradients over several processes, a copy of some of them at a time."""
        if self.inputs.gpus > 1:
            copy = min(sum(gradients.values()), REDUCED_BYTES)
            name = f"the sum of {self.inputs.gpus} processes' gradients"
            yield self.peak("update", name, {**gradients, "layer at work": copy})

    def ptx_peaks(self, gradients: dict[str, int]) -> Iterator[Peak]:
        """PTX loss: a micro-batch of ptx_dataset, while all gradients exist."""
        config, memory = self.config, self.activations
        rows, length = config.per_device_train_batch_size, config.cutoff_len
        hidden = memory.hidden_states(rows * length)
        yield from self.training_pass_peaks(
            TrainingPass(
                "PTX pass",
                memory.layer_setting(rows, length, "actor"),
                self.static.actor,
                self.shape,
                gathered=hidden,
                loss=hidden,
                chunk=memory.logits_chunk(rows * length, gradient=True),
                gradients_before=gradients,
                gradients_after=gradients,
            )
        )

    def reward_model_peaks(self) -> Iterator[Peak]:
        """Stage rm: one pass over the chosen and rejected answers of a micro-batch of pairs."""
        inputs, config, memory = self.inputs, self.config, self.activations
        actor = self.static.actor
        gradients = {"actor gradients": FLOAT32 * actor.parameters}
        pairs = min(config.per_device_train_batch_size, inputs.step_rows)
        rows, length = 2 * pairs, inputs.longest_sequence
        masked = inputs.has_padding(rows)
        yield from self.training_pass_peaks(
            TrainingPass(
                "reward model",
                memory.layer_setting(rows, length, "actor", masked=masked),
                actor,
                self.shape,
                gathered=memory.hidden_states(rows * length),  # the head reads one state per row
                loss=0,
                chunk=0,
                gradients_before=gradients if inputs.step_rows > pairs else {},
                gradients_after=gradients,
            )
        )
        yield self.peak("update", "the optimiser's step", gradients)
        yield from self.reduction_peaks(gradients)
        rows = 2 * min(config.per_device_eval_batch_size, config.per_device_train_batch_size)
        trunk = memory.trunk(rows, length, "actor", masked=inputs.has_padding(rows))
        yield self.peak(
            "score",
            f"{rows} x {length} tokens",
            {
                "kept activations": actor.cast_bytes,
                "layer at work": trunk.fixed + trunk.forward + memory.dequantized_layer,
            },
            evaluation=True,
        )

    def training_pass_peaks(self, run: TrainingPass) -> Iterator[Peak]:
        """Forward, loss, and beginning and end of the backward."""
        memory, before = self.activations, run.gradients_before
        trunk = trunk_memory(run.shape, run.setting)
        recomputes = "checkpoint" in self.inputs.offload_mode
        saved = memory.saved_for_backward(trunk, run.trainable.layers)
        # Autocast's copies live as long as the pass, or as the graph that needs them.
        casts = memory.autocast_copies(run.trainable, in_graph=not recomputes)
        casts_in_graph = 0 if recomputes else casts
        work = trunk.forward - trunk.input if recomputes else trunk.forward_kept
        tile = memory.dequantized_layer
        yield self.peak(
            "update",
            f"the {run.role}'s forward{run.words}",
            {
                **before,
                "kept activations": saved + casts + run.held,
                "layer at work": trunk.fixed + work + tile,
            },
        )
        top = trunk.input if recomputes else trunk.saved
        after_forward = saved + casts_in_graph + top + trunk.norm_saved
        yield self.peak(
            "update",
            f"the {run.role}'s loss{run.words}",
            {
                **before,
                "kept activations": after_forward + run.gathered + run.loss + run.held,
                "head chunk": run.chunk,
            },
        )
        layers = max(run.trainable.layers, 1)
        if recomputes:
            layer = trunk.recompute + run.trainable.cast_bytes // layers
            work = max(top + trunk.norm_backward, layer)
        else:
            work = trunk.backward
        # In the backward each layer's gradients are allocated and its saved tensors freed, so the
        # sum is highest at the beginning or at the end.
        first_layers = {
            row: before.get(row, 0) + (count - before.get(row, 0)) // layers
            for row, count in run.gradients_after.items()
        }
        ends = {
            "backward": (first_layers, saved),
            "backward, at its end": (run.gradients_after, 0),
        }
        for name, (gradients, waiting) in ends.items():
            yield self.peak(
                "update",
                f"the {run.role}'s {name}{run.words}",
                {
                    **gradients,
                    "kept activations": waiting + casts_in_graph + run.gathered + run.held,
                    "layer at work": trunk.fixed + work + tile,
                },
            )
