"""Pack the live tokens of a padded batch: remove the padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastppo.ops.checks import show, wrong_kind


@dataclass(frozen=True)
class Packing:
    """The positions of the live tokens in a (B, T) batch.

    Args:
        index_N: int64 (N,), index of each live token in the flattened batch, b * T + t, ascending.
        offsets: int32 (B+1,), where each row's live tokens start in the packed batch; the last is
            N.
        shape: (B, T).
    """

    index_N: Tensor
    offsets: Tensor
    shape: tuple[int, int]

    def __len__(self) -> int:
        """N, the number of live tokens."""
        return self.index_N.numel()

    def gather(self, x_BT: Tensor) -> Tensor:
        """The live entries of a (B, T, ...) tensor, as (N, ...); differentiable."""
        if tuple(x_BT.shape[:2]) != self.shape:
            raise ValueError(
                f"Packing.gather: x_BT must start with shape {show(self.shape)}, "
                f"came {show(tuple(x_BT.shape))}"
            )
        return x_BT.flatten(0, 1).index_select(0, self.index_N)

    def scatter(self, x_N: Tensor) -> Tensor:
        """A (B, T, ...) tensor with x_N at the live tokens and 0 elsewhere; differentiable."""
        if x_N.shape[:1] != self.index_N.shape:
            raise ValueError(
                f"Packing.scatter: x_N must start with shape {show((len(self),))}, "
                f"came {show(tuple(x_N.shape))}"
            )
        rest = x_N.shape[1:]
        flat = x_N.new_zeros((self.shape[0] * self.shape[1], *rest))
        return flat.index_copy(0, self.index_N, x_N).reshape(*self.shape, *rest)

    def to(self, device: torch.device | str) -> Packing:
        """The same packing with its tensors on `device`."""
        return Packing(self.index_N.to(device), self.offsets.to(device), self.shape)


def pack(mask_BT: Tensor) -> Packing:
    """The positions of the live tokens in a padded batch.

    With a mask on a GPU the host waits for the device once. To avoid that, make the mask on the CPU
    and move the packing to the GPU.

    Args:
        mask_BT: bool (or 0/1) (B, T), True where a token is live; rows may be empty and have holes.

    Raises:
        ValueError: the mask does not have two dimensions.
    """
    if not isinstance(mask_BT, Tensor):
        wrong_kind("pack", "mask_BT", mask_BT, "a tensor")
    if mask_BT.ndim != 2:
        raise ValueError(f"pack: mask_BT must have shape (B, T), came {show(tuple(mask_BT.shape))}")
    live = mask_BT != 0
    index_N = live.flatten().nonzero().squeeze(1)
    offsets = torch.zeros(live.shape[0] + 1, dtype=torch.int32, device=live.device)
    offsets[1:] = live.sum(1).cumsum(0)
    return Packing(index_N, offsets, (live.shape[0], live.shape[1]))
