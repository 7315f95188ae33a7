"""Heads that are DTensors: sharded by vocabulary (tensor parallel), or by FSDP2 to save memory.

Both are Shard(0) of the weight. What a rank computes with it is not the same, so the caller says
which it is: `group=` takes this rank's words as a shard of the vocabulary, and `gather_weight`
makes the whole weight of FSDP2's shards.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from fastppo.ops.checks import wrong_kind
from fastppo.ops.config import HeadLora
from fastppo.ops.head import Head

GRADIENTS: Final = ("mean", "sum")


def gather_weight(weight: Tensor, *, reduce: str = "mean") -> Tensor:
    """The whole of a weight that is a DTensor, such as FSDP2's shard of a head; differentiable.

    Every rank of its mesh calls it, and has all of the weight for as long as the result lives. In
    the backward the gradients of all ranks are reduced, and each is given its own shard of them, so
    the ranks may have different tokens, as in data parallel training.

    Args:
        weight: a float DTensor of any placements, (V, D).
        reduce: what the gradient is of the ranks' gradients: their "mean", as in FSDP2, or their
            "sum".

    Returns:
        A plain tensor (V, D), the same on every rank.

    Raises:
        TypeError: the weight is no DTensor.
        ValueError: another `reduce`.
    """
    op = "gather_weight"
    if not is_dtensor(weight):
        wrong_kind(op, "weight", weight, "a DTensor (a plain tensor is whole: pass it as it is)")
    if reduce not in GRADIENTS:
        raise ValueError(f"{op}: reduce must be one of {', '.join(GRADIENTS)}, came {reduce!r}")
    from torch.distributed.tensor import Partial

    sharded: Any = weight
    mesh = sharded.device_mesh
    whole: Tensor = sharded.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if reduce == "mean" and whole.requires_grad:
        size = mesh.size()
        whole.register_hook(lambda grad: grad / size)  # type: ignore[no-untyped-call]
    return whole


def is_dtensor(x: object) -> bool:
    """Whether it is a DTensor. Where nobody imported their module, there is none."""
    if torch.compiler.is_compiling():
        return False  # it has words of its own for them
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def refuse_dtensor(op: str, name: str, x: object) -> None:
    if is_dtensor(x):
        raise ValueError(
            f"{op}: {name} must be a plain tensor, came a DTensor; give {name}.to_local() where it "
            "is the same on every rank"
        )


def local_head(op: str, head: Head, group: dist.ProcessGroup | None, prefix: str = "") -> Head:
    """The head as plain tensors: of a DTensor this rank's words, where `group` shards them.

    Raises:
        ValueError: a DTensor without a group, or one that is sharded in another way.
    """

    def local(name: str, x: Any, *, words: bool = True) -> Any:
        return _local(op, f"{prefix}{name}", x, group, words) if is_dtensor(x) else x

    lora = head.lora
    if isinstance(lora, HeadLora):
        a_RD, b_VR = lora.A_RD, lora.B_VR
        a_RD = local("head_lora.A_RD", a_RD, words=False)
        lora = HeadLora(a_RD, local("head_lora.B_VR", b_VR), lora.scaling)
    return Head(local("weight_VD", head.weight_VD), local("bias_V", head.bias_V), lora)


def _local(op: str, name: str, x: Any, group: dist.ProcessGroup | None, words: bool) -> Tensor:
    from torch.distributed.tensor import Replicate, Shard

    if group is None:
        raise ValueError(
            f"{op}: {name} is a DTensor: gather_weight({name}) makes the whole of FSDP2's shards; "
            "for a vocabulary that is sharded (tensor parallel) linear_token_logprobs and "
            "linear_policy_loss take group=mesh.get_group()"
        )
    ours = getattr(group, "group_name", None)
    over = [x.device_mesh.get_group(dim).group_name == ours for dim in range(x.device_mesh.ndim)]
    wanted = [Shard(0) if words and here else Replicate() for here in over]
    if list(x.placements) != wanted or not any(over):
        raise ValueError(
            f"{op}: {name} must be a DTensor whose mesh has group= as a dimension, "
            f"{'Shard(0)' if words else 'Replicate()'} over it and Replicate() over others, came "
            f"{x.placements}; redistribute it, or gather_weight({name})"
        )
    return x.to_local()  # type: ignore[no-any-return]
