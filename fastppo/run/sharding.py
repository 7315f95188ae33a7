"""FSDP2: the frozen decoder layers of a base, of which each process of a run holds a part.

A forward gathers the weights of one layer after another from all processes, and a backward gathers
them once more; behind a layer its weights are let go of. All else is whole in every process:
embeddings, the last norm, the output head, adapters and value heads. So gradients are summed as
without sharding.

A pass has to be made by all processes together. What differs between them (the number of their
micro-batches, of their steps of decoding, of their groups in an evaluation) is made even by passes
over one token, whose loss counts zero.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastppo.errors import UserError
from fastppo.models.load import causal_lm, text_model, trunk
from fastppo.models.shared_layers import all_adapters
from fastppo.offload.activations import find_layers
from fastppo.run.agreement import CURE, sample

if TYPE_CHECKING:
    from fastppo.config import Config
    from fastppo.memory.budgets import Budgets
    from fastppo.models.roles import Roles
    from fastppo.run.world import World

# What accelerate's configuration asks for, as LLaMA-Factory's examples do, and the file does not.
ACCELERATES: Final = (
    "ACCELERATE_USE_FSDP: accelerate's own settings of FSDP are not read, and each process has the "
    "whole base; fsdp: full_shard in this run's file shards it"
)
# Since torch 2.13 the first name warns.
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Sharding:
    """What a process of a sharded run asks the others before each pass, and its passes for them.

    Args:
        roles: their base is sharded.
        world: the processes that have a part of it.
    """

    def __init__(self, roles: Roles, world: World) -> None:
        self.roles, self.world = roles, world
        self.token_BT = torch.zeros(1, 1, dtype=torch.long, device=roles.device)

    def most(self, count: int) -> int:
        """The largest `count` of all processes."""
        return int(self.world.max(torch.tensor(count)).item())

    def missing(self, count: int) -> int:
        """How many more another process has than `count`, which is this one's; at least 0."""
        return self.most(count) - count

    def begin_pass(self) -> None:
        """Called before a pass of which the others do not know."""
        self.most(1)

    def join_passes(self) -> None:
        """Take part in the passes that other processes begin, until none has any left."""
        while self.most(0):
            self.idle(1)

    def idle(self, passes: int, *, backward: bool = False) -> None:
        """Run the active role over one token `passes` times.

        With `backward` each is differentiated, if the role trains: its gradients are 0.
        """
        for _ in range(passes):
            with torch.set_grad_enabled(backward):
                hidden_BTD = self.roles.hidden(self.token_BT)
            if hidden_BTD.requires_grad:
                (hidden_BTD * 0.0).sum().backward()  # type: ignore[no-untyped-call]

    def idle_scoring(self, count: int) -> None:
        """The passes of `count` micro-batches of scoring, over one token each, in its order."""
        roles = self.roles
        own_critic = roles.has_critic and not roles.shares_trunk
        for _ in range(count):
            for role in ("reference", *(("critic",) if own_critic else ()), "actor"):
                with roles.use(role):
                    self.idle(1)

    def idle_update(self, count: int, *, train_actor: bool) -> None:
        """The passes of `count` micro-batches of the update, over one token each, in its order."""
        roles = self.roles
        for _ in range(count):
            with roles.use("actor"):
                self.idle(1, backward=train_actor)
            if roles.has_critic and not roles.shares_trunk:
                with roles.use("critic"):
                    self.idle(1, backward=True)


class AllGather:
    """FSDP2's all-gather; that another process was lost in it is one line."""

    def __init__(self, world: World) -> None:
        self.world = world

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Where the gathered weights of a layer go."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> Any:
        with self.world.lost_peer_stops():
            return all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


def shard_base(config: Config, roles: Roles, budgets: Budgets, world: World) -> list[str]:
    """With `fsdp`, put the models of `roles`, which are in host memory, on the device, in parts.

    In one process they are put there whole. Sets `roles.sharding`.

    Returns:
        Lines for the start of the run.

    Raises:
        UserError: a process has other weights, or the model has no decoder layers to shard.
    """
    if not config.shards:
        asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
        return [ACCELERATES] if asked else []
    models = {id(place.model): place.model for place in roles.places.values()}.values()
    if world.size == 1:
        for model in models:
            model.to(roles.device)
        return ["fsdp: one process has nobody to share the base with, and holds all of it"]
    for model in models:
        shard_layers(model, roles.device, world)
    roles.sharding = Sharding(roles, world)
    budgets.retries = False  # the others are in the midst of the pass that failed
    held = sum(local_bytes(model) for model in models)
    whole = sum(p.nbytes for model in models for p in model.parameters())
    return [
        f"fsdp is experimental: it was tried on CPUs, never on several GPUs. Of {whole:,} bytes of "
        f"weights each of {world.size} processes holds {held:,}; what runs out of memory is not "
        "tried again",
        *ignored_settings(config),
    ]


def ignored_settings(config: Config) -> list[str]:
    """A line on what `fsdp_config` has that does nothing here."""
    names = config.fsdp_without_effect
    if not names:
        return []
    return [
        f"fsdp_config: {', '.join(names)}: without effect here: each decoder layer of the frozen "
        "base is sharded, and nothing else"
    ]


def shard_layers(model: nn.Module, device: torch.device, world: World) -> None:
    """Shard the frozen weights of a model's decoder layers, and put all else whole on `device`.

    One layer after another is brought to the device and cut: the whole model is never there.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    world.agree({"weights": digest(model)}, CURE)
    try:
        layers = find_layers(text_model(model))
    except ValueError as error:
        raise UserError(f"fsdp: {error}; leave fsdp out") from None
    adapters = {id(parameter) for parameter in all_adapters(model)}
    shards = {p for p in layers.parameters() if id(p) not in adapters}
    whole = {p for p in model.parameters() if p not in shards}
    for tensor in (*whole, *model.buffers()):
        tensor.data = tensor.data.to(device)
    mesh = init_device_mesh(device.type, (world.size,))
    gather: Any = AllGather(world)
    for layer in layers:
        sharded = fully_shard(layer, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
        sharded.set_custom_all_gather(gather)
    # The root, which has no weights of its own: it ends each pass for all layers.
    fully_shard(trunk(causal_lm(model)), mesh=mesh, ignored_params=whole)


def digest(model: nn.Module) -> str:
    """A digest of a few numbers of each of a model's weights."""
    return hashlib.sha256(json.dumps(sample(model)).encode()).hexdigest()


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process has a part of a weight alone, which then is a DTensor."""
    return hasattr(parameter, "to_local")


def local_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights in this process."""
    parameters: list[Any] = list(model.parameters())
    return sum((p.to_local() if is_sharded(p) else p).nbytes for p in parameters)
