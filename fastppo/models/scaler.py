"""The loss scaler of a run in float16: gradients are made `scale` times as large.

float16 ends at 65504 above and at 6e-8 below; most gradients lie below without a scale. Those that
pass the upper end turn infinite: the optimiser's step is skipped then, and the scale halved. It is
doubled after 2000 steps without. All of that is `torch.amp.GradScaler`'s, and stays on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.amp import GradScaler


def make_scaler(autocast: torch.dtype | None, device: torch.device) -> GradScaler | None:
    """A scaler for what the run autocasts to; None unless that is float16."""
    return GradScaler(device.type) if autocast == torch.float16 else None


def current_scale(scaler: GradScaler, device: torch.device) -> Tensor:
    """The scale as it is now: a 0-d copy on the device."""
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale


def overflows(finite_loss: Tensor, finite_gradient: Tensor, scale: Tensor) -> Tensor:
    """Whether only the scale has made a gradient infinite: a smaller one will do (0-d bool).

    Not so where the loss itself is not finite, nor with a scale of 1 or below.
    """
    return finite_loss & ~finite_gradient & (scale > 1)
