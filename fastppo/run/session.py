"""What a run sets for its whole process: the device and how float32 is multiplied on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastppo.config import Config


def start(config: Config) -> torch.device:
    """The device to train on; `tf32` is set on the way, `use_cpu` passes a GPU over."""
    if config.tf32 is not None:
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    on_gpu = torch.cuda.is_available() and not config.use_cpu
    return torch.device("cuda" if on_gpu else "cpu")
