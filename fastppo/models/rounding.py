"""How much two correct passes over the same tokens may differ, by the precision of their products.

Two passes with the same weights can multiply matrices of different shapes, for which libraries run
different kernels; their results then differ by rounding. One table of limits is used for all
comparisons: scoring with update, sampler with scoring, and the output head with the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

Precision = Literal["float32", "tf32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Limits:
    """The largest differences that rounding explains.

    Attributes:
        log_ratio: mean |log ratio| of the first pass, before any optimiser step; a run stops at ten
            times this limit.
        sampler_gap: mean |difference| of the sampler's log-probs and the trainer's.
        head: |difference| of one log-prob by the head alone and by the whole model.
    """

    log_ratio: float
    sampler_gap: float
    head: float


# TF32 and float16 have 11 significant bits where bfloat16 has 8: an eighth of its rounding.
LIMITS: dict[Precision, Limits] = {
    "float32": Limits(log_ratio=1e-5, sampler_gap=1e-3, head=1e-3),
    "tf32": Limits(log_ratio=2.5e-3, sampler_gap=1.25e-2, head=6.25e-3),
    "float16": Limits(log_ratio=2.5e-3, sampler_gap=1.25e-2, head=6.25e-3),
    "bfloat16": Limits(log_ratio=2e-2, sampler_gap=0.1, head=0.05),
}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest number that was wanted."""
    found, wanted = found.float(), wanted.float()
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def product_precision(device: torch.device, *, autocast: torch.dtype | None) -> Precision:
    """The lowest precision in which a layer multiplies matrices on `device`.

    `autocast` is the dtype to which the run autocasts, None for float32. An autocast that is
    already active also counts, and so do PyTorch's flags for float32 (`tf32: true`,
    `torch.set_float32_matmul_precision`, `allow_tf32`). Quantised layers multiply in the dtype of
    the run.
    """
    if autocast is None and torch.is_autocast_enabled(device.type):
        autocast = torch.get_autocast_dtype(device.type)
    if autocast is None:
        return float32_precision(device)
    return "bfloat16" if autocast == torch.bfloat16 else "float16"


def float32_precision(device: torch.device) -> Precision:
    """The precision that PyTorch's flags allow for products of float32 matrices on `device`."""
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    # PyTorch before 2.9 has one flag for all backends; later versions may refuse to read it.
    named = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if named is None:
        named = torch.get_float32_matmul_precision()
        if named == "medium":
            named = "tf32" if device.type == "cuda" else "bf16"
    found: dict[str, Precision] = {"high": "tf32", "tf32": "tf32", "bf16": "bfloat16"}
    return found.get(named, "float32")


# Flags in Linux's /proc/cpuinfo of processors that multiply matrices in 16 bits: x86's, then Arm's.
INSTRUCTIONS: Final = {
    torch.bfloat16: ("bf16: true", {"avx512_bf16", "amx_bf16", "bf16"}),
    torch.float16: ("fp16: true", {"avx512_fp16", "amx_fp16", "asimdhp"}),
}


def note_on_16_bits(
    device: torch.device, autocast: torch.dtype | None, cpuinfo: Path = Path("/proc/cpuinfo")
) -> str | None:
    """A line where a CPU or a GPU is asked for 16 bits that it has no instructions for; else None.

    Args:
        device: where the run computes.
        autocast: the dtype of its matrix products, None for float32.
        cpuinfo: Linux's description of the processor; without that file nothing is said.
    """
    if device.type == "cuda" and autocast == torch.bfloat16 and torch.cuda.is_available():
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return None
        return (
            "bf16: true: this GPU is older than Ampere (V100, T4, RTX 20) and has no instructions "
            "for it, so matrix products take several times as long; use fp16: true"
        )
    if device.type != "cpu" or autocast not in INSTRUCTIONS or not cpuinfo.is_file():
        return None
    key, flags = INSTRUCTIONS[autocast]
    if flags & set(cpuinfo.read_text(encoding="utf-8", errors="replace").split()):
        return None
    return (
        f"{key}: this processor has no instructions for it, so matrix products take several times "
        "as long as in float32; leave the key out to compute in float32"
    )
