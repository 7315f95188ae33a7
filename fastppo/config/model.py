"""The keys of the base model: where it is from, and how it is loaded; and the dtype of its weights.

No torch here: the memory plan asks for that dtype too.
"""

from __future__ import annotations

from typing import Any, Literal

from fastppo.config.key import LF, OWN, Keys, key


class ModelKeys(Keys):
    """The part of a run that says which model everything stands on."""

    title = "Model"

    model_name_or_path: str = key(..., LF, "The base: a local folder or a hub name.", first=True)
    model_gguf_file: str | None = key(
        None, OWN, "GGUF file inside model_name_or_path to read weights from."
    )
    model_revision: str = key("main", LF, "Branch, tag or commit on the hub.")
    cache_dir: str | None = key(None, LF, "Where the hub's files are kept.")
    hf_hub_token: str | None = key(
        None, LF, "Token for the hub; null is HF_TOKEN of the environment, or the login's."
    )
    trust_remote_code: bool = key(
        False, LF, "Run code that comes with the model; off unless asked."
    )
    flash_attn: Literal["auto", "sdpa", "disabled", "fa2"] = key(
        "auto",
        LF,
        "Attention: fa2 is flash-attn, sdpa PyTorch's, disabled eager; auto is fa2 where it can "
        "run, else sdpa.",
    )
    quantization_bit: Literal[4, 8] | None = key(
        None, LF, "Linear layers of the base in so many bits (QLoRA); null is none."
    )
    quantization_method: Literal["bnb"] = key("bnb", LF, "Who quantises: bitsandbytes.")
    quantization_type: Literal["nf4", "fp4"] = key("nf4", LF, "The 4-bit number format.")
    double_quantization: bool = key(True, LF, "Quantise the 4-bit scales too.")


def own_dtype(data: dict[str, Any]) -> str:
    """The dtype of published weights, as their config.json names it; float32 if it does not."""
    inner = data.get("text_config")
    own = {**data, **(inner if isinstance(inner, dict) else {})}
    named = own.get("dtype") or own.get("torch_dtype") or "float32"
    return str(named).removeprefix("torch.")


def run_dtype(*, bf16: bool, fp16: bool, own: str, on_gpu: bool) -> str:
    """What `bf16` or `fp16` asks for; without, on a GPU the checkpoint's own, else float32.

    LLaMA-Factory's rule for a GPU, but for weights in float16 without `fp16`: they run in bfloat16,
    which is as large and needs no loss scaler.
    """
    if fp16:
        return "float16"
    half = bf16 or (on_gpu and own in ("bfloat16", "float16"))
    return "bfloat16" if half else "float32"
