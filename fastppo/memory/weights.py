"""What stays on the device through a run: weights, adapters, optimiser state, by role."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from fastppo.memory.inputs import PlanInputs
from fastppo.memory.shapes import ModelShape
from fastppo.memory.tape import FLOAT32

# Optimiser -> numbers that it keeps of each parameter; Adam's two where it is not among these.
STATES: Final = {"sgd": 0, "adagrad": 1, "rmsprop": 1, "lion": 1}
EIGHT_BITS: Final = 1 + FLOAT32 / 256  # bitsandbytes' blocks of 256 have a float32 scale


def weight_bytes(shape: ModelShape, item: int, bits: int | None) -> int:
    """A frozen model: linear layers in `bits` where quantised, all else in `item` bytes.

    4 bits: a block of 64 has a scale of one byte, and 256 of those a float32 of their own. 8 bits:
    a float32 for each output.
    """
    if bits is None:
        return shape.parameters * item
    linear = shape.linear_parameters
    rest = (shape.parameters - linear) * item
    if bits == 4:
        return rest + linear // 2 + linear // 64 + FLOAT32 * (linear // (64 * 256))
    outputs = shape.layers * sum(out for _, out in shape.linears.values())
    return rest + linear + FLOAT32 * outputs


def streamed_bytes(shape: ModelShape, item: int) -> tuple[int, int]:
    """A frozen model whose layers pass through: on the device two of them and the rest; on the host
    all layers.
    """
    layer, rest = shape.layer_parameters, shape.parameters - shape.layers * shape.layer_parameters
    return (rest + 2 * layer) * item, shape.layers * layer * item


@dataclass(frozen=True)
class Trained:
    """What of a role trains.

    Attributes:
        adapter: bytes beyond the base.
        parameters: how many have a gradient and optimiser state.
        casts: bytes of autocast's copies, alive while a pass runs.
        rank: of the adapter; 0 is none.
        layers: how many, from the top, the backward goes through.
        whole: the layers' own weights train.
    """

    adapter: int = 0
    parameters: int = 0
    casts: int = 0
    rank: int = 0
    layers: int = 0
    whole: bool = False


@dataclass(frozen=True)
class Shapes:
    """The base, and the models beside it; None is the base's shape."""

    base: ModelShape
    reward: ModelShape | None = None
    reference: ModelShape | None = None
    critic: ModelShape | None = None

    @property
    def resolved_critic(self) -> ModelShape:
        """The critic's own, or the base's."""
        return self.critic or self.base


@dataclass
class StaticBytes:
    """Bytes by row, and what of the actor and the critic trains."""

    inputs: PlanInputs
    shapes: Shapes
    rows: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)  # what lies in host memory, by what it is

    def __post_init__(self) -> None:
        inputs, item = self.inputs, self.inputs.item
        self.shape = self.shapes.base
        own = (inputs.actor_rank, inputs.actor_target)
        self.actor = self.trained(self.shape, inputs.finetuning_type, *own)
        base = weight_bytes(self.shape, item, inputs.quantization_bit)
        if self.actor.whole:  # what trains is float32 in place of the base's dtype
            base += self.actor.parameters * (FLOAT32 - item)
        self.rows["base weights"] = base
        self.rows["actor adapter"] = self.actor.adapter
        self.critic = Trained()
        if inputs.stage == "ppo":
            self.place_reference()
            self.place_rewards()
            if inputs.has_critic:
                self.place_critic()
        else:  # the reward model's head trains with it
            self.actor = with_head(self.actor, self.shape)
            self.rows["actor adapter"] += head_bytes(self.shape)
        for role, trained in (("actor", self.actor), ("critic", self.critic)):
            self.place_states(role, trained.parameters, trained.rank)

    def trained(self, shape: ModelShape, kind: str, rank: int, target: str) -> Trained:
        """An adapter, some layers, or everything."""
        inputs = self.inputs
        casts = inputs.item if inputs.autocast else 0
        if kind == "lora":
            count = shape.lora_parameters(rank, target, inputs.lora_layers)
            layers = min(inputs.lora_layers or shape.layers, shape.layers)
            if inputs.use_dora:  # a magnitude for each output
                outputs = sum(out for _, out in shape.targets(target).values())
                count += layers * outputs
            return Trained(FLOAT32 * count, count, casts * count, rank, layers)
        if kind == "freeze":
            layers = min(abs(inputs.freeze_trainable_layers), shape.layers)
            count = layers * shape.layer_parameters
            deep = layers if inputs.freeze_trainable_layers > 0 else shape.layers
            return Trained(0, count, casts * count, 0, deep, whole=True)
        count = shape.parameters
        return Trained(0, count, casts * count, 0, shape.layers, whole=True)

    def place_states(self, role: str, parameters: int, rank: int) -> None:
        """What the optimiser keeps; paged states come onto the device only as they are wanted."""
        optim = self.inputs.optim or ""
        states = next((count for name, count in STATES.items() if name in optim), 2)
        each = states * (EIGHT_BITS if "8bit" in optim else FLOAT32)
        if optim == "adafactor":  # a row and a column of each matrix: of an adapter 1 in its rank
            each = FLOAT32 / rank if rank else 0
        where = self.host if optim.startswith("paged") else self.rows
        where[f"{role} optimiser"] = int(each * parameters)

    def place_model(
        self, row: str, shape: ModelShape, bits: int | None, *, stays: bool = False
    ) -> None:
        """A whole frozen model beside the base, on the device or passing through it."""
        size = weight_bytes(shape, self.inputs.item, bits)
        if self.inputs.stream_frozen and bits is None and not stays:
            size, away = streamed_bytes(shape, self.inputs.item)
            self.host[row] = self.host.get(row, 0) + away
        self.rows[row] = self.rows.get(row, 0) + size

    def place_reference(self) -> None:
        """Adapters off, a frozen copy of what trains (or trains on), or a model of its own."""
        inputs, item = self.inputs, self.inputs.item
        if inputs.ref_model is not None:
            bits = inputs.ref_model_quantization_bit
            shape = self.shapes.reference or self.shape
            # With freeze and full a critic that is an adapter trains on it.
            stays = self.actor.whole and inputs.has_critic and inputs.critic == "adapter"
            self.place_model("reference weights", shape, bits, stays=stays)
        elif self.actor.whole:
            self.rows["reference weights"] = self.actor.parameters * item
        elif inputs.continues:
            self.rows["reference adapter"] = self.actor.adapter

    def place_rewards(self) -> None:
        """Frozen adapters stay in the base's dtype; a function or an API is elsewhere."""
        inputs, item = self.inputs, self.inputs.item
        for kind in inputs.rewards:
            if kind == "lora":
                count = self.shape.lora_parameters(
                    inputs.reward_rank, inputs.reward_target, inputs.lora_layers
                )
                size = count * item + head_bytes(self.shape)
                self.rows["reward adapter"] = self.rows.get("reward adapter", 0) + size
            elif kind == "full":  # a classifier: the trunk, and a row in place of the head
                trunk = replace(self.shapes.reward or self.shape, tied=True)
                self.place_model("reward weights", trunk, inputs.reward_model_quantization_bit)

    def place_critic(self) -> None:
        """A head, an adapter (the reward model's, to train on), or a model."""
        inputs, shape, critic = self.inputs, self.shape, Trained()
        if inputs.critic == "model":
            shape = self.shapes.resolved_critic
            kind = inputs.critic_finetuning_type or inputs.finetuning_type
            bits = inputs.quantization_bit if kind == "lora" else None
            critic = self.trained(shape, kind, inputs.lora_rank, inputs.lora_target)
            weights = weight_bytes(shape, inputs.item, bits)
            if critic.whole:
                weights += critic.parameters * (FLOAT32 - inputs.item)
            self.rows["critic weights"] = weights
        elif inputs.critic == "adapter":
            rank = inputs.reward_rank if "lora" in inputs.rewards else inputs.lora_rank
            critic = self.trained(shape, "lora", rank, inputs.lora_target)
        self.critic = with_head(critic, shape)
        self.rows["critic adapter"] = self.critic.adapter + head_bytes(shape)


def head_bytes(shape: ModelShape) -> int:
    """A value head in float32."""
    return FLOAT32 * (shape.hidden + 1)


def with_head(trained: Trained, shape: ModelShape) -> Trained:
    """The same with a value head that trains."""
    return replace(trained, parameters=trained.parameters + shape.hidden + 1)
