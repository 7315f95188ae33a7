"""Keys of the base model: where it comes from and how it is loaded; and the dtype of its weights.

No torch here: the memory plan needs the dtype too.
"""

from __future__ import annotations

from typing import Any, Literal

from fastppo.config.key import LF, OWN, Keys, key
from fastppo.config.published import text_part


class ModelKeys(Keys):
    """Keys of the base model, on which all roles run."""

    title = "Model"

    model_name_or_path: str = key(..., LF, "The base: a local folder or a hub name.", first=True)
    model_gguf_file: str | None = key(
        None, OWN, "GGUF file inside model_name_or_path to read weights from."
    )
    model_revision: str = key("main", LF, "Branch, tag or commit on the hub.")
    cache_dir: str | None = key(None, LF, "Folder of the hub's files.")
    hf_hub_token: str | None = key(
        None, LF, "Token for the hub; null is HF_TOKEN from the environment, or that of the login."
    )
    trust_remote_code: bool = key(
        False, LF, "Run code that comes with the model; off unless asked."
    )
    flash_attn: Literal["auto", "sdpa", "disabled", "fa2"] = key(
        "auto",
        LF,
        "Attention: fa2 is flash-attn, sdpa PyTorch's, disabled eager; auto is fa2 if it can "
        "run, else sdpa.",
    )
    quantization_bit: Literal[4, 8] | None = key(
        None,
        LF,
        "Quantise the base's linear layers to this number of bits (QLoRA); null is no "
        "quantisation.",
    )
    quantization_method: Literal["bnb"] = key(
        "bnb", LF, "The library that quantises: bitsandbytes."
    )
    quantization_type: Literal["nf4", "fp4"] = key("nf4", LF, "The 4-bit number format.")
    double_quantization: bool = key(True, LF, "Also quantise the 4-bit scales.")


def own_dtype(data: dict[str, Any]) -> str:
    """The dtype of published weights that their config.json names; float32 if it names none."""
    own = text_part(data)
    named = own.get("dtype") or own.get("torch_dtype") or "float32"
    return str(named).removeprefix("torch.")


def run_dtype(*, bf16: bool, fp16: bool, own: str, on_gpu: bool) -> str:
    """The run's dtype: by `bf16` or `fp16`; else on a GPU the weights' own, on a CPU float32.

    On a GPU this is LLaMA-Factory's rule, except that without `fp16` weights in float16 run in
    bfloat16, which has the same size and needs no loss scaler.
    """
    if fp16:
        return "float16"
    half = bf16 or (on_gpu and own in ("bfloat16", "float16"))
    return "bfloat16" if half else "float32"
