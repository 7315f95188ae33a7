"""Bytes that stay on the device during a run: weights, adapters and optimiser state, by role."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from fastppo.memory.inputs import PlanInputs
from fastppo.memory.shapes import ModelShape
from fastppo.memory.tape import FLOAT32

# Optimiser -> how many numbers it stores per parameter; optimisers that are not listed store two.
OPTIMIZER_STATES: Final = {"sgd": 0, "adagrad": 1, "rmsprop": 1, "lion": 1}
# bitsandbytes' blocks: numbers that share a scale; and a layer's tables of codes, in bytes.
BLOCK_4BIT, BLOCK_8BIT = 64, 256
CODES_4BIT: Final = FLOAT32 * 16
CODES_8BIT: Final = FLOAT32 * (256 + 1)  # and the mean that is taken off the scales
BYTES_8BIT: Final = 1 + FLOAT32 / BLOCK_8BIT


def weight_bytes(shape: ModelShape, item: int, bits: int | None, *, double: bool = True) -> int:
    """Bytes of a frozen model: `bits` per weight of linear layers, `item` bytes per other weight.

    With 4 bits, a block of 64 weights has a float32 scale; with `double` (double quantisation) one
    of one byte, and 256 scales share a float32. Each layer also has the tables of its codes. With 8
    bits each output has a float32 scale. `bits` None is not quantised.
    """
    if bits is None:
        return shape.parameters * item
    linear = shape.linear_parameters
    rest = (shape.parameters - linear) * item
    if bits == 8:
        outputs = shape.layers * sum(out for _, out in shape.linears.values())
        return rest + linear + FLOAT32 * outputs
    blocks = [-(-wide * out // BLOCK_4BIT) for wide, out in shape.linears.values()]
    each = CODES_4BIT * len(blocks)
    if double:
        each += CODES_8BIT * len(blocks) + sum(n + FLOAT32 * -(-n // BLOCK_8BIT) for n in blocks)
    else:
        each += FLOAT32 * sum(blocks)
    return rest + linear // 2 + shape.layers * each


def streamed_bytes(shape: ModelShape, item: int) -> tuple[int, int]:
    """Bytes on the device and on the host of a frozen model whose layers are streamed.

    The device has two layers and all weights outside the layers; the host has all layers.
    """
    layer, rest = shape.layer_parameters, shape.parameters - shape.layers * shape.layer_parameters
    return (rest + 2 * layer) * item, shape.layers * layer * item


def sharded_bytes(shape: ModelShape, item: int, processes: int) -> int:
    """Bytes in each process of a frozen model whose decoder layers are sharded (`fsdp`).

    Besides its part a process has all weights outside the layers, and room for two whole layers:
    the one that runs, and the one that is gathered next.
    """
    layer, rest = shape.layer_parameters, shape.parameters - shape.layers * shape.layer_parameters
    return (-(-shape.layers * layer // processes) + 2 * layer + rest) * item


@dataclass(frozen=True)
class Trainable:
    """The trainable part of a role.

    Attributes:
        adapter_bytes: bytes of the adapter's weights.
        parameters: number of trainable parameters; each has a gradient and optimiser state.
        cast_bytes: bytes of the copies that autocast makes during a pass.
        rank: rank of the adapter; 0 if there is none.
        layers: number of layers, from the top, that the backward goes through.
        trains_base: whether the layers' own weights train (freeze, full).
    """

    adapter_bytes: int = 0
    parameters: int = 0
    cast_bytes: int = 0
    rank: int = 0
    layers: int = 0
    trains_base: bool = False


@dataclass(frozen=True)
class Shapes:
    """Shapes of the base and of the other models of a run; None means the base's shape."""

    base: ModelShape
    reward: ModelShape | None = None
    reference: ModelShape | None = None
    critic: ModelShape | None = None

    @property
    def critic_or_base(self) -> ModelShape:
        """The shape of the critic's trunk."""
        return self.critic or self.base


@dataclass
class StaticBytes:
    """Bytes that stay on the device, by row of the plan; and what actor and critic train.

    Attributes:
        rows: row -> bytes on the device.
        host: row -> bytes in host memory.
        actor, critic: their trainable parts.
    """

    inputs: PlanInputs
    shapes: Shapes
    rows: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        inputs, config, item = self.inputs, self.inputs.config, self.inputs.itemsize
        self.shape = self.shapes.base
        own = (inputs.actor_rank, inputs.actor_target)
        self.actor = self.trainable(self.shape, config.finetuning_type, *own)
        self.double = config.double_quantization
        base = weight_bytes(self.shape, item, config.quantization_bit, double=self.double)
        if inputs.shards:
            base = sharded_bytes(self.shape, item, inputs.gpus)
        if self.actor.trains_base:  # trainable weights are float32 instead of the base's dtype
            base += self.actor.parameters * (FLOAT32 - item)
        self.rows["base weights"] = base
        self.rows["actor adapter"] = self.actor.adapter_bytes
        self.critic = Trainable()
        if config.stage == "ppo":
            self.add_reference()
            self.add_rewards()
            if inputs.has_critic:
                self.add_critic()
        else:  # stage rm: the reward model's head trains too
            self.actor = with_value_head(self.actor, self.shape)
            self.rows["actor adapter"] += value_head_bytes(self.shape)
        for role, trains in (("actor", self.actor), ("critic", self.critic)):
            self.add_optimizer(role, trains.parameters, trains.rank)

    def trainable(self, shape: ModelShape, kind: str, rank: int, target: str) -> Trainable:
        """The trainable part of a model with finetuning_type `kind`: lora, freeze or full."""
        inputs, config = self.inputs, self.inputs.config
        casts = inputs.itemsize if inputs.autocast else 0
        if kind == "lora":
            count = shape.lora_parameters(rank, target, config.lora_layers)
            layers = min(config.lora_layers or shape.layers, shape.layers)
            if config.use_dora:  # one magnitude for each output
                outputs = sum(out for _, out in shape.targets(target).values())
                count += layers * outputs
            return Trainable(FLOAT32 * count, count, casts * count, rank, layers)
        if kind == "freeze":
            layers = min(abs(config.freeze_trainable_layers), shape.layers)
            count = layers * shape.layer_parameters
            deep = layers if config.freeze_trainable_layers > 0 else shape.layers
            return Trainable(0, count, casts * count, 0, deep, trains_base=True)
        count = shape.parameters
        return Trainable(0, count, casts * count, 0, shape.layers, trains_base=True)

    def add_optimizer(self, role: str, parameters: int, rank: int) -> None:
        """Add a role's optimiser state; paged state counts as host memory."""
        optim = self.inputs.config.optim or ""
        states = next((count for name, count in OPTIMIZER_STATES.items() if name in optim), 2)
        each = states * (BYTES_8BIT if "8bit" in optim else FLOAT32)
        if optim == "adafactor":  # a row and a column per matrix: 1 / rank of an adapter's size
            each = FLOAT32 / rank if rank else 0
        where = self.host if optim.startswith("paged") else self.rows
        where[f"{role} optimiser"] = int(each * parameters)

    def add_frozen_model(
        self, row: str, shape: ModelShape, bits: int | None, *, stays: bool = False
    ) -> None:
        """Add a separate frozen model to `row`; it is streamed if the configuration says so.

        With `stays` it is never streamed.
        """
        double = self.double or row == "reward weights"
        size = weight_bytes(shape, self.inputs.itemsize, bits, double=double)
        if self.inputs.shards and row == "reference weights":
            size = sharded_bytes(shape, self.inputs.itemsize, self.inputs.gpus)
        if self.inputs.config.stream_frozen and bits is None and not stays:
            size, away = streamed_bytes(shape, self.inputs.itemsize)
            self.host[row] = self.host.get(row, 0) + away
        self.rows[row] = self.rows.get(row, 0) + size

    def add_reference(self) -> None:
        """Add the reference: ref_model, a frozen copy of what trains, or nothing (base itself)."""
        inputs, config, item = self.inputs, self.inputs.config, self.inputs.itemsize
        if config.ref_model is not None:
            bits = config.ref_model_quantization_bit
            shape = self.shapes.reference or self.shape
            # With freeze and full, a critic that is an adapter trains on the reference's weights.
            stays = self.actor.trains_base and inputs.has_critic and config.critic == "adapter"
            self.add_frozen_model("reference weights", shape, bits, stays=stays)
        elif self.actor.trains_base:
            self.rows["reference weights"] = self.actor.parameters * item
        elif inputs.continues_adapter:
            self.rows["reference adapter"] = self.actor.adapter_bytes

    def add_rewards(self) -> None:
        """Add reward adapters (frozen, in the base's dtype) and reward models.

        Functions and servers take no memory here.
        """
        inputs, config, item = self.inputs, self.inputs.config, self.inputs.itemsize
        for kind in inputs.reward_kinds:
            if kind == "lora":
                count = self.shape.lora_parameters(
                    inputs.reward_rank, inputs.reward_target, config.lora_layers
                )
                size = count * item + value_head_bytes(self.shape)
                self.rows["reward adapter"] = self.rows.get("reward adapter", 0) + size
            elif kind == "full":  # a classifier: the trunk, and one row instead of the head
                trunk = replace(self.shapes.reward or self.shape, tied=True)
                self.add_frozen_model("reward weights", trunk, config.reward_model_quantization_bit)

    def add_critic(self) -> None:
        """Add the critic: a value head, with its adapter or its own model."""
        inputs, config, shape, critic = self.inputs, self.inputs.config, self.shape, Trainable()
        if config.critic == "model":
            shape = self.shapes.critic_or_base
            kind = config.critic_finetuning_type or config.finetuning_type
            bits = config.quantization_bit if kind == "lora" else None
            critic = self.trainable(shape, kind, config.lora_rank, config.lora_target)
            weights = weight_bytes(shape, inputs.itemsize, bits, double=self.double)
            if inputs.shards:
                weights = sharded_bytes(shape, inputs.itemsize, inputs.gpus)
            if critic.trains_base:
                weights += critic.parameters * (FLOAT32 - inputs.itemsize)
            self.rows["critic weights"] = weights
        elif config.critic == "adapter":
            rank = inputs.reward_rank if "lora" in inputs.reward_kinds else config.lora_rank
            critic = self.trainable(shape, "lora", rank, config.lora_target)
        self.critic = with_value_head(critic, shape)
        self.rows["critic adapter"] = self.critic.adapter_bytes + value_head_bytes(shape)


def value_head_bytes(shape: ModelShape) -> int:
    """Bytes of a value head in float32."""
    return FLOAT32 * (shape.hidden + 1)


def with_value_head(trainable: Trainable, shape: ModelShape) -> Trainable:
    """`trainable` with the parameters of a value head added."""
    return replace(trainable, parameters=trainable.parameters + shape.hidden + 1)
