"""What a trunk allocates, by PyTorch's profile, against the layers that the plan simulates."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from fastppo.memory.layer import LayerSetting
from fastppo.memory.shapes import from_config
from fastppo.memory.trunk import trunk_memory
from fastppo.models.adapters import disable_input_cast
from fastppo.models.lora import fuse_lora_layers
from fastppo.models.native_layers import fuse_native_layers
from fastppo.offload.activations import wrap
from tests.memory.allocations import profiled_allocations
from tests.tiers import slow_unless

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


# The plain trunk, 16 bits recomputed with fused layers, eager attention, DoRA, sliding windows.
ONE_OF_A_KIND = (
    (LlamaConfig, torch.float32, "sdpa", False, "peft"),
    (LlamaConfig, torch.bfloat16, "sdpa", True, "fused"),
    (LlamaConfig, torch.float32, "eager", False, "peft"),
    (LlamaConfig, torch.float32, "sdpa", False, "dora"),
    (Gemma3TextConfig, torch.float32, "sdpa", True, "peft"),
    (LlamaConfig, torch.float32, "sdpa", False, "native"),
    (Gemma3TextConfig, torch.float32, "sdpa", False, "native"),
)


@pytest.mark.parametrize(
    ("kind", "dtype", "attention", "checkpointing", "layers"),
    slow_unless(
        lambda *case: case in ONE_OF_A_KIND,
        [
            (LlamaConfig, torch.float32, "sdpa", False, "peft"),
            (LlamaConfig, torch.bfloat16, "sdpa", True, "peft"),
            (LlamaConfig, torch.bfloat16, "sdpa", True, "fused"),
            (LlamaConfig, torch.bfloat16, "sdpa", False, "fused"),
            (LlamaConfig, torch.float16, "sdpa", True, "fused"),
            (LlamaConfig, torch.float16, "sdpa", False, "peft"),
            (LlamaConfig, torch.float32, "eager", False, "peft"),
            (LlamaConfig, torch.float32, "sdpa", False, "dora"),
            (Qwen2Config, torch.bfloat16, "sdpa", False, "peft"),
            (Qwen2Config, torch.bfloat16, "sdpa", True, "dora"),
            (Qwen2Config, torch.bfloat16, "sdpa", True, "fused"),
            (Qwen3Config, torch.float32, "sdpa", False, "peft"),
            (Qwen3Config, torch.float32, "sdpa", True, "fused"),
            (Gemma2Config, torch.float32, "eager", True, "peft"),
            (Gemma3TextConfig, torch.float32, "sdpa", True, "peft"),
            (LlamaConfig, torch.float32, "sdpa", False, "native"),
            (LlamaConfig, torch.float32, "sdpa", True, "native"),
            (Qwen3Config, torch.float32, "sdpa", False, "native"),
            (Gemma3TextConfig, torch.float32, "sdpa", False, "native"),
            (Gemma2Config, torch.float32, "eager", True, "native"),
        ],
    ),
)
def test_a_trunk_allocates_what_its_layers_are_written_to(
    kind, dtype, attention, checkpointing, layers
):
    dora, native = layers == "dora", layers == "native"
    fused = native or layers == "fused"
    own = {} if kind is Qwen2Config else {"head_dim": 16}
    config = kind(**TINY, **own)
    config._attn_implementation = attention
    base = AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False)
    targets = list(from_config(config.to_dict(), "here").linears)
    adapted = get_peft_model(base, LoraConfig(r=8, target_modules=targets, use_dora=dora)).train()
    disable_input_cast(adapted)
    if fused:
        fuse_lora_layers(adapted)
    if native:
        fuse_native_layers(adapted)
    if checkpointing:
        wrap(base, "checkpoint")
    ids_BT = torch.randint(0, 128, (2, 200), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, 150:] = 0

    def forward() -> torch.Tensor:
        half = dtype != torch.float32
        # On a CPU with AMX, oneDNN packs keys and values into memory of its own; no GPU does that.
        plain = torch.backends.mkldnn.flags(enabled=False)
        with plain, torch.autocast("cpu", dtype=dtype if half else None, enabled=half):
            trunk = getattr(base, base.base_model_prefix)
            return trunk(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)[0]

    forward().sum().backward()  # what is made once
    adapted.zero_grad(set_to_none=True)
    with profiled_allocations() as blind, torch.no_grad():
        forward()
    with profiled_allocations() as ahead:
        hidden_BTD = forward()
    grad_BTD = torch.ones_like(hidden_BTD)
    with profiled_allocations() as back:
        hidden_BTD.backward(grad_BTD)
    shape = from_config(config.to_dict(), "here")
    eager = attention == "eager"
    how = {"eager": eager, "dora": dora, "fused": fused, "native": native}
    setting = LayerSetting(2, 200, dtype.itemsize, rank=8, masked=True, **how)
    plan = trunk_memory(shape, setting)
    below = 3 * plan.input if checkpointing else 2 * plan.saved + plan.saved_first
    top = max(plan.input + plan.norm_backward, plan.recompute)
    here = plan.fixed + plan.input + below  # the last hidden states are held here
    held = here + (plan.input if checkpointing else plan.saved) + plan.norm_saved
    # Autocast's copies of the adapters: without gradients all of them stay until the pass ends, and
    # fused layers make only their own. A plan has them in a row of theirs, `kept activations`.
    copies = dtype.itemsize * shape.lora_parameters(8) if dtype != torch.float32 else 0
    plain = plan.fixed + plan.forward + (copies // shape.layers if fused else copies)
    # Some of those CPUs pack the values in 16 bits without oneDNN, too.
    packed = ids_BT.numel() * config.num_attention_heads * 16 * dtype.itemsize
    packs = dtype != torch.float32 and torch.cpu._is_amx_tile_supported()
    peaks = (blind.peak, blind.peak - packed) if packs else (blind.peak,)
    assert any(plain == pytest.approx(peak, rel=0.05) for peak in peaks)
    tolerance = 0.1 if dora else 0.05
    assert held == pytest.approx(ahead.end, rel=tolerance)
    total = here + (top if checkpointing else plan.backward)
    assert total == pytest.approx(ahead.end + back.peak, rel=tolerance)
