"""Activations and frozen weights in host memory; used alone or by the trainer."""

from fastppo.offload.activations import ActivationOffload
from fastppo.offload.frozen import stream

__all__ = ["ActivationOffload", "stream"]
