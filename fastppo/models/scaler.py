"""The loss scaler of a run in float16: it makes gradients `scale` times as large.

float16 has numbers from 6e-8 to 65504; without a scale most gradients are smaller. Gradients above
the range become infinite: then the optimiser's step is skipped and the scale is halved. After 2000
steps without an overflow it is doubled. `torch.amp.GradScaler` does all of this on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.amp import GradScaler


def make_scaler(autocast: torch.dtype | None, device: torch.device) -> GradScaler | None:
    """A scaler if the run autocasts to float16, else None."""
    return GradScaler(device.type) if autocast == torch.float16 else None


def current_scale(scaler: GradScaler, device: torch.device) -> Tensor:
    """A copy of the current scale (0-d, on the device)."""
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale


def overflows(finite_loss: Tensor, finite_gradient: Tensor, scale: Tensor) -> Tensor:
    """Whether a gradient is infinite only because of the scale (0-d bool).

    It is not if the loss itself is not finite, or if the scale is 1 or less.
    """
    return finite_loss & ~finite_gradient & (scale > 1)
