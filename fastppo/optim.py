"""AdamW by transformers' names: PyTorch's, or bitsandbytes' with 8-bit or paged state."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from fastppo.errors import UserError

# Name -> bits of the state, and whether it lies in unified memory that pages out to the host.
BITSANDBYTES = {
    "adamw_8bit": (8, False),
    "adamw_bnb_8bit": (8, False),
    "paged_adamw_8bit": (8, True),
    "paged_adamw_32bit": (32, True),
}


def adamw(name: str | None, groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """AdamW over `groups`; `settings` are betas, eps and weight_decay, of which all of them know.

    Raises:
        UserError: bitsandbytes is asked for and is not installed.

    Source: Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization; Dettmers et al. 2022,
    8-bit Optimizers via Block-wise Quantization.
    """
    if name not in BITSANDBYTES:
        return torch.optim.AdamW(
            groups, fused=True if name == "adamw_torch_fused" else None, **settings
        )
    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(
            f"optim: {name} needs bitsandbytes ({error}); pip install 'fastppo[quantization]', or "
            "use optim: adamw_torch"
        ) from None
    bits, paged = BITSANDBYTES[name]
    return bitsandbytes.optim.AdamW(groups, optim_bits=bits, is_paged=paged, **settings)
