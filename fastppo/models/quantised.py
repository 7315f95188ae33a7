"""Linear layers in 4 and 8 bits: bitsandbytes' settings, and matrix products for training."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import BitsAndBytesConfig

if TYPE_CHECKING:
    from fastppo.config import Config

INT8_MAX = 127  # a row's largest absolute weight, in 8 bits


def quantization_config(config: Config, bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """bitsandbytes' settings for 4 or 8 bits, with LLaMA-Factory's defaults."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization_type,
        bnb_4bit_use_double_quant=config.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def use_training_kernels(base: nn.Module) -> None:
    """Make quantised layers compute the same in every pass, and keep nothing but their weights.

    On CPUs bitsandbytes repacks 4-bit weights permanently in the first forward in evaluation mode,
    and repacked weights have no backward: adapters in the layers below would get no gradient. The
    forward of its 8-bit layers is replaced by `linear_8bit`.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if isinstance(module, nn.Linear) and module.weight.dtype == torch.int8:
            module.forward = MethodType(linear_8bit, module)


def linear_8bit(layer: Any, x: Tensor) -> Tensor:
    """x W^T + b of bitsandbytes' 8-bit layer, with W in the dtype of the product.

    It replaces LLM.int8()'s product, which rounds activations to 8 bits and chooses outlier columns
    for each batch: ratios would not start at 1. LLM.int8() also keeps each layer's input in the
    graph, where checkpointing and offloading do not reach it.
    """
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    scale_V = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    out = Product8bit.apply(x.to(dtype), layer.weight, scale_V)  # type: ignore[no-untyped-call]
    return out if layer.bias is None else out + layer.bias.to(dtype)


class Product8bit(torch.autograd.Function):
    """x W^T; W is dequantised for this product, and again for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_VD: Tensor, scale_V: Tensor) -> Tensor:
        ctx.save_for_backward(weight_VD, scale_V)
        return x @ dequantised(weight_VD, scale_V, x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight_VD, scale_V = ctx.saved_tensors
        return grad @ dequantised(weight_VD, scale_V, grad.dtype), None, None


def dequantised(weight_VD: Tensor, scale_V: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights as `dtype`, from int8 (V, D) and the largest absolute value per row, float32 (V,)."""
    return weight_VD.to(dtype).mul_((scale_V / INT8_MAX).to(dtype)[:, None])
