"""Keep activations and frozen weights in host memory; usable in any trainer."""

from fastppo.offload.activations import ActivationOffload
from fastppo.offload.frozen import stream

__all__ = ["ActivationOffload", "stream"]
