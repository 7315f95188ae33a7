"""Triton's interpreter stands in for a GPU where there is none: it is chosen at import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
